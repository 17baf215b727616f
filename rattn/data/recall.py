"""Associative recall with uniform gaps, without files: one document a row, pairs first, then queries among filler.

    EOS  k₁ v₁ k₂ v₂ … k_N v_N  f f k₂ v₂ f f f f k₁ v₁ …

After N key-value pairs each key comes once more, at a place drawn uniformly from all that is left of the row, and its
value is the only target that counts. Keys, values and filler are different ids. (MQAR of Arora et al. 2023, "Zoology",
with its gaps made uniform, so that every distance up to the row's length is asked for about equally often.)
"""

from collections.abc import Sequence

import numpy as np

from rattn.data.stream import SPLITS, BlockStream
from rattn.data.vocabulary import Vocabulary
from rattn.errors import UserError

TRAIN_DOCUMENTS = 2**32
VALIDATION_DOCUMENTS = 2**10


class RecallStream(BlockStream):
    """Documents of `document_tokens` tokens, the n-th a pure function of (seed, split, n).

    Validation has the same documents for every seed, so that models trained from different seeds answer the same.
    """

    def __init__(self, seed: int, split: str, vocabulary: Vocabulary, *, pairs: int, document_tokens: int):
        """Takes N and the length of a document, which is that of a row.

        Raises:
          UserError: a vocabulary other than ids, or one too small, or a document too short for the pairs.
        """
        ids = (vocabulary.size - 2) // 3
        if vocabulary.name != "ids" or ids < pairs:
            raise UserError(
                f"config.data.vocabulary is {vocabulary.name!r} of {vocabulary.size} ids and recall needs bare ids, "
                f"{3 * pairs + 2} at least for {pairs} pairs; set it to ids:SIZE."
            )
        if document_tokens < 4 * pairs + 1:
            raise UserError(
                f"config.data.recall_pairs is {pairs} and a row has {document_tokens} tokens; pairs and queries need "
                f"{4 * pairs + 1}, so ask for fewer pairs or a longer config.context_length."
            )
        train = split == "train"
        self.tokens = document_tokens * (TRAIN_DOCUMENTS if train else VALIDATION_DOCUMENTS)
        self._key, self._split = (seed if train else 0), SPLITS.index(split)
        self._N, self._T, self._ids, self._eos_id = pairs, document_tokens, ids, vocabulary.eos_id
        # Filler, keys and values are neighbouring ranges of ids behind padding and EOS.
        self._filler, self._keys, self._values = 2, 2 + ids, 2 + 2 * ids

    def read(self, offsets: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
        """See `BlockStream.read`."""
        tokens = np.zeros((len(offsets), length), np.int32)
        starts = np.zeros((len(offsets), length), np.bool_)
        places = []
        for row, offset in enumerate(offsets):
            for number in range(offset // self._T, -(-min(offset + length, self.tokens) // self._T)):
                first = number * self._T - offset
                if first >= 0:
                    tokens[row, first], starts[row, first] = self._eos_id, True
                # Of the document behind a row only the first token is asked for, which is known.
                if first + 1 < length:
                    places.append((row, first, number))
        numbers = sorted({number for _, _, number in places})
        documents = dict(zip(numbers, self._documents(numbers), strict=True))
        for row, first, number in places:
            low, high = max(first, 0), min(first + self._T, length)
            tokens[row, low:high] = documents[number][low - first : high - first]
        return tokens, starts

    def counts(self, offsets: Sequence[int], tokens: np.ndarray) -> np.ndarray:
        """Whether each token but the first is a target: the value behind a query.

        Args:
          offsets: as in `read`.
          tokens: [len(offsets), length] that it returned.
        """
        places = (np.asarray(offsets)[:, None] + np.arange(1, tokens.shape[1])) % self._T
        return (tokens[:, 1:] >= self._values) & (places > 2 * self._N)

    def _documents(self, numbers: list[int]) -> np.ndarray:
        """Draws documents, int64 [len(numbers), T]."""
        N, T, ids = self._N, self._T, self._ids
        slots = (T - 1 - 2 * N) // 2
        sizes = [N, N, N, slots, T]
        draws = np.stack([self._draw(number, sum(sizes)) for number in numbers])
        u_key, u_order, u_value, u_slot, u_filler = np.split(draws, np.cumsum(sizes)[:-1], axis=1)
        # One key of each of N equal ranges, so that they differ, in random order.
        edges = np.arange(N + 1) * ids // N
        keys = self._keys + edges[:-1] + np.floor(u_key * np.diff(edges)).astype(np.int64)
        keys = np.take_along_axis(keys, np.argsort(u_order, axis=1, kind="stable"), axis=1)
        values = self._values + np.floor(u_value * ids).astype(np.int64)
        documents = self._filler + np.floor(u_filler * ids).astype(np.int64)
        documents[:, 0] = self._eos_id
        documents[:, 1 : 2 * N : 2] = keys
        documents[:, 2 : 2 * N + 1 : 2] = values
        # N different slots of two tokens.
        places = 1 + 2 * N + 2 * np.argsort(u_slot, axis=1, kind="stable")[:, :N]
        np.put_along_axis(documents, places, keys, axis=1)
        np.put_along_axis(documents, places + 1, values, axis=1)
        return documents

    def _draw(self, number: int, count: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=[self._key, number], counter=[0, 0, 0, self._split]))
        return generator.random(count)
