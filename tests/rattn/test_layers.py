"""Products and look-ups whose gradients have a precision of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rattn.model.layers import float32_product, look_up


def test_the_gradient_of_a_frequent_token_does_not_stop_growing():
    """In bfloat16 a sum of ones stops at 256."""
    tokens = jnp.zeros((5000,), jnp.int32).at[:3].set(2)
    table = jnp.arange(8, dtype=jnp.bfloat16).reshape(4, 2)
    gradient = jax.grad(lambda table: look_up(table, tokens).sum().astype(jnp.float32))(table)
    assert gradient.dtype == jnp.bfloat16
    wanted = np.array([4997, 0, 3, 0], np.float32)[:, None].repeat(2, axis=1)
    np.testing.assert_allclose(np.asarray(gradient, np.float32), wanted, rtol=2.0**-8)
    np.testing.assert_array_equal(np.asarray(look_up(table, tokens)), np.asarray(table)[np.asarray(tokens)])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_float32_product_rounds_its_cotangent_once(dtype):
    """Float32 operands lose nothing; bfloat16 ones meet the cotangent rounded to bfloat16; results are rounded."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 5, 16), (7, 16), (2, 5, 7))
    a, b, cotangent = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    a, b = a.astype(dtype), b.astype(dtype)
    out, pull = jax.vjp(lambda a, b: float32_product("btd,vd->btv", a, b), a, b)
    exact_a, exact_b, rounded = (np.asarray(x, np.float64) for x in (a, b, cotangent.astype(dtype)))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, np.einsum("btd,vd->btv", exact_a, exact_b), rtol=0, atol=1e-5)
    wanted = np.einsum("btv,vd->btd", rounded, exact_b), np.einsum("btd,btv->vd", exact_a, rounded)
    unit = 2.0**-8 if dtype == jnp.bfloat16 else 1e-5
    for gradient, value in zip(pull(cotangent), wanted, strict=True):
        assert gradient.dtype == dtype
        np.testing.assert_allclose(np.asarray(gradient, np.float64), value, rtol=unit, atol=unit * 0.1)
