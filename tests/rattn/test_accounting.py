"""Counts checked by hand on a model small enough to count."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rattn import accounting
from rattn.config import load_config, set_mixer
from rattn.model.parameters import initial_parameters, model_spec, parameter_count
from rattn.sharding import Sharding, make_mesh
from rattn.step import _keys_seen
from rattn.train import state_layout


@pytest.fixture
def config():
    config = load_config("configs/base.py")
    config.model.update(width=8, layers=4, query_heads=4, kv_heads=2, head_dim=4, mlp_width=12, vocab_size=10, window=3)
    return config


def test_flops_counted_by_hand(config):
    spec = model_spec(config.model)
    keys = accounting.keys_seen(config.model, 6)
    assert keys == accounting.KeysSeen(full=(1 + 2 + 3 + 4 + 5 + 6) / 6, window=(1 + 2 + 3 + 3 + 3 + 3) / 6)
    flops = accounting.forward_flops_per_token(config.model, spec, keys)
    one_layer = 8 * 16 + 2 * 8 * 8 + 16 * 8 + 3 * 8 * 12
    assert flops["matrices"] == 2 * 4 * one_layer
    assert flops["unembedding"] == 2 * 8 * 10
    assert flops["softmax attention"] == 4 * 4 * 4 * (3 * keys.window + keys.full)
    assert flops["linear attention"] == 3 * 2 * (2 * 4) * 4 * (4 + 2)
    assert accounting.training_flops_per_token(config.model, spec, keys) == 3 * sum(flops.values())


def test_untied_unembedding_costs_the_same(config):
    tied = accounting.forward_flops_per_token(config.model, model_spec(config.model), accounting.KeysSeen(1, 1))
    config.model.tied_embeddings = False
    untied = accounting.forward_flops_per_token(config.model, model_spec(config.model), accounting.KeysSeen(1, 1))
    assert tied == untied


def test_keys_seen_counts_documents():
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2], [1, 2, 2, 2, 2, 2]], jnp.int32)
    seen = {name: float(value) for name, value in _keys_seen(segments, 2).items()}
    rows = np.array([[1, 2, 3, 4, 1, 2], [1, 1, 2, 3, 4, 5]])
    assert seen == pytest.approx({"keys_full": rows.mean(), "keys_window": np.minimum(rows, 2).mean()})


def test_parts_add_up(config):
    spec = model_spec(config.model)
    assert sum(accounting.parameters_by_part(spec).values()) == parameter_count(spec.shapes)
    sharding = Sharding(make_mesh(config.mesh, jax.devices()[:1]))
    shapes, shardings = state_layout(spec, optax.adam(1e-3), sharding)
    memory = accounting.memory_by_part(config, spec, shapes, shardings)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(initial_parameters(config.model, 0)))
    assert memory["parameters"] == memory["gradients"] == held
    # Two moments and a count.
    assert memory["optimizer"] == 2 * held + 4


def test_cache_saving_is_the_paper_figure():
    """A 1k window at 4k context, 3:1 pattern: 56.25 % saved by the window; less with the state counted."""
    config = set_mixer(load_config("configs/rattn_3b.py", "window=1024"), "rattention")
    full = set_mixer(load_config("configs/rattn_3b.py", "window=1024"), "full")
    whole = sum(accounting.cache_bytes_per_sequence(full.model, 4096).values())
    cache = accounting.cache_bytes_per_sequence(config.model, 4096, fold_tokens=0)
    assert 1 - (cache["full"] + cache["window"]) / whole == pytest.approx(0.5625)
    assert 1 - sum(cache.values()) / whole == pytest.approx(0.516, abs=5e-4)
    short = accounting.cache_bytes_per_sequence(config.model, 4096, fold_tokens=0, state_itemsize=2)
    assert 1 - sum(short.values()) / whole == pytest.approx(0.539, abs=5e-4)
    # 42 local layers of 4 heads of 128: a key and a value in bf16 for each token that waits.
    assert accounting.cache_bytes_per_sequence(config.model, 4096, fold_tokens=8)["pending"] == 42 * 8 * 4 * 2 * 128 * 2


def test_peak_is_known_by_device_kind():
    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

    assert accounting.peak_flops(Device()) == 989e12
    assert accounting.peak_flops(jax.devices("cpu")[0]) is None
