"""Compiles training steps for GPUs that are not there: memory and exchanges, before a machine is rented.

    python -m scripts.compile_gpu --topology h200:2 --config configs/rattn_3b.py --points rattention:512:8192 \\
        --set model.remat=save_operands model.scan_blocks=false loss.chunk_tokens=0

XLA's GPU compiler needs neither GPU nor driver, but the packages of the `cuda` extra. Points and the other arguments
are those of `scripts.bench_step`. Nothing runs, so nothing is tuned: products take cuBLAS' first choice. Peak is the
compiler's own count for one GPU, state included; bytes are what a GPU receives in a step, in brackets by `rattn.plan`.
"""

import argparse
import contextlib
import importlib
import importlib.util
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels_pallas import devices
from rattn import platform
from rattn.errors import UserError, nearest
from scripts.bench_step import lower_step, network_traffic, point_arguments

TARGETS = pathlib.Path(__file__).parent / "gpu_targets"
# Untuned, XLA's own Triton products take the smallest tiles.
COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def main() -> int:
    """Prints one line for each point."""
    parser = point_arguments(__doc__)
    parser.add_argument("--topology", default="h200:1", help="a target of scripts/gpu_targets, and how many")
    args = parser.parse_args()
    print(f"{'':<24} {'state GiB':>10} {'peak GiB':>10} {'compile s':>10}  GB received in a step")
    try:
        with absent_gpus(args.topology) as gpus:
            for point in args.points:
                row(args, point, gpus)
    except UserError as error:
        sys.exit(f"rattn: {error}")
    return 0


def row(args: argparse.Namespace, point: str, gpus: list[jax.Device]) -> None:
    """Compiles a point and prints it."""
    started = time.monotonic()
    built = lower_step(args, point, gpus)
    options = COMPILER_OPTIONS | platform.gpu_flags(deterministic=False)
    step = built.lowered.compile(compiler_options=options)
    memory = step.memory_analysis()
    received = ""
    if len(gpus) > 1:
        traffic = network_traffic(built, step)
        kinds = [f"{kind} {found['bytes'] / 1e9:.2f}" for kind, found in sorted(traffic["collectives"].items())]
        received = f"{', '.join(kinds)} ({sum(traffic['planned_bytes'].values()) / 1e9:.2f})"
    state, peak = memory.argument_size_in_bytes / 2**30, memory.peak_memory_in_bytes / 2**30
    print(f"{point:<24} {state:>10.1f} {peak:>10.1f} {time.monotonic() - started:>10.0f}  {received}", flush=True)


@contextlib.contextmanager
def absent_gpus(topology: str) -> Iterator[list[jax.Device]]:
    """Gives devices to shard and compile for; what is lowered inside takes the kernels of a Hopper GPU.

    Args:
      topology: a target of `scripts/gpu_targets` and how many, such as "h200:8"; all in one host.

    Raises:
      UserError: an unknown target, no number of GPUs, or JAX's CUDA plugin is not installed.
    """
    target, _, count = topology.partition(":")
    file = TARGETS / f"{target}.txtpb"
    if not file.exists():
        known = [path.stem for path in TARGETS.glob("*.txtpb")]
        raise UserError(f"There is no GPU target {target!r}{nearest(target, known)}; use {', '.join(known)}.")
    if count and not count.isdigit():
        raise UserError(f"--topology {topology!r} names no number of GPUs; write {target}:8.")
    # The plugin would ask the driver for its version.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        described = topologies.get_topology_desc(
            topology, "cuda", target_config=file.read_text(), topology=f"1x1x{count or 1}"
        )
    except NotImplementedError as error:
        raise UserError(f"JAX cannot compile for GPUs here ({error}); install the `cuda` extra.") from error
    hopper = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_abstract_mesh(AbstractMesh((), (), abstract_device=hopper)))
        stack.enter_context(mock.patch.object(devices, "on_hopper", return_value=True))
        stack.enter_context(mock.patch.object(devices, "multiprocessors", return_value=132))
        if importlib.util.find_spec("jla"):
            attention = importlib.import_module("jla.ops.mosaic_gpu.attention")
            stack.enter_context(mock.patch.object(attention, "supported", _but_for_the_gpu(attention.supported)))
        yield list(described.devices)


def _but_for_the_gpu(supported):
    """jax-linear-attention's check of its operands, which asks for a GPU once they are in order."""

    def check(*operands):
        reason = supported(*operands)
        return None if reason and "needs a CUDA GPU" in reason else reason

    return check


if __name__ == "__main__":
    sys.exit(main())
