"""Residual linear attention as two Mosaic TPU kernels, forward and backward, behind one differentiable function.

The kernels read and write the [B, T, heads · H] layout of the projections, so nothing is transposed in HBM. On a CPU
they run in Pallas' interpret mode.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kernels_pallas.residual_linear_attention import tuning
from kernels_pallas.residual_linear_attention.pallas_tpu_backward import backward_call
from kernels_pallas.residual_linear_attention.pallas_tpu_common import LANES, Plan
from kernels_pallas.residual_linear_attention.pallas_tpu_forward import forward_call


def forward(q_BTNH, k_BSKH, v_BSKH, q_segment_ids, kv_segment_ids, initial_state, *, window, feature_map):
    """Returns (o_BTNH in q's dtype, state_BKPH in float32); arguments as `residual_linear_attention` checks them."""
    (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    delay = window - (S - T)
    q = q_BTNH.reshape(B, T, N * H)
    k, v = k_BSKH.reshape(B, S, K * H), v_BSKH.reshape(B, S, K * H)
    q_ids, kv_ids = q_segment_ids, kv_segment_ids

    early = max(-delay, 0)  # keys before the first query's own position in the delayed order: give them queries
    q = jnp.pad(q, ((0, 0), (early, 0), (0, 0)))
    q_ids = None if q_ids is None else jnp.pad(q_ids, ((0, 0), (early, 0)), mode="edge")
    delay = max(delay, 0)
    query_len = T + early

    chunk = tuning.TPU_CHUNK
    most = min(tuning.TPU_CHUNKS, -(-query_len // chunk))
    if delay >= query_len:
        chunks = most
        delay_blocks = -(-query_len // (chunk * chunks))
    else:
        late = delay % chunk
        k, v = (jnp.pad(x, ((0, 0), (late, 0), (0, 0))) for x in (k, v))
        kv_ids = None if kv_ids is None else jnp.pad(kv_ids, ((0, 0), (late, 0)), mode="edge")
        delay_chunks = delay // chunk
        chunks = max(m for m in range(1, most + 1) if delay_chunks % m == 0)
        delay_blocks = delay_chunks // chunks

    plan = Plan(
        query_len=query_len,
        kv_len=k.shape[1],
        heads=N,
        kv_heads=K,
        head_dim=H,
        feature_map=feature_map,
        chunk=chunk,
        chunks=chunks,
        delay_blocks=delay_blocks,
        kv_heads_per_step=_kv_heads_per_step(K, H),
        group_splits=_group_splits(B, K, N // K, H),
        has_ids=q_ids is not None,
        has_initial_state=initial_state is not None,
    )
    o, state = _kernels(plan, q, k, v, q_ids, kv_ids, initial_state)
    if kv_segment_ids is not None:
        last_read = max(S - 1 - window, 0)
        same_B = kv_segment_ids[:, last_read] == kv_segment_ids[:, -1]
        state = jnp.where(same_B[:, None, None, None], state, 0.0)
    return o[:, early:].reshape(B, T, N, H), state


def _kv_heads_per_step(kv_heads: int, head_dim: int) -> int:
    """Returns the fewest key/value heads whose columns fill whole tiles of 128 lanes, or all of them."""
    for count in range(1, kv_heads):
        if kv_heads % count == 0 and count * head_dim % LANES == 0:
            return count
    return kv_heads


def _group_splits(batch: int, kv_heads: int, group: int, head_dim: int) -> int:
    """Returns 2 where batch × kv heads = 1 would leave the second core of a chip idle: each takes half of the group."""
    return 2 if batch * kv_heads == 1 and group % 2 == 0 and group // 2 * head_dim % LANES == 0 else 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernels(plan, q, k, v, q_ids, kv_ids, initial_state):
    o, state = _run_forward(plan, False, q, k, v, q_ids, kv_ids, initial_state)
    return o, state


def _kernels_fwd(plan, q, k, v, q_ids, kv_ids, initial_state):
    o, state, saved = _run_forward(plan, True, q, k, v, q_ids, kv_ids, initial_state)
    return (o, state), (q, k, v, q_ids, kv_ids, saved)


def _kernels_bwd(plan, residuals, cotangents):
    q, k, v, q_ids, kv_ids, saved = residuals
    do, dstate_BKPH = cotangents
    # The final state is counted once, whatever the number of splits.
    dfinal = jnp.pad(dstate_BKPH[None], ((0, plan.group_splits - 1),) + 4 * ((0, 0),))
    arguments = (plan.state_documents(kv_ids, q.shape[0]), q, k, v, do, saved, dfinal, *_ids(plan, q_ids, kv_ids))
    dq, *rest = _on_platform(plan, backward_call, *arguments)
    dk, dv, dinitial = (x[0] if plan.group_splits == 1 else x.sum(0) for x in rest)
    return dq, dk, dv, None, None, dinitial if plan.has_initial_state else None


_kernels.defvjp(_kernels_fwd, _kernels_bwd)


def _run_forward(plan, save_states, q, k, v, q_ids, kv_ids, initial_state):
    rest = _ids(plan, q_ids, kv_ids) + (() if initial_state is None else (initial_state,))
    call = functools.partial(forward_call, save_states=save_states)
    o, final, *saved = _on_platform(plan, call, plan.state_documents(kv_ids, q.shape[0]), q, k, v, *rest)
    return o, final[0].swapaxes(-1, -2), *saved


def _ids(plan, q_ids, kv_ids):
    return (q_ids[:, None], kv_ids[:, None]) if plan.has_ids else ()


def _on_platform(plan, call, *arguments):
    """Calls the kernel compiled, or interpreted where the program is lowered for a CPU."""
    interpreted = functools.partial(call, dataclasses.replace(plan, interpret=True))
    return jax.lax.platform_dependent(*arguments, cpu=interpreted, default=functools.partial(call, plan))
