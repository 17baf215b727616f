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

from rattn.decoding import attention, fold_gpu, mosaic_gpu, products_gpu, products_persistent_gpu
from rattn.decoding.attention import Moment
from rattn.decoding.cache import Cache, CacheLayout, Clock, LayerCache, fold
from rattn.decoding.kernels import Kernels
from rattn.decoding.layers import LayerSpec, Weights, embed, finish, logits, project, projection_weights
from rattn.decoding.products_persistent_gpu import ROWS_OF_A_COPY
from rattn.decoding.sampling import Sampling, sample
from rattn.model.layers import ACTIVATIONS

# Sequences for which steps with kernels for rings were timed as a CUDA graph and as kernels, and kernels were faster.
WITHOUT_GRAPHS = range(32, 129)


class Notes(NamedTuple):
    """In which programs of kernels tell each other how far they are; layers and steps hand them on.

    With an odd number of layers XLA copies `products` in each step, for its two change places in each layer.

    Attributes:
      attention: of its kernels.
      products: counters, where they are one kernel.
    """

    attention: attention.Notes
    products: tuple[jax.Array, jax.Array] | None


class Handed(NamedTuple):
    """What a layer hands to the next.

    Attributes:
      x_BD: the residual stream; padded where products are one kernel, so that its first B rows are the sequences'.
      qkv_BKAH: the next layer's projections of it, likewise; None behind the last layer.
      notes: of the kernels.
    """

    x_BD: jax.Array
    qkv_BKAH: jax.Array | None
    notes: Notes


def first_notes(layers: tuple[LayerSpec, ...], layout: CacheLayout, kernels: Kernels) -> Notes:
    """Returns what a first step takes."""
    persistent = kernels.products_for(layout.batch) == "persistent"
    return Notes(
        attention=attention.first_notes(layers, layout, kernels),
        products=products_persistent_gpu.zero_counters() if persistent else None,
    )


def compiler_options(layers: tuple[LayerSpec, ...], layout: CacheLayout, kernels: Kernels) -> dict[str, str] | None:
    """Returns XLA's options for `sampled_steps`, which go before XLA_FLAGS.

    Kernels for a Hopper copy what they may before the one in front is done, for which they have to begin before. XLA
    would record each as a CUDA graph of its own, which begins when the one in front has ended.

    Where they begin early, so does what is behind them. Pallas' kernels wait before they read what others wrote; but
    XLA does not know that these let the next one begin, and may load what its own kernels read before they wait. So a
    step is a graph where XLA stands between kernels: in a layer, or to pad or cut what they take or give.
    """
    products_alone = kernels.products_for(layout.batch) != "xla" and layout.batch % ROWS_OF_A_COPY == 0
    alone = products_alone and attention.is_rings_and_kernels(layers, layout, kernels)
    return {"xla_gpu_enable_command_buffer": ""} if alone and layout.batch in WITHOUT_GRAPHS else None


def step(
    layers: tuple[LayerSpec, ...],
    model: ConfigDict,
    kernels: Kernels,
    rotations: tuple[attention.Rotation, ...],
    moments: dict[int, Moment | None],
    weights: dict[str, Any],
    cache: Cache,
    tokens_B: jax.Array,
    notes: Notes,
) -> tuple[jax.Array, Cache, Notes]:
    """Runs int32 tokens_B through the model; returns float32 logits_BV, the cache with them in it, and the next notes.

    At most C steps may follow one another without `folded`.

    Args:
      layers: the model's.
      model: `config.model`.
      kernels: what they run.
      rotations: of `attention.ring_rotations`.
      moments: of `attention.moments`, of this step.
      weights: the model's.
      cache: with the tokens before.
      tokens_B: each sequence's next token.
      notes: of the step before, or `first_notes`.
    """
    B, x_BD = tokens_B.shape[0], embed(weights["model"], tokens_B)
    products = kernels.products_for(B)
    if products == "persistent":
        x_BD = mosaic_gpu.padded(x_BD)
    per_layer = weights["layers"]
    handed = Handed(
        x_BD=x_BD,
        qkv_BKAH=_first_projections(layers[0], kernels, products, per_layer[0], x_BD),
        notes=notes,
    )
    kept = []
    for number, (layer, rotation, layer_cache) in enumerate(zip(layers, rotations, cache.layers, strict=True)):
        following = projection_weights(per_layer[number + 1]) if number + 1 < len(layers) else None
        how, position = (layer, cache.layout, kernels, products, number > 0), (rotation, moments[layers.index(layer)])
        handed, layer_cache = _layer_step(
            *how, position, per_layer[number], following, layer_cache, cache.clock, handed
        )
        kept.append(layer_cache)
    x_BD = handed.x_BD[:B]
    after = Cache(tuple(kept), cache.clock.after_a_step(), cache.layout)
    return logits(model, weights["model"], x_BD), after, handed.notes


def folded(layers: tuple[LayerSpec, ...], kernels: Kernels, weights: dict[str, Any], cache: Cache) -> Cache:
    """Returns the cache with every state caught up."""

    def state_of(layer: LayerSpec, own: Weights, kept: LayerCache) -> jax.Array:
        if kernels.attention != "xla" and fold_gpu.fits(layer, cache.layout):
            return fold_gpu.fold(layer, cache.layout, kept, cache.clock, interpret=kernels.interpret)
        return fold(layer, cache.layout, own, kept, cache.clock)

    done = tuple(
        kept | {"state_BKPH": state_of(layer, own, kept)} if layer.has_linear else kept
        for layer, own, kept in zip(layers, weights["layers"], cache.layers, strict=True)
    )
    return Cache(done, dataclasses.replace(cache.clock, unfolded=jnp.zeros_like(cache.clock.unfolded)), cache.layout)


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
    rotations = attention.ring_rotations(layers, cache.layout, kernels, weights)

    def body(carry: tuple, now: tuple) -> tuple[tuple, None]:
        (rings, clock, tokens_B, out_SB, notes), (index, moments_now) = carry, now
        # XLA would make their slices part of the kernels' calls, each of them anew.
        moments_now = jax.lax.optimization_barrier(moments_now)
        # The states are not in the carry: a step only reads them.
        whole = tuple(ring | state for ring, state in zip(rings, states, strict=True))
        before = Cache(whole, clock, cache.layout)
        logits_BV, after, notes = step(layers, model, kernels, rotations, moments_now, weights, before, tokens_B, notes)
        tokens_B = sample(logits_BV, keys_B, first + index, sampling)
        # As an output of the loop it would be copied to its row, which stands between kernels on a GPU.
        out_SB = jnp.where(steps_S[:, None] == index, tokens_B, out_SB)
        return (_rings(after), after.clock, tokens_B, out_SB, notes), None

    steps_S, none_SB = jnp.arange(steps, dtype=jnp.int32), jnp.zeros((steps, *tokens_B.shape), jnp.int32)
    start = (_rings(cache), cache.clock, tokens_B, none_SB, first_notes(layers, cache.layout, kernels))
    each = steps_S, attention.moments(layers, cache.layout, kernels, cache.clock, steps)
    (rings, clock, _, out_SB, _), _ = jax.lax.scan(body, start, each)
    whole = tuple(ring | state for ring, state in zip(rings, states, strict=True))
    return jnp.swapaxes(out_SB, 0, 1), folded(layers, kernels, weights, Cache(whole, clock, cache.layout))


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
    early: bool,
    position: tuple[attention.Rotation, Moment | None],
    weights: Weights,
    following: Weights | None,
    cache: LayerCache,
    clock: Clock,
    handed: Handed,
) -> tuple[Handed, LayerCache]:
    """One layer's part of `step`: its attention and feed-forward, and the projections of the layer after it.

    `early`, `position` and `clock` are as `attention.attend` takes them, `following` that layer's weights.
    """
    x_BD, qkv_BKAH, (told, counters) = handed
    o_BE, cache, told = attention.attend(layer, layout, kernels, early, position, weights, cache, clock, qkv_BKAH, told)
    if products == "xla":
        x_BD = finish(layer, weights, x_BD, o_BE)
        qkv_BKAH = project(layer, following, x_BD) if following else None
        return Handed(x_BD, qkv_BKAH, Notes(told, counters)), cache
    given = {"out": weights["out_DE"], "gate_up": weights["gate_up_JCFD"], "down": weights["down_DF"]}
    if following:
        given["qkv"] = following["qkv_KAHD"].reshape(-1, x_BD.shape[1])
    how = {"epsilon": layer.norm_epsilon, "activation": ACTIVATIONS[layer.activation]}
    if products == "persistent":
        x_BD, qkv_BN, counters = products_persistent_gpu.run(o_BE, x_BD, given, counters, **how)
    else:
        x_BD, qkv_BN = products_gpu.run(o_BE, x_BD, given, interpret=kernels.interpret, **how)
    qkv_BKAH = qkv_BN.reshape(-1, *following["qkv_KAHD"].shape[:-1]) if following else None
    return Handed(x_BD, qkv_BKAH, Notes(told, counters)), cache
