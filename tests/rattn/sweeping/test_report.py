"""The verdict, the curves and the report, on made-up results."""

import csv
import json
import re

import pytest

from rattn.config import to_json
from rattn.errors import UserError
from rattn.sweeping.report import csv_text, write_report
from rattn.sweeping.results import Results
from rattn.sweeping.summary import grouped, loss, pareto_front, recall_beyond, recall_loss, repeated
from rattn.sweeping.verdict import verdict
from scripts import window_numbers
from tests.rattn.sweeping.fake_point import made_up


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


def test_windows_are_compared_with_full_attention_at_equal_seeds(sweep_of):
    """Seed 1 is worse by 0.1 whatever the mixer: no window may be charged or credited for the seeds it ran with."""
    text = CURVE.replace("for window in (2, 4, 8):", "for window in (2, 4, 8)[seed:]:")
    table = {("full", 32, seed): 2.0 + 0.1 * seed for seed in (0, 1)}
    gaps = {(2, 0): 0.02, (4, 0): 0.01, (4, 1): 0.03, (8, 0): 0.0, (8, 1): 0.01}
    table |= {("rattention", *key): 2.0 + 0.1 * key[1] + gap for key, gap in gaps.items()}
    (group,) = grouped(results_of(sweep_of(text), losses(table)))
    two, four, eight = group.curve("rattention")
    assert [round(variant.excess(group.full, loss), 6) for variant in (two, four, eight)] == [0.02, 0.02, 0.005]
    assert [round(gap, 6) for gap in four.differences(group.full, loss)] == [0.01, 0.03]
    # Variances of (0.01, 0.03) and (0, 0.01), one degree of freedom each.
    spread, freedom = group.paired_spread(loss)
    assert (round(spread**2, 9), freedom) == ((0.0002 + 0.00005) / 2, 2)
    assert "spreads by 0.0112 (pooled, 2 degrees of freedom)" in verdict(group, None)[-1]
    assert "attention's is 8 (of 2, 4, 8): loss +0.0050" in verdict(group, 0.012)[0]


def test_without_a_common_seed_means_are_compared(sweep_of):
    sweep = sweep_of("def sweep(add):\n    add(mixer='full', window=32, seed=0)\n    add(window=4, seed=1)\n")
    table = {("full", 32, 0): 2.0, ("rattention", 4, 1): 2.5}
    (group,) = grouped(results_of(sweep, losses(table)))
    (four,) = group.curve("rattention")
    assert four.excess(group.full, loss) == 0.5
    assert four.differences(group.full, loss) == [0.5]
    assert group.paired_spread(loss) is None


def test_a_loss_below_full_attentions_by_more_than_epsilon_is_said(sweep_of):
    (group,) = grouped(results_of(sweep_of(CURVE), losses(TABLE | {("rattention", 2, seed): 1.9 for seed in (0, 1)})))
    assert "Its loss is lower than full attention's by more than ε." in verdict(group, None)[0]
    assert "No smaller one was tried." in verdict(group, None)[0]


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
    for result in results[:2]:
        run = tmp_path / "points" / result["name"]
        run.mkdir(parents=True)
        warmup_steps = result["evaluation"]["config"]["optimizer"]["warmup_steps"]
        lines = ({"step": warmup_steps + step, "loss": 3.0 - 0.01 * step} for step in range(10, 101, 10))
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9999, "lo')
    page = write_report(results, failures, tmp_path, None, missing=["full-seed7"])
    text = page.read_text()
    # Nothing is fetched: the only addresses are names of XML vocabularies.
    assert set(re.findall(r'https?://[^"\s]+', text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "<script" not in text
    assert "<b>a&lt;b</b> (train): R&amp;D failed." in text
    drawn = {path.stem for path in page.parent.glob("*.png")}
    assert text.count("<svg") == len(drawn) == 10
    assert drawn >= {"against_window", "training_loss", "recall_accuracy", "long_by_context", "by_length"}
    # Its bins hold 200 targets.
    assert "by_row_position" not in drawn
    assert "Not complete. Points without a result: full-seed7." in text
    table = [line for line in (page.parent / "tables.md").read_text().splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in table[2:]] == ["| full", *(f"| rattention {W}" for W in (2, 4, 8))]
    assert len({line.count("|") for line in table}) == 1
    assert "the smallest window whose loss" in text
    assert text.count('role="img"') == text.count("<svg")
    with (page.parent / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(results)
    assert csv_text(results).startswith("name,group,identity,mixer")
    first = next(row for row in rows if row["name"] == results[0]["name"] and row["length"] == "1")
    assert float(first["loss"]) == results[0]["evaluation"]["measured"][0]["nats_per_token"]


def test_a_run_that_was_not_measured_at_its_own_window_and_context_is_named(sweep_of, tmp_path):
    def longer_alone(point, evaluation):
        evaluation["measured"] = [entry for entry in evaluation["measured"] if entry["length"] > 1]

    results = results_of(sweep_of(CURVE), longer_alone)
    with pytest.raises(UserError, match=r"was not evaluated at its own window and context, by which runs are compared"):
        write_report(results, [], tmp_path, None)


def test_different_data_are_said_where_losses_are_compared(sweep_of, tmp_path):
    """Recall draws its rows by seed: only runs of one group and seed must have the same."""
    sweep = sweep_of(
        "def sweep(add):\n    for seed in (0, 1):\n        for W in (2, 4):\n            add(seed=seed, window=W)\n"
    )

    def said(changed):
        results = results_of(
            sweep, lambda point, evaluation: changed(point) and evaluation.update(data_fingerprint="1")
        )
        text = write_report(results, [], tmp_path, None).read_text()
        return "losses do not compare" in text, "losses compare within a group, at equal seeds" in text

    assert said(lambda point: point.config.seed == 1) == (False, True)
    assert said(lambda point: point.config.model.window == 4) == (True, False)


def test_accuracy_by_distance_is_laid_out(sweep_of):
    """A line for each run, a column for each bin of the rows' length; a bin without targets says nothing."""

    def change(point, evaluation):
        for entry in evaluation["measured"]:
            for bin in entry["recall_by_distance"]:
                bin["accuracy"] = entry["length"] / 10 + bin["first"] / 1000
            entry["recall_by_distance"][0].update(targets=0, accuracy=None)

    (group,) = grouped(results_of(sweep_of(CURVE), change))
    lines = window_numbers.by_distance(group).splitlines()
    bins = group.runs[0].at(group.lengths[0])["recall_by_distance"]
    assert lines[1].split() == ["distance", "from", *(str(bin["first"]) for bin in bins[1:])]
    for run, line in zip(group.runs, lines[2:], strict=False):
        wanted = (f"{group.lengths[0] / 10 + bin['first'] / 1000:.2f}" for bin in bins[1:])
        assert line.split() == [run.result["name"], *wanted]


def test_a_run_whose_targets_are_all_recall_has_a_line(sweep_of):
    def change(point, evaluation):
        for entry in evaluation["measured"]:
            entry["recall"]["targets"] = entry["targets"]

    (group,) = grouped(results_of(sweep_of(CURVE), change))
    curves = {run.identity: {} for run in group.runs}
    run = group.runs[0]
    assert window_numbers._line(group, run, curves).split() == [run.result["name"], f"{recall_loss(run):.3f}"]


def test_trainings_without_a_result_stand_beside_what_was_measured(sweep_of, tmp_path):
    """The same point's result, full attention of the same seed, and how far a point is from itself."""
    names = {("full", 32): "50M-full", ("rattention", 2): "50M-rattention-2", ("rattention", 4): "50M-rattention-4"}
    made = results_of(sweep_of(CURVE), losses(TABLE))
    for result in made:
        config = result["evaluation"]["config"]
        name = names.get((config["model"]["pattern"][0], config["model"]["window"]))
        if name:
            result["name"] = f"{name}-seed{config['seed']}"
    results = Results(tmp_path)
    (tmp_path / "results").mkdir()
    kept = [result for result in made if result["name"].startswith("50M") and "-4-seed1" not in result["name"]]
    for result in kept:
        (tmp_path / "results" / f"{result['name']}.{result['identity']}.json").write_text(json.dumps(result))
    assert window_numbers.unevaluated(results) == ""
    full, known, missing = (
        f"50M-{point}-unevaluated" for point in ("full-seed1", "rattention-2-seed0", "rattention-4-seed1")
    )
    for name, value in {full: 2.006, known: 2.033, f"{known}-2": 2.036, missing: 2.02}.items():
        folder = tmp_path / "points" / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 763, "eval/loss": value}) + "\n")
    lines = [line.split() for line in window_numbers.unevaluated(results).splitlines()[1:]]
    assert lines[0] == ["50M-full-seed1", "2.0060", "-0.0040", "-0.0040"]
    assert lines[1] == ["50M-rattention-2-seed0", "2.0330", "+0.0030", "+0.0330"]
    assert lines[2] == ["50M-rattention-2-seed0", "2.0360", "+0.0060", "+0.0360"]
    assert lines[3] == ["50M-rattention-4-seed1", "2.0200", "+0.0100"]
    # √((0.004²/2 + 2 · 0.003²) / 3): 2.03, 2.033 and 2.036 are 0.003 apart.
    assert " ".join(lines[4]) == "50M: 2 points trained again, 3 times, spread 0.0029"
