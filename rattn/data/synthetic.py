"""Tokens without files, for measuring and for tests."""

import numpy as np

from rattn.data.stream import BLOCK_TOKENS, SPLITS, BlockStream
from rattn.data.vocabulary import Vocabulary

TRAIN_TOKENS = 2**34
VALIDATION_TOKENS = 2**17


class SyntheticStream(BlockStream):
    """Independent tokens of a Zipf law, in documents of `document_tokens` tokens on average.

    The k-th id that is not EOS (from 0) has probability log((k + 2) / (k + 1)) / log(vocabulary size - 1).

    Block b is drawn by Philox with the key (seed, b), so any slice is a pure function of (seed, split, position).
    A document ends at each token with probability 1 / document_tokens.
    """

    def __init__(self, seed: int, split: str, vocabulary: Vocabulary, document_tokens: int = 1024):
        self.tokens = TRAIN_TOKENS if split == "train" else VALIDATION_TOKENS
        self._split = SPLITS.index(split)
        self._seed, self._document_tokens = seed, document_tokens
        self._size, self._eos_id = vocabulary.size, vocabulary.eos_id

    def _read_blocks(self, blocks: list[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {block: self._block(block) for block in blocks}

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.Generator(np.random.Philox(key=[self._seed, block], counter=[0, 0, 0, self._split]))
        tokens = np.floor((self._size - 1) ** generator.random(BLOCK_TOKENS) - 1).astype(np.int64)
        tokens += tokens >= self._eos_id
        # Never at a block's first token, whose predecessor (the EOS) belongs to another block.
        starts = 1 + np.flatnonzero(generator.random(BLOCK_TOKENS - 1) < 1 / self._document_tokens)
        tokens[starts - 1] = self._eos_id
        return tokens, starts if block else np.append(0, starts)
