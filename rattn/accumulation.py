"""Gradients summed over the microbatches of a step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rattn.model.parameters import ModelSpec
from rattn.model.transformer import cut_blocks
from rattn.optimizer import matrices

Tree = Any
Gradient = Callable[[Tree, Any], tuple[Tree, jax.Array]]


def accumulated(gradient: Gradient, parameters: Tree, batch: Any, config: ConfigDict, spec: ModelSpec) -> tuple:
    """Sums (gradients, loss) over `config.accumulation_steps` microbatches, in float32.

    Row i goes to microbatch i mod steps, so it stays on its device. Weight matrices are rounded to the compute dtype
    once for all microbatches, as a layer would round them in each; where blocks are not scanned, their gradients are
    added up block by block and stacked once at the end.

    Args:
      gradient: (parameters, microbatch) -> (gradients, loss).
      parameters: float32, of `spec`'s shapes.
      batch: tree of [B, T] arrays.
      config: says how many microbatches, and whether blocks are scanned.
      spec: tells weight matrices from what stays float32.
    """
    steps = config.accumulation_steps
    if steps == 1:
        return gradient(parameters, batch)
    microbatches = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, steps, *x.shape[1:]), 0, 1), batch)
    apart = not config.model.scan_blocks
    dtype = jnp.dtype(config.model.compute_dtype)
    rounded = jax.tree.map(lambda x, matrix: x.astype(dtype) if matrix else x, parameters, matrices(spec.logical))
    working = rounded | {"blocks": cut_blocks(rounded["blocks"])} if apart else rounded

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
    return (gradients | {"blocks": _stack(gradients["blocks"])} if apart else gradients), loss


def _stack(blocks: list[Tree]) -> Tree:
    """Undoes `cut_blocks`."""
    return jax.tree.map(lambda *entries: jnp.concatenate(entries), *blocks)
