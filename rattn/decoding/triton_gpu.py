"""What the Triton kernels of a step share."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

from kernels_pallas import devices

LOG2_E = 1.4426950408889634


def let_next_begin(x: jax.Array, interpret: bool) -> jax.Array:
    """Returns x, an int32 scalar, after which programs of the next kernel may take the place of those that have ended.

    Those of XLA's and of Triton's do not run ahead: XLA has every kernel that it starts so early wait for all that the
    one before writes (`griddepcontrol.wait`, CUDA's programmatic dependent launch). What is saved is the time from the
    last program's end to the next one's start. Mosaic's wait where they say so. Nothing on a GPU before Hopper.
    """
    if interpret or not devices.on_hopper():
        return x
    like = jax.ShapeDtypeStruct((1,), jnp.int32)
    (x,) = plgpu.elementwise_inline_asm(
        "griddepcontrol.launch_dependents; mov.b32 $0, $1;",
        args=(x + jnp.zeros(1, jnp.int32),),
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[like],
    )
    return jnp.max(x)


def cells(rows: jax.Array, valid: jax.Array, past: int, columns: jax.Array) -> tuple[tuple, jax.Array]:
    """Returns the indices of columns, [n] or [rows, n], of rows, and the mask of those that are valid, [rows, n].

    A row that is not valid gets the index `past`, past the end: interpret mode applies the mask after the access.
    """
    columns = columns if columns.ndim == 2 else columns[None]
    shape = (rows.shape[0], columns.shape[1])
    index = jnp.broadcast_to(jnp.where(valid, rows, past)[:, None], shape)
    return (index, jnp.broadcast_to(columns, shape)), jnp.broadcast_to(valid[:, None], shape)


def dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int, interpret: bool) -> jax.Array:
    """Sums over these dims, in float32."""
    if interpret:  # the CPU multiplies no bfloat16; the products are the same
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jax.lax.dot_general(a, b, (((a_dim,), (b_dim,)), ((), ())), preferred_element_type=jnp.float32)


def exp(x: jax.Array, less: jax.Array | float, interpret: bool) -> jax.Array:
    """Returns e^(x − less) of float32 arrays, to 2⁻²² of it and |less| · 2⁻²⁴; zero where float32 would be denormal.

    Two instructions, where CUDA's own takes nine. x and less may not both be very large.
    """
    if interpret:
        return jnp.exp(x - less)
    offset = jnp.broadcast_to(-LOG2_E * less, x.shape)
    (y,) = plgpu.elementwise_inline_asm(
        f"fma.rn.f32 $0, $1, 0f{np.float32(LOG2_E).view(np.uint32):08X}, $2; ex2.approx.ftz.f32 $0, $0;",
        args=(x, offset),
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return y
