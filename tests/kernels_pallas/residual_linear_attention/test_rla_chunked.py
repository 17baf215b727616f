"""What the chunked form promises beside its values: linear size, in what it computes and in what its backward keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from kernels_pallas.residual_linear_attention import chunked, residual_linear_attention

T, H = 512, 4


def arguments(length):
    x = jax.ShapeDtypeStruct((1, length, 1, H), jnp.float32)
    return x, x, x, jax.ShapeDtypeStruct((1, length), jnp.int32)


def backward(q, k, v, ids):
    def forward(q, k, v):
        return residual_linear_attention(q, k, v, window=37, kv_segment_ids=ids, implementation="chunked")

    return jax.vjp(forward, q, k, v)


def sizes(jaxpr):
    """Yields the number of elements of every array in a jaxpr and in those inside it."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)


@pytest.mark.parametrize("chunk", [8, 64])
def test_no_array_of_quadratic_size(monkeypatch, chunk):
    monkeypatch.setattr(chunked, "MIN_CHUNK", chunk)

    def gradients(q, k, v, ids):
        o, pull = backward(q, k, v, ids)
        return pull(o)

    largest = max(sizes(jax.make_jaxpr(gradients)(*arguments(T)).jaxpr))
    assert T * H <= largest < T * T / 4, largest


def test_backward_keeps_inputs_and_states_only():
    """Residuals of a chunk beyond its inputs and the state before it (scores, features) would break this bound."""
    residuals = jax.tree.leaves(jax.eval_shape(lambda *a: backward(*a)[1], *arguments(T)))
    elements = sum(int(np.prod(r.shape)) for r in residuals)
    inputs, states, ids = 3 * T * H, T // chunked.MIN_CHUNK * 2 * H * H, 3 * T
    assert elements <= 2 * inputs + states + 2 * ids, [r.shape for r in residuals]
