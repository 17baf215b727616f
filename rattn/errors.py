"""The one exception for mistakes that a user can mend."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave: its message is one sentence with what was wrong, the value seen and what to do.

    Entry points print the message and leave with status 1; no traceback.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns ", did you mean 'x'?" for the known word closest to `word`, or "" where none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""
