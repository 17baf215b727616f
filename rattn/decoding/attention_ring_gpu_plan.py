"""How `attention_ring_gpu` divides its work and a multiprocessor's shared memory."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rattn.decoding.mosaic_gpu import MULTIPROCESSORS, queries_of

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
COPY_REGISTERS, KEY_REGISTERS, OTHER_REGISTERS = 24, 176, 136
# One a multiprocessor.
PROGRAMS = MULTIPROCESSORS
# Copies of a program that are on their way at a time: with more all else comes later that it reads, its code too.
ON_THE_WAY = 4
# Whether programs take two softmax branches, where no program has more to copy so. Not timed yet.
PAIRS_OF_SOFTMAX = False
# Columns of the linear branch: the least that a product has. With Q = 4 the last four are the queries once more.
LINEAR = 8


class Job(NamedTuple):
    """What a program does next: a head, or one branch of it.

    Attributes:
      i: its number in the program.
      b, h: the sequence, the key/value head.
      softmax, linear: 1 where the job has the branch, else 0; in Python where all jobs are whole heads.
    """

    i: jax.Array
    b: jax.Array
    h: jax.Array
    softmax: jax.Array | int = 1
    linear: jax.Array | int = 1


class Numbers(NamedTuple):
    """Numbers of a job's first copies of keys, of keys that wait, of the state and of values, and of the next job's.

    Keys are first, for values wait for the weights of all keys. A program's copies are numbered through all its jobs.
    """

    keys: jax.Array | int
    waiting: jax.Array | int
    states: jax.Array | int
    values: jax.Array | int
    end: jax.Array | int


class Call:
    """What follows from the sizes of a call.

    Attributes:
      Q: columns of a product for a head's queries, of which there are two sets.
      tiles: of a ring.
      columns: of weights: two sets of queries, and the linear branch's.
      most_key_tiles: that one of the warpgroups takes that take keys.
      places: tiles that shared memory holds at a time.
      waiting_tiles: the most in which keys wait for the fold.
      on_the_way: copies that are on their way at a time.
      copies_of_a_head: keys, keys that wait, the state, values.
      early: copies of keys, the first, which are asked for before the kernel before is done.
      split: heads of which each branch is another program's, the last ones.
      pairs: programs of two softmax branches, the first ones; else those with a branch have a whole head before it.
      programs: that there are.
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
        # A copy's barrier has to be waited for before its place is used again.
        self.on_the_way = min(ON_THE_WAY, self.places)
        self.waiting_tiles = _most_tiles(S, S - W)
        self.copies_of_a_head = self.tiles + self.waiting_tiles + STATE_TILES + self.tiles
        self.early = min(self.places, self.tiles)
        # After a softmax branch a tile of keys comes when that of before was taken, and what is on its way are values.
        paired = PAIRS_OF_SOFTMAX and 2 * self.tiles >= self.places and self.tiles >= self.on_the_way
        self.split, self.pairs = _split(B * K, paired)
        self.whole = B * K - self.split
        self.programs = min(PROGRAMS, B * K)

    def jobs(self, program):
        """Returns how many jobs a program has."""
        if self.pairs:
            return 1 + (program < self.pairs + self.split).astype(jnp.int32)
        jobs = jax.lax.div(self.whole - program + PROGRAMS - 1, jnp.int32(PROGRAMS))
        return jobs + jnp.where(program < 2 * self.split, 1, 0) if self.split else jobs

    def job(self, program, i):
        """Returns a program's job number i.

        Of a head that is split the program for which the other one waits begins before that one.
        """
        if self.pairs:
            is_pair = (program < self.pairs).astype(jnp.int32)
            of_pair = self.whole + 2 * program + i
            head = jnp.where(is_pair == 1, of_pair, program - self.pairs + i * self.whole)
            branches = jnp.maximum(is_pair, (i == 0).astype(jnp.int32)), 1 - is_pair
        elif self.split:
            head = program + i * PROGRAMS
            second = (program >= self.split).astype(jnp.int32)
            is_whole = (head < self.whole).astype(jnp.int32)
            head -= (1 - is_whole) * second * self.split
            branches = jnp.maximum(is_whole, second), jnp.maximum(is_whole, 1 - second)
        else:
            head, branches = program + i * PROGRAMS, ()
        return Job(i, *(operation(head, jnp.int32(self.K)) for operation in (jax.lax.div, jax.lax.rem)), *branches)

    def split_number(self, job):
        """Returns which of the heads that are split a job's is."""
        return job.b * self.K + job.h - self.whole

    def numbers(self, job):
        """Returns the `Numbers` of a job; those before it are whole heads, or as it is in a pair."""
        before = self.copies_of_a_head
        if self.pairs:
            before = jnp.where(job.linear == 0, 2 * self.tiles, before)
        keys = job.i * before
        waiting = keys + job.softmax * self.tiles
        states = waiting + job.linear * self.waiting_tiles
        values = states + job.linear * STATE_TILES
        return Numbers(keys, waiting, states, values, values + self.value_tiles(job))

    def value_tiles(self, job):
        """Returns how many tiles of values a job takes: all, or where keys wait."""
        return job.softmax * self.tiles + (1 - job.softmax) * self.waiting_tiles

    def value_tile(self, job, n, newest, unfolded):
        """Returns number n of the tiles of values that a job takes; see `waiting_tile`."""
        if isinstance(job.softmax, int):
            return n
        return jnp.where(job.softmax == 1, n, self.waiting_tile(n, newest, unfolded))

    def place(self, number):
        """Returns where in shared memory a program's copy `number` goes."""
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


def _split(heads, paired):
    """Returns how many heads are split, and how many programs take two softmax branches.

    Those that are left when all programs have as many, each branch a program's of its own. Or, where they may be
    `paired`, twice as many: half as many programs take two softmax branches and no whole head, others a linear one
    after theirs.
    """
    rest = heads % PROGRAMS
    if rest == heads or 2 * rest > PROGRAMS:
        return 0, 0
    if paired and heads == PROGRAMS + rest and 4 * rest <= heads:
        return 2 * rest, rest
    return rest, 0


def _most_tiles(slots, count):
    """Returns in how many tiles of a ring so many slots one after another may be."""
    places = (np.arange(slots)[:, None] + np.arange(count)) % slots // TILE
    return int(np.max([len(np.unique(row)) for row in places]))
