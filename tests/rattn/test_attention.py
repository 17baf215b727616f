"""Splash attention, interpreted, against the blockwise form; its mask against JAX's; which one a platform gets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as splash_mask_info

from rattn import attention
from rattn.attention import linear_attention_for, softmax_attention_for, splash_attention
from rattn.model.softmax_attention import blockwise_attention


@pytest.mark.parametrize(
    ("T", "S", "window"),
    [(300, 300, 70), (200, 456, 256), (200, 333, None)],
    ids=["window", "window with a history", "full with a history"],
)
def test_splash_equals_blockwise(monkeypatch, T, S, window):
    """Outputs and gradients; lengths that are no whole blocks, groups of heads, packed documents, a hidden one."""
    monkeypatch.setattr(attention, "SPLASH_BLOCK", 128)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, T, 4, 16), (2, S, 2, 16), (2, S, 2, 16), (2, T, 4, 16)]
    q, k, v, probe = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    ids = np.stack([np.arange(S) // 77, np.arange(S) // 130]).astype(np.int32)
    ids[:, : (S - T) // 2] = np.iinfo(np.int32).min

    def run(function):
        def weighed(q, k, v):
            o = function(q, k, v, window=window, kv_segment_ids=jnp.asarray(ids))
            return (o * probe).sum(), o

        gradients, o = jax.jit(jax.grad(weighed, (0, 1, 2), has_aux=True))(q, k, v)
        return [*gradients, o]

    got, wanted = run(functools.partial(splash_attention, interpret=True)), run(blockwise_attention)
    for name, a, b in zip(("q", "k", "v", "o"), got, wanted, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("is_dkv", [False, True])
@pytest.mark.parametrize(("window", "offset"), [(700, 1024), (1, 0), (256, 256), (3072, 1024)])
def test_the_band_gives_splash_what_its_own_mask_gives(window, offset, is_dkv):
    lengths, blocks = (2048, 2048 + offset), (512, 256)
    band = attention._BandMask(lengths, offset, window)
    local = splash_mask.LocalMask(lengths, (window - 1, 0), offset)
    (got, function), (wanted, wanted_function) = (
        splash_mask_info._process_mask(splash_mask.MultiHeadMask([mask] * 2), blocks, is_dkv) for mask in (band, local)
    )
    for name in wanted._fields:
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name), err_msg=name)
    queries, keys = np.arange(300, 420)[:, None], np.arange(offset, offset + 500)[None, :]
    np.testing.assert_array_equal(function(queries, keys), wanted_function(queries, keys))


def test_the_band_answers_for_a_block_without_making_it():
    """JAX's LocalMask makes every block: at 131,072 tokens that takes minutes."""
    band = attention._BandMask((131_072, 131_072), 0, 512)
    assert [band[q : q + 512, 65_024:65_536].tolist() for q in (64_512, 65_024, 65_536, 66_560)] == [
        [False, False],
        [True, False],
        [True, False],
        [False, False],
    ]


def test_platforms_choose(monkeypatch):
    assert softmax_attention_for("tpu") is splash_attention
    assert softmax_attention_for("gpu") is attention.gpu_attention
    assert softmax_attention_for("cpu") is blockwise_attention
    asked = []
    monkeypatch.setattr(attention, "residual_linear_attention", lambda *_, implementation: asked.append(implementation))
    for platform in ("tpu", "gpu", "cpu"):
        linear_attention_for(platform)(*[np.zeros((1, 1, 1, 128))] * 3)
    assert asked == ["pallas_tpu", "pallas_gpu", "chunked"]


GPU_CASES = {
    "documents": (384, 384, 72, 128, True),
    "history": (200, 333, 64, 64, True),
    "full": (300, 300, None, 128, True),
    "full with a history": (200, 333, None, 128, True),
    "no documents": (384, 384, 72, 128, False),
    "no documents, full": (384, 384, None, 64, False),
    "head_dim 32": (300, 300, 72, 32, True),
    "head_dim 32, no documents": (384, 384, 72, 32, False),
}


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", GPU_CASES)
def test_gpu_attention_equals_blockwise(name):
    """In bfloat16, against float32 on the same inputs.

    At most five roundings of 2^-8, half of that on average, lie between an input and a result: of the scores' softmax,
    its cotangent, the output that the backward reads, an operand, and the result. The errors of the terms are
    independent, so that the norm of all errors stays below 5 u / 2 times the norm of the result.
    """
    T, S, window, H, documents = GPU_CASES[name]
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, T, 4, H), (2, S, 2, H), (2, S, 2, H), (2, T, 4, H)]
    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]
    ids = np.stack([np.arange(S) // 77, np.arange(S) // 130]).astype(np.int32)
    ids[:, : (S - T) // 2] = np.iinfo(np.int32).min

    def run(function, dtype):
        q, k, v, probe = (x.astype(dtype) for x in arrays)
        attend = functools.partial(function, window=window, kv_segment_ids=jnp.asarray(ids) if documents else None)
        # JAX's own attention and its backward rely on implicit promotion.
        with jax.numpy_dtype_promotion("standard"):
            o, pull = jax.vjp(attend, q, k, v)
            return [np.asarray(x, np.float64) for x in (o, *pull(probe))]

    got, wanted = run(attention.gpu_attention, jnp.bfloat16), run(blockwise_attention, jnp.float32)
    for result, a, b in zip(("o", "dq", "dk", "dv"), got, wanted, strict=True):
        assert np.linalg.norm(a - b) <= 2.5 * 2.0**-8 * np.linalg.norm(b), result


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("window", [1, 72, None])
def test_gpu_attention_sees_its_window_and_its_document_alone(window, documents):
    """A value that the mask hides moves no bit of the output; one that it shows moves it."""
    T, moved = 384, 150
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, T, n, 128), jnp.bfloat16) for key, n in zip(keys, (4, 2, 2), strict=True))
    ids = np.searchsorted([100, 200], np.arange(T), side="right")[None].astype(np.int32)
    attend = jax.jit(
        functools.partial(
            attention.gpu_attention, window=window, kv_segment_ids=jnp.asarray(ids) if documents else None
        )
    )
    before, after = (np.asarray(attend(q, k, x), np.float32) for x in (v, v.at[:, moved].add(100)))
    distance = np.arange(T) - moved
    sees = (distance >= 0) & (distance < (window or T)) & ((ids[0] == ids[0, moved]) | (not documents))
    np.testing.assert_array_equal((before != after).any(axis=(0, 2, 3)), sees)
