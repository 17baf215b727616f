"""Rows cut over devices give what one device gives: loss, every gradient, packed documents, windows of any length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.residual_linear_attention import residual_linear_attention
from rattn.attention import splash_attention
from rattn.config import load_config, validate
from rattn.model.loss import cross_entropy_sum
from rattn.model.operators import Operators
from rattn.model.parameters import flatten, initial_parameters, model_spec
from rattn.model.softmax_attention import blockwise_attention
from rattn.sharding import AXES, Sharding, make_mesh

T = 32
# Document lengths of four rows: one document; boundaries on shard edges; inside shards; many short ones, then padding.
DOCUMENTS = [[32], [4, 12, 8, 8], [3, 14, 2, 13], [1, 1, 2, 5, 6, 1, 10, 6]]


def packed_ids(lengths=DOCUMENTS):
    rows = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
    rows[-1] = np.where(rows[-1] == len(lengths[-1]), 0, rows[-1])
    return np.stack(rows).astype(np.int32)


def sharding_of(**mesh):
    config = load_config("tests/recipes/miniature.py")
    config.mesh.update(dict.fromkeys(AXES, 1) | mesh)
    return Sharding(make_mesh(config.mesh, jax.devices()[: int(np.prod(list(mesh.values())))]))


def assert_close(got, wanted, name=""):
    got, wanted = np.asarray(got), np.asarray(wanted)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


def model_config(window, remat):
    config = load_config("tests/recipes/miniature.py", f"window={window}")
    config.model.update(pattern=("full", "swa", "rattention", "linear"), rope_pattern=(False, True, True, True))
    config.model.update(layers=4, remat=remat)
    config.loss.chunk_tokens = 8
    return validate(config)


@functools.cache
def loss_and_gradients(window, remat, mesh):
    """Loss, and gradients by path, of the four mixers on a mesh (a tuple of items, empty for one device)."""
    config, sharding = model_config(window, remat), sharding_of(**dict(mesh))
    spec = model_spec(config.model, sharding.operators() if mesh else Operators())

    def objective(parameters, batch):
        model = spec.merge(parameters)
        x_BTD = model.hidden(batch["tokens"], batch["segment_ids"])
        return cross_entropy_sum(
            model, x_BTD, batch["targets"], batch["loss_mask"], z_loss=0.0, chunk_tokens=config.loss.chunk_tokens
        )[0]

    tokens = np.random.default_rng(0).integers(3, 259, (4, T + 1)).astype(np.int32)
    ids = packed_ids()
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ids, "loss_mask": ids > 0}
    parameters = initial_parameters(config.model, 0)
    layout = sharding.parameters(spec.logical, spec.shapes)
    run = jax.jit(jax.value_and_grad(objective), out_shardings=(sharding.replicated, layout))
    loss, gradients = run(jax.device_put(parameters, layout), jax.device_put(batch, sharding.batch))
    return np.asarray(loss), flatten(jax.tree.map(np.asarray, gradients))


@pytest.mark.parametrize(
    ("mesh", "window", "remat"),
    [
        ({"fsdp": 2, "seq": 2, "model": 2}, 7, "none"),
        ({"data": 2, "seq": 4}, 11, "block"),
        ({"seq": 8}, 11, "save_attention"),
    ],
    ids=["window inside a shard", "window over two shards", "window over three shards"],
)
def test_every_mixer_equals_one_device(mesh, window, remat):
    loss, gradients = loss_and_gradients(window, remat, tuple(mesh.items()))
    wanted_loss, wanted = loss_and_gradients(window, "none", ())
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    assert gradients.keys() == wanted.keys()
    for path, gradient in wanted.items():
        assert_close(gradients[path], gradient, path)


def draw(length=T, rows=4, N=4, K=2, H=8, seed=0):
    """q, k, v and a probe that weighs the outputs."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(rows, length, heads, H) for heads in (N, K, K, N)]
    return [np.asarray(jax.random.normal(key, shape)) for key, shape in zip(keys, shapes, strict=True)]


def outputs_and_gradients(attention, arrays, ids, **static):
    q, k, v, probe = arrays

    def weighed(q, k, v, ids):
        o = attention(q, k, v, q_segment_ids=ids, kv_segment_ids=ids, **static)
        return (o * probe).sum(), o

    gradients, o = jax.jit(jax.grad(weighed, (0, 1, 2), has_aux=True))(q, k, v, ids)
    return dict(zip(("q", "k", "v", "o"), (*gradients, o), strict=True))


@pytest.mark.parametrize("window", [1, 4, 6, 28, 40])
def test_windows_of_every_length(window):
    """One token, a shard, a part of the next, all shards to the left, more than the row: shards of four tokens."""
    operators = sharding_of(seq=8).operators()
    arrays, ids = draw(), packed_ids()
    static = {"window": window}
    got = outputs_and_gradients(operators.softmax_attention, arrays, ids, **static)
    for name, wanted in outputs_and_gradients(blockwise_attention, arrays, ids, **static).items():
        assert_close(got[name], wanted, f"softmax {name}")
    static |= {"feature_map": "softmax"}
    got = outputs_and_gradients(operators.linear_attention, arrays, ids, **static)
    reference = functools.partial(residual_linear_attention, implementation="reference")
    for name, wanted in outputs_and_gradients(reference, arrays, ids, **static).items():
        np.testing.assert_allclose(got[name], wanted, rtol=0, atol=1e-5 * max(np.abs(wanted).max(), 1e-3), err_msg=name)


def test_without_ids_a_row_is_one_document():
    operators = sharding_of(seq=8).operators()
    q, k, v, _ = draw()
    for window in (6, None):
        o = jax.jit(functools.partial(operators.softmax_attention, window=window))(q, k, v)
        assert_close(o, blockwise_attention(q, k, v, window=window))


def test_tpu_kernels_run_on_shards():
    """The kernels that a TPU mesh gets, interpreted: keys with a halo, keys gathered, a state from the left."""
    sharding = sharding_of(seq=2, model=2)
    splash = functools.partial(splash_attention, interpret=True)
    linear = functools.partial(residual_linear_attention, implementation="pallas_tpu")
    operators = sharding.map_attention(splash, linear)
    arrays, ids = draw(length=256, rows=1, H=16), packed_ids([[100, 60, 90, 6]])
    for window in (40, None):
        got = outputs_and_gradients(operators.softmax_attention, arrays, ids, window=window)
        for name, wanted in outputs_and_gradients(blockwise_attention, arrays, ids, window=window).items():
            assert_close(got[name], wanted, f"softmax {name}")
    static = {"window": 40, "feature_map": "softmax"}
    got = outputs_and_gradients(operators.linear_attention, arrays, ids, **static)
    reference = functools.partial(residual_linear_attention, implementation="reference")
    for name, wanted in outputs_and_gradients(reference, arrays, ids, **static).items():
        assert_close(got[name], wanted, f"linear {name}")


def sent_elements(attention, length, **static):
    """Elements that a device receives in forward and backward, by collective, read off the program."""
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draw(length)[:3]]
    ids = jax.ShapeDtypeStruct((4, length), jnp.int32)

    def loss(q, k, v, ids):
        return attention(q, k, v, q_segment_ids=ids, kv_segment_ids=ids, **static).sum()

    sent = {}
    for equation in equations(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*arrays, ids).jaxpr):
        if equation.primitive.name in ("ppermute", "all_gather", "reduce_scatter", "psum", "psum_invariant"):
            size = sum(max(x.aval.size for x in side) for side in (equation.invars, equation.outvars))
            sent[equation.primitive.name] = sent.get(equation.primitive.name, 0) + size
    return sent


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_local_layers_send_the_same_for_every_length():
    operators = sharding_of(seq=8).operators()
    for attention, static in (
        (operators.softmax_attention, {"window": 16}),
        (operators.linear_attention, {"window": 16, "feature_map": "softmax"}),
    ):
        short, long = (sent_elements(attention, length, **static) for length in (256, 1024))
        assert short == long
        assert short["ppermute"] > 0
    gathered = [sent_elements(operators.softmax_attention, length, window=None)["all_gather"] for length in (256, 1024)]
    assert gathered[1] == 4 * gathered[0]
