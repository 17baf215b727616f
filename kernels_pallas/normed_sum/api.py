"""The public function: it checks the arguments, chooses an implementation and calls it."""

import importlib

import jax

IMPLEMENTATIONS = ("plain", "pallas_gpu")
DTYPES = ("float32", "bfloat16")


def normed_sum(
    a_BTNH: jax.Array,
    b_BTNH: jax.Array,
    a_scale_NH: jax.Array,
    b_scale_NH: jax.Array,
    *,
    epsilon: float,
    implementation: str | None = None,
) -> jax.Array:
    """Adds two arrays after an RMSNorm each (arXiv 2506.15545, section 3).

        o = a / √(mean(a²) + ε) · a_scale + b / √(mean(b²) + ε) · b_scale

    The means are over H. All arithmetic is float32 and only the sum is rounded. A row of zeros adds zero. The result is
    differentiable in the four arrays.

    Args:
      a_BTNH: float32 or bfloat16.
      b_BTNH: as a.
      a_scale_NH: float32.
      b_scale_NH: float32.
      epsilon: ε > 0.
      implementation: "plain", or "pallas_gpu", which is Hopper kernels where they fit and "plain" elsewhere; by default
        the fastest for the backend.

    Returns:
      o_BTNH in a's dtype.

    Raises:
      ValueError, TypeError: one sentence with the argument and its value.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r} is unknown: use one of {', '.join(IMPLEMENTATIONS)}.")
    if a_BTNH.ndim != 4:
        raise ValueError(f"a_BTNH has shape {a_BTNH.shape}: it must have the four dims of its name.")
    if str(a_BTNH.dtype) not in DTYPES:
        raise TypeError(f"a_BTNH has dtype {a_BTNH.dtype}: use one of {', '.join(DTYPES)}.")
    _check("b_BTNH", b_BTNH, a_BTNH.shape, a_BTNH.dtype)
    for name, scale in (("a_scale_NH", a_scale_NH), ("b_scale_NH", b_scale_NH)):
        _check(name, scale, a_BTNH.shape[2:], "float32")
    implementation = implementation or implementation_for(jax.default_backend())
    # Kernels import their backend's dialect: only when they are asked for.
    module = importlib.import_module(f"{__package__}.{implementation}")
    return module.forward(a_BTNH, b_BTNH, a_scale_NH, b_scale_NH, epsilon=epsilon)


def implementation_for(platform: str) -> str:
    """Returns the fastest implementation on "tpu", "gpu" or "cpu", which need not be the platform of this process."""
    return "pallas_gpu" if platform == "gpu" else "plain"


def _check(name, x, shape, dtype):
    if x.shape != shape:
        raise ValueError(f"{name} has shape {x.shape}: it must be {shape}.")
    if x.dtype != dtype:
        raise TypeError(f"{name} has dtype {x.dtype}: it must be {dtype}.")
