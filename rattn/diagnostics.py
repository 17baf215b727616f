"""What the two branches of RATTENTION do in a model that is being trained, layer by layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rattn.model.loss import cross_entropy_sum
from rattn.model.parameters import ModelSpec
from rattn.model.transformer import Layer, Transformer
from rattn.sharding import Sharding

Tree = Any
Batch = dict[str, jax.Array]


def branch_diagnostics(
    spec: ModelSpec, config: ConfigDict, sharding: Sharding
) -> Callable[[Tree, Batch], dict[str, float]]:
    """Builds (parameters, batch) -> metrics; a compiled function of its own, beside the training step.

    For each layer i with two branches, over the batch's tokens that are not padding:

    - `branches/layer_i/softmax_rms`, `…/linear_rms`: root mean square of a branch before its RMSNorm;
    - `branches/layer_i/linear_share`: ‖l‖² / (‖s‖² + ‖l‖²), s and l being the branches after their norms and scales,
      whose sum the layer's output is projected from;

    the same three without `layer_i/` as the mean over those layers; and `branches/loss` and
    `branches/loss_without_linear`, nats a token of this batch as it is and with the linear branch zeroed in all of
    them. Empty where no layer has two branches.
    """

    def diagnose(parameters: Tree, batch: Batch) -> tuple[list[dict[str, jax.Array]], jax.Array, jax.Array]:
        model, zeroed = spec.merge(parameters), spec.merge(without_linear_branch(parameters))
        tokens_BT, segment_ids_BT = batch["tokens"], batch["segment_ids"]
        x_BTD, statistics = model.walk(
            tokens_BT, segment_ids_BT, lambda layer, x_BTD: _branch_statistics(layer, x_BTD, segment_ids_BT)
        )
        zeroed_x_BTD = zeroed.hidden(tokens_BT, segment_ids_BT)
        return statistics, loss(model, x_BTD, batch), loss(zeroed, zeroed_x_BTD, batch)

    def loss(model: Transformer, x_BTD: jax.Array, batch: Batch) -> jax.Array:
        targets, mask = batch["targets"], batch["loss_mask"]
        chunk_tokens = config.loss.chunk_tokens
        _, nats = cross_entropy_sum(model, x_BTD, targets, mask, z_loss=0.0, chunk_tokens=chunk_tokens)
        return nats / jnp.maximum(mask.sum(), 1).astype(jnp.float32)

    compiled = jax.jit(diagnose, out_shardings=sharding.replicated)

    def metrics(parameters: Tree, batch: Batch) -> dict[str, float]:
        if "rattention" not in config.model.pattern:
            return {}
        statistics, with_linear, without = jax.device_get(compiled(parameters, batch))
        layers = _by_layer(statistics, len(config.model.pattern))
        values = {
            f"branches/{name}": sum(float(layer[name]) for layer in layers.values()) / len(layers)
            for name in ("softmax_rms", "linear_rms", "linear_share")
        }
        for index, layer in sorted(layers.items()):
            values |= {f"branches/layer_{index}/{name}": float(value) for name, value in layer.items()}
        return values | {"branches/loss": float(with_linear), "branches/loss_without_linear": float(without)}

    return metrics


def without_linear_branch(parameters: Tree) -> Tree:
    """Returns parameters in which the linear branch of every layer that also has a softmax branch adds nothing."""
    if not isinstance(parameters, dict):
        return parameters
    changed = {key: without_linear_branch(value) for key, value in parameters.items()}
    if "linear_norm" in parameters and "softmax_norm" in parameters:
        changed["linear_norm"] = jax.tree.map(jnp.zeros_like, parameters["linear_norm"])
    return changed


def _branch_statistics(layer: Layer, x_BTD: jax.Array, segment_ids_BT: jax.Array) -> dict[str, jax.Array]:
    """Returns float32 scalars by name, of the layer at the input x_BTD; {} with fewer than two branches."""
    mixer = layer.mixer
    if not (mixer.has_softmax and mixer.has_linear):
        return {}
    softmax_BTNH, linear_BTNH = mixer.branches(layer.mixer_norm(x_BTD), segment_ids_BT)
    kept_BT11 = (segment_ids_BT > 0)[:, :, None, None]

    def energy(o_BTNH: jax.Array) -> jax.Array:
        return jnp.where(kept_BT11, jnp.square(o_BTNH.astype(jnp.float32)), 0.0).sum()

    elements = jnp.maximum(kept_BT11.sum(), 1).astype(jnp.float32) * (softmax_BTNH.shape[2] * softmax_BTNH.shape[3])
    softmax, linear = energy(mixer.softmax_norm(softmax_BTNH)), energy(mixer.linear_norm(linear_BTNH))
    return {
        "softmax_rms": jnp.sqrt(energy(softmax_BTNH) / elements),
        "linear_rms": jnp.sqrt(energy(linear_BTNH) / elements),
        "linear_share": linear / jnp.maximum(softmax + linear, jnp.finfo(jnp.float32).tiny),
    }


def _by_layer(statistics: list[dict[str, Any]], pattern_length: int) -> dict[int, dict[str, Any]]:
    """Unstacks what `Transformer.walk` found into {index of the layer in the depth: statistics}."""
    layers, repeats = {}, 0
    for place, found in enumerate(statistics[:pattern_length]):
        for name, values in found.items():
            repeats = len(values)
            for repeat, value in enumerate(values):
                layers.setdefault(repeat * pattern_length + place, {})[name] = value
    for place, found in enumerate(statistics[pattern_length:]):
        if found:
            layers[repeats * pattern_length + place] = found
    return layers
