"""Branch diagnostics against branches whose size is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rattn.diagnostics import branch_diagnostics
from rattn.model.operators import Operators
from rattn.model.parameters import model_spec
from rattn.sharding import Sharding, make_mesh
from rattn.step import make_eval_step

SOFTMAX, LINEAR = 3.0, 0.25
# The linear norm's scale in each layer with two branches: two scanned repeats of the pattern, then a remainder.
SCALES = {0: 0.5, 2: 2.0, 4: 3.0}


def constant(value):
    """An attention whose output is `value` everywhere but on padding, which is huge."""

    def attention(q, k, v, *, q_segment_ids, **_):
        return jnp.where((q_segment_ids > 0)[:, :, None, None], jnp.full_like(q, value), 1e6)

    return attention


@pytest.fixture
def batch():
    generator = np.random.default_rng(0)
    tokens = generator.integers(3, 259, (8, 33)).astype(np.int32)
    segments = np.ones((8, 32), np.int32)
    segments[:, 20:] = 2
    segments[5:, 9:] = 0
    return {"tokens": tokens[:, :32], "targets": tokens[:, 1:], "segment_ids": segments, "loss_mask": segments > 0}


def random_parameters(spec):
    generator = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: 0.2 * generator.standard_normal(leaf.shape, np.float32), spec.shapes)


@pytest.mark.parametrize("scan_blocks", [True, False])
def test_each_layer_has_its_own_norms_and_share(miniature, batch, scan_blocks):
    config = miniature(model__layers=5, model__scan_blocks=scan_blocks)
    spec = model_spec(config.model, Operators(constant(SOFTMAX), constant(LINEAR)))
    one = Sharding(make_mesh(config.mesh, jax.devices()[:1]))
    parameters = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), spec.shapes)
    parameters["blocks"]["layers"][0]["mixer"]["linear_norm"]["scale"][0] = SCALES[0]
    parameters["blocks"]["layers"][0]["mixer"]["linear_norm"]["scale"][1] = SCALES[2]
    parameters["remainder"][0]["mixer"]["linear_norm"]["scale"][:] = SCALES[4]
    values = branch_diagnostics(spec, config, one)(parameters, batch)
    for layer, scale in SCALES.items():
        assert values[f"branches/layer_{layer}/softmax_rms"] == pytest.approx(SOFTMAX, rel=1e-6)
        assert values[f"branches/layer_{layer}/linear_rms"] == pytest.approx(LINEAR, rel=1e-6)
        # The softmax norm's scale is 1; ε of the RMSNorm is 1e-6, beside 1/16.
        assert values[f"branches/layer_{layer}/linear_share"] == pytest.approx(scale**2 / (1 + scale**2), rel=1e-4)
    assert values["branches/linear_share"] == pytest.approx(np.mean([s**2 / (1 + s**2) for s in SCALES.values()]), 1e-4)
    assert not [name for name in values if "layer_1" in name or "layer_3" in name]


def spied(attention, seen):
    """An attention that notes the root mean square of what it returns."""

    def spying(q, k, v, **rest):
        out = attention(q, k, v, **rest)
        jax.debug.callback(lambda value: seen.append(float(value)), jnp.sqrt(jnp.mean(jnp.square(out))), ordered=True)
        return out

    return spying


def test_what_is_said_is_what_the_model_does_on_any_mesh(miniature, batch):
    batch["segment_ids"] = np.maximum(batch["segment_ids"], 1)
    config = miniature(model__layers=4, mesh__data=2, mesh__fsdp=2, mesh__model=2, loss__chunk_tokens=16)
    sharding = Sharding(make_mesh(config.mesh))
    spec = model_spec(config.model, sharding.operators())
    parameters = random_parameters(spec)
    values = branch_diagnostics(spec, config, sharding)(parameters, batch)
    softmax, linear = [], []
    usual = Operators()
    spies = Operators(spied(usual.softmax_attention, softmax), spied(usual.linear_attention, linear))
    nothing = Operators(linear_attention=lambda q, k, v, **_: jnp.zeros_like(q))
    for name, operators in (("loss", spies), ("loss_without_linear", nothing)):
        step = jax.jit(make_eval_step(model_spec(config.model, operators), 0))
        sums = jax.device_get(step(parameters, batch, np.ones(260, np.int32)))
        jax.effects_barrier()
        assert values[f"branches/{name}"] == pytest.approx(float(sums["nats"]) / int(sums["targets"]), rel=1e-5)
    assert values["branches/loss"] != pytest.approx(values["branches/loss_without_linear"], rel=1e-4)
    # Every layer has a softmax branch, layers 0 and 2 a linear one.
    assert (len(softmax), len(linear)) == (4, 2)
    for layer, softmax_rms, linear_rms in zip((0, 2), softmax[::2], linear, strict=True):
        assert values[f"branches/layer_{layer}/softmax_rms"] == pytest.approx(softmax_rms, rel=1e-5)
        assert values[f"branches/layer_{layer}/linear_rms"] == pytest.approx(linear_rms, rel=1e-5)
    assert linear[0] != pytest.approx(linear[1], rel=1e-3)


def test_there_is_nothing_to_say_without_two_branches(miniature, batch):
    config = miniature("mixer=swa")
    spec = model_spec(config.model)
    one = Sharding(make_mesh(config.mesh, jax.devices()[:1]))
    assert branch_diagnostics(spec, config, one)(None, batch) == {}
