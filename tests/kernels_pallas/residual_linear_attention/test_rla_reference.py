"""The reference against NumPy loops over tokens, and its mask against the definition of the window."""

import numpy as np
import pytest

from kernels_pallas.residual_linear_attention.reference import linear_mask
from tests.kernels_pallas.residual_linear_attention import rla_suite as suite

LENGTH = 12


def window_mask(q_len, kv_len, window):
    position, key = np.arange(q_len)[:, None] + kv_len - q_len, np.arange(kv_len)[None]
    return (position - window < key) & (key <= position)


def test_masks_at_six_tokens_and_a_window_of_two():
    window = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]
    linear = [
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
    ]
    np.testing.assert_array_equal(window_mask(6, 6, 2), window)
    np.testing.assert_array_equal(linear_mask(6, 6, 2), linear)
    np.testing.assert_array_equal(np.add(window, linear), np.tril(np.ones((6, 6))))


@pytest.mark.parametrize("window", [0, 1, 2, LENGTH - 1, LENGTH, LENGTH + 5])
@pytest.mark.parametrize("history", [0, 3])
def test_window_and_linear_mask_partition_the_causal_mask(window, history):
    q_len, kv_len = LENGTH, LENGTH + history
    linear = np.asarray(linear_mask(q_len, kv_len, window))
    causal = np.tril(np.ones((kv_len, kv_len), int))[history:]
    np.testing.assert_array_equal(linear.astype(int) + window_mask(q_len, kv_len, window), causal)


def numpy_features(feature_map, x):
    if feature_map == "identity":
        return x
    if feature_map == "relu":
        return np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)])
    positive, negative = np.exp(x), np.exp(-x)
    return np.concatenate([positive / positive.sum(), negative / negative.sum()])


def numpy_loop(case, ids, q, k, v, initial_state):
    """The definition, token by token in float64."""
    o = np.zeros(q.shape)
    state = np.zeros(initial_state.shape)
    for b in range(len(q)):
        for t in range(case.T):
            p = t + case.S - case.T
            for n in range(case.K * case.G):
                head = n // case.G
                q_features = numpy_features(case.feature_map, q[b, t, n])
                for i in range(p - case.window + 1):
                    if ids[b, i] == ids[b, p]:
                        o[b, t, n] += (q_features @ numpy_features(case.feature_map, k[b, i, head])) * v[b, i, head]
                if ids[b, 0] == ids[b, p]:
                    o[b, t, n] += q_features @ initial_state[b, head]
        for head in range(case.K):
            for i in range(case.S - case.window):
                if ids[b, i] == ids[b, -1]:
                    state[b, head] += np.outer(numpy_features(case.feature_map, k[b, i, head]), v[b, i, head])
            if ids[b, 0] == ids[b, -1]:
                state[b, head] += initial_state[b, head]
    return o, state


@pytest.mark.parametrize("feature_map", ["softmax", "relu", "identity"])
def test_reference_is_the_definition(feature_map):
    """Values by the loop; each gradient along a random direction by the loop's central difference."""
    case = suite.Case(T=5, S=7, window=2, H=2, feature_map=feature_map)
    ids = np.array([[3] * 7, [0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 5]], np.int32)
    arrays = suite.random_arrays(case, batch=len(ids))
    results = suite.run_reference(case, arrays, ids)

    inputs = {n: arrays[n].astype(np.float64) for n in ("q", "k", "v", "initial_state")}
    o, state = numpy_loop(case, ids, **inputs)
    suite.assert_close({n: results[n] for n in ("o", "state")}, {"o": o, "state": state})

    def objective(**changed):
        o, state = numpy_loop(case, ids, **(inputs | changed))
        return (o * arrays["d_o"]).sum() + (state * arrays["d_state"]).sum()

    step, direction = 1e-6, suite.random_arrays(case, batch=len(ids), seed=1)
    for name in inputs:
        up, down = (objective(**{name: inputs[name] + sign * step * direction[name]}) for sign in (1, -1))
        gradient = results["d_initial_state" if name == "initial_state" else f"d{name}"]
        scale = np.abs(gradient * direction[name]).sum()
        np.testing.assert_allclose(
            (gradient * direction[name]).sum(), (up - down) / (2 * step), atol=1e-5 * scale, rtol=0
        )
