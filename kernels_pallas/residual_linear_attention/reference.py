"""Residual linear attention as one quadratic, masked product in float32: slow and obvious, the judge of other forms."""

import jax
import jax.numpy as jnp

from kernels_pallas.residual_linear_attention.feature_map import features

HIGHEST = jax.lax.Precision.HIGHEST


def linear_mask(q_len: int, kv_len: int, window: int) -> jax.Array:
    """Returns the bool mask [T, S] of the keys that the linear branch lets each query read.

    Query t stands at key position t + S - T and reads the keys that its window of W tokens, itself included, has left.
    """
    position_T = jnp.arange(q_len) + (kv_len - q_len)
    return jnp.arange(kv_len)[None, :] <= position_T[:, None] - window


def forward(q_BTNH, k_BSKH, v_BSKH, q_segment_ids, kv_segment_ids, initial_state, *, window, feature_map):
    """Returns (o_BTNH in q's dtype, state_BKPH in float32); arguments as `residual_linear_attention` checks them."""
    query_len, kv_len, group = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[2] // k_BSKH.shape[2]
    mask_BTS = linear_mask(query_len, kv_len, window)[None]
    if kv_segment_ids is not None:
        mask_BTS = mask_BTS & (q_segment_ids[:, :, None] == kv_segment_ids[:, None, :])

    q_BTNP = features(feature_map, q_BTNH)
    k_BSNP = jnp.repeat(features(feature_map, k_BSKH), group, axis=2)
    v_BSNH = jnp.repeat(v_BSKH.astype(jnp.float32), group, axis=2)
    scores_BNTS = jnp.einsum("btnp,bsnp->bnts", q_BTNP, k_BSNP, precision=HIGHEST)
    scores_BNTS = jnp.where(mask_BTS[:, None], scores_BNTS, 0.0)
    o_BTNH = jnp.einsum("bnts,bsnh->btnh", scores_BNTS, v_BSNH, precision=HIGHEST)

    if initial_state is not None:
        read_BTNH = jnp.einsum("btnp,bnph->btnh", q_BTNP, jnp.repeat(initial_state, group, axis=1), precision=HIGHEST)
        if kv_segment_ids is not None:
            read_BTNH = jnp.where((q_segment_ids == kv_segment_ids[:, :1])[:, :, None, None], read_BTNH, 0.0)
        o_BTNH = o_BTNH + read_BTNH
    last = state(k_BSKH, v_BSKH, kv_segment_ids, initial_state, window=window, feature_map=feature_map)
    return o_BTNH.astype(q_BTNH.dtype), last


def state(k_BSKH, v_BSKH, kv_segment_ids, initial_state, *, window, feature_map):
    """Returns state_BKPH in float32: what a query at the last key position reads."""
    mask_BS = linear_mask(1, k_BSKH.shape[1], window)
    if kv_segment_ids is not None:
        mask_BS = mask_BS & (kv_segment_ids == kv_segment_ids[:, -1:])
    v_BSKH = jnp.where(mask_BS[:, :, None, None], v_BSKH.astype(jnp.float32), 0.0)
    state_BKPH = jnp.einsum("bskp,bskh->bkph", features(feature_map, k_BSKH), v_BSKH, precision=HIGHEST)
    if initial_state is None:
        return state_BKPH
    if kv_segment_ids is not None:
        same_B = kv_segment_ids[:, 0] == kv_segment_ids[:, -1]
        initial_state = jnp.where(same_B[:, None, None, None], initial_state, 0.0)
    return state_BKPH + initial_state
