"""Gradients summed over the microbatches of a step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from rattn.model.parameters import ModelSpec
from rattn.model.transformer import cut_blocks
from rattn.optimizer import matrices
from rattn.sharding import Sharding, ShardingRules

Tree = Any
Dims = tuple[str, ...]
Gradient = Callable[[Tree, Any], tuple[Tree, jax.Array]]
Exchange = Callable[[jax.Array, Dims], jax.Array]


def accumulated(
    gradient: Gradient, parameters: Tree, batch: Any, config: ConfigDict, spec: ModelSpec, sharding: Sharding
) -> tuple:
    """Sums (gradients, loss) over `config.accumulation_steps` microbatches, in float32.

    Row i goes to microbatch i mod steps, so it stays on its device. Weight matrices are rounded to the compute dtype
    once for all microbatches, as a layer would round them in each; where blocks are not scanned, their gradients are
    added up block by block and stacked once at the end.

    Args:
      gradient: (parameters, microbatch) -> (gradients, loss).
      parameters: float32, of `spec`'s shapes.
      batch: tree of [B, T] arrays.
      config: says how many microbatches, whether blocks are scanned, and how often devices exchange weights and
        gradients.
      spec: tells weight matrices from what stays float32.
      sharding: of parameters and batch.
    """
    if config.accumulation_steps == 1:
        return gradient(parameters, batch)
    if config.mesh.exchange == "microbatch":
        return _summed(gradient, parameters, batch, config, spec)
    layout = jax.tree.map(lambda x: x.spec, sharding.parameters(spec.logical, spec.shapes))

    def of_own_rows(parameters: Tree, batch: Any) -> tuple[Tree, jax.Array]:
        gradients, loss = _summed(
            gradient,
            parameters,
            batch,
            config,
            spec,
            before=lambda shard, dims: _gathered(shard, dims, sharding.rules),
            after=lambda whole, dims: _scattered(whole, dims, sharding.rules),
        )
        return gradients, jax.lax.psum(loss, sharding.rules.batch)

    run = jax.shard_map(
        of_own_rows,
        mesh=sharding.mesh,
        in_specs=(layout, sharding.batch.spec),
        out_specs=(layout, P()),
        check_vma=False,  # A Pallas call does not say over which axes its result varies.
    )
    return run(parameters, batch)


def _gathered(shard: jax.Array, dims: Dims, rules: ShardingRules) -> jax.Array:
    """Returns the whole parameter on every device, from their shards."""
    for dim, axis in enumerate(rules.spec(dims)):
        if axis in rules.batch:
            shard = jax.lax.all_gather(shard, axis, axis=dim, tiled=True)
    return shard


def _scattered(whole: jax.Array, dims: Dims, rules: ShardingRules) -> jax.Array:
    """Returns each device's shard of a gradient that is added up over the devices."""
    axes = rules.spec(dims)
    for dim, axis in enumerate(axes):
        if axis in rules.batch:
            whole = jax.lax.psum_scatter(whole, axis, scatter_dimension=dim, tiled=True)
    return jax.lax.psum(whole, tuple(axis for axis in rules.batch if axis not in axes))


def _summed(
    gradient: Gradient,
    parameters: Tree,
    batch: Any,
    config: ConfigDict,
    spec: ModelSpec,
    before: Exchange = lambda weight, dims: weight,
    after: Exchange = lambda total, dims: total,
) -> tuple:
    """Does `accumulated`'s work; `before` gets the weights of all microbatches, `after` the sums of their gradients."""
    steps = config.accumulation_steps
    microbatches = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, steps, *x.shape[1:]), 0, 1), batch)
    apart = not config.model.scan_blocks
    dtype = jnp.dtype(config.model.compute_dtype)
    rounded = jax.tree.map(lambda x, matrix: x.astype(dtype) if matrix else x, parameters, matrices(spec.logical))
    logical = spec.logical
    if apart:
        rounded = rounded | {"blocks": cut_blocks(rounded["blocks"])}
        logical = logical | {"blocks": [logical["blocks"]] * len(rounded["blocks"])}
    working = jax.tree.map(before, rounded, logical)

    def of_microbatch(working: Tree, microbatch: Any) -> tuple[Tree, jax.Array]:
        if not apart:
            return gradient(working, microbatch)
        # XLA sees through the stack, which the model cuts again, and through that of the gradients.
        gradients, loss = gradient(working | {"blocks": _stack(working["blocks"])}, microbatch)
        return gradients | {"blocks": cut_blocks(gradients["blocks"])}, loss

    def add(total: Tree, microbatch: Any) -> tuple[Tree, None]:
        terms = of_microbatch(working, microbatch)
        return jax.tree.map(lambda x, term: x + term.astype(jnp.float32), total, terms), None

    # From zeros, so that the model is compiled once.
    shapes = jax.eval_shape(of_microbatch, working, jax.tree.map(lambda x: x[0], microbatches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    (gradients, loss), _ = jax.lax.scan(add, zeros, microbatches)
    gradients = jax.tree.map(after, gradients, logical)
    return (gradients | {"blocks": _stack(gradients["blocks"])} if apart else gradients), loss


def _stack(blocks: list[Tree]) -> Tree:
    """Undoes `cut_blocks`."""
    return jax.tree.map(lambda *entries: jnp.concatenate(entries), *blocks)
