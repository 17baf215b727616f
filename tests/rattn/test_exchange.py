"""Weights and gradients exchanged once a step: the same gradients, and no exchange in any microbatch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rattn import accounting
from rattn.config import load_config, validate
from rattn.model.parameters import flatten, initial_parameters, model_spec, parameter_count
from rattn.planning.collectives import find_collectives
from rattn.planning.roofline import network_bytes
from rattn.sharding import Sharding, make_mesh
from rattn.step import make_train_step
from rattn.train import state_layout
from tests.rattn.conftest import RECIPE, packed_batch

MICROBATCHES = 3
# A gradient is read off a step of gradient descent. At rate 1 the new weight, rounded, would tell it to 6e-8 of the
# weight's size and no better, which is more than the 1e-5 of a gradient that the test asks for.
RATE = 2.0**10


def config_of(exchange, scan_blocks):
    config = load_config(RECIPE)
    config.batch_size, config.accumulation_steps = 8 * MICROBATCHES, MICROBATCHES
    config.model.update(layers=5, scan_blocks=scan_blocks)
    config.mesh.update(data=2, fsdp=4, exchange=exchange)
    return validate(config)


def run_step(exchange, scan_blocks):
    """Returns (gradients, loss, collectives): plain gradient descent leaves the gradients in the weights."""
    config = config_of(exchange, scan_blocks)
    sharding = Sharding(make_mesh(config.mesh))
    spec, optimizer = model_spec(config.model, sharding.operators()), optax.sgd(RATE)
    shardings = state_layout(spec, optimizer, sharding)[1]
    before = initial_parameters(config.model, 0)
    state = {"parameters": before, "optimizer": optimizer.init(before), "step": jnp.asarray(0, jnp.int32)}
    step = jax.jit(
        make_train_step(config, spec, optimizer, optax.constant_schedule(RATE), sharding),
        out_shardings=(shardings, sharding.replicated),
    )
    batch = packed_batch(config.batch_size, config.context_length)
    arguments = jax.device_put(state, shardings), jax.device_put(batch, sharding.batch)
    compiled = step.lower(*arguments).compile()
    after, metrics = compiled(*arguments)
    gradients = jax.tree.map(
        lambda old, new: (np.asarray(old, np.float64) - np.asarray(new, np.float64)) / RATE, before, after["parameters"]
    )
    return flatten(gradients), float(metrics["loss"]), find_collectives(compiled.as_text())


@pytest.fixture(scope="module")
def every_microbatch():
    return run_step("microbatch", True)


@pytest.fixture(scope="module", params=[True, False], ids=["scanned", "layer by layer"])
def once(request):
    return run_step("step", request.param)


def test_gradients_are_the_same(every_microbatch, once):
    (wanted, loss, _), (gradients, got_loss, _) = every_microbatch, once
    assert got_loss == pytest.approx(loss, rel=1e-6)
    assert gradients.keys() == wanted.keys()
    for path, gradient in wanted.items():
        np.testing.assert_allclose(gradients[path], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max(), err_msg=path)


def test_nothing_is_exchanged_in_a_microbatch(every_microbatch, once):
    assert {one.count for one in once[2]} == {1}
    assert max(one.count for one in every_microbatch[2]) >= MICROBATCHES


def test_the_plan_counts_what_the_step_exchanges(once):
    """But for norm scales, which its formula leaves out."""
    config = config_of("step", True)
    mesh = {"data": 2, "fsdp": 4, "seq": 1, "model": 1}
    received = network_bytes(config, model_spec(config.model), mesh, slices=1)
    gathers = sum(one.bytes for one in once[2] if one.kind == "all-gather")
    sums = sum(one.bytes for one in once[2] if one.kind != "all-gather")
    assert received["ici weights"] == pytest.approx(gathers, rel=0.05)
    assert received["ici gradients"] == pytest.approx(sums, rel=0.05)


def test_the_plan_counts_whole_weights_and_sums():
    """Sums, weights and a microbatch's gradients of the whole model, in float32 here."""
    config = config_of("step", True)
    sharding = Sharding(make_mesh(config.mesh))
    spec = model_spec(config.model)
    memory = accounting.memory_by_part(config, spec, *state_layout(spec, optax.sgd(1.0), sharding))
    assert memory["gradients"] == 3 * 4 * parameter_count(spec.shapes)
