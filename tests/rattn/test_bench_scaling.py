"""The table of the scaling run, with commands that print what a measurement would."""

import argparse
import json
import sys

import pytest

from scripts import bench_scaling
from scripts.bench_scaling import Point, points, run, table


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(gpus=4, out=tmp_path)


def measured(point):
    """A result whose rate a GPU falls by a tenth whenever GPUs double."""
    rate = 1000 * point.gpus * 0.9 ** (point.gpus.bit_length() - 1)
    result = {"seconds": [1.0, 2.0, 1.5], "tokens_per_second": rate, "mfu": 0.5, "peak_bytes": 2**33}
    traffic = {"collectives": {"all-gather": {"bytes": 3e9}}, "planned_bytes": {"ici weights": 2.5e9}}
    return result | traffic if point.gpus > 1 else result


def test_points_run_once_each_and_a_failure_ends_nothing(args, monkeypatch, capsys):
    def command(self, _):
        if self == Point("full::8192", 2):
            return [sys.executable, "-c", "raise MemoryError('RESOURCE_EXHAUSTED: too much')"]
        return [sys.executable, "-c", f"print('noise'); print({json.dumps(measured(self))!r})"]

    monkeypatch.setattr(Point, "command", command)
    results = run(points(4), args)
    assert set(results) == set(points(4))
    lines = table(results).splitlines()
    assert any(line.startswith("full::8192") and "failed: MemoryError: RESOURCE_EXHAUSTED" in line for line in lines)
    row = next(line for line in lines if line.startswith("rattention:512:8192") and " 4 " in line)
    assert "81.0 %" in row
    assert "all-gather 3.0 (2.5)" in row
    assert "1.500 (1.000–2.000)" in row
    assert len((args.out / "results.jsonl").read_text().splitlines()) == 10


def test_no_gpu_is_given_twice(args, monkeypatch):
    code = "import os, time; time.sleep(0.3); print('{\"seen\": \"' + os.environ['CUDA_VISIBLE_DEVICES'] + '\"}')"
    monkeypatch.setattr(Point, "command", lambda self, _: [sys.executable, "-c", code])
    busy, taken = set(), []
    popen = bench_scaling.subprocess.Popen

    def watched(command, env, **rest):
        process = popen(command, env=env, **rest)
        gpus = {int(gpu) for gpu in env["CUDA_VISIBLE_DEVICES"].split(",")}
        for other, others in taken:
            assert other.poll() is not None or not gpus & others
        taken.append((process, gpus))
        busy.update(gpus)
        return process

    monkeypatch.setattr(bench_scaling.subprocess, "Popen", watched)
    results = run([Point("a", 4), Point("b", 2), Point("c", 1), Point("d", 1), Point("e", 1)], args)
    assert {point.point: result["seen"].count(",") + 1 for point, result in results.items()} == {
        "a": 4,
        "b": 2,
        "c": 1,
        "d": 1,
        "e": 1,
    }
    assert busy == {0, 1, 2, 3}
