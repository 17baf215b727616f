"""Sweeps: points, a runner that repeats nothing, merging, the verdict, the report; and one real sweep."""

import csv
import fcntl
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from rattn.config import load_config, to_json
from rattn.errors import UserError
from rattn.planning.topologies import parse_topology
from rattn.sweeping import runner as runner_module
from rattn.sweeping.costs import cost_table, trained_tokens
from rattn.sweeping.points import identity, load_sweep, product, same_config, select
from rattn.sweeping.report import csv_text, write_report
from rattn.sweeping.results import Results
from rattn.sweeping.runner import Options, Runner
from rattn.sweeping.summary import grouped, pareto_front, recall_beyond, repeated
from rattn.sweeping.table import Table
from rattn.sweeping.verdict import verdict
from tests.rattn.conftest import RECIPE
from tests.rattn.fake_point import made_up

FAKE = str(pathlib.Path("tests/rattn/fake_point.py").resolve())
THREE = """
from rattn.sweeping.points import product
def sweep(add):
    add(mixer="full", seed=0)
    for point in product(window=[4, 8], mixer=["rattention"]):
        add(seed=1, **point)
"""
BRANCHES = """
def sweep(add):
    small = add({"checkpoint.keep_steps": (40,)}, name="small", total_steps=60)
    add({"init_from_step": 40}, name="large", total_steps=200, init_from=small)
"""


@pytest.fixture
def sweep_of(tmp_path):
    """Returns a function (text of a sweep file, recipe arguments, **dotted overrides) -> the sweep."""

    def make(text, arguments="", **changes):
        file = tmp_path / "sweep.py"
        file.write_text(text)
        config = load_config(RECIPE, arguments)
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
        return load_sweep(str(file), f"{RECIPE}:{arguments}".removesuffix(":"), config)

    return make


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Returns a function (sweep, fault, **options) -> (status, results, calls), on stand-in commands."""
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path.cwd()))
    log = tmp_path / "calls"

    def call(sweep, fault="::", workdir="sweep", chosen=None, **options):
        monkeypatch.setenv("FAKE_POINT", fault)
        log.write_text("")
        configs = {point.name: to_json(point.config) for point in sweep.points}
        log.with_name("calls.configs").write_text(json.dumps(configs))
        results = Results(tmp_path / workdir)
        launcher = f"{sys.executable} {FAKE} {log} {{command}}"
        points = list(sweep.points) if chosen is None else chosen
        table = Table([point.name for point in points])
        status = Runner(sweep, results, Options(launcher=launcher, **options), table).run(points)
        return status, results, log.read_text().splitlines()

    return call


def names(results):
    return {result["name"] for result in results.all()}


# Points


def test_settings_go_to_the_recipe_or_to_the_config(sweep_of):
    text = 'def sweep(add):\n    add({"optimizer.learning_rate": 3e-4}, window=4, seed=7)\n'
    (point,) = sweep_of(text, "mixer=swa", log__every_steps=5).points
    assert point.recipe == f"{RECIPE}:mixer=swa,window=4"
    assert point.config.model.pattern == ("swa", "full")
    assert (point.config.model.window, point.config.seed, point.config.optimizer.learning_rate) == (4, 7, 3e-4)
    assert point.config.log.every_steps == 5
    assert set(point.overrides) == {
        "--config.log.every_steps=5",
        "--config.seed=7",
        "--config.optimizer.learning_rate=0.0003",
    }
    assert point.name == "window4-seed7-learning_rate0.0003"
    assert point.group == "learning_rate 0.0003"


def test_common_settings_hold_unless_a_point_says_otherwise(sweep_of):
    text = 'COMMON = {"steps": 20, "optimizer.learning_rate": 1e-4}\ndef sweep(add):\n    add(window=4)\n'
    text += "    add(window=8, steps=30)\nEVALUATION = ('--lengths=1,2',)\n"
    sweep = sweep_of(text)
    assert [point.config.total_steps for point in sweep.points] == [20, 30]
    assert [point.config.optimizer.learning_rate for point in sweep.points] == [1e-4, 1e-4]
    assert [point.name for point in sweep.points] == ["window4", "window8-steps30"]
    assert sweep.evaluation == ("--lengths=1,2",)


def test_product_runs_the_last_key_fastest():
    assert list(product(window=[1, 2], seed=[0, 1])) == [
        {"window": 1, "seed": 0},
        {"window": 1, "seed": 1},
        {"window": 2, "seed": 0},
        {"window": 2, "seed": 1},
    ]


def test_identity_is_of_the_run_and_not_of_where_it_lies(sweep_of):
    text = "def sweep(add):\n    add(window=4)\n"
    (here,) = sweep_of(text, data__path="/here", log__every_steps=3, checkpoint__keep=9).points
    (there,) = sweep_of(text, data__path="/there").points
    (other,) = sweep_of(text, optimizer__learning_rate=2e-2).points
    assert here.identity == there.identity != other.identity
    assert same_config(to_json(here.config), there.config)
    config = to_json(there.config)
    config["model"]["key_of_a_later_version"] = 1
    del config["loss"]["z_loss"]
    assert same_config(config, there.config)
    assert not same_config(config, other.config)
    assert identity(to_json(there.config), "trunk") != there.identity


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("add(windw=4)", r"The config has no key 'windw'"),
        ("add(window='x')", r"Recipe argument 'window' takes int, got 'x'"),
        ("add(mixer='swa', window=0)", r"The point 'swa-window0' cannot be resolved: config.model.window is 0"),
        ("add(window=4); add(window=4)", r"two points called 'window4'"),
        ("add(window=4, name='a/b')", r"The point name 'a/b' is to name a folder"),
        ("add(window=4); add(window=4, name='b')", r"'window4' and 'b' resolve to the same config"),
        ("add(init_from='trunc')", r"starts from 'trunc' and no point before it is called so"),
        ("pass", r"adds no points"),
        (
            "pass\n    add(mixer=UNKNOWN)",
            r"sweep.py' fails in line 3: NameError: name 'UNKNOWN' is not defined; mend it",
        ),
        ("add(", r"sweep.py' fails in line 2: SyntaxError: '\(' was never closed; mend it"),
    ],
)
def test_a_bad_point_gets_a_sentence(sweep_of, body, words):
    with pytest.raises(UserError, match=words):
        sweep_of(f"def sweep(add):\n    {body}\n")


@pytest.mark.parametrize(
    ("sweep", "recipe", "count"),
    [("window", "small", 38), ("recall", "recall", 36), ("tiny_window", "tiny", 5), ("tiny_recall", "recall", 6)],
)
def test_the_sweeps_that_are_here_resolve(sweep, recipe, count):
    path = f"configs/{recipe}.py"
    points = load_sweep(f"configs/sweeps/{sweep}.py", path, load_config(path)).points
    assert len(points) == count
    if sweep == "window":
        assert [point.name for point in points[:3]] == ["50M-full-seed0", "50M-full-seed1", "50M-rattention-64-seed0"]
        branches = [point for point in points if point.trunk]
        assert {trained_tokens(point) + point.first_step * 2**16 for point in branches} == {3052 * 2**16}
        assert len(branches) == 19
        for branch in branches:
            (trunk,) = (point for point in points if point.name == branch.trunk)
            assert trunk.config.checkpoint.keep_steps == (branch.config.init_from_step,)
            assert trunk.config.total_steps - trunk.config.optimizer.decay_steps == branch.first_step


def test_only_and_shard_choose_and_branches_stay_with_their_trunk(sweep_of):
    points = sweep_of(
        "def sweep(add):\n    for seed in range(3):\n        trunk = add(seed=seed, window=4)\n"
        "        add(seed=seed, window=8, init_from=trunk)\n"
    ).points
    parts = [[point.name for point in select(points, [], f"{i}/2")] for i in (1, 2)]
    assert sorted(parts[0] + parts[1]) == sorted(point.name for point in points)
    assert parts[1] == ["seed1-window4", "seed1-window8"]
    assert [point.name for point in select(points, ["*-window8"], "")] == [f"seed{i}-window8" for i in range(3)]
    with pytest.raises(UserError, match=r"--only 'seed0-window5' fits no point of the sweep, did you mean"):
        select(points, ["seed0-window5"], "")
    with pytest.raises(UserError, match="--shard is '3/2'"):
        select(points, [], "3/2")


# The runner


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
    other = Results(results.workdir.with_name("other"))
    other.merge(results.workdir)
    for path in (other.workdir / "results").glob("large.*"):
        path.unlink()
    status, results, calls = run(sweep, workdir="other")
    assert (status, calls) == (0, ["train small", "train large", "evaluate large"])
    command = Runner(sweep, results, Options(), Table([])).commands(large)["train"]
    assert f"--config.init_from={results.point_folder('small')}" in command


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
    assert runner_module.latest_step(folder) == 50
    status, results, calls = run(sweep)
    assert (status, len(results.all())) == (0, 3)
    assert calls[0] == "train seed1-window4-rattention"
    assert results.of(sweep.points[1])["trained_steps"] == 50


def test_one_of_several_sweeps_trains_at_a_time(sweep_of, run, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    sweep = sweep_of(THREE)
    (tmp_path / "sweep").mkdir()
    with (tmp_path / "sweep" / "training-3.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(sweep, train_alone=True, budget_seconds=0.3)[::2] == (75, [])
        assert run(sweep, chosen=[sweep.points[0]])[0] == 0
        releasing = threading.Timer(0.3, fcntl.flock, (file, fcntl.LOCK_UN))
        releasing.start()
        assert run(sweep, train_alone=True)[0] == 0
        releasing.join()


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
    filled = runner_module.fill_launcher("ssh {name} 'cd {workdir} && {command}'", ["python", "-m", "x y"], **where)
    assert filled == "ssh a 'cd /w && python -m 'x y''"
    with pytest.raises(UserError, match=r"--launcher 'ssh pod' has no \{command\}"):
        runner_module.fill_launcher("ssh pod", ["x"], **where)


# Merging


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


# The verdict and the report


def results_of(sweep, change=None):
    """Made-up results of all points; `change(config, evaluation)` may alter them."""
    made = []
    for point in sweep.points:
        evaluation = made_up(to_json(point.config))
        if change:
            change(point, evaluation)
        shared = {"name": point.name, "identity": point.identity, "group": point.group, "settings": point.settings}
        seconds = {"train": 1.0, "evaluate": 1.0}
        made.append({**shared, "finished_at": "x", "seconds": seconds, "trained_steps": 1, "evaluation": evaluation})
    return json.loads(json.dumps(made))


def losses(table, recall=0.0):
    """Sets each point's loss by (mixer, window, seed), and the loss of every recall bin to it plus `recall`."""

    def change(point, evaluation):
        mixer = point.config.model.pattern[0]
        entry = evaluation["measured"][0]
        entry["nats_per_token"] = table[mixer, point.config.model.window, point.config.seed]
        beyond = recall if mixer != "full" else 0.0
        for bin in entry["recall_by_distance"]:
            bin["nats_per_token"] = 1.0 + point.config.seed * 0.01 + beyond * (bin["first"] > 4)

    return change


CURVE = """
def sweep(add):
    for seed in (0, 1):
        add(mixer="full", window=32, seed=seed)
        for window in (2, 4, 8):
            add(window=window, seed=seed)
"""
# Full attention's spread is 0.01 / √2 and ε twice that: 0.0141.
TABLE = {("full", 32, seed): 2.0 + 0.01 * seed for seed in (0, 1)}
TABLE |= {
    ("rattention", window, seed): 2.0 + gap for window, gap in ((2, 0.03), (4, 0.019), (8, 0.0)) for seed in (0, 1)
}


def test_the_verdict_is_the_smallest_window_within_epsilon(sweep_of):
    sweep = sweep_of(CURVE)
    (group,) = grouped(results_of(sweep, losses(TABLE)))
    sentence, caution = verdict(group, None)
    # Means: full 2.005; window 4 is 0.0140 above it and within 0.0141, window 2 is 0.025 above.
    assert sentence.startswith("rattention: the smallest window whose loss")
    assert "attention's is 4 (of 2, 4, 8): loss +0.0140 (within ε = 0.0141)" in sentence
    assert "over 2 seeds: 0.0141 nats" in caution
    assert "attention's is 8 (" in verdict(group, 0.01)[0]
    assert "no window of 2, 4, 8 is within ε of full attention; the nearest in loss is 8" in verdict(group, -0.01)[0]


def test_recall_beyond_the_window_decides_too(sweep_of):
    """The loss of window 4 is within ε; its recall beyond the window is not, and that of window 8 is not either."""
    (group,) = grouped(results_of(sweep_of(CURVE), losses(TABLE, recall=0.5)))
    sentence = verdict(group, None)[0]
    assert "no window of 2, 4, 8 is within ε" in sentence
    assert "recall beyond the window +0.5000 (beyond ε = 0.0141)" in sentence


def test_a_bin_that_the_window_cuts_is_neither_within_nor_beyond(sweep_of):
    (run,) = grouped(results_of(sweep_of("def sweep(add):\n    add(window=6)\n")))[0].runs
    for bin in run.own["recall_by_distance"]:
        bin.update(nats_per_token=float(bin["first"]), targets=10)
    # Bins 1, 2, 3–4, 5–8, 9–16, 17–32: those beyond 6 begin with 9 and 17.
    assert recall_beyond(6)(run) == (9 + 17) / 2
    row = next(csv.DictReader(csv_text([run.result]).splitlines()))
    assert float(row["recall_loss_within_window"]) == (1 + 2 + 3) / 3
    assert float(row["recall_loss_beyond_window"]) == (9 + 17) / 2


def test_a_curve_that_is_not_monotone_is_said(sweep_of):
    table = TABLE | {("rattention", 8, seed): 2.1 for seed in (0, 1)}
    (group,) = grouped(results_of(sweep_of(CURVE), losses(table)))
    assert "is 4 (of 2, 4, 8)" in verdict(group, None)[0]
    assert "not monotone: 8 is larger and not within ε" in verdict(group, None)[0]


def test_two_results_of_one_seed_are_not_two_seeds(sweep_of):
    results = results_of(sweep_of(CURVE), losses(TABLE))
    again = json.loads(json.dumps(results[0])) | {"name": "again", "identity": "other", "finished_at": "y"}
    (group,) = grouped([again, *results])
    assert [run.result["name"] for run in group.full.runs] == ["again", results[4]["name"]]
    assert [result["name"] for result in repeated([again, *results])] == [results[0]["name"]]


def test_a_single_seed_of_full_attention_gives_no_verdict(sweep_of):
    text = CURVE.replace('seed in (0, 1):\n        add(mixer="full", window=32, seed=seed)', "seed in (0, 1):")
    (group,) = grouped(results_of(sweep_of(text), losses(TABLE)))
    assert verdict(group, None)[0].startswith("No verdict: full attention is not among the points")
    single = text.replace("def sweep(add):", "def sweep(add):\n    add(mixer='full', window=32, seed=1)")
    (group,) = grouped(results_of(sweep_of(single), losses(TABLE)))
    (sentence,) = verdict(group, None)
    assert "full attention ran with a single seed (1); add another seed, or say with --epsilon" in sentence
    assert "the smallest window" in verdict(group, 0.05)[0]


def test_the_pareto_front_by_hand():
    points = [(1, 5.0), (2, 4.0), (2, 3.0), (3, 3.5), (4, 3.0), (5, 1.0)]
    assert pareto_front(points) == [0, 2, 5]


def test_the_report_is_whole_and_needs_nothing_else(sweep_of, tmp_path):
    results = results_of(sweep_of(CURVE))
    failures = [{"name": "a<b", "stage": "train", "reason": "R&D failed."}]
    page = write_report(results, failures, tmp_path, None)
    text = page.read_text()
    # Nothing is fetched: the only addresses are names of XML vocabularies.
    assert set(re.findall(r'https?://[^"\s]+', text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "<script" not in text
    assert "<b>a&lt;b</b> (train): R&amp;D failed." in text
    assert text.count("<svg") == len(list(page.parent.glob("*.png"))) == 8
    assert "the smallest window whose loss" in text
    assert text.count('role="img"') == text.count("<svg")
    with (page.parent / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(results)
    assert csv_text(results).startswith("name,group,identity,mixer")
    first = next(row for row in rows if row["name"] == results[0]["name"] and row["length"] == "1")
    assert float(first["loss"]) == results[0]["evaluation"]["measured"][0]["nats_per_token"]


# The command


def command(*arguments):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    line = [sys.executable, "-W", "error", "-m", "rattn.sweep", *arguments]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_dry_run_counts_what_is_left(sweep_of):
    points = sweep_of(BRANCHES).points
    text = cost_table(points, {"small": "done"}, parse_topology("v6e:2x2"))
    assert "1 of 2 points to run" in text
    assert "large ← small" in text
    # A branch is charged for its own 160 steps of 8 rows of 32 tokens.
    assert trained_tokens(points[1]) == 160 * 8 * 32
    assert "chip-hours on v6e:2x2 (4 chips)" in text
    assert "--topology adds memory and step time" in cost_table(points, {}, None)


def test_a_cut_of_the_tiny_sweep_from_command_to_report(tmp_path, stream_folder):
    """Two seeds, of which the second compiles little anew; then merged into an empty workdir and reported there."""
    workdir, archive = tmp_path / "sweep", tmp_path / "all.tar.xz"
    arguments = [f"--config={RECIPE}", "--sweep=configs/sweeps/tiny_window.py", f"--workdir={workdir}"]
    arguments += [f"--config.data.path={stream_folder}", "--only=full-*"]
    arguments += ["--config.log.tensorboard=false", "--delete_checkpoints", "--noreport"]
    process = command(*arguments, f"--archive={archive}")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert "full-seed1  done" in out
    assert not list(workdir.glob("points/*/checkpoints"))
    process = command("--merge", str(archive), "--workdir", str(tmp_path / "there"), "--report_only")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "2 new results, 0 known" in out
    text = (tmp_path / "there" / "report" / "report.html").read_text()
    assert "No verdict: no point has a window" in text
    with (tmp_path / "there" / "report" / "results.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    measured = {(row["mixer"], row["window"], row["seed"], row["length"]) for row in rows}
    assert measured == {("full", "", seed, length) for seed in "01" for length in "12"}
    assert all(float(row["tokens_per_second"]) > 0 and 2 < float(row["loss"]) < 5 for row in rows)


def test_the_command_answers_in_one_sentence():
    process = command("--workdir=w", f"--config={RECIPE}", "--sweep=configs/sweeps/tiny_windw.py")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("rattn: There is no sweep file"), err
    assert len(err.splitlines()) == 1
