"""Scores of a tile of keys, for the two ways in which `attention_gpu` finds keys in a cache.

A rattention layer's keys are kept as projected; a tile of them is normed and rotated on the way to the scores, which
XLA would do into an array of its own. A key is rotated by its place in its tile alone, by angles that are read once,
and the queries, tile after tile, by the age of the tile's first slot.
"""

import jax
import jax.numpy as jnp


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

    def __init__(self, program, tiles, tile, age):
        """Takes the program, how many tiles a ring has, the slots of a tile, and the age of the first tile's first."""
        self.program, self.tiles, self.tile = program, tiles, tile
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
        if program.slots % self.tile:
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


def rotated(x, angles):
    """Rotates pairs by sines and cosines; float32."""
    (a, b), (sin, cos) = (half.astype(jnp.float32) for half in x), angles
    return a * cos - b * sin, b * cos + a * sin
