"""Results as the report reads them: runs, variants (a mixer and a window, over seeds) and groups of variants."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rattn.sweeping.results import Result

Entry = dict[str, Any]
Bin = dict[str, Any]
MIXER_ORDER = ("full", "rattention", "swa", "linear")


@dataclasses.dataclass(frozen=True)
class Run:
    """One result."""

    result: Result

    @property
    def evaluation(self) -> dict[str, Any]:
        """What rattn.evaluate wrote."""
        return self.result["evaluation"]

    @property
    def seed(self) -> int:
        """config.seed"""
        return self.evaluation["config"]["seed"]

    @property
    def mixer(self) -> str:
        """The mixer of the local layers; "full" where there are none."""
        return next((name for name in self.evaluation["config"]["model"]["pattern"] if name != "full"), "full")

    @property
    def window(self) -> int | None:
        """The trained (final) window; None where no layer has one."""
        return None if self.mixer in ("full", "linear") else self.evaluation["config"]["model"]["window"]

    def at(self, length: int) -> Entry | None:
        """What was measured at the run's own window and `length` times its context, if it was."""
        return next(
            (
                entry
                for entry in self.evaluation["measured"]
                if entry["length"] == length and entry["window"] in (None, self.window)
            ),
            None,
        )

    @property
    def own(self) -> Entry:
        """What was measured at the run's own window and context; the first entry where that was not asked for."""
        return self.at(1) or self.evaluation["measured"][0]

    @property
    def lengths(self) -> list[int]:
        """Multiples of the context that were measured at the run's own window."""
        return sorted(
            {entry["length"] for entry in self.evaluation["measured"] if entry["window"] in (None, self.window)}
        )

    @property
    def cache_bytes(self) -> int:
        """The decode cache of one sequence of the training context."""
        return sum(self.own["cache_bytes"].values())

    @property
    def step_seconds(self) -> float | None:
        """A training step's."""
        return self.evaluation["training"] and self.evaluation["training"]["step_seconds"]

    @property
    def tokens_per_second(self) -> float | None:
        """Of training."""
        return self.evaluation["training"] and self.evaluation["training"]["tokens_per_second"]


def loss(run: Run) -> float:
    """Validation loss in nats a token."""
    return run.own["nats_per_token"]


def bits_per_byte(run: Run) -> float:
    """Validation bits per byte of text."""
    return run.own["bits_per_byte"]


def recall_beyond(window: int) -> Callable[[Run], float | None]:
    """Loss on recall tokens whose nearest occurrence lies beyond `window`, in bins that hold no nearer ones."""
    return lambda run: weighted(bin for bin in run.own["recall_by_distance"] if bin["first"] > window)


def recall_targets_beyond(window: int, run: Run) -> int:
    """How many tokens `recall_beyond` averages over."""
    return sum(bin["targets"] for bin in run.own["recall_by_distance"] if bin["first"] > window)


def weighted(bins: Any, key: str = "nats_per_token") -> float | None:
    """Mean of bins by their targets; None where there are none."""
    filled = [bin for bin in bins if bin["targets"]]
    total = sum(bin["targets"] for bin in filled)
    return sum(bin[key] * bin["targets"] for bin in filled) / total if total else None


@dataclasses.dataclass(frozen=True)
class Variant:
    """The runs of one mixer and window, which differ in their seed."""

    mixer: str
    window: int | None
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """Mixer and window."""
        return self.mixer if self.window is None else f"{self.mixer} {self.window}"

    def values(self, measure: Callable[[Run], float | None]) -> list[float]:
        """The measure of every run that has it."""
        return [value for value in map(measure, self.runs) if value is not None]

    def mean(self, measure: Callable[[Run], float | None]) -> float | None:
        """Over seeds; None where no run has the measure."""
        values = self.values(measure)
        return statistics.fmean(values) if values else None

    def spread(self, measure: Callable[[Run], float | None]) -> float | None:
        """Sample standard deviation over seeds; None with fewer than two."""
        values = self.values(measure)
        return statistics.stdev(values) if len(values) > 1 else None

    def bins(self, kind: str) -> list[Bin]:
        """The bins of `kind` at the own window and context, their means averaged over seeds.

        Empty ones are left out; runs of different contexts have no bins in common.
        """
        found = []
        if len({run.own["context_length"] for run in self.runs}) > 1:
            return found
        for bins in zip(*(run.own[kind] for run in self.runs), strict=True):
            if all(bin["targets"] for bin in bins):
                means = {key: statistics.fmean(bin[key] for bin in bins) for key in ("nats_per_token", "accuracy")}
                found.append({**bins[0], **means})
        return found


@dataclasses.dataclass(frozen=True)
class Group:
    """Variants that are compared with each other."""

    name: str
    variants: tuple[Variant, ...]

    @property
    def full(self) -> Variant | None:
        """Full attention."""
        return next((variant for variant in self.variants if variant.mixer == "full"), None)

    @property
    def runs(self) -> list[Run]:
        """All runs."""
        return [run for variant in self.variants for run in variant.runs]

    def curve(self, mixer: str) -> list[Variant]:
        """The variants of a mixer by window."""
        return [variant for variant in self.variants if variant.mixer == mixer]

    @property
    def windowed(self) -> list[str]:
        """Mixers that have a window."""
        return list(dict.fromkeys(variant.mixer for variant in self.variants if variant.window is not None))


def grouped(results: Sequence[Result]) -> list[Group]:
    """Sorts results into groups, fewest tokens first, and variants by mixer and window.

    Of results that differ in neither group, mixer, window nor seed the one that finished last stays: the others are no
    further seeds (see `repeated`).
    """
    groups: dict[str, dict[tuple[str, int | None], list[Run]]] = {}
    left_out = {id(result) for result in repeated(results)}
    for result in results:
        if id(result) in left_out:
            continue
        run = Run(result)
        groups.setdefault(result["group"], {}).setdefault((run.mixer, run.window), []).append(run)

    def place(key: tuple[str, int | None]) -> tuple:
        mixer, window = key
        return (MIXER_ORDER.index(mixer) if mixer in MIXER_ORDER else len(MIXER_ORDER), mixer, window or 0)

    made = [
        Group(name, tuple(Variant(*key, tuple(variants[key])) for key in sorted(variants, key=place)))
        for name, variants in groups.items()
    ]
    return sorted(made, key=lambda group: (min(run.evaluation["tokens_seen"] for run in group.runs), group.name))


def repeated(results: Sequence[Result]) -> list[Result]:
    """Results that a later one of the same group, mixer, window and seed replaces."""
    latest: dict[tuple, Result] = {}
    found = []
    for result in sorted(results, key=lambda result: result["finished_at"]):
        run = Run(result)
        key = (result["group"], run.mixer, run.window, run.seed)
        if key in latest:
            found.append(latest[key])
        latest[key] = result
    return found


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, loss) that no other beats in both, by rising cost."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    front, best = [], float("inf")
    for index in order:
        if points[index][1] < best:
            front.append(index)
            best = points[index][1]
    return front
