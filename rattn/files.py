"""Files of a run: written whole or not at all, and the lines of metrics.jsonl that are whole."""

import json
import os
from typing import Any

from etils import epath


def write_whole(path: epath.PathLike, text: str) -> None:
    """Writes a file, and its folder where there is none, which has the old text until it has all of the new one."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)


def metrics_lines(workdir: epath.PathLike, last: int = 0) -> list[dict[str, Any]]:
    """Returns the objects of metrics.jsonl, of its `last` lines alone if that is not 0; none where there is no file.

    A line may be cut off: it is being written, or whoever wrote it was killed.
    """
    try:
        lines = (epath.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines[-last:]:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
