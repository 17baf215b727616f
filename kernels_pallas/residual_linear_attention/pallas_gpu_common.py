"""What the GPU kernels share: the geometry of a call, loads and stores of rows, φ and matrix products.

The kernels see every array with heads as flat rows, [B·T·N, H] or [B·S·K, H], and ids as [B·T] or [B·S]. φ is kept as
its halves, softmax(x) and softmax(-x), each over H dims, and a state as [halves, H, H].
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.residual_linear_attention.tuning_gpu import Blocks


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one call is cut.

    Chunk c is C positions of queries, t = (c - past_chunks)·C …, and of the keys t + lag, delayed by the window. A tile
    is the queries of a chunk in several heads of a group, one head after the other.
    """

    batch: int
    query_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int  # at most kv_len
    feature_map: str
    blocks: Blocks
    has_ids: bool
    hopper: bool = False
    interpret: bool = False

    @property
    def chunk(self) -> int:
        """C, tokens."""
        return self.blocks.chunk

    @property
    def group(self) -> int:
        """Query heads of a key/value head."""
        return self.heads // self.kv_heads

    @property
    def halves(self) -> int:
        """P / H."""
        return 1 if self.feature_map == "identity" else 2

    @property
    def signs(self) -> tuple[float, ...]:
        """The sign that x takes in each half of φ(x)."""
        return (1.0, -1.0)[: self.halves]

    @property
    def lag(self) -> int:
        """Query t reads the keys up to position t + lag."""
        return self.kv_len - self.query_len - self.window

    @property
    def past_chunks(self) -> int:
        """Chunks whose keys all queries read."""
        return -(-max(self.lag, 0) // self.chunk)

    @property
    def query_chunks(self) -> int:
        """Chunks that hold queries."""
        return -(-self.query_len // self.chunk)

    @property
    def chunks(self) -> int:
        """Chunks that a state enters."""
        return self.past_chunks + self.query_chunks

    @property
    def key_chunks(self) -> int:
        """Chunks that reach the last key, though no query read it."""
        return self.past_chunks + -(-(self.query_len + self.window) // self.chunk)

    @property
    def column_blocks(self) -> tuple[tuple[int, int], ...]:
        """(first column, number of columns) of the blocks of the values' head dim."""
        return tuple((first, self.blocks.columns) for first in range(0, self.head_dim, self.blocks.columns))

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of the states that enter all chunks."""
        return (self.batch * self.kv_heads, self.chunks, self.halves, self.head_dim, self.head_dim)

    def documents(self, kv_ids_BS: jax.Array | None) -> jax.Array:
        """Returns int32 [B, chunks + 1]: the document of the state that enters each chunk, and of the last one."""
        starts = range(-self.past_chunks * self.chunk, self.query_chunks * self.chunk + 1, self.chunk)
        newest = max(self.kv_len - 1 - self.window, 0)
        positions = [min(max(start + self.lag - 1, 0), newest) for start in starts]
        if kv_ids_BS is None:
            return jnp.zeros((self.batch, len(positions)), jnp.int32)
        return kv_ids_BS[:, np.array(positions)]

    def tile_heads(self, most: int) -> int:
        """Returns the heads of a tile: at most `most`, and a divisor of the group."""
        return math.gcd(most, self.group)

    def query_rows(self, batch, chunk, first_head, heads):
        """Returns (rows [heads·C] in [B·T·N, H], which of them exist) of a tile."""
        head, offset = divmod_power_of_two(jnp.arange(heads * self.chunk), self.chunk)
        t = (chunk - self.past_chunks) * self.chunk + offset
        return (batch * self.query_len + t) * self.heads + first_head + head, (t >= 0) & (t < self.query_len)

    def key_rows(self, batch, chunk, head):
        """Returns (rows [C] in [B·S·K, H], which of them exist and are read by a query)."""
        s = self.key_positions(chunk)
        return (batch * self.kv_len + s) * self.kv_heads + head, (s >= 0) & (s < self.kv_len - self.window)

    def key_positions(self, chunk):
        """Returns the positions [C] of a chunk's keys."""
        return (chunk - self.past_chunks) * self.chunk + self.lag + jnp.arange(self.chunk)

    def query_ids(self, ids_ref, batch, chunk, heads):
        """Returns the documents [heads·C] of a tile's queries."""
        _, offset = divmod_power_of_two(jnp.arange(heads * self.chunk), self.chunk)
        t = (chunk - self.past_chunks) * self.chunk + offset
        return ids_ref[batch * self.query_len + jnp.clip(t, 0, self.query_len - 1)]

    def key_ids(self, ids_ref, batch, chunk):
        """Returns the documents [C] of a chunk's keys."""
        return ids_ref[batch * self.kv_len + jnp.clip(self.key_positions(chunk), 0, self.kv_len - 1)]

    def dot(self, a: jax.Array, b: jax.Array, a_dim: int = 1, b_dim: int = 0) -> jax.Array:
        """Returns the product over one dim of each in float32; float32 operands are multiplied at full precision."""
        if self.interpret:  # the CPU multiplies no bfloat16; the products are the same
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        dims = (((a_dim,), (b_dim,)), ((), ()))
        return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def load_rows(ref, rows, valid, columns=None):
    """Returns [C, columns] of a [rows, H] array, zero where `valid` [C] is false; `columns` are (first, count)."""
    index, mask = _index(ref, rows, valid, columns or (0, ref.shape[1]))
    return plgpu.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))


def store_rows(ref, rows, valid, value, columns=None):
    """Writes [C, columns] to the rows of a [rows, H] array for which `valid` [C] is true."""
    index, mask = _index(ref, rows, valid, columns or (0, ref.shape[1]))
    plgpu.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def _index(ref, rows, valid, columns):
    first, count = columns
    shape = (rows.shape[0], count)
    # A row that does not exist gets an index past the end: interpret mode applies the mask after the access.
    rows = jnp.where(valid, rows, ref.shape[0])
    index = (jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(first + jnp.arange(count)[None], shape))
    return index, jnp.broadcast_to(valid[:, None], shape)


def divmod_power_of_two(x, divisor):
    """Returns (x // divisor, x % divisor) for x >= 0, without the sign's cases."""
    return x >> (divisor.bit_length() - 1), x & (divisor - 1)


def half_features(plan: Plan, x_CH: jax.Array, sign) -> jax.Array:
    """Returns one half of φ(x), float32 [C, H], for float32 x."""
    if plan.feature_map == "identity":
        return x_CH
    if plan.feature_map == "relu":
        return jnp.maximum(x_CH * sign, 0.0)
    x_CH = x_CH * sign
    numerator = _exp2(plan, (x_CH - jnp.max(x_CH, axis=1, keepdims=True)) * math.log2(math.e))
    return numerator * (1.0 / jnp.sum(numerator, axis=1, keepdims=True))


def half_features_vjp(plan: Plan, phi_CH: jax.Array, dphi_CH: jax.Array, sign) -> jax.Array:
    """Returns what one half of φ adds to the gradient of x, float32 [C, H]."""
    if plan.feature_map == "identity":
        return dphi_CH
    if plan.feature_map == "relu":
        return sign * jnp.where(phi_CH > 0.0, dphi_CH, 0.0)
    return sign * phi_CH * (dphi_CH - jnp.sum(phi_CH * dphi_CH, axis=1, keepdims=True))


def _exp2(plan, x):
    """2ˣ by the GPU's own instruction, within 2 units in the last place; the library's adds a path for denormals."""
    if plan.interpret:
        return jnp.exp2(x)
    (y,) = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return y
