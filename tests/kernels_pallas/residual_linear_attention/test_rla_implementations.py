"""Every implementation against the quadratic float32 reference: values, and each gradient apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas.residual_linear_attention import reference, residual_linear_attention, residual_linear_state
from kernels_pallas.residual_linear_attention.feature_map import features
from tests.kernels_pallas.residual_linear_attention import rla_suite as suite
from tests.kernels_pallas.residual_linear_attention.rla_suite import IMPLEMENTATIONS

CASE_NAMES = tuple(suite.cases(chunk=8, H=4))

pytestmark = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def prepare(implementation, name):
    case = suite.cases(implementation.chunk, implementation.H)[name]
    ids = suite.document_rows(case, implementation.chunk)
    return case, ids, suite.random_arrays(case, batch=len(ids))


@pytest.mark.parametrize("name", CASE_NAMES)
def test_matches_reference(implementation, name):
    case, ids, arrays = prepare(implementation, name)
    # A cotangent on one result at a time, so that neither path hides behind the other.
    for zero in ("d_o", "d_state"):
        one_sided = arrays | {zero: np.zeros_like(arrays[zero])}
        suite.assert_close(suite.run(implementation, case, one_sided, ids), suite.run_reference(case, one_sided, ids))


@pytest.mark.parametrize("name", ["window_at_chunk", "relu", "identity"])
@pytest.mark.parametrize("scale", [1e8, 1e-40])
def test_extreme_magnitudes_are_finite(implementation, name, scale):
    """1e-40 is denormal. At 1e8 a product of three still fits float32; a softmax may see nearly its largest number."""
    case, ids, arrays = prepare(implementation, name)
    scales = {"q": scale, "k": scale, "v": scale}
    if scale > 1 and case.feature_map == "softmax":
        scales |= {"q": 3e37, "k": 3e37}
    arrays |= {n: np.float32(s) * arrays[n] for n, s in scales.items()}
    results = suite.run(implementation, case, arrays, ids)
    for result, value in results.items():
        assert np.isfinite(value).all(), result
    if scale > 1:
        suite.assert_close(results, suite.run_reference(case, arrays, ids))


def test_same_bits_every_run(implementation):
    case, ids, arrays = prepare(implementation, "window_at_chunk")
    first, second = (suite.run(implementation, case, arrays, ids) for _ in range(2))
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


@pytest.mark.parametrize("name", ["window_at_chunk", "history_above_window"])
def test_documents_do_not_leak(implementation, name):
    """Whatever stands in the other documents, a document's results keep every bit, and it sends them no gradient."""
    case, ids, arrays = prepare(implementation, name)
    noise = suite.random_arrays(case, batch=len(ids), seed=1, scale=1e3)
    q_ids = ids[:, case.S - case.T :]
    for document in (ids[:, case.S // 2], ids[:, -1]):
        own_q, own_k = q_ids == document[:, None], ids == document[:, None]
        own = {"q": own_q, "k": own_k, "v": own_k, "d_o": own_q, "initial_state": own_k[:, 0]}
        own["d_state"] = own_k[:, -1]
        own = {n: x.reshape(x.shape + (1,) * (arrays[n].ndim - x.ndim)) for n, x in own.items()}
        quiet = arrays | {n: np.where(own[n], arrays[n], 0) for n in ("d_o", "d_state")}
        loud = quiet | {n: np.where(own[n], arrays[n], noise[n]) for n in ("q", "k", "v", "initial_state")}
        before, after = (suite.run(implementation, case, x, ids) for x in (quiet, loud))

        mask = {"o": own["d_o"], "state": own["d_state"]} | {f"d{n}": own[n] for n in "qkv"}
        mask["d_initial_state"] = own["initial_state"]
        for result, owned in mask.items():
            np.testing.assert_array_equal(
                np.where(owned, before[result], 0), np.where(owned, after[result], 0), err_msg=result
            )
            if result.startswith("d"):
                assert not np.where(owned, 0, after[result]).any(), result


@pytest.mark.parametrize("name", ["window_at_chunk", "history_below_window"])
def test_a_query_moves_exactly_the_keys_it_reads(implementation, name):
    case, ids, arrays = prepare(implementation, name)
    arrays["d_state"][:] = 0
    position = np.arange(case.T) + case.S - case.T
    for t in range(case.T):
        results = suite.run(implementation, case, arrays | {"d_o": arrays["d_o"] * one_hot(case.T, t)}, ids)
        reads = (np.arange(case.S) <= position[t] - case.window) & (ids == ids[:, [position[t]]])
        reads_state = ids[:, 0] == ids[:, position[t]]
        for result in ("dk", "dv"):
            np.testing.assert_array_equal(results[result].any(axis=(2, 3)), reads, err_msg=f"{result} of query {t}")
        np.testing.assert_array_equal(results["d_initial_state"].any(axis=(1, 2, 3)), reads_state)
        expected = (reads.any(axis=1) | reads_state)[:, None] & (np.arange(case.T) == t)
        np.testing.assert_array_equal(results["dq"].any(axis=(2, 3)), expected, err_msg=f"dq of query {t}")


def one_hot(length, index):
    return (np.arange(length) == index).astype(np.float32)[:, None, None]


@pytest.mark.parametrize("cut", ["on_chunk", "off_chunk"])
def test_two_calls_continue_a_sequence(implementation, cut):
    """The second call takes the last W keys as history and the first one's state: values and gradients of one call."""
    case, ids, arrays = prepare(implementation, "window_below_chunk")
    first = implementation.chunk + (0 if cut == "on_chunk" else 5)
    start = first - case.window
    options = {"window": case.window, "return_state": True, "implementation": implementation.name}

    @suite.quick_jit
    def run(q, k, v, initial_state, d_o, d_state):
        def forward(q, k, v, initial_state):
            now, later = slice(0, first), slice(start, None)
            o_1, state = residual_linear_attention(
                q[:, :first],
                k[:, now],
                v[:, now],
                kv_segment_ids=ids[:, now],
                initial_state=initial_state,
                **options,
            )
            o_2, state = residual_linear_attention(
                q[:, first:], k[:, later], v[:, later], kv_segment_ids=ids[:, later], initial_state=state, **options
            )
            return jnp.concatenate([o_1, o_2], axis=1), state

        out, pull = jax.vjp(forward, q, k, v, initial_state)
        return *out, *pull((d_o, d_state))

    out = run(*(arrays[n] for n in ("q", "k", "v", "initial_state", "d_o", "d_state")))
    results = {n: np.asarray(x) for n, x in zip(suite.RESULTS, out, strict=True)}
    suite.assert_close(results, suite.run_reference(case, arrays, ids))


@pytest.mark.parametrize("name", ["window_below_chunk", "history_below_window", "window_above_length"])
def test_state_entry_is_the_returned_state(implementation, name):
    case, ids, arrays = prepare(implementation, name)

    @suite.quick_jit
    def run(k, v, initial_state, d_state):
        def forward(k, v, initial_state):
            return residual_linear_state(
                k,
                v,
                window=case.window,
                kv_segment_ids=ids,
                initial_state=initial_state,
                implementation=implementation.name,
            )

        state, pull = jax.vjp(forward, k, v, initial_state)
        return state, *pull(d_state)

    out = run(*(arrays[n] for n in ("k", "v", "initial_state", "d_state")))
    results = {n: np.asarray(x) for n, x in zip(("state", "dk", "dv", "d_initial_state"), out, strict=True)}
    expected = suite.run_reference(case, arrays | {"d_o": np.zeros_like(arrays["d_o"])}, ids)
    suite.assert_close(results, {n: expected[n] for n in results})


@pytest.mark.parametrize("values", ["random", "positive"])
def test_bfloat16(implementation, values):
    """Against float32 on the same inputs, element by element, within a bound derived from the roundings.

    With u = 2^-8, half the spacing of bfloat16 at 1: a term of a reduction is a product whose factors were rounded at
    most three times (two features and the score or the state between them), and the result is rounded once. So the
    error is at most 4 u times the sum of the terms' magnitudes, however many they are: T keys × P features. Results
    that stay in float32 hold one rounded feature a term: u. Where the sums of chunks are rounded before they add up to
    a state, that is one u more for both. Positive values make that sum the result itself, and it grows with every one
    of the chunks, as does the error of a state that is not kept in float32.
    """
    u, C = 2.0**-8, implementation.chunk
    T = max(4 * C, 96) + 5
    case = suite.Case(T=T, S=T + 3, window=C, H=implementation.H, dtype="bfloat16")
    ids = suite.document_rows(case, C)
    arrays = suite.random_arrays(case, batch=len(ids))
    if values == "positive":
        ids[:] = 1
        arrays["v"] = np.abs(arrays["v"])
    results = suite.run(implementation, case, arrays, ids)
    expected = suite.run_reference(case, arrays, ids)
    for name, magnitude in sums_of_magnitudes(case, arrays, ids).items():
        roundings = implementation.state_roundings + (0 if name in ("state", "d_initial_state") else 3)
        bound = roundings * u * magnitude + 1e-30
        error = np.abs(results[name] - expected[name])
        worst = (error / bound).max()
        assert worst <= 1, f"{name}: {worst} of the bound"


def sums_of_magnitudes(case, arrays, ids):
    """Returns, for each result, the sum of the magnitudes of the terms that it is a sum of."""

    def through_softmax(y, dy):
        halves = zip(jnp.split(y, 2, axis=-1), jnp.split(dy, 2, axis=-1), strict=True)
        return sum(y * (dy + (y * dy).sum(axis=-1, keepdims=True)) for y, dy in halves)

    @suite.quick_jit
    def run(arrays, ids):
        def forward(q, k, v, initial_state):  # on features, which are positive
            q_ids = ids[:, case.S - case.T :]
            return reference.forward(q, k, v, q_ids, ids, initial_state, window=case.window, feature_map="identity")

        q, k = (features(case.feature_map, arrays[n]) for n in "qk")
        v, initial_state, d_o, d_state = (jnp.abs(arrays[n]) for n in ("v", "initial_state", "d_o", "d_state"))
        (o, state), pull = jax.vjp(forward, q, k, v, initial_state)
        dq, dk, dv, d_initial_state = pull((d_o, d_state))
        return o, state, through_softmax(q, dq), through_softmax(k, dk), dv, d_initial_state

    return dict(zip(suite.RESULTS, map(np.asarray, run(arrays, ids)), strict=True))


@pytest.mark.parametrize("kv_heads", ["split", "shared"])
def test_shard_map_over_batch_and_heads(implementation, kv_heads):
    """Four devices: the batch over two, the query heads over two; the key heads split likewise or the same on both.

    Only on a GPU machine with fewer: the heads over all there are.
    """
    case, ids, arrays = prepare(implementation, "window_at_chunk")
    heads = "model" if kv_heads == "split" else None
    case = dataclasses.replace(case, K=2 if heads else 1)
    arrays, ids = suite.random_arrays(case, batch=4), ids[:4]
    shape = (2, 2) if jax.device_count() >= 4 else (1, jax.device_count())
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    kv, state = P("data", None, heads), P("data", heads)

    def attend(q, k, v, initial_state, ids):
        return residual_linear_attention(
            q,
            k,
            v,
            window=case.window,
            kv_segment_ids=ids,
            initial_state=initial_state,
            implementation=implementation.name,
        )

    sharded = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(P("data", None, "model"), kv, kv, state, P("data")),
        out_specs=P("data", None, "model"),
        check_vma=implementation.check_vma,
    )

    @suite.quick_jit
    def run(q, k, v, initial_state, ids, d_o):
        o, pull = jax.vjp(lambda *x: sharded(*x, ids), q, k, v, initial_state)
        return o, *pull(d_o)

    out = run(*(arrays[n] for n in ("q", "k", "v", "initial_state")), ids, arrays["d_o"])
    names = [n for n in suite.RESULTS if n != "state"]
    expected = suite.run_reference(case, arrays | {"d_state": np.zeros_like(arrays["d_state"])}, ids)
    results = {n: np.asarray(x) for n, x in zip(names, out, strict=True)}
    suite.assert_close(results, {n: expected[n] for n in names})


def test_vmap(implementation):
    case, ids, arrays = prepare(implementation, "window_at_chunk")
    arrays, ids = suite.random_arrays(case, batch=4), ids[:4]

    def run(q, k, v, initial_state, ids, d_o, d_state):
        def forward(q, k, v, initial_state):
            return residual_linear_attention(
                q,
                k,
                v,
                window=case.window,
                kv_segment_ids=ids,
                initial_state=initial_state,
                return_state=True,
                implementation=implementation.name,
            )

        out, pull = jax.vjp(forward, q, k, v, initial_state)
        return *out, *pull((d_o, d_state))

    operands = [*(arrays[n] for n in ("q", "k", "v", "initial_state")), ids, arrays["d_o"], arrays["d_state"]]
    out = suite.quick_jit(jax.vmap(run))(*(x.reshape(2, 2, *x.shape[1:]) for x in operands))
    results = {n: np.asarray(x).reshape(4, *x.shape[2:]) for n, x in zip(suite.RESULTS, out, strict=True)}
    suite.assert_close(results, suite.run_reference(case, arrays, ids))
