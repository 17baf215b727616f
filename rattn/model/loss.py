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
        nats = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nats = jnp.where(mask, nats, 0.0)
        penalty = jnp.where(mask, z_loss * log_z * log_z, 0.0) if z_loss else jnp.zeros_like(nats)
        return (nats + penalty).sum(), nats.sum()

    if not chunk_tokens or chunk_tokens >= T:
        return chunk_sum(x_BTD, targets_BT, loss_mask_BT)

    def chunks(x: jax.Array) -> jax.Array:
        # Chunk c takes every (T / chunk_tokens)-th token, so that tokens cut over devices stay where they are.
        return jnp.moveaxis(x.reshape(x.shape[0], chunk_tokens, T // chunk_tokens, *x.shape[2:]), 2, 0)

    totals = jax.lax.map(
        lambda xs: jax.checkpoint(chunk_sum)(*xs), (chunks(x_BTD), chunks(targets_BT), chunks(loss_mask_BT))
    )
    return totals[0].sum(), totals[1].sum()
