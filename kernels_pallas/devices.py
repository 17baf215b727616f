"""What the kernels ask about the devices of this process."""

import jax


def on_hopper() -> bool:
    """Returns whether this process computes on a Hopper GPU."""
    return jax.default_backend() == "gpu" and jax.local_devices()[0].compute_capability == "9.0"


def multiprocessors() -> int:
    """Returns how many multiprocessors this process's first device has; 0 where it does not say."""
    return getattr(jax.local_devices()[0], "core_count", None) or 0
