"""The fold as a Triton kernel: interpreted on the CPU, lowered for a Hopper, and compiled where there is a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels_pallas import devices
from rattn.config import load_config
from rattn.decoding import fold_gpu
from rattn.decoding.cache import CacheLayout, Clock, fold
from rattn.decoding.layers import layer_specs

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

BATCH = 3
LAYER = next(layer for layer in layer_specs(load_config("configs/rattn_3b.py").model) if layer.has_linear)


def case(head_dim, state_dtype, fold_tokens, steps, unfolded):
    """Returns a layer, its layout and cache, and a clock: a long sequence, one that reaches back a little, a short."""
    layer = dataclasses.replace(LAYER, head_dim=head_dim, kv_heads=2, query_heads=4, window=40)
    layout = CacheLayout(BATCH, 4096, 40, fold_tokens, "bfloat16", state_dtype)
    random = np.random.default_rng(7)

    def draw(*shape, dtype=jnp.bfloat16):
        return random.standard_normal(shape, np.float32).astype(dtype)

    kept = BATCH, 2, layout.slots(layer), head_dim
    cache = {"k_BKSH": draw(*kept), "v_BKSH": draw(*kept)}
    cache["state_BKPH"] = draw(BATCH, 2, 2 * head_dim, head_dim, dtype=state_dtype)
    lengths, starts = np.array([steps + 900, 60, 9], np.int32), np.array([0, 13, 0], np.int32)
    clock = Clock(lengths, starts, np.zeros(BATCH, np.int32), np.int32(steps), np.int32(unfolded))
    return layer, layout, cache, clock


def check(interpret, *what):
    """Compares with XLA's fold, whose φ may be rounded to the other side: 2⁻⁸ of what a key adds."""
    layer, layout, cache, clock = case(*what)
    found = jax.jit(lambda *x: fold_gpu.fold(layer, layout, *x, interpret=interpret))(cache, clock)
    wanted = jax.jit(lambda *x: fold(layer, layout, {}, *x))(cache, clock)
    assert found.dtype == wanted.dtype == layout.state_dtype
    found, wanted, before = (np.asarray(x, np.float32) for x in (found, wanted, cache["state_BKPH"]))
    added = np.sqrt(np.mean((wanted - before) ** 2, (1, 2, 3)))
    error = np.sqrt(np.mean((found - wanted) ** 2, (1, 2, 3)))
    rounding = 2.0**-9 if layout.state_dtype == "bfloat16" else 0
    assert np.all(error <= 2.0**-10 * added + rounding)
    # The last reaches back less than a window: nothing of it may be added.
    assert np.all(added[:2] > 0)
    assert np.array_equal(found[2], before[2])


CASES = [
    (32, "float32", 8, 3, 8),  # the newest slot is at the ring's beginning: those that wait are round its end
    (128, "float32", 32, 70, 32),
    (128, "bfloat16", 32, 44, 5),
    (64, "float32", 21, 1000, 20),
]


@pytest.mark.parametrize("what", CASES)
def test_a_fold_is_that_of_xla(what):
    assert fold_gpu.fits(*case(*what)[:2])
    check(True, *what)


@pytest.mark.parametrize(
    "changes",
    [{"feature_map": "relu"}, {"feature_map_after_qk_norm": True}, {"head_dim": 48}, {"head_dim": 8}],
)
def test_other_layers_are_left_to_xla(changes):
    layer, layout, *_ = case(*CASES[0])
    assert not fold_gpu.fits(dataclasses.replace(layer, **changes), layout)
    assert not fold_gpu.fits(layer, dataclasses.replace(layout, fold_tokens=65))
    assert not fold_gpu.fits(layer, dataclasses.replace(layout, dtype="float32"))


def test_the_kernel_lowers_for_a_hopper_and_folds_in_place(monkeypatch):
    monkeypatch.setattr(devices, "on_hopper", lambda: True)
    layer, layout, cache, clock = case(*CASES[1])
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        run = jax.jit(lambda *x: fold_gpu.fold(layer, layout, *x, interpret=False))
        lowered = run.trace(cache, clock).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("#stablehlo.output_operand_alias<") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("what", CASES)
def test_on_a_gpu_a_fold_is_that_of_xla(what):
    check(False, *what)
