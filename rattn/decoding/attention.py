"""The attention of a step: which of its forms has a layer, and what they take beside the layer's own.

XLA's operations (`attention_xla`) have all layers; the kernels those that they fit.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rattn.decoding import (
    attention_gpu,
    attention_ring_gpu,
    attention_stream_gpu,
    attention_stream_gpu_plan,
    attention_xla,
    mosaic_gpu,
)
from rattn.decoding.cache import CacheLayout, Clock, LayerCache
from rattn.decoding.kernels import Kernels
from rattn.decoding.layers import LayerSpec, Weights
from rattn.model.layers import rope_angles

# What positions a ring's keys that are kept as projected, and what follows from the clock; as each kernel takes it.
Rotation = attention_gpu.Rotation | jax.Array | None
Moment = attention_ring_gpu.Moment | attention_stream_gpu_plan.Moment


class Notes(NamedTuple):
    """In which programs of a kernel tell each other how far they are; layers hand them on.

    Attributes:
      arrivals_BK: zeros, where attention is a kernel.
      ready_P: zeros, where it is `attention_ring_gpu` or `attention_stream_gpu`.
    """

    arrivals_BK: jax.Array | None
    ready_P: jax.Array | None


def first_notes(layers: tuple[LayerSpec, ...], layout: CacheLayout, kernels: Kernels) -> Notes:
    """Returns what the first layer of a first step takes."""
    hopper = any(_form(kernels, layer, layout) in ("ring", "stream") for layer in layers)
    return Notes(
        arrivals_BK=None if kernels.attention == "xla" else jnp.zeros((layout.batch, layers[0].kv_heads), jnp.int32),
        ready_P=mosaic_gpu.none_ready() if hopper else None,
    )


def ring_rotations(
    layers: tuple[LayerSpec, ...], layout: CacheLayout, kernels: Kernels, weights: dict[str, Any]
) -> tuple[Rotation, ...]:
    """Returns for each layer what its kernel positions keys with that are kept as projected, the same in all steps.

    Made before a loop of steps: XLA would make it in each of them.
    """

    def of(layer: LayerSpec, w: Weights) -> Rotation:
        form, dtype = _form(kernels, layer, layout), jnp.dtype(layout.dtype)
        if form == "ring":
            return attention_ring_gpu.turns(layer.head_dim, layer.rope_theta, w.get("k_norm_H"), dtype)
        if form != "triton" or not layer.has_linear or layer.rope_theta is None:
            return None
        return attention_gpu.ring_rotation(
            layout.slots(layer), layer.head_dim, layer.rope_theta, w.get("k_norm_H"), dtype
        )

    return tuple(of(layer, w) for layer, w in zip(layers, weights["layers"], strict=True))


def moments(
    layers: tuple[LayerSpec, ...], layout: CacheLayout, kernels: Kernels, clock: Clock, steps: int
) -> dict[int, Moment | None]:
    """Returns what kernels for a Hopper take that follows from the clock, for this step and those after it: [steps, …].

    For each sort of layer, by the number of its first one: a scan takes dictionaries whose keys can be sorted. Made
    before a loop of steps: XLA would make it in each of them, in kernels that take longer to begin than to run.
    """

    def of(layer: LayerSpec, ahead: jax.Array) -> Moment | None:
        at = dataclasses.replace(
            clock, length_B=clock.length_B + ahead, steps=clock.steps + ahead, unfolded=clock.unfolded + ahead
        )
        slots, now = layout.slots(layer), at.after_a_step()
        known_B, form = now.length_B - now.start_B, _form(kernels, layer, layout)
        if form == "ring":
            heads = layer.group, layer.head_dim, layer.rope_theta
            return attention_ring_gpu.moment(at.steps % slots, known_B, now.unfolded, slots, *heads)
        if form == "stream":
            new_B, angles = _new_slots(layer, layout, at), _new_angles(layer, at)
            return attention_stream_gpu_plan.moment(
                new_B, known_B, _window(layer, layout), slots, layer.kv_heads, angles
            )
        return None

    sorts = dict.fromkeys(layers)
    return {layers.index(layer): jax.vmap(functools.partial(of, layer))(jnp.arange(steps)) for layer in sorts}


def attend(
    layer: LayerSpec,
    layout: CacheLayout,
    kernels: Kernels,
    early: bool,
    position: tuple[Rotation, Moment | None],
    weights: Weights,
    cache: LayerCache,
    clock: Clock,
    qkv_BKAH: jax.Array,
    notes: Notes,
) -> tuple[jax.Array, LayerCache, Notes]:
    """Returns what `attention_xla.attend` does, by the form that has the layer, and the notes for the next.

    Args:
      layer: whose attention it is.
      layout: of the cache.
      kernels: what a step runs.
      early: whether another layer's products stand in front, so that what is older than they may be read before they
        are done.
      position: of `ring_rotations` and of `moments`.
      weights: the layer's.
      cache: the layer's, without the new keys and values.
      clock: the one before the token.
      qkv_BKAH: of the new tokens, perhaps with more rows than sequences.
      notes: of the layer before.
    """
    (rotation, moment), form = position, _form(kernels, layer, layout)
    if form == "ring":
        o_BE, cache, ready_P = _by_ring_kernel(layer, layout, rotation, moment, weights, cache, qkv_BKAH, notes.ready_P)
        return o_BE, cache, notes._replace(ready_P=ready_P)
    if form == "stream":
        o_BE, cache, ready_P = _by_stream_kernel(layer, early, moment, weights, cache, qkv_BKAH, notes.ready_P)
        return o_BE, cache, notes._replace(ready_P=ready_P)
    if form == "triton":
        o_BE, cache, arrivals_BK = _by_kernel(
            layer, layout, kernels.interpret, rotation, weights, cache, clock, qkv_BKAH, notes.arrivals_BK
        )
        return o_BE, cache, notes._replace(arrivals_BK=arrivals_BK)
    return *attention_xla.attend(layer, layout, weights, cache, clock, qkv_BKAH[: layout.batch]), notes


def is_rings_and_kernels(layers: tuple[LayerSpec, ...], layout: CacheLayout, kernels: Kernels) -> bool:
    """Returns whether `attention_ring_gpu` has layers, kernels all others, and XLA cuts nothing of what they say."""
    forms = {_form(kernels, layer, layout) for layer in layers}
    whole = all(mosaic_gpu.queries_of(layer.group) == layer.group for layer in layers)
    return "ring" in forms and "xla" not in forms and whole


def _form(kernels: Kernels, layer: LayerSpec, layout: CacheLayout) -> str:
    """Returns what has a layer: "ring", "stream" (both for a Hopper), "triton" or "xla"."""
    if kernels.attention == "pallas_gpu_hopper":
        if attention_ring_gpu.fits(layer, layout):
            return "ring"
        if attention_stream_gpu.fits(layer, layout):
            return "stream"
    sees = layer.has_softmax and (layer.kind == "full" or layer.window > 0)
    fits = attention_gpu.fits(jnp.dtype(layout.dtype), layer.head_dim, layer.group, layer.feature_map)
    return "triton" if kernels.attention != "xla" and sees and fits else "xla"


def _by_kernel(
    layer: LayerSpec,
    layout: CacheLayout,
    interpret: bool,
    rotation: attention_gpu.Rotation | None,
    weights: Weights,
    cache: LayerCache,
    clock: Clock,
    qkv_BKAH: jax.Array,
    arrivals_BK: jax.Array,
) -> tuple[jax.Array, LayerCache, jax.Array]:
    """Returns what `attention_xla.attend` does, by the kernel, and `arrivals_BK`."""
    now = clock.after_a_step()
    if not layer.has_linear:
        angles = _new_angles(layer, clock)
        rotation = attention_gpu.Rotation(*angles) if angles else None
    plan = attention_gpu.Plan(
        window=_window(layer, layout),
        epsilon=layer.norm_epsilon,
        normed_features=layer.feature_map_after_qk_norm,
        interpret=interpret,
    )
    o_BKGH, k_BKSH, v_BKSH, arrivals_BK = attention_gpu.attend(
        plan,
        qkv_BKAH,
        cache["k_BKSH"],
        cache["v_BKSH"],
        _new_slots(layer, layout, clock),
        now.length_B - now.start_B,
        arrivals_BK,
        scales=(weights["q_norm_H"], weights["k_norm_H"]) if layer.qk_norm else None,
        rotation=rotation,
        state_BKPH=cache.get("state_BKPH"),
        unfolded=now.unfolded,
        branch_scales=(weights["softmax_norm_KGH"], weights["linear_norm_KGH"]) if layer.has_linear else None,
    )
    return o_BKGH.reshape(o_BKGH.shape[0], -1), cache | {"k_BKSH": k_BKSH, "v_BKSH": v_BKSH}, arrivals_BK


def _by_stream_kernel(
    layer: LayerSpec,
    early: bool,
    moment: attention_stream_gpu_plan.Moment,
    weights: Weights,
    cache: LayerCache,
    qkv_BKAH: jax.Array,
    ready_P: jax.Array,
) -> tuple[jax.Array, LayerCache, jax.Array]:
    """Returns what `attention_xla.attend` does, by the kernel for positioned keys, and `ready_P`."""
    o_BKGH, k_BKSH, v_BKSH, ready_P = attention_stream_gpu.attend(
        attention_stream_gpu.Plan(layer.norm_epsilon, early),
        qkv_BKAH,
        cache["k_BKSH"],
        cache["v_BKSH"],
        moment,
        ready_P,
        (weights["q_norm_H"], weights["k_norm_H"]) if layer.qk_norm else None,
    )
    return o_BKGH.reshape(o_BKGH.shape[0], -1), cache | {"k_BKSH": k_BKSH, "v_BKSH": v_BKSH}, ready_P


def _window(layer: LayerSpec, layout: CacheLayout) -> int:
    return layout.capacity if layer.kind == "full" else layout.kept_window(layer)


def _new_slots(layer: LayerSpec, layout: CacheLayout, clock: Clock) -> jax.Array:
    """Returns the slots of the new keys, [B]."""
    if layer.kind == "full":
        return clock.length_B
    return jnp.broadcast_to(clock.steps % layout.slots(layer), clock.length_B.shape)


def _new_angles(layer: LayerSpec, clock: Clock) -> tuple[jax.Array, jax.Array] | None:
    """Returns sines and cosines [B, H/2] of the new tokens' positions, where they have any."""
    return None if layer.rope_theta is None else rope_angles(clock.length_B, layer.head_dim, layer.rope_theta)


def _by_ring_kernel(
    layer: LayerSpec,
    layout: CacheLayout,
    turns_4TR: jax.Array,
    moment: attention_ring_gpu.Moment,
    weights: Weights,
    cache: LayerCache,
    qkv_BKAH: jax.Array,
    ready_P: jax.Array,
) -> tuple[jax.Array, LayerCache, jax.Array]:
    """Returns what `attention_xla.attend` does, by the kernel for rings, and `ready_P`."""
    ones = jnp.ones(layer.head_dim, jnp.float32)
    o_BKGH, k_BKSH, v_BKSH, ready_P = attention_ring_gpu.attend(
        attention_ring_gpu.Plan(layout.kept_window(layer), layer.norm_epsilon, layer.qk_norm),
        qkv_BKAH,
        cache["k_BKSH"],
        cache["v_BKSH"],
        cache["state_BKPH"],
        moment,
        turns_4TR,
        (weights["q_norm_H"], weights["k_norm_H"]) if layer.qk_norm else (ones, ones),
        (weights["softmax_norm_KGH"], weights["linear_norm_KGH"]),
        ready_P,
    )
    return o_BKGH.reshape(o_BKGH.shape[0], -1), cache | {"k_BKSH": k_BKSH, "v_BKSH": v_BKSH}, ready_P
