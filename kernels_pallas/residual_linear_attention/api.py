"""The public functions: they check the arguments, choose an implementation and call it."""

import importlib
import importlib.util

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.residual_linear_attention.feature_map import FEATURE_MAPS, feature_dim
from kernels_pallas.residual_linear_attention.naming import CHECKPOINT_NAME

IMPLEMENTATIONS = ("reference", "chunked", "pallas_tpu", "pallas_gpu")
DTYPES = ("float32", "bfloat16")


def residual_linear_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    window: int,
    feature_map: str = "softmax",
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends linearly to the keys that a sliding window has left (arXiv 2506.15545).

    S >= T: the first S - T keys are history, and query t stands at key position p = t + S - T. It reads

        o_t = φ(q_t) · Σ_{i <= p - W, same document} φ(k_i)ᵀ v_i

    with one sum (the state, P × H) for each key/value head, which serves the N / K query heads of its group. There is
    no denominator, no scale and no position encoding. The result is differentiable in q, k, v and `initial_state`.

    Args:
      q_BTNH: queries, float32 or bfloat16; N is a multiple of K.
      k_BSKH: keys, in q's dtype.
      v_BSKH: values, in q's dtype.
      window: W, the tokens that the sliding window covers, the query itself included. 0 reads every key up to p;
        W >= S reads none.
      feature_map: φ over the head dim, in float32: "softmax" [softmax(x), softmax(-x)] and "relu" [relu(x), relu(-x)]
        have P = 2H, "identity" has P = H.
      q_segment_ids: int32 [B, T], the documents of the queries; `kv_segment_ids[:, S - T:]` if not given.
      kv_segment_ids: int32 [B, S], the documents of the keys; `q_segment_ids` if not given, for S = T. A document is
        one unbroken run of equal ids, and every run of a row has an id of its own.
      initial_state: float32 [B, K, P, H], a sum over keys before k[0] that belongs to the document of k[0]. Every query
        of that document reads it, whatever its position: whoever cuts a sequence in two hands over a state that already
        lags by the window (below).
      return_state: also return the state that the query at the last key position reads: the sum over key positions
        <= S - 1 - W in the document of the last key, with `initial_state` if the first key is in that document too.
        It is the initial state of a call that continues the sequence with the last W keys as its history.
      implementation: "reference", "chunked", "pallas_tpu" or "pallas_gpu"; by default the fastest for the backend.

    Returns:
      o_BTNH in q's dtype; with `return_state`, (o_BTNH, state_BKPH in float32).

    Raises:
      ValueError, TypeError: one sentence with the argument and its value.
    """
    _check_keys(k_BSKH, v_BSKH, window, feature_map, kv_segment_ids, initial_state, implementation)
    q_segment_ids, kv_segment_ids = _check_queries(q_BTNH, k_BSKH, q_segment_ids, kv_segment_ids)
    module = _load(implementation or implementation_for(jax.default_backend(), q_BTNH.shape[-1]))
    arrays = _vary_alike(q_BTNH, k_BSKH, v_BSKH, q_segment_ids, kv_segment_ids, initial_state)
    o_BTNH, state_BKPH = module.forward(*arrays, window=window, feature_map=feature_map)
    o_BTNH = checkpoint_name(o_BTNH, CHECKPOINT_NAME)
    return (o_BTNH, state_BKPH) if return_state else o_BTNH


def residual_linear_state(
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    window: int,
    feature_map: str = "softmax",
    kv_segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Returns state_BKPH in float32, as `residual_linear_attention(..., return_state=True)`, and computes no output.

    "reference" has a form of its own. All others share one masked matrix product, to which a kernel has nothing to add.
    """
    _check_keys(k_BSKH, v_BSKH, window, feature_map, kv_segment_ids, initial_state, implementation)
    module = _load("reference" if implementation == "reference" else "chunked")
    arrays = _vary_alike(k_BSKH, v_BSKH, kv_segment_ids, initial_state)
    return module.state(*arrays, window=window, feature_map=feature_map)


def implementation_for(platform: str, head_dim: int) -> str:
    """Returns the fastest implementation on "tpu", "gpu" or "cpu", which need not be the platform of this process."""
    if platform == "tpu":
        return "pallas_tpu"
    # The GPU kernels' matrix products need a power of two.
    return "pallas_gpu" if platform == "gpu" and head_dim >= 16 and not head_dim & (head_dim - 1) else "chunked"


def _load(implementation: str):
    """Imports the module of an implementation only when it is asked for: kernels import their backend's dialect."""
    name = f"{__package__}.{implementation}"
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"implementation={implementation!r} does not exist in this version: use 'chunked'.")
    return importlib.import_module(name)


def _check_keys(k_BSKH, v_BSKH, window, feature_map, kv_segment_ids, initial_state, implementation):
    """Checks what both public functions take."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r} is unknown: use one of {', '.join(IMPLEMENTATIONS)}.")
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map={feature_map!r} is unknown: use one of {', '.join(FEATURE_MAPS)}.")
    if not isinstance(window, int) or isinstance(window, bool):
        raise TypeError(f"window={window!r} is not a Python int: it is static and shapes the computation.")
    if window < 0:
        raise ValueError(f"window={window} is negative: use 0 for the linear layer without a window.")
    for name, x in (("k_BSKH", k_BSKH), ("v_BSKH", v_BSKH)):
        _check_rank_and_dtype(name, x)
    if v_BSKH.shape != k_BSKH.shape:
        raise ValueError(f"v_BSKH has shape {v_BSKH.shape}: it must be that of k_BSKH, {k_BSKH.shape}.")
    if v_BSKH.dtype != k_BSKH.dtype:
        raise TypeError(f"v_BSKH has dtype {v_BSKH.dtype}: it must be that of k_BSKH, {k_BSKH.dtype}.")
    B, S, K, H = k_BSKH.shape
    if kv_segment_ids is not None:
        _check_ids("kv_segment_ids", kv_segment_ids, (B, S))
    if initial_state is not None:
        expected = (B, K, feature_dim(feature_map, H), H)
        if initial_state.shape != expected:
            raise ValueError(f"initial_state has shape {initial_state.shape}: it must be [B, K, P, H] = {expected}.")
        if initial_state.dtype != jnp.float32:
            raise TypeError(f"initial_state has dtype {initial_state.dtype}: it must be float32.")


def _check_queries(q_BTNH, k_BSKH, q_segment_ids, kv_segment_ids):
    """Checks the queries against the keys; returns both segment ids, or None twice."""
    _check_rank_and_dtype("q_BTNH", q_BTNH)
    if q_BTNH.dtype != k_BSKH.dtype:
        raise TypeError(f"q_BTNH has dtype {q_BTNH.dtype}: it must be that of k_BSKH, {k_BSKH.dtype}.")
    (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    if (k_BSKH.shape[0], k_BSKH.shape[3]) != (B, H):
        raise ValueError(f"q_BTNH has shape {q_BTNH.shape}: its B and H must be those of k_BSKH, {k_BSKH.shape}.")
    if N % K:
        raise ValueError(f"q_BTNH has {N} heads: that must be a multiple of the {K} heads of k_BSKH.")
    if S < T:
        raise ValueError(f"k_BSKH has {S} keys for {T} queries: every query needs a key at its own position.")
    if q_segment_ids is not None:
        _check_ids("q_segment_ids", q_segment_ids, (B, T))
        if kv_segment_ids is None and S > T:
            raise ValueError(
                f"q_segment_ids came without kv_segment_ids, and {S} keys stand against {T} queries: give both."
            )
        kv_segment_ids = q_segment_ids if kv_segment_ids is None else kv_segment_ids
    elif kv_segment_ids is not None:
        q_segment_ids = kv_segment_ids[:, S - T :]
    return q_segment_ids, kv_segment_ids


def _check_rank_and_dtype(name, x):
    if x.ndim != 4:
        raise ValueError(f"{name} has shape {x.shape}: it must have the four dims of its name.")
    if 0 in x.shape:
        raise ValueError(f"{name} has shape {x.shape}: no dim may be empty.")
    if str(x.dtype) not in DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}: use one of {', '.join(DTYPES)}.")


def _check_ids(name, ids, shape):
    if ids.shape != shape:
        raise ValueError(f"{name} has shape {ids.shape}: it must be {shape}.")
    if ids.dtype != jnp.int32:
        raise TypeError(f"{name} has dtype {ids.dtype}: it must be int32.")


def _vary_alike(*arrays):
    """Makes all arrays vary over the same mesh axes under `shard_map`.

    A scan's carry needs that from its first step, and a gradient is then summed over an axis once, not in every step.
    """
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays if x is not None))

    def vary(x):
        missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return [None if x is None else vary(x) for x in arrays]
