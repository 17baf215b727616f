"""The forward TPU kernel: outputs, the final state, and the states that the backward kernel starts its blocks from."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.residual_linear_attention.pallas_tpu_common import (
    Plan,
    features,
    readable,
    zero_from,
)


def forward_kernel(plan: Plan, save_states: bool, documents_ref, q_ref, k_ref, v_ref, *refs):
    """Serves one block of queries of one group; the state stays in VMEM over the blocks of a sequence."""
    refs = list(refs)
    ids_refs = (refs.pop(0), refs.pop(0)) if plan.has_ids else None
    initial_ref = refs.pop(0) if plan.has_initial_state else None
    o_ref, final_ref = refs.pop(0), refs.pop(0)
    saved_ref = refs.pop(0) if save_states else None
    (state_ref,) = refs
    batch, step = pl.program_id(0), pl.program_id(3)

    @pl.when(step == 0)
    def _():
        for head in range(plan.kv_heads_per_step):
            state_ref[head] = jnp.zeros_like(state_ref[head]) if initial_ref is None else initial_ref[0, head].T

    if plan.ragged_len:

        @pl.when(step == plan.query_blocks - 1)
        def _():
            for ref in (q_ref, k_ref, v_ref):
                zero_from(ref, plan.ragged_len)

    if save_states:
        saved_ref[0, 0, :, 0] = state_ref[...]

    def block(chunks):
        for c in range(chunks):
            chunk = step * plan.chunks + c
            documents = (documents_ref[batch, chunk], documents_ref[batch, chunk + 1])
            _chunk(plan, c, documents, q_ref, k_ref, v_ref, ids_refs, o_ref, state_ref)

    plan.run_chunks(step >= plan.delay_blocks, step, block)

    if plan.delay_blocks:

        @pl.when(step < plan.delay_blocks)
        def _():
            if initial_ref is None:
                o_ref[...] = jnp.zeros_like(o_ref)
            else:
                for c in range(plan.chunks):
                    document = documents_ref[batch, step * plan.chunks + c]
                    _chunk_without_keys(plan, c, document, q_ref, ids_refs, o_ref, state_ref)

    final_ref[0, 0] = state_ref[...]


def _chunk(plan, c, documents, q_ref, k_ref, v_ref, ids_refs, o_ref, state_ref):
    dtype, rows = q_ref.dtype, slice(c * plan.chunk, (c + 1) * plan.chunk)
    H, C = plan.head_dim, plan.chunk
    q_ids_1C, kv_ids_1C = (ref[0, :, rows] for ref in ids_refs) if ids_refs else (None, None)
    mask_CL = jnp.tile(readable(C, q_ids_1C, kv_ids_1C), (1, plan.group))
    qT, kT, vT = (ref[0, rows, :].T for ref in (q_ref, k_ref, v_ref))
    outputs = []
    for head in range(plan.kv_heads_per_step):
        of_head = slice(head * H, (head + 1) * H)
        vT_HC, state_HP = vT[of_head], state_ref[head]
        phi_kT_PC = features(plan.feature_map, kT[of_head].astype(jnp.float32)).astype(dtype)
        phi_qT_PL = features(plan.feature_map, plan.side_by_side(qT, head).astype(jnp.float32)).astype(dtype)
        # One product for scores and state: the features of the queries are loaded into the matrix units once.
        left = jnp.concatenate([phi_kT_PC.T, state_HP.astype(dtype)], axis=0)
        both = plan.matmul(left, phi_qT_PL)
        scores_CL, oT_HL = jnp.where(mask_CL, both[:C], 0.0).astype(dtype), both[C:]
        vT_kept = vT_HC
        if ids_refs:
            oT_HL = jnp.where(jnp.tile(q_ids_1C == documents[0], (1, plan.group)), oT_HL, 0.0)
            vT_kept = jnp.where(kv_ids_1C == documents[1], vT_HC, jnp.zeros_like(vT_HC))
            state_HP = jnp.where(documents[0] == documents[1], state_HP, 0.0)
        outputs.append((oT_HL + plan.matmul(vT_HC, scores_CL)).astype(dtype))
        state_ref[head] = state_HP + plan.matmul_nt(vT_kept, phi_kT_PC)
    o_ref[0, rows, :] = plan.stacked(outputs).T


def _chunk_without_keys(plan, c, document, q_ref, ids_refs, o_ref, state_ref):
    dtype, rows = q_ref.dtype, slice(c * plan.chunk, (c + 1) * plan.chunk)
    qT = q_ref[0, rows, :].T
    outputs = []
    for head in range(plan.kv_heads_per_step):
        phi_qT_PL = features(plan.feature_map, plan.side_by_side(qT, head).astype(jnp.float32)).astype(dtype)
        oT_HL = plan.matmul(state_ref[head].astype(dtype), phi_qT_PL)
        if ids_refs:
            oT_HL = jnp.where(jnp.tile(ids_refs[0][0, :, rows] == document, (1, plan.group)), oT_HL, 0.0)
        outputs.append(oT_HL.astype(dtype))
    o_ref[0, rows, :] = plan.stacked(outputs).T


def forward_call(plan: Plan, documents, q, k, v, *rest, save_states: bool):
    """Returns o [B, T, N·H], the final states float32 [splits, B, K, H, P] and, if asked, those of all blocks.

    `rest` holds the ids [B, 1, T] and [B, 1, S], if the plan has them, and the initial state [B, K, P, H], likewise.
    """
    batch, hb = q.shape[0], plan.kv_heads_per_step
    state = (hb, plan.head_dim, plan.feature_dim)

    def kv_block(step):
        return jnp.clip(step - plan.delay_blocks, 0, plan.kv_blocks - 1)

    q_spec = pl.BlockSpec((1, plan.block, plan.q_lanes), lambda b, h, g, i, _: (b, i, h * plan.group_splits + g))
    kv_spec = pl.BlockSpec((1, plan.block, plan.kv_lanes), lambda b, h, g, i, _: (b, kv_block(i), h))
    in_specs = [q_spec, kv_spec, kv_spec]
    if plan.has_ids:
        in_specs.append(pl.BlockSpec((1, 1, plan.block), lambda b, h, g, i, _: (b, 0, i)))
        in_specs.append(pl.BlockSpec((1, 1, plan.block), lambda b, h, g, i, _: (b, 0, kv_block(i))))
    if plan.has_initial_state:
        in_specs.append(pl.BlockSpec((1, hb, state[2], state[1]), lambda b, h, g, i, _: (b, h, 0, 0)))

    out_specs = [q_spec, pl.BlockSpec((1, 1, *state), lambda b, h, g, i, _: (g, b, h, 0, 0))]
    shape = (plan.group_splits, batch, plan.kv_heads)
    out_shapes = [(q.shape, q.dtype), ((*shape, *state[1:]), jnp.float32)]
    if save_states:
        out_specs.append(pl.BlockSpec((1, 1, hb, 1, *state[1:]), lambda b, h, g, i, _: (g, b, h, i, 0, 0)))
        out_shapes.append(((*shape, plan.query_blocks, *state[1:]), jnp.float32))
    axes = jax.typeof(q).manual_axis_type
    return pl.pallas_call(
        functools.partial(forward_kernel, plan, save_states),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, plan.kv_heads // hb, plan.group_splits, plan.query_blocks),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(state, jnp.float32)],
        ),
        out_shape=[jax.ShapeDtypeStruct(s, d, manual_axis_type=axes) for s, d in out_shapes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=plan.vmem_limit_bytes,
        ),
        cost_estimate=plan.cost(batch, q.dtype.itemsize, products=2, tensors=(2, 2)),
        interpret=plan.interpret,
        name="rla_forward",
    )(documents, q, k, v, *rest)
