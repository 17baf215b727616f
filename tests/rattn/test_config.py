"""Recipes, arguments and the sentences for what does not fit."""

import pathlib
import subprocess
import sys

import pytest

from rattn.config import differences, load_config, parse_arguments, set_mixer, to_json, validate
from rattn.errors import UserError

RECIPES = sorted(path.stem for path in pathlib.Path("configs").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_valid_and_has_the_keys_of_base(recipe):
    config = validate(load_config(f"configs/{recipe}.py"))

    def keys(node):
        return {name: keys(value) if hasattr(value, "items") else None for name, value in node.items()}

    assert keys(config) == keys(load_config("configs/base.py"))


def test_recipe_arguments_are_typed():
    arguments = parse_arguments("window=8,mixer=swa,deep=true,rate=0.5", window=1, mixer="full", deep=False, rate=1.0)
    assert vars(arguments) == {"window": 8, "mixer": "swa", "deep": True, "rate": 0.5}
    assert vars(parse_arguments("", window=1)) == {"window": 1}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("windw=8", "The recipe has no argument 'windw', did you mean 'window'?; it takes: window."),
        ("window=wide", "Recipe argument 'window' takes int, got 'wide'; write window=VALUE."),
        ("window", "Recipe argument 'window' takes int, got ''; write window=VALUE."),
    ],
)
def test_bad_recipe_arguments_get_a_sentence(text, sentence):
    with pytest.raises(UserError) as error:
        parse_arguments(text, window=1)
    assert str(error.value) == sentence


def test_mixer_turns_local_layers_alone():
    config = set_mixer(load_config("configs/base.py"), "swa")
    assert config.model.pattern == ("swa", "swa", "swa", "full")
    assert set_mixer(config, "full").model.pattern == ("full",) * 4
    with pytest.raises(UserError, match="There is no mixer 'ratention', did you mean 'rattention'"):
        set_mixer(config, "ratention")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model.pattern": ()}, "config.model.pattern is empty"),
        (
            {"model.pattern": ("rattention", "ful"), "model.rope_pattern": (True, True)},
            "has 'ful', did you mean 'full'",
        ),
        ({"model.rope_pattern": (True,)}, "config.model.rope_pattern has 1 entries and config.model.pattern 4"),
        ({"model.layers": 3}, "config.model.pattern has 4 mixers and config.model.layers is 3"),
        ({"model.query_heads": 3}, "config.model.query_heads is 3 and config.model.kv_heads 2"),
        ({"model.head_dim": 5}, "config.model.head_dim is 5; RoPE rotates pairs"),
        ({"model.window": -1}, "config.model.window is -1; it cannot be negative"),
        ({"model.pattern": ("swa",) * 4, "model.window": 0}, "swa layers need at least 1"),
        ({"model.width": 0}, "config.model.width is 0; it must be at least 1"),
        ({"context_length": 0}, "config.context_length is 0"),
        ({"batch_size": 6, "accumulation_steps": 4}, "config.batch_size is 6 and config.accumulation_steps 4"),
        ({"loss.chunk_tokens": 100}, "config.loss.chunk_tokens is 100 and config.context_length 512"),
        ({"optimizer.warmup_steps": 2000}, "warmup_steps + decay_steps is 2000 and config.total_steps 1000"),
        ({"optimizer.name": "adamW"}, "config.optimizer.name is 'adamW', did you mean 'adamw'"),
        (
            {"model.window_choices": (8, 8)},
            "config.model.window_choices is (8, 8); give different windows of at least 0",
        ),
        ({"model.pattern": ("swa",) * 4, "model.window_choices": (0, 8)}, "give different windows of at least 1"),
        (
            {"model.pattern": ("full",) * 4, "model.window_choices": (8,)},
            "and no mixer of ('full', 'full', 'full', 'full')",
        ),
        ({"model.window_choices": (8,), "model.window_weights": (1, 2)}, "config.model.window_weights is (1, 2)"),
        ({"model.window_final_steps": 1001}, "config.model.window_final_steps is 1001 and config.total_steps 1000"),
        ({"init_from_what": "all"}, "config.init_from_what is 'all'; use one of everything, parameters"),
        (
            {"mesh.exchange": "steps"},
            "config.mesh.exchange is 'steps', did you mean 'step'?; use one of microbatch, step",
        ),
        ({"mesh.exchange": "step", "mesh.seq": 2}, "config.mesh.exchange is 'step' with seq=2 × model=1"),
        ({"mesh.exchange": "step", "mesh.model": -1}, "config.mesh.exchange is 'step' with seq=1 × model=-1"),
        ({"checkpoint.keep": 0}, "config.checkpoint.keep is 0; it must be at least 1"),
        ({"evaluation.every_steps": 0}, "config.evaluation.every_steps is 0; it must be at least 1"),
        ({"data.document_tokens": 1}, "config.data.document_tokens is 1; it must be at least 2"),
        ({"data.read_threads": -1}, "config.data.read_threads is -1; it must be at least 0"),
        ({"seed": 10**20}, "config.seed is 100000000000000000000; give a number from 0 to 4294967295"),
        (
            {"optimizer.learning_rate": float("nan")},
            "config.optimizer.learning_rate is nan; give a float32",
        ),
        ({"optimizer.beta1": 1.0}, "config.optimizer.beta1 is 1.0; give a number from 0 to below 1"),
        ({"data.weights": (float("nan"),)}, "config.data.weights is (nan,); give numbers that are not negative"),
        ({"log.profile_steps": (5,)}, "config.log.profile_steps is (5,); give the first step and the one to stop at"),
        ({"on_non_finite": "pray"}, "config.on_non_finite is 'pray'; use one of stop, skip"),
    ],
)
def test_what_does_not_fit_gets_a_sentence(changes, sentence):
    config = load_config("configs/base.py")
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as error:
        validate(config)
    assert sentence in str(error.value)
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--config", "configs/tiny.py", "--config.optimizer.learning_rat=1"],
            "did you mean 'optimizer.learning_rate'",
        ),
        (["--config", "configs/tinny.py"], "There is no config file 'configs/tinny.py', did you mean 'tiny.py'"),
        (["--config", "configs/tiny.py:windw=3"], "The recipe has no argument 'windw', did you mean 'window'"),
        (["--config", "configs/tiny.py", "--config.total_steps=many"], "total_steps"),
        (["--config", "configs/tiny.py", "--config.model.window=-2"], "config.model.window is -2"),
        (["--config", "configs/tiny.py", "--wrkdir=x"], "workdir"),
        (["--config", "configs/tiny.py", "workdir=x"], "'workdir=x' is no flag; give --flag=value"),
        ([], "There is no --config; name a recipe"),
    ],
)
def test_the_command_line_answers_in_one_sentence(arguments, sentence):
    program = "from rattn.config import run_main; from absl import flags; "
    program += "flags.DEFINE_string('workdir', None, ''); run_main(lambda config, recipe: 0)"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert done.stderr.startswith("rattn: ")
    assert done.stderr.strip().count("\n") == 0


@pytest.mark.parametrize(("stop", "status"), [("KeyboardInterrupt", 130), ("BrokenPipeError", 141)])
def test_who_stops_a_command_gets_no_traceback(stop, status):
    """Whether at the keyboard or because nobody reads on, as behind `| head`."""
    program = f"from rattn.config import run_main\ndef stopped(*_): raise {stop}\n"
    program += "run_main(stopped, needs_config=False)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (status, "", "")


def test_what_is_said_to_nobody_ends_no_work():
    program = "import sys\nfrom rattn.console import speak\nfor n in range(5000): speak('line ' * 20)\n"
    program += "print('done', file=sys.stderr)"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "done\n"
    assert process.returncode == 0


def test_differences_name_leaves():
    old, new = to_json(load_config("configs/base.py")), to_json(load_config("configs/base.py"))
    new["model"]["window"] = 5
    new["seed"] = 1
    assert differences(old, new) == [("model.window", 64, 5), ("seed", 0, 1)]
