"""Blockwise attention against a dense mask in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rattn.model import softmax_attention
from rattn.model.softmax_attention import blockwise_attention


def dense(q, k, v, window, q_segments, kv_segments):
    """Softmax over the T×S mask, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (_, T, N, H), (S, K) = q.shape, k.shape[1:3]
    k, v = np.repeat(k, N // K, axis=2), np.repeat(v, N // K, axis=2)
    positions, keys = np.arange(T)[:, None] + S - T, np.arange(S)[None, :]
    mask = (keys <= positions) & (keys > positions - (S if window is None else window))
    mask = mask[None] & (q_segments[:, :, None] == kv_segments[:, None, :])
    scores = np.where(mask[:, None], np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def inputs(T, S, N=4, K=2, H=8, B=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(T * 1000 + S), 3)
    q = jax.random.normal(keys[0], (B, T, N, H), dtype)
    k, v = (jax.random.normal(key, (B, S, K, H), dtype) for key in keys[1:])
    segments = np.stack([np.arange(S) // 5 + 1, np.where(np.arange(S) < S // 2, 1, 2)]).astype(np.int32)
    return q, k, v, segments


@pytest.mark.parametrize(
    ("T", "S", "window"),
    [(9, 9, w) for w in (None, 1, 2, 8, 9, 14)] + [(37, 37, 5), (7, 20, 3), (7, 20, None), (1, 6, 4)],
)
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_dense_mask(monkeypatch, T, S, window, packed):
    monkeypatch.setattr(softmax_attention, "QUERY_BLOCK", 4)
    q, k, v, segments = inputs(T, S)
    given = jnp.asarray(segments) if packed else None
    out = np.asarray(blockwise_attention(q, k, v, window=window, kv_segment_ids=given))
    if not packed:
        segments = np.zeros_like(segments)
    np.testing.assert_allclose(out, dense(q, k, v, window, segments[:, S - T :], segments), atol=1e-5)


def test_gradients_equal_those_of_the_dense_mask(monkeypatch):
    monkeypatch.setattr(softmax_attention, "QUERY_BLOCK", 4)
    q, k, v, segments = inputs(11, 14)
    probe = jax.random.normal(jax.random.key(7), q.shape)

    def dense_jax(q, k, v):
        N, K, (T, S) = q.shape[2], k.shape[2], (q.shape[1], k.shape[1])
        k, v = jnp.repeat(k, N // K, axis=2), jnp.repeat(v, N // K, axis=2)
        positions, keys = np.arange(T)[:, None] + S - T, np.arange(S)[None, :]
        mask = (keys <= positions) & (keys > positions - 6)
        mask = mask[None] & (segments[:, S - T :, None] == segments[:, None, :])
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
        return (jnp.einsum("bnts,bsnh->btnh", weights, v) * probe).sum()

    def ours(q, k, v):
        return (blockwise_attention(q, k, v, window=6, kv_segment_ids=jnp.asarray(segments)) * probe).sum()

    for got, wanted in zip(jax.grad(ours, (0, 1, 2))(q, k, v), jax.grad(dense_jax, (0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), atol=1e-5)


def test_window_attention_holds_no_array_of_context_squared():
    T, window = 2048, 64
    q, k, v, _ = inputs(T, T, B=1)
    grad = jax.grad(lambda q, k, v: blockwise_attention(q, k, v, window=window).sum(), (0, 1, 2))
    largest = max(np.prod(shape) for shape in shapes_in(jax.make_jaxpr(grad)(q, k, v).jaxpr))
    assert largest <= max(q.size * 2, 4 * T * window)
    assert largest < T * T


def shapes_in(jaxpr):
    """Shapes of every intermediate of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(value, "jaxpr"):
                yield from shapes_in(value.jaxpr)


def test_bfloat16_stays_near_float32():
    q, k, v, segments = inputs(64, 64, dtype=jnp.bfloat16)
    out = blockwise_attention(q, k, v, window=16, kv_segment_ids=jnp.asarray(segments))
    assert out.dtype == jnp.bfloat16
    wanted = dense(q, k, v, 16, segments, segments)
    # Weights and output are rounded to 8 bits of mantissa once each, of a convex combination of |v| ≤ max.
    bound = 2 * 2.0**-8 * np.abs(np.asarray(v, np.float32)).max()
    assert np.abs(np.asarray(out, np.float32) - wanted).max() <= bound


def test_window_and_linear_masks_partition_the_causal_mask():
    """A value one-hot in its position shows which keys softmax attention reads."""
    T = 6
    for window, t in itertools.product((1, 2, T - 1, T, T + 5), range(T)):
        v = jnp.eye(T)[None, :, None, :]
        q = k = jnp.zeros((1, T, 1, T))
        seen = np.asarray(blockwise_attention(q, k, v, window=window))[0, t, 0] > 0
        assert seen.tolist() == [t - window < s <= t for s in range(T)]
