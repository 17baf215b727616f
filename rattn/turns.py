"""Trainings on one machine that take turns, in the order in which they came, so that step times are their own."""

import contextlib
import fcntl
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import IO

SECONDS_BETWEEN_TRIES = 0.2


@contextlib.contextmanager
def turn(path: pathlib.Path | None, *, stopped: Callable[[], bool], say: Callable[[str], None]) -> Iterator[None]:
    """Holds the file `path` locked, once no other process does or has waited longer for it.

    Args:
      path: shared by those that take turns, whose places in the line are files beside it; None: there is nobody to wait
        for.
      stopped: whether to wait no longer; the lock is then not held.
      say: told that it waits, and how long it did.
    """
    if path is None:
        yield
        return
    with path.open("w") as file:
        began = time.monotonic()
        with _place_in_line(path) as place:

            def comes() -> bool:
                return _is_first(place, path) and locked(file)

            if not comes():
                say("Compiled; waiting for another training to end …")
                while not stopped() and not comes():
                    time.sleep(SECONDS_BETWEEN_TRIES)
                say(f"Waited {time.monotonic() - began:.0f} s.")
        yield


@contextlib.contextmanager
def _place_in_line(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Makes a file whose name sorts by time, locked for as long as this process stands in the line."""
    place = path.with_name(f"{path.name}.{time.time_ns():020d}-{os.getpid()}")
    unlocked = path.with_name(f".{place.name}")
    with unlocked.open("w") as file:
        locked(file)
        unlocked.rename(place)
        try:
            yield place
        finally:
            place.unlink()


def _is_first(place: pathlib.Path, path: pathlib.Path) -> bool:
    """Whether nobody stands before this place; forgets those that were killed there."""
    for other in sorted(path.parent.glob(f"{path.name}.*-*")):
        if other == place:
            break
        with contextlib.suppress(FileNotFoundError), other.open() as file:
            if not locked(file):
                return False
            other.unlink(missing_ok=True)
    return True


def locked(file: IO[str]) -> bool:
    """Takes the lock of an open file, if nobody has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
