"""What the model calls and does not define, so that sharding and kernels are chosen outside of it."""

import dataclasses
from collections.abc import Callable

import jax

from kernels_pallas.normed_sum import normed_sum
from kernels_pallas.residual_linear_attention import residual_linear_attention
from rattn.model.softmax_attention import blockwise_attention


def _unconstrained(x: jax.Array, *dims: str | None) -> jax.Array:
    return x


@dataclasses.dataclass(frozen=True)
class Operators:
    """The functions handed to the model; the defaults are those of one device.

    Attributes:
      softmax_attention: (q_BTNH, k_BSKH, v_BSKH, *, window: int | None, q_segment_ids, kv_segment_ids) -> o_BTNH.
      linear_attention: (q_BTNH, k_BSKH, v_BSKH, *, window: int, feature_map, q_segment_ids, kv_segment_ids) -> o_BTNH.
      normed_sum: (a_BTNH, b_BTNH, a_scale_NH, b_scale_NH, *, epsilon) -> o_BTNH.
      constrain: (array, *logical dims) -> the same array, laid out as the sharding rules say.
    """

    softmax_attention: Callable[..., jax.Array] = blockwise_attention
    linear_attention: Callable[..., jax.Array] = residual_linear_attention
    normed_sum: Callable[..., jax.Array] = normed_sum
    constrain: Callable[..., jax.Array] = _unconstrained
