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

    @pl.when((step >= plan.delay_blocks) & (step < plan.query_blocks))
    def _():
        def documents(c):
            chunk = step * plan.chunks + c
            return documents_ref[batch, chunk], documents_ref[batch, chunk + 1]

        _recompute_states(plan, documents, k_ref, v_ref, ids_refs, saved_ref, states_ref)
        for c in reversed(range(plan.chunks)):
            inputs = (q_ref, k_ref, v_ref, do_ref, ids_refs, states_ref)
            _chunk(plan, c, documents(c), *inputs, dq_ref, dk_ref, dv_ref, dstate_ref)

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


def _recompute_states(plan, documents, k_ref, v_ref, ids_refs, saved_ref, states_ref):
    H = plan.head_dim
    states = [saved_ref[0, 0, head, 0].T for head in range(plan.kv_heads_per_step)]
    for c in range(plan.chunks):
        rows = slice(c * plan.chunk, (c + 1) * plan.chunk)
        for head, state_PH in enumerate(states):
            states_ref[c, head] = state_PH.astype(states_ref.dtype)
        if c == plan.chunks - 1:
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
    mask = readable(C, q_ids_1C, kv_ids_1C)
    qT, kT, vT, doT = (ref[0, rows, :].T for ref in (q_ref, k_ref, v_ref, do_ref))
    dqs, dks, dvs = [], [], []
    for head in range(plan.kv_heads_per_step):
        of_head = slice(head * H, (head + 1) * H)
        kT_HC, vT_HC = kT[of_head].astype(jnp.float32), vT[of_head]
        phi_kT_PC = features(plan.feature_map, kT_HC)
        phi_kT_low = phi_kT_PC.astype(dtype)
        phi_k_CP = phi_kT_low.T
        left = jnp.concatenate([vT_HC.T, states_ref[c, head]], axis=0)

        dstate_PH = dstate_ref[head]
        dstate_low = dstate_PH.astype(dtype)
        if ids_refs:
            vT_read = jnp.where(kv_ids_1C == documents[1], vT_HC, jnp.zeros_like(vT_HC))
            dvT_HC = jnp.where(kv_ids_1C == documents[1], plan.matmul(dstate_low.T, phi_kT_low), 0.0)
            dstate_PH = jnp.where(documents[0] == documents[1], dstate_PH, 0.0)
        else:
            vT_read = vT_HC
            dvT_HC = plan.matmul(dstate_low.T, phi_kT_low)
        dphi_kT_PC = plan.matmul(dstate_low, vT_read)

        for g in range(plan.group):
            n = head * plan.group + g
            qT_HC = qT[n * H : (n + 1) * H].astype(jnp.float32)
            doT_HC = doT[n * H : (n + 1) * H]
            phi_qT_PC = features(plan.feature_map, qT_HC)
            phi_qT_low = phi_qT_PC.astype(dtype)
            scores = jnp.where(mask, plan.matmul(phi_k_CP, phi_qT_low), 0.0).astype(dtype)
            both = plan.matmul(left, doT_HC)
            dscores = jnp.where(mask, both[:C], 0.0).astype(dtype)
            old = both[C:]
            phi_qT_old = phi_qT_low
            if ids_refs:
                old = jnp.where(q_ids_1C == documents[0], old, 0.0)
                phi_qT_old = jnp.where(q_ids_1C == documents[0], phi_qT_low, jnp.zeros_like(phi_qT_low))
            dphi_qT_PC = old + plan.matmul(phi_kT_low, dscores)
            dqs.append(features_vjp(plan.feature_map, qT_HC, phi_qT_PC, dphi_qT_PC).astype(dtype))
            dvT_HC += plan.matmul_nt(doT_HC, scores)
            dphi_kT_PC += plan.matmul_nt(phi_qT_low, dscores)
            dstate_PH += plan.matmul_nt(phi_qT_old, doT_HC)
        dstate_ref[head] = dstate_PH
        dks.append(features_vjp(plan.feature_map, kT_HC, phi_kT_PC, dphi_kT_PC).astype(dtype))
        dvs.append(dvT_HC.astype(dtype))
    dq_ref[0, rows, :] = jnp.concatenate(dqs, axis=0).T
    dk_ref[0, 0, rows, :] = jnp.concatenate(dks, axis=0).T
    dv_ref[0, 0, rows, :] = jnp.concatenate(dvs, axis=0).T


def _chunk_without_keys(plan, c, document, q_ref, do_ref, ids_refs, saved_ref, dq_ref, dstate_ref):
    dtype, rows = q_ref.dtype, slice(c * plan.chunk, (c + 1) * plan.chunk)
    H = plan.head_dim
    qT, doT = q_ref[0, rows, :].T, do_ref[0, rows, :].T
    dqs = []
    for n in range(plan.kv_heads_per_step * plan.group):
        head = n // plan.group
        qT_HC = qT[n * H : (n + 1) * H].astype(jnp.float32)
        doT_HC = doT[n * H : (n + 1) * H]
        if ids_refs:
            doT_HC = jnp.where(ids_refs[0][0, :, rows] == document, doT_HC, jnp.zeros_like(doT_HC))
        phi_qT_PC = features(plan.feature_map, qT_HC)
        dphi_qT_PC = plan.matmul(saved_ref[0, 0, head, 0].T.astype(dtype), doT_HC)
        dqs.append(features_vjp(plan.feature_map, qT_HC, phi_qT_PC, dphi_qT_PC).astype(dtype))
        dstate_ref[head] += plan.matmul_nt(phi_qT_PC.astype(dtype), doT_HC)
    dq_ref[0, rows, :] = jnp.concatenate(dqs, axis=0).T


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
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=64 * 2**20
        ),
        interpret=plan.interpret,
        name="rla_backward",
    )(documents, q, k, v, do, saved, dfinal, *ids)
