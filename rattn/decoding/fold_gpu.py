"""The fold of keys that left the window into a state, as one Triton kernel.

    state += Σ φ(k) ⊗ v

A state is read and written once, and nothing else is written. A program has half of φ, that of k or of −k, and some
columns of a head's values.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from rattn.decoding.cache import CacheLayout, Clock, LayerCache, slots_of_age
from rattn.decoding.layers import LayerSpec
from rattn.decoding.triton_gpu import cells, dot, exp, let_next_begin

# The least side of a matrix product, and the most keys that registers hold.
LEAST_SIDE, MOST_KEYS = 16, 64
# Columns of values that a program takes, at most.
COLUMNS = 64


def fits(layer: LayerSpec, layout: CacheLayout) -> bool:
    """Returns whether the kernel folds a layer's keys."""
    return (
        layer.feature_map == "softmax"
        and not layer.feature_map_after_qk_norm
        and layer.head_dim >= LEAST_SIDE
        and layer.head_dim & (layer.head_dim - 1) == 0
        and layout.fold_tokens <= MOST_KEYS
        and layout.dtype == "bfloat16"
    )


# Lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("layer", "layout", "interpret"))
def fold(layer: LayerSpec, layout: CacheLayout, cache: LayerCache, clock: Clock, *, interpret: bool) -> jax.Array:
    """Returns state_BKPH with every key that has left the window, in place if the cache's is donated.

    Args:
      layer: whose keys they are.
      layout: of the cache.
      cache: the layer's.
      clock: the cache's.
      interpret: run on a CPU, to test it.
    """
    k, v, state = cache["k_BKSH"], cache["v_BKSH"], cache["state_BKPH"]
    B, K, _, H = k.shape
    steps_B, unfolded_B = (jnp.broadcast_to(count, (B,)) for count in (clock.steps, clock.unfolded))
    counts_B3 = jnp.stack([steps_B, clock.length_B - clock.start_B, unfolded_B], axis=1)
    return pl.pallas_call(
        functools.partial(_kernel, layout.kept_window(layer), layout.fold_tokens, interpret),
        grid=(2 * pl.cdiv(H, COLUMNS), B * K),
        out_shape=jax.ShapeDtypeStruct(state.shape, state.dtype),
        input_output_aliases={3: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4 * max(1, H // 128), num_stages=1),
        interpret=interpret,
        name="decode_fold",
    )(counts_B3, k, v, state)


def _kernel(window, most, interpret, counts, k, v, state, folded):
    _, heads, slots, H = k.shape
    row = let_next_begin(pl.program_id(1), interpret)
    b, h = jax.lax.div(row, heads), jax.lax.rem(row, heads)
    part = pl.program_id(0)
    width = min(COLUMNS, H)
    sign, columns = jax.lax.rem(part, 2), jax.lax.div(part, 2) * width + jnp.arange(width)
    dims, _ = cells(sign * H + jnp.arange(H), jnp.full(H, True), 0, columns)
    before = state[b, h, *dims].astype(jnp.float32)
    steps, known, unfolded = (counts[b, n] for n in range(3))
    waiting = jnp.arange(max(LEAST_SIDE, pl.next_power_of_2(most)))
    ages = window + waiting
    valid = (waiting < unfolded) & (ages < known)
    at = slots_of_age(ages, steps, slots)

    def load(ref, columns):
        index, mask = cells(at, valid, slots, columns)
        return plgpu.load(ref.at[b, h, *index], mask=mask, other=jnp.zeros((), ref.dtype))

    x = load(k, jnp.arange(H)).astype(jnp.float32) * (1 - 2 * sign).astype(jnp.float32)
    powers = exp(x, jnp.max(x, axis=1)[:, None], interpret)
    phi = powers * (1.0 / jnp.sum(powers, axis=1))[:, None]
    folded[b, h, *dims] = (before + dot(phi.astype(v.dtype), load(v, columns), 0, 0, interpret)).astype(folded.dtype)
