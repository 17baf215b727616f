"""Several processes as one run: joining them, which rows each reads, and stopping together."""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from rattn.console import speak


def define_flags() -> None:
    """Declares the flags by which processes find each other."""
    flags.DEFINE_bool("distributed", False, "Join the processes of a TPU pod, which find each other by themselves.")
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0, where processes do not find each other.")
    flags.DEFINE_integer("num_processes", None, "Processes of the run, with --coordinator_address.")
    flags.DEFINE_integer("process_id", None, "This process, from 0, with --coordinator_address.")


def join() -> None:
    """Joins the processes that the flags name, before any device is touched."""
    if flags.FLAGS.coordinator_address:
        jax.distributed.initialize(flags.FLAGS.coordinator_address, flags.FLAGS.num_processes, flags.FLAGS.process_id)
    elif flags.FLAGS.distributed:
        jax.distributed.initialize()


def is_main() -> bool:
    """Whether this is the process that prepares data, writes metrics and speaks."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints on the main process."""
    if is_main():
        speak(text)


def wait_for_all(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class BatchSplit:
    """Which rows of a global batch this process reads, and how they become arrays of the mesh.

    The rows follow from the sharding, so any mesh works: two processes that hold parts of the same rows both read them.
    """

    def __init__(self, sharding: NamedSharding):
        """Takes the sharding of a [B, T] batch."""
        self._sharding = sharding

    def rows(self, batch_size: int) -> list[int]:
        """The rows of a batch of `batch_size` that this process's devices hold parts of, ascending."""
        # One column a device along the length: only the rows matter here.
        shape = (batch_size, self._sharding.mesh.size)
        indices = self._sharding.addressable_devices_indices_map(shape).values()
        return sorted({row for index in indices for row in range(*index[0].indices(batch_size))})

    def to_devices(self, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
        """Makes global [B, T] arrays of this process's rows."""
        first = {row: place for place, row in enumerate(self.rows(batch_size))}

        def place(value: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, slice]) -> np.ndarray:
                rows = range(*index[0].indices(batch_size))
                return value[first[rows[0]] : first[rows[-1]] + 1, index[1]]

            return jax.make_array_from_callback((batch_size, value.shape[1]), self._sharding, part)

        # The one place where data goes to the devices, so the loop's guard against transfers is lifted here.
        with jax.transfer_guard_host_to_device("allow"):
            return {name: place(value) for name, value in batch.items()}


class StopRequest:
    """Tells when to save and stop: SIGTERM or Ctrl-C, on all processes after the same step."""

    def __init__(self):
        self._received: list[int] = []

    def after(self, step: int) -> bool:
        """Whether to stop after `step`; every process asks after each of its steps.

        Several processes agree through JAX's preemption service, which listens to SIGTERM by itself.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return bool(self._received)

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Takes the signals of a single process, once; a second one acts as it would have."""
        signals: Sequence[int] = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        before = {number: signal.getsignal(number) for number in signals}

        def note(number: int, _: Any) -> None:
            self._received.append(number)
            signal.signal(number, before[number])

        for number in signals:
            signal.signal(number, note)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
