"""The arguments of the public functions: what each default means, and the sentence that a wrong value gets."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.residual_linear_attention import residual_linear_attention, residual_linear_state
from tests.kernels_pallas.residual_linear_attention import rla_suite as suite

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


def test_shapes_and_dtypes_of_the_results():
    bfloat16 = arguments(**{n: arguments()[n].astype(jnp.bfloat16) for n in ("q_BTNH", "k_BSKH", "v_BSKH")})
    for implementation in (None, "reference", "chunked"):
        o, state = residual_linear_attention(**bfloat16, return_state=True, implementation=implementation)
        assert (o.shape, o.dtype) == (Q, jnp.bfloat16)
        assert (state.shape, state.dtype) == ((2, 2, 16, 8), jnp.float32)


def test_segment_ids_default_to_each_other():
    arrays = suite.random_arrays(suite.Case(T=5, S=7, window=1, H=4), batch=1)
    kv_ids = np.array([[0, 0, 1, 1, 1, 2, 2]], np.int32)
    inputs = [arrays[n] for n in "qkv"]

    def attend(q, k, v, **ids):
        return np.asarray(residual_linear_attention(q, k, v, window=1, implementation="reference", **ids))

    both = attend(*inputs, q_segment_ids=kv_ids[:, 2:], kv_segment_ids=kv_ids)
    np.testing.assert_array_equal(attend(*inputs, kv_segment_ids=kv_ids), both)
    assert (attend(*inputs) != both).any()
    square = [x[:, -5:] for x in inputs]
    both = attend(*square, q_segment_ids=kv_ids[:, 2:], kv_segment_ids=kv_ids[:, 2:])
    np.testing.assert_array_equal(attend(*square, q_segment_ids=kv_ids[:, 2:]), both)
    assert (attend(*square) != both).any()
