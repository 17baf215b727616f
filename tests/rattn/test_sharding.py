"""The mesh, the rules, and a sharded step that equals the unsharded one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas.normed_sum import normed_sum
from rattn.config import load_config, validate
from rattn.errors import UserError
from rattn.model.parameters import flatten, initial_parameters, model_spec
from rattn.optimizer import learning_rate_schedule, make_optimizer
from rattn.sharding import AXES, Sharding, ShardingRules, make_mesh
from rattn.step import make_train_step
from rattn.train import state_layout
from tests.rattn.conftest import packed_batch


def config_of(**mesh):
    config = load_config("tests/recipes/miniature.py")
    config.mesh.update(dict.fromkeys(AXES, 1) | mesh)
    return validate(config)


def test_mesh_takes_what_is_left_and_states_its_axis_types():
    mesh = make_mesh(config_of(data=-1, fsdp=2).mesh)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "seq": 1, "model": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("mesh", "sentence"),
    [
        ({"data": 3}, "data=3 × fsdp=1 × seq=1 × model=1 and there are 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one of them -1"),
        ({"data": -1, "fsdp": 3}, "there are 8 devices"),
        ({"data": 0}, "give positive sizes"),
    ],
)
def test_a_mesh_that_does_not_fit_gets_a_sentence(mesh, sentence):
    with pytest.raises(UserError, match=sentence):
        make_mesh(config_of(**mesh).mesh)


def test_two_dims_on_one_axis_are_refused():
    with pytest.raises(UserError, match=r"Dims \('embed', 'mlp'\) put mesh axis 'fsdp' on two dims"):
        ShardingRules(mlp="fsdp").spec(("embed", "mlp"))
    assert ShardingRules().spec(("batch", "length", None)) == P(("data", "fsdp"), "seq", None)


@jax.custom_vjp
def own_gradient(a, b, a_scale, b_scale):
    """A normed sum with a backward of its own, as a kernel has; what it returns is of the tokens it was given."""
    return normed_sum(a, b, a_scale, b_scale, epsilon=1e-3)


own_gradient.defvjp(
    lambda *operands: (own_gradient(*operands), operands),
    lambda operands, do: jax.vjp(functools.partial(normed_sum, epsilon=1e-3), *operands)[1](do),
)


@pytest.mark.parametrize("mesh", [{"fsdp": 2, "seq": 2, "model": 2}, {"data": 2, "fsdp": 2, "seq": 2}])
@pytest.mark.parametrize("sums", [normed_sum, lambda *operands, epsilon: own_gradient(*operands)], ids=["plain", "own"])
def test_normed_sum_and_its_gradients_equal_one_device(mesh, sums):
    """A scale's gradient is a sum over the rows and tokens of all devices."""
    shapes = ((4, 6, 4, 8),) * 2 + ((4, 8),) * 2 + ((4, 6, 4, 8),)
    draws = np.random.default_rng(0).spawn(5)
    *operands, do = (draw.normal(size=shape).astype(np.float32) for draw, shape in zip(draws, shapes, strict=True))

    def results(function):
        @jax.jit
        def run(do, *operands):
            o, pull = jax.vjp(functools.partial(function, epsilon=1e-3), *operands)
            return o, *pull(do)

        return jax.device_get(run(do, *operands))

    sharding = Sharding(make_mesh(config_of(**mesh).mesh))
    got = results(sharding.map_attention(None, None, sums).normed_sum)
    for name, value, wanted in zip(("o", "da", "db", "d_a_scale", "d_b_scale"), got, results(normed_sum), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


@pytest.fixture
def two_slices(monkeypatch):
    """The eight devices of two TPU slices, none of which is there."""
    for name, value in {"TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v6e-8")
    return topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2", num_slices=2).devices


def test_slices_are_joined_along_data(two_slices):
    mesh = make_mesh(config_of(data=2, fsdp=2, seq=2).mesh, two_slices)
    assert set(mesh.axis_types) == {AxisType.Auto}
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert slices.shape == (2, 2, 2, 1)
    assert [set(part.flat) for part in slices] == [{0}, {1}]
    with pytest.raises(UserError, match=r"config.mesh.data is 1 and there are 2 slices; make it a multiple"):
        make_mesh(config_of(fsdp=8).mesh, two_slices)
    one = [device for device in two_slices if device.slice_index == 0]
    assert make_mesh(config_of(fsdp=2, model=2).mesh, one).devices.shape == (1, 2, 1, 2)


def test_sizes_that_do_not_divide_get_a_sentence():
    config = config_of(model=8)
    spec = model_spec(config.model)
    with pytest.raises(UserError, match=r"has kv_heads=2, which mesh axis 'model' of 8 does not divide"):
        Sharding(make_mesh(config.mesh)).parameters(spec.logical, spec.shapes)
    config = config_of(data=8)
    config.batch_size = 12
    with pytest.raises(UserError, match=r"config.batch_size gives 12 rows at a time, which the 8 devices"):
        Sharding(make_mesh(config.mesh)).check_batch(config)
    config = config_of(seq=8)
    config.context_length = 12
    with pytest.raises(UserError, match=r"config.context_length is 12, which mesh axis 'seq' of 8 devices"):
        Sharding(make_mesh(config.mesh)).check_batch(config)


def step_on(mesh_sizes, devices):
    """One training step on a mesh: (metrics, new parameters) as NumPy, and the layout that the state had."""
    config = config_of(**mesh_sizes)
    sharding = Sharding(make_mesh(config.mesh, devices))
    spec = model_spec(config.model, sharding.operators())
    optimizer = make_optimizer(config.optimizer, config.total_steps, spec.logical)
    parameters = initial_parameters(config.model, 0)
    state = {"parameters": parameters, "optimizer": optimizer.init(parameters), "step": jnp.asarray(5, jnp.int32)}
    _, shardings = state_layout(spec, optimizer, sharding)
    state = jax.device_put(state, shardings)
    schedule = learning_rate_schedule(config.optimizer, config.total_steps)
    step = jax.jit(make_train_step(config, spec, optimizer, schedule, sharding), out_shardings=(shardings, None))
    state, metrics = step(state, jax.device_put(packed_batch(8, 32), sharding.batch))
    return jax.tree.map(np.asarray, (metrics, flatten(state["parameters"]), flatten(optax_mu(state)))), shardings


def optax_mu(state):
    return next(
        part.mu
        for part in jax.tree.leaves(state["optimizer"], is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(part, "mu")
    )


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "model": 2}, {"data": 8}])
def test_a_sharded_step_equals_the_unsharded_step(mesh):
    (metrics, parameters, moments), shardings = step_on(mesh, jax.devices())
    (wanted_metrics, wanted_parameters, wanted_moments), _ = step_on({}, jax.devices()[:1])
    np.testing.assert_allclose(metrics["loss"], wanted_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], wanted_metrics["grad_norm"], rtol=1e-5)
    # The first moment after one step is 0.1 · gradient: every gradient within 1e-5 of its scale.
    for path, wanted in wanted_moments.items():
        np.testing.assert_allclose(moments[path], wanted, atol=1e-5 * np.abs(wanted).max(), err_msg=path)
    assert parameters.keys() == wanted_parameters.keys()
    flat = flatten(shardings["parameters"])
    assert flat["blocks.layers.0.mlp.up_DF"].spec == P(None, "fsdp", "model")
