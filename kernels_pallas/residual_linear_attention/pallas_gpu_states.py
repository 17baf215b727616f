"""The states that enter all chunks, in two kernels: sums over each chunk in parallel, then a scan over the chunks.

The same two serve the forward, Σ φ(k)ᵀ v from the first chunk to the last, and the backward, where the gradient of a
state is Σ φ(q)ᵀ do from the last chunk to the first.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.residual_linear_attention.pallas_gpu_common import Plan, half_features, load_rows

SCAN_BLOCK = 512  # elements of a state that one program of the scan carries
SCAN_AHEAD = 8  # chunks whose sums are loaded together


def sums_call(plan: Plan, documents, x, y, ids, *, of_queries: bool):
    """Returns the sums φ(x)ᵀ y of all chunks, `state_shape` in x's dtype.

    With `of_queries`, x and y are q and do, rows of all heads, otherwise k and v; `ids` holds theirs, if there are any.
    """
    warps, stages = plan.blocks.sums
    columns = len(plan.column_blocks)
    return pl.pallas_call(
        functools.partial(_sums_kernel, plan, of_queries),
        grid=(plan.halves * columns, plan.chunks, plan.batch * plan.kv_heads),
        out_shape=jax.ShapeDtypeStruct(plan.state_shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=plan.interpret,
        name="rla_sums",
    )(documents, x, y, *ids)


def _sums_kernel(plan, of_queries, documents_ref, x_ref, y_ref, *refs):
    *ids_refs, sums_ref = refs
    H, width = plan.head_dim, plan.blocks.columns
    blocks = len(plan.column_blocks)
    half, column = pl.program_id(0) // blocks, pl.program_id(0) % blocks * width
    c, bk = pl.program_id(1), pl.program_id(2)
    batch, kv_head = bk // plan.kv_heads, bk % plan.kv_heads
    sign = (1 - 2 * half).astype(jnp.float32)
    tile_heads = plan.tile_heads(plan.blocks.sums_heads)
    if plan.has_ids:
        # A query reads the state that enters its chunk, a key joins the state that leaves it.
        document = documents_ref[batch, c + (0 if of_queries else 1)]
        place = (ids_refs[0], batch, c)
        same = (plan.query_ids(*place, tile_heads) if of_queries else plan.key_ids(*place)) == document

    def tile(i, sum_HV):
        if of_queries:
            rows, valid = plan.query_rows(batch, c, kv_head * plan.group + i * tile_heads, tile_heads)
        else:
            rows, valid = plan.key_rows(batch, c, kv_head)
        x_CH = load_rows(x_ref, rows, valid)
        y_CV = load_rows(y_ref, rows, valid & same if plan.has_ids else valid, (column, width))
        phi_CH = half_features(plan, x_CH.astype(jnp.float32), sign).astype(x_CH.dtype)
        return sum_HV + plan.dot(phi_CH, y_CV, 0, 0)

    zero_HV = jnp.zeros((H, width), jnp.float32)
    sum_HV = jax.lax.fori_loop(0, plan.group // tile_heads, tile, zero_HV) if of_queries else tile(0, zero_HV)
    sums_ref[bk, c, half, :, pl.ds(column, width)] = sum_HV.astype(sums_ref.dtype)


def scan_call(plan: Plan, documents, sums, edge, *, reverse: bool):
    """Returns (the states that enter all chunks, in the sums' dtype; the one that leaves the last, in float32).

    `edge`, float32 [B·K, halves, H, H], enters the first chunk. With `reverse` the first chunk is the last in time.
    """
    state_size = math.prod(plan.state_shape[2:])
    size = min(SCAN_BLOCK, state_size)
    flat = (*plan.state_shape[:2], state_size)
    axes = jax.typeof(sums).manual_axis_type
    states, last = pl.pallas_call(
        functools.partial(_scan_kernel, plan, reverse, size),
        grid=(state_size // size, flat[0]),
        out_shape=[
            jax.ShapeDtypeStruct(flat, sums.dtype, manual_axis_type=axes),
            jax.ShapeDtypeStruct((flat[0], state_size), jnp.float32, manual_axis_type=axes),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=plan.interpret,
        name="rla_scan",
    )(documents, sums.reshape(flat), edge.reshape(flat[0], state_size))
    return states.reshape(plan.state_shape), last.reshape(-1, *plan.state_shape[2:])


def _scan_kernel(plan, reverse, size, documents_ref, sums_ref, edge_ref, states_ref, last_ref):
    bk, elements = pl.program_id(1), pl.ds(pl.program_id(0) * size, size)
    batch = bk // plan.kv_heads

    def step(first, count, carry):
        chunks = [plan.chunks - 1 - (first + i) if reverse else first + i for i in range(count)]
        for c, value in [(c, sums_ref[bk, c, elements]) for c in chunks]:
            states_ref[bk, c, elements] = carry.astype(states_ref.dtype)
            if plan.has_ids:
                carry = jnp.where(documents_ref[batch, c] == documents_ref[batch, c + 1], carry, 0.0)
            carry += value.astype(jnp.float32)
        return carry

    whole, rest = divmod(plan.chunks, SCAN_AHEAD)
    carry = jax.lax.fori_loop(
        0, whole, lambda i, carry: step(i * SCAN_AHEAD, SCAN_AHEAD, carry), edge_ref[bk, elements]
    )
    last_ref[bk, elements] = step(whole * SCAN_AHEAD, rest, carry)
