"""One token of every sequence against a layer's cache, in XLA's operations: any layer, dtype and device."""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.residual_linear_attention.feature_map import features
from rattn.decoding.cache import CacheLayout, Clock, LayerCache, ages_of_slots, known_ages, slots_of_age
from rattn.decoding.layers import (
    LayerSpec,
    Weights,
    linear_key,
    linear_query,
    mixed,
    softmax_key,
    softmax_query,
    split,
)
from rattn.model.layers import rope_angles, rotate

# A sum over values is cut until there are this many products side by side, each of at least MIN_SPLIT keys: one
# product for each key/value head would leave most of a GPU idle where sequences are few and long.
PARALLEL_PRODUCTS = 1024
MIN_SPLIT = 256


def attend(
    layer: LayerSpec,
    layout: CacheLayout,
    weights: Weights,
    cache: LayerCache,
    clock: Clock,
    qkv_BKAH: jax.Array,
) -> tuple[jax.Array, LayerCache]:
    """Writes a token's key and value to a layer's cache; returns what attention says, o_BE, and the cache.

    Args:
      layer: the layer's.
      layout: of the cache.
      weights: the layer's.
      cache: the layer's, with the tokens before.
      clock: before the token.
      qkv_BKAH: as projected.
    """
    q_BKGH, k_BKH, v_BKH = split(layer, qkv_BKAH)
    if not layer.has_linear:
        k_BKH = _positioned(layer, softmax_key(layer, weights, k_BKH), clock.length_B)
    if layer.kind == "full":
        cache = {
            "k_BKSH": _write_rows(cache["k_BKSH"], k_BKH, clock.length_B),
            "v_BKSH": _write_rows(cache["v_BKSH"], v_BKH, clock.length_B),
        }
    else:
        slot = clock.steps % layout.slots(layer)
        cache = cache | {
            "k_BKSH": _write_slot(cache["k_BKSH"], k_BKH, slot),
            "v_BKSH": _write_slot(cache["v_BKSH"], v_BKH, slot),
        }
    now = clock.after_a_step()
    softmax = _softmax_branch(layer, layout, weights, cache, now, q_BKGH) if layer.has_softmax else None
    linear = _linear_branch(layer, layout, weights, cache, now, q_BKGH) if layer.has_linear else None
    return mixed(layer, weights, softmax, linear), cache


def _softmax_branch(
    layer: LayerSpec, layout: CacheLayout, weights: Weights, cache: LayerCache, now: Clock, q_BKGH: jax.Array
) -> jax.Array:
    """Returns the softmax branch's o_BKGH; `now` counts the new token, which is in the cache."""
    q_BKGH, k_BKSH = softmax_query(layer, weights, q_BKGH), cache["k_BKSH"]
    if layer.kind == "full":
        slots = jnp.arange(layout.capacity, dtype=jnp.int32)[None]
        visible_BS = (slots >= now.start_B[:, None]) & (slots < now.length_B[:, None])
        return _softmax(_positioned(layer, q_BKGH, now.length_B - 1), k_BKSH, cache["v_BKSH"], visible_BS)
    if layer.window == 0:
        return jnp.zeros_like(q_BKGH)
    ages = ages_of_slots(now.steps, k_BKSH.shape[2])
    if layer.has_linear:
        k_BKSH = softmax_key(layer, weights, k_BKSH)
        if layer.rope_theta is not None:
            # Rotated against the query, which then stays as it is: the angles are the same in all sequences.
            sin_SR, cos_SR = rope_angles(-ages, layer.head_dim, layer.rope_theta)
            k_BKSH = rotate(k_BKSH, sin_SR[None, None], cos_SR[None, None])
    else:
        q_BKGH = _positioned(layer, q_BKGH, now.length_B - 1)
    visible_BS = known_ages(now, ages) & (ages < layout.kept_window(layer))[None]
    return _softmax(q_BKGH, k_BKSH, cache["v_BKSH"], visible_BS)


def _linear_branch(
    layer: LayerSpec, layout: CacheLayout, weights: Weights, cache: LayerCache, now: Clock, q_BKGH: jax.Array
) -> jax.Array:
    """Returns the linear branch's o_BKGH: what the state holds, and the keys that left the window since the fold."""
    dtype = q_BKGH.dtype
    precision = _precision(dtype)
    phi_BKGP = features(layer.feature_map, linear_query(layer, weights, q_BKGH))
    state_BKPH = cache["state_BKPH"]
    o_BKGH = jnp.einsum(
        "bkgp,bkph->bkgh",
        phi_BKGP.astype(state_BKPH.dtype),
        state_BKPH,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    waiting = jnp.arange(layout.fold_tokens, dtype=jnp.int32)
    ages = layout.kept_window(layer) + waiting
    slots = slots_of_age(ages, now.steps, layout.slots(layer))
    k_BKCH, v_BKCH = (jnp.take(cache[name], slots, axis=2) for name in ("k_BKSH", "v_BKSH"))
    phi_BKCP = features(layer.feature_map, linear_key(layer, weights, k_BKCH)).astype(dtype)
    scores_BKGC = jnp.einsum(
        "bkgp,bkcp->bkgc", phi_BKGP.astype(dtype), phi_BKCP, precision=precision, preferred_element_type=jnp.float32
    )
    unfolded_BC = known_ages(now, ages) & (waiting < now.unfolded)[None]
    scores_BKGC = jnp.where(unfolded_BC[:, None, None], scores_BKGC, 0.0).astype(dtype)
    o_BKGH += jnp.einsum(
        "bkgc,bkch->bkgh", scores_BKGC, v_BKCH, precision=precision, preferred_element_type=jnp.float32
    )
    return o_BKGH.astype(dtype)


def _softmax(q_BKGH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible_BS: jax.Array) -> jax.Array:
    """Softmax attention of one query a head to the visible keys; returns o_BKGH in v's dtype."""
    B, K, S, H = k_BKSH.shape
    G, dtype = q_BKGH.shape[2], v_BKSH.dtype
    precision = _precision(dtype)
    scores = jnp.einsum("bkgh,bksh->bkgs", q_BKGH, k_BKSH, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(visible_BS[:, None, None], scores * H**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
    splits = 1
    while 2 * splits * B * K <= PARALLEL_PRODUCTS and S % (2 * splits) == 0 and S // (2 * splits) >= MIN_SPLIT:
        splits *= 2
    parts_BKNGH = jnp.einsum(
        "bkgnc,bknch->bkngh",
        weights.reshape(B, K, G, splits, S // splits),
        v_BKSH.reshape(B, K, splits, S // splits, H),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return parts_BKNGH.sum(axis=2).astype(dtype)


def _precision(dtype: Any) -> jax.lax.Precision | None:
    # A GPU multiplies float32 with ten bits of mantissa by default: enough beside bfloat16, not for float32.
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _positioned(layer: LayerSpec, x_BH: jax.Array, positions_B: jax.Array) -> jax.Array:
    """Rotates x [B, ..., H] to the positions of its sequences."""
    if layer.rope_theta is None:
        return x_BH
    dims = tuple(range(1, x_BH.ndim - 1))
    sin, cos = (jnp.expand_dims(x, dims) for x in rope_angles(positions_B, layer.head_dim, layer.rope_theta))
    return rotate(x_BH, sin, cos)


def _write_slot(kept_BKSH: jax.Array, new_BKH: jax.Array, slot: jax.Array) -> jax.Array:
    zero = jnp.zeros_like(slot)
    return jax.lax.dynamic_update_slice(kept_BKSH, new_BKH[:, :, None], (zero, zero, slot, zero))


def _write_rows(kept_BKSH: jax.Array, new_BKH: jax.Array, slots_B: jax.Array) -> jax.Array:
    """Writes each sequence's key to a slot of its own; what is past the end is dropped."""

    def row(kept_KSH: jax.Array, new_KH: jax.Array, slot: jax.Array) -> jax.Array:
        return kept_KSH.at[:, slot].set(new_KH, mode="drop")

    return jax.vmap(row)(kept_BKSH, new_BKH, slots_B)
