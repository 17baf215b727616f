"""Where a run's numbers go: metrics.jsonl, TensorBoard, and a live line for whoever watches."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from rattn.console import speak
from rattn.files import write_whole


class MetricsWriter:
    """Appends to `metrics.jsonl` (one JSON object a line) and to TensorBoard event files.

    On a `gs://` workdir appending rewrites the object; this has not been tried.
    """

    def __init__(self, workdir: epath.Path, config: ConfigDict, first_step: int):
        """Opens the files; lines of steps after `first_step`, which a killed run left behind, are dropped.

        The run makes them again, with the same values.
        """
        self._path = workdir / "metrics.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step_of(line) <= first_step]
        if kept != lines:
            # Whole or not at all: what a checkpoint has behind it is not made again.
            write_whole(self._path, "".join(line + "\n" for line in kept))
        self._tensorboard = (
            SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1) if config.tensorboard else None
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line and flushes it; what is not finite becomes null, as JSON has no NaN."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes."""
        if self._tensorboard:
            self._tensorboard.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")


class Progress:
    """A live line on a terminal, a plain line now and then elsewhere, nothing where another process speaks."""

    SECONDS_BETWEEN_PLAIN_LINES = 15.0

    def __init__(self, total_steps: int, first_step: int, *, silent: bool = False):
        self._total, self._first, self._silent = total_steps, first_step, silent
        self._live = sys.stdout.isatty()
        self._last_plain = -float("inf")
        self.start()

    def start(self) -> None:
        """The time that is left is reckoned from here."""
        self._started = time.monotonic()

    def show(self, step: int, values: dict[str, Any]) -> None:
        """Shows step/total, loss, tokens a second and the time left."""
        now = time.monotonic()
        if not self._live and now - self._last_plain < self.SECONDS_BETWEEN_PLAIN_LINES and step < self._total:
            return
        self._last_plain = now
        done = max(step - self._first, 1)
        eta = (now - self._started) / done * (self._total - step)
        line = (
            f"step {step:,}/{self._total:,} · loss {values['loss']:.4f} · {values['tokens_per_second']:,.0f} tokens/s"
        )
        if "mfu" in values:
            line += f" · MFU {100 * values['mfu']:.1f} %"
        line += f" · {_duration(eta)} left"
        speak(f"\r\033[K{line}" if self._live else line, end="" if self._live else "\n")

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if self._silent:
            return
        speak(f"\r\033[K{text}" if self._live else text)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


class Clock:
    """Seconds of training, and of those the ones spent waiting for data, from lap to lap."""

    def __init__(self):
        self._lap_at = time.monotonic()
        self._waited = self._paused = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is waiting for data."""
        started = time.monotonic()
        yield
        self._waited += time.monotonic() - started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not training."""
        started = time.monotonic()
        yield
        self._paused += time.monotonic() - started

    def lap(self) -> tuple[float, float]:
        """Returns (seconds of training, seconds waited) since the last lap and starts another."""
        now = time.monotonic()
        seconds, waited = max(now - self._lap_at - self._paused, 1e-9), self._waited
        self._lap_at, self._waited, self._paused = now, 0.0, 0.0
        return seconds, waited


class Speed:
    """How fast the steps since the last reading were, all together and, where windows are drawn, by window."""

    def __init__(self, tokens_per_step: int, peak_flops: float | None, *, by_window: bool):
        """Takes the FLOP/s of all devices together, None where they are not known."""
        self._tokens, self._peak, self._by_window = tokens_per_step, peak_flops, by_window
        self._steps: list[tuple[int, float, float, float]] = []

    def add(self, window: int, seconds: float, waited: float, flops_per_token: float) -> None:
        """Counts a step."""
        self._steps.append((window, seconds, waited, flops_per_token))

    def read(self) -> dict[str, float]:
        """Returns `tokens_per_second`, `mfu` where the peak is known, `data_wait_fraction`, and starts anew.

        With windows drawn, also `window` (the last step's) and the first two as `window_64/…` for each one seen.
        """
        steps, self._steps = self._steps, []
        values = self._rates(steps)
        seconds, waited = (sum(step[i] for step in steps) for i in (1, 2))
        values["data_wait_fraction"] = min(waited / seconds, 1.0)
        if self._by_window:
            values["window"] = steps[-1][0]
            for window in sorted({step[0] for step in steps}):
                rates = self._rates([step for step in steps if step[0] == window])
                values |= {f"window_{window}/{name}": value for name, value in rates.items()}
        return values

    def _rates(self, steps: list[tuple[int, float, float, float]]) -> dict[str, float]:
        seconds = sum(step[1] for step in steps)
        rates = {"tokens_per_second": self._tokens * len(steps) / seconds}
        if self._peak:
            rates["mfu"] = self._tokens * sum(step[3] for step in steps) / (self._peak * seconds)
        return rates
