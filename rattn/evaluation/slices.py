"""Which bin each target of a batch falls into, and the sums of each bin."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from rattn.data.rows import Batch

POSITION_BINS = 16
IN_NO_BIN = -1


@dataclasses.dataclass(frozen=True)
class Bins:
    """Neighbouring ranges of whole numbers from 1: bin b ends with lasts[b], which belongs to it."""

    lasts: tuple[int, ...]

    @classmethod
    def powers_of_two(cls, largest: int) -> "Bins":
        """1, 2, 3–4, 5–8, … up to the bin that holds `largest`."""
        return cls(tuple(2**i for i in range((largest - 1).bit_length() + 1)))

    @classmethod
    def equal(cls, largest: int, count: int) -> "Bins":
        """At most `count` ranges up to `largest`, as equal as whole numbers allow."""
        count = min(count, largest)
        return cls(tuple(largest * (i + 1) // count for i in range(count)))

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the bin of each number as int8, IN_NO_BIN for numbers below 1."""
        bins = np.searchsorted(self.lasts, numbers, side="left")
        return np.where(numbers < 1, IN_NO_BIN, bins).astype(np.int8)


def bins_for(context_length: int) -> dict[str, Bins]:
    """The slices of a target, by their names in the result file."""
    return {
        "by_context_tokens": Bins.powers_of_two(context_length),
        "by_row_position": Bins.equal(context_length, POSITION_BINS),
        "recall_by_distance": Bins.powers_of_two(context_length),
    }


def slice_batch(batch: Batch, recall_distances: np.ndarray, bins: Mapping[str, Bins]) -> dict[str, np.ndarray]:
    """Returns int8 [B, T] for each of `bins_for`: the bin of each target, IN_NO_BIN where it does not count."""
    positions = np.broadcast_to(np.arange(1, batch["tokens"].shape[1] + 1), batch["tokens"].shape)
    numbers = {
        "by_context_tokens": context_tokens(batch["segment_ids"]),
        "by_row_position": positions,
        "recall_by_distance": recall_distances,
    }
    return {name: bins[name].of(np.where(batch["loss_mask"], numbers[name], 0)) for name in bins}


def context_tokens(segment_ids: np.ndarray) -> np.ndarray:
    """Returns int64 [B, T]: how many inputs up to and with each position belong to its document."""
    positions = np.broadcast_to(np.arange(segment_ids.shape[1]), segment_ids.shape)
    starts = np.ones(segment_ids.shape, np.bool_)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return positions - np.maximum.accumulate(np.where(starts, positions, 0), axis=1) + 1


class Sums:
    """Targets, nats and hits in each bin of each slice, and over all targets."""

    def __init__(self, bins: Mapping[str, Bins]):
        self._bins = dict(bins)
        self._sums = {name: np.zeros((3, len(each.lasts))) for name, each in self._bins.items()}
        self._all = np.zeros(3)

    def add(self, nats: np.ndarray, hits: np.ndarray, loss_mask: np.ndarray, slices: Mapping[str, np.ndarray]) -> None:
        """Adds a batch: [B, T] arrays, `slices` as `slice_batch` gives them."""
        weights = np.stack([loss_mask, np.where(loss_mask, nats, 0), loss_mask & hits]).astype(np.float64)
        self._all += weights.sum(axis=(1, 2))
        for name, sums in self._sums.items():
            places = slices[name].ravel().astype(np.int64) + 1
            for row, weight in zip(sums, weights, strict=True):
                row += np.bincount(places, weight.ravel(), minlength=sums.shape[1] + 1)[1:]

    def result(self) -> dict[str, Any]:
        """The entries of the result file: see `rattn.evaluation.results`."""
        recall = self._sums["recall_by_distance"].sum(axis=1)
        return {**_means(self._all), **{name: self._listed(name) for name in self._bins}, "recall": _means(recall)}

    def _listed(self, name: str) -> list[dict[str, Any]]:
        lasts = self._bins[name].lasts
        firsts = [1, *(last + 1 for last in lasts[:-1])]
        columns = zip(firsts, lasts, self._sums[name].T, strict=True)
        return [{"first": first, "last": last, **_means(sums)} for first, last, sums in columns]


def _means(sums: np.ndarray) -> dict[str, Any]:
    targets, nats, hits = (float(value) for value in sums)
    return {
        "targets": int(targets),
        "nats_per_token": nats / targets if targets else None,
        "accuracy": hits / targets if targets else None,
    }
