"""What a program of `attention_gpu` knows, loads, stores and computes with, whichever branch it works for."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from rattn.decoding.triton_gpu import cells, dot, exp, let_next_begin

# Queries of the smallest matrix product, and of the largest group.
LEAST_QUERIES, MOST_QUERIES = 8, 16
# Of no key.
LEAST = -1e30


class Program:
    """One program: part n of the slots of one key/value head of one sequence.

    Queries and keys are pairs: the two halves of their dims, which rotation pairs.
    """

    def __init__(self, plan, refs, parts, tile):
        self.plan, self.refs, self.parts, self.tile = plan, refs, parts, tile
        _, heads, self.slots, self.H = refs["k"].shape
        self.G, self.half = refs["qkv"].shape[2] - 2, self.H // 2
        self.Q = LEAST_QUERIES if self.G <= LEAST_QUERIES else MOST_QUERIES
        self.part, self.programs = pl.program_id(0), pl.num_programs(0)
        row = let_next_begin(pl.program_id(1), plan.interpret)
        self.batch, self.head = row // heads, row % heads
        self.newest, self.known, self.unfolded = (refs["counts"][self.batch, i] for i in range(3))
        self.kept_as_projected, self.dtype = "state" in refs, refs["v"].dtype
        self.rows = jnp.arange(self.Q)

    def queries(self):
        """Returns the group's queries as projected, [Q, H/2] twice; zero past the group."""
        return self.load_halves("qkv", self.rows, self.rows < self.G)

    def new_key_and_value(self):
        """Returns the new token's key, [1, H/2] twice, and its value [1, H], as projected."""
        row = self.G + jnp.arange(1)
        return self.load_halves("qkv", row, row >= 0), self.load("qkv", row + 1, row >= 0, 0, self.H)

    def store(self, name, value, *part):
        """Writes what was found for the group's queries: [Q] or [Q, H]."""
        index, mask = self.window(self.rows, self.rows < self.G, self.G, 0, self.H)
        if value.ndim == 1:
            index, mask = (jnp.where(self.rows < self.G, self.rows, self.G),), self.rows < self.G
        ref = self.refs[name]
        plgpu.store(ref.at[self.batch, self.head, *part, *index], value.astype(ref.dtype), mask=mask)

    def load_found(self, name, part, valid):
        """Loads what a program of this head stored, [Q] or [Q, H], past caches of an older writing."""
        rows, ref = self.rows, self.refs[name]
        valid, where = (rows < self.G) & valid, () if part is None else (part,)
        index, mask = self.window(rows, valid, self.G, 0, self.H)
        if ref.ndim == 4 and part is not None:
            index, mask = (jnp.where(valid, rows, self.G),), valid
        ref = ref.at[self.batch, self.head, *where, *index]
        other = jnp.full((), LEAST if name == "most" else 0, self.refs[name].dtype)
        return plgpu.load(ref, mask=mask, other=other, volatile=True)

    def window(self, rows, valid, past, first, count):
        """Returns the indices of `count` columns of rows, and their mask."""
        return cells(rows, valid, past, first + jnp.arange(count))

    def load(self, name, rows, valid, first, count):
        """Loads [rows, count] columns of the head's part of an array, zero where not valid."""
        ref = self.refs[name]
        index, mask = self.window(rows, valid, ref.shape[2], first, count)
        return plgpu.load(ref.at[self.batch, self.head, *index], mask=mask, other=jnp.zeros((), ref.dtype))

    def load_halves(self, name, rows, valid):
        """Loads rows in their halves, [rows, H/2] twice."""
        return [self.load(name, rows, valid, i * self.half, self.half) for i in (0, 1)]

    def positioned(self, x, scale, rows):
        """Norms x and rotates it by these rows of the angles, with training's roundings."""
        angles = self.angles(rows) if "sin" in self.refs else None
        x = self.normed(x, scale)
        return x if angles is None else self.rounded(rotated(x, angles))

    def angles(self, rows):
        """Loads sines and cosines of these rows, [rows, H/2] each."""
        index, _ = self.window(rows, rows >= 0, 0, 0, self.half)
        return self.refs["sin"][index], self.refs["cos"][index]

    def products(self, a, x, b, y):
        """Returns a·x + b·y in bfloat16, b·y rounded too.

        Two numbers an instruction, or a GPU would take longer over a tile of keys than its memory.
        """
        if self.plan.interpret:
            a, x, b, y = (z.astype(jnp.float32) for z in (a, x, b, y))
            return (a * x + (b * y).astype(self.dtype).astype(jnp.float32)).astype(self.dtype)
        asm = """{
            .reg .b32 by;
            mov.b32 by, 0x80008000;  // -0, for there is no product alone before Hopper
            fma.rn.bf16x2 by, $3, $4, by;
            fma.rn.bf16x2 $0, $1, $2, by;
        }"""
        like = [jax.ShapeDtypeStruct(a.shape, self.dtype)]
        (out,) = plgpu.elementwise_inline_asm(
            asm, args=(a, x, b, y), constraints="=r,r,r,r,r", pack=2, result_shape_dtypes=like
        )
        return out

    def scales(self, name):
        """Loads the halves of a norm's scale, float32 [1, H/2] twice."""
        halves = [self.refs[name][pl.ds(i * self.half, self.half)] for i in (0, 1)]
        return [half[None] for half in halves]

    def rounded(self, x):
        """Returns the halves in the dtype of keys and values."""
        return tuple(half.astype(self.dtype) for half in x)

    def normed(self, x, scale):
        """Norms rows, given in their halves, where there is such a norm."""
        if scale not in self.refs:
            return x
        scales = self.scales(scale)
        inverse = self.inverse_rms(x)
        return [self.scaled(half, inverse, by) for half, by in zip(x, scales, strict=True)]

    def inverse_rms(self, x):
        """Returns 1 / √(mean of squares + ε) of rows, [rows, 1]."""
        square = sum(jnp.sum(jnp.square(half.astype(jnp.float32)), axis=1) for half in x) / self.H
        return jax.lax.rsqrt(square + self.plan.epsilon)[:, None]

    def scaled(self, x, inverse, scale):
        """Returns x · inverse · scale, rounded once."""
        return (x.astype(jnp.float32) * inverse * scale).astype(self.dtype)

    def exp(self, x, less=0.0):
        """Returns e^(x − less)."""
        return exp(x, less, self.plan.interpret)

    def dot(self, a, b, a_dim, b_dim):
        """Sums over these dims, in float32."""
        return dot(a, b, a_dim, b_dim, self.plan.interpret)


def rotated(x, angles):
    """Rotates pairs by sines and cosines; float32."""
    (a, b), (sin, cos) = (half.astype(jnp.float32) for half in x), angles
    return a * cos - b * sin, b * cos + a * sin
