"""What the forward and the backward TPU kernel share: the grid's geometry, φ, masks and matrix products.

Inside the kernels time lies on the lanes: a chunk of x_BTNH is held as xT [heads·H, C], a chunk of φ(x) as [P, C].
Sums over the head dim (softmax and its derivative) then run over sublanes, where they are plain vector additions, and
heads of any multiple of 16 dims are sliced for free. Reading and writing transposes 128 × 128 tiles in registers.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one call is cut into grid steps. Lengths are in tokens unless they say blocks or chunks.

    A block is `chunks` chunks of `chunk` tokens. Queries of block i read, inside the kernel, keys of block
    i - delay_blocks, and earlier keys through the state.
    """

    query_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    feature_map: str
    chunk: int
    chunks: int
    delay_blocks: int
    kv_heads_per_step: int
    group_splits: int
    has_ids: bool
    has_initial_state: bool
    vmem_limit_bytes: int
    interpret: bool = False

    @property
    def group(self) -> int:
        """Query heads that a grid step serves for each key/value head."""
        return self.heads // self.kv_heads // self.group_splits

    @property
    def feature_dim(self) -> int:
        """P."""
        return self.head_dim if self.feature_map == "identity" else 2 * self.head_dim

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.chunk * self.chunks

    @property
    def query_blocks(self) -> int:
        """Blocks of queries, the last perhaps partial."""
        return -(-self.query_len // self.block)

    @property
    def kv_blocks(self) -> int:
        """Blocks of keys, the last perhaps partial."""
        return -(-self.kv_len // self.block)

    @property
    def backward_blocks(self) -> int:
        """Steps of the backward kernel: it also writes the zero gradients of the keys that no query reads."""
        return max(self.query_blocks, self.kv_blocks + self.delay_blocks)

    @property
    def ragged_len(self) -> int:
        """Tokens in a partial last block of queries; 0 if all are full."""
        return self.query_len % self.block

    @property
    def last_chunks(self) -> int:
        """Chunks of the last block that hold queries."""
        return -(-(self.query_len - (self.query_blocks - 1) * self.block) // self.chunk)

    @property
    def q_lanes(self) -> int:
        """Width of a query block."""
        return self.kv_heads_per_step * self.group * self.head_dim

    @property
    def kv_lanes(self) -> int:
        """Width of a key block."""
        return self.kv_heads_per_step * self.head_dim

    def run_chunks(self, condition: jax.Array, step: jax.Array, block: Callable[[int], None]) -> None:
        """Calls `block` with the number of chunks to run: a partial last block leaves out those without queries."""
        last = self.query_blocks - 1
        if self.last_chunks == self.chunks:
            pl.when(condition)(lambda: block(self.chunks))
            return
        pl.when(condition & (step == last))(lambda: block(self.last_chunks))
        if last > self.delay_blocks:
            pl.when(condition & (step < last))(lambda: block(self.chunks))

    def vmem_bytes(self, itemsize: int) -> int:
        """Returns an upper bound of the VMEM of the backward kernel, the hungrier of the two."""
        state = self.kv_heads_per_step * self.feature_dim * self.head_dim
        blocks = 2 * itemsize * self.block * (3 * self.q_lanes + 4 * self.kv_lanes)
        states = state * (7 * 4 + self.chunks * itemsize)
        # Features and their gradients in float32, for all heads of all chunks at once if the compiler so wishes.
        spilled = 2 * 4 * self.block * self.kv_heads_per_step * (self.group + 1) * self.feature_dim
        return blocks + states + spilled

    def cost(self, batch: int, itemsize: int, *, products: int, tensors: tuple[int, int]) -> pl.CostEstimate:
        """Returns what XLA schedules by; `tensors` counts those of q's and of k's shape.

        `products` are those of the size scores x features a query head, and of the state's size a key/value head.
        """
        inside = self.heads * self.query_len * self.chunk * (self.feature_dim + self.head_dim)
        through = (self.heads + self.kv_heads) * self.query_len * self.feature_dim * self.head_dim
        q, k = self.heads * self.query_len * self.head_dim, self.kv_heads * self.kv_len * self.head_dim
        states = 4 * self.query_blocks * self.kv_heads * self.feature_dim * self.head_dim
        return pl.CostEstimate(
            flops=batch * products * (inside + through),
            transcendentals=2 * batch * (q + k),
            bytes_accessed=batch * (itemsize * (tensors[0] * q + tensors[1] * k) + states),
        )

    def side_by_side(self, xT: jax.Array, head: int) -> jax.Array:
        """Returns the group of key/value head `head` from [query heads · H, C] as [H, L], L = group · C."""
        first, H = head * self.group, self.head_dim
        return jnp.concatenate([xT[n * H : (n + 1) * H] for n in range(first, first + self.group)], axis=1)

    def stacked(self, groups: list[jax.Array]) -> jax.Array:
        """Returns [query heads · H, C] from the [H, L] of each key/value head: undoes `side_by_side`."""
        C = self.chunk
        return jnp.concatenate([xT[:, g * C : (g + 1) * C] for xT in groups for g in range(self.group)], axis=0)

    def matmul(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Returns a · b in float32; float32 operands are multiplied at full precision."""
        return self._dot(a, b, 0)

    def matmul_nt(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Returns a · bᵀ in float32, as `matmul`."""
        return self._dot(a, b, 1)

    def _dot(self, a, b, b_dim):
        if self.interpret:  # the CPU multiplies no bfloat16; the products are the same
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        dims = (((1,), (b_dim,)), ((), ()))
        return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)

    def state_documents(self, kv_ids_BS: jax.Array | None, batch: int) -> jax.Array:
        """Returns int32 [B, chunks + 1]: the document of the state that enters each chunk, and of the last one."""
        count = self.query_blocks * self.chunks + 1
        if kv_ids_BS is None:
            return jnp.zeros((batch, count), jnp.int32)
        aligned = [min(i * self.chunk, self.query_len) - self.delay_blocks * self.block for i in range(count)]
        position = [min(max(p - 1, 0), self.kv_len - 1) for p in aligned]
        return kv_ids_BS[:, jnp.array(position)]


def features(feature_map: str, xT_HC: jax.Array) -> jax.Array:
    """Returns φ(x) as float32 [P, C] for float32 [H, C]."""
    if feature_map == "identity":
        return xT_HC
    if feature_map == "relu":
        return jnp.concatenate([jnp.maximum(xT_HC, 0.0), jnp.maximum(-xT_HC, 0.0)], axis=0)
    up = jnp.exp(xT_HC - jnp.max(xT_HC, axis=0, keepdims=True))
    down = jnp.exp(jnp.min(xT_HC, axis=0, keepdims=True) - xT_HC)
    up = up * (1.0 / jnp.sum(up, axis=0, keepdims=True))
    down = down * (1.0 / jnp.sum(down, axis=0, keepdims=True))
    return jnp.concatenate([up, down], axis=0)


def features_vjp(feature_map: str, xT_HC: jax.Array, phiT_PC: jax.Array, dphiT_PC: jax.Array) -> jax.Array:
    """Returns dx as float32 [H, C] from φ(x) and its cotangent, both float32 [P, C]."""
    if feature_map == "identity":
        return dphiT_PC
    head_dim = xT_HC.shape[0]
    dup, ddown = dphiT_PC[:head_dim], dphiT_PC[head_dim:]
    if feature_map == "relu":
        return jnp.where(xT_HC > 0.0, dup, 0.0) - jnp.where(xT_HC < 0.0, ddown, 0.0)
    up, down = phiT_PC[:head_dim], phiT_PC[head_dim:]
    dup = up * (dup - jnp.sum(up * dup, axis=0, keepdims=True))
    ddown = down * (ddown - jnp.sum(down * ddown, axis=0, keepdims=True))
    return dup - ddown


def readable(chunk: int, q_ids_1C: jax.Array | None, kv_ids_1C: jax.Array | None) -> jax.Array:
    """Returns the bool mask [keys, queries] of a chunk: the aligned key is not later, and of the same document."""
    key = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
    query = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
    mask = key <= query
    if q_ids_1C is None:
        return mask
    kv_ids_CC = jnp.broadcast_to(kv_ids_1C, (chunk, chunk)).T
    return mask & (kv_ids_CC == jnp.broadcast_to(q_ids_1C, (chunk, chunk)))


def zero_from(ref, row: int) -> None:
    """Zeroes ref[0, row:, :] in VMEM; what a partial block's copy left there may be NaN."""
    start = row // LANES * LANES  # whole tiles of any dtype
    tail = ref[0, start:, :]
    keep = jax.lax.broadcasted_iota(jnp.int32, tail.shape, 0) < row - start
    ref[0, start:, :] = jnp.where(keep, tail, jnp.zeros_like(tail))
