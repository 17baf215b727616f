"""Both forms against a float64 NumPy reference: the sum, and each gradient apart."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels_pallas import devices
from kernels_pallas.normed_sum import normed_sum
from kernels_pallas.normed_sum.pallas_gpu import TILE, TILES

EPSILON = 1e-3
RESULTS = ("o", "da", "db", "d_a_scale", "d_b_scale")
# The second program has two tiles, the boundary between the sequences lies inside a tile.
HOPPER_SHAPE = (2, (TILES + 2) * TILE // 2, 2, 128)


def draw(shape, dtype="float32"):
    """a, b, both scales and the cotangent of o, in float32 but with the precision of `dtype`; some rows are zero."""
    generators = np.random.default_rng(0).spawn(5)
    shapes = (shape, shape, shape[2:], shape[2:], shape)
    a, b, a_scale, b_scale, do = (g.normal(size=s).astype(np.float32) for g, s in zip(generators, shapes, strict=True))
    a[:, ::3] = b[:, ::5] = 0
    b *= 1e-2
    a, b, do = (np.asarray(x.astype(dtype), np.float32) for x in (a, b, do))
    return a, b, a_scale, b_scale, do


def run(implementation, arrays, dtype="float32"):
    """Returns `RESULTS` by name, in NumPy."""
    a, b, a_scale, b_scale, do = arrays

    @jax.jit
    def with_gradients(a, b, a_scale, b_scale, do):
        add = functools.partial(normed_sum, epsilon=EPSILON, implementation=implementation)
        o, pull = jax.vjp(add, a, b, a_scale, b_scale)
        return o, *pull(do)

    out = with_gradients(*(jnp.asarray(x, dtype) for x in (a, b)), a_scale, b_scale, jnp.asarray(do, dtype))
    assert [str(x.dtype) for x in out] == [dtype] * 3 + ["float32"] * 2
    return {name: np.asarray(x, np.float64) for name, x in zip(RESULTS, out, strict=True)}


def expected(arrays):
    """Returns `RESULTS` from the formulas in float64."""
    a, b, a_scale, b_scale, do = (x.astype(np.float64) for x in arrays)
    o, gradients, scale_gradients = 0, [], []
    for x, scale in ((a, a_scale), (b, b_scale)):
        rms = np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)
        o = o + x / rms * scale
        along = (x / rms * scale * do).mean(-1, keepdims=True)
        gradients.append((scale * do - x / rms * along) / rms)
        scale_gradients.append((do * x / rms).sum((0, 1)))
    return dict(zip(RESULTS, (o, *gradients, *scale_gradients), strict=True))


def assert_one_rounding(results, wanted):
    """Checks bfloat16 results, of which each is computed in float32 and rounded once.

    The error of a rounding is spread evenly over ± 2^-8 of the value's power of two, so that the norm of all errors is
    at most 2^-8 / √3 of the norm of the result; float32 adds 1e-5 of it. The gradients of the scales are not rounded.
    """
    for name, value in results.items():
        bound = 1e-5 if name.endswith("scale") else 2.0**-8 / 3**0.5 + 1e-5
        assert np.linalg.norm(value - wanted[name]) <= bound * np.linalg.norm(wanted[name]), name


def test_plain_matches_float64():
    arrays = draw((2, 15, 3, 8))
    wanted = expected(arrays)
    for name, value in run("plain", arrays).items():
        scale = np.abs(wanted[name]).max()
        np.testing.assert_allclose(value, wanted[name], rtol=0, atol=1e-5 * scale, equal_nan=False, err_msg=name)


def test_plain_rounds_once():
    arrays = draw((2, 15, 3, 8), "bfloat16")
    assert_one_rounding(run("plain", arrays, "bfloat16"), expected(arrays))


def test_hopper_kernels_interpreted(monkeypatch, capfd):
    """Arithmetic, copies and barriers; the layouts of registers are not simulated."""
    monkeypatch.setattr(devices, "on_hopper", lambda: True)
    arrays = draw(HOPPER_SHAPE, "bfloat16")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        assert_one_rounding(run("pallas_gpu", arrays, "bfloat16"), expected(arrays))
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_hopper_kernels_lower(monkeypatch):
    """Shared memory, layouts and copies are checked when a kernel is lowered, which takes no GPU."""
    monkeypatch.setattr(devices, "on_hopper", lambda: True)
    x, scale = jax.ShapeDtypeStruct(HOPPER_SHAPE, jnp.bfloat16), jax.ShapeDtypeStruct(HOPPER_SHAPE[2:], jnp.float32)

    def gradients(*operands):
        o, pull = jax.vjp(functools.partial(normed_sum, epsilon=EPSILON, implementation="pallas_gpu"), *operands)
        return pull(o)

    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(gradients).trace(x, x, scale, scale).lower(lowering_platforms=("cuda",))
    assert len(re.findall("custom_call @mosaic_gpu", lowered.as_text())) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [HOPPER_SHAPE, (1, 4096, 3, 128), (1, 72, 2, 128), (2, 128, 2, 64)])
def test_bfloat16_on_gpu(shape):
    """The last two shapes are not the kernels'."""
    arrays = draw(shape, "bfloat16")
    results, again = (run("pallas_gpu", arrays, "bfloat16") for _ in range(2))
    assert_one_rounding(results, expected(arrays))
    for name, value in results.items():
        np.testing.assert_array_equal(value, again[name], err_msg=f"{name}: another run, other bits")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"b": jnp.zeros((1, 4, 2, 7))}, ValueError, r"b_BTNH has shape \(1, 4, 2, 7\): it must be \(1, 4, 2, 8\)"),
        ({"b": jnp.zeros((1, 4, 2, 8), jnp.bfloat16)}, TypeError, "b_BTNH has dtype bfloat16: it must be float32"),
        ({"a_scale": jnp.zeros((8,))}, ValueError, r"a_scale_NH has shape \(8,\): it must be \(2, 8\)"),
        ({"b_scale": jnp.zeros((2, 8), jnp.bfloat16)}, TypeError, "b_scale_NH has dtype bfloat16: it must be float32"),
        ({"a": jnp.zeros((4, 2, 8))}, ValueError, r"a_BTNH has shape \(4, 2, 8\): it must have the four dims"),
        ({"a": jnp.zeros((1, 4, 2, 8), jnp.int32)}, TypeError, "a_BTNH has dtype int32: use one of float32, bfloat16"),
        ({"implementation": "cuda"}, ValueError, "implementation='cuda' is unknown: use one of plain, pallas_gpu"),
    ],
)
def test_errors(change, error, message):
    x, scale = jnp.zeros((1, 4, 2, 8)), jnp.zeros((2, 8))
    given = {"a": x, "b": x, "a_scale": scale, "b_scale": scale, "implementation": None} | change
    implementation = given.pop("implementation")
    with pytest.raises(error, match=message):
        normed_sum(*given.values(), epsilon=EPSILON, implementation=implementation)
