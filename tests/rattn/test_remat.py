"""Rematerialisation policies change what is kept, never a gradient."""

import contextlib
import functools
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from rattn.config import load_config, validate
from rattn.model.parameters import flatten, initial_parameters, model_spec

T = 32


def objective(remat, layers=3, scan_blocks=True):
    """The sum of the hidden state as a function of the parameters: blocks of two layers, and one that remains."""
    config = load_config("tests/recipes/miniature.py")
    config.model.update(remat=remat, layers=layers, scan_blocks=scan_blocks)
    spec = model_spec(validate(config).model)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 259, (2, T)), jnp.int32)
    ids = jnp.asarray(np.sort(np.random.default_rng(1).integers(1, 4, (2, T)), axis=1), jnp.int32)
    return lambda parameters: (spec.merge(parameters).hidden(tokens, ids) ** 2).sum(), config.model


@functools.cache
def gradients(remat, *rest):
    function, model = objective(remat, *rest)
    return flatten(jax.tree.map(np.asarray, jax.jit(jax.grad(function))(initial_parameters(model, 0))))


def kept(remat):
    """Shapes of what the backward pass is handed, parameters aside, with the place that made each."""
    function, model = objective(remat)
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        print_saved_residuals(function, initial_parameters(model, 0))
    lines = [line for line in text.getvalue().splitlines() if "from the argument" not in line]
    return [tuple(map(int, found[1].split(","))) for line in lines if (found := re.match(r"\w+\[([\d,]+)\]", line))]


@pytest.mark.parametrize("remat", ["block", "save_attention", "save_products", "save_operands", "offload"])
def test_gradients_are_those_without_remat(remat):
    for path, wanted in gradients("none").items():
        got = gradients(remat)[path]
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=path)


def test_blocks_that_are_not_scanned_have_the_same_gradients():
    got = gradients("save_products", 5, False)
    for path, wanted in gradients("none", 5).items():
        np.testing.assert_allclose(got[path], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=path)


def test_policies_keep_what_they_say():
    stream, attention, hidden = (1, 2, T, 16), (1, 2, T, 4, 8), (1, 2, T, 24)
    shapes = {remat: kept(remat) for remat in ("none", "block", "save_attention", "save_products", "save_operands")}
    assert hidden in shapes["none"]
    assert stream in shapes["block"]
    assert attention not in shapes["block"]
    assert hidden not in shapes["block"]
    # One softmax and one linear branch in the RATTENTION layer, one softmax branch in the full layer.
    assert shapes["save_attention"].count(attention) == 3
    assert hidden not in shapes["save_attention"]
    # Gate and up of each layer, and not their product.
    assert shapes["save_products"].count(attention) >= 3
    assert shapes["save_products"].count(hidden) == 2 * 2
    assert shapes["save_operands"].count(hidden) == 2 * 2
    assert shapes["none"].count(hidden) > 2 * 2
    # The two norms' results of each layer, the rotated queries, and the merged branches of one.
    assert shapes["save_operands"].count(stream) == shapes["save_products"].count(stream) + 2 * 2
    assert shapes["save_operands"].count(attention) == shapes["save_products"].count(attention) + 2 + 1
