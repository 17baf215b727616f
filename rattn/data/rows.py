"""The rule that cuts a stream into rows (stated in `rattn.data`)."""

from collections.abc import Sequence

import numpy as np

from rattn.data.stream import BlockStream

Batch = dict[str, np.ndarray]


def row_count(tokens: int, context_length: int) -> int:
    """Returns the number of rows of a stream: each token but the first is a target once."""
    return -(-max(tokens - 1, 0) // context_length)


def read_rows(stream: BlockStream, rows: Sequence[int], context_length: int) -> Batch:
    """Reads rows of a stream.

    Returns:
      `tokens`, `targets` and `segment_ids` int32 [len(rows), context_length] and `loss_mask` bool of the same shape:
      which targets count. Past the end of the stream they are 0, 0, 0 and False.
    """
    T = context_length
    offsets = [row * T for row in rows]
    tokens, starts = stream.read(offsets, T + 1)
    # Position t of a row is inside the stream if t < present; its target is if t + 1 < present.
    present = stream.tokens - np.array(offsets, np.int64)[:, None]
    position = np.arange(T)[None, :]
    starts[:, 0] = True
    segment_ids = np.cumsum(starts[:, :T], axis=1, dtype=np.int32)
    return {
        "tokens": np.ascontiguousarray(tokens[:, :T]),
        "targets": np.ascontiguousarray(tokens[:, 1:]),
        "segment_ids": np.where(position < present, segment_ids, 0).astype(np.int32),
        "loss_mask": ~starts[:, 1:] & (position + 1 < present) & stream.counts(offsets, tokens),
    }


def masked_rows(rows: int, context_length: int) -> Batch:
    """Returns rows of padding alone, in the form of `read_rows`."""
    zeros = np.zeros((rows, context_length), np.int32)
    return {"tokens": zeros, "targets": zeros, "segment_ids": zeros, "loss_mask": zeros.astype(np.bool_)}


def gather_rows(streams: Sequence[BlockStream], ids: Sequence[tuple[int, int]], context_length: int) -> Batch:
    """Reads rows of several streams into one batch, in the order of `ids`: (index of the stream, row).

    An id (-1, …) gives a row of padding.
    """
    batch = {key: value.copy() for key, value in masked_rows(len(ids), context_length).items()}
    for index, stream in enumerate(streams):
        places = [place for place, (source, _) in enumerate(ids) if source == index]
        if places:
            part = read_rows(stream, [ids[place][1] for place in places], context_length)
            for key, value in part.items():
                batch[key][places] = value
    return batch
