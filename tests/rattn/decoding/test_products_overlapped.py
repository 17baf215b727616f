"""The products between two layers as kernels that overlap: interpreted on a CPU, lowered, run where there is a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from rattn.decoding import products_overlapped_gpu
from rattn.decoding.products_overlapped_gpu import divided, fits
from rattn.model.layers import ACTIVATIONS
from tests.rattn.decoding.test_products import check_model
from tests.rattn.decoding.test_products_persistent import (
    DEEP,
    EPSILON,
    HUGE,
    MINIATURE,
    WIDE,
    arrays,
    assert_by_hand,
    by_hand,
)

# Of the 12B model, and of one that the interpreter can run: slots that are used again, a last tile that is part of two.
BILLIONS = {"out": (5120, 5120), "gate_up": (16384, 5120), "down": (5120, 16384), "qkv": (7168, 5120)}
NARROW = {"out": (256, 512), "gate_up": (512, 256), "down": (256, 512), "qkv": (104, 256)}


@functools.partial(jax.jit, static_argnums=(0, 2))
def products(activation, given, interpret=None):
    """Runs the kernels; returns what they write for the rows that there are."""
    x, qkv = products_overlapped_gpu.run(
        given["o"],
        given["x"],
        given["weights"],
        epsilon=EPSILON,
        activation=ACTIVATIONS[activation],
        interpret=interpret,
    )
    rows = given["o"].shape[0]
    return {"x": x[:rows]} | ({} if qkv is None else {"qkv": qkv[:rows]})


@pytest.mark.parametrize(("rows", "activation"), [(5, "gelu"), (40, "silu")])
def test_products_by_hand(rows, activation, monkeypatch):
    """Interpreted, in few slots, without a race."""
    size = 2 * 128 * (16 + 48)
    monkeypatch.setattr(products_overlapped_gpu, "SHARED_BYTES", 3 * size)
    monkeypatch.setattr(products_overlapped_gpu, "PROGRAMS", 16)
    jax.clear_caches()
    given = arrays(rows, NARROW)
    found = products(activation, given, plgpu.InterpretGPUParams(detect_races=True))
    assert_by_hand(found, by_hand(activation, given))


@pytest.mark.parametrize(("rows", "shapes"), [(1, WIDE), (32, DEEP), (64, HUGE), (32, BILLIONS)])
def test_the_kernels_lower_for_a_hopper(rows, shapes):
    assert fits(jnp.bfloat16, shapes)
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays(rows, WIDE))
    given["o"] = jax.ShapeDtypeStruct((rows, shapes["out"][1]), jnp.bfloat16)
    given["x"] = jax.ShapeDtypeStruct((64, shapes["out"][0]), jnp.bfloat16)
    given["weights"] = {
        name: jax.ShapeDtypeStruct((2 * columns if name == "gate_up" else columns, length), jnp.bfloat16)
        for name, (columns, length) in shapes.items()
    }
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        text = products.trace("gelu", given).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2(") == 4


@pytest.mark.parametrize("shapes", [WIDE, DEEP, HUGE, BILLIONS, NARROW])
def test_every_column_is_some_program_s(shapes):
    """And once only where its squares are added up; two programs have room on a multiprocessor."""
    for name, shape in shapes.items():
        product = divided(name, *shape)
        first = np.minimum(np.arange(product.programs) * product.tile, product.columns - product.tile)
        taken = np.concatenate([np.arange(at, at + product.tile) for at in first])
        assert set(taken) == set(range(product.columns))
        assert not product.adds or len(taken) == product.columns
        assert not product.adds or product.programs % 8 == 0
        for rows in (16, 32, 48, 64):
            slots = product.slots(rows)
            assert slots > 1
            used = 2 * product.depth * (slots * (rows + product.tile) + 64 - rows)
            assert used <= 104 * 1024


def test_what_fits():
    assert fits(jnp.bfloat16, DEEP)
    assert not fits(jnp.float32, DEEP)
    assert not fits(jnp.bfloat16, DEEP | {"out": (2048 + 8, 2048)})
    assert not fits(jnp.bfloat16, DEEP | {"down": (2048, 6656 + 64)})


def test_more_rows_than_fit_are_left_to_xla(miniature, hopper, monkeypatch):
    mini = miniature(fold_tokens=2, attention="xla", products="pallas_gpu_overlapped", **MINIATURE)

    def kernels():
        cache = mini.decoder.empty_cache(3, 24)
        step = jax.jit(lambda *x: mini.decoder._step(*x)).trace(mini.weights, cache, np.zeros(3, np.int32))
        return {name for name in ("out", "gate_up", "down", "qkv") if f"name=decode_product_{name}" in str(step.jaxpr)}

    assert len(kernels()) == 4
    monkeypatch.setattr(products_overlapped_gpu, "MOST_ROWS", 2)
    assert not kernels()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "shapes", "activation"),
    [
        (1, WIDE, "silu"),
        (12, WIDE, "gelu"),
        (32, DEEP, "gelu"),
        (32, HUGE, "silu"),
        (40, WIDE, "silu"),
        (64, DEEP, "gelu"),
    ],
)
def test_on_a_gpu_products_by_hand(rows, shapes, activation):
    given = arrays(rows, shapes)
    found = products(activation, given)
    assert_by_hand(found, by_hand(activation, given))
    last = dict(given, weights={name: w for name, w in given["weights"].items() if name != "qkv"})
    np.testing.assert_array_equal(*(np.asarray(run["x"], np.float32) for run in (found, products(activation, last))))


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["xla", "pallas_gpu"])
def test_on_a_gpu_a_model_decodes_as_with_xla(miniature, attention):
    check_model(miniature, MINIATURE, (attention, "xla"), (attention, "pallas_gpu_overlapped"))
