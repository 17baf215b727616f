"""How `attention_ring_gpu` divides its work and a multiprocessor's shared memory."""

import jax
import jax.numpy as jnp
import numpy as np

from rattn.decoding.mosaic_gpu import queries_of

# Slots of a tile; bytes of one.
TILE, TILE_BYTES = 64, 16 * 1024
HEAD_DIM = 128
HALF = HEAD_DIM // 2
# Tiles of a head's state.
STATE_TILES = 8
# Scores of a head that fit in registers.
MOST_TILES = 17
# Bytes of a multiprocessor's 227 KiB that are used, and of them what barriers and the ends of small arrays take.
SHARED_BYTES, SMALL_BYTES = 224 * 1024, 6 * 1024
# Warpgroups that take keys, and the number of the first.
KEY_WARPGROUPS, FIRST_TAKER = 2, 2
# Registers of a thread that copies, that takes keys, that takes the rest: at most 512 with two that take keys.
COPY_REGISTERS, KEY_REGISTERS, OTHER_REGISTERS = 24, 176, 128
# Multiprocessors of an H100 or H200; with another number only speed differs.
PROGRAMS = 132
# Columns of the linear branch: the least that a product has. With Q = 4 the last four are the queries once more.
LINEAR = 8


class Call:
    """What follows from the sizes of a call.

    Attributes:
      Q: columns of a product for a head's queries, of which there are two sets.
      tiles: of a ring.
      columns: of weights: two sets of queries, and the linear branch's.
      most_key_tiles: that one of the warpgroups takes that take keys.
      places: tiles that shared memory holds at a time.
      waiting_tiles: the most in which keys wait for the fold.
      waiting, states, values: after keys, numbers of the first copies of keys that wait, of the state and of values.
      copies: of a head.
      early: the first of them, which are asked for before the kernel before is done.
    """

    def __init__(self, B: int, K: int, G: int, S: int, W: int):
        self.B, self.K, self.G, self.S, self.W = B, K, G, S, W
        self.Q, self.tiles = queries_of(G), -(-S // TILE)
        self.columns = 2 * self.Q + LINEAR
        self.most_key_tiles = -(-self.tiles // KEY_WARPGROUPS)
        used = 2 * HEAD_DIM * (self.tiles * 2 * self.Q + 2 * LINEAR + 2 * (2 * self.Q + 2))
        used += 2 * TILE * (self.tiles * self.columns + KEY_WARPGROUPS * 2 * self.Q)
        used += 4 * HEAD_DIM * (self.columns + LINEAR)
        self.places = (SHARED_BYTES - SMALL_BYTES - used) // TILE_BYTES
        self.waiting_tiles = _most_tiles(S, S - W)
        # Values wait for the weights of all keys, so keys are first.
        self.waiting = self.tiles
        self.states = self.waiting + self.waiting_tiles
        self.values = self.states + STATE_TILES
        self.copies = self.values + self.tiles
        self.early = min(self.places, self.waiting)

    def place(self, number):
        """Returns where in shared memory a head's copy `number` goes; every head begins with the first place."""
        return jax.lax.rem(number, jnp.int32(self.places))

    def waiting_tile(self, n, newest, unfolded):
        """Returns number n of the tiles that may hold keys that wait: from that of the oldest on, round the ring.

        Args:
          n: below `waiting_tiles`.
          newest: the newest key's slot.
          unfolded: keys that left the window since the fold; at most S − W.
        """
        oldest = newest - self.W - unfolded + 1
        oldest = jnp.where(oldest < 0, oldest + self.S, oldest)
        return jax.lax.rem(jax.lax.div(oldest, jnp.int32(TILE)) + n, jnp.int32(self.tiles))


def _most_tiles(slots, count):
    """Returns in how many tiles of a ring so many slots one after another may be."""
    places = (np.arange(slots)[:, None] + np.arange(count)) % slots // TILE
    return int(np.max([len(np.unique(row)) for row in places]))
