"""From logits to the next token."""

import dataclasses

import jax
import jax.numpy as jnp

from rattn.errors import UserError

# Logits over less might be more than a float32 holds.
LEAST_TEMPERATURE = 1e-6


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: divides the logits; 0 takes the best token.
      top_k: only the best `top_k` tokens stand for the draw; 0: all.
      top_p: of these, only the best whose probabilities reach `top_p` together; 1: all.
      ids: only ids below it are drawn; 0: all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    ids: int = 0

    def __post_init__(self):
        """Raises UserError for what is no probability, count or temperature."""
        if not (self.temperature == 0 or self.temperature >= LEAST_TEMPERATURE):
            raise UserError(
                f"The temperature is {self.temperature}; give 0 for the best token, or {LEAST_TEMPERATURE} or more."
            )
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; give 0 for all tokens, or how many may be drawn.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; give a probability above 0 and at most 1.")


def sample(logits_BV: jax.Array, keys_B: jax.Array, place: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns int32 [B] tokens; the draw of a row is a function of its logits, its key and `place` alone.

    Args:
      logits_BV: float32.
      keys_B: of each row's draws.
      place: int32, how many tokens these keys have drawn before.
      sampling: how.
    """
    logits_BV = logits_BV[:, : sampling.ids or None]
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    V = logits_BV.shape[-1]
    ids_BV = None
    if 0 < sampling.top_k < V or sampling.top_p < 1:
        logits_BV, ids_BV = jax.lax.top_k(logits_BV, min(sampling.top_k or V, V))
    if sampling.top_p < 1:
        probabilities_BV = jax.nn.softmax(logits_BV, axis=-1)
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        logits_BV = jnp.where(before_BV < sampling.top_p, logits_BV, -jnp.inf)
    drawn_B = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, place), row))(keys_B, logits_BV)
    if ids_BV is not None:
        drawn_B = jnp.take_along_axis(ids_BV, drawn_B[:, None], axis=-1)[:, 0]
    return drawn_B.astype(jnp.int32)
