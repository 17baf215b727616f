"""One token of every sequence through all layers, and the loop that samples.

A local layer costs O(W + P·H) a token, whatever came before. Nothing is moved: a ring takes the new key in one slot,
a full layer's cache in one row for each sequence, a state nothing until the next fold.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rattn.decoding import (
    attention_gpu,
    attention_ring_gpu,
    attention_stream_gpu,
    attention_stream_gpu_plan,
    attention_xla,
    mosaic_gpu,
    products_gpu,
    products_persistent_gpu,
    products_persistent_plan,
)
from rattn.decoding.cache import Cache, CacheLayout, Clock, LayerCache, folded
from rattn.decoding.layers import LayerSpec, Weights, embed, finish, logits, project, projection_weights
from rattn.decoding.sampling import Sampling, sample
from rattn.model.layers import ACTIVATIONS, rope_angles


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Which kernels a step runs.

    Attributes:
      attention: "xla"; "pallas_gpu", `rattn.decoding.attention_gpu` in layers that it fits; or "pallas_gpu_hopper",
        with `attention_ring_gpu` and `attention_stream_gpu` in those that these fit.
      products: "xla"; "pallas_gpu", `rattn.decoding.products_gpu` for up to its MOST_ROWS rows; or "pallas_gpu_hopper",
        with `products_persistent_gpu` from LEAST_ROWS to MOST_ROWS of its plan. The weights lie for both of these
        kernels, or for "xla".
      interpret: run Triton's kernels on a CPU, to test them.
    """

    attention: str
    products: str
    interpret: bool = False

    def products_for(self, rows: int) -> str:
        """Returns what takes the products of so many rows: "persistent", "triton" or "xla"."""
        plan = products_persistent_plan
        if self.products == "pallas_gpu_hopper" and plan.LEAST_ROWS <= rows <= plan.MOST_ROWS:
            return "persistent"
        return "triton" if self.products != "xla" and rows <= products_gpu.MOST_ROWS else "xla"


class Handed(NamedTuple):
    """What a layer hands to the next.

    Attributes:
      x_BD: the residual stream; padded where products are one kernel, so that its first B rows are the sequences'.
      qkv_BKAH: the next layer's projections of it, likewise; None behind the last layer.
      arrivals_BK: zeros, where attention is a kernel.
      ready_P: zeros, where it is `attention_stream_gpu`.
      counters: of products, where they are one kernel.
    """

    x_BD: jax.Array
    qkv_BKAH: jax.Array | None
    arrivals_BK: jax.Array | None
    ready_P: jax.Array | None
    counters: tuple[jax.Array, jax.Array] | None


def ring_rotations(
    layers: tuple[LayerSpec, ...], layout: CacheLayout, kernels: Kernels, weights: dict[str, Any]
) -> tuple[attention_gpu.Rotation | jax.Array | None, ...]:
    """Returns for each layer what its kernel positions keys with that are kept as projected, the same in all steps.

    Made before a loop of steps: XLA would make it in each of them.
    """

    def of(layer: LayerSpec, w: Weights) -> attention_gpu.Rotation | jax.Array | None:
        dtype = jnp.dtype(layout.dtype)
        if _ring_attends(kernels, layer, layout):
            return attention_ring_gpu.turns(layer.head_dim, layer.rope_theta, w.get("k_norm_H"), dtype)
        if not _kernel_attends(kernels, layer, dtype) or not layer.has_linear or layer.rope_theta is None:
            return None
        return attention_gpu.ring_rotation(
            layout.slots(layer), layer.head_dim, layer.rope_theta, w.get("k_norm_H"), dtype
        )

    return tuple(of(layer, w) for layer, w in zip(layers, weights["layers"], strict=True))


Moment = attention_ring_gpu.Moment | attention_stream_gpu_plan.Moment


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
        known_B = now.length_B - now.start_B
        if _ring_attends(kernels, layer, layout):
            heads = layer.group, layer.head_dim, layer.rope_theta
            return attention_ring_gpu.moment(at.steps % slots, known_B, now.unfolded, slots, *heads)
        if _stream_attends(kernels, layer, layout):
            new_B, angles = _new_slots(layer, layout, at), _new_angles(layer, at)
            return attention_stream_gpu_plan.moment(
                new_B, known_B, _window(layer, layout), slots, layer.kv_heads, angles
            )
        return None

    sorts = dict.fromkeys(layers)
    return {layers.index(layer): jax.vmap(functools.partial(of, layer))(jnp.arange(steps)) for layer in sorts}


def step(
    layers: tuple[LayerSpec, ...],
    model: ConfigDict,
    kernels: Kernels,
    rotations: tuple[attention_gpu.Rotation | jax.Array | None, ...],
    moments: dict[int, Moment | None],
    weights: dict[str, Any],
    cache: Cache,
    tokens_B: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Runs int32 tokens_B through the model; returns float32 logits_BV and the cache with them in it.

    At most C steps may follow one another without `folded`.

    Args:
      layers: the model's.
      model: `config.model`.
      kernels: what they run.
      rotations: of `ring_rotations`.
      moments: of `moments`, of this step.
      weights: the model's.
      cache: with the tokens before.
      tokens_B: each sequence's next token.
    """
    B, x_BD = tokens_B.shape[0], embed(weights["model"], tokens_B)
    products = kernels.products_for(B)
    streams = any(_stream_attends(kernels, layer, cache.layout) for layer in layers)
    if products == "persistent":
        x_BD = mosaic_gpu.padded(x_BD)
    per_layer = weights["layers"]
    handed = Handed(
        x_BD=x_BD,
        qkv_BKAH=_first_projections(layers[0], kernels, products, per_layer[0], x_BD),
        arrivals_BK=None if kernels.attention == "xla" else jnp.zeros((B, model.kv_heads), jnp.int32),
        ready_P=attention_stream_gpu.none_ready() if streams else None,
        counters=products_persistent_gpu.zero_counters() if products == "persistent" else None,
    )
    kept = []
    for number, (layer, rotation, layer_cache) in enumerate(zip(layers, rotations, cache.layers, strict=True)):
        following = projection_weights(per_layer[number + 1]) if number + 1 < len(layers) else None
        how = layer, cache.layout, kernels, products, number == 0 and _stream_attends(kernels, layer, cache.layout)
        position = rotation, moments[layers.index(layer)]
        handed, layer_cache = _layer_step(
            *how, position, per_layer[number], following, layer_cache, cache.clock, handed
        )
        kept.append(layer_cache)
    x_BD = handed.x_BD[:B]
    return logits(model, weights["model"], x_BD), Cache(tuple(kept), cache.clock.after_a_step(), cache.layout)


def sampled_steps(
    layers: tuple[LayerSpec, ...],
    model: ConfigDict,
    kernels: Kernels,
    weights: dict[str, Any],
    cache: Cache,
    tokens_B: jax.Array,
    keys_B: jax.Array,
    first: jax.Array,
    *,
    sampling: Sampling,
    steps: int,
) -> tuple[jax.Array, Cache]:
    """Samples `steps` tokens of every sequence, at most C, and folds.

    Args:
      layers: the model's.
      model: `config.model`.
      kernels: as `step`.
      weights: the model's.
      cache: in which the states have caught up.
      tokens_B: int32, each sequence's newest token, which is not in the cache yet.
      keys_B: of each sequence's draws.
      first: int32, how many tokens were sampled before: the draw of token n is a function of a sequence's key and n.
      sampling: how.
      steps: how many.

    Returns:
      int32 tokens [B, steps], and the cache with all but the last of them.
    """
    states = [{name: x for name, x in kept.items() if name == "state_BKPH"} for kept in cache.layers]
    rotations = ring_rotations(layers, cache.layout, kernels, weights)

    def body(carry: tuple, now: tuple) -> tuple[tuple, jax.Array]:
        (rings, clock, tokens_B), (index, moments_now) = carry, now
        # XLA would make their slices part of the kernels' calls, each of them anew.
        moments_now = jax.lax.optimization_barrier(moments_now)
        # The states are not in the carry: a step only reads them.
        whole = tuple(ring | state for ring, state in zip(rings, states, strict=True))
        logits_BV, after = step(
            layers, model, kernels, rotations, moments_now, weights, Cache(whole, clock, cache.layout), tokens_B
        )
        tokens_B = sample(logits_BV, keys_B, first + index, sampling)
        return (_rings(after), after.clock, tokens_B), tokens_B

    start = (_rings(cache), cache.clock, tokens_B)
    each = jnp.arange(steps, dtype=jnp.int32), moments(layers, cache.layout, kernels, cache.clock, steps)
    (rings, clock, _), out_SB = jax.lax.scan(body, start, each)
    whole = tuple(ring | state for ring, state in zip(rings, states, strict=True))
    return jnp.swapaxes(out_SB, 0, 1), folded(layers, weights["layers"], Cache(whole, clock, cache.layout))


def _rings(cache: Cache) -> tuple[LayerCache, ...]:
    """Returns the keys and values of each layer, without the states."""
    return tuple({name: x for name, x in layer.items() if name != "state_BKPH"} for layer in cache.layers)


def _first_projections(
    layer: LayerSpec, kernels: Kernels, products: str, weights: Weights, x_BD: jax.Array
) -> jax.Array:
    """Returns qkv_BKAH of the first layer, in front of which no other's products stand."""
    if products != "triton":
        return project(layer, weights, x_BD)
    squares_1B = jnp.sum(jnp.square(x_BD.astype(jnp.float32)), axis=1)[None]
    qkv_KAHD = weights["qkv_KAHD"]
    qkv_ND = qkv_KAHD.reshape(-1, x_BD.shape[1])
    qkv_BN = products_gpu.project(x_BD, squares_1B, qkv_ND, layer.norm_epsilon, interpret=kernels.interpret)
    return qkv_BN.reshape(-1, *qkv_KAHD.shape[:-1])


# Traced once for each kind of layer; XLA inlines it.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _layer_step(
    layer: LayerSpec,
    layout: CacheLayout,
    kernels: Kernels,
    products: str,
    streams_first: bool,
    position: tuple[attention_gpu.Rotation | jax.Array | None, Moment | None],
    weights: Weights,
    following: Weights | None,
    cache: LayerCache,
    clock: Clock,
    handed: Handed,
) -> tuple[Handed, LayerCache]:
    """One layer's part of `step`: its attention and feed-forward, and the projections of the layer after it.

    `streams_first` where it is the first layer of all, behind kernels of XLA's that may write what the stream kernel
    reads early elsewhere.

    `following` are that layer's weights for them; `clock` is the one before the token.
    """
    x_BD, qkv_BKAH, arrivals_BK, ready_P, counters = handed
    rotation, moment = position
    if _ring_attends(kernels, layer, layout):
        o_BE, cache = _by_ring_kernel(layer, layout, rotation, moment, weights, cache, qkv_BKAH)
    elif _stream_attends(kernels, layer, layout):
        o_BE, cache, ready_P = _by_stream_kernel(layer, not streams_first, moment, weights, cache, qkv_BKAH, ready_P)
    elif _kernel_attends(kernels, layer, x_BD.dtype):
        o_BE, cache, arrivals_BK = _by_kernel(
            layer, layout, kernels.interpret, rotation, weights, cache, clock, qkv_BKAH, arrivals_BK
        )
    else:
        o_BE, cache = attention_xla.attend(layer, layout, weights, cache, clock, qkv_BKAH[: clock.length_B.shape[0]])
    if products == "xla":
        x_BD = finish(layer, weights, x_BD, o_BE)
        qkv_BKAH = project(layer, following, x_BD) if following else None
        return Handed(x_BD, qkv_BKAH, arrivals_BK, ready_P, counters), cache
    given = {"out": weights["out_DE"], "gate_up": weights["gate_up_JCFD"], "down": weights["down_DF"]}
    if following:
        given["qkv"] = following["qkv_KAHD"].reshape(-1, x_BD.shape[1])
    how = {"epsilon": layer.norm_epsilon, "activation": ACTIVATIONS[layer.activation]}
    if products == "persistent":
        x_BD, qkv_BN, counters = products_persistent_gpu.run(o_BE, x_BD, given, counters, **how)
    else:
        x_BD, qkv_BN = products_gpu.run(o_BE, x_BD, given, interpret=kernels.interpret, **how)
    qkv_BKAH = qkv_BN.reshape(-1, *following["qkv_KAHD"].shape[:-1]) if following else None
    return Handed(x_BD, qkv_BKAH, arrivals_BK, ready_P, counters), cache


def _ring_attends(kernels: Kernels, layer: LayerSpec, layout: CacheLayout) -> bool:
    return kernels.attention == "pallas_gpu_hopper" and attention_ring_gpu.fits(layer, layout)


def _stream_attends(kernels: Kernels, layer: LayerSpec, layout: CacheLayout) -> bool:
    return kernels.attention == "pallas_gpu_hopper" and attention_stream_gpu.fits(layer, layout)


def _kernel_attends(kernels: Kernels, layer: LayerSpec, dtype: jnp.dtype) -> bool:
    sees = layer.has_softmax and (layer.kind == "full" or layer.window > 0)
    return (
        kernels.attention != "xla"
        and sees
        and attention_gpu.fits(dtype, layer.head_dim, layer.group, layer.feature_map)
    )


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
) -> tuple[jax.Array, LayerCache]:
    """Returns what `attention_xla.attend` does, by the kernel for rings."""
    ones = jnp.ones(layer.head_dim, jnp.float32)
    o_BKGH, k_BKSH, v_BKSH = attention_ring_gpu.attend(
        attention_ring_gpu.Plan(layout.kept_window(layer), layer.norm_epsilon, layer.qk_norm),
        qkv_BKAH,
        cache["k_BKSH"],
        cache["v_BKSH"],
        cache["state_BKPH"],
        moment,
        turns_4TR,
        (weights["q_norm_H"], weights["k_norm_H"]) if layer.qk_norm else (ones, ones),
        (weights["softmax_norm_KGH"], weights["linear_norm_KGH"]),
    )
    return o_BKGH.reshape(o_BKGH.shape[0], -1), cache | {"k_BKSH": k_BKSH, "v_BKSH": v_BKSH}
