"""What the suite of residual linear attention is made of: implementations, cases, inputs, compiled functions.

An implementation joins by one entry in `IMPLEMENTATIONS`. A case is a set of static choices, so it costs one
compilation per implementation; segment ids, inputs and cotangents are arguments of the compiled function and cost none.
The reference takes the window as an argument too.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.residual_linear_attention import reference, residual_linear_attention
from kernels_pallas.residual_linear_attention.feature_map import feature_dim

# Most of the suite's time is compilation, and LLVM's optimisations are half of that.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CHUNK = 8  # of `chunked` and `pallas_tpu` in the tests (see conftest.py)


@dataclasses.dataclass(frozen=True)
class Case:
    """One set of static choices."""

    T: int
    S: int
    window: int
    H: int
    K: int = 2
    G: int = 2
    feature_map: str = "softmax"
    documents: bool = True
    initial: bool = True
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One implementation, and the sizes that reach its corners."""

    name: str
    chunk: int
    H: int
    check_vma: bool = True  # shard_map's own check, which Pallas calls do not pass
    state_roundings: int = 1  # to bfloat16, between a key and the state that a query reads, beside that of φ(k)


IMPLEMENTATIONS = [
    pytest.param(Implementation("chunked", chunk=CHUNK, H=4), id="chunked"),
    pytest.param(Implementation("pallas_tpu", chunk=CHUNK, H=4, check_vma=False), id="pallas_tpu"),
    pytest.param(
        Implementation("pallas_gpu", chunk=16, H=16, check_vma=False, state_roundings=2),
        id="pallas_gpu",
        marks=[pytest.mark.gpu, pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")],
    ),
]


def cases(chunk: int, H: int) -> dict[str, Case]:
    """Returns the cases of an implementation that works in chunks of `chunk`, by name."""
    C, T = chunk, 2 * chunk + 5
    base = Case(T=T, S=T, window=C, H=H)
    vary = functools.partial(dataclasses.replace, base)
    windows = {f"window_{name}": vary(window=W) for name, W in window_values(C, T).items()}
    return windows | {
        "history_below_window": vary(S=T + C, window=C + 3),
        "history_is_window": vary(S=T + C),
        "history_above_window": vary(S=T + C, window=3),
        "history_without_window": vary(S=T + C, window=0),
        "one_query_with_history": vary(T=1, S=C + 2),
        "group_of_one": vary(G=1),
        "group_of_four": vary(K=1, G=4),
        "relu": vary(feature_map="relu", window=3),
        "identity": vary(feature_map="identity", window=3),
        "one_token": vary(T=1, S=1, window=0),
        "one_chunk": vary(T=C, S=C, window=3),
        "whole_chunks": vary(T=3 * C, S=3 * C),
        "no_documents": vary(documents=False, window=3),
        "bare": vary(documents=False, initial=False),
    }


def window_values(C: int, T: int) -> dict[str, int]:
    return {
        "zero": 0,
        "one": 1,
        "below_chunk": C - 3,
        "at_chunk": C,
        "above_chunk": C + 5,
        "below_length": T - 1,
        "at_length": T,
        "above_length": T + 5,
    }


def document_rows(case: Case, chunk: int) -> np.ndarray:
    """Returns kv_segment_ids [B, S], one kind of packing a row."""
    S, lag = case.S, case.S - case.T - case.window
    boundaries = [
        np.cumsum(np.tile([2, 1, 3], S))[: S // 2],  # shorter than chunk and window
        np.arange(case.S - case.T, S, chunk),  # between two chunks of queries
        np.arange(lag % chunk + chunk, S, 2 * chunk),  # between two chunks of delayed keys
        np.arange(1, S, chunk + 1),  # inside chunks
        np.array([S // 3]),  # longer than chunk, for small windows than the window
    ]
    return np.stack([np.searchsorted(b, np.arange(S), side="right") for b in boundaries]).astype(np.int32)


def random_arrays(case: Case, batch: int, seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Returns q, k, v, initial_state and the cotangents of o and state, in float32 but with the case's precision."""
    draws = iter(np.random.default_rng(seed).spawn(6))
    P = feature_dim(case.feature_map, case.H)
    shapes = {
        "q": (batch, case.T, case.K * case.G, case.H),
        "k": (batch, case.S, case.K, case.H),
        "v": (batch, case.S, case.K, case.H),
        "initial_state": (batch, case.K, P, case.H),
        "d_o": (batch, case.T, case.K * case.G, case.H),
        "d_state": (batch, case.K, P, case.H),
    }
    arrays = {name: next(draws).normal(size=shape, scale=scale).astype(np.float32) for name, shape in shapes.items()}
    rounded = {"q", "k", "v", "d_o"}
    return {n: np.asarray(x.astype(case.dtype), np.float32) if n in rounded else x for n, x in arrays.items()}


RESULTS = ("o", "state", "dq", "dk", "dv", "d_initial_state")


@functools.cache
def _compiled(name: str, window: int, feature_map: str):
    @quick_jit
    def run(q, k, v, ids, initial_state, d_o, d_state):
        def forward(q, k, v, initial_state):
            return residual_linear_attention(
                q,
                k,
                v,
                window=window,
                feature_map=feature_map,
                kv_segment_ids=ids,
                initial_state=initial_state,
                return_state=True,
                implementation=name,
            )

        out, pull = jax.vjp(forward, q, k, v, initial_state)
        return *out, *pull((d_o, d_state))

    return run


@functools.cache
def _compiled_reference(feature_map: str):
    @quick_jit
    def run(window, q, k, v, ids, initial_state, d_o, d_state):
        def forward(q, k, v, initial_state):
            q_ids = ids[:, ids.shape[1] - q.shape[1] :]
            return reference.forward(q, k, v, q_ids, ids, initial_state, window=window, feature_map=feature_map)

        out, pull = jax.vjp(forward, q, k, v, initial_state)
        return *out, *pull((d_o, d_state))

    return run


def run(implementation: Implementation, case: Case, arrays: dict, ids: np.ndarray | None) -> dict[str, np.ndarray]:
    """Runs forward and backward; returns `RESULTS` by name in NumPy (bfloat16 widened to float32)."""
    cast = {n: jnp.asarray(arrays[n], case.dtype) for n in ("q", "k", "v", "d_o")}
    out = _compiled(implementation.name, case.window, case.feature_map)(
        cast["q"],
        cast["k"],
        cast["v"],
        ids if case.documents else None,
        arrays["initial_state"] if case.initial else None,
        cast["d_o"],
        arrays["d_state"],
    )
    dtypes = [case.dtype, "float32", case.dtype, case.dtype, case.dtype, "float32"]
    assert [str(x.dtype) for x in out if x is not None] == dtypes[: 6 if case.initial else 5]
    return {n: np.asarray(x, np.float32) for n, x in zip(RESULTS, out, strict=True) if x is not None}


def run_reference(case: Case, arrays: dict, ids: np.ndarray | None) -> dict[str, np.ndarray]:
    """Runs the reference in float32 on the same values."""
    ids = ids if case.documents else np.zeros(arrays["k"].shape[:2], np.int32)
    names = ("q", "k", "v", "initial_state", "d_o", "d_state")
    q, k, v, initial_state, d_o, d_state = (arrays[n] for n in names)
    initial_state = initial_state if case.initial else np.zeros_like(initial_state)
    out = _compiled_reference(case.feature_map)(case.window, q, k, v, ids, initial_state, d_o, d_state)
    return {n: np.asarray(x) for n, x in zip(RESULTS, out, strict=True) if case.initial or n != "d_initial_state"}


def assert_close(actual: dict, expected: dict, tolerance: float = 1e-5) -> None:
    """Compares each result by itself, within `tolerance` of its largest magnitude; NaN is never close."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(
            value, expected[name], rtol=0, atol=tolerance * scale, equal_nan=False, err_msg=f"{name}, scale {scale}"
        )
