"""The token mixer: one set of projections for full, window, linear and residual linear attention."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

from rattn.model.layers import RMSNorm, matrix_init, residual_gain, rope
from rattn.model.operators import Operators
from rattn.model.remat import OPERAND


class Mixer(nnx.Module):
    """Grouped-query attention whose output is a softmax branch, a linear branch, or RATTENTION's merge of both.

    | kind | softmax branch | linear branch |
    |---|---|---|
    | full | every earlier token | – |
    | swa | the newest `window` tokens | – |
    | rattention | the newest `window` tokens | everything older |
    | linear | – | every earlier token |

    With a linear branch, o = RMSNorm(o_softmax) + RMSNorm(o_linear), each with a scale per query head and dim; the two
    norms are all that `kind` adds to the weights. Nothing depends on the window. (arXiv 2506.15545, section 3.)
    """

    def __init__(self, model: ConfigDict, kind: str, use_rope: bool, operators: Operators, *, rngs: nnx.Rngs):
        D, N, K, H = model.width, model.query_heads, model.kv_heads, model.head_dim
        inward = matrix_init(D)
        self.q_DNH = nnx.Param(inward(rngs.params(), (D, N, H), jnp.float32), logical=("embed", "heads", "head_dim"))
        self.k_DKH = nnx.Param(inward(rngs.params(), (D, K, H), jnp.float32), logical=("embed", "kv_heads", "head_dim"))
        self.v_DKH = nnx.Param(inward(rngs.params(), (D, K, H), jnp.float32), logical=("embed", "kv_heads", "head_dim"))
        outward = matrix_init(N * H, residual_gain(model.layers))
        self.out_NHD = nnx.Param(outward(rngs.params(), (N, H, D), jnp.float32), logical=("heads", "head_dim", "embed"))
        if model.qk_norm:
            self.q_norm = RMSNorm((H,), ("head_dim",), model.norm_epsilon)
            self.k_norm = RMSNorm((H,), ("head_dim",), model.norm_epsilon)
        self.has_softmax = kind != "linear"
        self.has_linear = kind in ("rattention", "linear")
        if self.has_softmax and self.has_linear:
            self.softmax_norm = RMSNorm((N, H), ("heads", "head_dim"), model.norm_epsilon)
        if self.has_linear:
            self.linear_norm = RMSNorm((N, H), ("heads", "head_dim"), model.norm_epsilon)
        self.softmax_window = None if kind == "full" else model.window
        self.linear_window = 0 if kind == "linear" else model.window
        self.feature_map = model.feature_map
        self.feature_map_after_qk_norm = model.feature_map_after_qk_norm
        self.qk_norm = model.qk_norm
        self.rope_theta = model.rope_theta if use_rope else None
        self.operators = operators

    def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
        """Returns [B, T, D] in x's dtype; tokens see only their own document."""
        return self.merge(*self.branches(x_BTD, segment_ids_BT))

    def branches(self, x_BTD: jax.Array, segment_ids_BT: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
        """Returns the softmax and the linear o_BTNH before their norms; None for the branch that `kind` has not."""
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD)
        softmax_BTNH = linear_BTNH = None
        q_normed, k_normed = (self.q_norm(q_BTNH), self.k_norm(k_BTKH)) if self.qk_norm else (q_BTNH, k_BTKH)
        segments = {"q_segment_ids": segment_ids_BT, "kv_segment_ids": segment_ids_BT}
        if self.has_softmax:
            q, k = q_normed, k_normed
            if self.rope_theta is not None:
                positions = jnp.arange(x_BTD.shape[1])
                q, k = rope(q, positions, self.rope_theta), rope(k, positions, self.rope_theta)
            q, k = checkpoint_name(q, OPERAND), checkpoint_name(k, OPERAND)
            softmax_BTNH = self._softmax(q, k, v_BTKH, segments)
        if self.has_linear:
            q, k = (q_normed, k_normed) if self.feature_map_after_qk_norm else (q_BTNH, k_BTKH)
            linear_BTNH = self.operators.linear_attention(
                q, k, v_BTKH, window=self.linear_window, feature_map=self.feature_map, **segments
            )
        return softmax_BTNH, linear_BTNH

    def merge(self, softmax_BTNH: jax.Array | None, linear_BTNH: jax.Array | None) -> jax.Array:
        """Returns [B, T, D] from what `branches` returned: each branch normed where `kind` says so, then projected."""
        if linear_BTNH is None:
            o_BTNH = softmax_BTNH
        elif softmax_BTNH is None:
            o_BTNH = self.linear_norm(linear_BTNH)
        else:
            scales_NH = self.softmax_norm.scale[...], self.linear_norm.scale[...]
            o_BTNH = self.operators.normed_sum(softmax_BTNH, linear_BTNH, *scales_NH, epsilon=self.linear_norm.epsilon)
        o_BTNH = checkpoint_name(o_BTNH, OPERAND)
        return jnp.einsum("btnh,nhd->btd", o_BTNH, self.out_NHD[...].astype(o_BTNH.dtype))

    def _project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        dtype, constrain = x_BTD.dtype, self.operators.constrain
        q_BTNH = jnp.einsum("btd,dnh->btnh", x_BTD, self.q_DNH[...].astype(dtype))
        k_BTKH = jnp.einsum("btd,dkh->btkh", x_BTD, self.k_DKH[...].astype(dtype))
        v_BTKH = jnp.einsum("btd,dkh->btkh", x_BTD, self.v_DKH[...].astype(dtype))
        return (
            constrain(q_BTNH, "batch", "length", "heads", "head_dim"),
            constrain(k_BTKH, "batch", "length", "kv_heads", "head_dim"),
            constrain(v_BTKH, "batch", "length", "kv_heads", "head_dim"),
        )

    def _softmax(self, q: jax.Array, k: jax.Array, v: jax.Array, segments: dict) -> jax.Array:
        # A window of 0 leaves the softmax branch nothing to see.
        if self.softmax_window == 0:
            return jnp.zeros_like(q)
        return self.operators.softmax_attention(q, k, v, window=self.softmax_window, **segments)
