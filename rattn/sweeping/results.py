"""The results of a sweep: one JSON file a point, kept, matched and merged by the point's identity.

    WORKDIR/results/NAME.IDENTITY.json     the point is done
    WORKDIR/failures/NAME.IDENTITY.json    its last try failed: {"name", "identity", "stage", "reason", "log"}
    WORKDIR/points/NAME/                   the run: checkpoints, metrics.jsonl, train.log, evaluate.log, evaluation.json

A result is

    {
      "name": …, "identity": …, "group": …, "settings": {…},   as `rattn.sweeping.points.Point`
      "finished_at": "2026-11-22T17:04:54+00:00",
      "seconds": {"train": 312.5, "evaluate": 41.0},           wall time, start and compilation included; null where
                                                               somebody else ran the commands
      "trained_steps": 763,                                    of the process that "train" timed
      "evaluation": {…}                                        what rattn.evaluate wrote: rattn.evaluation.results
    }
"""

import contextlib
import datetime
import fcntl
import json
import lzma
import os
import pathlib
import shutil
import tarfile
from collections.abc import Iterator
from typing import Any

from rattn.errors import UserError
from rattn.files import metrics_lines, write_whole
from rattn.sweeping.points import Point, same_config

Result = dict[str, Any]
KEYS = {"name", "identity", "group", "settings", "finished_at", "seconds", "trained_steps", "evaluation"}
FAILURE_KEYS = {"name", "identity", "stage", "reason", "log"}


class Results:
    """The results and failures in a sweep's workdir."""

    def __init__(self, workdir: pathlib.Path):
        self.workdir = workdir
        self._folder, self._failures = workdir / "results", workdir / "failures"

    def point_folder(self, name: str) -> pathlib.Path:
        """The workdir of a point's run."""
        return self.workdir / "points" / name

    def all(self) -> list[Result]:
        """Every result, by name.

        Raises:
          UserError: a file that is no result.
        """
        return [_read(path) for path in sorted(self._folder.glob("*.json"))]

    def of(self, point: Point) -> Result | None:
        """The point's result, under its present name and group; None where none was made with its config."""
        for path in self._folder.glob(f"*.{point.identity}.json"):
            result = _read(path)
            if same_config(result["evaluation"]["config"], point.config):
                return result | {"name": point.name, "group": point.group}
        return None

    def collect(self, point: Point, seconds: dict[str, float | None], trained_steps: int) -> Result:
        """Makes the point's evaluation its result and forgets an earlier failure."""
        evaluation = json.loads((self.point_folder(point.name) / "evaluation.json").read_text())
        result = {
            "name": point.name,
            "identity": point.identity,
            "group": point.group,
            "settings": point.settings,
            "finished_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
            "trained_steps": trained_steps,
            "evaluation": evaluation,
        }
        self._put(result)
        for path in self._failures.glob(f"*.{point.identity}.json"):
            path.unlink()
        return result

    def fail(self, point: Point, stage: str, reason: str, log: str) -> None:
        """Records why a point failed."""
        record = {"name": point.name, "identity": point.identity, "stage": stage, "reason": reason, "log": log}
        _write(self._failures / f"{point.name}.{point.identity}.json", record)

    def failed_since(self, point: Point, when: float) -> bool:
        """Whether a try of the point failed after `when`, seconds since the epoch."""
        path = self._failures / f"{point.name}.{point.identity}.json"
        return path.exists() and path.stat().st_mtime >= when

    def failures(self) -> list[dict[str, str]]:
        """What failed and has no result since."""
        found = []
        for path in sorted(self._failures.glob("*.json")):
            with contextlib.suppress(ValueError):  # Cut off: it will be tried again, as all that failed.
                record = json.loads(path.read_text())
                if isinstance(record, dict) and record.keys() >= FAILURE_KEYS:
                    found.append(record)
        return found

    def merge(self, other: pathlib.Path) -> tuple[int, int, list[str]]:
        """Takes over the results of another workdir, or of an archive that `write_archive` made.

        Of two results of one point the one that finished later stays, whatever the order of merging; of two that
        finished in the same second, the one whose text sorts last.

        Returns:
          how many were new, how many this workdir had (the very same ones too), and a sentence for each conflict.

        Raises:
          UserError: there are no results in `other`.
        """
        mine = {result["identity"]: result for result in self.all()}
        new, known, conflicts = 0, 0, []
        for theirs in _results_in(other):
            ours = mine.get(theirs["identity"])
            if ours is None:
                new += 1
                self._put(theirs)
            else:
                known += 1
                if ours != theirs:
                    winner = max(ours, theirs, key=lambda result: (result["finished_at"], _dumps(result)))
                    conflicts.append(_conflict(ours, theirs, winner))
                    self._put(winner)
        return new, known, conflicts

    def write_archive(self, path: pathlib.Path) -> int:
        """Packs all results into one .tar.xz for `merge` on another machine; returns how many."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.workdir.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        with (self.workdir / "archive.lock").open("w") as lock:
            # Another sweep of this workdir must not put an older list in the place of this one.
            fcntl.flock(lock, fcntl.LOCK_EX)
            files = sorted(self._folder.glob("*.json"))
            with tarfile.open(unfinished, "w:xz") as archive:
                for file in files:
                    archive.add(file, f"results/{file.name}")
            unfinished.replace(path)
        return len(files)

    def delete_checkpoints(self, name: str) -> None:
        """Frees the disk that a finished point's checkpoints take."""
        shutil.rmtree(self.point_folder(name) / "checkpoints", ignore_errors=True)

    def _put(self, result: Result) -> None:
        for path in self._folder.glob(f"*.{result['identity']}.json"):
            path.unlink()
        _write(self._folder / f"{result['name']}.{result['identity']}.json", result)


def latest_step(run: pathlib.Path) -> int:
    """The last committed checkpoint of a run, 0 where there is none."""
    return max(checkpoint_steps(run), default=0)


def checkpoint_steps(run: pathlib.Path) -> list[int]:
    """Committed checkpoints of a run."""
    folder = run / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


def last_metrics(run: pathlib.Path) -> dict[str, float]:
    """The last training line of metrics.jsonl, and the last of each evaluation key; empty where there is none."""
    found: dict[str, float] = {}
    for values in metrics_lines(run, last=50):
        found |= values
    return found


def training_losses(run: pathlib.Path) -> dict[int, float]:
    """The loss of every step that metrics.jsonl has one of; empty where there is no such file."""
    return {values["step"]: values["loss"] for values in metrics_lines(run) if values.get("loss") is not None}


def _results_in(other: pathlib.Path) -> Iterator[Result]:
    if other.is_dir():
        found = Results(other).all()
    elif other.is_file() and tarfile.is_tarfile(other):
        found = _unpacked(other)
    else:
        raise UserError(f"--merge {other} is neither a sweep's workdir nor an archive of results; name one of either.")
    if not found:
        raise UserError(f"--merge {other} holds no results; name the workdir of a sweep that finished a point.")
    yield from found


def _unpacked(path: pathlib.Path) -> list[Result]:
    try:
        with tarfile.open(path) as archive:
            files = [member for member in archive.getmembers() if member.isfile() and member.name.endswith(".json")]
            return [_parse(archive.extractfile(member).read().decode(), f"{path}:{member.name}") for member in files]
    except (EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise UserError(f"The archive {path} is damaged ({error}); copy it again.") from None


def _conflict(ours: Result, theirs: Result, winner: Result) -> str:
    def loss(result: Result) -> str:
        return f"{result['evaluation']['measured'][0]['nats_per_token']:.4f} ({result['finished_at']})"

    return (
        f"Two results of {ours['name']!r} differ, loss {loss(ours)} here and {loss(theirs)} there: "
        f"the one of {winner['finished_at']} stays, for it finished later."
    )


def _read(path: pathlib.Path) -> Result:
    return _parse(path.read_text(), str(path))


def _parse(text: str, where: str) -> Result:
    try:
        result = json.loads(text)
        complete = result.keys() >= KEYS and result["evaluation"]["measured"]
    except (ValueError, AttributeError, TypeError, KeyError):
        complete = False
    if not complete:
        raise UserError(f"{where} is no result of a sweep; delete it to run its point again.")
    return result


def _write(path: pathlib.Path, value: dict[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=1) + "\n")


def _dumps(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
