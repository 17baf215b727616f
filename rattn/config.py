"""Configs: typed recipe arguments, the command line's overrides, and the rules that a config must keep."""

import importlib.util
import json
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from rattn.console import stopped_quietly
from rattn.errors import UserError, nearest


class UnknownArgument(UserError):
    """The recipe has no such argument."""


MIXERS = ("full", "swa", "rattention", "linear")
LOCAL_MIXERS = ("swa", "rattention", "linear")
FEATURE_MAPS = ("softmax", "relu", "identity")
FLOAT32_MOST = 3.4e38
# The least that numbers may be.
LEAST = {
    0: (
        "data.read_threads",
        "data.prefetch_batches",
        "evaluation.max_batches",
        "evaluation.final_max_batches",
        "log.branches_every_steps",
        "loss.chunk_tokens",
        "model.logits_soft_cap",
        "optimizer.warmup_steps",
        "optimizer.decay_steps",
    ),
    1: (
        "accumulation_steps",
        "batch_size",
        "checkpoint.every_steps",
        "checkpoint.keep",
        "context_length",
        "evaluation.batch_size",
        "evaluation.every_steps",
        "log.every_steps",
        "model.head_dim",
        "model.kv_heads",
        "model.layers",
        "model.mlp_width",
        "model.query_heads",
        "model.vocab_size",
        "model.width",
        "total_steps",
    ),
    2: ("data.document_tokens",),  # One that is given and one that is predicted.
}
CHOICES = {
    "on_non_finite": ("stop", "skip"),
    "init_from_what": ("everything", "parameters"),
    "data.source": ("stream", "synthetic", "recall"),
    "model.activation": ("gelu", "silu"),
    "model.feature_map": FEATURE_MAPS,
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "block", "save_attention", "save_products", "save_operands", "offload"),
    "mesh.exchange": ("microbatch", "step"),
    "optimizer.name": ("adamw", "rmsprop", "adafactor", "muon"),
    "optimizer.schedule": ("cosine", "linear", "wsd"),
}


def parse_arguments(text: str | None, **defaults: Any) -> SimpleNamespace:
    """Parses a recipe's `key=value,key=value` argument.

    Each key takes the type of its default; bools are `true` or `false`.

    Raises:
      UserError: a key that the recipe does not have, or a value that is not of the key's type.
    """
    arguments = dict(defaults)
    for item in filter(None, (text or "").split(",")):
        key, equals, value = item.partition("=")
        if key not in defaults:
            known = ", ".join(sorted(defaults)) or "none"
            hint = nearest(key, defaults)
            raise UnknownArgument(f"The recipe has no argument {key!r}{hint}; it takes: {known}.")
        kind = type(defaults[key])
        try:
            if not equals:
                raise ValueError
            arguments[key] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise UserError(
                f"Recipe argument {key!r} takes {kind.__name__}, got {value!r}; write {key}=VALUE."
            ) from None
    return SimpleNamespace(**arguments)


def set_mixer(config: ConfigDict, mixer: str) -> ConfigDict:
    """Turns a recipe into its baseline: every local layer of the pattern becomes `mixer`.

    Projections and position encodings stay where they stood, so `full` keeps RoPE in local places and the pattern's
    global layers keep none; only RATTENTION's norm scales come or go.
    """
    if mixer not in MIXERS:
        raise UserError(f"There is no mixer {mixer!r}{nearest(mixer, MIXERS)}; use one of {', '.join(MIXERS)}.")
    config.model.pattern = tuple(mixer if name in LOCAL_MIXERS else name for name in config.model.pattern)
    return config


def load_config(path: str, arguments: str = "") -> ConfigDict:
    """Resolves the recipe file `path` with its argument string, as `--config path:arguments` does."""
    file = pathlib.Path(path)
    if not file.is_file():
        recipes = sorted(recipe.name for recipe in file.parent.glob("*.py") if recipe.name != "__init__.py")
        raise UserError(f"There is no config file {path!r}{nearest(file.name, recipes)}; give the path of a recipe.")
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arguments)


def override(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """Applies `--config.key=value` arguments to `config`, each value read by its key's type; returns it.

    Raises:
      UserError: an unknown key or a value of another type.
    """
    _check_overrides(config, arguments)
    values = flags.FlagValues()
    line = ["rattn", *arguments]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=line)
        values(line)
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(str(error).strip().splitlines()[-1]) from None
    return config


def saved_config(workdir: epath.PathLike) -> ConfigDict:
    """Returns the config that a run left in its workdir; keys that are newer than the run have their defaults.

    Raises:
      UserError: no run began there, or a run of another version did.
    """
    from configs import base  # Recipes import this module.

    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"There is no config.json in {str(workdir)!r}; name the workdir of a run.")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); copy it from another run of the same config.") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{path} holds {str(values)[:20]!r} and no config; copy it from another run of the same config."
        )
    return _filled(base.get_config(), values, str(path))


def _filled(config: ConfigDict, values: dict[str, Any], where: str, prefix: str = "") -> ConfigDict:
    """Sets the leaves of `values` in `config`, which must have them; lists become tuples."""
    for key, value in values.items():
        try:
            if isinstance(value, dict):
                _filled(config[key], value, where, f"{prefix}{key}.")
                continue
            if key not in config:
                raise KeyError(key)
            config[key] = tuple(value) if isinstance(value, list) else value
        except (KeyError, TypeError):
            raise UserError(
                f"{where} has config.{prefix}{key} = {value!r}, which this version does not know; use the version that "
                "wrote it."
            ) from None
    return config


def validate(config: ConfigDict) -> ConfigDict:
    """Checks what one key's type cannot say; returns the config.

    Raises:
      UserError: one sentence with the key, the value seen and what to change.
    """
    for key, choices in CHOICES.items():
        value = _lookup(config, key)
        if value not in choices:
            raise UserError(
                f"config.{key} is {value!r}{nearest(str(value), choices)}; use one of {', '.join(choices)}."
            )
    model = config.model
    for least, keys in LEAST.items():
        for key in keys:
            if not _lookup(config, key) >= least:
                raise UserError(f"config.{key} is {_lookup(config, key)}; it must be at least {least}.")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"config.seed is {config.seed}; give a number from 0 to {2**32 - 1}.")
    for key in ("optimizer.beta1", "optimizer.beta2"):
        if not 0 <= _lookup(config, key) < 1:
            raise UserError(f"config.{key} is {_lookup(config, key)}; give a number from 0 to below 1.")
    for key in ("optimizer.learning_rate", "optimizer.weight_decay", "optimizer.epsilon", "optimizer.clip_norm"):
        if not 0 <= _lookup(config, key) <= FLOAT32_MOST:
            raise UserError(f"config.{key} is {_lookup(config, key)}; give a float32 number that is not negative.")
    if not all(0 <= weight < math.inf for weight in config.data.weights):
        raise UserError(f"config.data.weights is {tuple(config.data.weights)}; give numbers that are not negative.")
    profiled = tuple(config.log.profile_steps)
    if profiled and not (len(profiled) == 2 and 0 <= profiled[0] < profiled[1]):
        raise UserError(f"config.log.profile_steps is {profiled}; give the first step and the one to stop at, or ().")
    if not model.pattern:
        raise UserError("config.model.pattern is empty; name at least one mixer.")
    for name in model.pattern:
        if name not in MIXERS:
            raise UserError(
                f"config.model.pattern has {name!r}{nearest(str(name), MIXERS)}; use mixers of {', '.join(MIXERS)}."
            )
    if len(model.rope_pattern) != len(model.pattern):
        raise UserError(
            f"config.model.rope_pattern has {len(model.rope_pattern)} entries and config.model.pattern "
            f"{len(model.pattern)}; give one bool for each mixer."
        )
    if len(model.pattern) > model.layers:
        raise UserError(
            f"config.model.pattern has {len(model.pattern)} mixers and config.model.layers is {model.layers}; "
            "the pattern must fit at least once."
        )
    if model.query_heads % model.kv_heads:
        raise UserError(
            f"config.model.query_heads is {model.query_heads} and config.model.kv_heads {model.kv_heads}; "
            "the first must be a multiple of the second."
        )
    if any(model.rope_pattern) and model.head_dim % 2:
        raise UserError(f"config.model.head_dim is {model.head_dim}; RoPE rotates pairs of dims, make it even.")
    if model.window < (1 if "swa" in model.pattern else 0):
        what = "swa layers need at least 1 (the token itself)" if "swa" in model.pattern else "it cannot be negative"
        raise UserError(f"config.model.window is {model.window}; {what}.")
    _check_window_choices(config)
    if config.batch_size % config.accumulation_steps:
        raise UserError(
            f"config.batch_size is {config.batch_size} and config.accumulation_steps {config.accumulation_steps}; "
            "the first must be a multiple of the second."
        )
    mesh = config.mesh
    if mesh.exchange == "step" and (mesh.seq, mesh.model) != (1, 1):
        raise UserError(
            f"config.mesh.exchange is 'step' with seq={mesh.seq} × model={mesh.model}, and every device then computes "
            "whole rows with the whole model; make both 1, or exchange every 'microbatch'."
        )
    if config.loss.chunk_tokens and config.context_length % config.loss.chunk_tokens:
        raise UserError(
            f"config.loss.chunk_tokens is {config.loss.chunk_tokens} and config.context_length "
            f"{config.context_length}; the second must be a multiple of the first (0 turns chunking off)."
        )
    optimizer = config.optimizer
    if optimizer.warmup_steps + optimizer.decay_steps > config.total_steps:
        raise UserError(
            f"config.optimizer.warmup_steps + decay_steps is {optimizer.warmup_steps + optimizer.decay_steps} and "
            f"config.total_steps {config.total_steps}; shorten the schedule or train longer."
        )
    return config


def _check_window_choices(config: ConfigDict) -> None:
    """The rules of a window that is drawn for each step."""
    model = config.model
    choices, weights = tuple(model.window_choices), tuple(model.window_weights)
    smallest = 1 if "swa" in model.pattern else 0
    if any(window < smallest for window in choices) or len(set(choices)) < len(choices):
        raise UserError(
            f"config.model.window_choices is {choices}; give different windows of at least {smallest}, or () for none."
        )
    if choices and not {"swa", "rattention"} & set(model.pattern):
        raise UserError(
            f"config.model.window_choices is {choices} and no mixer of {tuple(model.pattern)} has a window; "
            "leave it ()."
        )
    if weights and (len(weights) != len(choices) or min(weights) < 0 or not sum(weights)):
        raise UserError(
            f"config.model.window_weights is {weights} and config.model.window_choices {choices}; give one weight ≥ 0 "
            "for each, not all of them 0, or () for equal ones."
        )
    if not 0 <= model.window_final_steps <= config.total_steps:
        raise UserError(
            f"config.model.window_final_steps is {model.window_final_steps} and config.total_steps "
            f"{config.total_steps}; give a number of steps between 0 and the second."
        )


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the config as JSON values (tuples become lists)."""
    return json.loads(config.to_json())


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Lists (dotted key, old value, new value) for every leaf in which two JSON configs differ."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append((prefix + key, before, after))
    return found


@stopped_quietly()
def run_main(main: Callable[..., int], *, needs_config: bool = True) -> None:
    """Runs an entry point: `--config recipe.py:arguments` and overrides in, an exit status out.

    `main` gets the valid config and the recipe's file name without its suffix, or None and "" where there is no
    --config and none is needed. A `UserError` is printed as its sentence and becomes status 1; so does a flag that absl
    does not know. Ctrl-C and a reader that goes away end it without a word, with the statuses that a shell gives them.
    """

    def guarded(arguments: list[str]) -> int:
        if arguments[1:]:
            raise UserError(f"{arguments[1]!r} is no flag; give --flag=value, or --config.key=value for the config.")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax narrates every save.
        if not recipe:
            return main(None, "")
        return main(validate(flags.FLAGS.config), pathlib.Path(recipe.partition(":")[0]).stem)

    try:
        recipe, rest = take_recipe(sys.argv)
        if recipe:
            path, _, arguments = recipe.partition(":")
            config = load_config(path, arguments)
            _check_overrides(config, rest)
            config_flags.DEFINE_config_dict("config", config, sys_argv=rest)
        elif needs_config:
            raise UserError("There is no --config; name a recipe, such as --config configs/tiny.py.")
        app.run(guarded, argv=rest, flags_parser=lambda arguments: flags.FLAGS(list(arguments)))
    except UserError as error:
        sys.exit(f"rattn: {error}")
    except (flags.Error, ValueError, TypeError) as error:
        if isinstance(error, flags.Error) or not flags.FLAGS.is_parsed():
            sys.exit(f"rattn: {str(error).strip().splitlines()[-1]}")
        raise


def take_recipe(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Splits the value of `--config`, a recipe and its arguments, off the command line; "" where there is none."""
    rest, recipe = list(arguments), ""
    for index, argument in enumerate(rest):
        if argument.startswith(("--config=", "-config=")):
            recipe = rest.pop(index).partition("=")[2]
            break
        if argument in ("--config", "-config") and index + 1 < len(rest):
            recipe = rest.pop(index + 1)
            rest.pop(index)
            break
    return recipe, rest


def take_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits `--config.key=value` arguments off a command line, for a command whose config is not a recipe's."""
    overrides = [argument for argument in arguments if argument.startswith(("--config.", "-config."))]
    return overrides, [argument for argument in arguments if argument not in overrides]


def _check_overrides(config: ConfigDict, arguments: Sequence[str]) -> None:
    """Names the nearest key for `--config.unknown`, which absl alone reports by a traceback."""
    for argument in arguments:
        if not argument.startswith(("--config.", "-config.")):
            continue
        key = argument.partition("config.")[2].partition("=")[0]
        node, walked = config, []
        for part in key.split("."):
            part = part.partition("[")[0]
            if not isinstance(node, ConfigDict) or part not in node:
                known = [".".join([*walked, name]) for name in node] if isinstance(node, ConfigDict) else []
                hint = nearest(".".join([*walked, part]), known)
                raise UserError(f"The config has no key {key!r}{hint}; configs/base.py lists every key.")
            node = node[part]
            walked.append(part)


def _lookup(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config
