"""What caches hold, where it lies, and that sampling does not copy it."""

import re

import jax
import numpy as np
import pytest

from rattn import accounting
from rattn.config import load_config, set_mixer, validate
from rattn.decoding import report
from rattn.decoding.cache import cache_bytes, cache_shapes
from rattn.decoding.decoder import Decoder
from rattn.decoding.sampling import Sampling
from rattn.errors import UserError
from rattn.generate import on_devices
from rattn.model.parameters import model_spec
from rattn.optimizer import make_optimizer
from rattn.planning import report as planning_report
from rattn.planning.forecast import forecast
from rattn.planning.topologies import parse_topology
from rattn.train import state_layout
from tests.rattn.decoding.conftest import TOKENS, TWO_MIXERS, Miniature


def keys(batch):
    return jax.random.split(jax.random.key(0), batch)


def test_a_cache_takes_what_the_formula_says(miniature):
    mini = miniature(fold_tokens=5)
    for capacity in (2, 24):
        formula = accounting.cache_bytes_per_sequence(mini.model, capacity, fold_tokens=5)
        assert min(formula.values()) > 0
        assert cache_bytes(mini.decoder.empty_cache(3, capacity)) == 3 * sum(formula.values())


@pytest.mark.parametrize(("recipe", "dtype"), [("tiny", "float32"), ("small", "bfloat16")])
def test_a_run_a_plan_and_the_report_say_what_a_cache_takes(recipe, dtype):
    config = validate(load_config(f"configs/{recipe}.py"))
    decoder, length = Decoder(config.model, on_devices(1, 1)), config.context_length
    found = cache_bytes(cache_shapes(decoder.layers, decoder.layout(1, length)))
    row = forecast(config, parse_topology("v5e:2x2"))
    said = accounting.readable_bytes(found)
    assert sum(row.cache[length].values()) == found
    assert f"keys and values in {dtype}, states in float32" in planning_report.text([row], 1e9)
    spec = model_spec(config.model)
    layout = state_layout(spec, make_optimizer(config.optimizer, 1, spec.logical), decoder.sharding)
    start = accounting.summary(config, spec, *layout)
    assert f"{said} a sequence of {length} tokens" in start
    assert f"keys and values in {dtype}, states in float32" in start
    total = next(line for line in report.text(config).splitlines() if line.strip().startswith(f"{length:,} "))
    assert f"  {said}  " in total


@pytest.mark.parametrize("mixer", ["full", "swa", "rattention", "linear"])
def test_the_3b_model_takes_what_the_formula_says(mixer):
    model = validate(set_mixer(load_config("configs/rattn_3b.py"), mixer)).model
    decoder = Decoder(model, on_devices(1, 1), state_dtype="bfloat16")
    shapes = cache_shapes(decoder.layers, decoder.layout(2, 4096))
    found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes.layers))
    assert found == 2 * sum(accounting.cache_bytes_per_sequence(model, 4096, state_itemsize=2).values())


def test_local_layers_do_not_grow_with_the_context(miniature):
    mini = miniature(fold_tokens=5)
    short, long = (cache_shapes(mini.decoder.layers, mini.decoder.layout(1, n)).layers for n in (64, 4096))
    grown = [layer.kind for layer, a, b in zip(mini.decoder.layers, short, long, strict=True) if a != b]
    assert grown == ["full"]


def test_a_sampled_step_copies_no_cache_and_no_state(miniature):
    """Of a cache's arrays the compiled loop makes none anew: rings and rows are written in place, states are read."""
    mini = miniature(fold_tokens=5)
    layout = mini.decoder.layout(3, 24)
    cache = cache_shapes(mini.decoder.layers, layout)
    run = mini.decoder.compiled("sample", layout, Sampling(0.0))
    tokens, first = jax.ShapeDtypeStruct((3,), np.int32), jax.ShapeDtypeStruct((), np.int32)
    compiled = run.lower(mini.weights, cache, tokens, keys(3), first).compile()
    # A linear layer's ring has only the C keys that a step reads anyway.
    kept = [x for layer, x in zip(mini.decoder.layers, cache.layers, strict=True) if layer.kind != "linear"]
    shapes = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(kept)}
    copies = re.findall(rf"= f32\[(?:{'|'.join(shapes)})\]\S* copy\(.*", compiled.as_text())
    assert copies == []
    memory = compiled.memory_analysis()
    # Every cache is given back in the buffer that it came in.
    assert memory.alias_size_in_bytes >= sum(leaf.size * 4 for leaf in jax.tree.leaves(cache.layers))


def test_sharded_decoding_equals_training_on_one_device():
    mini = Miniature(5, sharding=on_devices(4, 2), vocab_size=12, layers=2, **TWO_MIXERS)
    rows = [TOKENS[row % 3, : 3 + row].tolist() for row in range(8)]
    logits, cache = mini.chunk(mini.decoder.empty_cache(8, 24), rows, 10)
    given = np.array([TOKENS[row % 3, 3 + row] for row in range(8)])
    sampled, cache = mini.decoder.sample(mini.weights, cache, given, keys(8), 0, Sampling(0.0))
    # 4 devices along the sequences, 2 along the heads: an eighth of every array on each.
    for leaf in jax.tree.leaves(cache.layers):
        assert {shard.data.nbytes for shard in leaf.addressable_shards} == {leaf.nbytes // 8}
    whole = np.zeros((8, 24), np.int32)
    for row, tokens in enumerate(rows):
        whole[row, : len(tokens) + 6] = [*tokens, given[row], *np.asarray(sampled)[row].tolist()]
    wanted = mini.trained(whole)
    for row, tokens in enumerate(rows):
        n = len(tokens)
        np.testing.assert_allclose(logits[row], wanted[row, :n], rtol=0, atol=1e-5 * np.abs(wanted).max())
        best = np.sort(wanted[row, n : n + 5], axis=-1)
        assert (best[:, -1] - best[:, -2]).min() > 1e-4 * np.abs(wanted).max()
        assert wanted[row, n : n + 5].argmax(axis=-1).tolist() == np.asarray(sampled)[row].tolist()


def test_what_does_not_fit_gets_a_sentence(miniature):
    mini = miniature(fold_tokens=5)
    cache = mini.decoder.empty_cache(3, 8)
    wide = mini.model.copy_and_resolve_references()
    wide.window = 40
    with pytest.raises(UserError, match=r"sequence to 9 tokens and the cache was allocated for 8; allocate a longer"):
        mini.decoder.prefill(mini.weights, cache, TOKENS[:, :9])
    with pytest.raises(UserError, match=r"allocated for a window of 3 and this decoder has 40; allocate another"):
        Decoder(wide, on_devices(1, 1)).step(mini.weights, cache, TOKENS[:, 0])
    with pytest.raises(UserError, match=r"There are 2 rows of tokens and the cache was allocated for 3 sequences"):
        mini.decoder.step(mini.weights, cache, TOKENS[:2, 0])
    for counts in ([4, 9, 1], [4, 4], [-1, 4, 4]):
        with pytest.raises(UserError, match=r"counts_B is \[.*\] and the 3 rows have 8 tokens; give 0 to 8"):
            mini.decoder.prefill(mini.weights, cache, TOKENS[:, :8], np.array(counts))
    with pytest.raises(UserError, match=r"tokens_BT is \(3, 0\); give at least one token a row"):
        mini.decoder.prefill(mini.weights, cache, TOKENS[:, :0])
    # What is in front of a sequence's own tokens may be anything.
    with pytest.raises(UserError, match=r"tokens_BT has id 11; the model has ids 0 to 10"):
        mini.decoder.prefill(mini.weights, cache, np.array([[99, 1], [1, 1], [1, 11]]), np.array([1, 2, 1]))
    with pytest.raises(UserError, match=r"3 sequences of 10{12} tokens takes .* GiB, which the device has no room"):
        mini.decoder.empty_cache(3, 10**12)
    with pytest.raises(UserError, match=r"multiple of the 8 devices"):
        Decoder(mini.model, on_devices(8, 1)).empty_cache(3, 8)
    with pytest.raises(UserError, match=r"vocab=11, which mesh axis 'model' of 2 does not divide"):
        Decoder(mini.model, on_devices(1, 2))
    with pytest.raises(UserError, match=r"fold_tokens is 0; give the steps"):
        Decoder(mini.model, on_devices(1, 1), fold_tokens=0)
    with pytest.raises(UserError, match=r"16 × 1 devices were asked for and there are 8"):
        on_devices(16, 1)
