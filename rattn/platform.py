"""Process-wide settings of JAX and XLA, made once before JAX's backends start."""

import os
import pathlib

import jax
from etils import epath

# The share of a GPU's memory that JAX takes at start; its own default leaves a quarter unused.
GPU_MEMORY_FRACTION = "0.94"


def configure(deterministic_cache: epath.PathLike | None = None) -> None:
    """Keeps JAX from searching for a TPU that is not there, and makes the settings that GPUs need.

    With libtpu installed on a machine without TPU chips, JAX would try, warn at length and fall back. What the user has
    set, JAX_PLATFORMS, a flag in XLA_FLAGS or XLA_PYTHON_CLIENT_MEM_FRACTION, is left alone.

    Args:
      deterministic_cache: folder, in which a GPU's compiled programs and tuned choices are kept, so that every run that
        is given it computes the same bits. TPUs and CPUs need no such thing.
    """
    gpus = list(pathlib.Path("/dev").glob("nvidia[0-9]*"))
    chips = list(pathlib.Path("/dev").glob("accel*")) + list(pathlib.Path("/dev/vfio").glob("[0-9]*"))
    if not chips and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cuda,cpu" if gpus else "cpu")
    if not gpus:
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY_FRACTION)
    os.environ["XLA_FLAGS"] = with_flags(os.environ.get("XLA_FLAGS", ""), gpu_flags(deterministic_cache is not None))
    if deterministic_cache is not None:
        # XLA keeps its autotuner's choices there as well.
        jax.config.update("jax_compilation_cache_dir", os.fspath(deterministic_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def gpu_flags(deterministic: bool) -> dict[str, str]:
    """The XLA flags of a GPU run; `docs/step_log_gpu.md` has what they save, and the flags that did not help.

    Args:
      deterministic: leave out operations whose result depends on the order in which threads arrive, such as adding
        up an embedding's gradient in place.
    """
    # XLA would make one product of those of q, k and v, and copy their operands together and their results apart.
    flags = {"xla_gpu_dot_merger_threshold_mb": "0"}
    return flags | ({"xla_gpu_exclude_nondeterministic_ops": "true"} if deterministic else {})


def with_flags(given: str, flags: dict[str, str]) -> str:
    """Adds flags to the value of XLA_FLAGS; one that is there already stays as it is."""
    present = {flag.partition("=")[0].lstrip("-") for flag in given.split()}
    return " ".join([*given.split(), *(f"--{name}={value}" for name, value in flags.items() if name not in present)])
