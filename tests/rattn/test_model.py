"""The decoder: counts, baselines, packing, causality, scan, loss."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rattn.config import load_config, set_mixer, validate
from rattn.model.loss import cross_entropy_sum
from rattn.model.parameters import flatten, initial_parameters, model_spec, parameter_count


def miniature(mixer="rattention", **changes):
    config = load_config("configs/base.py")
    config.model.update(
        width=16, layers=4, query_heads=4, kv_heads=2, head_dim=4, mlp_width=24, vocab_size=11, window=3
    )
    config.model.update(changes)
    return validate(set_mixer(config, mixer)).model


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(3), (2, 12), 0, 11, jnp.int32)


@pytest.fixture(scope="module")
def segments():
    return jnp.asarray([[1] * 5 + [2] * 7, [1] * 2 + [2] * 6 + [3] * 4], jnp.int32)


def build(model):
    return model_spec(model).merge(initial_parameters(model, 0))


def logits(model, tokens, segments=None, parameters=None):
    """Logits of the model of a config, compiled, as NumPy."""
    spec = model_spec(model)
    parameters = initial_parameters(model, 0) if parameters is None else parameters
    return np.asarray(jax.jit(lambda p, t, s: spec.merge(p)(t, s))(parameters, tokens, segments))


@pytest.mark.parametrize(("recipe", "billions"), [("rattn_3b", 2.88), ("rattn_12b", 12.58)])
def test_paper_models_have_the_paper_counts(recipe, billions):
    spec = model_spec(validate(load_config(f"configs/{recipe}.py")).model)
    embedding = flatten(spec.shapes)["embedding_VD"].size
    assert round((parameter_count(spec.shapes) - embedding) / 1e9, 2) == billions


def test_small_has_about_20_million_beside_embeddings():
    spec = model_spec(load_config("configs/small.py").model)
    assert 19e6 < parameter_count(spec.shapes) - flatten(spec.shapes)["embedding_VD"].size < 22e6


def test_baselines_differ_from_rattention_by_norm_scales_alone():
    def names(mixer):
        return {path: leaf.shape for path, leaf in flatten(model_spec(miniature(mixer)).shapes).items()}

    ours = names("rattention")
    for mixer, missing in (
        ("full", {"softmax_norm", "linear_norm"}),
        ("swa", {"softmax_norm", "linear_norm"}),
        ("linear", {"softmax_norm"}),
    ):
        assert {p: s for p, s in ours.items() if not missing & set(p.split("."))} == names(mixer)


def test_full_baseline_keeps_rope_where_local_layers_stood():
    model = miniature("full")
    assert model.pattern == ("full",) * 4
    spec = model_spec(model)
    layers = spec.merge(spec.shapes).blocks.layers
    assert [layer.mixer.rope_theta is not None for layer in layers] == [True, True, True, False]


@pytest.mark.parametrize("mixer", ["full", "swa", "rattention", "linear"])
def test_documents_do_not_leak_through_the_model(mixer, tokens, segments):
    """Other tokens in document 2 of row 0 change its keys and values, and nothing outside of it."""
    spec, parameters = model_spec(miniature(mixer)), initial_parameters(miniature(mixer), 0)
    model = jax.jit(lambda tokens: spec.merge(parameters)(tokens, segments))
    before = np.asarray(model(tokens))
    changed = tokens.at[0, 5:9].set((tokens[0, 5:9] + 4) % 11)
    after = np.asarray(model(changed))
    np.testing.assert_array_equal(after[0, :5], before[0, :5])
    np.testing.assert_array_equal(after[1], before[1])
    assert np.abs(after[0, 5:] - before[0, 5:]).max() > 1e-3
    changed = tokens.at[0, :5].set((tokens[0, :5] + 4) % 11)
    np.testing.assert_array_equal(np.asarray(model(changed))[0, 5:], before[0, 5:])


@pytest.mark.parametrize("mixer", ["full", "swa", "rattention", "linear"])
def test_a_document_alone_gives_the_logits_it_has_in_a_packed_row(mixer, tokens, segments):
    packed = logits(miniature(mixer), tokens, segments)[0, 5:]
    alone = logits(miniature(mixer), tokens[:1, 5:])[0]
    np.testing.assert_allclose(packed, alone, atol=1e-5)


@pytest.mark.parametrize("mixer", ["full", "swa", "rattention", "linear"])
def test_the_past_has_gradients_and_the_future_has_none(mixer, tokens):
    model = build(miniature(mixer))
    graph, parameters = nnx.split(model)

    def logit(x_BTD, t):
        merged = nnx.merge(graph, parameters)
        _, stacked = nnx.split(merged.blocks)
        block = nnx.merge(nnx.graphdef(merged.blocks), jax.tree.map(operator.itemgetter(0), stacked))
        for layer in block.layers:
            x_BTD = layer(x_BTD, None)
        return x_BTD[0, t].sum()

    x_BTD = jax.random.normal(jax.random.key(1), (1, 12, 16))
    gradient = np.asarray(jax.jit(jax.grad(logit), static_argnums=1)(x_BTD, 6))[0]
    np.testing.assert_array_equal(gradient[7:], 0)
    assert (np.abs(gradient[:7]).max(axis=-1) > 0).all()


def test_rattention_with_a_window_over_the_row_is_swa_with_its_norm(tokens, segments):
    wide = miniature("rattention", window=12)
    parameters = initial_parameters(wide, 0)
    rattention = logits(wide, tokens, segments, parameters)
    # The same weights, with the linear branch's contribution taken out by its scale.
    for layer in parameters["blocks"]["layers"].values():
        if "linear_norm" in layer["mixer"]:
            layer["mixer"]["linear_norm"]["scale"] = jnp.zeros_like(layer["mixer"]["linear_norm"]["scale"])
    without = logits(wide, tokens, segments, parameters)
    np.testing.assert_array_equal(rattention, without)
    narrow = logits(miniature("rattention", window=3), tokens, segments, parameters)
    assert np.abs(narrow - without).max() > 1e-3


def test_linear_is_rattention_at_window_zero(tokens, segments):
    parameters = initial_parameters(miniature("rattention", window=0), 0)
    at_zero = logits(miniature("rattention", window=0), tokens, segments, parameters)
    for layer in parameters["blocks"]["layers"].values():
        layer["mixer"].pop("softmax_norm", None)
    np.testing.assert_array_equal(at_zero, logits(miniature("linear"), tokens, segments, parameters))


def test_scan_and_remainder_equal_layers_one_by_one(tokens, segments):
    deep = miniature(layers=5, pattern=("rattention", "full"), rope_pattern=(True, False))
    spec, parameters = model_spec(deep), initial_parameters(deep, 0)

    def one_by_one(parameters):
        model = spec.merge(parameters)
        assert len(model.remainder) == 1
        x_BTD = model.embedding_VD[...][tokens] * 16**0.5
        graph, stacked = nnx.split(model.blocks)
        for repeat in range(2):
            for layer in nnx.merge(graph, jax.tree.map(operator.itemgetter(repeat), stacked)).layers:
                x_BTD = layer(x_BTD, segments)
        for layer in model.remainder:
            x_BTD = layer(x_BTD, segments)
        return model.logits(model.final_norm(x_BTD))

    looped = np.asarray(jax.jit(one_by_one)(parameters))
    np.testing.assert_allclose(looped, logits(deep, tokens, segments), atol=1e-5)


def test_remat_changes_no_gradient(tokens, segments):
    parameters = initial_parameters(miniature(), 0)

    def gradient(remat):
        spec = model_spec(miniature(remat=remat))
        return jax.jit(jax.grad(lambda p: jnp.square(spec.merge(p)(tokens, segments)).mean()))(parameters)

    kept, recomputed = gradient("none"), gradient("block")
    for path, leaf in flatten(kept).items():
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(flatten(recomputed)[path]), atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": False, "logits_soft_cap": 5.0}])
def test_chunked_loss_equals_the_whole(tokens, segments, changes):
    model = build(miniature(**changes))
    targets, mask = jnp.roll(tokens, -1, axis=1), segments != 2
    x_BTD = jax.jit(model.hidden)(tokens, segments)

    @functools.partial(jax.jit, static_argnums=1)
    def loss(x_BTD, chunk_tokens):
        return cross_entropy_sum(model, x_BTD, targets, mask, z_loss=1e-2, chunk_tokens=chunk_tokens)

    whole, chunked = loss(x_BTD, 0), loss(x_BTD, 4)
    np.testing.assert_allclose(np.asarray(chunked), np.asarray(whole), rtol=1e-5)
    log_p = np.asarray(jax.nn.log_softmax(logits(miniature(**changes), tokens, segments), axis=-1), np.float64)
    picked = np.take_along_axis(log_p, np.asarray(targets)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(np.asarray(whole[1]), -(picked * np.asarray(mask)).sum(), rtol=1e-5)
    assert whole[0] > whole[1]


def test_soft_cap_bounds_the_logits(tokens):
    assert 0.1 < np.abs(logits(miniature(logits_soft_cap=0.5), tokens)).max() <= 0.5


def test_features_follow_qk_norm_only_when_told_to(tokens):
    parameters = initial_parameters(miniature(), 0)
    for layer in parameters["blocks"]["layers"].values():
        layer["mixer"]["k_norm"]["scale"] = layer["mixer"]["k_norm"]["scale"] * 3

    def linear_only(**changes):
        model = miniature("linear", qk_norm=True, pattern=("linear",) * 4, **changes)
        clean = jax.tree.map(lambda x: x, parameters)
        for layer in clean["blocks"]["layers"].values():
            layer["mixer"].pop("softmax_norm", None)
            layer["mixer"].setdefault("linear_norm", {"scale": jnp.ones((1, 4, 4))})
        return logits(model, tokens, parameters=clean)

    before_norm = linear_only()
    assert np.abs(before_norm - linear_only(feature_map_after_qk_norm=True)).max() > 1e-3


def test_bfloat16_compute_keeps_float32_weights_and_logits(tokens):
    model = build(miniature(compute_dtype="bfloat16"))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model))} == {"float32"}
    assert jax.eval_shape(model.hidden, tokens).dtype == jnp.bfloat16
    assert jax.eval_shape(model, tokens).dtype == jnp.float32
    assert np.isfinite(logits(miniature(compute_dtype="bfloat16"), tokens)).all()
