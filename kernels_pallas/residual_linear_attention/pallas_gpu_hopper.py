"""What the Hopper kernels share. They replace the Triton kernels where `fits` says so, with the same plan and states.

Written for Mosaic GPU: a memory warpgroup copies tiles with the bulk copy engine, compute warpgroups work on them. A
tile is 64 positions of one head. φ is computed in registers, where a row of a tile lies in four lanes. A copy over the
end of an array reads zeros and writes nothing, so that nothing is padded.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.residual_linear_attention.pallas_gpu_common import Plan
from kernels_pallas.residual_linear_attention.tuning_gpu import Blocks

TILE = 64
BLOCKS = Blocks(chunk=2 * TILE, columns=128)
WGMMA = plgpu.Layout.WGMMA
ROWS = WGMMA.reduce(1)  # one value for each row of a tile


def fits(dtype: str, q_len: int, kv_len: int, head_dim: int, window: int, feature_map: str) -> bool:
    """Returns whether the Hopper kernels serve these inputs; all others are for the Triton kernels."""
    aligned = all(length % 8 == 0 for length in (q_len, kv_len, window))  # the copy engine moves eight rows of a tile
    return dtype == "bfloat16" and head_dim == 128 and feature_map != "identity" and aligned


def places(plan: Plan, documents, q_ids_BT, kv_ids_BS):
    """Returns int32 ([B, chunks', 2, C] for queries, the same for keys) over all chunks that hold keys.

    First the documents, then, as 0 or 1, whether a query reads the state that enters its chunk, or whether a key that
    is read at all joins the state that leaves its chunk.
    """
    t = (jnp.arange(plan.key_chunks * plan.chunk) - plan.past_chunks * plan.chunk).reshape(-1, plan.chunk)
    position = t + plan.lag
    shape = (plan.batch, *t.shape)
    reads = jnp.ones(shape, bool)
    joins = jnp.broadcast_to((position >= 0) & (position < plan.kv_len - plan.window), shape)
    q_ids = kv_ids = jnp.zeros(shape, jnp.int32)
    if plan.has_ids:
        chunk = jnp.minimum(jnp.arange(plan.key_chunks), plan.chunks - 1)
        first = -plan.past_chunks * plan.chunk
        q_ids = _cut(q_ids_BT, first, t.size).reshape(shape)
        kv_ids = _cut(kv_ids_BS, first + plan.lag, t.size).reshape(shape)
        reads = q_ids == documents[:, chunk][..., None]
        joins = joins & (kv_ids == documents[:, chunk + 1][..., None])
    return tuple(jnp.stack([ids, flag.astype(jnp.int32)], axis=2) for ids, flag in ((q_ids, reads), (kv_ids, joins)))


def _cut(ids, first, count):
    """Returns ids[:, first : first + count]; beyond either end, the id of that end."""
    length = ids.shape[1]
    inside = ids[:, max(first, 0) : min(first + count, length)]
    return jnp.pad(inside, ((0, 0), (max(-first, 0), max(first + count - length, 0))), mode="edge")


def launch(plan: Plan, kernel, name: str, programs: tuple[str, int], *, out_type, scratch_types, warpgroups: int = 3):
    """Returns a function of arrays that runs `kernel`, in `programs` (a grid dim and its size) for each row of states.

    Kernels find their place with `program`, and divide the work with `copying` and `computing`.
    """
    dim, count = programs
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(count, plan.batch * plan.kv_heads),
        grid_names=(dim, "bk"),
        kernel_name=name,
        num_threads=warpgroups,
        thread_name="wg",
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )


def program(plan: Plan, dim: str):
    """Returns where a kernel runs, as int32: (warpgroup, index in `dim`, row of states, sequence, key/value head)."""
    wg, bk, i = jax.lax.axis_index("wg"), jax.lax.axis_index("bk"), jax.lax.axis_index(dim)
    return wg, i, bk, jax.lax.div(bk, plan.kv_heads), jax.lax.rem(bk, plan.kv_heads)


def copying(mine):
    """Decorates the work of the warpgroup that fills shared memory, and leaves its registers to the others.

    `mine` is whether this warpgroup is it.
    """
    return functools.partial(_in_warpgroups, mine, 40, "decrease")


def computing(mine, registers: int):
    """Decorates the work of compute warpgroups; `mine` is whether this is one, `registers` how many a thread takes."""
    return functools.partial(_in_warpgroups, mine, registers, "increase")


def _in_warpgroups(mine, registers, action, work):
    @pl.when(mine)
    def _():
        plgpu.set_max_registers(registers, action=action)
        work()


def wait_if(condition, barrier):
    """Waits for a barrier where `condition` is true."""

    @pl.when(condition)
    def _():
        plgpu.barrier_wait(barrier)


def tiles(*shape: int) -> plgpu.SMEM:
    """Returns shared memory for bfloat16 tiles [..., rows, columns] that matrix products read."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def rows_to(shape, x):
    """Spreads one value a row over a tile."""
    return jax.lax.broadcast_in_dim(x, shape, [0])


def load_tile(ref):
    """Returns a tile of shared memory in float32."""
    return plgpu.load(ref, layout=WGMMA).astype(jnp.float32)


def put(ref, x):
    """Writes a tile to shared memory as bfloat16, for matrix products and copies to read."""
    ref[...] = x.astype(jnp.bfloat16)
    plgpu.commit_smem()


def load_rows(ref):
    """Returns one int32 for each row of a tile, from device memory."""
    return plgpu.load(ref, layout=ROWS, optimized=False)


def columns(shape):
    """Returns the column of each element of a tile."""
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)


def load_places(plan: Plan, row_places_ref, column_places_ref, chunk, rows, *, rows_are_queries: bool):
    """Returns ((first, end), flag), int32 one a row of a tile; `chunk` is (sequence, chunk), `rows` the tile in it.

    The rows read, or are read by, the columns from `first` to before `end`: a document is an unbroken run, so that what
    a head masks is two comparisons. `flag` is whether a query reads the state, or a key joins it, as in `places`.
    """
    row_ids, flag = (load_rows(row_places_ref.at[*chunk, kind, rows]) for kind in range(2))
    column_ids = plgpu.load(column_places_ref.at[*chunk, 0], layout=WGMMA.reduce(0), optimized=False)
    shape = (TILE, plan.chunk)
    row, column = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA) + rows.start, columns(shape)
    readable = row >= column if rows_are_queries else row <= column
    if plan.has_ids:
        readable &= rows_to(shape, row_ids) == jax.lax.broadcast_in_dim(column_ids, shape, [1])
    first = plan.chunk - jnp.where(readable, plan.chunk - column, 0).max(axis=1)
    return (first, jnp.where(readable, column + 1, 0).max(axis=1)), flag


def masked(scores, column, readable):
    """Returns scores in bfloat16, zero where `column` is not in the range `readable` of its row."""
    first, end = readable
    inside = (column >= rows_to(scores.shape, first)) & (column < rows_to(scores.shape, end))
    return jnp.where(inside, scores, 0.0).astype(jnp.bfloat16)


def half_features(plan: Plan, x, sign):
    """Returns one half of φ(x) for a float32 tile; `sign` is 1 or -1."""
    if plan.feature_map == "relu":
        return jnp.maximum(x * sign, 0.0)
    x = x * sign
    numerator = jnp.exp2((x - rows_to(x.shape, x.max(axis=1))) * math.log2(math.e))
    return numerator * rows_to(x.shape, 1.0 / numerator.sum(axis=1))


def half_features_vjp(plan: Plan, phi, dphi, sign):
    """Returns what one half of φ adds to the gradient of x."""
    if plan.feature_map == "relu":
        return jnp.where(phi > 0.0, dphi, 0.0) * sign
    return (dphi - rows_to(phi.shape, (phi * dphi).sum(axis=1))) * (phi * sign)


def matmul(shape, *products):
    """Returns Σ a · b in float32; each a is bfloat16 in registers or shared memory, each b in shared memory."""
    return pl.run_scoped(functools.partial(_multiply, products), plgpu.ACC(shape, jnp.float32))


def matmul_add(value, *products):
    """Returns value + Σ a · b, as `matmul`."""
    return pl.run_state(functools.partial(_multiply, products, read=False))(plgpu.ACC.init(value))


def _multiply(products, acc_ref, read=True):
    for a, b in products:
        plgpu.wgmma(acc_ref, a, b)
    return acc_ref[...] if read else None


def zeros(shape):
    """Returns float32 zeros to add products to."""
    return plgpu.layout_cast(jnp.full(shape, 0, jnp.float32), WGMMA)
