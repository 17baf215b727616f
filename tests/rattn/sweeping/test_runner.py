"""The runner repeats nothing and loses nothing; merging keeps the later result."""

import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import threading
import time

import pytest

from rattn.config import to_json
from rattn.errors import UserError
from rattn.sweeping.results import Results, training_losses
from rattn.sweeping.runner import Options, Runner, fill_launcher, latest_step
from rattn.sweeping.table import Table
from tests.rattn.sweeping.conftest import BRANCHES
from tests.rattn.sweeping.fake_point import made_up

THREE = """
from rattn.sweeping.points import product
def sweep(add):
    add(mixer="full", seed=0)
    for point in product(window=[4, 8], mixer=["rattention"]):
        add(seed=1, **point)
"""


def names(results):
    return {result["name"] for result in results.all()}


def test_a_sweep_runs_everything_once_and_never_again(sweep_of, run):
    sweep = sweep_of(THREE)
    status, results, calls = run(sweep)
    assert status == 0
    assert calls == [f"{stage} {point.name}" for point in sweep.points for stage in ("train", "evaluate")]
    assert names(results) == {point.name for point in sweep.points}
    assert run(sweep)[::2] == (0, [])


def test_a_failed_point_is_recorded_with_its_sentence_and_the_rest_go_on(sweep_of, run):
    sweep = sweep_of(THREE)
    status, results, _ = run(sweep, "train:window4:fail")
    assert status == 1
    assert len(results.all()) == 2
    (failure,) = results.failures()
    assert failure["reason"] == "The fake has no heart; give it one."
    assert (failure["stage"], failure["name"]) == ("train", "seed1-window4-rattention")
    status, results, calls = run(sweep)
    assert (status, len(calls), results.failures()) == (0, 2, [])


def test_a_loss_that_is_no_number_ends_no_sweep(sweep_of, run):
    sweep = sweep_of(THREE)
    status, results, _ = run(sweep, "train:window4:nan")
    assert (status, len(results.all())) == (0, 3)
    folder = next(results.point_folder(point.name) for point in sweep.points if "window4" in point.name)
    assert training_losses(folder).keys() == {sweep.points[0].config.total_steps}


def test_damaged_records_get_a_sentence_or_are_left_out(sweep_of, run, tmp_path):
    sweep = sweep_of(THREE)
    _, results, _ = run(sweep, "train:window4:fail")
    (record,) = (tmp_path / "sweep" / "failures").glob("*.json")
    record.write_text(record.read_text()[:20])
    assert results.failures() == []
    archive = tmp_path / "results.tar.xz"
    assert results.write_archive(archive) == 2
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(UserError, match=r"archive .* is damaged|neither a sweep's workdir nor an archive"):
        Results(tmp_path / "other").merge(archive)
    point = next(point for point in sweep.points if results.of(point))
    path = next((tmp_path / "sweep" / "results").glob(f"{point.name}.*"))
    damaged = json.loads(path.read_text())
    damaged["evaluation"]["measured"] = []
    path.write_text(json.dumps(damaged))
    with pytest.raises(UserError, match="is no result of a sweep; delete it"):
        results.all()


def test_a_failure_without_a_sentence_gives_its_last_line_and_keeps_the_training(sweep_of, run):
    sweep = sweep_of(THREE)
    status, results, _ = run(sweep, "evaluate:window4:fail")
    assert status == 1
    assert results.failures()[0]["reason"] == "RuntimeError: no sentence (exit status 1)"
    assert run(sweep)[2] == ["evaluate seed1-window4-rattention"]


def test_75_of_a_point_stops_the_sweep_with_75(sweep_of, run):
    sweep = sweep_of(THREE)
    status, results, calls = run(sweep, "train:window4:restart")
    assert (status, calls) == (75, ["train full-seed0", "evaluate full-seed0", "train seed1-window4-rattention"])
    assert names(results) == {"full-seed0"}
    status, _, calls = run(sweep)
    assert (status, calls[0]) == (0, "train seed1-window4-rattention")


def test_what_somebody_else_ran_is_collected(sweep_of, run, tmp_path):
    """--list_commands prints commands for other machines; what they leave in the workdir counts."""
    sweep = sweep_of(THREE)
    point = sweep.points[1]
    folder = tmp_path / "sweep" / "points" / point.name
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(made_up(to_json(point.config))))
    status, results, calls = run(sweep)
    assert (status, len(calls), len(results.all())) == (0, 4, 3)
    assert results.of(point)["seconds"] == {"train": None, "evaluate": None}


def test_a_branch_begins_at_its_trunk_and_a_lost_trunk_is_trained_again(sweep_of, run):
    sweep = sweep_of(BRANCHES)
    large = sweep.points[1]
    status, results, calls = run(sweep)
    assert (status, calls) == (0, ["train small", "evaluate small", "train large", "evaluate large"])
    assert results.of(large)["trained_steps"] == 160
    # Another machine: the small point's result has come by merging, its checkpoint has not.
    for name in ("other", "third"):
        other = Results(results.workdir.with_name(name))
        other.merge(results.workdir)
        for path in (other.workdir / "results").glob("large.*"):
            path.unlink()
    status, results, calls = run(sweep, workdir="other")
    assert (status, calls) == (0, ["train small", "train large", "evaluate large"])
    command = Runner(sweep, results, Options(), Table([])).commands(large)["train"]
    assert f"--config.init_from={results.point_folder('small')}" in command
    # The small point has its result: of the trunk nothing is trained behind the branch.
    status, results, calls = run(sweep, "train:small:wait", workdir="third")
    assert (status, calls) == (0, ["train small", "train large", "evaluate large"])
    assert latest_step(results.point_folder("small")) == 41


def test_a_budget_counts_a_trunk_that_is_not_there(sweep_of, run):
    """10 s a step, 5 s to start, 5 s to evaluate; the branch begins at step 40 of the trunk's 60 and ends at 200."""
    sweep = sweep_of(BRANCHES)
    _, results, _ = run(sweep)
    for path in (results.workdir / "results").iterdir():
        result = json.loads(path.read_text())
        result["evaluation"]["training"]["step_seconds"] = 10
        result["seconds"] = {"train": result["trained_steps"] * 10.0 + 5, "evaluate": 5.0}
        path.write_text(json.dumps(result))
    runner = Runner(sweep, results, Options(), Table([]))
    assert runner._estimate(sweep.points[1]) == 5 + 5
    small, large = (results.point_folder(name) / "checkpoints" for name in ("small", "large"))
    shutil.rmtree(large)
    assert runner._estimate(sweep.points[1]) == 5 + 1600 + 5
    shutil.rmtree(small)
    assert runner._estimate(sweep.points[1]) == 2 * 5 + 400 + 1600 + 5


def test_a_start_that_found_all_compiled_is_not_what_the_next_one_takes(sweep_of, run):
    """10 s a step, 5 s to evaluate; in sweeps that train in turns starts took 5 s, 40 s, and 90 s with waiting."""
    sweep = sweep_of(THREE)
    _, results, _ = run(sweep)
    for path, start in zip(sorted((results.workdir / "results").iterdir()), (40, 90, 5), strict=True):
        result = json.loads(path.read_text())
        result["evaluation"]["training"]["step_seconds"] = 10
        result["seconds"] = {"train": 1000.0 + start, "evaluate": 5.0}
        path.write_text(json.dumps(result))
    shutil.rmtree(results.point_folder(sweep.points[0].name))
    assert Runner(sweep, results, Options(train_alone=True), Table([]))._estimate(sweep.points[0]) == 40 + 1000 + 5
    assert Runner(sweep, results, Options(), Table([]))._estimate(sweep.points[0]) == 90 + 1000 + 5


def test_checkpoints_are_deleted_once_no_point_needs_them(sweep_of, run):
    sweep = sweep_of(BRANCHES)
    status, results, _ = run(sweep, chosen=[sweep.points[0]], delete_checkpoints=True)
    assert status == 0
    assert (results.point_folder("small") / "checkpoints" / "40").exists()
    assert run(sweep, delete_checkpoints=True)[0] == 0
    assert not list(results.workdir.glob("points/*/checkpoints"))


def test_a_budget_starts_nothing_that_would_not_fit(sweep_of, run, monkeypatch):
    sweep = sweep_of(THREE)
    assert run(sweep, chosen=list(sweep.points[:1]), budget_seconds=1000)[0] == 0
    # The one timed point took 10 s a step, says its result; it trained 100 steps.
    path = next(pathlib.Path(run(sweep, chosen=[])[1].workdir / "results").glob("*.json"))
    result = json.loads(path.read_text())
    result["evaluation"]["training"]["step_seconds"] = 10
    result["seconds"] = {"train": 1005.0, "evaluate": 5.0}
    path.write_text(json.dumps(result))
    status, _, calls = run(sweep, budget_seconds=1000)
    assert (status, calls) == (75, [])
    status, _, calls = run(sweep, budget_seconds=1020)
    assert (status, len(calls)) == (0, 4)


def test_a_budget_counts_the_trainings_that_have_their_turn_first(sweep_of, run, monkeypatch):
    """One timed point: 10 s a step, 5 s to start, 5 s to evaluate; in another sweep 20 of 100 steps are done."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    sweep = sweep_of(THREE)
    _, results, _ = run(sweep, chosen=list(sweep.points[:1]))
    path = next((results.workdir / "results").glob("*.json"))
    result = json.loads(path.read_text())
    result["evaluation"]["training"]["step_seconds"] = 10
    result["seconds"] = {"train": 1005.0, "evaluate": 5.0}
    path.write_text(json.dumps(result))
    last, other = sweep.points[2], sweep.points[1]
    folder = results.point_folder(other.name)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 20, "loss": 1.0}\n')
    options = {"train_alone": True, "chosen": [last]}
    # A process that lives stands for the other sweep, whose 800 s come first.
    queue = results.workdir / f"queue-3.{os.getppid()}"
    queue.write_text(other.name)
    assert run(sweep, budget_seconds=1800, **options)[::2] == (75, [])
    assert run(sweep, budget_seconds=1810, **options)[::2] == (0, [f"train {last.name}", f"evaluate {last.name}"])
    shutil.rmtree(results.point_folder(last.name))
    next((results.workdir / "results").glob(f"{last.name}.*")).unlink()
    # Where it does not train yet either, the GPU is idle for 5 s more, and does 20 steps more.
    (folder / "metrics.jsonl").unlink()
    assert run(sweep, budget_seconds=2009, **options)[::2] == (75, [])
    queue.rename(results.workdir / f"queue-4.{os.getppid()}")
    assert run(sweep, budget_seconds=1008, **options)[::2] == (75, [])
    # Another sweep that starts at the same time is there by the time that the point is to train.
    check, hidden = Runner._check_time, results.workdir / f"queue-4.{os.getppid()}"

    def check_and_let_in(runner, point):
        check(runner, point)
        if hidden.exists():
            hidden.rename(queue)

    with monkeypatch.context() as patched:
        patched.setattr(Runner, "_check_time", check_and_let_in)
        assert run(sweep, budget_seconds=2009, **options)[::2] == (75, [])
    queue.unlink()
    dead = subprocess.Popen(["true"])
    dead.wait()
    (results.workdir / f"queue-3.{dead.pid}").write_text(other.name)
    status, results, calls = run(sweep, budget_seconds=1015, **options)
    assert (status, len(calls)) == (0, 2)
    assert not list(results.workdir.glob(f"queue-3.{os.getpid()}"))


@pytest.mark.parametrize("cause", ["budget", "signal"])
def test_what_is_told_to_stop_saves_and_the_next_start_goes_on(sweep_of, run, tmp_path, cause):
    sweep = sweep_of(THREE)
    folder = tmp_path / "sweep" / "points" / "seed1-window4-rattention"

    def terminate():
        while not (folder / "waiting").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    if cause == "signal":
        threading.Thread(target=terminate).start()
    options = {"budget_seconds": 2.0, "cut_points": True} if cause == "budget" else {}
    status, _, calls = run(sweep, "train:window4:wait", **options)
    assert (status, calls[-1]) == (75, "train seed1-window4-rattention")
    assert latest_step(folder) == 50
    status, results, calls = run(sweep)
    assert (status, len(results.all())) == (0, 3)
    assert calls[0] == "train seed1-window4-rattention"
    assert results.of(sweep.points[1])["trained_steps"] == 50


def test_sweeps_on_the_same_gpus_train_in_turns(sweep_of, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    sweep, results = sweep_of(THREE), Results(tmp_path / "sweep")
    options = (Options(train_alone=True), Options())
    alone, together = (Runner(sweep, results, each, Table([])).commands(sweep.points[0]) for each in options)
    assert [*together["train"], f"--turn_file={tmp_path}/sweep/training-3.lock"] == alone["train"]
    assert alone["evaluate"] == together["evaluate"]


def test_what_failed_in_a_sweep_beside_this_one_is_not_tried_again(sweep_of, run):
    sweep = sweep_of(THREE)
    _, results, _ = run(sweep, "train:window4:fail", chosen=[sweep.points[1]])
    (record,) = (results.workdir / "failures").iterdir()
    os.utime(record, (time.time() + 60, time.time() + 60))
    status, _, calls = run(sweep)
    assert (status, len(calls)) == (1, 4)
    os.utime(record, (0, 0))
    assert run(sweep)[::2] == (0, [f"{stage} seed1-window4-rattention" for stage in ("train", "evaluate")])


def test_a_result_is_in_the_archive_before_the_next_point_begins(sweep_of, run, tmp_path):
    sweep, archive = sweep_of(THREE), tmp_path / "out" / "all.tar.xz"
    assert run(sweep, "train:window4:restart", archive=archive)[0] == 75
    assert Results(tmp_path / "there").merge(archive) == (1, 0, [])


def test_a_point_that_another_process_is_at_is_left_to_it(sweep_of, run, tmp_path):
    """Another sweep in the same workdir, or the training that a killed one left behind."""
    sweep = sweep_of(THREE)
    folder = tmp_path / "sweep" / "points" / sweep.points[1].name
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # What a process inherits holds the lock when its parent is gone.
        orphan = subprocess.Popen(["sleep", "60"], pass_fds=[file.fileno()])
    try:
        status, results, calls = run(sweep)
        assert (status, len(calls), len(results.all())) == (75, 4, 2)
    finally:
        orphan.kill()
        orphan.wait()
    assert run(sweep)[0] == 0


def test_a_folder_of_another_config_is_not_continued(sweep_of, run):
    """Settings that changed under the same name: the old run's checkpoints must not be taken for a beginning."""
    before = sweep_of("def sweep(add):\n    add(name='a', window=4)\n")
    assert run(before, "train:a:restart")[0] == 75
    after = sweep_of("def sweep(add):\n    add(name='a', window=8)\n")
    status, results, calls = run(after)
    assert (status, calls) == (1, [])
    assert "holds a run of another config" in results.failures()[0]["reason"]
    assert run(before)[0] == 0


def test_a_launcher_must_have_a_place_for_the_command():
    where = {"stage": "train", "name": "a", "workdir": "/w"}
    filled = fill_launcher("ssh {name} 'cd {workdir} && {command}'", ["python", "-m", "x y"], **where)
    assert filled == "ssh a 'cd /w && python -m 'x y''"
    with pytest.raises(UserError, match=r"--launcher 'ssh pod' has no \{command\}"):
        fill_launcher("ssh pod", ["x"], **where)


def test_merging_is_by_point_and_in_any_order_the_later_result_stays(sweep_of, run, tmp_path):
    sweep = sweep_of(THREE)
    _, whole, _ = run(sweep)
    first, second = (Results(tmp_path / name) for name in ("first", "second"))
    for results in (first, second):
        results.merge(whole.workdir)
    next((second.workdir / "results").glob("full*")).unlink()
    changed = next((second.workdir / "results").glob("*window4*"))
    result = json.loads(changed.read_text())
    result["finished_at"], result["evaluation"]["measured"][0]["nats_per_token"] = "2999-01-01T00:00:00+00:00", 9.0
    changed.write_text(json.dumps(result))
    archive = tmp_path / "archive.tar.xz"
    assert second.write_archive(archive) == 2
    for target, sources in ((Results(tmp_path / "ab"), (first.workdir, archive)), (Results(tmp_path / "ba"), None)):
        reports = [target.merge(source) for source in sources or (second.workdir, first.workdir)]
        assert names(target) == names(whole)
        assert target.of(sweep.points[1])["evaluation"]["measured"][0]["nats_per_token"] == 9.0
        conflicts = [sentence for _, _, sentences in reports for sentence in sentences]
        assert len(conflicts) == 1
        assert "the one of 2999-01-01T00:00:00+00:00 stays, for it finished later" in conflicts[0]
    with pytest.raises(UserError, match="neither a sweep's workdir nor an archive"):
        first.merge(tmp_path / "nothing")
