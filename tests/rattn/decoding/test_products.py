"""The weight products of a step as kernels: interpreted on the CPU, lowered for a Hopper, and compiled on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels_pallas import devices
from rattn.decoding import layers, products_gpu
from rattn.decoding.layers import GATE_COLUMNS
from rattn.errors import UserError
from rattn.generate import on_devices
from rattn.model.layers import ACTIVATIONS
from tests.rattn.decoding.conftest import TOKENS, TWO_MIXERS
from tests.rattn.decoding.test_parity import LENGTHS, following, prefix

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

# Several tiles of each product, and several reads of each piece of a sum.
D, E, N, F, EPSILON = 256, 512, 96, 1024, 1e-6
MINIATURE = {"compute_dtype": "bfloat16", "layers": 2, "head_dim": 64, "width": 256, "mlp_width": 512} | TWO_MIXERS


@functools.partial(jax.jit, static_argnums=(0, 2))
def products(activation, given, interpret=True):
    """Runs the four kernels on arrays of their own."""
    x, squares = given["x"], jnp.sum(jnp.square(given["x"].astype(jnp.float32)), axis=1)[None]
    act = ACTIVATIONS[activation]
    found = {
        "qkv": products_gpu.project(x, squares, given["qkv"], EPSILON, interpret=interpret),
        "gate_up": products_gpu.gate(x, squares, given["gate_up"], EPSILON, act, interpret=interpret),
    }
    for name, key in (("out", "o"), ("down", "hidden")):
        summed, squares = products_gpu.add(name, x, given[key], given[name], interpret=interpret)
        found |= {name: summed, f"{name} squares": squares.sum(axis=0)}
    return found


def arrays(rows, width=D):
    """Draws rows, which differ in size, and weights."""
    random = np.random.default_rng(rows)
    shapes = {"x": (rows, width), "o": (rows, E), "hidden": (rows, F)}
    given = {name: random.standard_normal(shape) * np.logspace(-1, 1, rows)[:, None] for name, shape in shapes.items()}
    weights = {
        "qkv": (N, width),
        "out": (width, E),
        "gate_up": (F // GATE_COLUMNS, 2, GATE_COLUMNS, width),
        "down": (width, F),
    }
    given |= {name: random.standard_normal(shape) * shape[-1] ** -0.5 for name, shape in weights.items()}
    return {name: x.astype(jnp.bfloat16) for name, x in given.items()}


def by_hand(activation, given):
    """Returns each result in float64, and the most that a kernel's may differ.

    What is added up in float32 differs by up to 2⁻²³ of its terms' sizes for each of them: half of it would do if sums
    were rounded to the nearest, which a tensor core does not promise. An activation is 1.13 times as far off as what
    it takes, or less, and its own arithmetic a few units of float32. The result is rounded to bfloat16: 2⁻⁸ of it.
    """
    given = {name: np.asarray(x, np.float64) for name, x in given.items()}

    def product(x, w):
        return x @ w.T, np.abs(x) @ np.abs(w).T * x.shape[1] * 2.0**-23

    x, wanted = given["x"], {}
    normed = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + EPSILON)
    wanted["qkv"] = product(normed, given["qkv"])
    gate, up = (given["gate_up"][:, which].reshape(-1, x.shape[1]) for which in (0, 1))
    (g, off_g), (u, off_u) = (product(normed, w) for w in (gate, up))
    if activation == "silu":
        act = g / (1 + np.exp(-g))
    else:
        act = g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) / 2
    off_act = 1.13 * off_g + 2.0**-20 * np.abs(g)
    wanted["gate_up"] = act * u, off_act * np.abs(u) + off_u * (np.abs(act) + off_act)
    for name, key in (("out", "o"), ("down", "hidden")):
        y, off = product(given[key], given[name])
        wanted[name] = x + y, off + 2.0**-22 * np.abs(x)
    return {name: (y, off + 2.0**-8 * (np.abs(y) + off)) for name, (y, off) in wanted.items()}


def check_by_hand(rows, activation, interpret, width=D):
    given = arrays(rows, width)
    found = {name: np.asarray(x, np.float64) for name, x in products(activation, given, interpret).items()}
    for name, (wanted, bound) in by_hand(activation, given).items():
        assert np.isfinite(found[name]).all(), name
        assert (np.abs(found[name] - wanted) <= bound).all(), name
        assert (found[name] != wanted).any(), name
    for name in ("out", "down"):
        # Squares of bfloat16 are exact in float32 and positive: an addition costs 2⁻²⁴ of the sum or less.
        columns = products_gpu.TILES[name].columns
        additions = columns + found[name].shape[1] // columns
        squares = np.sum(found[name] ** 2, axis=1)
        np.testing.assert_allclose(found[f"{name} squares"], squares, rtol=additions * 2.0**-24)


def check_rows_alone(interpret):
    """A row's bits stay when what is beside it is another, or no number."""
    given = arrays(5)
    beside = {name: np.array(given[name]) for name in ("x", "o", "hidden")}
    for x in beside.values():
        x[[0, 1, 4]] = x[[1, 4, 0]] * jnp.bfloat16(3)
        x[3] = np.nan
    found, alone = (products("gelu", one, interpret) for one in (given, given | beside))
    for name, x in found.items():
        np.testing.assert_array_equal(np.asarray(x[2], np.float32), np.asarray(alone[name][2], np.float32))
        assert np.isnan(np.asarray(alone[name][3], np.float32)).all()


@pytest.mark.parametrize(
    ("rows", "activation", "width"),
    [(1, "gelu", D), (5, "silu", D), (32, "gelu", D), (32, "silu", 3 * D), (64, "gelu", D)],
)
def test_products_by_hand(rows, activation, width):
    check_by_hand(rows, activation, interpret=True, width=width)


def test_a_row_does_not_depend_on_others():
    check_rows_alone(interpret=True)


@pytest.mark.parametrize("width", [D, 3 * D])
def test_the_kernels_lower_for_a_hopper(monkeypatch, width):
    """Also where x has no power of two of tiles, which Triton's arrays must have."""
    monkeypatch.setattr(devices, "on_hopper", lambda: True)
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays(5, width))
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        for activation in ACTIVATIONS:
            lowered = products.trace(activation, given, False).lower(lowering_platforms=("cuda",))
            assert lowered.as_text().count("__gpu$xla.gpu.triton") == 4


def test_what_fits():
    assert products_gpu.fits(jnp.bfloat16, {"qkv": (3072, 2048), "out": (2048, 2048), "gate_up": (6656, 2048)})
    assert products_gpu.fits(jnp.bfloat16, {"out": (768, 768)})
    assert not products_gpu.fits(jnp.bfloat16, {"out": (768, 768 + 128)})
    assert not products_gpu.fits(jnp.float32, {"qkv": (3072, 2048)})
    assert not products_gpu.fits(jnp.bfloat16, {"qkv": (3088, 2048)})
    assert not products_gpu.fits(jnp.bfloat16, {"down": (2048, 6656 + 128)})


def check_model(miniature, changes, *how):
    """A model decodes alike in two ways, (attention, products) each: prompts of three lengths and five tokens.

    Both keep a layer's activations in bfloat16, rounded up to 14 times a layer by up to 2⁻⁸ of their size, evenly
    spread, and its weights: √(2 · 15 · L) · 2⁻⁸ / √3 root mean square, as in `test_parity`.
    """
    found = []
    for attention, products in how:
        mini = miniature(fold_tokens=3, attention=attention, products=products, **changes)
        assert ("out_DE" in mini.weights["layers"][0]) == (products != "xla")
        logits, cache = mini.chunk(mini.decoder.empty_cache(3, 24), prefix(LENGTHS), 10)
        steps, _ = mini.steps(cache, following(LENGTHS, 5))
        found.append((np.concatenate(logits), steps))
    bound = np.sqrt(2 * 15 * mini.model.layers) * 2.0**-8 / np.sqrt(3)
    for wanted, other in zip(*found, strict=True):
        error = np.sqrt(np.mean((other - wanted) ** 2) / np.mean(wanted**2))
        assert 0 < error < bound


def test_a_model_decodes_as_with_xla(miniature):
    check_model(miniature, MINIATURE, ("xla", "xla"), ("xla", "pallas_gpu"))


def test_more_rows_than_fit_are_left_to_xla(miniature, monkeypatch):
    mini = miniature(fold_tokens=3, attention="xla", products="pallas_gpu", **MINIATURE)

    def lowered():
        cache = mini.decoder.empty_cache(3, 24)
        step = jax.jit(lambda *x: mini.decoder._step(*x)).trace(mini.weights, cache, TOKENS[:, 0])
        return str(step.jaxpr).count("decode_product_gate_up")

    assert lowered()
    monkeypatch.setattr(products_gpu, "MOST_ROWS", 2)
    assert not lowered()


def test_weights_lie_in_one_way_only(miniature):
    """Folded scales and transposed weights are the same model, and nothing is kept twice."""
    one, other = (
        miniature(fold_tokens=3, attention="xla", products=products_by, **MINIATURE).weights["layers"][0]
        for products_by in ("xla", "pallas_gpu")
    )
    assert not {"qkv_DKAH", "out_ED", "gate_up_DCF", "down_FD", "mixer_norm_D", "mlp_norm_D"} & set(other)
    assert set(other) <= set(layers.LAYER_DIMS)
    np.testing.assert_array_equal(np.asarray(one["down_FD"], np.float32).T, np.asarray(other["down_DF"], np.float32))
    scaled = np.asarray(one["gate_up_DCF"], np.float32) * np.asarray(one["mlp_norm_D"])[:, None, None]
    folded_CJFD = np.swapaxes(np.asarray(other["gate_up_JCFD"], np.float32), 0, 1)
    folded = folded_CJFD.reshape(2, -1, scaled.shape[0])
    # One was rounded before the scale and the other after it, each by up to 2⁻⁸ of itself.
    np.testing.assert_allclose(np.moveaxis(folded, -1, 0), scaled, rtol=2 * 2.0**-8 / (1 - 2.0**-8), atol=0)


def test_wrong_choices_are_refused(miniature):
    mini = miniature(fold_tokens=3, attention="xla", products="pallas_gpu", **MINIATURE)
    decoder = type(mini.decoder)
    with pytest.raises(UserError, match="products is 'pallas'"):
        decoder(mini.model, on_devices(1, 1), products="pallas")
    with pytest.raises(UserError, match="products='pallas_gpu_hopper' runs on a Hopper GPU and there is none"):
        decoder(mini.model, on_devices(1, 1), products="pallas_gpu_hopper")
    with pytest.raises(UserError, match="products='pallas_gpu' runs on one device and there are 2"):
        decoder(mini.model, on_devices(2, 1), products="pallas_gpu")


@pytest.mark.gpu
def test_on_a_gpu_products_by_hand():
    for rows, activation in ((1, "silu"), (5, "gelu"), (32, "gelu"), (48, "gelu"), (64, "silu")):
        check_by_hand(rows, activation, interpret=False)
    check_by_hand(32, "gelu", interpret=False, width=3 * D)
    check_rows_alone(interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["xla", "pallas_gpu"])
def test_on_a_gpu_a_model_decodes_as_with_xla(miniature, attention):
    check_model(miniature, MINIATURE, (attention, "xla"), (attention, "pallas_gpu"))
