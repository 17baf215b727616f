"""The products between two layers as one kernel: played on the CPU, lowered, and by hand where there is a Hopper."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from ml_collections import ConfigDict

from kernels_pallas import devices
from rattn.decoding import layers, mosaic_gpu, products_persistent_gpu, products_persistent_plan
from rattn.decoding.decoder import Decoder
from rattn.decoding.layers import GATE_COLUMNS
from rattn.decoding.mosaic_gpu import GROUP_ROWS
from rattn.decoding.products_persistent_gpu import COUNTERS
from rattn.decoding.products_persistent_plan import PROGRAMS, Plan
from rattn.errors import UserError
from rattn.generate import on_devices
from rattn.model.layers import ACTIVATIONS
from tests.rattn.decoding.conftest import TWO_MIXERS
from tests.rattn.decoding.played import played
from tests.rattn.decoding.test_products import check_model

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

# Of the products "out", "gate_up", "down", "qkv": one copy a tile and several; one tile a program, none and several.
WIDE = {"out": (1024, 512), "gate_up": (1536, 1024), "down": (1024, 1536), "qkv": (768, 1024)}
DEEP = {"out": (2048, 2048), "gate_up": (6656, 2048), "down": (2048, 6656), "qkv": (3072, 2048)}
MANY = {"out": (1024, 512), "gate_up": (10240, 1024), "down": (1024, 10240), "qkv": (17408, 1024)}
SEVERAL = {"out": (1024, 512), "gate_up": (8704, 1024), "down": (1024, 8704), "qkv": (2096, 1024)}
BROAD = {"out": (4096, 512), "gate_up": (1024, 4096), "down": (4096, 1024), "qkv": (1024, 4096)}
HUGE = {"out": (4096, 4096), "gate_up": (14336, 4096), "down": (4096, 14336), "qkv": (6144, 4096)}
EPSILON = 1e-6
MINIATURE = {
    "compute_dtype": "bfloat16",
    "layers": 2,
    "query_heads": 8,
    "head_dim": 64,
    "width": 1024,
    "mlp_width": 1024,
} | TWO_MIXERS


def arrays(rows, shapes):
    """Draws rows, which differ in size, and weights; the rows of x past those that count hold no number."""
    random = np.random.default_rng(rows)
    sizes = np.logspace(-1, 1, rows)[:, None]
    width, length = shapes["out"]
    given = {"o": random.standard_normal((rows, length)) * sizes}
    x = np.full((-(-rows // GROUP_ROWS) * GROUP_ROWS, width), np.nan)
    x[:rows] = random.standard_normal((rows, width)) * sizes
    given["x"] = x
    weights = {}
    for name, (columns, length) in shapes.items():
        shape = (columns, length)
        if name == "gate_up":
            shape = (columns // GATE_COLUMNS, 2, GATE_COLUMNS, length)
        weights[name] = (random.standard_normal(shape) * length**-0.5).astype(jnp.bfloat16)
    return {name: x.astype(jnp.bfloat16) for name, x in given.items()} | {"weights": weights}


@functools.partial(jax.jit, static_argnums=(0, 2))
def products(activation, given, times=1):
    """Runs the kernel on arrays of its own, so many times over, each with the counters of the one before."""
    counters = products_persistent_gpu.zero_counters()
    for _ in range(times):
        x, qkv, counters = products_persistent_gpu.run(
            given["o"], given["x"], given["weights"], counters, epsilon=EPSILON, activation=ACTIVATIONS[activation]
        )
    rows = given["o"].shape[0]
    return {"x": x[:rows], "counters": counters} | ({} if qkv is None else {"qkv": qkv[:rows]})


def by_hand(activation, given):
    """Returns each result in float64, and the most that a kernel's may differ.

    What is added up in float32 differs by up to 2⁻²³ of its terms' sizes for each of them: half of it would do if sums
    were rounded to the nearest, which a tensor core does not promise. Each product is rounded to bfloat16, 2⁻⁸ of it,
    and what it is off by is multiplied by the weights after it. An activation is 1.13 times as far off as what it
    takes, or less, and its own arithmetic a few units of float32.
    """
    rows = given["o"].shape[0]
    weights = {name: np.asarray(w, np.float64) for name, w in given["weights"].items()}
    o, x = (np.asarray(given[name][:rows], np.float64) for name in ("o", "x"))

    def product(x, off, w):
        return x @ w.T, (off + np.abs(x) * x.shape[1] * 2.0**-23) @ np.abs(w).T

    def rounded(y, off):
        return y, off + 2.0**-8 * (np.abs(y) + off)

    def normed(x, off):
        root = np.sqrt(np.mean(x * x, axis=1, keepdims=True) + EPSILON)
        # The norm of what x is off by, too, changes the root; and so do its sums of squares in float32.
        off_root = np.sqrt(np.mean(off * off, axis=1, keepdims=True)) + 2.0**-23 * x.shape[1] * root
        return x / root, (off + np.abs(x) * off_root / root) / root

    y, off = product(o, np.zeros_like(o), weights["out"])
    x, off_x = rounded(x + y, off + 2.0**-22 * np.abs(x))
    n, off_n = normed(x, off_x)
    gate, up = (weights["gate_up"][:, which].reshape(-1, x.shape[1]) for which in (0, 1))
    (g, off_g), (u, off_u) = (product(n, off_n, w) for w in (gate, up))
    if activation == "silu":
        act = g / (1 + np.exp(-g))
    else:
        act = g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) / 2
    off_act = 1.13 * off_g + 2.0**-20 * np.abs(g)
    hidden, off_hidden = rounded(act * u, off_act * np.abs(u) + off_u * (np.abs(act) + off_act))
    y, off = product(hidden, off_hidden, weights["down"])
    x, off_x = rounded(x + y, off_x + off + 2.0**-22 * np.abs(x))
    wanted = {"x": (x, off_x)}
    if "qkv" in weights:
        wanted["qkv"] = rounded(*product(*normed(x, off_x), weights["qkv"]))
    return wanted


def assert_by_hand(found, wanted):
    """Compares with the bound for every number, and with what independent roundings make of it for all together.

    The bound of `by_hand` adds up the sizes of all errors; errors of either sign make about its square root, so that a
    number left out of a sum would hide in it. Roundings of 2⁻⁸ / √3 root mean square, evenly spread: of x', of n's
    parts, of hidden and of the result, with some amplification by the products between them.
    """
    for name, (value, bound) in wanted.items():
        ours = np.asarray(found[name], np.float64)
        assert np.isfinite(ours).all(), name
        assert (np.abs(ours - value) <= bound).all(), name
        error = np.sqrt(np.mean((ours - value) ** 2, axis=1) / np.mean(value**2, axis=1))
        assert (error > 0).all(), name
        assert error.max() < np.sqrt(5 / 3) * 2.0**-8, name


def test_the_reference_is_the_model(miniature):
    """`by_hand` is what XLA makes of a layer's weights, so that the kernel and the model are held to one thing."""
    given = arrays(3, {"out": (1024, 512), "gate_up": (1024, 1024), "down": (1024, 1024), "qkv": (768, 1024)})
    layer = layers.layer_specs(miniature(fold_tokens=3, **MINIATURE).model)[0]
    w = given["weights"]
    laid_out = {"out_DE": w["out"], "gate_up_JCFD": w["gate_up"], "down_DF": w["down"]}
    laid_out["qkv_KAHD"] = w["qkv"].reshape(2, 6, 64, 1024)
    x = layers.finish(layer, laid_out, jnp.asarray(given["x"][:3]), jnp.asarray(given["o"]))
    found = {"x": x, "qkv": layers.project(layer, laid_out, x).reshape(3, -1)}
    for name, (value, _) in by_hand(layer.activation, given).items():
        error = np.sqrt(np.mean((np.asarray(found[name], np.float64) - value) ** 2) / np.mean(value**2))
        # XLA rounds the products too: nine roundings where the kernel has five.
        assert 0 < error < np.sqrt(9 / 3) * 2.0**-8, name


@pytest.mark.parametrize(
    ("shapes", "rows"), [(WIDE, 1), (WIDE, 12), (DEEP, 32), (MANY, 64), (HUGE, 64), (DEEP, 72), (HUGE, 128)]
)
def test_the_kernel_lowers_for_a_hopper(shapes, rows):
    assert products_persistent_plan.fits(jnp.bfloat16, shapes)
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays(rows, shapes))
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        text = products.trace("gelu", given, 2).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2(") == 2
    # Counters are counted where they lie.
    assert text.count("#stablehlo.output_operand_alias<") == 4


@pytest.mark.parametrize("shapes", [WIDE, DEEP, MANY, SEVERAL, BROAD, HUGE])
def test_every_column_is_some_program_s(shapes):
    """Of each product all columns, and as many tiles for both programs of a cluster."""
    plan = Plan(1, weight_shapes(shapes), EPSILON, None)
    taken, counts = {name: set() for name in shapes}, {}
    for number in range(products_persistent_plan.PROGRAMS):
        program = products_persistent_gpu._Program.__new__(products_persistent_gpu._Program)
        program.number, program.plan = jnp.int32(number), plan
        program.pair, program.side = (jnp.int32(x) for x in divmod(number, products_persistent_plan.SIDES))
        for name, product in plan.products.items():
            count = int(program.tiles(product))
            assert counts.setdefault((name, number // products_persistent_plan.SIDES), count) == count
            for i in range(count):
                first = int(program.first_column(product, i))
                assert first % (2 * GATE_COLUMNS if name == "gate_up" else 8) == 0
                taken[name] |= set(range(first, first + product.tile))
    for name, (columns, _) in weight_shapes(shapes).items():
        assert taken[name] == set(range(columns)), name


def weight_shapes(shapes):
    """Shapes of the weights: gate and up are one."""
    return {name: (2 * columns if name == "gate_up" else columns, n) for name, (columns, n) in shapes.items()}


@pytest.mark.parametrize(("rows", "numbers"), [(16, 512), (24, 256), (128, 64)])
def test_a_tile_lies_as_tensor_cores_read_it(rows, numbers):
    """By NumPy: the transforms of the ring, [rows, numbers] to tiles of [8, 64], then the swizzle of 128 bytes."""
    tiles = np.arange(rows * numbers).reshape(rows // 8, 8, numbers // 64, 64).swapaxes(1, 2)
    lines = tiles.reshape(-1, 8, 8)  # of 128 bytes, in chunks of eight numbers
    wanted = np.stack([line[np.arange(8) ^ number % 8] for number, line in enumerate(lines)]).reshape(-1)
    found = np.full(rows * numbers, -1)
    for row in range(rows):
        for chunk in range(numbers // 8):
            first = mosaic_gpu.offset(row, chunk, numbers) // 2
            found[first : first + 8] = row * numbers + chunk * 8 + np.arange(8)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("rows", "shapes"), [(5, WIDE), (12, SEVERAL), (32, BROAD), (64, WIDE), (72, SEVERAL), (128, WIDE)]
)
def test_the_kernel_played(rows, shapes):
    """Its own code with all that is asynchronous at its latest (`played`): by hand, and nobody waits for ever."""
    given = arrays(rows, shapes)
    weights = {name: w.reshape(-1, w.shape[-1]) for name, w in given["weights"].items()}
    found, counters = play(given, weights)
    assert_by_hand({name: found[name][:rows] for name in ("x", "qkv")}, by_hand("gelu", given))
    # Those of this call say that all were there, those of the next are zeros.
    assert counters[0][counters[0] > 0].tolist() == 3 * [PROGRAMS * -(-rows // GROUP_ROWS)]
    assert not counters[1].any()
    if rows == 5:
        last, _ = play(given, {name: w for name, w in weights.items() if name != "qkv"})
        np.testing.assert_array_equal(last["x"][:rows], found["x"][:rows])


@pytest.mark.parametrize("multiplying", [1, 2])
def test_there_are_registers_for_all_warpgroups(multiplying):
    """Of a multiprocessor's 65,536 all threads begin with as many; a Hopper traps on an increase that is none."""
    *copying, more = products_persistent_gpu.REGISTERS
    warpgroups = len(copying) + multiplying
    assert Plan(GROUP_ROWS * multiplying, weight_shapes(WIDE), EPSILON, None).groups == multiplying
    first = 65536 // (128 * warpgroups) // 8 * 8
    assert max(copying) < first < more
    assert 128 * (sum(copying) + multiplying * more) <= 65536


def play(given, weights):
    """Plays the kernel; returns what it writes, and the counters."""
    rows = given["o"].shape[0]
    plan = Plan(
        rows, {name: w.shape for name, w in weights.items()}, EPSILON, lambda x: np.asarray(ACTIVATIONS["gelu"](x))
    )
    counters = np.zeros(COUNTERS, np.int32), np.ones(COUNTERS, np.int32)
    return played(plan, {"o": given["o"], "x": given["x"], "weights": weights}, counters), counters


def test_what_fits():
    assert products_persistent_plan.fits(jnp.bfloat16, DEEP)
    assert not products_persistent_plan.fits(jnp.float32, DEEP)
    for width in (512, 3072):
        assert not products_persistent_plan.fits(jnp.bfloat16, DEEP | {"out": (width, 2048)})
    assert not products_persistent_plan.fits(jnp.bfloat16, DEEP | {"down": (2048, 6656 + 64)})


def test_fewer_multiprocessors_than_programs_are_an_error(miniature, hopper, monkeypatch):
    """Programs wait for each other, so all of them have to run at once."""
    monkeypatch.setattr(devices, "multiprocessors", lambda: 114)
    with pytest.raises(UserError, match="runs on 128 multiprocessors and there are 114; use 'auto'"):
        miniature(fold_tokens=2, products="pallas_gpu_hopper", **MINIATURE)


@pytest.mark.parametrize(
    ("products_by", "wanted"),
    [
        ("pallas_gpu", {32: "pallas_gpu", 64: "pallas_gpu", 65: "xla"}),
        ("pallas_gpu_hopper", {32: "pallas_gpu", 33: "persistent", 128: "persistent", 129: "xla"}),
    ],
)
def test_rows_choose_the_kernels(miniature, hopper, monkeypatch, products_by, wanted):
    """Of a step; x is padded for one of them alone."""
    mini, padded = miniature(fold_tokens=2, attention="xla", products=products_by, **MINIATURE), []
    pad = mosaic_gpu.padded
    monkeypatch.setattr(mosaic_gpu, "padded", lambda x: padded.append(x.shape[0]) or pad(x))
    for rows, form in wanted.items():
        cache = mini.decoder.empty_cache(rows, 24)
        step = jax.jit(lambda *x: mini.decoder._step(*x)).trace(mini.weights, cache, np.zeros(rows, np.int32))
        # One for each of two layers; the first one's projections and then four, and three, for no layer follows.
        found = [str(step.jaxpr).count(name) for name in ("name=decode_products", "name=decode_product_")]
        assert found == {"xla": [0, 0], "pallas_gpu": [0, 8], "persistent": [2, 0]}[form]
    assert padded == [rows for rows, form in wanted.items() if form == "persistent"]


@pytest.mark.parametrize(
    ("asked", "changes", "multiprocessors", "taken"),
    [
        ("auto", {}, 132, "pallas_gpu_hopper"),
        ("auto", {}, 127, "pallas_gpu"),
        ("auto", {"width": 512}, 132, "pallas_gpu"),
        ("auto", {"compute_dtype": "float32"}, 132, "xla"),
        ("pallas_gpu", {}, 132, "pallas_gpu"),
        ("pallas_gpu_hopper", {}, 128, "pallas_gpu_hopper"),
        ("pallas_gpu_hopper", {"width": 512}, 127, "pallas_gpu"),
        # 528 columns of qkv, pairs of tiles for the one kernel but no whole tiles for the others.
        ("pallas_gpu_hopper", {"query_heads": 64, "kv_heads": 1, "head_dim": 8}, 132, "xla"),
    ],
)
def test_what_is_taken(miniature, hopper, monkeypatch, asked, changes, multiprocessors, taken):
    """On one Hopper GPU, and "auto" on a CPU."""
    monkeypatch.setattr(devices, "multiprocessors", lambda: multiprocessors)
    model = ConfigDict(miniature(fold_tokens=3, **MINIATURE).model.to_dict() | changes)
    here = on_devices(1, 1)
    gpu = np.array([types.SimpleNamespace(platform="gpu")])
    mesh = types.SimpleNamespace(shape=here.mesh.shape, size=1, devices=gpu)
    there = types.SimpleNamespace(mesh=mesh, operators=here.operators, named=here.named)
    assert Decoder(model, there, products=asked).products == taken
    assert Decoder(model, here).products == "xla"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "shapes", "activation"),
    [
        (1, WIDE, "silu"),
        (5, MANY, "gelu"),
        (12, WIDE, "gelu"),
        (32, DEEP, "gelu"),
        (40, WIDE, "silu"),
        (64, DEEP, "gelu"),
        (72, WIDE, "silu"),
        (100, MANY, "gelu"),
        (128, DEEP, "gelu"),
        (30, BROAD, "gelu"),
    ],
)
def test_on_a_gpu_products_by_hand(rows, shapes, activation):
    given = arrays(rows, shapes)
    wanted = by_hand(activation, given)
    for times in (1, 3):
        found = products(activation, given, times)
        assert_by_hand(found, wanted)
    last = dict(given, weights={name: w for name, w in given["weights"].items() if name != "qkv"})
    np.testing.assert_array_equal(*(np.asarray(run["x"], np.float32) for run in (found, products(activation, last))))


@pytest.mark.gpu
def test_on_a_gpu_a_row_does_not_depend_on_others():
    """A row's bits stay when what is beside it is another, or no number."""
    given = arrays(5, WIDE)
    beside = {name: np.array(given[name]) for name in ("x", "o")}
    for x in beside.values():
        x[[0, 1, 4]] = x[[1, 4, 0]] * jnp.bfloat16(3)
        x[3] = np.nan
    found, alone = (products("gelu", one) for one in (given, given | beside))
    for name in ("x", "qkv"):
        np.testing.assert_array_equal(*(np.asarray(run[name][2], np.float32) for run in (found, alone)))
        assert np.isnan(np.asarray(alone[name][3], np.float32)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["xla", "pallas_gpu"])
def test_on_a_gpu_a_model_decodes_as_with_xla(miniature, monkeypatch, attention):
    """Its three rows are enough here."""
    traced, run = [], products_persistent_gpu.run
    monkeypatch.setattr(products_persistent_gpu, "run", lambda *x, **how: traced.append(x) or run(*x, **how))
    monkeypatch.setattr(products_persistent_plan, "LEAST_ROWS", 1)
    check_model(miniature, MINIATURE, (attention, "xla"), (attention, "pallas_gpu_hopper"))
    assert traced
