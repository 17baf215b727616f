"""Prefill: a chunk of tokens of every sequence through the training kernels, after what the cache already holds.

The chunk's tokens stand at its end, so that sequences of different lengths end together; in front of them is padding.
Each layer joins the keys that it kept with those of the chunk, so that a sequence's keys follow one another without a
gap up to the last slot, as the kernels want keys with history. What is in front of them belongs to no document and has
values of zero: a linear branch has no denominator, so that zero adds exactly nothing to a state.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rattn.decoding.cache import CacheLayout, Clock, LayerCache, fold, known_ages, slots_of_age
from rattn.decoding.layers import (
    LayerSpec,
    Weights,
    finish,
    linear_key,
    linear_query,
    mixed,
    project,
    softmax_key,
    softmax_query,
    split,
)
from rattn.model.layers import rope
from rattn.model.operators import Operators
from rattn.sequence_parallel import HIDDEN_ID


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """Where a chunk's tokens stand; T tokens, of which a sequence's own are the last.

    Attributes:
      before: the clock before the chunk.
      after: the clock after it.
      segments_BT: int32, document of each token; that of the sequence's history where there is padding.
    """

    before: Clock
    after: Clock
    segments_BT: jax.Array


def begin_chunk(clock: Clock, counts_B: jax.Array, segments_BT: jax.Array | None, T: int) -> Chunk:
    """Places a chunk of T tokens after the sequences of a batch.

    Args:
      clock: where they stand.
      counts_B: int32, how many of the chunk's last tokens are a sequence's own.
      segments_BT: int32, documents of the tokens; None: the sequences' documents go on.
      T: the chunk's length.
    """
    own_BT = jnp.arange(T, dtype=jnp.int32)[None] >= (T - counts_B)[:, None]
    if segments_BT is None:
        segments_BT = jnp.broadcast_to(clock.segment_B[:, None], own_BT.shape)
    segments_BT = jnp.where(own_BT, segments_BT, clock.segment_B[:, None])
    last_B = segments_BT[:, -1]
    length_B = clock.length_B + counts_B
    newest_B = (own_BT & (segments_BT == last_B[:, None])).sum(axis=1, dtype=jnp.int32)
    goes_on_B = (last_B == clock.segment_B) & (clock.length_B > 0)
    after = Clock(
        length_B=length_B,
        start_B=jnp.where(goes_on_B, clock.start_B, length_B - newest_B),
        segment_B=last_B,
        steps=jnp.zeros_like(clock.steps),
        unfolded=jnp.zeros_like(clock.unfolded),
    )
    return Chunk(clock, after, segments_BT)


def prefill_layer(
    layer: LayerSpec,
    layout: CacheLayout,
    operators: Operators,
    history: int,
    weights: Weights,
    cache: LayerCache,
    chunk: Chunk,
    x_BTD: jax.Array,
) -> tuple[jax.Array, LayerCache]:
    """Runs a chunk through one layer; returns its x_BTD and cache.

    Args:
      layer: which.
      layout: of the cache.
      operators: training's attention.
      history: slots that a full layer reads: as many as any sequence has tokens in the cache, or more. Other layers
        read their whole ring.
      weights: the layer's.
      cache: the layer's.
      chunk: where the tokens stand.
      x_BTD: the residual stream.
    """
    q_BTKGH, k_BTKH, v_BTKH = split(layer, project(layer, weights, x_BTD))
    keys = _Keys(chunk, *_kept(layer, layout, cache, chunk.before, history), x_BTD.shape[1])
    if not layer.has_linear:
        k_BTKH = _positioned(layer, softmax_key(layer, weights, k_BTKH), keys.positions_BT)
    k_BSKH, v_BSKH = keys.join(keys.k_BWKH, k_BTKH), keys.join(keys.v_BWKH, v_BTKH)
    softmax = linear = None
    cache = dict(cache)
    if layer.has_softmax:
        k = k_BSKH
        if layer.has_linear:
            k = _positioned(layer, softmax_key(layer, weights, k_BSKH), keys.positions_BS)
        q = _positioned(layer, _heads(softmax_query(layer, weights, q_BTKGH)), keys.positions_BT)
        softmax = _softmax(layer, operators, q, k, v_BSKH, keys.ids_BS).reshape(q_BTKGH.shape)
    if layer.has_linear:
        caught_up = fold(layer, layout, weights, cache, chunk.before).astype(jnp.float32)
        # Where no key was kept, the first key is the chunk's, and may begin another document.
        goes_on_B = keys.linear_ids_BS[:, 0] == chunk.before.segment_B
        caught_up = jnp.where(goes_on_B[:, None, None, None], caught_up, 0)
        linear, state_BKPH = operators.linear_attention(
            _heads(linear_query(layer, weights, q_BTKGH)),
            linear_key(layer, weights, k_BSKH),
            v_BSKH,
            window=layout.kept_window(layer),
            feature_map=layer.feature_map,
            q_segment_ids=keys.linear_ids_BS[:, -x_BTD.shape[1] :],
            kv_segment_ids=keys.linear_ids_BS,
            initial_state=caught_up,
            return_state=True,
        )
        linear = linear.reshape(q_BTKGH.shape)
        cache["state_BKPH"] = state_BKPH.astype(cache["state_BKPH"].dtype)
    for name, chunk_BTKH, joined_BSKH in (("k_BKSH", k_BTKH, k_BSKH), ("v_BKSH", v_BTKH, v_BSKH)):
        if layer.kind == "full":
            cache[name] = _write(cache[name], chunk_BTKH, keys.slots_BT)
        else:
            cache[name] = _laid_out(cache[name], joined_BSKH, layout.kept_window(layer))
    return finish(layer, weights, x_BTD, mixed(layer, weights, softmax, linear)), cache


def _kept(
    layer: LayerSpec, layout: CacheLayout, cache: LayerCache, clock: Clock, history: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns k_BWKH and v_BWKH that a layer kept, oldest first, and int32 [B], the position of the first."""
    if layer.kind == "full":
        k, v = (jnp.swapaxes(cache[name][:, :, :history], 1, 2) for name in ("k_BKSH", "v_BKSH"))
        return k, v, jnp.zeros_like(clock.length_B)
    W = layout.kept_window(layer)
    ages = jnp.arange(W - 1, -1, -1, dtype=jnp.int32)
    slots = slots_of_age(ages, clock.steps, layout.slots(layer))
    valid_BW = known_ages(clock, ages)[:, :, None, None]
    k, v = (
        jnp.where(valid_BW, jnp.swapaxes(jnp.take(cache[name], slots, axis=2), 1, 2), 0)
        for name in ("k_BKSH", "v_BKSH")
    )
    return k, v, clock.length_B - W


class _Keys:
    """The keys that a layer kept and those of a chunk, side by side: slot S − 1 is the newest token's."""

    def __init__(self, chunk: Chunk, k_BWKH: jax.Array, v_BWKH: jax.Array, first_B: jax.Array, T: int):
        """Takes what `_kept` returned for the clock before the chunk."""
        self.k_BWKH, self.v_BWKH = k_BWKH, v_BWKH
        before, after, W = chunk.before, chunk.after, k_BWKH.shape[1]
        S = W + T
        positions_BS = after.length_B[:, None] + jnp.arange(-S, 0, dtype=jnp.int32)[None]
        self._kept_BS = (positions_BS >= jnp.maximum(first_B, before.start_B)[:, None]) & (
            positions_BS < before.length_B[:, None]
        )
        self._own_BS = (positions_BS >= before.length_B[:, None]) & (positions_BS >= 0)
        self._place_BS = jnp.clip(positions_BS - first_B[:, None], 0, max(W - 1, 0))
        ids_BS = jnp.pad(chunk.segments_BT, ((0, 0), (W, 0)))
        # The state that came from the cache belongs to the document of the first key.
        self.linear_ids_BS = jnp.where(self._own_BS, ids_BS, before.segment_B[:, None])
        self.ids_BS = jnp.where(self._own_BS | self._kept_BS, self.linear_ids_BS, HIDDEN_ID)
        self.positions_BS = jnp.maximum(positions_BS, 0)
        self.positions_BT = self.positions_BS[:, W:]
        # Padding is written past the end of the cache, which drops it.
        self.slots_BT = jnp.where(self._own_BS[:, W:], self.positions_BT, jnp.iinfo(jnp.int32).max)

    def join(self, kept_BWKH: jax.Array, chunk_BTKH: jax.Array) -> jax.Array:
        """Returns [B, S, K, H]; slots that belong to no token are zero."""
        W = kept_BWKH.shape[1]
        own = jnp.where(self._own_BS[:, :, None, None], jnp.pad(chunk_BTKH, ((0, 0), (W, 0), (0, 0), (0, 0))), 0)
        if not W:
            return own
        moved = jnp.take_along_axis(kept_BWKH, self._place_BS[:, :, None, None], axis=1)
        return jnp.where(self._kept_BS[:, :, None, None], moved, own)


def _positioned(layer: LayerSpec, x: jax.Array, positions: jax.Array) -> jax.Array:
    return x if layer.rope_theta is None else rope(x, positions, layer.rope_theta)


def _heads(q_BTKGH: jax.Array) -> jax.Array:
    B, T, K, G, H = q_BTKGH.shape
    return q_BTKGH.reshape(B, T, K * G, H)


def _softmax(
    layer: LayerSpec, operators: Operators, q: jax.Array, k: jax.Array, v: jax.Array, ids_BS: jax.Array
) -> jax.Array:
    if layer.kind != "full" and layer.window == 0:
        return jnp.zeros_like(q)
    window = None if layer.kind == "full" else layer.window
    # A query of the padding has the id of the key beside it, for a row of scores that sees nothing has no softmax.
    return operators.softmax_attention(
        q, k, v, window=window, q_segment_ids=ids_BS[:, -q.shape[1] :], kv_segment_ids=ids_BS
    )


def _write(kept_BKSH: jax.Array, chunk_BTKH: jax.Array, slots_BT: jax.Array) -> jax.Array:
    def row(kept_KSH: jax.Array, chunk_TKH: jax.Array, slots_T: jax.Array) -> jax.Array:
        return kept_KSH.at[:, slots_T].set(jnp.swapaxes(chunk_TKH, 0, 1), mode="drop")

    return jax.vmap(row)(kept_BKSH, chunk_BTKH, slots_BT)


def _laid_out(kept_BKSH: jax.Array, joined_BSKH: jax.Array, window: int) -> jax.Array:
    """Returns a ring whose last `window` slots hold the newest keys, oldest first."""
    if not window:
        return kept_BKSH
    newest = jnp.swapaxes(joined_BSKH[:, -window:], 1, 2)
    return jax.lax.dynamic_update_slice(kept_BKSH, newest, (0, 0, kept_BKSH.shape[2] - window, 0))
