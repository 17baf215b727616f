"""What the TPU kernels promise beside their values: they compile for real TPUs, and shapes choose their grid."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

from kernels_pallas.residual_linear_attention import pallas_tpu, residual_linear_attention, tuning
from tests.kernels_pallas.residual_linear_attention import rla_suite as suite

IMPLEMENTATION = suite.Implementation("pallas_tpu", chunk=128, H=128)


@pytest.fixture(autouse=True)
def real_chunk(monkeypatch, small_chunk):
    """The sizes that run on a TPU; `small_chunk` came first."""
    monkeypatch.setattr(tuning, "TPU_CHUNK", 128)
    monkeypatch.setattr(tuning, "TPU_CHUNKS", 4)


@pytest.fixture
def no_compilation_cache():
    """A program for a TPU cannot be read back from the cache without one."""
    compilation_cache.reset_cache()
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    compilation_cache.reset_cache()
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiles_for_tpu(topology, monkeypatch, no_compilation_cache):
    """Forward and backward, from a CPU; H = 64, a partial block, W off the chunk, S > T, ids, state in and out."""
    for name, value in {"TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", topology.split(":")[0] + "-8")
    try:
        device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    except Exception as e:
        pytest.fail(f"no TPU compiler for {topology}: {e}")
    sharding = SingleDeviceSharding(device)
    case = suite.Case(T=450, S=500, window=200, H=64, K=2, G=1, dtype="bfloat16")
    shapes = {
        "q": (1, case.T, 2, case.H),
        "k": (1, case.S, 2, case.H),
        "v": (1, case.S, 2, case.H),
        "initial_state": (1, 2, 2 * case.H, case.H),
    }
    dtypes = {"initial_state": jnp.float32}
    arrays = [jax.ShapeDtypeStruct(s, dtypes.get(n, jnp.bfloat16), sharding=sharding) for n, s in shapes.items()]
    ids = jax.ShapeDtypeStruct((1, case.S), jnp.int32, sharding=sharding)

    def gradients(q, k, v, initial_state, ids):
        def loss(*arrays):
            q, k, v, initial_state = arrays
            o, state = residual_linear_attention(
                q,
                k,
                v,
                window=case.window,
                kv_segment_ids=ids,
                initial_state=initial_state,
                return_state=True,
                implementation="pallas_tpu",
            )
            return o.astype(jnp.float32).sum() + state.sum()

        return jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, initial_state)

    text = jax.jit(gradients).lower(*arrays, ids).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2


def test_blocks_of_several_chunks_and_heads():
    """Two key/value heads a step, blocks of four chunks, keys in the first block of none: a chunk of real size."""
    case = suite.Case(T=1100, S=1100, window=512, H=64, K=4, G=1)
    ids = suite.document_rows(case, 128)[2:3]
    arrays = suite.random_arrays(case, batch=1)
    suite.assert_close(suite.run(IMPLEMENTATION, case, arrays, ids), suite.run_reference(case, arrays, ids))


def test_one_sequence_of_one_head_employs_two_cores(monkeypatch):
    case = suite.Case(T=300, S=300, window=128, H=128, K=1, G=2)
    plans = []
    monkeypatch.setattr(pallas_tpu, "_kernels", record(plans, pallas_tpu._kernels))
    ids = suite.document_rows(case, 128)[2:3]
    arrays = suite.random_arrays(case, batch=1)
    suite.assert_close(suite.run(IMPLEMENTATION, case, arrays, ids), suite.run_reference(case, arrays, ids))
    assert plans[0].group_splits == 2


def record(plans, kernels):
    def recorded(plan, *arguments):
        plans.append(plan)
        return kernels(plan, *arguments)

    return recorded


def static(**changes):
    base = {"query_len": 8192, "kv_len": 8192, "heads": 16, "kv_heads": 4, "head_dim": 128, "feature_map": "softmax"}
    return base | {"has_ids": True, "has_initial_state": False} | changes


def test_plan_of_the_benchmark_shape():
    plan = pallas_tpu._choose_plan(static(), batch=1, delay=512, itemsize=2)
    assert (plan.chunks, plan.kv_heads_per_step, plan.delay_blocks, plan.group_splits) == (4, 2, 1, 1)


@pytest.mark.parametrize("window", [0, 128, 256, 384, 512, 1024])
def test_a_window_of_whole_chunks_is_an_index_map(window):
    plan = pallas_tpu._choose_plan(static(), batch=1, delay=window, itemsize=2)
    assert plan.delay_blocks * plan.block == window


@pytest.mark.parametrize("length", [1, 127, 128, 129, 600, 8193])
def test_padding_costs_at_most_a_chunk_of_state(length):
    plan = pallas_tpu._choose_plan(static(query_len=length, kv_len=length), batch=1, delay=0, itemsize=2)
    assert plan.block <= -(-length // 128) * 128


def test_vmem_is_reduced_then_refused():
    wide = static(heads=64, kv_heads=1, head_dim=256)
    plan = pallas_tpu._choose_plan(wide, batch=8, delay=512, itemsize=4)
    assert plan.vmem_bytes(4) <= tuning.TPU_VMEM_BYTES
    with pytest.raises(ValueError, match=r"N=2, H=4096 .* MiB of VMEM"):
        pallas_tpu._choose_plan(static(heads=2, kv_heads=1, head_dim=4096), batch=1, delay=512, itemsize=4)
