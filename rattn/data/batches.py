"""Batches for training and evaluation: slices of prepared streams, shuffled and mixed by arithmetic alone."""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from grain.experimental import index_shuffle
from ml_collections import ConfigDict

from rattn.data.preparation import Request
from rattn.data.recall import RecallStream
from rattn.data.rows import Batch, gather_rows, row_count
from rattn.data.stream import SPLITS, BlockStream, Prepared
from rattn.data.synthetic import SyntheticStream
from rattn.data.vocabulary import Vocabulary, load_vocabulary
from rattn.errors import UserError

# Up to here an epoch's order is a stored permutation; beyond, Grain's index_shuffle computes each place by itself
# (10 µs for 10⁵ rows, but 0.6 ms for 10² and 12 ms for 3).
PERMUTED_ROWS = 2**16
POWERS_OF_4 = frozenset(4**k for k in range(32))

# Size of a global batch -> the indices of the rows that this process reads, ascending.
LocalRows = Callable[[int], Sequence[int]]


class TrainBatches:
    """This process's training batches: a pure function of (data, context length, batch size, seed, step).

    Row positions p = step * B + j (j < B, the global batch) are numbered without end. A mixture gives each position to
    a source, by weight and evenly spread; a source's n-th position is a row of its epoch n // rows, in an order that is
    shuffled anew each epoch, so one epoch of a source visits each row once. A process reads the rows of the batch that
    its devices hold: the global batch is the same for any number of processes.
    """

    def __init__(
        self,
        streams: Sequence[BlockStream],
        names: Sequence[str],
        weights: Sequence[float],
        *,
        context_length: int,
        batch_size: int,
        seed: int,
        local_rows: LocalRows = range,
    ):
        """Takes one stream, name and weight (any scale, 0 leaves the source out) for each source.

        Raises:
          UserError: a weighted source has no rows.
        """
        self._streams, self._names, self._T, self._B = list(streams), list(names), context_length, batch_size
        self._share = list(local_rows(batch_size))
        sources, used_weights, self._rows_per_draw = [], [], []
        for index, (stream, name, weight) in enumerate(zip(streams, names, weights, strict=True)):
            if not weight:
                continue
            rows = row_count(stream.tokens, context_length)
            if not rows:
                raise UserError(
                    f"The source {name!r} has no training tokens; prepare more text or set its weight to 0."
                )
            sources.append(grain.MapDataset.source(_RowOrder(index, rows, _source_seed(seed, name))))
            used_weights.append(weight)
            self._rows_per_draw.append(rows / weight)
        if not sources:
            raise UserError("Every source has weight 0; give at least one a positive data.weights entry.")
        self._order = sources[0] if len(sources) == 1 else grain.MapDataset.mix(sources, used_weights)
        self._rows_per_draw = [rows * sum(used_weights) for rows in self._rows_per_draw]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> Batch:
        """Returns this process's rows b of the batch.

        `tokens`, `targets`, `segment_ids` int32 [b, T], `loss_mask` bool [b, T] (see `rattn.data`).
        """
        return gather_rows(self._streams, [self._order[step * self._B + j] for j in self._share], self._T)

    def row_ids(self, step: int) -> list[tuple[str, int]]:
        """Returns (source, row) for each row of the global batch, to name it in a message."""
        ids = (self._order[step * self._B + j] for j in range(self._B))
        return [(self._names[source], row) for source, row in ids]

    def epoch(self, step: int) -> float:
        """Returns how often the most often read source has been passed before `step`."""
        return step * self._B / min(self._rows_per_draw)


class _RowOrder:
    """The n-th draw from a source, as (index of the source, row): each epoch n // rows has a shuffle of its own."""

    def __init__(self, index: int, rows: int, seed: int):
        self._index, self._rows, self._seed = index, rows, seed
        # Draws run through an epoch, and the threads that read ahead meet at most in two.
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, n: int) -> tuple[int, int]:
        epoch, place = divmod(n, self._rows)
        if self._rows <= PERMUTED_ROWS:
            return self._index, int(self._permutation(epoch)[place])
        seed = (self._seed + epoch) % 2**32
        # Grain's shuffle of 4ᵏ + 1 rows never gives the last of them and one row twice. Of one row more it is one, and
        # a place that falls on that row goes to the row that this one's place falls on.
        rows = self._rows + (self._rows - 1 in POWERS_OF_4)
        row = index_shuffle(place, max_index=rows - 1, seed=seed, rounds=4)
        if row == self._rows:
            row = index_shuffle(row, max_index=rows - 1, seed=seed, rounds=4)
        return self._index, row

    def _permute(self, epoch: int) -> np.ndarray:
        # Philox's raw output, unlike NumPy's permutation, is promised to stay the same.
        return np.argsort(np.random.Philox(key=[self._seed, epoch]).random_raw(self._rows), kind="stable")


class EvaluationBatches:
    """The rows of a split in order, each once, in batches; padding rows fill the last one.

    With a limit of batches the rows are spread evenly over the split, in groups of neighbours, so each part of it is
    seen: n groups of g rows hold the same tokens as n groups of one row that is g times as long. A process reads the
    rows of a batch that its devices hold.
    """

    def __init__(
        self,
        streams: Sequence[BlockStream],
        *,
        context_length: int,
        batch_size: int,
        max_batches: int = 0,
        group_rows: int = 1,
        local_rows: LocalRows = range,
    ):
        """Takes the sources' streams; `max_batches` 0 reads all, else a batch must hold whole groups.

        Raises:
          UserError: there are no rows.
        """
        self._streams, self._T, self._B = list(streams), context_length, batch_size
        self._share = list(local_rows(batch_size))
        groups = [
            [(i, row) for row in range(first, min(first + group_rows, rows))]
            for i, rows in enumerate(row_count(stream.tokens, context_length) for stream in streams)
            for first in range(0, rows, group_rows)
        ]
        if not groups:
            raise UserError(
                "There is nothing to evaluate on: the split is empty; prepare it again with a validation_fraction."
            )
        wanted = min(len(groups), max_batches * batch_size // group_rows or len(groups))
        self._rows = [row for i in range(wanted) for row in groups[i * len(groups) // wanted]]

    def __len__(self) -> int:
        return -(-len(self._rows) // self._B)

    def __getitem__(self, index: int) -> Batch:
        """Returns this process's share of batch `index`, in the form of `TrainBatches`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        ids = self._rows[index * self._B : (index + 1) * self._B]
        ids += [(-1, 0)] * (self._B - len(ids))
        return gather_rows(self._streams, [ids[j] for j in self._share], self._T)


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads; a process sees its own share of each batch.

    Attributes:
      vocabulary: what the tokens mean.
      fingerprint: identifies the tokens of every source (weights and row length do not change it).
      train: the training batches, by step.
    """

    vocabulary: Vocabulary
    fingerprint: str
    train: TrainBatches
    _validation: list[BlockStream]
    _context_length: int
    _local_rows: LocalRows

    @property
    def validation_tokens(self) -> int:
        """Tokens of the longest source's validation split; no row reaches over two sources."""
        return max(stream.tokens for stream in self._validation)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises UserError where a model of `vocab_size` ids lacks some of the vocabulary's."""
        if self.vocabulary.size > vocab_size:
            raise UserError(
                f"config.model.vocab_size is {vocab_size} and the vocabulary of config.data has {self.vocabulary.size} "
                f"ids; set --config.model.vocab_size={self.vocabulary.size} or more."
            )

    def evaluation_batches(self, batch_size: int, max_batches: int = 0, group_rows: int = 1) -> EvaluationBatches:
        """Returns the batches of the validation split in order, all of them unless limited."""
        return EvaluationBatches(
            self._validation,
            context_length=self._context_length,
            batch_size=batch_size,
            max_batches=max_batches,
            group_rows=group_rows,
            local_rows=self._local_rows,
        )


def open_data(
    data_config: ConfigDict,
    *,
    context_length: int,
    batch_size: int,
    seed: int,
    local_rows: LocalRows = range,
) -> Data:
    """Opens the data that `config.data` names; `rattn.data.preparation.ensure_prepared` comes first.

    Args:
      data_config: `config.data`.
      context_length: T, tokens a row.
      batch_size: rows a step, over all processes.
      seed: fixes the order of the rows (and the tokens of the synthetic source).
      local_rows: which rows of a global batch this process reads; all of them unless given.

    Raises:
      UserError: no complete preparation, another one than the config's, a damaged shard, weights or halvings that do
        not fit.
    """
    if data_config.source == "synthetic":
        vocabulary = load_vocabulary(data_config.vocabulary)
        tokens = data_config.document_tokens
        training, validation = ([SyntheticStream(seed, split, vocabulary, tokens)] for split in SPLITS)
        names, weights = ("synthetic",), (1.0,)
        fingerprint = hashlib.sha256(f"synthetic {seed} {tokens} {vocabulary.fingerprint}".encode()).hexdigest()
    elif data_config.source == "recall":
        vocabulary = load_vocabulary(data_config.vocabulary)
        pairs, halvings = data_config.recall_pairs, data_config.recall_halvings
        if not 0 <= halvings < max(pairs.bit_length(), 1):
            raise UserError(
                f"config.data.recall_halvings is {halvings} and {pairs} pairs can be halved {pairs.bit_length() - 1} "
                "times; take no more, and no fewer than 0."
            )
        shapes = [{"pairs": pairs >> n, "document_tokens": context_length >> n} for n in range(halvings + 1)]
        training = [RecallStream(seed, "train", vocabulary, **shape) for shape in shapes]
        validation = [RecallStream(seed, "validation", vocabulary, **shapes[0])]
        names, weights = tuple(f"recall/{shape['pairs']}" for shape in shapes), (1.0,) * len(shapes)
        text = f"recall {seed} {pairs} {halvings} {vocabulary.fingerprint}"
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
    else:
        prepared = Prepared(data_config.path)
        Request.from_config(data_config).check_same(prepared)
        vocabulary, fingerprint = prepared.vocabulary(), prepared.fingerprint
        training, validation = (prepared.streams(split) for split in SPLITS)
        names, weights = prepared.names, _weights(data_config.weights, prepared)
    train = TrainBatches(
        training, names, weights, context_length=context_length, batch_size=batch_size, seed=seed, local_rows=local_rows
    )
    return Data(vocabulary, fingerprint, train, validation, context_length, local_rows)


def prefetched(
    batches: TrainBatches | EvaluationBatches, start_step: int = 0, *, read_threads: int, prefetch_batches: int
) -> Iterator[Batch]:
    """Iterates over `batches[start_step]`, `batches[start_step + 1]`, …, read ahead by background threads.

    Call `close()` on the iterator to stop the threads.
    """
    options = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=prefetch_batches)
    iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
    iterator.set_state({"next_index": start_step})
    return iterator


def _weights(given: Sequence[float], prepared: Prepared) -> Sequence[float]:
    if not given:
        return prepared.weights
    if len(given) != len(prepared.names) or min(given) < 0:
        raise UserError(
            f"data.weights is {tuple(given)} and {str(prepared.folder)!r} holds {len(prepared.names)} sources "
            f"({', '.join(prepared.names)}); give one weight ≥ 0 for each, or ()."
        )
    return given


def _source_seed(seed: int, name: str) -> int:
    """Returns 32 bits. Grain adds the epoch to it, so neighbouring seeds must not give neighbouring values."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "little")
