"""Results as the report reads them: runs, variants (a mixer and a window, over seeds) and groups of variants."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rattn.errors import UserError
from rattn.sweeping.results import Result

Entry = dict[str, Any]
Bin = dict[str, Any]
MIXER_ORDER = ("full", "rattention", "swa", "linear")
# A curve shows no bin of fewer targets: its height would be a matter of chance.
BIN_TARGETS = 500


@dataclasses.dataclass(frozen=True)
class Run:
    """One result."""

    result: Result

    @property
    def evaluation(self) -> dict[str, Any]:
        """What rattn.evaluate wrote."""
        return self.result["evaluation"]

    @property
    def identity(self) -> str:
        """The point's."""
        return self.result["identity"]

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
        """What was measured at the run's own window and context.

        Raises:
          UserError: that was not measured.
        """
        found = self.at(1)
        if found is None:
            raise UserError(
                f"The run {self.result['name']!r} was not evaluated at its own window and context, by which runs are "
                "compared; add them to --windows and --lengths of the sweep's EVALUATION, and delete its result "
                "and its evaluation.json."
            )
        return found

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


def loss_at(length: int) -> Callable[[Run], float]:
    """Validation loss in rows of `length` contexts."""
    return lambda run: run.at(length)["nats_per_token"]


def bits_per_byte(run: Run) -> float:
    """Validation bits per byte of text."""
    return run.own["bits_per_byte"]


def recall_loss(run: Run) -> float | None:
    """Loss on recall tokens at any distance; None where there are none."""
    return run.own["recall"]["nats_per_token"]


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

    def shared_seeds(self, other: "Variant") -> set[int]:
        """Seeds of which both have a run."""
        return {run.seed for run in self.runs} & {run.seed for run in other.runs}

    def paired(self, other: "Variant") -> tuple["Variant", "Variant"]:
        """Both with their runs of common seeds alone, or with all runs where they have none in common.

        A seed orders the rows, too, so a part of its luck is every variant's; a difference between means over different
        seeds would count it as the variant's own.
        """
        shared = self.shared_seeds(other)
        if not shared:
            return self, other
        return tuple(
            dataclasses.replace(
                variant, runs=tuple(sorted((r for r in variant.runs if r.seed in shared), key=lambda run: run.seed))
            )
            for variant in (self, other)
        )

    def excess(self, other: "Variant", measure: Callable[[Run], float | None]) -> float | None:
        """The measure's mean minus the other variant's over the same seeds; None where one has none."""
        means = [variant.mean(measure) for variant in self.paired(other)]
        return None if None in means else means[0] - means[1]

    def differences(self, other: "Variant", measure: Callable[[Run], float]) -> list[float]:
        """What `excess` is the mean of: one a common seed, or the one difference of means."""
        ours, theirs = (variant.values(measure) for variant in self.paired(other))
        if not self.shared_seeds(other):
            return [self.excess(other, measure)]
        return [a - b for a, b in zip(ours, theirs, strict=True)]

    def bins(self, kind: str, length: int = 1) -> list[Bin]:
        """The bins of `kind` at the own window and `length` contexts, their means averaged over seeds.

        Those of fewer than `BIN_TARGETS` are left out; runs of different contexts have no bins in common.
        """
        found = []
        entries = [run.own if length == 1 else run.at(length) for run in self.runs]
        if None in entries or len({entry["context_length"] for entry in entries}) > 1:
            return found
        for bins in zip(*(entry[kind] for entry in entries), strict=True):
            if all(bin["targets"] >= BIN_TARGETS for bin in bins):
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

    def paired_spread(self, measure: Callable[[Run], float | None]) -> tuple[float, int] | None:
        """Spread over seeds of the differences from full attention at the same seed, and its degrees of freedom.

        Pooled over the variants that share two or more seeds with full attention; None where there are none.
        """
        others = [variant for variant in self.variants if self.full and variant is not self.full]
        pairs = [pair for pair in (variant.differences(self.full, measure) for variant in others) if len(pair) > 1]
        freedom = sum(len(pair) - 1 for pair in pairs)
        if not freedom:
            return None
        return (sum(statistics.variance(pair) * (len(pair) - 1) for pair in pairs) / freedom) ** 0.5, freedom

    @property
    def lengths(self) -> list[int]:
        """Multiples of the context that every run was measured at, at its own window."""
        return sorted(set.intersection(*(set(run.lengths) for run in self.runs)))

    @property
    def windows(self) -> list[int]:
        """All trained windows."""
        return sorted({variant.window for variant in self.variants if variant.window is not None})

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
