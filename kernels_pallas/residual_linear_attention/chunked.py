"""Residual linear attention in plain JAX, O(T): a scan over chunks that carries the state. The portable fallback.

With the keys delayed by the window, slot t holds the newest key that query t reads. Over chunks of C slots
(arXiv 2506.15545, section 3):

    O_c = φ(Q_c) S_{c-1} + (φ(Q_c) φ(K_c)ᵀ ⊙ M) V_c        M: causal, same document
    S_c = S_{c-1} + φ(K_c)ᵀ V_c

The state is kept in float32, one for each key/value head, and belongs to the document of the newest key in it: it is
dropped when the next chunk ends in another one. Matrix products take operands in the input dtype and add up in float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.residual_linear_attention.feature_map import feature_dim, features

# A chunk of H slots balances the work on scores with that on the state, and shorter ones than this only add steps: at
# B=8, T=512, N=4, K=2, H=32 forward and backward take 18 ms on two CPU cores with 64, 19 with 32 and 27 with 128.
MIN_CHUNK = 64


def forward(q_BTNH, k_BSKH, v_BSKH, q_segment_ids, kv_segment_ids, initial_state, *, window, feature_map):
    """Returns (o_BTNH in q's dtype, state_BKPH in float32); arguments as `residual_linear_attention` checks them."""
    _, T, N, H = q_BTNH.shape
    _, S, K, _ = k_BSKH.shape
    has_documents = kv_segment_ids is not None
    lag = S - T - window  # query t reads the keys up to t + lag

    # The keys that the first query reads are one sum; slot t of the rest holds key t + lag, or zero where that is none.
    past, missing = max(lag, 0), min(max(-lag, 0), T)
    state_BKPH = _sum(k_BSKH, v_BSKH, kv_segment_ids, initial_state, count=past, feature_map=feature_map)
    C = min(max(H, MIN_CHUNK), T)
    n = -(-T // C)
    in_slots = slice(past, past + T - missing)
    chunks = {
        "q": _to_chunks(q_BTNH, n, C).reshape(n, -1, K, N // K, C, H),
        "k": _to_chunks(k_BSKH[:, in_slots], n, C, front=missing),
        "v": _to_chunks(v_BSKH[:, in_slots], n, C, front=missing),
    }
    if has_documents:
        # A slot without a key counts to the document of its neighbour, so that it resets nothing.
        newest = np.clip(np.arange(-1, n * C) + lag, 0, max(S - 1 - window, 0))
        newest_ids = kv_segment_ids[:, newest]
        chunks["q_ids"] = jnp.pad(q_segment_ids, ((0, 0), (0, n * C - T))).reshape(-1, n, C).swapaxes(0, 1)
        chunks["k_ids"] = newest_ids[:, 1:].reshape(-1, n, C).swapaxes(0, 1)
        chunks["state_id"] = newest_ids[:, :-1:C].swapaxes(0, 1)

    # The backward recomputes a chunk from its inputs and the state before it, which are all that it keeps.
    body = jax.checkpoint(functools.partial(_chunk, feature_map=feature_map), prevent_cse=False)
    state_BKPH, o_chunks = jax.lax.scan(body, state_BKPH, chunks)
    o_BTNH = jnp.transpose(o_chunks, (1, 0, 4, 2, 3, 5)).reshape(-1, n * C, N, H)[:, :T]
    if has_documents:
        state_BKPH = _keep(newest_ids[:, -1] == kv_segment_ids[:, -1], state_BKPH)
    return o_BTNH, state_BKPH


def state(k_BSKH, v_BSKH, kv_segment_ids, initial_state, *, window, feature_map):
    """Returns state_BKPH in float32: what a query at the last key position reads."""
    count = max(k_BSKH.shape[1] - window, 0)
    state_BKPH = _sum(k_BSKH, v_BSKH, kv_segment_ids, initial_state, count=count, feature_map=feature_map)
    if kv_segment_ids is None:
        return state_BKPH
    return _keep(kv_segment_ids[:, max(count - 1, 0)] == kv_segment_ids[:, -1], state_BKPH)


def _sum(k_BSKH, v_BSKH, ids, initial_state, *, count, feature_map):
    """Returns state_BKPH after the first `count` keys: that of the document of the last of them."""
    if initial_state is None:
        B, _, K, H = k_BSKH.shape
        initial_state = jnp.zeros_like(k_BSKH, shape=(B, K, feature_dim(feature_map, H), H), dtype=jnp.float32)
    if count == 0:
        return initial_state
    k_BSKH, v_BSKH = k_BSKH[:, :count], v_BSKH[:, :count]
    if ids is not None:
        in_last = ids[:, :count] == ids[:, count - 1 : count]
        v_BSKH = jnp.where(in_last[:, :, None, None], v_BSKH, 0)
        initial_state = _keep(in_last[:, 0], initial_state)

    @jax.checkpoint
    def product(k_BSKH, v_BSKH):
        return _dot("bskp,bskh->bkph", k_BSKH.dtype, features(feature_map, k_BSKH), v_BSKH)

    return initial_state + product(k_BSKH, v_BSKH)


def _chunk(state_BKPH, chunk, *, feature_map):
    """One step of the scan: the state before the chunk and the chunk to the state after it and the chunk's outputs."""
    q_BKGCH, k_BKCH, v_BKCH = chunk["q"], chunk["k"], chunk["v"]
    dtype, C = q_BKGCH.dtype, k_BKCH.shape[2]
    q_BKGCP = features(feature_map, q_BKGCH)
    k_BKCP = features(feature_map, k_BKCH)

    before = _dot("bkgtp,bkph->bkgth", dtype, q_BKGCP, state_BKPH)
    scores = _dot("bkgtp,bksp->bkgts", dtype, q_BKGCP, k_BKCP)
    mask = jnp.tri(C, dtype=bool)[None]
    if "k_ids" in chunk:
        q_ids, k_ids, state_id = chunk["q_ids"], chunk["k_ids"], chunk["state_id"]
        mask = mask & (q_ids[:, :, None] == k_ids[:, None, :])
        before = jnp.where((q_ids == state_id[:, None])[:, None, None, :, None], before, 0)
        state_BKPH = _keep(k_ids[:, -1] == state_id, state_BKPH)
        v_last = jnp.where((k_ids == k_ids[:, -1:])[:, None, :, None], v_BKCH, 0)
    else:
        v_last = v_BKCH
    scores = jnp.where(mask[:, None, None], scores, 0)
    o_BKGCH = before + _dot("bkgts,bksh->bkgth", dtype, scores, v_BKCH)
    state_BKPH = state_BKPH + _dot("bksp,bksh->bkph", dtype, k_BKCP, v_last)
    return state_BKPH, o_BKGCH.astype(dtype)


def _to_chunks(x, n, C, front=0):
    """[B, length, heads, H], after `front` zeros and with zeros at the end, to [n, B, heads, C, H]."""
    B, length, heads, H = x.shape
    x = jnp.pad(x, ((0, 0), (front, n * C - front - length), (0, 0), (0, 0)))
    return jnp.transpose(x.reshape(B, n, C, heads, H), (1, 0, 3, 2, 4))


def _keep(keep_B, state_BKPH):
    return jnp.where(keep_B[:, None, None, None], state_BKPH, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dot(equation, dtype, a, b):
    """Einsum of operands rounded to `dtype` that adds up in float32; float32 operands are multiplied in full precision.

    It has a derivative of its own, because JAX's multiplies the float32 cotangent as it is, which leaves the fast
    bfloat16 units of an accelerator idle. Every index of `equation` stands in two of its three terms.
    """
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def _dot_forward(equation, dtype, a, b):
    return _dot(equation, dtype, a, b), (a, b)


def _dot_backward(equation, dtype, operands, cotangent):
    a, b = operands
    a_dims, b_dims, out_dims = equation.replace("->", ",").split(",")
    da = _dot(f"{out_dims},{b_dims}->{a_dims}", dtype, cotangent, b)
    db = _dot(f"{a_dims},{out_dims}->{b_dims}", dtype, a, cotangent)
    return da.astype(a.dtype), db.astype(b.dtype)


_dot.defvjp(_dot_forward, _dot_backward)
