"""The table of the scaling run, with commands that print what a measurement would."""

import argparse
import json
import sys

import pytest

from scripts.bench_scaling import Point, points, run, table


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(gpus=4, out=tmp_path, limit_seconds=2)


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


WAITS = """
import json, os, pathlib, sys, time
out, name, flag, *turn = sys.argv[1:]
out = pathlib.Path(out)
def log(what):
    with open(out / "log", "a") as file:
        print(what, name, file=file)
if flag == "--compile_only":
    time.sleep(0.1)
    log("compiled")
    sys.exit(f"{name} cannot be compiled" if name == "g_2" else 0)
(turn,) = map(pathlib.Path, turn)
turn.with_name(turn.name + ".compiled").touch()
log("ready")
while not turn.with_name(turn.name + ".go").exists():
    time.sleep(0.02)
gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
for gpu in gpus:
    os.mkdir(out / f"gpu{gpu}")  # Fails where another has it.
if name == "f_1":
    print("RESOURCE_EXHAUSTED", flush=True)
    os.rmdir(out / f"gpu{gpus[0]}")
    time.sleep(60)
time.sleep(0.3)
for gpu in gpus:
    os.rmdir(out / f"gpu{gpu}")
log("trained")
print(json.dumps({"seen": gpus}))
"""


def test_all_compile_at_once_and_no_gpu_is_given_twice(args, monkeypatch):
    def command(self, args):
        return [sys.executable, "-c", WAITS, str(args.out), self.name]

    monkeypatch.setattr(Point, "command", command)
    rows = [Point(name, gpus) for name, gpus in (("a", 4), ("b", 2), ("c", 1), ("d", 1), ("f", 1), ("g", 2), ("h", 4))]
    results = run(rows, args)
    # One that hangs ends nothing but itself, and so does one that cannot be compiled.
    assert results.pop(Point("f", 1)) == {"error": "did not end within 2 s; RESOURCE_EXHAUSTED"}
    assert results.pop(Point("g", 2)) == {"error": "g_2 cannot be compiled"}
    assert {point: len(set(result["seen"])) for point, result in results.items()} == {
        point: point.gpus for point in rows if point.point not in "fg"
    }
    log = (args.out / "log").read_text().split()[::2]
    assert log == ["compiled"] * 7 + ["ready"] * 6 + ["trained"] * 5


def test_the_rows_of_a_machine():
    assert [point.gpus for point in points(4)] == [4] * 4 + [2] * 3 + [1] * 3
    assert [point.gpus for point in points(4, [4, 1])] == [4] * 4 + [1] * 3
    assert [point.gpus for point in points(1)] == [1] * 3
