"""The points of a sweep: what a sweep file lists, resolved against a recipe."""

import contextlib
import dataclasses
import fnmatch
import hashlib
import importlib.util
import itertools
import json
import pathlib
import re
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import base
from rattn.config import UnknownArgument, differences, load_config, override, to_json, validate
from rattn.errors import UserError, nearest

# Keys that change nothing that is learned, and where things lie on a machine. Of what rattn.evaluate measures
# evaluation.batch_size changes how many of the last rows there are, as it takes whole batches.
INCIDENTAL_SECTIONS = ("checkpoint.", "evaluation.", "log.")
INCIDENTAL = ("data.read_threads", "data.prefetch_batches", "data.path", "init_from")


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      name: names its folder.
      settings: what the sweep file said, recipe arguments and config keys together.
      group: points of one group are compared with each other.
      recipe: the recipe's file with its arguments, `configs/small.py:window=512`.
      overrides: `--config.key=value` arguments.
      config: all of it resolved.
      trunk: name of the point whose checkpoint it starts from, or "".
      first_step: the step that it starts at: 0, or the trunk's checkpoint's where it goes on with everything.
      identity: hash of the resolved config; results are matched by it.
    """

    name: str
    settings: dict[str, Any]
    group: str
    recipe: str
    overrides: tuple[str, ...]
    config: ConfigDict
    trunk: str
    first_step: int
    identity: str


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep file resolved against a recipe.

    Attributes:
      points: in the file's order, which is their priority; a trunk stands before its branches.
      evaluation: arguments for `rattn.evaluate`.
    """

    points: tuple[Point, ...]
    evaluation: tuple[str, ...]


def product(**choices: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Iterates over all combinations: `product(window=[64, 128], seed=[0, 1])`, the last key fastest."""
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


class _Points:
    """Collects what a sweep file adds."""

    def __init__(self, recipe: str, arguments: str, base_overrides: list[str], common: dict[str, Any]):
        self.recipe, self.arguments, self.base_overrides, self.common = recipe, arguments, base_overrides, common
        self.points: dict[str, Point] = {}

    def add(
        self,
        config: dict[str, Any] | None = None,
        *,
        name: str = "",
        group: str | None = None,
        init_from: str = "",
        **settings: Any,
    ) -> str:
        """Adds a point and returns its name.

        Args:
          config: config keys that cannot be keywords: {"optimizer.learning_rate": 3e-4}.
          name: names the folder; made from the settings unless given.
          group: points of one group are compared with each other; made of all settings but mixer, window and seed
            unless given.
          init_from: name of an earlier point, the trunk, from whose checkpoint this one goes on; the config keys
            init_from_step and init_from_what say from which and with what of it.
          **settings: the recipe's arguments; a name that the recipe does not take is a config key (`seed=1`).

        Raises:
          UserError: a setting that neither knows, a name that is taken, a trunk that is not there, a config that is
            not valid or that another point has.
        """
        settings = settings | (config or {})
        whole = self.common | settings
        arguments = {key: value for key, value in whole.items() if "." not in key and self._is_argument(key, value)}
        overrides = {key: value for key, value in whole.items() if key not in arguments}
        name = name or _name(settings)
        if re.search(r"[^\w.+-]", name) or not name.strip("."):
            raise UserError(
                f"The point name {name!r} is to name a folder; use letters, digits and any of . _ + - alone."
            )
        if name in self.points:
            raise UserError(f"The sweep has two points called {name!r}; give one of them another name=.")
        if init_from and init_from not in self.points:
            hint = nearest(init_from, self.points)
            raise UserError(
                f"The point {name!r} starts from {init_from!r} and no point before it is called so{hint}; "
                "add the trunk first."
            )
        recipe = self.recipe + ":" + ",".join(filter(None, [self.arguments, _argument_text(arguments)]))
        texts = [*self.base_overrides, *(f"--config.{key}={_text(value)}" for key, value in overrides.items())]
        try:
            resolved = load_config(self.recipe, recipe.partition(":")[2])
            resolved = validate(override(resolved, texts))
        except UserError as error:
            raise UserError(f"The point {name!r} cannot be resolved: {error}") from None
        origin = self.points[init_from].identity if init_from else ""
        point = Point(
            name=name,
            settings=settings,
            group=_group(settings) if group is None else group,
            recipe=recipe.removesuffix(":"),
            overrides=tuple(texts),
            config=resolved,
            trunk=init_from,
            first_step=self._first_step(resolved, init_from),
            identity=identity(to_json(resolved), origin),
        )
        if point.first_step > resolved.total_steps:
            raise UserError(
                f"The point {name!r} goes on from step {point.first_step} and has total_steps={resolved.total_steps}; "
                "make it larger."
            )
        for other in self.points.values():
            if other.identity == point.identity:
                raise UserError(
                    f"The points {other.name!r} and {name!r} resolve to the same config; drop one of them, or see "
                    "whether an override on the command line hides what differs."
                )
        self.points[name] = point
        return name

    def _first_step(self, config: ConfigDict, trunk: str) -> int:
        if not trunk or config.init_from_what == "parameters":
            return 0
        return config.init_from_step or self.points[trunk].config.total_steps

    def _is_argument(self, key: str, value: Any) -> bool:
        try:
            load_config(self.recipe, f"{key}={_text(value)}")
        except UnknownArgument:
            return False
        return True


def load_sweep(path: str, recipe: str, config: ConfigDict) -> Sweep:
    """Reads a sweep file: a Python file with `sweep(add)`, and two things if it likes.

    `COMMON` is a dict of settings, as `add` takes them, that hold for every point which does not say otherwise;
    `EVALUATION` is a list of arguments for rattn.evaluate. Points that are done keep what they were evaluated with:
    delete a point's file in results/ and its evaluation.json to have it evaluated anew.

    Args:
      path: the file.
      recipe: the recipe's file, with arguments that hold for every point behind a colon.
      config: the recipe resolved, with overrides that hold for every point.

    Raises:
      UserError: no such file, or one that does not define points; see `_Points.add`.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        known = sorted(str(other) for other in file.parent.glob("*.py"))
        raise UserError(f"There is no sweep file {path!r}{nearest(path, known)}; give the path of one.")
    spec = importlib.util.spec_from_file_location(f"sweep_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    with _faults_named(file):
        spec.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        raise UserError(f"The sweep file {path!r} defines no function sweep(add); see configs/sweeps/tiny_window.py.")
    recipe_path, _, arguments = recipe.partition(":")
    plain = to_json(load_config(recipe_path, arguments))
    changed = [f"--config.{key}={_text(value)}" for key, _, value in differences(plain, to_json(config))]
    collected = _Points(recipe_path, arguments, changed, getattr(module, "COMMON", {}))
    with _faults_named(file):
        module.sweep(collected.add)
    if not collected.points:
        raise UserError(f"The sweep file {path!r} adds no points; call add(…) at least once.")
    evaluation = getattr(module, "EVALUATION", ())
    if isinstance(evaluation, str):
        raise UserError(f"EVALUATION of the sweep file {path!r} is one text, {evaluation!r}; make it a list of texts.")
    return Sweep(tuple(collected.points.values()), tuple(evaluation))


@contextlib.contextmanager
def _faults_named(file: pathlib.Path) -> Iterator[None]:
    """Turns an exception of the sweep file's own code into a sentence with its line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename).resolve() == file.resolve()]
        line = lines[-1] if lines else error.lineno  # A syntax error is raised before there is a frame.
        what = f"{type(error).__name__}: {getattr(error, 'msg', error)}"
        raise UserError(f"The sweep file {str(file)!r} fails in line {line}: {what}; mend it.") from error


def identity(config: dict[str, Any], origin: str = "") -> str:
    """Hashes what a resolved config (as JSON) makes of a run; 16 hex digits.

    Only what differs from configs/base.py counts, so that a key which a later version adds changes no identity, and
    nothing that is `INCIDENTAL` does. A trunk enters by its own identity (`origin`).
    """
    changed = differences(to_json(base.get_config()), config)
    kept = [(key, value) for key, _, value in changed if not _incidental(key)]
    return hashlib.sha256(json.dumps([kept, origin], sort_keys=True).encode()).hexdigest()[:16]


def same_config(found: dict[str, Any], config: ConfigDict) -> bool:
    """Whether a result's config is a point's, as far as both have the same keys; `INCIDENTAL` ones aside.

    Identities alone would take a result for a point's after a default in configs/base.py had changed.
    """
    wanted = to_json(config)
    return not [
        key
        for key, before, now in differences(found, wanted)
        if before is not None and now is not None and not _incidental(key)
    ]


def select(points: Iterable[Point], only: list[str], shard: str) -> list[Point]:
    """Keeps the points that `only` (names or patterns) and `shard` ("2/3": the second of three parts) choose.

    A branch is in its trunk's shard.

    Raises:
      UserError: a pattern that fits no point, or a shard that is none.
    """
    points = list(points)
    for pattern in only:
        if not fnmatch.filter([point.name for point in points], pattern):
            hint = nearest(pattern, [point.name for point in points])
            raise UserError(f"--only {pattern!r} fits no point of the sweep{hint}; --dry_run lists them.")
    match = re.fullmatch(r"(\d+)/(\d+)", shard or "1/1")
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard is {shard!r}; write i/n with 1 ≤ i ≤ n, such as 1/4.")
    part, parts = int(match[1]) - 1, int(match[2])
    roots: dict[str, int] = {}
    chosen = []
    for point in points:
        roots[point.name] = roots[point.trunk] if point.trunk else len(set(roots.values()))
        if only and not any(fnmatch.fnmatchcase(point.name, pattern) for pattern in only):
            continue
        if roots[point.name] % parts == part:
            chosen.append(point)
    return chosen


def _incidental(key: str) -> bool:
    return key in INCIDENTAL or key.startswith(INCIDENTAL_SECTIONS)


def _name(settings: dict[str, Any]) -> str:
    """rattention-window512-seed1"""
    parts = []
    for key, value in settings.items():
        text = value if isinstance(value, str) else f"{key.rpartition('.')[2]}{_text(value)}"
        parts.append(re.sub(r"[^\w.+-]+", "_", text))
    return "-".join(parts) or "point"


def _group(settings: dict[str, Any]) -> str:
    rest = {key: value for key, value in settings.items() if key not in ("mixer", "window", "seed")}
    return ", ".join(f"{key.rpartition('.')[2]} {_text(value)}" for key, value in rest.items())


def _argument_text(arguments: dict[str, Any]) -> str:
    return ",".join(f"{key}={_text(value)}" for key, value in arguments.items())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return repr(tuple(value))
    return str(value)
