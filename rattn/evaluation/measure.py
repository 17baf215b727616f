"""Losses of one model on the validation split, at any window and context length."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rattn import accounting, multihost
from rattn.config import validate
from rattn.data.batches import Data, open_data, prefetched
from rattn.data.rows import Batch
from rattn.errors import UserError
from rattn.evaluation.recall import frequent_ngrams, recall_distances
from rattn.evaluation.slices import Sums, bins_for, slice_batch
from rattn.model.parameters import model_spec
from rattn.sharding import Sharding
from rattn.step import make_token_loss_step
from rattn.windows import at_window

# Training tokens, from the beginning of an epoch, in which n-grams are counted.
COUNTED_TOKENS = 2**24


@dataclasses.dataclass(frozen=True)
class Recall:
    """What a recall token is: see `rattn.evaluation.recall`.

    Attributes:
      context_tokens: n, the tokens before the target that occurred before.
      frequent_rate: n-grams that are at least this share of training's are left out; 1: none is.
    """

    context_tokens: int
    frequent_rate: float


def usual_recall(config: ConfigDict) -> Recall:
    """Bigrams with what follows them, of text; keys with their values, all of them, of the associative-recall task."""
    return Recall(1, 1.0) if config.data.source == "recall" else Recall(2, 1e-6)


def measure(
    config: ConfigDict,
    parameters: Any,
    sharding: Sharding,
    *,
    windows: Sequence[int | None],
    lengths: Sequence[int],
    max_tokens: int,
    recall: Recall,
) -> dict[tuple[int | None, int], dict[str, Any]]:
    """Evaluates the parameters at each window and length, all of them on the same tokens.

    Rows × length is the same for every length. With a limit the tokens are spread evenly over the validation split, in
    stretches of the lengths' least common multiple of training contexts.

    Args:
      config: a valid config.
      parameters: on the mesh.
      sharding: of the mesh.
      windows: None stands for a model without one.
      lengths: multiples of the training context.
      max_tokens: about how many are read; 0: the whole split.
      recall: which tokens are recall tokens.

    Returns:
      {(window, length): the entry of the result file}.

    Raises:
      UserError: a split shorter than a row, a window that the model cannot have, a loss that is not finite.
    """
    models = {
        window: config.model if window is None else validate(at_window(config, window)).model for window in windows
    }
    frequent = _frequent(config, recall)
    found = {}
    # The longest first: it is the one for which the split may be too short.
    for length in sorted(lengths, reverse=True):
        rows = _read_rows(config, sharding, length, math.lcm(*lengths), max_tokens, recall, frequent)
        for window, model in models.items():
            measured = _measure_one(config, model, parameters, sharding, rows)
            found[window, length] = {"window": window, "length": length, **measured}
    return found


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of one context length, read once for all windows; `sliced` as `slice_batch` gives it."""

    data: Data
    context_length: int
    batch_size: int
    batches: list[Batch]
    sliced: list[dict[str, np.ndarray]]


def _read_rows(
    config: ConfigDict,
    sharding: Sharding,
    length: int,
    stretch: int,
    max_tokens: int,
    recall: Recall,
    frequent: np.ndarray,
) -> _Rows:
    T = config.context_length * length
    # Whole stretches, and at every length whole rows for each device.
    unit = stretch * math.prod(sharding.mesh.shape[axis] for axis in sharding.rules.batch)
    batch_tokens = -(-config.evaluation.batch_size // unit) * unit * config.context_length
    data = _open(config, T, batch_tokens // T, config.seed)
    if data.validation_tokens < T:
        raise UserError(
            f"The validation split has {data.validation_tokens} tokens and a row at {length} × the training context "
            f"has {T}; leave {length} out of --lengths, or prepare more text."
        )
    batches = data.evaluation_batches(
        batch_size=batch_tokens // T,
        max_batches=max(1, max_tokens // batch_tokens) if max_tokens else 0,
        group_rows=stretch // length,
    )
    bins = bins_for(T)
    rows = _Rows(data, T, batch_tokens // T, [], [])
    with contextlib.closing(prefetched(batches, **_reading(config))) as reader:
        for batch in reader:
            distances = recall_distances(batch, frequent, recall.context_tokens, config.model.vocab_size)
            rows.batches.append(batch)
            rows.sliced.append(slice_batch(batch, distances, bins))
    return rows


def _measure_one(
    config: ConfigDict, model: ConfigDict, parameters: Any, sharding: Sharding, rows: _Rows
) -> dict[str, Any]:
    model = model.copy_and_resolve_references()
    model.scan_blocks = True  # Nothing is kept for a backward pass, so a scan costs nothing and compiles sooner.
    spec = model_spec(model, sharding.operators())
    step = jax.jit(make_token_loss_step(spec, config.loss.chunk_tokens))
    split = multihost.BatchSplit(sharding.batch)
    sums = Sums(bins_for(rows.context_length))

    def losses() -> Iterator[tuple[jax.Array, jax.Array]]:
        # One batch ahead of the one that is looked at, so that the devices never wait for the host.
        ahead = None
        for batch in rows.batches:
            nats_hits = step(parameters, split.to_devices(batch, rows.batch_size))
            if ahead:
                yield ahead
            ahead = nats_hits
        yield ahead

    for (nats, hits), batch, sliced in zip(losses(), rows.batches, rows.sliced, strict=True):
        sums.add(*jax.device_get((nats, hits)), batch["loss_mask"], sliced)
    result = sums.result()
    if not math.isfinite(result["nats_per_token"] or 0.0):
        raise UserError(
            f"The validation loss at window {model.window} and {rows.context_length} tokens a row is "
            f"{result['nats_per_token']}; take an earlier checkpoint with --step."
        )
    token_bytes = rows.data.vocabulary.token_bytes()
    text_bytes = sum(int(token_bytes[batch["targets"][batch["loss_mask"]]].sum()) for batch in rows.batches)
    nats = result["nats_per_token"] * result["targets"]
    return {
        "context_length": rows.context_length,
        "cache_bytes": accounting.cache_bytes_per_sequence(model, rows.context_length),
        "text_bytes": text_bytes,
        "bits_per_byte": nats / math.log(2) / text_bytes,
        **result,
    }


def _frequent(config: ConfigDict, recall: Recall) -> np.ndarray:
    """Counts n-grams in training rows: the same for every seed, for runs are compared on the same recall tokens."""
    if recall.frequent_rate >= 1:
        return np.zeros(0, np.int64)
    batch_size = max(1, 2**16 // config.context_length)
    train = _open(config, config.context_length, batch_size, seed=0).train
    most = -(-COUNTED_TOKENS // (batch_size * config.context_length))
    steps = sum(1 for _ in itertools.takewhile(lambda step: train.epoch(step) < 1, range(most)))
    with contextlib.closing(prefetched(train, **_reading(config))) as reader:
        batches = itertools.islice(reader, steps)
        return frequent_ngrams(batches, recall.context_tokens, config.model.vocab_size, recall.frequent_rate)


def _open(config: ConfigDict, context_length: int, batch_size: int, seed: int) -> Data:
    data = open_data(config.data, context_length=context_length, batch_size=batch_size, seed=seed)
    data.check_vocabulary(config.model.vocab_size)
    return data


def _reading(config: ConfigDict) -> dict[str, int]:
    return {"read_threads": config.data.read_threads, "prefetch_batches": config.data.prefetch_batches}
