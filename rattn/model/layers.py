"""Norms, rotary positions, the gated feed-forward, and how weights start."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kernels_pallas.normed_sum.plain import normed

ACTIVATIONS = {"gelu": jax.nn.gelu, "silu": jax.nn.silu}


def matrix_init(fan_in: int, gain: float = 1.0) -> nnx.Initializer:
    """Truncated normal with standard deviation gain / √fan_in (LeCun et al. 1998, "Efficient BackProp")."""
    # The factor restores the deviation that truncation at two sigmas takes away.
    stddev = gain / math.sqrt(fan_in) / 0.87962566103423978
    return jax.nn.initializers.truncated_normal(stddev)


def residual_gain(layers: int) -> float:
    """Gain of the matrices that write to the residual stream: 1 / √(2·layers) (GPT-2: two writes a layer)."""
    return 1 / math.sqrt(2 * layers)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """x / RMS(x) over the last dim, times `scale`, computed in float32; a zero row stays zero."""
    return normed(x, scale, epsilon).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm over the last dim, with a learned scale of any trailing shape."""

    def __init__(self, shape: tuple[int, ...], logical: tuple[str, ...], epsilon: float):
        self.scale = nnx.Param(jnp.ones(shape, jnp.float32), logical=logical)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the normed x in x's dtype."""
        return rms_norm(x, self.scale[...], self.epsilon)


def rope(x_BTNH: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotates dims (i, i + H/2) of each head by position · theta^(−2i/H) (Su et al. 2021, half-split pairs).

    Args:
      x_BTNH: queries or keys.
      positions: [T], or [B, T] where rows differ.
      theta: base of the frequencies.
    """
    sin, cos = rope_angles(positions, x_BTNH.shape[-1], theta)
    if positions.ndim == 1:
        sin, cos = sin[None], cos[None]
    return rotate(x_BTNH, sin[:, :, None, :], cos[:, :, None, :])


def rope_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Returns the sines and cosines of position · theta^(−2i/H), float32 [*positions.shape, H/2]."""
    half = head_dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None] * jnp.expand_dims(frequencies, tuple(range(positions.ndim)))
    return jnp.sin(angles), jnp.cos(angles)


def rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotates dims (i, i + H/2) of x by angles [..., H/2] that broadcast against it; in float32, back to x's dtype."""
    # The halves change places by a reversal, which XLA fuses; a concatenation is a kernel of its own on a GPU.
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    rotated = pairs * cos[..., None, :] + jnp.flip(pairs, -2) * jnp.stack([-sin, sin], axis=-2)
    return rotated.reshape(x.shape).astype(x.dtype)


class GatedMLP(nnx.Module):
    """W_down(activation(x·W_gate) ⊙ x·W_up): GeGLU or SwiGLU (Shazeer 2020)."""

    def __init__(self, width: int, mlp_width: int, layers: int, activation: str, *, rngs: nnx.Rngs):
        up = matrix_init(width)
        self.gate_DF = nnx.Param(up(rngs.params(), (width, mlp_width), jnp.float32), logical=("embed", "mlp"))
        self.up_DF = nnx.Param(up(rngs.params(), (width, mlp_width), jnp.float32), logical=("embed", "mlp"))
        down = matrix_init(mlp_width, residual_gain(layers))
        self.down_FD = nnx.Param(down(rngs.params(), (mlp_width, width), jnp.float32), logical=("mlp", "embed"))
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns [B, T, D] in x's dtype."""
        dtype = x_BTD.dtype
        hidden = self.activation(_matmul(x_BTD, self.gate_DF, dtype)) * _matmul(x_BTD, self.up_DF, dtype)
        return _matmul(hidden, self.down_FD, dtype)


def _matmul(x: jax.Array, weight: nnx.Param, dtype: DTypeLike) -> jax.Array:
    return jnp.einsum("btd,df->btf", x, weight[...].astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def float32_product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Einsum of arrays of one dtype that adds up and returns float32.

    Its backward multiplies with the cotangent rounded to that dtype: JAX's own would multiply in float32, which leaves
    a GPU's fast bfloat16 units idle. Every index of `equation` stands in two of its three terms.
    """
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _float32_product_forward(equation: str, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple]:
    return float32_product(equation, a, b), (a, b)


def _float32_product_backward(equation: str, operands: tuple, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = operands
    terms, out = equation.split("->")
    of_a, of_b = terms.split(",")
    cotangent = cotangent.astype(a.dtype)
    return jnp.einsum(f"{out},{of_b}->{of_a}", cotangent, b), jnp.einsum(f"{of_a},{out}->{of_b}", a, cotangent)


float32_product.defvjp(_float32_product_forward, _float32_product_backward)


@jax.custom_vjp
def look_up(table_VD: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns table_VD[tokens], [*tokens.shape, D].

    Its gradient is added up in float32 and rounded once to the table's dtype: in bfloat16 the sum over a frequent token
    would stop growing, and a GPU adds float32 in place faster.
    """
    return table_VD[tokens]


def _look_up_forward(table_VD: jax.Array, tokens: jax.Array) -> tuple[jax.Array, tuple]:
    return look_up(table_VD, tokens), (table_VD, tokens)


def _look_up_backward(residuals: tuple, cotangent: jax.Array) -> tuple[jax.Array, None]:
    table_VD, tokens = residuals
    gradient = jnp.zeros(table_VD.shape, jnp.float32).at[tokens].add(cotangent.astype(jnp.float32))
    return gradient.astype(table_VD.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)
