"""Process-wide settings of JAX and XLA, made once before JAX's backends start."""

import os
import pathlib

import jax

# The share of a GPU's memory that JAX takes at start; its own default leaves a quarter unused.
GPU_MEMORY_FRACTION = "0.94"


def configure() -> None:
    """Keeps JAX from searching for a TPU that is not there, and sets what GPUs need (`gpu_settings`).

    With libtpu installed on a machine without TPU chips, JAX would try, warn at length and fall back. An explicit
    JAX_PLATFORMS is left alone.
    """
    gpus = list(pathlib.Path("/dev").glob("nvidia[0-9]*"))
    chips = list(pathlib.Path("/dev").glob("accel*")) + list(pathlib.Path("/dev/vfio").glob("[0-9]*"))
    if not chips and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cuda,cpu" if gpus else "cpu")
    if gpus:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY_FRACTION)
