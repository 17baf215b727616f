"""The arguments of the public functions: what each default means, and the sentence that a wrong value gets."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.residual_linear_attention import (
    implementation_for,
    reference,
    residual_linear_attention,
    residual_linear_state,
)

Q, KV = (2, 5, 4, 8), (2, 7, 2, 8)


def array(shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


def arguments(**changed):
    return {"q_BTNH": array(Q), "k_BSKH": array(KV), "v_BSKH": array(KV), "window": 3} | changed


BAD = [
    ({"q_BTNH": array(Q[1:])}, "q_BTNH has shape (5, 4, 8): it must have the four dims of its name."),
    ({"k_BSKH": array(KV[1:])}, "k_BSKH has shape (7, 2, 8): it must have the four dims of its name."),
    ({"q_BTNH": array((2, 0, 4, 8))}, "q_BTNH has shape (2, 0, 4, 8): no dim may be empty."),
    ({"v_BSKH": array((2, 6, 2, 8))}, "v_BSKH has shape (2, 6, 2, 8): it must be that of k_BSKH, (2, 7, 2, 8)."),
    ({"q_BTNH": array((2, 5, 4, 16))}, "q_BTNH has shape (2, 5, 4, 16): its B and H must be those of k_BSKH"),
    ({"q_BTNH": array((2, 5, 3, 8))}, "q_BTNH has 3 heads: that must be a multiple of the 2 heads of k_BSKH."),
    ({"q_BTNH": array((2, 9, 4, 8))}, "k_BSKH has 7 keys for 9 queries"),
    ({"window": -1}, "window=-1 is negative"),
    ({"window": 2.0}, "window=2.0 is not a Python int"),
    ({"window": True}, "window=True is not a Python int"),
    ({"window": None}, "window=None is not a Python int"),
    ({"q_BTNH": array(Q, jnp.float16)}, "q_BTNH has dtype float16: use one of float32, bfloat16."),
    ({"k_BSKH": array(KV, jnp.int32)}, "k_BSKH has dtype int32: use one of float32, bfloat16."),
    ({"q_BTNH": array(Q, jnp.bfloat16)}, "q_BTNH has dtype bfloat16: it must be that of k_BSKH, float32."),
    ({"v_BSKH": array(KV, jnp.bfloat16)}, "v_BSKH has dtype bfloat16: it must be that of k_BSKH, float32."),
    ({"feature_map": "elu"}, "feature_map='elu' is unknown: use one of softmax, relu, identity."),
    ({"implementation": "triton"}, "implementation='triton' is unknown: use one of reference, chunked, pallas_tpu"),
    ({"q_segment_ids": array((2, 5), jnp.int32)}, "q_segment_ids came without kv_segment_ids"),
    ({"kv_segment_ids": array((2, 5), jnp.int32)}, "kv_segment_ids has shape (2, 5): it must be (2, 7)."),
    ({"kv_segment_ids": array((2, 7))}, "kv_segment_ids has dtype float32: it must be int32."),
    (
        {"kv_segment_ids": array((2, 7), jnp.int32), "q_segment_ids": array((2, 7), jnp.int32)},
        "q_segment_ids has shape (2, 7): it must be (2, 5).",
    ),
    (
        {"initial_state": array((2, 4, 16, 8))},
        "initial_state has shape (2, 4, 16, 8): it must be [B, K, P, H] = (2, 2, 16, 8).",
    ),
    ({"initial_state": array((2, 2, 16, 8)), "feature_map": "identity"}, "it must be [B, K, P, H] = (2, 2, 8, 8)."),
    ({"initial_state": array((2, 2, 16, 8), jnp.bfloat16)}, "initial_state has dtype bfloat16: it must be float32."),
]


@pytest.mark.parametrize(("changed", "sentence"), BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_a_wrong_argument_gets_one_sentence(changed, sentence):
    with pytest.raises((ValueError, TypeError), match=re.escape(sentence)) as raised:
        residual_linear_attention(**arguments(**changed))
    assert str(raised.value).endswith(".")
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, TypeError) == ("dtype" in sentence or "Python int" in sentence)
    if not any(name.startswith("q_") for name in changed):
        with pytest.raises((ValueError, TypeError), match=re.escape(sentence)):
            residual_linear_state(**{n: x for n, x in arguments(**changed).items() if n != "q_BTNH"})


def test_a_traced_window_gets_the_sentence():
    with pytest.raises(TypeError, match=r"window=.*is not a Python int: it is static"):
        jax.eval_shape(lambda window: residual_linear_attention(**arguments(window=window)), 3)


@pytest.mark.parametrize("implementation", [None, "reference", "chunked"])
def test_shapes_and_dtypes_of_the_results(implementation):
    bfloat16 = {n: arguments()[n].astype(jnp.bfloat16) for n in ("q_BTNH", "k_BSKH", "v_BSKH")}

    def attend(**arrays):
        return residual_linear_attention(**arrays, window=3, return_state=True, implementation=implementation)

    o, state = jax.eval_shape(attend, **bfloat16)
    assert (o.shape, o.dtype) == (Q, jnp.bfloat16)
    assert (state.shape, state.dtype) == ((2, 2, 16, 8), jnp.float32)


def test_segment_ids_default_to_each_other(monkeypatch):
    monkeypatch.setattr(reference, "forward", lambda q, k, v, q_ids, kv_ids, *_, **__: ((q_ids, kv_ids), None))
    kv_ids = np.array([[0, 0, 1, 1, 1, 2, 2]] * 2, np.int32)
    q_ids = kv_ids[:, 2:]

    def received(**given):
        ids = residual_linear_attention(**arguments(**given), implementation="reference")
        return [None if x is None else x.tolist() for x in ids]

    assert received() == [None, None]
    assert received(kv_segment_ids=kv_ids) == [q_ids.tolist(), kv_ids.tolist()]
    assert received(kv_segment_ids=kv_ids, q_segment_ids=q_ids) == [q_ids.tolist(), kv_ids.tolist()]
    square = {n: array((2, 5, 2, 8)) for n in ("k_BSKH", "v_BSKH")}
    assert received(q_segment_ids=q_ids, **square) == [q_ids.tolist(), q_ids.tolist()]


def test_the_default_is_the_fastest_that_takes_the_head_dim():
    chosen = {
        (platform, dim): implementation_for(platform, dim) for platform in ("tpu", "gpu", "cpu") for dim in (96, 128)
    }
    assert chosen == {
        ("tpu", 96): "pallas_tpu",
        ("tpu", 128): "pallas_tpu",
        ("gpu", 96): "chunked",
        ("gpu", 128): "pallas_gpu",
        ("cpu", 96): "chunked",
        ("cpu", 128): "chunked",
    }
