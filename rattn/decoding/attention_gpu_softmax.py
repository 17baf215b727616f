"""The softmax branch of `attention_gpu`: keys as they were positioned, or as they were projected.

A rattention layer's keys are kept as projected; a tile of them is normed and rotated on the way to the scores, which
XLA would do into an array of its own. A key is rotated by its place in its tile alone, by angles that are read once,
and the queries, tile after tile, by the age of the tile's first slot.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from rattn.decoding.attention_gpu_program import LEAST, rotated


def softmax_branch(program):
    """Returns Σ e^(s − m) v [H, Q], m [Q] and Σ e^(s − m) [Q] over the part's visible keys, float32."""
    tile_slots = program.tile
    tiles = -(-program.slots // tile_slots)
    newest_tile = program.newest // tile_slots

    def place(i):
        """Returns the tile that is read as number i, and how old the token in its first slot is."""
        tile = newest_tile + i
        before = tile < tiles  # the slots went round since
        tile = jnp.where(before, tile, tile - tiles)
        age = program.newest - tile * tile_slots
        return tile, jnp.where(before, age + program.slots, age)

    # The newest slot's tile is the first, for what is older than a round, and the last.
    reach = jnp.minimum(program.plan.window, program.known)
    _, oldest = place(0)
    skipped = jnp.maximum(oldest - reach + 1, 0) // tile_slots
    per_part = (tiles + 1 - skipped + program.parts - 1) // program.parts
    first = skipped + program.part * per_part
    last = jnp.minimum(first + per_part, tiles + 1)
    new_k, new_v = program.new_key_and_value()
    keys = ProjectedKeys(program, tiles, place(first)[1]) if program.kept_as_projected else PositionedKeys(program)

    def read(i, carry):
        o, most, total, q = carry
        tile, age = place(i)
        slots, ages = tile * tile_slots + jnp.arange(tile_slots), age - jnp.arange(tile_slots)
        visible = (slots < program.slots) & (ages > 0) & (ages < reach)
        scores, q = keys.scores(q, program.load_halves("k", slots, slots < program.slots), tile)
        scores = jnp.where(visible[:, None], scores * program.H**-0.5, LEAST)
        now = jnp.maximum(most, jnp.max(scores, axis=0))
        weights = jnp.where(visible[:, None], program.exp(scores, now[None]), 0.0)
        shrink = program.exp(most - now)
        v = program.load("v", slots, slots < program.slots, 0, program.H)
        o = o * shrink[None] + program.dot(v, weights.astype(program.dtype), 0, 0)
        return o, now, total * shrink + jnp.sum(weights, axis=0), q

    def with_new(o, most, total):
        k = keys.kept(new_k)
        _keep(program, k, new_v)
        score = keys.score_of_new(k) * program.H**-0.5
        now = jnp.maximum(most, score)
        shrink, weight = program.exp(most - now), program.exp(score - now)
        return o * shrink[None] + new_v.astype(jnp.float32).T * weight[None], now, total * shrink + weight

    H, Q = program.H, program.Q
    start = jnp.zeros((H, Q), jnp.float32), jnp.full(Q, LEAST), jnp.zeros(Q, jnp.float32)
    *found, _ = jax.lax.fori_loop(first, last, read, (*start, keys.start))
    return jax.lax.cond(program.part == 0, with_new, lambda *x: x, *found)


def _keep(program, k, v):
    """Writes the new token's key and value."""
    slot = program.newest + jnp.arange(1)
    for name, first, x in (("kept k", 0, k[0]), ("kept k", program.half, k[1]), ("kept v", 0, v)):
        index, mask = program.window(slot, slot < program.slots, program.slots, first, x.shape[1])
        plgpu.store(program.refs[name].at[program.batch, program.head, *index], x, mask=mask)


class PositionedKeys:
    """Scores of keys that are kept as they are multiplied.

    Attributes:
      q: the queries at their own position, [Q, H/2] twice.
      start: the queries as `scores` takes them for the first tile.
    """

    def __init__(self, program):
        self.program = program
        self.q = self.start = tuple(program.positioned(program.queries(), "q scale", program.batch + jnp.arange(1)))

    def kept(self, new_k):
        """Returns the new key, as projected, as it is kept."""
        return self.program.positioned(new_k, "k scale", self.program.batch + jnp.arange(1))

    def score_of_new(self, new_k):
        """Returns the products of the queries with the new key, [Q]."""
        products = (a.astype(jnp.float32) * b.astype(jnp.float32) for a, b in zip(self.q, new_k, strict=True))
        return sum(jnp.sum(x, axis=1) for x in products)

    def scores(self, q, k, _):
        """Returns the products [tile, Q] of a tile's keys and the queries, and the queries for the next tile."""
        return sum(self.program.dot(a, b, 1, 1) for a, b in zip(k, q, strict=True)), q


class ProjectedKeys(PositionedKeys):
    """Scores of keys that are kept as they were projected; positions count from the query.

    Queries are float32 where they turn from tile to tile.
    """

    def __init__(self, program, tiles, age):
        """Takes the program, how many tiles a ring has, and the age of the first slot that is read."""
        self.program, self.tiles, tile = program, tiles, program.tile
        self.norms, self.rotates = "k scale" in program.refs, "sin" in program.refs
        q = program.queries()
        if not self.rotates:
            scales = program.scales("k scale") if self.norms else (1.0, 1.0)
            self.q = program.normed(q, "q scale")
            self.start = program.rounded(x.astype(jnp.float32) * by for x, by in zip(self.q, scales, strict=True))
            return
        self.turns = [program.refs["turns"][i] for i in range(4)]
        self.width = program.angles(tile + jnp.arange(1))
        self.last_width = program.angles(program.slots % tile + jnp.arange(1))
        angles = program.angles(jnp.clip(age, 0, program.slots + tile - 1) + jnp.arange(1))
        self.q = program.normed(q, "q scale")
        self.start = rotated(self.q, angles)

    def kept(self, new_k):
        """As there."""
        return new_k

    def score_of_new(self, new_k):
        """As there; the new key is at the query's position."""
        return super().score_of_new(self.program.normed(new_k, "k scale"))

    def scores(self, q, k, tile):
        """As there."""
        program, inverse = self.program, self._inverse_norms(k) if self.norms else 1.0
        if not self.rotates:
            products, q = super().scores(q, k, tile)
            return products * inverse, q
        (a, b), (aa, ab, bb, ba) = k, self.turns
        k = program.products(a, aa, b, ab), program.products(b, bb, a, ba)
        products, _ = super().scores(program.rounded(q), k, tile)
        sin, cos = self.width
        if program.slots % program.tile:
            seam = tile == self.tiles - 1
            sin, cos = (jnp.where(seam, x, y) for x, y in zip(self.last_width, self.width, strict=True))
        # The next tile is newer by this one's width.
        return products * inverse, rotated(q, (-sin, cos))

    def _inverse_norms(self, k):
        """Returns 1 / √(mean of squares + ε) of a tile's keys, in every column of [tile, Q].

        Squares are rounded to bfloat16, which their sum does not notice, and added up by a matrix product, whose result
        lies as the scores do.
        """
        (a, b), program = k, self.program
        ones = jnp.ones((program.Q, program.half), program.dtype)
        squares = program.dot(program.products(a, a, b, b), ones, 1, 1)
        return jax.lax.rsqrt(squares / program.H + program.plan.epsilon)
