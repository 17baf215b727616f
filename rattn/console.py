"""What is said on standard output, and a reader of it that goes away, as `head` does."""

import os
import sys


def speak(text: str, end: str = "\n") -> None:
    """Prints at once. Where nobody reads on, the work that it is about goes on unheard."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        speak_to_nobody()


def speak_to_nobody() -> None:
    """Sends all that is still said nowhere, also what Python writes when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
