"""Random weights and caches for scripts/bench_decode.py, made on the device without arrays beside them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rattn.decoding import cache as caches


def random_weights(models):
    """Draws weights on the device; models, given by their weights' shapes, share all that they have in common."""
    largest = max(models, key=lambda shapes: len(jax.tree.leaves(shapes)))
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(largest))))

    @functools.partial(jax.jit, static_argnums=(1, 2, 3))
    def draw(key, shape, dtype, fan_in):
        return (jax.random.normal(key, shape, jnp.bfloat16) * fan_in**-0.5).astype(dtype)

    def leaf(path, shape):
        if "norm" in path[-1].key:
            return jnp.ones(shape.shape, shape.dtype)
        in_last = len(shape.shape) == 2 or path[-1].key.endswith("D")
        return draw(next(keys), shape.shape, shape.dtype, shape.shape[-1 if in_last else 0])

    return jax.tree_util.tree_map_with_path(leaf, largest)


def pick(weights, shapes):
    """Returns the part of `weights` that a model has."""
    layers = tuple(
        {name: kept[name] for name in w} for w, kept in zip(shapes["layers"], weights["layers"], strict=True)
    )
    return {"model": weights["model"], "layers": layers}


def random_cache(decoder, point):
    """Makes a cache whose sequences stand C tokens before its end."""
    layout = decoder.layout(point.batch, point.context)
    shapes = caches.cache_shapes(decoder.layers, layout)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(seed, shape, dtype):
        # Not by jax.random, whose float32 bits would take more memory than what they become.
        index = jax.lax.iota(jnp.uint32, int(np.prod(shape))) * jnp.uint32(2654435761) + seed
        return ((index >> 16).astype(jnp.float32) / 2**15 - 1).astype(dtype).reshape(shape)

    layers = [
        {name: draw(np.uint32(seed), x.shape, x.dtype) for name, x in layer.items()}
        for seed, layer in enumerate(shapes.layers)
    ]
    return caches.Cache(tuple(layers), clock_of(point), layout)


def clock_of(point):
    """The clock of sequences that stand C tokens before the end of their cache."""
    length_B = jnp.full(point.batch, point.context - point.fold, jnp.int32)
    none_B = jnp.zeros(point.batch, jnp.int32)
    return caches.Clock(length_B, none_B, jnp.zeros_like(none_B), jnp.int32(0), jnp.int32(0))


def keys_of(point):
    """The keys of a batch's draws."""
    return jax.random.split(jax.random.key(0), point.batch)
