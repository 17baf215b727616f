"""Next-token cross-entropy that never holds the logits of more than a slice of the row."""

import jax
import jax.numpy as jnp

from rattn.model.transformer import Transformer


def cross_entropy_sum(
    model: Transformer,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    loss_mask_BT: jax.Array,
    *,
    z_loss: float,
    chunk_tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """Sums −log p(target) over the masked-in tokens.

    Args:
      model: gives the logits of a slice of x.
      x_BTD: the normed hidden state.
      targets_BT: int32 next tokens.
      loss_mask_BT: bool, False where the next token is of another document or padding.
      z_loss: weight of log²Z (PaLM's auxiliary loss).
      chunk_tokens: tokens of a row whose logits exist at a time (they are recomputed in the backward); 0: all.

    Returns:
      (what to minimise, the plain cross-entropy), both float32 sums in nats.
    """
    T = x_BTD.shape[1]
    # Once for all chunks: they would each gather it from the devices again, and scatter their gradients.
    unembedding_VD = model.unembedding()

    def chunk_sum(x: jax.Array, targets: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.logits(x, unembedding_VD)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        nats = log_z - _target_logits(logits, targets)
        nats = jnp.where(mask, nats, 0.0)
        penalty = jnp.where(mask, z_loss * log_z * log_z, 0.0) if z_loss else jnp.zeros_like(nats)
        return (nats + penalty).sum(), nats.sum()

    if not chunk_tokens or chunk_tokens >= T:
        return chunk_sum(x_BTD, targets_BT, loss_mask_BT)

    chunks = [_chunks(x, chunk_tokens) for x in (x_BTD, targets_BT, loss_mask_BT)]
    totals = jax.lax.map(lambda xs: jax.checkpoint(chunk_sum)(*xs), tuple(chunks))
    return totals[0].sum(), totals[1].sum()


def token_losses(
    model: Transformer, x_BTD: jax.Array, targets_BT: jax.Array, *, chunk_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Computes −log p(target) of every token, and whether the target is the likeliest token.

    Arguments as `cross_entropy_sum`.

    Returns:
      nats_BT in float32, 0 or more, and hit_BT, bool.
    """
    unembedding_VD = model.unembedding()

    def chunk_losses(x: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.logits(x, unembedding_VD)
        nats = jax.nn.logsumexp(logits, axis=-1) - _target_logits(logits, targets)
        return nats, jnp.argmax(logits, axis=-1) == targets

    if not chunk_tokens or chunk_tokens >= x_BTD.shape[1]:
        return chunk_losses(x_BTD, targets_BT)
    chunks = _chunks(x_BTD, chunk_tokens), _chunks(targets_BT, chunk_tokens)
    losses = jax.lax.map(lambda xs: chunk_losses(*xs), chunks)
    nats_BT, hit_BT = (jnp.moveaxis(loss, 0, 2).reshape(targets_BT.shape) for loss in losses)
    return nats_BT, hit_BT


def _target_logits(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Picks each target's logit, [B, T].

    By a comparison and a sum of one term, which fuse with the passes over the logits; a gather would write their
    gradient by a scatter of its own, and over devices that share the vocabulary it would move them.
    """
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2) == targets_BT[..., None]
    return jnp.where(is_target, logits_BTV, 0.0).sum(-1)


def _chunks(x: jax.Array, chunk_tokens: int) -> jax.Array:
    """Cuts [B, T, …] into [T / chunk_tokens, B, chunk_tokens, …]."""
    # Chunk c takes every (T / chunk_tokens)-th token, so that tokens cut over devices stay where they are.
    B, T, *rest = x.shape
    return jnp.moveaxis(x.reshape(B, chunk_tokens, T // chunk_tokens, *rest), 2, 0)
