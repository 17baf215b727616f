"""The pure training and evaluation steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rattn.accumulation import accumulated
from rattn.model.loss import cross_entropy_sum, token_losses
from rattn.model.parameters import ModelSpec
from rattn.sharding import Sharding

Tree = Any
Batch = dict[str, jax.Array]


def batch_shapes(
    config: ConfigDict, sharding: jax.sharding.Sharding, rows: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a step's batch, or of one of so many rows, each laid out by `sharding`."""
    shape = (rows or config.batch_size, config.context_length)
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.bool_ if name == "loss_mask" else jnp.int32, sharding=sharding)
        for name in ("tokens", "targets", "segment_ids", "loss_mask")
    }


def make_train_step(
    config: ConfigDict,
    spec: ModelSpec,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    sharding: Sharding,
) -> Callable[[Tree, Batch], tuple[Tree, dict[str, jax.Array]]]:
    """Builds (state, batch) -> (state, metrics).

    The loss is the mean over the target tokens of the whole step, whatever the accumulation. A non-finite loss or
    gradient leaves parameters and optimizer state as they were (`finite` is then False), for the next step is queued
    before anybody can look.

    `state` is {"parameters", "optimizer", "step"}; `batch` holds tokens, targets, segment_ids (int32) and loss_mask
    (bool), each [B, T]. Metrics are scalars: loss in nats, grad_norm before clipping, learning_rate, finite, and the
    average keys a query saw (`keys_full`, `keys_window`), from which the model FLOPs are counted.
    """

    def objective(parameters: Tree, batch: Batch, num_targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = spec.merge(parameters)
        x_BTD = model.hidden(batch["tokens"], batch["segment_ids"])
        total, nats = cross_entropy_sum(
            model,
            x_BTD,
            batch["targets"],
            batch["loss_mask"],
            z_loss=config.loss.z_loss,
            chunk_tokens=config.loss.chunk_tokens,
        )
        return total / num_targets, nats / num_targets

    gradient = jax.grad(objective, has_aux=True)

    def train_step(state: Tree, batch: Batch) -> tuple[Tree, dict[str, jax.Array]]:
        parameters = state["parameters"]
        num_targets = jnp.maximum(batch["loss_mask"].sum().astype(jnp.float32), 1.0)
        gradients, loss = accumulated(
            lambda working, microbatch: gradient(working, microbatch, num_targets),
            parameters,
            batch,
            config,
            spec,
            sharding,
        )
        grad_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, new_optimizer = optimizer.update(gradients, state["optimizer"], parameters)
        new = {"parameters": optax.apply_updates(parameters, updates), "optimizer": new_optimizer}
        old = {"parameters": parameters, "optimizer": state["optimizer"]}
        kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)
        with jax.numpy_dtype_promotion("standard"):
            learning_rate = jnp.asarray(schedule(state["step"]), jnp.float32)
        metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate, "finite": finite}
        metrics |= _keys_seen(batch["segment_ids"], config.model.window)
        return {**kept, "step": state["step"] + 1}, metrics

    return train_step


def make_eval_step(spec: ModelSpec, chunk_tokens: int) -> Callable[[Tree, Batch, jax.Array], dict[str, jax.Array]]:
    """Builds (parameters, batch, token_bytes_V) -> a batch's sums: nats (float32), targets and text_bytes (int32)."""

    def eval_step(parameters: Tree, batch: Batch, token_bytes_V: jax.Array) -> dict[str, jax.Array]:
        model = spec.merge(parameters)
        x_BTD = model.hidden(batch["tokens"], batch["segment_ids"])
        _, nats = cross_entropy_sum(
            model, x_BTD, batch["targets"], batch["loss_mask"], z_loss=0.0, chunk_tokens=chunk_tokens
        )
        text_bytes = jnp.where(batch["loss_mask"], token_bytes_V[batch["targets"]], 0).sum()
        return {"nats": nats, "targets": batch["loss_mask"].sum(), "text_bytes": text_bytes}

    return eval_step


def make_token_loss_step(spec: ModelSpec, chunk_tokens: int) -> Callable[[Tree, Batch], tuple[jax.Array, jax.Array]]:
    """Builds (parameters, batch) -> nats_BT (float32) and hit_BT (bool), those of targets that do not count too."""

    def token_loss_step(parameters: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model = spec.merge(parameters)
        x_BTD = model.hidden(batch["tokens"], batch["segment_ids"])
        return token_losses(model, x_BTD, batch["targets"], chunk_tokens=chunk_tokens)

    return token_loss_step


def _keys_seen(segment_ids_BT: jax.Array, window: int) -> dict[str, jax.Array]:
    """Average keys that a query sees in its document, all of them and within the window."""
    positions = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)[None, :]
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids_BT[:, :1], bool), segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]], axis=1
    )
    start_BT = jax.lax.cummax(jnp.where(starts, positions, 0), axis=1)
    seen_BT = positions - start_BT + 1
    return {
        "keys_full": seen_BT.astype(jnp.float32).mean(),
        "keys_window": jnp.minimum(seen_BT, window).astype(jnp.float32).mean(),
    }
