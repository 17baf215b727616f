"""The GPU kernels beside the suite: the Triton ones interpreted, the Hopper ones lowered, and on a GPU compared."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels_pallas import devices
from kernels_pallas.residual_linear_attention import pallas_gpu_hopper, residual_linear_attention
from kernels_pallas.residual_linear_attention.pallas_gpu_common import Plan
from tests.kernels_pallas.residual_linear_attention import rla_suite as suite

TRITON = suite.Implementation("pallas_gpu", chunk=16, H=16)
HOPPER = suite.Implementation("pallas_gpu", chunk=128, H=128)

# The scan over the chunks is still a Triton kernel.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")


@pytest.mark.parametrize("name", ["window_below_chunk", "history_above_window", "bare"])
def test_interpreted_matches_reference(name):
    case = suite.cases(TRITON.chunk, TRITON.H)[name]
    ids = suite.document_rows(case, TRITON.chunk)
    arrays = suite.random_arrays(case, batch=len(ids))
    suite.assert_close(suite.run(TRITON, case, arrays, ids), suite.run_reference(case, arrays, ids))


@pytest.mark.parametrize("head_dim", [8, 96])
def test_head_dim_must_be_a_power_of_two(head_dim):
    x = jnp.zeros((1, 4, 1, head_dim))
    with pytest.raises(ValueError, match=f"q_BTNH has head dim {head_dim}"):
        residual_linear_attention(x, x, x, window=2, implementation="pallas_gpu")


def test_hopper_kernels_lower(monkeypatch):
    """Shared memory, layouts and copies are checked when a kernel is lowered, which takes no GPU."""
    monkeypatch.setattr(devices, "on_hopper", lambda: True)
    q, kv = (jax.ShapeDtypeStruct((1, 1024, heads, 128), jnp.bfloat16) for heads in (4, 2))
    ids = jax.ShapeDtypeStruct((1, 1024), jnp.int32)

    def gradients(q, k, v, ids):
        def attend(q, k, v):
            return residual_linear_attention(q, k, v, window=72, kv_segment_ids=ids, implementation="pallas_gpu")

        o, pull = jax.vjp(attend, q, k, v)
        return pull(o)

    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(gradients).trace(q, kv, kv, ids).lower(lowering_platforms=("cuda",))
    calls = re.findall(r"custom_call @(mosaic_gpu\w*|__gpu\$xla.gpu.triton)", lowered.as_text())
    assert len(calls) == 7, calls  # sums, scan, outputs; dq, sums, scan, dkv


@pytest.mark.parametrize(("T", "S", "window"), [(300, 300, 40), (200, 520, 64), (40, 400, 8), (256, 256, 256)])
def test_hopper_places_are_the_masks(T, S, window):
    """A key is joined or read, and a query reads the state, exactly as the documents and the window say."""
    plan = Plan(
        batch=1,
        query_len=T,
        kv_len=S,
        heads=1,
        kv_heads=1,
        head_dim=128,
        window=window,
        feature_map="softmax",
        blocks=pallas_gpu_hopper.BLOCKS,
        has_ids=True,
    )
    ids = np.searchsorted([7, 50, 133, 190, 300], np.arange(S), side="right")[None].astype(np.int32)
    queries, keys = pallas_gpu_hopper.places(plan, plan.documents(ids), ids[:, S - T :], ids)
    C, past = plan.chunk, plan.past_chunks
    for c in range(plan.chunks):
        t = (c - past) * C + np.arange(C)
        position = t + plan.lag
        newest = ids[0, np.clip([position[0] - 1, position[-1]], 0, max(S - 1 - window, 0))]
        there = (t >= 0) & (t < T)
        q_ids, reads = np.asarray(queries[0, c])
        np.testing.assert_array_equal(q_ids[there], ids[0, S - T :][t[there]])
        np.testing.assert_array_equal(reads[there], ids[0, S - T :][t[there]] == newest[0])
        read = (position >= 0) & (position < S - window)
        kv_ids, joins = np.asarray(keys[0, c])
        np.testing.assert_array_equal(kv_ids[read], ids[0, position[read]])
        np.testing.assert_array_equal(joins[read], kv_ids[read] == newest[1])
        assert not joins[~read].any()
    assert not np.asarray(keys[0, plan.chunks :, 1]).any()


BASE = suite.Case(T=392, S=392, window=128, H=128, dtype="bfloat16")
HOPPER_CASES = {
    "window_at_chunk": BASE,
    "window_across_tiles": dataclasses.replace(BASE, window=72),
    "no_window": dataclasses.replace(BASE, window=0),
    "window_above_length": dataclasses.replace(BASE, window=400),
    "history": dataclasses.replace(BASE, S=520, window=40),
    "history_above_window": dataclasses.replace(BASE, T=40, S=704, window=8),
    "group_of_one": dataclasses.replace(BASE, G=1),
    "group_of_four": dataclasses.replace(BASE, K=1, G=4),
    "relu": dataclasses.replace(BASE, feature_map="relu"),
    "bare": dataclasses.replace(BASE, documents=False, initial=False),
    "head_dim_64": dataclasses.replace(BASE, H=64),
    "head_dim_256": dataclasses.replace(BASE, H=256),
    "odd_lengths": dataclasses.replace(BASE, T=333, S=401, window=37),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", HOPPER_CASES)
def test_bfloat16_on_gpu(name):
    """Five roundings to bfloat16, of at most u = 2^-8 and half of that on average, lie between an input and a result.

    They are φ(k), the sum of a chunk, the state, φ(q) or the cotangent, and the result. The errors of the terms are
    independent, so that the norm of all errors stays below 5 u / 2 times the norm of the result.
    """
    case = HOPPER_CASES[name]
    ids = suite.document_rows(case, HOPPER.chunk)
    arrays = suite.random_arrays(case, batch=len(ids))
    results, again = (suite.run(HOPPER, case, arrays, ids) for _ in range(2))
    expected = suite.run_reference(case, arrays, ids)
    assert results.keys() == expected.keys()
    for result, value in results.items():
        np.testing.assert_array_equal(value, again[result], err_msg=f"{result}: another run, other bits")
        error = np.linalg.norm((value - expected[result]).astype(np.float64))
        assert error <= 2.5 * 2.0**-8 * np.linalg.norm(expected[result].astype(np.float64)), result
        zero = ~expected[result].any(axis=-1)  # a row of another document, or one that nobody reads
        assert not value[zero].any(), result


@pytest.mark.gpu
def test_extreme_magnitudes_on_gpu():
    """A softmax may see nearly the largest number; what it is multiplied with is ordinary."""
    ids = suite.document_rows(BASE, HOPPER.chunk)
    arrays = suite.random_arrays(BASE, batch=len(ids))
    arrays |= {n: np.asarray((3e37 * arrays[n]).astype(jnp.bfloat16), np.float32) for n in "qk"}
    for result, value in suite.run(HOPPER, BASE, arrays, ids).items():
        assert np.isfinite(value).all(), result
