"""Trainings on one machine that take turns, so that the step times of each are its own."""

import contextlib
import fcntl
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import IO

SECONDS_BETWEEN_TRIES = 0.2


@contextlib.contextmanager
def turn(path: pathlib.Path | None, *, stopped: Callable[[], bool], say: Callable[[str], None]) -> Iterator[None]:
    """Holds the file `path` locked, once no other process does.

    Args:
      path: shared by those that take turns; None: there is nobody to wait for.
      stopped: whether to wait no longer; the lock is then not held.
      say: told that it waits, and how long it did.
    """
    if path is None:
        yield
        return
    with path.open("w") as file:
        began = time.monotonic()
        if not locked(file):
            say("Compiled; waiting for another training to end …")
            while not stopped() and not locked(file):
                time.sleep(SECONDS_BETWEEN_TRIES)
            say(f"Waited {time.monotonic() - began:.0f} s.")
        yield


def locked(file: IO[str]) -> bool:
    """Takes the lock of an open file, if nobody has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
