"""The live table of a sweep: rewritten in place on a terminal, a line for each change elsewhere."""

import dataclasses
import shutil
import sys
import time

SECONDS_BETWEEN_PLAIN_LINES = 30.0
SECONDS_BETWEEN_REDRAWS = 0.5


@dataclasses.dataclass
class Row:
    """What the table says of a point: its state and whatever figures there are."""

    name: str
    state: str = "waiting"
    figures: str = ""
    started: float | None = None
    seconds: float = 0.0

    def text(self, width: int) -> str:
        """One line."""
        seconds = time.monotonic() - self.started if self.started else self.seconds
        clock = f"{seconds // 60:.0f} min {seconds % 60:02.0f} s" if seconds else ""
        return f"  {self.name:<{width}}  {self.state:<10}  {clock:>13}  {self.figures}".rstrip()


class Table:
    """Shows how far each point is."""

    def __init__(self, names: list[str]):
        self._rows = {name: Row(name) for name in names}
        self._width = max(map(len, names), default=0)
        self._live = sys.stdout.isatty()
        self._drawn = 0
        self._drawn_at = self._plain_at = -float("inf")

    def set(self, name: str, state: str, figures: str = "", *, running: bool = False) -> None:
        """Sets a point's state and shows it, if it is news."""
        row = self._rows.setdefault(name, Row(name))
        if not running and (row.state, row.figures) == (state, figures):
            return
        if running and row.started is None:
            row.started = time.monotonic()
        elif not running and row.started is not None:
            row.seconds, row.started = time.monotonic() - row.started, None
        row.state, row.figures = state, figures
        if self._live:
            self.draw()
        else:
            self._plain(row)

    def progress(self, name: str, figures: str) -> None:
        """Shows new figures of a running point, now and then."""
        row, now = self._rows[name], time.monotonic()
        row.figures = figures
        if self._live and now - self._drawn_at > SECONDS_BETWEEN_REDRAWS:
            self.draw()
        elif not self._live and now - self._plain_at > SECONDS_BETWEEN_PLAIN_LINES:
            self._plain(row)

    def draw(self) -> None:
        """Rewrites the table, as much of it as the terminal has lines for."""
        columns, lines = shutil.get_terminal_size()
        rows = list(self._rows.values())
        done = sum(row.state == "done" for row in rows)
        failed = sum(row.state == "failed" for row in rows)
        head = f"{done} of {len(rows)} points done" + (f", {failed} failed" if failed else "")
        room = max(lines - 3, 1)
        if len(rows) > room:
            busy = next((index for index, row in enumerate(rows) if row.started), len(rows))
            first = min(max(busy - room // 2, 0), len(rows) - room)
            head += f" · lines {first + 1} to {first + room}"
            rows = rows[first : first + room]
        text = [head, *(row.text(self._width) for row in rows)]
        up = f"\033[{self._drawn}A" if self._drawn else ""
        print(up + "".join(f"\r\033[K{line[: columns - 1]}\n" for line in text), end="\033[J", flush=True)
        self._drawn, self._drawn_at = len(text), time.monotonic()

    def _plain(self, row: Row) -> None:
        self._plain_at = time.monotonic()
        print(row.text(0).strip(), flush=True)
