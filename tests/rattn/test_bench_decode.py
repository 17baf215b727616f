"""The decode benchmark on a CPU: that it runs, fits batches to memory, and counts its bound."""

import argparse
import dataclasses
import json
import sys

import jax
import pytest

from rattn import accounting
from scripts import bench_decode, plot_decode


def test_it_times_what_it_can_and_draws_it(tmp_path, monkeypatch, capsys):
    """One model is timed at 4 sequences; of the others, one does not compile and one has no room for 4."""
    out, compiled, measure = tmp_path / "decode.json", bench_decode.Model.compiled, bench_decode.measure
    real = bench_decode.Point(bench_decode.NARROW, 24, 4, 4, "auto", "auto")

    def compiled_once(model, point, **how):
        if point.model == "full":
            raise ValueError("no such thing\nin detail")
        return compiled(model, point, **how) if point == real else "not run"

    def measured_once(model, run, weights, point):
        if point.batch == 4 and point.model == bench_decode.WIDE:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return measure(model, run, weights, point) if point == real else [1.0, 2.0, 3.0]

    monkeypatch.setattr(bench_decode.Model, "compiled", compiled_once)
    monkeypatch.setattr(bench_decode, "measure", measured_once)
    line = ["--recipe", "tests/recipes/miniature.py", "--models", "full", "swa:4096", "rattention:512"]
    line += ["--contexts", "24", "--batches", "4", "3", "--fold", "4", "--copy_gib", "0.001", "--memory_gib", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_decode", *line, "--threads", "2", "--out", str(out)])
    bench_decode.main()
    result, said = json.loads(out.read_text()), capsys.readouterr().out
    places = [(point["model"], point["context"], point["batch"], point["fold"]) for point in result["points"]]
    assert places == [("rattention:512", 24, 4, 4), ("swa:4096", 24, 3, 4), ("rattention:512", 24, 3, 4)]
    for point in result["points"]:
        assert point["tokens_per_second"] == pytest.approx(point["batch"] * 1e3 / point["milliseconds"]["median"])
    assert "full, context 24, batch 4, C = 4, attention auto, products auto: ValueError no such thing\n" in said
    place = "swa:4096, context 24, batch 4, C = 4, attention auto, products auto"
    assert f"{place}: JaxRuntimeError RESOURCE_EXHAUSTED: Out of memory\n" in said
    assert [(gain["context"], gain["batch"]) for gain in result["figure_7"]] == [(24, 3)]
    assert said.rstrip().splitlines()[-1].split()[:5] == ["24", "3", "4", "xla", "xla"]
    monkeypatch.setattr(sys, "argv", ["plot_decode", str(out), str(tmp_path / "decode.png")])
    plot_decode.main()
    assert (tmp_path / "decode.png").stat().st_size > 10_000


def test_nothing_is_lowered_after_the_deadline(models):
    """Points are lowered one after another, and whoever waits for its turn may get it too late."""
    point = bench_decode.Point("rattention:512", 4096, 32, 32, "xla", "xla")
    assert models["rattention:512"].compiled(point, deadline=0.0) is None
    assert bench_decode.compile_all([point], models, 1, deadline=0.0) == {}


@pytest.fixture(scope="module")
def models():
    names = ("swa:4096", "rattention:512")
    return {name: bench_decode.Model("configs/rattn_3b.py", name, "float32") for name in names}


def test_the_largest_batches_fit(models):
    how = {"fold": [16], "attention": ["xla"], "products": ["auto"], "constants": [""]}
    args = argparse.Namespace(batches=["32", "max"], contexts=[4096, 65536], **how)
    points = bench_decode.points_of(args, models, memory=68 * 2**30)
    for point in points:
        assert models[point.model].bytes_beside_weights(point) <= 0.95 * 68 * 2**30

    def most(name, context):
        return max(point.batch for point in points if (point.model, point.context) == (name, context))

    # 448 MiB of keys and values against 154 MiB and the state.
    assert most("swa:4096", 4096) == 128
    assert most("rattention:512", 4096) == 256
    assert bench_decode.Point("rattention:512", 4096, 128, 16, "xla", "auto") in points
    assert bench_decode.Point("swa:4096", 65536, 24, 16, "xla", "auto") in points


def test_bound_bytes_by_hand(models):
    model, point = models["rattention:512"], bench_decode.Point("rattention:512", 4096, 32, 16, "xla", "auto")
    matrices = 56 * (2048 * (16 + 8) * 128 + 16 * 128 * 2048 + 3 * 2048 * 6656) + 131072 * 2048
    token = 2 * 4 * 128 * 2
    # Sequences have 4088 tokens in the middle of a call.
    sequence = 14 * 4088 * token + 42 * 512 * token + 56 * token + 42 * 4 * 256 * 128 * 4 * (1 + 2 / 16)
    assert model.bound_bytes(point) == 2 * matrices + 32 * sequence
    parts = accounting.decode_bytes(model.model, model.spec, 4096, fold_tokens=16)
    assert parts["weights"] == 2 * matrices


def test_figure_7_compares_like_with_like(models):
    def found(name, milliseconds, batch=32):
        point = bench_decode.Point(name, 4096, batch, 16, "xla", "xla")
        return dataclasses.asdict(point) | {"milliseconds": {"median": milliseconds}}

    entries = [found("rattention:512", 6.0), found("swa:4096", 8.0), found("rattention:512", 1.0, batch=1)]
    (gain,) = bench_decode.figure_7(models, entries, 3e12, 989e12)
    assert gain["measured"] == 0.25
    # Weights 6.3 GB; caches of 32 sequences: 15 GB against 5.9 GB with the states.
    assert gain["formula"] == pytest.approx(0.42, abs=0.02)
