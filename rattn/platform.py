"""Process-wide settings of JAX, made once before its backends start."""

import pathlib

import jax


def configure() -> None:
    """Keeps JAX from searching for a TPU that is not there.

    With libtpu installed on a machine without TPU chips, JAX would try, warn at length and fall back. An explicit
    JAX_PLATFORMS is left alone.
    """
    chips = list(pathlib.Path("/dev").glob("accel*")) + list(pathlib.Path("/dev/vfio").glob("[0-9]*"))
    if not chips and not jax.config.jax_platforms:
        gpus = list(pathlib.Path("/dev").glob("nvidia[0-9]*"))
        jax.config.update("jax_platforms", "cuda,cpu" if gpus else "cpu")
