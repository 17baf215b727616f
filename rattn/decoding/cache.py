"""The cache of a batch of sequences: its arrays, which slots hold what, and how the states catch up."""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas.residual_linear_attention import residual_linear_state
from kernels_pallas.residual_linear_attention.feature_map import feature_dim
from rattn.decoding.layers import LayerSpec, Weights, linear_key
from rattn.errors import UserError, nearest
from rattn.sharding import Sharding

LayerCache = dict[str, jax.Array]
# Bytes of an element, by the dtype that states may have.
STATE_ITEMSIZES = {"float32": 4, "bfloat16": 2}
LAYER_CACHE_DIMS = {
    "k_BKSH": ("batch", "kv_heads", None, "head_dim"),
    "v_BKSH": ("batch", "kv_heads", None, "head_dim"),
    "state_BKPH": ("batch", "kv_heads", None, "head_dim"),
}


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """What the shapes of a cache follow from, beside the model.

    Attributes:
      batch: sequences.
      capacity: most tokens of a sequence, prompt and output.
      window: W of the model that the cache is for.
      fold_tokens: C, at least 1: steps between two folds.
      dtype: of keys and values.
      state_dtype: of the states; what is read and added is added up in float32 whatever this says.
    """

    batch: int
    capacity: int
    window: int
    fold_tokens: int
    dtype: str
    state_dtype: str = "float32"

    def kept_window(self, layer: LayerSpec) -> int:
        """W, or all tokens that there can be where these are fewer."""
        return min(layer.window, self.capacity)

    def slots(self, layer: LayerSpec) -> int:
        """Keys that a layer keeps of a sequence."""
        if layer.kind == "full":
            return self.capacity
        return self.kept_window(layer) + (self.fold_tokens if layer.has_linear else 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clock:
    """Where the sequences of a batch stand.

    Attributes:
      length_B: int32, tokens of each sequence in the cache.
      start_B: int32, position of the first token of the document that it is in.
      segment_B: int32, that document's id.
      steps: int32, steps since prefill laid the rings out; token s of them is in slot s modulo the ring's size.
      unfolded: int32, steps since the last fold; at most C.
    """

    length_B: jax.Array
    start_B: jax.Array
    segment_B: jax.Array
    steps: jax.Array
    unfolded: jax.Array

    def after_a_step(self) -> "Clock":
        """Returns the clock one token later."""
        return dataclasses.replace(self, length_B=self.length_B + 1, steps=self.steps + 1, unfolded=self.unfolded + 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """All that decoding remembers.

    Attributes:
      layers: for each layer, the arrays of `LAYER_CACHE_DIMS` that it has.
      clock: where the sequences stand.
      layout: the static part.
    """

    layers: tuple[LayerCache, ...]
    clock: Clock
    layout: CacheLayout = dataclasses.field(metadata={"static": True})


def check_options(fold_tokens: int, state_dtype: str) -> None:
    """Raises UserError for a C or a dtype of states that no cache has."""
    if fold_tokens < 1:
        raise UserError(f"fold_tokens is {fold_tokens}; give the steps between two folds, at least 1.")
    if state_dtype not in STATE_ITEMSIZES:
        known = " or ".join(STATE_ITEMSIZES)
        raise UserError(f"state_dtype is {state_dtype!r}{nearest(state_dtype, STATE_ITEMSIZES)}; use {known}.")


def layer_cache_shapes(layer: LayerSpec, layout: CacheLayout) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a layer's arrays."""
    B, K, H = layout.batch, layer.kv_heads, layer.head_dim
    kept = jax.ShapeDtypeStruct((B, K, layout.slots(layer), H), jnp.dtype(layout.dtype))
    shapes = {"k_BKSH": kept, "v_BKSH": kept}
    if layer.has_linear:
        P = feature_dim(layer.feature_map, H)
        shapes["state_BKPH"] = jax.ShapeDtypeStruct((B, K, P, H), jnp.dtype(layout.state_dtype))
    return shapes


def cache_shapes(layers: tuple[LayerSpec, ...], layout: CacheLayout) -> Cache:
    """Shapes of a cache."""
    per_sequence = jax.ShapeDtypeStruct((layout.batch,), jnp.int32)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    clock = Clock(per_sequence, per_sequence, per_sequence, count, count)
    return Cache(tuple(layer_cache_shapes(layer, layout) for layer in layers), clock, layout)


def cache_shardings(layers: tuple[LayerSpec, ...], layout: CacheLayout, sharding: Sharding) -> Cache:
    """Shardings of a cache: sequences along `data` and `fsdp`, key/value heads along `model`."""
    per_sequence, count = sharding.named("batch"), sharding.replicated
    return Cache(
        tuple(
            {name: sharding.named(*LAYER_CACHE_DIMS[name]) for name in layer_cache_shapes(layer, layout)}
            for layer in layers
        ),
        Clock(per_sequence, per_sequence, per_sequence, count, count),
        layout,
    )


def empty_cache(layers: tuple[LayerSpec, ...], layout: CacheLayout, sharding: Sharding) -> Cache:
    """Makes a cache of sequences without tokens."""
    shapes = cache_shapes(layers, layout)
    zeros = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
        out_shardings=cache_shardings(layers, layout, sharding),
    )
    return zeros()


def cache_bytes(cache: Cache) -> int:
    """Bytes of the arrays of all layers, or of their shapes, summed."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))


def slots_of_age(ages: jax.Array, steps: jax.Array, slots: int) -> jax.Array:
    """Returns the ring slots that hold the tokens `ages` (int32, 0 is the newest) after `steps` steps."""
    return (steps - 1 - ages) % slots


def ages_of_slots(steps: jax.Array, slots: int) -> jax.Array:
    """Returns int32 [slots]: how many tokens before the newest each slot's token came, were the ring full."""
    return (steps - 1 - jnp.arange(slots, dtype=jnp.int32)) % slots


def known_ages(clock: Clock, ages: jax.Array) -> jax.Array:
    """Returns bool [B, ages]: whether a sequence's document reaches back to that age."""
    return ages[None, :] < (clock.length_B - clock.start_B)[:, None]


def fold(layer: LayerSpec, layout: CacheLayout, weights: Weights, cache: LayerCache, clock: Clock) -> jax.Array:
    """Returns state_BKPH with every key that has left the window; `clock.unfolded` counts from 0 again afterwards."""
    waiting = jnp.arange(layout.fold_tokens, dtype=jnp.int32)
    ages = layout.kept_window(layer) + waiting
    slots = slots_of_age(ages, clock.steps, layout.slots(layer))
    valid_BC = known_ages(clock, ages) & (waiting < clock.unfolded)[None]
    k_BCKH, v_BCKH = (
        jnp.where(valid_BC[:, :, None, None], jnp.swapaxes(jnp.take(cache[name], slots, axis=2), 1, 2), 0)
        for name in ("k_BKSH", "v_BKSH")
    )
    state_BKPH = residual_linear_state(
        linear_key(layer, weights, k_BCKH),
        v_BCKH,
        window=0,
        feature_map=layer.feature_map,
        initial_state=cache["state_BKPH"].astype(jnp.float32),
    )
    return state_BKPH.astype(cache["state_BKPH"].dtype)
