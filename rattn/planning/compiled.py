"""What the TPU compiler says of the real training step, without a TPU."""

import contextlib
import dataclasses
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from rattn.errors import UserError
from rattn.model.parameters import model_spec
from rattn.optimizer import learning_rate_schedule, make_optimizer
from rattn.planning.collectives import Collective, by_kind, find_collectives
from rattn.planning.topologies import Topology
from rattn.sharding import Sharding, make_mesh
from rattn.step import batch_shapes, make_train_step
from rattn.train import state_layout


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's figures for one device.

    Attributes:
      fits: False where the compiler refused for want of memory; the total is then what it says it needs.
      argument_bytes: state and batch.
      total_bytes: all that the step allocates: the state, updated in place, and what lives during a step.
      peak_bytes: the most of it in use at once; the rest is lost between buffers.
      program_bytes: the program itself.
      host_bytes: what was offloaded to the host's memory.
      collectives: of one step.
      seconds: how long tracing and compiling took.
    """

    fits: bool
    argument_bytes: int
    total_bytes: int
    peak_bytes: int
    program_bytes: int
    host_bytes: int
    collectives: tuple[Collective, ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Figures without the single operations."""
        figures = dataclasses.asdict(dataclasses.replace(self, collectives=()))
        return figures | {"collectives": by_kind(list(self.collectives))}


def topology_devices(topology: Topology) -> Sequence[jax.Device]:
    """Returns the devices of slices that are not there.

    Raises:
      UserError: libtpu is not installed, or does not know the slice.
    """
    # Without these libtpu asks a metadata server, warns, and refuses to be loaded beside another process's.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5p-8"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **slices).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"The TPU compiler cannot be had for {topology.name} ({reason}); install the tpu extra (libtpu), or leave "
            "--compile away."
        ) from error


def compile_step(config: ConfigDict, topology: Topology) -> tuple[Any, float]:
    """Compiles the training step for the slices; returns (the executable, seconds)."""
    started = time.monotonic()
    sharding = Sharding(make_mesh(config.mesh, topology_devices(topology)))
    sharding.check_batch(config)
    spec = model_spec(config.model, sharding.operators())
    optimizer = make_optimizer(config.optimizer, config.total_steps, spec.logical)
    shapes, shardings = state_layout(spec, optimizer, sharding)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
    schedule = learning_rate_schedule(config.optimizer, config.total_steps)
    step = make_train_step(config, spec, optimizer, schedule, sharding)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated))
    # The persistent cache cannot read back what was compiled for a TPU that is not there.
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        executable = jitted.lower(state, batch_shapes(config, sharding.batch)).compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    return executable, time.monotonic() - started


def compiled_figures(config: ConfigDict, topology: Topology) -> Compiled:
    """Compiles the step and reads memory and collectives; a step that is too large is an answer, not an error."""
    started = time.monotonic()
    try:
        executable, seconds = compile_step(config, topology)
    except jax.errors.JaxRuntimeError as error:
        needed = _needed_bytes(str(error))
        if needed is None:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"The TPU compiler refused the step for {topology}: {reason[:300]}") from error
        return Compiled(False, 0, needed, needed, 0, 0, (), time.monotonic() - started)
    memory = executable.memory_analysis()
    return Compiled(
        fits=True,
        argument_bytes=memory.argument_size_in_bytes,
        total_bytes=memory.total_allocation_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        program_bytes=memory.generated_code_size_in_bytes,
        host_bytes=memory.host_temp_size_in_bytes,
        collectives=tuple(find_collectives(executable.as_text())),
        seconds=seconds,
    )


def _needed_bytes(message: str) -> int | None:
    """Bytes that a refusal for want of memory names, None where the message is about something else."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT])", message)
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1)) if found else None


@contextlib.contextmanager
def ticking(what: str) -> Iterator[None]:
    """Keeps a line of standard error alive while something long runs: seconds so far, on a terminal once a second."""
    started, done = time.monotonic(), threading.Event()
    interval = 1.0 if sys.stderr.isatty() else 30.0
    end = "" if sys.stderr.isatty() else "\n"

    def tick() -> None:
        while not done.wait(interval):
            print(f"\r{what} … {time.monotonic() - started:.0f} s", end=end, file=sys.stderr, flush=True)

    print(f"{what} …", end=end, file=sys.stderr, flush=True)
    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        print(f"\r{what}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
