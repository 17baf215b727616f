"""How `attention_stream_gpu` divides keys and values among its programs, and a multiprocessor's shared memory."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import devices
from rattn.decoding import mosaic_gpu

HEAD_DIM, HALF = 128, 64
# Slots of a tile; pairs of tiles, of 32 KiB, that shared memory holds at a time; warpgroups that take them in turn.
TILE, PAIRS, TAKERS = 64, 6, 2
# Columns of a product: the fewest that there can be. Those past a head's queries are nothing.
COLUMNS = 8
# Programs at least, in percent of the multiprocessors.
LEAST_PERCENT = 94


class Moment(NamedTuple):
    """What a call takes that follows from where the sequences stand, whatever the layer holds.

    Attributes:
      spans_B4: int32, of each sequence: the new key's slot, how many tokens back it sees, itself included, the first of
        its tiles with a visible key, and how many there are from there on, round the ring; at least one.
      shares_P5: int32, of each program: its first head (of all sequences' in a row) and the pair of it that it begins
        with, its last head and that pair of it before which it ends, and how many programs after it have parts of this
        one.
      angles_2BR: float32, sines and cosines [B, H/2] of the new tokens' positions, or None without any.
    """

    spans_B4: jax.Array
    shares_P5: jax.Array
    angles_2BR: jax.Array | None


def moment(
    newest_B: jax.Array,
    known_B: jax.Array,
    window: int,
    slots: int,
    kv_heads: int,
    angles: tuple[jax.Array, jax.Array] | None,
) -> Moment:
    """Makes a call's `Moment`.

    Args:
      newest_B: int32, the new key's slot; the one before it is to its left, that of slot 0 in the last; past the end
        where a full layer has no room.
      known_B: int32, how many tokens back a sequence reaches, itself included.
      window: W; the capacity for a full layer.
      slots: of a sequence.
      kv_heads: K.
      angles: float32 [B, H/2], sines and cosines of the new tokens' positions, where there are rotary positions.
    """
    programs = programs_of(len(newest_B) * kv_heads)
    divided = shares(newest_B, known_B, window, slots, kv_heads, programs)
    return Moment(*divided, None if angles is None else jnp.stack(angles))


def shares(
    newest_B: jax.Array, known_B: jax.Array, window: int, slots: int, kv_heads: int, programs: int
) -> tuple[jax.Array, jax.Array]:
    """Divides the pairs of all heads among programs; returns spans_B4 and shares_P5 of `Moment`.

    Args:
      newest_B, known_B, window, slots, kv_heads: as `moment`.
      programs: how many there are.
    """
    tiles, reach = -(-slots // TILE), jnp.minimum(window, known_B)
    last = jnp.minimum(newest_B, slots) - 1
    first = jnp.minimum(newest_B - reach + 1, slots - 1)
    first_tile, last_tile = (jnp.where(slot < 0, slot + slots, slot) // TILE for slot in (first, last))
    round_the_ring = jnp.minimum(tiles - first_tile + last_tile + 1, tiles)
    count = jnp.where((first < 0) & (last >= 0), round_the_ring, last_tile - first_tile + 1)
    count = jnp.where(reach > 1, jnp.maximum(count, 1), 1)
    spans = jnp.stack([newest_B, reach, first_tile, count], axis=1)

    ends = jnp.cumsum(count * kv_heads)
    total = ends[-1]

    def place(pair):
        """Returns, for pairs of the line, a head, which pair of it that is, and where the head ends."""
        b = jnp.sum(ends[None] <= pair[:, None], axis=1)
        before, each = (jnp.take(x, b, mode="clip") for x in (ends - count * kv_heads, count))
        head, within = (pair - before) // each, (pair - before) % each
        return b * kv_heads + head, within, before + (head + 1) * each

    number = jnp.arange(programs)
    # Where pairs are few, the last programs have none.
    busy = jnp.minimum(programs, total)
    begin, end = (jnp.minimum(n, busy) * total // busy for n in (number, number + 1))
    first_head, first_pair, _ = place(begin)
    last_head, last_pair, head_ends = place(end - 1)
    last_head = jnp.where(begin < end, last_head, first_head - 1)
    # The last program that begins before the head ends.
    sharers = jnp.sum(begin[None] < head_ends[:, None], axis=1) - 1 - number
    return spans, jnp.stack([first_head, first_pair, last_head, last_pair + 1, sharers], axis=1)


def programs_of(heads: int) -> int:
    """Returns how many programs there are: one a multiprocessor, or a few less.

    Less if so no head is divided where all sequences are as long.
    """
    most = min(devices.multiprocessors() or mosaic_gpu.MULTIPROCESSORS, mosaic_gpu.MULTIPROCESSORS)
    few = range(most, most * LEAST_PERCENT // 100, -1)
    return next((count for count in few if heads % count == 0), most)


@dataclasses.dataclass(frozen=True)
class Call:
    """Sizes of a call: sequences, key/value heads of one, queries of a head, slots, programs."""

    B: int
    K: int
    G: int
    S: int
    programs: int

    @property
    def Q(self) -> int:
        """Rows of a head's result."""
        return mosaic_gpu.queries_of(self.G)

    @property
    def tiles(self) -> int:
        """Of a sequence's slots."""
        return -(-self.S // TILE)

    def shared(self):
        """Types of a program's shared memory, by the names of `Warpgroup`.

        A warpgroup counts as one arrival at a barrier, and its threads do not wait for each other there:

            keys_full, values_full    a tile's copy; its taker waits
            empty                     who took a pair; Copies waits, but for the first in a place
            new_full                  both copies of what is new; takers wait
            new_empty                 takers; Copies waits, from the third head on
            told                      a taker but the first, once its part of a head is there; the first waits
            heard                     the first taker; others wait, from the second head on
        """
        tiled = mosaic_gpu.TRANSFORMS
        tiles = plgpu.SMEM((PAIRS, TILE, HEAD_DIM), jnp.bfloat16, transforms=tiled)
        return {
            "keys": tiles,
            "values": tiles,
            # Queries of a head as projected, its key and its value.
            "new": plgpu.SMEM((2, COLUMNS + 2, HEAD_DIM), jnp.bfloat16),
            # As they are multiplied, for each taker; the key, COLUMNS times.
            "queries": plgpu.SMEM((TAKERS, COLUMNS, HEAD_DIM), jnp.bfloat16, transforms=tiled),
            "key": plgpu.SMEM((COLUMNS, HEAD_DIM), jnp.bfloat16),
            "score": plgpu.SMEM((COLUMNS,), jnp.float32),
            # Of each warp of a taker.
            "maxima": plgpu.SMEM((TAKERS, 4, COLUMNS), jnp.float32),
            "totals": plgpu.SMEM((TAKERS, 4, COLUMNS), jnp.float32),
            "weights": plgpu.SMEM((TAKERS, COLUMNS, TILE), jnp.bfloat16, transforms=tiled),
            # What the other takers found.
            "others": plgpu.SMEM((TAKERS - 1, HEAD_DIM, COLUMNS), jnp.float32),
            "most": plgpu.SMEM((TAKERS - 1, COLUMNS), jnp.float32),
            "out": plgpu.SMEM((COLUMNS, HEAD_DIM), jnp.float32),
            "keys_full": plgpu.Barrier(num_barriers=PAIRS),
            "values_full": plgpu.Barrier(num_barriers=PAIRS),
            "empty": plgpu.Barrier(num_barriers=PAIRS),
            "new_full": plgpu.Barrier(num_arrivals=2, num_barriers=2),
            "new_empty": plgpu.Barrier(num_arrivals=TAKERS, num_barriers=2),
            "told": plgpu.Barrier(num_arrivals=TAKERS - 1),
            "heard": plgpu.Barrier(),
        }
