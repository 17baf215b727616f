"""Residual linear attention as Pallas kernels for GPUs, behind one differentiable function.

    forward:   sums of φ(k)ᵀ v per chunk → scan: the states that enter the chunks → outputs
    backward:  sums of φ(q)ᵀ do per chunk → reverse scan: gradients of the states that leave the chunks → dk, dv;
               dq from the forward's states

Only the scan is sequential; every other kernel runs over all chunks in parallel, in Mosaic GPU where
`pallas_gpu_hopper.fits`, else in Triton. States and sums of chunks are stored in the input dtype; the scan adds them up
in float32. No sum depends on the order in which programs run. On a CPU the Triton kernels are interpreted.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import devices
from kernels_pallas.residual_linear_attention import pallas_gpu_hopper as hopper
from kernels_pallas.residual_linear_attention import pallas_gpu_hopper_backward as hopper_backward
from kernels_pallas.residual_linear_attention import pallas_gpu_hopper_forward as hopper_forward
from kernels_pallas.residual_linear_attention import tuning_gpu
from kernels_pallas.residual_linear_attention.naming import CHECKPOINT_NAME
from kernels_pallas.residual_linear_attention.pallas_gpu_common import Plan
from kernels_pallas.residual_linear_attention.pallas_gpu_outputs import dkv_call, dq_call, outputs_call
from kernels_pallas.residual_linear_attention.pallas_gpu_states import scan_call, sums_call


def forward(q_BTNH, k_BSKH, v_BSKH, q_segment_ids, kv_segment_ids, initial_state, *, window, feature_map):
    """Returns (o_BTNH in q's dtype, state_BKPH in float32); arguments as `residual_linear_attention` checks them.

    Raises ValueError for a head dim that is no power of two of at least 16, which Triton's products need.
    """
    (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    if H < 16 or H & (H - 1):
        raise ValueError(f"q_BTNH has head dim {H}: 'pallas_gpu' needs a power of two >= 16; use 'chunked'.")
    on_hopper = devices.on_hopper() and hopper.fits(str(q_BTNH.dtype), T, S, H, window, feature_map)
    plan = Plan(
        batch=B,
        query_len=T,
        kv_len=S,
        heads=N,
        kv_heads=K,
        head_dim=H,
        window=min(window, S),
        feature_map=feature_map,
        blocks=hopper.BLOCKS if on_hopper else tuning_gpu.blocks(str(q_BTNH.dtype), H),
        has_ids=q_segment_ids is not None,
        hopper=on_hopper,
    )
    ids = [q_segment_ids, kv_segment_ids] if plan.has_ids else []
    documents = plan.documents(kv_segment_ids)
    if initial_state is None:
        initial_state = _varying_like(k_BSKH, jnp.zeros((B, K, plan.halves * H, H), jnp.float32))
    initial = initial_state.reshape(-1, *plan.state_shape[2:])
    places = hopper.places(plan, documents, q_segment_ids, kv_segment_ids) if on_hopper else None
    o, last = _kernels(plan, (documents, ids, places), q_BTNH, k_BSKH, v_BSKH, initial)
    state_BKPH = last.reshape(B, K, plan.halves * H, H)
    if plan.has_ids:
        same_B = documents[:, -1] == kv_segment_ids[:, -1]
        state_BKPH = jnp.where(same_B[:, None, None, None], state_BKPH, 0.0)
    return o, state_BKPH


def _varying_like(like, x):
    """Makes x vary over the mesh axes that `like` varies over under `shard_map`."""
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    return jax.lax.pcast(x, axes, to="varying") if axes else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernels(plan, where, q, k, v, initial):
    """Returns (o as q; the last state, float32 [B·K, halves, H, H])."""
    return _kernels_forward(plan, where, q, k, v, initial)[0]


def _kernels_forward(plan, where, q, k, v, initial):
    o, last, states = _on_platform(plan, _run_forward, where, q, k, v, initial)
    return (o, last), (where, q, k, v, checkpoint_name(states, CHECKPOINT_NAME))


def _kernels_backward(plan, residuals, cotangents):
    dq, dk, dv, dinitial = _on_platform(plan, _run_backward, *residuals, *cotangents)
    return None, dq, dk, dv, dinitial


_kernels.defvjp(_kernels_forward, _kernels_backward)


def _run_forward(plan, where, q, k, v, initial):
    documents, ids, places = where
    if plan.hopper:
        sums = hopper_forward.sums_call(plan, k, v, places[1], of_queries=False)
        states, last = scan_call(plan, documents, sums, initial, reverse=False)
        return hopper_forward.outputs_call(plan, q, k, v, places, states), last, states
    shape = q.shape
    q, k, v, *ids = _as_rows(plan, q, k, v, *ids)
    sums = sums_call(plan, documents, k, v, ids[1:], of_queries=False)
    states, last = scan_call(plan, documents, sums, initial, reverse=False)
    return outputs_call(plan, documents, q, k, v, ids, states).reshape(shape), last, states


def _run_backward(plan, where, q, k, v, states, do, dlast):
    documents, ids, places = where
    if plan.hopper:
        dq = hopper_backward.dq_call(plan, q, k, v, do, places, states)
        sums = hopper_forward.sums_call(plan, q, do, places[0], of_queries=True)
        dstates, dinitial = scan_call(plan, documents, sums, dlast, reverse=True)
        return dq, *hopper_backward.dkv_call(plan, q, k, v, do, places, dstates), dinitial
    shapes = q.shape, k.shape
    q, k, v, do, *ids = _as_rows(plan, q, k, v, do, *ids)
    dq = dq_call(plan, documents, q, k, v, do, ids, states)
    sums = sums_call(plan, documents, q, do, ids[:1], of_queries=True)
    dstates, dinitial = scan_call(plan, documents, sums, dlast, reverse=True)
    dk, dv = dkv_call(plan, documents, q, k, v, do, ids, dstates)
    return dq.reshape(shapes[0]), dk.reshape(shapes[1]), dv.reshape(shapes[1]), dinitial


def _as_rows(plan, *arrays):
    return [x.reshape(-1) if x.ndim == 2 else x.reshape(-1, plan.head_dim) for x in arrays]


def _on_platform(plan, run, *arguments):
    """Runs the kernels compiled, or interpreted where the program is lowered for a CPU."""
    interpreted = functools.partial(run, dataclasses.replace(plan, hopper=False, interpret=True))
    return jax.lax.platform_dependent(*arguments, cpu=interpreted, default=functools.partial(run, plan))
