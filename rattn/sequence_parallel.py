"""Attention over rows whose tokens are cut over a mesh axis, exact for packed documents.

Everything here runs inside `shard_map`: a device holds T consecutive tokens of each of its rows. Keys that its queries
need stand to the left:

- window: a halo of the W keys before the shard, handed on from device to device, over several when W is longer than T;
- residual linear: the same halo, and one P × H sum of all that is older, from every device's own sum;
- full: all keys, gathered, those of the future hidden.

Only the last of these sends more when rows grow longer. What a shard must not see carries a document id that no query
has.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.residual_linear_attention import residual_linear_state
from rattn.attention import Attention

HIDDEN_ID = jnp.iinfo(jnp.int32).min


def softmax_attention_over(axis: str, attention: Attention) -> Attention:
    """Wraps one device's softmax attention for tokens that are cut over `axis`; same signature."""

    def attend(
        q_BTNH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        *,
        window: int | None,
        q_segment_ids: jax.Array,
        kv_segment_ids: jax.Array,
    ) -> jax.Array:
        if window is None:
            k_BSKH, v_BSKH = _gather(k_BTKH, axis), _gather(v_BTKH, axis)
            ids_BS = _gathered_ids(kv_segment_ids, axis)
        else:
            # W - 1 keys would do. W fill whole blocks more often, and the linear branch asks for the same halo of v.
            length = _halo_length(k_BTKH, window, axis)
            k_BSKH, v_BSKH = (_with_halo(x, length, axis) for x in (k_BTKH, v_BTKH))
            ids_BS = _ids_with_halo(kv_segment_ids, length, axis)
        return attention(q_BTNH, k_BSKH, v_BSKH, window=window, q_segment_ids=q_segment_ids, kv_segment_ids=ids_BS)

    return attend


def linear_attention_over(axis: str, attention: Attention) -> Attention:
    """Wraps one device's residual linear attention for tokens that are cut over `axis`; same signature."""

    def attend(
        q_BTNH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        *,
        window: int,
        feature_map: str,
        q_segment_ids: jax.Array,
        kv_segment_ids: jax.Array,
    ) -> jax.Array:
        T = k_BTKH.shape[1]
        length = _halo_length(k_BTKH, window, axis)
        k_BSKH, v_BSKH = (_with_halo(x, length, axis) for x in (k_BTKH, v_BTKH))
        ids_BS = _ids_with_halo(kv_segment_ids, length, axis)
        older = None
        if length < (jax.lax.axis_size(axis) - 1) * T:
            # The first T of these keys, on all devices, cover the row without gap or overlap, shifted left by the
            # halo: what a device's halo does not reach is covered by the devices to its left.
            own = residual_linear_state(
                k_BSKH[:, :T], v_BSKH[:, :T], window=0, feature_map=feature_map, kv_segment_ids=ids_BS[:, :T]
            )
            older = _state_before(own, first_id_B=ids_BS[:, 0], last_id_B=ids_BS[:, T - 1], axis=axis)
        return attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            window=window,
            feature_map=feature_map,
            q_segment_ids=q_segment_ids,
            kv_segment_ids=ids_BS,
            initial_state=older,
        )

    return attend


def _state_before(own_BKPH: jax.Array, *, first_id_B: jax.Array, last_id_B: jax.Array, axis: str) -> jax.Array:
    """Sums the states of the devices to the left over the document that this device's keys begin with.

    A document is one unbroken run with an id of its own, so the keys of a device to the left reach into ours exactly if
    the last of them has our first id; a boundary in between drops everything older.

    Args:
      own_BKPH: this device's sum over the document of its last key.
      first_id_B: document of its first key.
      last_id_B: document of its last key.
      axis: mesh axis.
    """
    states_DBKPH = jax.lax.all_gather(own_BKPH, axis)
    ids_DB = jax.lax.all_gather(last_id_B, axis)
    left_D = jnp.arange(jax.lax.axis_size(axis)) < jax.lax.axis_index(axis)
    reaches_DB = left_D[:, None] & (ids_DB == first_id_B[None])
    return jnp.where(reaches_DB[..., None, None, None], states_DBKPH, 0).sum(0)


def _halo_length(k_BTKH: jax.Array, window: int, axis: str) -> int:
    """W, or all tokens before the last device's where these are fewer."""
    return min(window, (jax.lax.axis_size(axis) - 1) * k_BTKH.shape[1])


def _with_halo(x_BT: jax.Array, length: int, axis: str) -> jax.Array:
    """Puts the `length` tokens before the shard ([B, T, ...]) in front of it; before the row stand zeros."""
    to_the_right = [(i, i + 1) for i in range(jax.lax.axis_size(axis) - 1)]
    pieces, passing = [x_BT], x_BT
    while length > 0:
        # Each device hands on what it got, so that no token crosses a link twice.
        passing = jax.lax.ppermute(passing[:, -min(length, passing.shape[1]) :], axis, to_the_right)
        pieces.insert(0, passing)
        length -= passing.shape[1]
    return jnp.concatenate(pieces, axis=1)


def _ids_with_halo(ids_BT: jax.Array, length: int, axis: str) -> jax.Array:
    """`_with_halo` of document ids; what lies before the row is hidden."""
    ids_BS = _with_halo(ids_BT, length, axis)
    position_S = jax.lax.axis_index(axis) * ids_BT.shape[1] - length + jnp.arange(ids_BS.shape[1])
    return jnp.where(position_S[None] < 0, HIDDEN_ID, ids_BS)


def _gather(x_BT: jax.Array, axis: str) -> jax.Array:
    """Gathers the whole row ([B, S, ...]), rotated so that this device's tokens stand last."""
    x_BS = jax.lax.all_gather(x_BT, axis, axis=1, tiled=True)
    return jnp.roll(x_BS, -(jax.lax.axis_index(axis) + 1) * x_BT.shape[1], axis=1)


def _gathered_ids(ids_BT: jax.Array, axis: str) -> jax.Array:
    """`_gather` of document ids; the future, which rotation puts in front, is hidden."""
    ids_BS = _gather(ids_BT, axis)
    T, S = ids_BT.shape[1], ids_BS.shape[1]
    future_S = jnp.arange(S) < S - (jax.lax.axis_index(axis) + 1) * T
    return jnp.where(future_S[None], HIDDEN_ID, ids_BS)
