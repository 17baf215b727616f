"""Points: settings, names, identities, what a sweep file may do wrong, which points run."""

import shlex

import pytest

from configs.sweeps import english
from rattn import prepare
from rattn.config import load_config, to_json
from rattn.data.preparation import Request
from rattn.errors import UserError
from rattn.sweeping.costs import trained_tokens
from rattn.sweeping.points import identity, load_sweep, product, same_config, select
from tests.rattn.conftest import RECIPE


def test_settings_go_to_the_recipe_or_to_the_config(sweep_of):
    text = 'def sweep(add):\n    add({"optimizer.learning_rate": 3e-4}, window=4, seed=7)\n'
    (point,) = sweep_of(text, "mixer=swa", log__every_steps=5).points
    assert point.recipe == f"{RECIPE}:mixer=swa,window=4"
    assert point.config.model.pattern == ("swa", "full")
    assert (point.config.model.window, point.config.seed, point.config.optimizer.learning_rate) == (4, 7, 3e-4)
    assert point.config.log.every_steps == 5
    assert set(point.overrides) == {
        "--config.log.every_steps=5",
        "--config.seed=7",
        "--config.optimizer.learning_rate=0.0003",
    }
    assert point.name == "window4-seed7-learning_rate0.0003"
    assert point.group == "learning_rate 0.0003"


def test_common_settings_hold_unless_a_point_says_otherwise(sweep_of):
    text = 'COMMON = {"steps": 20, "optimizer.learning_rate": 1e-4}\ndef sweep(add):\n    add(window=4)\n'
    text += "    add(window=8, steps=30)\nEVALUATION = ('--lengths=1,2',)\n"
    sweep = sweep_of(text)
    assert [point.config.total_steps for point in sweep.points] == [20, 30]
    assert [point.config.optimizer.learning_rate for point in sweep.points] == [1e-4, 1e-4]
    assert [point.name for point in sweep.points] == ["window4", "window8-steps30"]
    assert sweep.evaluation == ("--lengths=1,2",)


def test_product_runs_the_last_key_fastest():
    assert list(product(window=[1, 2], seed=[0, 1])) == [
        {"window": 1, "seed": 0},
        {"window": 1, "seed": 1},
        {"window": 2, "seed": 0},
        {"window": 2, "seed": 1},
    ]


def test_identity_is_of_the_run_and_not_of_where_it_lies(sweep_of):
    text = "def sweep(add):\n    add(window=4)\n"
    (here,) = sweep_of(text, data__path="/here", log__every_steps=3, checkpoint__keep=9).points
    (there,) = sweep_of(text, data__path="/there").points
    (other,) = sweep_of(text, optimizer__learning_rate=2e-2).points
    assert here.identity == there.identity != other.identity
    assert same_config(to_json(here.config), there.config)
    config = to_json(there.config)
    config["model"]["key_of_a_later_version"] = 1
    del config["loss"]["z_loss"]
    assert same_config(config, there.config)
    assert not same_config(config, other.config)
    assert identity(to_json(there.config), "trunk") != there.identity


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("add(windw=4)", r"The config has no key 'windw'"),
        ("add(window='x')", r"Recipe argument 'window' takes int, got 'x'"),
        ("add(mixer='swa', window=0)", r"The point 'swa-window0' cannot be resolved: config.model.window is 0"),
        ("add(window=4); add(window=4)", r"two points called 'window4'"),
        ("add(window=4, name='a/b')", r"The point name 'a/b' is to name a folder"),
        ("add(window=4); add(window=4, name='b')", r"'window4' and 'b' resolve to the same config"),
        ("add(init_from='trunc')", r"starts from 'trunc' and no point before it is called so"),
        ("add(name='..')", r"The point name '..' is to name a folder"),
        (
            "add(name='a', total_steps=60)\n    add({'init_from_step': 40}, total_steps=30, init_from='a')",
            r"goes on from step 40 and has total_steps=30; make it larger",
        ),
        (
            "add(window=4)\nEVALUATION = '--lengths=1'",
            r"EVALUATION of the sweep file .* is one text, '--lengths=1'; make it a",
        ),
        ("pass", r"adds no points"),
        (
            "pass\n    add(mixer=UNKNOWN)",
            r"sweep.py' fails in line 3: NameError: name 'UNKNOWN' is not defined; mend it",
        ),
        ("add(", r"sweep.py' fails in line 2: SyntaxError: '\(' was never closed; mend it"),
    ],
)
def test_a_bad_point_gets_a_sentence(sweep_of, body, words):
    with pytest.raises(UserError, match=words):
        sweep_of(f"def sweep(add):\n    {body}\n")


@pytest.mark.parametrize(
    ("sweep", "recipe", "count"),
    [
        ("window", "small", 48),
        ("english", "small", 10),
        ("recall", "recall", 30),
        ("tiny_window", "tiny", 5),
        ("tiny_recall", "recall", 6),
    ],
)
def test_the_sweeps_that_are_here_resolve(sweep, recipe, count):
    path = f"configs/{recipe}.py"
    points = load_sweep(f"configs/sweeps/{sweep}.py", path, load_config(path)).points
    assert len(points) == count
    if sweep == "window":
        assert [point.name for point in points[:3]] == ["50M-full-seed0", "50M-full-seed1", "50M-rattention-64-seed0"]
        branches = [point for point in points if point.trunk]
        assert {trained_tokens(point) + point.first_step * 2**16 for point in branches} == {3052 * 2**16}
        assert len(branches) == 24
        for branch in branches:
            (trunk,) = (point for point in points if point.name == branch.trunk)
            assert trunk.config.checkpoint.keep_steps == (branch.config.init_from_step,)
            assert trunk.config.total_steps - trunk.config.optimizer.decay_steps == branch.first_step


def test_english_asks_for_the_text_that_its_docstring_prepares():
    """A prepared folder remembers what it was made from, and a run that asks for anything else does not start."""
    lines = english.__doc__.replace("\\\n", " ").splitlines()
    (arguments,) = (line.partition("rattn.prepare")[2] for line in lines if "-m rattn.prepare" in line)
    prepared = prepare._parse(shlex.split(arguments))
    points = load_sweep("configs/sweeps/english.py", "configs/small.py", load_config("configs/small.py")).points
    for data in (point.config.data for point in points):
        assert (Request.from_config(data), data.path) == prepared


def test_only_and_shard_choose_and_branches_stay_with_their_trunk(sweep_of):
    points = sweep_of(
        "def sweep(add):\n    for seed in range(3):\n        trunk = add(seed=seed, window=4)\n"
        "        add(seed=seed, window=8, init_from=trunk)\n"
    ).points
    parts = [[point.name for point in select(points, [], f"{i}/2")] for i in (1, 2)]
    assert sorted(parts[0] + parts[1]) == sorted(point.name for point in points)
    assert parts[1] == ["seed1-window4", "seed1-window8"]
    assert [point.name for point in select(points, ["*-window8"], "")] == [f"seed{i}-window8" for i in range(3)]
    with pytest.raises(UserError, match=r"--only 'seed0-window5' fits no point of the sweep, did you mean"):
        select(points, ["seed0-window5"], "")
    with pytest.raises(UserError, match="--shard is '3/2'"):
        select(points, [], "3/2")
