"""Residual linear attention as Pallas kernels for GPUs (Triton), behind one differentiable function.

    forward:   sums of φ(k)ᵀ v per chunk → scan: the states that enter the chunks → outputs
    backward:  sums of φ(q)ᵀ do per chunk → reverse scan: gradients of the states that leave the chunks → dk, dv;
               dq from the forward's states

Only the scan is sequential; every other kernel runs over all chunks in parallel. States are stored in the input dtype
and add up in float32. No sum depends on the order in which programs run. On a CPU the kernels are interpreted.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kernels_pallas.residual_linear_attention import tuning_gpu
from kernels_pallas.residual_linear_attention.pallas_gpu_common import Plan
from kernels_pallas.residual_linear_attention.pallas_gpu_outputs import dkv_call, dq_call, outputs_call
from kernels_pallas.residual_linear_attention.pallas_gpu_states import states_call


def forward(q_BTNH, k_BSKH, v_BSKH, q_segment_ids, kv_segment_ids, initial_state, *, window, feature_map):
    """Returns (o_BTNH in q's dtype, state_BKPH in float32); arguments as `residual_linear_attention` checks them.

    Raises ValueError for a head dim that is no power of two of at least 16, which Triton's products need.
    """
    (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    if H < 16 or H & (H - 1):
        raise ValueError(f"q_BTNH has head dim {H}: 'pallas_gpu' needs a power of two >= 16; use 'chunked'.")
    plan = Plan(
        batch=B,
        query_len=T,
        kv_len=S,
        heads=N,
        kv_heads=K,
        head_dim=H,
        window=min(window, S),
        feature_map=feature_map,
        blocks=tuning_gpu.blocks(str(q_BTNH.dtype), H),
        has_ids=q_segment_ids is not None,
    )
    rows = [x.reshape(-1, H) for x in (q_BTNH, k_BSKH, v_BSKH)]
    ids = [x.reshape(-1) for x in (q_segment_ids, kv_segment_ids)] if plan.has_ids else []
    documents = plan.documents(kv_segment_ids)
    if initial_state is None:
        initial = _zero_state(plan, rows[1])
    else:
        initial = initial_state.reshape(-1, *plan.state_shape[2:])
    o, last = _kernels(plan, documents, *rows, ids, initial)
    state_BKPH = last.reshape(B, K, plan.halves * H, H)
    if plan.has_ids:
        same_B = documents[:, -1] == kv_segment_ids[:, -1]
        state_BKPH = jnp.where(same_B[:, None, None, None], state_BKPH, 0.0)
    return o.reshape(q_BTNH.shape), state_BKPH


def _zero_state(plan, like):
    """A zero state that varies over the same mesh axes as `like`."""
    zero = jnp.zeros((plan.state_shape[0], *plan.state_shape[2:]), jnp.float32)
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    return jax.lax.pcast(zero, axes, to="varying") if axes else zero


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernels(plan, documents, q, k, v, ids, initial):
    """Returns (o, rows as q; the last state, float32 [B·K, halves, H, H])."""
    return _kernels_forward(plan, documents, q, k, v, ids, initial)[0]


def _kernels_forward(plan, documents, q, k, v, ids, initial):
    def run(plan, documents, q, k, v, ids, initial):
        states, last = states_call(plan, documents, k, v, ids[1:], initial, of_queries=False)
        return outputs_call(plan, documents, q, k, v, ids, states), last, states

    o, last, states = _on_platform(plan, run, documents, q, k, v, ids, initial)
    return (o, last), (documents, q, k, v, ids, states)


def _kernels_backward(plan, residuals, cotangents):
    def run(plan, documents, q, k, v, ids, states, do, dlast):
        dq = dq_call(plan, documents, q, k, v, do, ids, states)
        dstates, dinitial = states_call(plan, documents, q, do, ids[:1], dlast, of_queries=True)
        return dq, *dkv_call(plan, documents, q, k, v, do, ids, dstates), dinitial

    dq, dk, dv, dinitial = _on_platform(plan, run, *residuals, *cotangents)
    return None, dq, dk, dv, [None] * len(residuals[4]), dinitial


_kernels.defvjp(_kernels_forward, _kernels_backward)


def _on_platform(plan, run, *arguments):
    """Runs the kernels compiled, or interpreted where the program is lowered for a CPU."""
    interpreted = functools.partial(run, dataclasses.replace(plan, interpret=True))
    return jax.lax.platform_dependent(*arguments, cpu=interpreted, default=functools.partial(run, plan))
