"""What is said on standard output, a reader of it that goes away, as `head` does, and Ctrl-C."""

import contextlib
import os
import sys
from collections.abc import Iterator


def speak(text: str, end: str = "\n") -> None:
    """Prints at once. Where nobody reads on, the work that it is about goes on unheard."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        speak_to_nobody()


@contextlib.contextmanager
def stopped_quietly() -> Iterator[None]:
    """Leaves the program at Ctrl-C, and when its reader goes away, without a word and with a shell's statuses."""
    try:
        yield
    except KeyboardInterrupt:
        print()  # Behind what the terminal shows of it.
        sys.exit(130)
    except BrokenPipeError:
        speak_to_nobody()
        sys.exit(141)


def speak_to_nobody() -> None:
    """Sends all that is still said nowhere, also what Python writes when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
