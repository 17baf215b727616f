"""Recall tokens: targets that could be copied from an earlier place in their document.

A target is a recall token where the n tokens before it (n = 2: the preceding bigram) occurred earlier in its document,
inside the row, with the same token after them. Its distance is the number of tokens from the nearest such occurrence's
continuation to the target. Left out are the n-grams (context and continuation) that are frequent in training, which a
model knows by heart. (After the associative-recall slice of Arora et al. 2023, "Zoology", section 3, which looks at one
preceding token and keeps what training held at most 1,250 times.)

All of it depends on the tokens alone, so models of any mixer and window are compared on the same tokens.
"""

from collections.abc import Iterable

import numpy as np

from rattn.data.rows import Batch
from rattn.errors import UserError

NO_NGRAM = -1


def ngram_codes(batch: Batch, context_tokens: int, vocab_size: int) -> np.ndarray:
    """Numbers the n-gram of each position: the last `context_tokens` inputs and the target.

    Args:
      batch: as `rattn.data.rows.read_rows` gives it.
      context_tokens: n.
      vocab_size: ids are below it.

    Returns:
      int64 [B, T], equal where the n-grams are equal; NO_NGRAM where it does not lie in one document.

    Raises:
      UserError: the n-grams of this vocabulary do not fit 63 bits.
    """
    if vocab_size ** (context_tokens + 1) >= 2**63:
        raise UserError(
            f"{context_tokens} tokens of a vocabulary of {vocab_size} ids and their continuation do not fit 63 bits; "
            "look at fewer with --recall_context_tokens."
        )
    tokens, segments = batch["tokens"], batch["segment_ids"]
    T = tokens.shape[1]
    codes = np.zeros(tokens.shape, np.int64)
    # The target's document is that of the next input; beyond the row's end the loss mask knows it.
    whole = segments > 0
    whole[:, :-1] &= segments[:, 1:] == segments[:, :-1]
    whole[:, -1] &= batch["loss_mask"][:, -1]
    for back in range(context_tokens - 1, -1, -1):
        first = min(back, T)
        codes[:, first:] = codes[:, first:] * vocab_size + tokens[:, : T - first]
        whole[:, first:] &= segments[:, first:] == segments[:, : T - first]
        whole[:, :first] = False
    return np.where(whole, codes * vocab_size + batch["targets"], NO_NGRAM)


def nearest_distance(codes: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """Finds for each position how far back its n-gram last occurred in its document.

    Args:
      codes: int64 [B, T] of `ngram_codes`.
      segment_ids: int32 [B, T].

    Returns:
      int32 [B, T]; 0 where there is no n-gram or no earlier occurrence.
    """
    # A stable sort puts equal n-grams of a row side by side in the order of their places. Documents do not interleave:
    # if the last occurrence is in another document, none is in this one.
    order = np.argsort(codes, axis=1, kind="stable")
    sorted_codes = np.take_along_axis(codes, order, axis=1)
    sorted_segments = np.take_along_axis(segment_ids, order, axis=1)
    again = (sorted_codes[:, 1:] == sorted_codes[:, :-1]) & (sorted_segments[:, 1:] == sorted_segments[:, :-1])
    again &= sorted_codes[:, 1:] != NO_NGRAM
    distances = np.zeros(codes.shape, np.int32)
    steps = np.where(again, order[:, 1:] - order[:, :-1], 0).astype(np.int32)
    np.put_along_axis(distances, order[:, 1:], steps, axis=1)
    return distances


def frequent_ngrams(batches: Iterable[Batch], context_tokens: int, vocab_size: int, rate: float) -> np.ndarray:
    """Lists the n-grams that make up at least `rate` of those in `batches`.

    Returns:
      int64 codes, ascending. An n-gram that occurs once is never frequent.
    """
    codes = [ngram_codes(batch, context_tokens, vocab_size) for batch in batches]
    flat = np.sort(np.concatenate([part[part != NO_NGRAM] for part in codes]))
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]])) if len(flat) else np.zeros(0, np.int64)
    counts = np.diff(starts, append=len(flat))
    return flat[starts[counts >= max(rate * len(flat), 2)]]


def recall_distances(batch: Batch, frequent: np.ndarray, context_tokens: int, vocab_size: int) -> np.ndarray:
    """Returns int32 [B, T]: the distance of each recall token, 0 where a target is none or does not count."""
    codes = ngram_codes(batch, context_tokens, vocab_size)
    distances = nearest_distance(codes, batch["segment_ids"])
    if len(frequent):
        place = np.minimum(np.searchsorted(frequent, codes), len(frequent) - 1)
        distances[frequent[place] == codes] = 0
    return np.where(batch["loss_mask"], distances, 0)
