"""The benchmark of a step's kernels: a trace's kernels in their order, and every case lowers for a Hopper GPU."""

import argparse
import gzip
import json

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from rattn.config import load_config, validate
from rattn.decoding import attention_gpu, products_gpu, products_persistent_gpu
from scripts import bench_decode_kernels
from scripts.constants import constants_set, values_set
from scripts.trace_costs import costs_by_kind, kernel_calls


def write_trace(folder):
    """Writes a trace of two GPUs and a host thread, its events in no order."""
    events = [
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "process_name", "pid": 3, "args": {"name": "/device:GPU:1"}},
        {"ph": "M", "name": "thread_name", "pid": 2, "tid": 7, "args": {"name": "Stream #7(Compute)"}},
        {"ph": "M", "name": "thread_name", "pid": 2, "tid": 8, "args": {"name": "XLA Ops"}},
        {"ph": "M", "name": "thread_name", "pid": 3, "tid": 7, "args": {"name": "Stream #7(Compute)"}},
    ]
    for pid, tid, start, name, micros in (
        (2, 7, 30, "decode_attention", 4),
        (2, 8, 10, "a step", 40),
        (3, 7, 10, "decode_attention", 5),
        (2, 7, 10, "decode_attention", 3),
        (2, 7, 32, "gemm_fusion_dot_1", 4),  # Let in while the one before runs, which ends at 34.
    ):
        events.append({"ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": micros, "name": name})
    (folder / "a.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))


def test_kernels_of_a_trace(tmp_path):
    with pytest.raises(FileNotFoundError, match="profile a run first"):
        kernel_calls(tmp_path)
    write_trace(tmp_path)
    names, seconds = zip(*kernel_calls(tmp_path), strict=True)
    assert names == ("decode_attention", "decode_attention", "gemm_fusion_dot_1")
    assert seconds == pytest.approx((3e-6, 4e-6, 2e-6))
    kinds = costs_by_kind(tmp_path)
    assert list(kinds) == ["softmax attention", "matrix products"]
    assert kinds["softmax attention"]["kernels"] == [("decode_attention", pytest.approx(7e-6), 2)]


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_cases_lower_with_their_variants(monkeypatch):
    monkeypatch.setattr(bench_decode_kernels, "COLD_BYTES", 1)
    model = validate(load_config("configs/rattn_3b.py")).model
    args = argparse.Namespace(tilings=["64:4:2:256", "32:2:2:768:64"])
    attention = "local:32", "ring:32", "full:4:256", "stream:8:256"
    cases = [bench_decode_kernels.attention_case(model, text, args) for text in attention]
    products = ("pallas_gpu:32", "pallas_gpu_persistent:32")
    cases += [bench_decode_kernels.products_case(model, text, rings=["80:0", "112:8"]) for text in products]
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    before = attention_gpu.TILING
    for case in cases:
        texts = set()
        for module, values in case.variants.values():
            with (
                values_set(module, values),
                use_abstract_mesh(AbstractMesh((), (), abstract_device=device)),
            ):
                jax.clear_caches()
                texts.add(case.traced().lower(lowering_platforms=("cuda",)).as_text())
        assert len(texts) == len(case.variants)
        assert all("__gpu$xla.gpu.triton" in text or "mosaic_gpu_v2" in text for text in texts)
        if case.profiled:
            traced = str(bench_decode_kernels.traced_profiled(case, "a folder").jaxpr)
            assert traced.count("profile_space=256") == traced.count("profile_dir='a folder'") > 0
    assert before == attention_gpu.TILING


def test_constants_are_set_for_a_while():
    def values():
        numbers = attention_gpu.MOST_PARTS, products_gpu.MOST_ROWS, products_persistent_gpu.REGISTERS
        return *numbers, attention_gpu.TILING, dict(products_gpu.TILES)

    before, text = values(), "attention_gpu.MOST_PARTS=7,products_gpu.MOST_ROWS=3,attention_gpu.TILING=16:1:4:256:64"
    text += ",products_gpu.TILES.down=32:64:8:1,products_persistent_gpu.REGISTERS=40:24:216"
    with constants_set(text, "rattn.decoding"):
        tiles = before[4] | {"down": products_gpu.Tile(columns=32, depth=64, warps=8)}
        assert values() == (7, 3, (40, 24, 216), attention_gpu.Tiling(16, 1, 4, 256, least=64), tiles)
    assert before == values()
    with pytest.raises(KeyError, match="up"), constants_set("products_gpu.TILES.up=32:64:8:1", "rattn.decoding"):
        raise AssertionError("not reached")
    with (
        pytest.raises(AttributeError, match="MOST_PARTZ"),
        constants_set("attention_gpu.MOST_PARTZ=7", "rattn.decoding"),
    ):
        raise AssertionError("not reached")


def test_the_timeline_of_scopes():
    """Of two warpgroups, one of which enters a scope twice."""
    events = [("out", 1, 5.0), ("out", 1, 7.0), ("meet", 1, 7.0), ("meet", 1, 8.0), ("out", 1, 9.0), ("out", 1, 9.5)]
    events += [("out", 2, 6.0), ("out", 2, 7.5)]
    events = [{"name": name, "tid": tid, "ts": ts, "ph": "BE"[i % 2]} for i, (name, tid, ts) in enumerate(events)]
    lines = bench_decode_kernels.timeline_table(events[::-1]).splitlines()
    assert [line.split() for line in lines[1:]] == [["out", "0.00", "3.00", "2"], ["meet", "2.00", "3.00", "1"]]
