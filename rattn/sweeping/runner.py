"""Runs the points of a sweep, one after another, each training and each evaluation in a fresh process."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median

from rattn.errors import UserError
from rattn.sweeping.points import Point, Sweep, same_config
from rattn.sweeping.results import Result, Results, checkpoint_steps, last_metrics, latest_step
from rattn.sweeping.table import Table
from rattn.turns import locked

EXIT_COMPLETE, EXIT_FAILED, EXIT_RESTART = 0, 1, 75


@dataclasses.dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
      launcher: shell command in which {command} is replaced, and {stage} (train or evaluate), {name} and {workdir} of
        the point; "" runs commands as they are.
      budget_seconds: a point that would not fit is left for later, and one that overruns is told to save and stop; 0
        sets no limit.
      cut_points: starts what does not fit too, for the next start on this machine to go on with.
      train_alone: of the sweeps that share a workdir and see the same GPUs, one trains at a time, so that step times
        are true; the others compile and evaluate meanwhile, or wait.
      delete_checkpoints: frees a finished point's checkpoints once no other point needs them.
      archive: file into which all results are packed whenever there is a new one.
    """

    launcher: str = ""
    budget_seconds: float = 0.0
    cut_points: bool = False
    train_alone: bool = False
    delete_checkpoints: bool = False
    archive: pathlib.Path | None = None


class _Left(Exception):
    """The point is not brought to its end now: (state, why) for the table."""


class _Failed(Exception):
    """A point's command failed: (stage, reason, log)."""


class Runner:
    """Brings points to their results; several of them, in processes of their own, may share a workdir's points."""

    def __init__(self, sweep: Sweep, results: Results, options: Options, table: Table):
        self.sweep, self.results, self.options, self.table = sweep, results, options, table
        self._points = {point.name: point for point in sweep.points}
        self._began, self._started = time.time(), time.monotonic()
        self._stopping = False

    def run(self, chosen: list[Point]) -> int:
        """Runs what has no result, always the first that can be run; returns 0 (all done), 1 (some failed) or 75."""
        left, failed = list(chosen), 0
        with self._listening():
            # From the top again after each: what another process was at may be free, or have left a trunk.
            while point := next((point for point in left if self._settle(point)), None):
                left.remove(point)
                failed += self.results.of(point) is None
        return EXIT_RESTART if left else EXIT_FAILED if failed else EXIT_COMPLETE

    def _settle(self, point: Point) -> bool:
        """Brings a point to its result or its failure, unless it has one; False where it is left."""
        result = self.results.of(point)
        if not result and self.results.failed_since(point, self._began):
            self.table.set(point.name, "failed", "in another process of this sweep")
            return True
        try:
            if not result:
                self._check_time(point)
                result = self._run_point(point)
        except _Left as left:
            self.table.set(point.name, *left.args)
            return False
        except _Failed as failure:
            stage, reason, log = failure.args
            self.results.fail(point, stage, reason, log)
            self.table.set(point.name, "failed", f"{reason} ({log})")
            return True
        self.table.set(point.name, "done", figures(result))
        if self.options.delete_checkpoints:
            self._delete_checkpoints()
        return True

    def _check_time(self, point: Point) -> None:
        """Raises _Left where the sweep is to end, or the point does not fit what is left of its budget."""
        if self._stopping:
            raise _Left("left", "")
        if self._seconds_left() < 0 or not self._fits(point):
            raise _Left("left", "no time for it")

    def commands(self, point: Point) -> dict[str, list[str]]:
        """The training and the evaluation of a point, as argument lists."""
        folder = str(self.results.point_folder(point.name))
        train = ["python", "-m", "rattn.train", "--config", point.recipe, "--workdir", folder, *point.overrides]
        if point.trunk:
            train.append(f"--config.init_from={self.results.point_folder(point.trunk)}")
        if self.options.train_alone:
            train.append(f"--turn_file={self.results.workdir / f'training-{_gpus()}.lock'}")
        evaluate = ["python", "-m", "rattn.evaluate", "--checkpoint", folder, *self.sweep.evaluation]
        evaluate += ["--out", f"{folder}/evaluation.json"]
        return {"train": train, "evaluate": evaluate}

    def _run_point(self, point: Point) -> Result:
        """Trains and evaluates, whatever of it is still to do."""
        seconds: dict[str, float | None] = {"train": None, "evaluate": None}
        first_step = point.config.total_steps
        with self._locked(point) as lock:
            if result := self.results.of(point):  # Of another process, which has just let go of the lock.
                return result
            if not self._evaluated(point):
                with self._queued(point):
                    if point.trunk:
                        self._ensure_trunk(point)
                    first_step = latest_step(self.results.point_folder(point.name)) or point.first_step
                    seconds["train"] = self._train(point, lock)
                seconds["evaluate"] = self._run(point, "evaluate", lock)
                if not self._evaluated(point):
                    log = str(self.results.point_folder(point.name) / "evaluate.log")
                    reason = (
                        "rattn.evaluate left no evaluation of the config's last step; delete the point's folder to run "
                        "it anew."
                    )
                    raise _Failed("evaluate", reason, log)
            result = self.results.collect(point, seconds, point.config.total_steps - first_step)
        if self.options.archive:
            self.results.write_archive(self.options.archive)
        return result

    def _train(self, point: Point, lock: int, enough: Callable[[], bool] | None = None) -> float | None:
        if latest_step(self.results.point_folder(point.name)) >= point.config.total_steps:
            return None
        return self._run(point, "train", lock, enough)

    def _ensure_trunk(self, point: Point) -> None:
        """Trains the trunk (again) where its checkpoint is not on this machine."""
        trunk, step = self._points[point.trunk], point.config.init_from_step
        folder = self.results.point_folder(trunk.name)

        def held() -> bool:
            return step in checkpoint_steps(folder) or (not step and latest_step(folder) >= trunk.config.total_steps)

        if held():
            return
        with self._locked(trunk) as lock:
            self.table.set(point.name, "trunk", f"training {trunk.name}", running=True)
            if trunk.trunk:
                self._ensure_trunk(trunk)
            # Where the trunk has a result nothing is wanted of it but the checkpoint.
            self._train(trunk, lock, enough=held if self.results.of(trunk) else None)
        if not held():
            reason = (
                f"The trunk {trunk.name!r} kept no checkpoint of step {step}; name the step in its "
                "checkpoint.keep_steps and delete its folder."
            )
            raise _Failed("train", reason, str(folder / "train.log"))

    def _evaluated(self, point: Point) -> bool:
        """Whether the point's evaluation is there, of its last step and its config."""
        try:
            found = json.loads((self.results.point_folder(point.name) / "evaluation.json").read_text())
            return found["step"] == point.config.total_steps and same_config(found["config"], point.config)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _run(self, point: Point, stage: str, lock: int, enough: Callable[[], bool] | None = None) -> float:
        """Runs a command of a point to its end, or till `enough`, and it is told to stop; returns its wall seconds.

        Raises:
          _Failed: it failed; the reason is the sentence that it ended with.
          _Left: it was told to stop, or asked to be started again; so the sweep ends.
        """
        folder = self.results.point_folder(point.name)
        log = folder / f"{stage}.log"
        command = self._launched(point, stage)
        doing = {"train": "training", "evaluate": "evaluating"}[stage]
        self.table.set(point.name, doing, running=True)
        started, signalled, done = time.monotonic(), False, False
        with log.open("ab") as output:
            begin = output.tell()
            process = subprocess.Popen(
                command,
                shell=isinstance(command, str),
                stdout=output,
                stderr=subprocess.STDOUT,
                # A signal reaches it through this process alone, once.
                start_new_session=True,
                # Holds the point's lock too, should it outlive this process.
                pass_fds=[lock],
            )
            try:
                while process.poll() is None:
                    done = done or bool(enough and enough())
                    if not signalled and (done or self._stopping or self._seconds_left() < 0):
                        os.killpg(process.pid, signal.SIGTERM)
                        signalled = True
                    self.table.progress(point.name, _progress(folder, point.config.total_steps))
                    time.sleep(0.1)
            except BaseException:
                # It saves, and is not left behind.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                raise
        if done and not self._stopping:
            return time.monotonic() - started
        if signalled or process.returncode == EXIT_RESTART:
            self._stopping = True
            raise _Left("stopped", "saved; start the sweep again to go on")
        if process.returncode:
            raise _Failed(stage, _reason(log, begin, process.returncode), str(log))
        return time.monotonic() - started

    def _launched(self, point: Point, stage: str) -> list[str] | str:
        command = self.commands(point)[stage]
        if not self.options.launcher:
            return [sys.executable, *command[1:]]
        folder = str(self.results.point_folder(point.name))
        return fill_launcher(self.options.launcher, command, stage=stage, name=point.name, workdir=folder)

    @contextlib.contextmanager
    def _locked(self, point: Point) -> Iterator[int]:
        """Holds the point's lock; also a training that a killed sweep left behind holds it."""
        folder = self.results.point_folder(point.name)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as file:
            if not locked(file):
                raise _Left("elsewhere", "another process is at work on it")
            self._claim(point, folder)
            yield file.fileno()

    def _claim(self, point: Point, folder: pathlib.Path) -> None:
        """Ties the folder to the point's config: another one's checkpoints would be continued without a word."""
        path = folder / "identity"
        held = path.read_text() if path.exists() else point.identity
        if held != point.identity:
            reason = (
                f"The folder {folder} holds a run of another config ({held}, this is {point.identity}); delete it, or "
                "give the point another name."
            )
            raise _Failed("train", reason, str(path))
        path.write_text(point.identity)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C are passed on to what runs, which saves; the sweep then ends with 75."""

        def stop(*_: object) -> None:
            self._stopping = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _seconds_left(self) -> float:
        """Seconds of the budget that are left."""
        budget = self.options.budget_seconds
        return budget - (time.monotonic() - self._started) if budget else float("inf")

    def _fits(self, point: Point) -> bool:
        if not self.options.budget_seconds or self.options.cut_points:
            return True
        estimate = self._estimate(point)
        return estimate is None or estimate <= self._seconds_left()

    def _estimate(self, point: Point) -> float | None:
        """Seconds that a point will take, from those that were timed; None where none was."""
        timed = [result for result in self.results.all() if result["seconds"]["train"] and result["trained_steps"]]
        timed = [result for result in timed if result["evaluation"]["training"]]
        if not timed:
            return None
        alike = [result for result in timed if result["settings"].get("mixer") == point.settings.get("mixer")] or timed
        step_seconds = max(result["evaluation"]["training"]["step_seconds"] for result in alike)

        def start(result: Result) -> float:
            training = result["trained_steps"] * result["evaluation"]["training"]["step_seconds"]
            return max(result["seconds"]["train"] - training, 0)

        begins = once = max(map(start, timed))
        if self.options.train_alone:
            # Where points wait for each other, the longest starts were waiting; the shortest found all compiled. A
            # point starts while others train, but where none does yet they all start at once, and nothing trains.
            once = median(map(start, timed))
            others = self._others_queued()
            ahead = sum(step_seconds * self._steps_left(other, running=True) for other in others)
            begins = max(once, ahead) if any(map(self._trains, others)) else once + ahead
        if self._lacks_trunk(point):
            begins += once
        # The longest evaluation: one that compiles, which nothing before it can have done for it.
        evaluation = max(result["seconds"]["evaluate"] or 0 for result in timed)
        return begins + step_seconds * self._steps_left(point) + evaluation

    def _steps_left(self, point: Point, *, running: bool = False) -> int:
        """Steps that a point has yet to train, its trunk's too where that is not on this machine."""
        folder = self.results.point_folder(point.name)
        done = latest_step(folder) or point.first_step
        if running:
            done = max(done, last_metrics(folder).get("step", 0))
        left = point.config.total_steps - done
        if self._lacks_trunk(point):
            trunk = self._points[point.trunk]
            left += self._steps_left(trunk, running=running)
            if point.config.init_from_step and self.results.of(trunk):
                left -= trunk.config.total_steps - point.config.init_from_step
        return left

    def _trains(self, point: Point) -> bool:
        """Whether a step of the point, or of its trunk, has been logged."""
        return any(last_metrics(self.results.point_folder(name)) for name in (point.name, point.trunk) if name)

    def _lacks_trunk(self, point: Point) -> bool:
        """Whether a trunk is to be trained before the point."""
        return bool(point.trunk) and not checkpoint_steps(self.results.point_folder(point.trunk))

    @contextlib.contextmanager
    def _queued(self, point: Point) -> Iterator[None]:
        """Tells the other sweeps on these GPUs of a point that trains or waits to, if it still fits beside theirs."""
        path = self.results.workdir / f"queue-{_gpus()}.{os.getpid()}"
        with (self.results.workdir / f"queue-lock-{_gpus()}").open("w") as lock:
            # Of sweeps that start at once, each is to see those that have come before it.
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._check_time(point)
            path.write_text(point.name)
        try:
            yield
        finally:
            path.unlink()

    def _others_queued(self) -> list[Point]:
        """Points that train, or wait to, in other sweeps on these GPUs."""
        names = []
        for path in self.results.workdir.glob(f"queue-{_gpus()}.*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                os.kill(int(path.name.rpartition(".")[2]), 0)  # Raises where a killed sweep left the file.
                names.append(path.read_text())
        return [self._points[name] for name in names if name in self._points]

    def _delete_checkpoints(self) -> None:
        """Deletes the checkpoints of finished points that no unfinished point starts from."""
        unfinished = [point for point in self.sweep.points if self.results.of(point) is None]
        needed = {point.trunk for point in unfinished} | {point.name for point in unfinished}
        for name in self._points.keys() - needed:
            self.results.delete_checkpoints(name)


def _gpus() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all")


def fill_launcher(template: str, command: list[str], **values: str) -> str:
    """Replaces {command} and the other names in a launcher's template.

    Raises:
      UserError: the template has no place for the command.
    """
    if "{command}" not in template:
        raise UserError(f"--launcher {template!r} has no {{command}}; say where the point's command goes.")
    values["command"] = shlex.join(command)
    return re.sub(r"\{(command|stage|name|workdir)\}", lambda match: values[match[1]], template)


def figures(result: Result) -> str:
    """A finished point in a line of the table."""
    measured = result["evaluation"]["measured"][0]
    training = result["evaluation"]["training"]
    speed = f" · {training['tokens_per_second']:,.0f} tokens/s" if training else ""
    return f"loss {measured['nats_per_token']:.4f} · {measured['bits_per_byte']:.4f} bits per byte{speed}"


def _progress(folder: pathlib.Path, total_steps: int) -> str:
    values = last_metrics(folder)
    if "loss" not in values:
        return ""
    loss = math.nan if values["loss"] is None else values["loss"]  # As `MetricsWriter` writes what is no number.
    return f"step {values['step']:,}/{total_steps:,} · loss {loss:.4f} · {values['tokens_per_second']:,.0f} tokens/s"


def _reason(log: pathlib.Path, begin: int, status: int) -> str:
    """The sentence that a command ended with, or else its last line."""
    lines = [line.strip() for line in log.read_bytes()[begin:].decode(errors="replace").splitlines() if line.strip()]
    sentences = [line.removeprefix("rattn: ") for line in lines if line.startswith("rattn: ")]
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    if sentences:
        return sentences[-1]
    return f"{lines[-1][:300]} ({how})" if lines else f"It said nothing ({how})."
