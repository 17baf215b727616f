"""Residual linear attention as two Mosaic TPU kernels, forward and backward, behind one differentiable function.

The kernels read and write the [B, T, heads · H] layout of the projections, so nothing is transposed in HBM. On a CPU
they run in Pallas' interpret mode.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.residual_linear_attention import tuning
from kernels_pallas.residual_linear_attention.naming import CHECKPOINT_NAME
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

    late = delay % tuning.TPU_CHUNK if delay < query_len else 0  # what is left is a whole number of chunks
    k, v = (jnp.pad(x, ((0, 0), (late, 0), (0, 0))) for x in (k, v))
    kv_ids = None if kv_ids is None else jnp.pad(kv_ids, ((0, 0), (late, 0)), mode="edge")

    static = {
        "query_len": query_len,
        "kv_len": S + late,
        "heads": N,
        "kv_heads": K,
        "head_dim": H,
        "feature_map": feature_map,
        "has_ids": q_ids is not None,
        "has_initial_state": initial_state is not None,
    }
    plan = _choose_plan(static, B, delay - late, q.dtype.itemsize)
    o, state = _kernels(plan, q, k, v, q_ids, kv_ids, initial_state)
    if kv_segment_ids is not None:
        last_read = max(S - 1 - window, 0)
        same_B = kv_segment_ids[:, last_read] == kv_segment_ids[:, -1]
        state = jnp.where(same_B[:, None, None, None], state, 0.0)
    return o[:, early:].reshape(B, T, N, H), state


def _choose_plan(static: dict, batch: int, delay: int, itemsize: int) -> Plan:
    """Returns the plan with most chunks a block, then most key/value heads a step, that VMEM and tuning allow."""
    K, H, query_len = static["kv_heads"], static["head_dim"], static["query_len"]
    group = static["heads"] // K
    most = min(tuning.TPU_CHUNKS, -(-query_len // tuning.TPU_CHUNK))
    whole_tiles = [n for n in range(1, K + 1) if K % n == 0 and n * H % LANES == 0] or [K]
    smallest = None
    for splits, chunks, heads_per_step in itertools.product(
        _group_splits(batch * K, group, H), range(most, 0, -1), reversed(whole_tiles)
    ):
        fewest_heads = heads_per_step == whole_tiles[0]
        rows = batch * K // heads_per_step * splits
        units = heads_per_step * group // splits * chunks
        block = tuning.TPU_CHUNK * chunks
        # A v5p chip shares the rows of the grid out to two cores.
        if (rows % 2 and not fewest_heads) or (units > tuning.TPU_UNITS and not (fewest_heads and chunks == 1)):
            continue
        if delay < query_len and delay % block:
            continue
        plan = Plan(
            **static,
            chunk=tuning.TPU_CHUNK,
            chunks=chunks,
            delay_blocks=-(-min(delay, query_len) // block),
            kv_heads_per_step=heads_per_step,
            group_splits=splits,
            vmem_limit_bytes=tuning.TPU_VMEM_BYTES,
        )
        if plan.vmem_bytes(itemsize) <= tuning.TPU_VMEM_BYTES:
            return plan
        smallest = plan
    needed, there = (size / 2**20 for size in (smallest.vmem_bytes(itemsize), tuning.TPU_VMEM_BYTES))
    raise ValueError(
        f"q_BTNH with N={static['heads']}, H={H} and k_BSKH with K={K} need {needed:.0f} MiB of VMEM, of which"
        f" {there:.0f} are there: use implementation='chunked'."
    )


def _group_splits(sequences: int, group: int, head_dim: int) -> list[int]:
    """Returns into how many parts a group may be cut, best first.

    Each part carries its own state and the gradients of k and v are summed outside, so one is best, but for one
    sequence of one key/value head: there two parts employ both cores of a chip.
    """
    splits = [n for n in range(1, group + 1) if group % n == 0 and (n == 1 or group // n * head_dim % LANES == 0)]
    return sorted(splits, key=lambda n: (sequences == 1 and n == 1, n))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernels(plan, q, k, v, q_ids, kv_ids, initial_state):
    o, state = _run_forward(plan, False, q, k, v, q_ids, kv_ids, initial_state)
    return o, state


def _kernels_fwd(plan, q, k, v, q_ids, kv_ids, initial_state):
    o, state, saved = _run_forward(plan, True, q, k, v, q_ids, kv_ids, initial_state)
    return (o, state), (q, k, v, q_ids, kv_ids, checkpoint_name(saved, CHECKPOINT_NAME))


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
