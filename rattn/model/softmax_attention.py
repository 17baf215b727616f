"""Causal softmax attention in plain JAX, window or full, one block of queries at a time."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rattn.model.remat import ATTENTION_OUTPUT

QUERY_BLOCK = 128


def blockwise_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    window: int | None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention of each query to the newest `window` keys of its document, itself included.

    S ≥ T: the first S − T keys are history, and query t stands at key position t + S − T. Scores are softmaxed in
    float32. A block of C queries reads C + window − 1 keys and is recomputed in the backward pass, so no T×T array
    exists and window attention costs O(T·window).

    Args:
      q_BTNH: queries; head n reads key/value head n // (N // K).
      k_BSKH: keys.
      v_BSKH: values.
      window: tokens seen, at least 1; None for all.
      q_segment_ids: int32 [B, T] document of each query; defaults to the last T of `kv_segment_ids`.
      kv_segment_ids: int32 [B, S] document of each key; None: one document a row.

    Returns:
      o_BTNH in v's dtype.
    """
    B, T, _, H = q_BTNH.shape
    S = k_BSKH.shape[1]
    window = S if window is None else min(window, S)
    if kv_segment_ids is None:
        kv_segment_ids = jnp.zeros((B, S), jnp.int32)
        q_segment_ids = jnp.zeros((B, T), jnp.int32)
    elif q_segment_ids is None:
        q_segment_ids = kv_segment_ids[:, S - T :]

    block = min(QUERY_BLOCK, T)
    num_blocks = -(-T // block)
    pad = num_blocks * block - T
    # Keys are laid out so that block i reads the slice that starts at i·block: window − 1 before its first query.
    lead = window - 1 - (S - T)
    keys_read = block + window - 1

    def pad_keys(x: jax.Array, value: int = 0) -> jax.Array:
        x = x[:, max(-lead, 0) :]
        widths = ((0, 0), (max(lead, 0), pad)) + ((0, 0),) * (x.ndim - 2)
        return jnp.pad(x, widths, constant_values=value)

    def pad_queries(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, num_blocks, block, *x.shape[2:]), 1, 0)

    k, v = pad_keys(k_BSKH), pad_keys(v_BSKH)
    # Padding keys carry a segment that no query has.
    kv_segments = pad_keys(kv_segment_ids, jnp.iinfo(jnp.int32).min)
    # Query j of a block sees slice positions j … j + window − 1.
    offset = jnp.arange(keys_read)[None, :] - jnp.arange(block)[:, None]
    in_window = (offset >= 0) & (offset < window)

    @jax.checkpoint
    def attend(start: jax.Array, q: jax.Array, q_segments: jax.Array) -> jax.Array:
        keys, values, segments = (
            jax.lax.dynamic_slice_in_dim(x, start, keys_read, axis=1) for x in (k, v, kv_segments)
        )
        mask = in_window[None, :, :] & (q_segments[:, :, None] == segments[:, None, :])
        # JAX's own function relies on implicit promotion of bfloat16 to float32.
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(
                q, keys, values, mask=mask[:, None], scale=H**-0.5, implementation="xla"
            )

    starts = jnp.arange(num_blocks, dtype=jnp.int32) * block
    blocks = jax.lax.map(lambda xs: attend(*xs), (starts, pad_queries(q_BTNH), pad_queries(q_segment_ids)))
    o_BTNH = jnp.moveaxis(blocks, 0, 1).reshape(B, num_blocks * block, *q_BTNH.shape[2:])[:, :T]
    return checkpoint_name(o_BTNH, ATTENTION_OUTPUT)
