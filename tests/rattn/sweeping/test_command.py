"""The command: its dry run, one real sweep from command to report, and a mistake."""

import csv
import html
import os
import subprocess
import sys

import jax

from rattn.planning.topologies import parse_topology
from rattn.sweeping.costs import cost_table, trained_tokens
from rattn.sweeping.results import Results
from tests.rattn.conftest import RECIPE
from tests.rattn.sweeping.conftest import BRANCHES


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
    """Two seeds, of which the second compiles little anew, and a window; then merged and reported elsewhere."""
    workdir, archive = tmp_path / "sweep", tmp_path / "all.tar.xz"
    arguments = [f"--config={RECIPE}", "--sweep=configs/sweeps/tiny_window.py", f"--workdir={workdir}"]
    arguments += [f"--config.data.path={stream_folder}", "--only=full-*,rattention-window16-*"]
    arguments += ["--config.log.tensorboard=false", "--delete_checkpoints", "--noreport"]
    process = command(*arguments, f"--archive={archive}")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert "full-seed1  done" in out
    assert not list(workdir.glob("points/*/checkpoints"))
    process = command("--merge", str(archive), "--workdir", str(tmp_path / "there"), "--report_only")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "3 new results, 0 known" in out
    text = (tmp_path / "there" / "report" / "report.html").read_text()
    assert "twice full attention's spread (sample standard deviation) over 2 seeds" in html.unescape(text)
    with (tmp_path / "there" / "report" / "results.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    measured = {(row["mixer"], row["window"], row["seed"], row["length"]) for row in rows}
    points = ("full", "", "0"), ("full", "", "1"), ("rattention", "16", "0")
    assert measured == {(*point, length) for point in points for length in "12"}
    assert all(float(row["tokens_per_second"]) > 0 and 2 < float(row["loss"]) < 5 for row in rows)


def test_what_is_merged_may_be_named_with_commas_or_one_by_one(sweep_of, run, tmp_path):
    points = "def sweep(add):\n    for window in (2, 4, 8):\n        add(window=window)\n"
    archives = [tmp_path / f"{letter}.tar.xz" for letter in "abc"]
    for archive, point in zip(archives, sweep_of(points).points, strict=True):
        _, results, _ = run(sweep_of(points), chosen=[point], workdir=archive.stem)
        assert results.write_archive(archive) == 1
    first, second, third = map(str, archives)
    workdir = f"--workdir={tmp_path / 'all'}"
    process = command("--merge", f"{first},{second}", "--merge", third, workdir, "--noreport")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert [f"{archive}: 1 new results, 0 known." for archive in archives] == out.splitlines()
    assert len(Results(tmp_path / "all").all()) == 3


def test_the_command_answers_in_one_sentence():
    process = command("--workdir=w", f"--config={RECIPE}", "--sweep=configs/sweeps/tiny_windw.py")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("rattn: There is no sweep file"), err
    assert len(err.splitlines()) == 1
