"""Schedules, decay masks, stacked layers, accumulation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rattn.config import load_config
from rattn.model.parameters import flatten, initial_parameters, model_spec
from rattn.optimizer import is_matrix, learning_rate_schedule, make_optimizer
from rattn.sharding import Sharding, make_mesh
from rattn.step import make_train_step


@pytest.fixture
def config():
    config = load_config("configs/base.py")
    config.context_length, config.batch_size, config.total_steps = 8, 4, 20
    config.model.update(width=8, layers=4, query_heads=2, kv_heads=1, head_dim=4, mlp_width=12, vocab_size=11, window=3)
    config.model.update(pattern=("rattention", "full"), rope_pattern=(True, False))
    return config


def batch_of(rows, T=8):
    tokens = np.random.default_rng(0).integers(0, 11, (rows, T + 1)).astype(np.int32)
    mask = np.ones((rows, T), bool)
    mask[0, 2:] = False  # Microbatches then have different numbers of targets.
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((rows, T), np.int32),
        "loss_mask": mask,
    }


def first_state(config):
    spec = model_spec(config.model)
    optimizer = make_optimizer(config.optimizer, config.total_steps, spec.logical)
    parameters = initial_parameters(config.model, 0)
    state = {
        "parameters": parameters,
        "optimizer": jax.jit(optimizer.init)(parameters),
        "step": jnp.zeros((), jnp.int32),
    }
    schedule = learning_rate_schedule(config.optimizer, config.total_steps)
    sharding = Sharding(make_mesh(config.mesh, jax.devices()[:1]))
    return jax.jit(make_train_step(config, spec, optimizer, schedule, sharding)), state


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine", {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("linear", {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("wsd", {0: 0.0, 5: 0.5, 10: 1.0, 79: 1.0, 90: 0.55, 100: 0.1}),
    ],
)
def test_schedules_pass_through_known_points(config, name, expected):
    config.optimizer.update(schedule=name, learning_rate=1.0, warmup_steps=10, decay_steps=20, final_fraction=0.1)
    with jax.numpy_dtype_promotion("standard"):
        schedule = learning_rate_schedule(config.optimizer, 100)
        assert {step: float(schedule(step)) for step in expected} == pytest.approx(expected)


def test_decay_reaches_matrices_and_nothing_else(config):
    spec = model_spec(config.model)
    decayed = {path for path, dims in flatten(spec.logical).items() if is_matrix(path, dims)}
    rest = set(flatten(spec.logical)) - decayed
    assert all(path.endswith("scale") or "embedding" in path for path in rest)
    assert all(path.split(".")[-1].split("_")[0] in ("q", "k", "v", "out", "gate", "up", "down") for path in decayed)

    config.optimizer.update(learning_rate=0.5, schedule="linear", final_fraction=1.0, weight_decay=0.2)
    optimizer = make_optimizer(config.optimizer, 10, spec.logical)
    parameters = initial_parameters(config.model, 0)
    zero = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = jax.jit(lambda zero: optimizer.update(zero, optimizer.init(parameters), parameters))(zero)
    for path, update in flatten(updates).items():
        wanted = -0.5 * 0.2 * np.asarray(flatten(parameters)[path]) if path in decayed else 0.0
        np.testing.assert_allclose(np.asarray(update), wanted, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "adafactor", "muon"])
def test_a_stack_updates_like_its_layers_apart(config, name):
    """The two repeats of the pattern, given to the optimizer apart, move as they do stacked."""
    config.optimizer.update(name=name, clip_norm=0.0)
    spec = model_spec(config.model)
    parameters = initial_parameters(config.model, 0)
    gradients = jax.tree.map(lambda w: w * jnp.cos(7 * w), parameters)

    def update(logical, gradients, parameters):
        optimizer = make_optimizer(config.optimizer, 10, logical)
        state = optimizer.init(parameters)
        for _ in range(2):
            updates, state = optimizer.update(gradients, state, parameters)
        return updates

    stacked = jax.jit(lambda g, p: update(spec.logical, g, p))(gradients, parameters)
    for repeat in range(2):

        def take(tree):
            return tree | {"blocks": jax.tree.map(lambda w: w[repeat : repeat + 1], tree["blocks"])}  # noqa: B023

        apart = jax.jit(lambda g, p: update(spec.logical, g, p))(take(gradients), take(parameters))
        for path, leaf in flatten(apart["blocks"]).items():
            np.testing.assert_allclose(
                np.asarray(leaf),
                np.asarray(flatten(stacked["blocks"])[path][repeat : repeat + 1]),
                rtol=2e-5,
                atol=1e-7,
                err_msg=path,
            )
            assert np.abs(np.asarray(leaf)).max() > 0


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "adafactor", "muon"])
def test_every_optimizer_learns_a_batch(config, name):
    config.optimizer.update(name=name, learning_rate=1e-1 if name == "adafactor" else 1e-2, warmup_steps=2)
    train_step, state = first_state(config)
    batch = batch_of(4)
    losses = []
    for _ in range(20):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("scan_blocks", [True, False])
def test_accumulation_equals_the_full_batch(config, scan_blocks):
    batch = batch_of(4)
    whole_step, state = first_state(config)
    config.accumulation_steps = 4
    config.model.scan_blocks = scan_blocks
    split_step, _ = first_state(config)
    whole, whole_metrics = whole_step(state, batch)
    split, split_metrics = split_step(state, batch)
    np.testing.assert_allclose(float(split_metrics["loss"]), float(whole_metrics["loss"]), rtol=1e-6)
    np.testing.assert_allclose(float(split_metrics["grad_norm"]), float(whole_metrics["grad_norm"]), rtol=1e-5)
    first, second = (optax.tree.get(tree["optimizer"], "mu") for tree in (whole, split))
    for path, leaf in flatten(first).items():
        np.testing.assert_allclose(np.asarray(flatten(second)[path]), np.asarray(leaf), atol=1e-6, err_msg=path)


def test_a_non_finite_gradient_changes_nothing_but_the_step(config):
    train_step, state = first_state(config)
    state["parameters"]["final_norm"]["scale"] = state["parameters"]["final_norm"]["scale"].at[0].set(jnp.nan)
    after, metrics = train_step(state, batch_of(4))
    assert not bool(metrics["finite"])
    assert int(after["step"]) == 1
    for before, now in zip(
        jax.tree.leaves((state["parameters"], state["optimizer"])),
        jax.tree.leaves((after["parameters"], after["optimizer"])),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(before), np.asarray(now))
