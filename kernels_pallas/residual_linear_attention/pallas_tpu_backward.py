"""The backward TPU kernel: gradients of q, k, v and the initial state, block by block from the last to the first."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.residual_linear_attention.pallas_tpu_common import (
    Plan,
    features,
    features_vjp,
    readable,
    zero_from,
)


def backward_kernel(plan: Plan, documents_ref, q_ref, k_ref, v_ref, do_ref, saved_ref, dfinal_ref, *refs):
    """Serves one block; the gradient of the state stays in VMEM and flows from later blocks to earlier ones.

    The states that enter the block's chunks are recomputed from the one that the forward saved for the block.
    """
    refs = list(refs)
    ids_refs = (refs.pop(0), refs.pop(0)) if plan.has_ids else None
    dq_ref, dk_ref, dv_ref, dinitial_ref, dstate_ref, states_ref = refs
    batch, step = pl.program_id(0), pl.num_programs(3) - 1 - pl.program_id(3)

    @pl.when(pl.program_id(3) == 0)
    def _():
        dstate_ref[...] = dfinal_ref[0, 0]

    if plan.ragged_len:

        @pl.when(step == plan.query_blocks - 1)
        def _():
            for ref in (q_ref, k_ref, v_ref, do_ref):
                zero_from(ref, plan.ragged_len)

    def documents(c):
        chunk = step * plan.chunks + c
        return documents_ref[batch, chunk], documents_ref[batch, chunk + 1]

    def block(chunks):
        _recompute_states(plan, chunks, documents, k_ref, v_ref, ids_refs, saved_ref, states_ref)
        for c in reversed(range(chunks)):
            inputs = (q_ref, k_ref, v_ref, do_ref, ids_refs, states_ref)
            _chunk(plan, c, documents(c), *inputs, dq_ref, dk_ref, dv_ref, dstate_ref)

    plan.run_chunks((step >= plan.delay_blocks) & (step < plan.query_blocks), step, block)

    if plan.delay_blocks:

        @pl.when(step < plan.delay_blocks)
        def _():
            if plan.has_initial_state:
                for c in reversed(range(plan.chunks)):
                    document = documents_ref[batch, step * plan.chunks + c]
                    _chunk_without_keys(plan, c, document, q_ref, do_ref, ids_refs, saved_ref, dq_ref, dstate_ref)
            else:
                dq_ref[...] = jnp.zeros_like(dq_ref)

    if plan.backward_blocks > plan.query_blocks:

        @pl.when(step >= plan.query_blocks)
        def _():
            dk_ref[...] = jnp.zeros_like(dk_ref)
            dv_ref[...] = jnp.zeros_like(dv_ref)

    if plan.ragged_len:

        @pl.when(step == plan.query_blocks - 1)
        def _():
            for ref in (dk_ref, dv_ref):
                zero_from(ref.at[0], plan.ragged_len)

    dinitial_ref[0, 0] = dstate_ref[...]


def _recompute_states(plan, chunks, documents, k_ref, v_ref, ids_refs, saved_ref, states_ref):
    H = plan.head_dim
    states = [saved_ref[0, 0, head, 0].T for head in range(plan.kv_heads_per_step)]
    for c in range(chunks):
        rows = slice(c * plan.chunk, (c + 1) * plan.chunk)
        for head, state_PH in enumerate(states):
            states_ref[c, head] = state_PH.astype(states_ref.dtype)
        if c == chunks - 1:
            return
        kT, vT = k_ref[0, rows, :].T, v_ref[0, rows, :].T
        before, after = documents(c)
        for head, state_PH in enumerate(states):
            of_head = slice(head * H, (head + 1) * H)
            phi_kT_PC = features(plan.feature_map, kT[of_head].astype(jnp.float32)).astype(k_ref.dtype)
            vT_HC = vT[of_head]
            if ids_refs:
                vT_HC = jnp.where(ids_refs[1][0, :, rows] == after, vT_HC, jnp.zeros_like(vT_HC))
                state_PH = jnp.where(before == after, state_PH, 0.0)
            states[head] = state_PH + plan.matmul_nt(phi_kT_PC, vT_HC)


def _chunk(plan, c, documents, q_ref, k_ref, v_ref, do_ref, ids_refs, states_ref, dq_ref, dk_ref, dv_ref, dstate_ref):
    dtype, rows = q_ref.dtype, slice(c * plan.chunk, (c + 1) * plan.chunk)
    H, C = plan.head_dim, plan.chunk
    q_ids_1C, kv_ids_1C = (ref[0, :, rows] for ref in ids_refs) if ids_refs else (None, None)
    mask_CL = jnp.tile(readable(C, q_ids_1C, kv_ids_1C), (1, plan.group))
    qT, kT, vT, doT = (ref[0, rows, :].T for ref in (q_ref, k_ref, v_ref, do_ref))
    dqs, dks, dvs = [], [], []
    for head in range(plan.kv_heads_per_step):
        of_head = slice(head * H, (head + 1) * H)
        kT_HC, vT_HC = kT[of_head].astype(jnp.float32), vT[of_head]
        qT_HL, doT_HL = plan.side_by_side(qT, head).astype(jnp.float32), plan.side_by_side(doT, head)
        phi_kT_PC, phi_qT_PL = features(plan.feature_map, kT_HC), features(plan.feature_map, qT_HL)
        low_kT_PC, low_qT_PL = phi_kT_PC.astype(dtype), phi_qT_PL.astype(dtype)

        # Through the state that leaves the chunk.
        dstate_PH = dstate_ref[head]
        low_dstate_PH = dstate_PH.astype(dtype)
        vT_kept, doT_read = vT_HC, doT_HL
        dvT_HC = plan.matmul(low_dstate_PH.T, low_kT_PC)
        if ids_refs:
            kept_1C = kv_ids_1C == documents[1]
            vT_kept = jnp.where(kept_1C, vT_HC, jnp.zeros_like(vT_HC))
            dvT_HC = jnp.where(kept_1C, dvT_HC, 0.0)
            dstate_PH = jnp.where(documents[0] == documents[1], dstate_PH, 0.0)
            read_1L = jnp.tile(q_ids_1C == documents[0], (1, plan.group))
            doT_read = jnp.where(read_1L, doT_HL, jnp.zeros_like(doT_HL))
        dphi_kT_PC = plan.matmul(low_dstate_PH, vT_kept)

        # Inside the chunk, and through the state that enters it.
        scores_CL = jnp.where(mask_CL, plan.matmul(low_kT_PC.T, low_qT_PL), 0.0).astype(dtype)
        dscores_CL = jnp.where(mask_CL, plan.matmul(vT_HC.T, doT_HL), 0.0).astype(dtype)
        dphi_qT_PL = plan.matmul(low_kT_PC, dscores_CL) + plan.matmul(states_ref[c, head], doT_read)
        dvT_HC += plan.matmul_nt(doT_HL, scores_CL)
        dphi_kT_PC += plan.matmul_nt(low_qT_PL, dscores_CL)
        dstate_ref[head] = dstate_PH + plan.matmul_nt(low_qT_PL, doT_read)

        dqs.append(features_vjp(plan.feature_map, qT_HL, phi_qT_PL, dphi_qT_PL).astype(dtype))
        dks.append(features_vjp(plan.feature_map, kT_HC, phi_kT_PC, dphi_kT_PC).astype(dtype))
        dvs.append(dvT_HC.astype(dtype))
    dq_ref[0, rows, :] = plan.stacked(dqs).T
    dk_ref[0, 0, rows, :] = jnp.concatenate(dks, axis=0).T
    dv_ref[0, 0, rows, :] = jnp.concatenate(dvs, axis=0).T


def _chunk_without_keys(plan, c, document, q_ref, do_ref, ids_refs, saved_ref, dq_ref, dstate_ref):
    dtype, rows = q_ref.dtype, slice(c * plan.chunk, (c + 1) * plan.chunk)
    qT, doT = q_ref[0, rows, :].T, do_ref[0, rows, :].T
    dqs = []
    for head in range(plan.kv_heads_per_step):
        qT_HL, doT_HL = plan.side_by_side(qT, head).astype(jnp.float32), plan.side_by_side(doT, head)
        if ids_refs:
            read_1L = jnp.tile(ids_refs[0][0, :, rows] == document, (1, plan.group))
            doT_HL = jnp.where(read_1L, doT_HL, jnp.zeros_like(doT_HL))
        phi_qT_PL = features(plan.feature_map, qT_HL)
        dphi_qT_PL = plan.matmul(saved_ref[0, 0, head, 0].T.astype(dtype), doT_HL)
        dqs.append(features_vjp(plan.feature_map, qT_HL, phi_qT_PL, dphi_qT_PL).astype(dtype))
        dstate_ref[head] += plan.matmul_nt(phi_qT_PL.astype(dtype), doT_HL)
    dq_ref[0, rows, :] = plan.stacked(dqs).T


def backward_call(plan: Plan, documents, q, k, v, do, saved, dfinal, *ids):
    """Returns dq [B, T, N·H], dk and dv [splits, B, S, K·H] and dinitial float32 [splits, B, K, P, H].

    `saved` holds the forward's states of all blocks, `dfinal` [splits, B, K, P, H] the final state's cotangent, `ids`
    the ids [B, 1, T] and [B, 1, S], if the plan has them. The last three results are to be summed over the splits of
    the group.
    """
    batch, hb = q.shape[0], plan.kv_heads_per_step
    state = (plan.feature_dim, plan.head_dim)

    def q_block(i):
        return jnp.minimum(plan.backward_blocks - 1 - i, plan.query_blocks - 1)

    def kv_block(i):
        return jnp.clip(plan.backward_blocks - 1 - i - plan.delay_blocks, 0, plan.kv_blocks - 1)

    splits = plan.group_splits
    q_spec = pl.BlockSpec((1, plan.block, plan.q_lanes), lambda b, h, g, i, _: (b, q_block(i), h * splits + g))
    kv_spec = pl.BlockSpec((1, plan.block, plan.kv_lanes), lambda b, h, g, i, _: (b, kv_block(i), h))
    dkv_spec = pl.BlockSpec((1, 1, plan.block, plan.kv_lanes), lambda b, h, g, i, _: (g, b, kv_block(i), h))
    state_spec = pl.BlockSpec((1, 1, hb, *state), lambda b, h, g, i, _: (g, b, h, 0, 0))
    saved_spec = pl.BlockSpec((1, 1, hb, 1, *state[::-1]), lambda b, h, g, i, _: (g, b, h, q_block(i), 0, 0))
    in_specs = [q_spec, kv_spec, kv_spec, q_spec, saved_spec, state_spec]
    if plan.has_ids:
        in_specs.append(pl.BlockSpec((1, 1, plan.block), lambda b, h, g, i, _: (b, 0, q_block(i))))
        in_specs.append(pl.BlockSpec((1, 1, plan.block), lambda b, h, g, i, _: (b, 0, kv_block(i))))
    axes = jax.typeof(q).manual_axis_type
    out_shapes = [(q.shape, q.dtype)] + 2 * [((splits, *k.shape), k.dtype)] + [(dfinal.shape, jnp.float32)]
    return pl.pallas_call(
        functools.partial(backward_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, plan.kv_heads // hb, plan.group_splits, plan.backward_blocks),
            in_specs=in_specs,
            out_specs=[q_spec, dkv_spec, dkv_spec, state_spec],
            scratch_shapes=[
                pltpu.VMEM((hb, *state), jnp.float32),
                pltpu.VMEM((plan.chunks, hb, *state), q.dtype),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(s, d, manual_axis_type=axes) for s, d in out_shapes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=plan.vmem_limit_bytes,
        ),
        cost_estimate=plan.cost(batch, q.dtype.itemsize, products=5, tensors=(3, 4)),
        interpret=plan.interpret,
        name="rla_backward",
    )(documents, q, k, v, do, saved, dfinal, *ids)
