"""The decoder: counts, baselines, packing, causality, scan, loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rattn.config import load_config, set_mixer, validate
from rattn.model.loss import cross_entropy_sum
from rattn.model.parameters import flatten, initial_parameters, model_spec, parameter_count
from rattn.model.transformer import Transformer


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


def build(model, seed=0):
    return Transformer(model, rngs=nnx.Rngs(params=seed))


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
    layers = build(model).blocks.layers
    assert [layer.mixer.rope_theta is not None for layer in layers] == [True, True, True, False]


@pytest.mark.parametrize("mixer", ["full", "swa", "rattention", "linear"])
def test_documents_do_not_leak_through_the_model(mixer, tokens, segments):
    """Other tokens in document 2 of row 0 change its keys and values, and nothing outside of it."""
    model = build(miniature(mixer))
    before = np.asarray(model(tokens, segments))
    changed = tokens.at[0, 5:9].set((tokens[0, 5:9] + 4) % 11)
    after = np.asarray(model(changed, segments))
    np.testing.assert_array_equal(after[0, :5], before[0, :5])
    np.testing.assert_array_equal(after[1], before[1])
    assert np.abs(after[0, 5:] - before[0, 5:]).max() > 1e-3
    changed = tokens.at[0, :5].set((tokens[0, :5] + 4) % 11)
    np.testing.assert_array_equal(np.asarray(model(changed, segments))[0, 5:], before[0, 5:])


@pytest.mark.parametrize("mixer", ["full", "swa", "rattention", "linear"])
def test_a_document_alone_gives_the_logits_it_has_in_a_packed_row(mixer, tokens, segments):
    model = build(miniature(mixer))
    packed = np.asarray(model(tokens, segments))[0, 5:]
    alone = np.asarray(model(tokens[:1, 5:]))[0]
    np.testing.assert_allclose(packed, alone, atol=1e-5)


@pytest.mark.parametrize("mixer", ["full", "swa", "rattention", "linear"])
def test_the_past_has_gradients_and_the_future_has_none(mixer, tokens):
    model = build(miniature(mixer))
    graph, parameters = nnx.split(model)

    def logit(x_BTD, t):
        merged = nnx.merge(graph, parameters)
        _, stacked = nnx.split(merged.blocks)
        for repeat in range(1):
            layers = nnx.merge(nnx.graphdef(merged.blocks), jax.tree.map(lambda w: w[repeat], stacked))  # noqa: B023
            x_BTD = layers(x_BTD, None)
        return x_BTD[0, t].sum()

    x_BTD = jax.random.normal(jax.random.key(1), (1, 12, 16))
    gradient = np.asarray(jax.grad(logit)(x_BTD, 6))[0]
    np.testing.assert_array_equal(gradient[7:], 0)
    assert (np.abs(gradient[:7]).max(axis=-1) > 0).all()


def test_rattention_with_a_window_over_the_row_is_swa_with_its_norm(tokens, segments):
    wide = miniature("rattention", window=12)
    parameters = initial_parameters(wide, 0)
    rattention = model_spec(wide).merge(parameters)(tokens, segments)
    # The same weights, with the linear branch's contribution taken out by its scale.
    for layer in parameters["blocks"]["layers"].values():
        if "linear_norm" in layer["mixer"]:
            layer["mixer"]["linear_norm"]["scale"] = jnp.zeros_like(layer["mixer"]["linear_norm"]["scale"])
    without = model_spec(wide).merge(parameters)(tokens, segments)
    np.testing.assert_array_equal(np.asarray(rattention), np.asarray(without))
    narrow = model_spec(miniature("rattention", window=3)).merge(parameters)(tokens, segments)
    assert np.abs(np.asarray(narrow) - np.asarray(without)).max() > 1e-3


def test_linear_is_rattention_at_window_zero(tokens, segments):
    parameters = initial_parameters(miniature("rattention", window=0), 0)
    at_zero = model_spec(miniature("rattention", window=0)).merge(parameters)(tokens, segments)
    for layer in parameters["blocks"]["layers"].values():
        layer["mixer"].pop("softmax_norm", None)
    linear = model_spec(miniature("linear")).merge(parameters)(tokens, segments)
    np.testing.assert_array_equal(np.asarray(at_zero), np.asarray(linear))


def test_scan_and_remainder_equal_layers_one_by_one(tokens, segments):
    model = build(miniature(layers=10))
    assert len(model.remainder) == 2
    x_BTD = model.embedding_VD[...][tokens] * 16**0.5
    graph, stacked = nnx.split(model.blocks)
    for repeat in range(2):
        for layer in nnx.merge(graph, jax.tree.map(lambda w: w[repeat], stacked)).layers:  # noqa: B023
            x_BTD = layer(x_BTD, segments)
    for layer in model.remainder:
        x_BTD = layer(x_BTD, segments)
    np.testing.assert_allclose(
        np.asarray(model.final_norm(x_BTD)), np.asarray(model.hidden(tokens, segments)), atol=1e-5
    )


def test_remat_changes_no_gradient(tokens, segments):
    parameters = initial_parameters(miniature(), 0)

    def gradient(remat):
        spec = model_spec(miniature(remat=remat))
        return jax.grad(lambda p: jnp.square(spec.merge(p)(tokens, segments)).mean())(parameters)

    kept, recomputed = gradient("none"), gradient("block")
    for path, leaf in flatten(kept).items():
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(flatten(recomputed)[path]), atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": False, "logits_soft_cap": 5.0}])
def test_chunked_loss_equals_the_whole(tokens, segments, changes):
    model = build(miniature(**changes))
    targets, mask = jnp.roll(tokens, -1, axis=1), segments != 2
    x_BTD = model.hidden(tokens, segments)
    whole = cross_entropy_sum(model, x_BTD, targets, mask, z_loss=1e-2, chunk_tokens=0)
    chunked = cross_entropy_sum(model, x_BTD, targets, mask, z_loss=1e-2, chunk_tokens=4)
    np.testing.assert_allclose(np.asarray(chunked), np.asarray(whole), rtol=1e-5)
    log_p = np.asarray(jax.nn.log_softmax(model(tokens, segments), axis=-1), np.float64)
    picked = np.take_along_axis(log_p, np.asarray(targets)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(np.asarray(whole[1]), -(picked * np.asarray(mask)).sum(), rtol=1e-5)
    assert whole[0] > whole[1]


def test_soft_cap_bounds_the_logits(tokens):
    logits = np.asarray(build(miniature(logits_soft_cap=0.5))(tokens))
    assert 0.1 < np.abs(logits).max() <= 0.5


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
        return np.asarray(model_spec(model).merge(clean)(tokens))

    before_norm = linear_only()
    assert np.abs(before_norm - linear_only(feature_map_after_qk_norm=True)).max() > 1e-3


def test_bfloat16_compute_keeps_float32_weights_and_logits(tokens):
    model = build(miniature(compute_dtype="bfloat16"))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model))} == {"float32"}
    assert model.hidden(tokens).dtype == jnp.bfloat16
    assert model(tokens).dtype == jnp.float32
    assert np.isfinite(np.asarray(model(tokens))).all()
