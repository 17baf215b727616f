"""What the Triton kernels of a step share."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from kernels_pallas import devices


def let_next_begin(x: jax.Array, interpret: bool) -> jax.Array:
    """Returns x, an int32 scalar, after which programs of the next kernel may take the place of those that have ended.

    They do not run ahead: XLA has every kernel that it starts so early wait for all that the one before writes
    (`griddepcontrol.wait`, CUDA's programmatic dependent launch). What is saved is the time from the last program's end
    to the next one's start. Nothing on a GPU before Hopper.
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
