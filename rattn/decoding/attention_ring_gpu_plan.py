"""How `attention_ring_gpu` divides its work and a multiprocessor's shared memory."""

import dataclasses
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
# Whether programs may take two branches; see `_divided`. Not timed yet.
FINER = False
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


@dataclasses.dataclass(frozen=True)
class Division:
    """How heads are divided among programs.

    Attributes:
      whole: heads that are one program's, the first ones.
      each: of them that every program has, at least, but for those of a pair, which have one fewer.
      split: heads of which each branch is another program's, the last ones.
      pairs: programs of two softmax branches, the first ones, for which those of the linear ones wait. Where there are
        none, programs of linear branches are first, and those of one softmax branch wait.
      linear_each: branches of a program of linear ones.
    """

    whole: int
    each: int
    split: int = 0
    pairs: int = 0
    linear_each: int = 1

    @property
    def two_branches(self):
        """Whether programs have two branches."""
        return self.pairs > 0 or self.linear_each > 1

    def wholes(self, program):
        """Returns how many whole heads a program has where some are split."""
        return self.each - (program < self.pairs).astype(jnp.int32) if self.pairs else self.each

    def branches(self, program):
        """Returns how many softmax and how many linear branches a program has."""
        first = self.first_branch(program)
        inside = (first >= 0) & (first < self.split)
        is_softmax = program < self.pairs if self.pairs else program >= self._linear_programs
        softmax = jnp.where(inside & is_softmax, 2 if self.pairs else 1, 0)
        left = jnp.minimum(self.split - first, self.linear_each)
        return softmax, jnp.where(inside & ~is_softmax, left, 0)

    def first_branch(self, program):
        """Returns the number of the first head of which a program has a branch; past `split` where it has none."""
        if self.pairs:
            return jnp.where(program < self.pairs, 2 * program, program - self.pairs)
        linear = self._linear_programs
        return jnp.where(program < linear, self.linear_each * program, program - linear)

    @property
    def _linear_programs(self):
        return -(-self.split // self.linear_each)


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
      pairs_fit: whether a program may take one softmax branch after another.
      division: of the heads.
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
        # Then a tile of keys comes when that of before was taken, and what is on its way are values.
        self.pairs_fit = 2 * self.tiles >= self.places and self.tiles >= self.on_the_way
        self.division = _divided(B * K, self.pairs_fit)
        self.programs = min(PROGRAMS, B * K)

    def jobs(self, program):
        """Returns how many jobs a program has."""
        divided = self.division
        if not divided.split:
            return jax.lax.div(divided.whole - program + PROGRAMS - 1, jnp.int32(PROGRAMS))
        softmax, linear = divided.branches(program)
        return divided.wholes(program) + softmax + linear

    def job(self, program, i):
        """Returns a program's job number i: whole heads, then one or two branches of one kind.

        Of a head that is split the program for which the other one waits begins before that one.
        """
        divided = self.division
        if not divided.split:
            return self._job(i, program + i * PROGRAMS)
        wholes, (softmax, _) = divided.wholes(program), divided.branches(program)
        # All programs have a head for each i but the last, which pairs of softmax branches lack.
        head = program + i * PROGRAMS
        if divided.pairs:
            head -= jnp.where(i == divided.each - 1, divided.pairs, 0)
        is_whole = (i < wholes).astype(jnp.int32)
        head = jnp.where(is_whole == 1, head, divided.whole + divided.first_branch(program) + i - wholes)
        is_softmax = (softmax > 0).astype(jnp.int32)
        return self._job(i, head, jnp.maximum(is_whole, is_softmax), jnp.maximum(is_whole, 1 - is_softmax))

    def _job(self, i, head, *branches):
        b, h = (operation(head, jnp.int32(self.K)) for operation in (jax.lax.div, jax.lax.rem))
        return Job(i, b, h, *branches)

    def split_number(self, job):
        """Returns which of the heads that are split a job's is."""
        return job.b * self.K + job.h - self.division.whole

    def numbers(self, job):
        """Returns the `Numbers` of a job; what is before it are whole heads, or one branch of its kind after them."""
        keys = job.i * self.copies_of_a_head
        if self.division.two_branches:
            is_branch = 1 - job.softmax * job.linear
            of_branch = jnp.where(job.linear == 1, 2 * self.waiting_tiles + STATE_TILES, 2 * self.tiles)
            wholes = self.division.each - (is_branch * job.softmax if self.division.pairs else 0)
            branches_before = is_branch * (job.i - wholes)
            keys -= branches_before * (self.copies_of_a_head - of_branch)
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


def _divided(heads, pairs_fit):
    """Returns the `Division` of so many heads.

    The heads that are left when all programs have as many are split where programs have at most a branch of one then.
    With FINER up to a third of the programs take two softmax branches in place of a head, or half as many linear
    branches' programs two.
    """
    each, rest = divmod(heads, PROGRAMS)
    if not each or not rest or rest > (2 * PROGRAMS // 3 if FINER else PROGRAMS // 2):
        return Division(heads, each)
    if FINER and pairs_fit and 3 * rest <= PROGRAMS:
        return Division(heads - 2 * rest, each, split=2 * rest, pairs=rest)
    return Division(heads - rest, each, split=rest, linear_each=1 if 2 * rest <= PROGRAMS else 2)


def _most_tiles(slots, count):
    """Returns in how many tiles of a ring so many slots one after another may be."""
    places = (np.arange(slots)[:, None] + np.arange(count)) % slots // TILE
    return int(np.max([len(np.unique(row)) for row in places]))
