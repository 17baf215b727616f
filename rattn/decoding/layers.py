"""What a layer is when it decodes: its description, its weights, and the arithmetic beside attention."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kernels_pallas.normed_sum.plain import forward as plain_normed_sum
from rattn.model.layers import ACTIVATIONS, rms_norm
from rattn.sharding import Sharding

Tree = Any
Weights = Mapping[str, jax.Array]

# Columns of the gate, and then as many of up, that lie beside each other for kernels: what a Hopper's tensor cores tell
# apart.
GATE_COLUMNS = 8
# Logical dims of a layer's weights. A key/value head's G query projections, its key's and its value's stand together
# (A = G + 2), and so do gate and up: one matrix product each, which no number of devices along `model` cuts wrongly.
# What is summed over is one dim (E = K·G·H): XLA would transpose a weight with several of them in every step.
LAYER_DIMS = {
    "qkv_DKAH": ("embed", "kv_heads", None, "head_dim"),
    "out_ED": ("heads", "embed"),
    "gate_up_DCF": ("embed", None, "mlp"),
    "down_FD": ("mlp", "embed"),
    # The same as `products_gpu` and `products_persistent_gpu` take them: what is summed over last, J tiles of gate and
    # up beside each other, norms' scales in them.
    "qkv_KAHD": ("kv_heads", None, "head_dim", "embed"),
    "out_DE": ("embed", "heads"),
    "gate_up_JCFD": ("mlp", None, None, "embed"),
    "down_DF": ("embed", "mlp"),
    "softmax_norm_KGH": ("kv_heads", None, "head_dim"),
    "linear_norm_KGH": ("kv_heads", None, "head_dim"),
    "q_norm_H": ("head_dim",),
    "k_norm_H": ("head_dim",),
    "mixer_norm_D": ("embed",),
    "mlp_norm_D": ("embed",),
}
EQUATIONS = {
    "qkv_DKAH": "...d,dkah->...kah",
    "qkv_KAHD": "...d,kahd->...kah",
    "out_ED": "...e,ed->...d",
    "out_DE": "...e,de->...d",
    "gate_up_DCF": "...d,dcf->...cf",
    "gate_up_JCFD": "...d,jcfd->...jcf",
    "down_FD": "...f,fd->...d",
    "down_DF": "...f,df->...d",
}
MODEL_DIMS = {"embedding_VD": ("vocab", "embed"), "unembedding_VD": ("vocab", "embed"), "final_norm_D": ("embed",)}


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What tells one layer's computation from another's; the fields are the config's.

    Attributes:
      kind: the mixer.
      window: W; 0 for a linear layer. No other kind than swa and rattention reads it.
      rope_theta: None without rotary positions.
    """

    kind: str
    window: int
    rope_theta: float | None
    query_heads: int
    kv_heads: int
    head_dim: int
    feature_map: str
    qk_norm: bool
    feature_map_after_qk_norm: bool
    norm_epsilon: float
    activation: str

    @property
    def has_softmax(self) -> bool:
        """Whether there is a softmax branch."""
        return self.kind != "linear"

    @property
    def has_linear(self) -> bool:
        """Whether there is a linear branch, and so a state."""
        return self.kind in ("rattention", "linear")

    @property
    def group(self) -> int:
        """G, the query heads of a key/value head."""
        return self.query_heads // self.kv_heads


def layer_specs(model: ConfigDict) -> tuple[LayerSpec, ...]:
    """Describes every layer of `config.model`."""
    specs = []
    for index in range(model.layers):
        place = index % len(model.pattern)
        kind = model.pattern[place]
        specs.append(
            LayerSpec(
                kind=kind,
                window=0 if kind == "linear" else model.window,
                rope_theta=model.rope_theta if model.rope_pattern[place] else None,
                query_heads=model.query_heads,
                kv_heads=model.kv_heads,
                head_dim=model.head_dim,
                feature_map=model.feature_map,
                qk_norm=model.qk_norm,
                feature_map_after_qk_norm=model.feature_map_after_qk_norm,
                norm_epsilon=model.norm_epsilon,
                activation=model.activation,
            )
        )
    return tuple(specs)


def product_shapes(model: ConfigDict) -> dict[str, tuple[int, int]]:
    """Columns and length of sum of a layer's weight products, by the names of `rattn.decoding.products_gpu`."""
    heads = model.query_heads * model.head_dim
    return {
        "qkv": (heads + 2 * model.kv_heads * model.head_dim, model.width),
        "out": (model.width, heads),
        "gate_up": (model.mlp_width, model.width),
        "down": (model.width, model.mlp_width),
    }


def decoding_weights(
    model: ConfigDict, parameters: Tree, sharding: Sharding, for_kernels: bool = False
) -> dict[str, Any]:
    """Lays training's parameters out for decoding: one tree a layer, matrices in the compute dtype, norms in float32.

    Args:
      model: `config.model`.
      parameters: as `ModelSpec.shapes`, of any float dtype; they are not changed.
      sharding: where the result goes.
      for_kernels: whether they lie as `rattn.decoding.products_gpu` and `products_persistent_gpu` take them.

    Returns:
      {"model": …, "layers": (…)}, with the names and dims of `MODEL_DIMS` and `LAYER_DIMS`.
    """
    dtype = jnp.dtype(model.compute_dtype)

    def placed(convert: Callable[..., Weights], dims: dict[str, tuple], tree: Tree, *index: Any) -> Weights:
        shardings = {name: sharding.named(*dims[name]) for name in jax.eval_shape(convert, tree, *index)}
        return jax.jit(convert, out_shardings=shardings)(tree, *index)

    def of_repeat(tree: Tree, repeat: jax.Array) -> Weights:
        return of_layer(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, repeat, keepdims=False), tree))

    def of_layer(tree: Tree) -> Weights:
        return _layer_weights(model, tree, dtype, for_kernels)

    layers = []
    for index in range(model.layers):
        repeat, place = divmod(index, len(model.pattern))
        if repeat < model.layers // len(model.pattern):
            stacked = parameters["blocks"]["layers"][place]
            layers.append(placed(of_repeat, LAYER_DIMS, stacked, np.int32(repeat)))
        else:
            layers.append(placed(of_layer, LAYER_DIMS, parameters["remainder"][place]))
    top = {name: tree for name, tree in parameters.items() if name not in ("blocks", "remainder")}
    return {"model": placed(functools.partial(_model_weights, dtype), MODEL_DIMS, top), "layers": tuple(layers)}


def _model_weights(dtype: jnp.dtype, tree: Tree) -> dict[str, jax.Array]:
    weights = {
        "embedding_VD": tree["embedding_VD"].astype(dtype),
        "final_norm_D": tree["final_norm"]["scale"].astype(jnp.float32),
    }
    if "unembedding_DV" in tree:
        weights["unembedding_VD"] = tree["unembedding_DV"].T.astype(dtype)
    return weights


def _layer_weights(model: ConfigDict, tree: Tree, dtype: jnp.dtype, for_kernels: bool) -> dict[str, jax.Array]:
    mixer, mlp = tree["mixer"], tree["mlp"]
    D, K, H = mixer["k_DKH"].shape
    G = model.query_heads // K
    q_DKGH = mixer["q_DNH"].reshape(D, K, G, H)
    weights = {
        "qkv_DKAH": jnp.concatenate([q_DKGH, mixer["k_DKH"][:, :, None], mixer["v_DKH"][:, :, None]], axis=2),
        "out_ED": mixer["out_NHD"].reshape(-1, D),
        "gate_up_DCF": jnp.stack([mlp["gate_DF"], mlp["up_DF"]], axis=1),
        "down_FD": mlp["down_FD"],
    }
    norms = {"mixer_norm_D": tree["mixer_norm"]["scale"], "mlp_norm_D": tree["mlp_norm"]["scale"]}
    if for_kernels:
        weights, norms = _for_kernels(weights, norms), {}
    for name in ("q_norm", "k_norm"):
        if name in mixer:
            norms[f"{name}_H"] = mixer[name]["scale"]
    for name in ("softmax_norm", "linear_norm"):
        if name in mixer:
            norms[f"{name}_KGH"] = mixer[name]["scale"].reshape(K, G, H)
    return {name: x.astype(dtype) for name, x in weights.items()} | {
        name: x.astype(jnp.float32) for name, x in norms.items()
    }


def _for_kernels(weights: Weights, norms: Weights) -> dict[str, jax.Array]:
    """Multiplies the scales of the norms into the weights after them, and puts what is summed over last."""
    qkv_DKAH, gate_up_DCF = (weights[name].astype(jnp.float32) for name in ("qkv_DKAH", "gate_up_DCF"))
    mixer_D, mlp_D = (norms[name].astype(jnp.float32) for name in ("mixer_norm_D", "mlp_norm_D"))
    D, C, _ = gate_up_DCF.shape
    gate_up_DCJF = (gate_up_DCF * mlp_D[:, None, None]).reshape(D, C, -1, GATE_COLUMNS)
    return {
        "qkv_KAHD": jnp.moveaxis(qkv_DKAH * mixer_D[:, None, None, None], 0, -1),
        "out_DE": weights["out_ED"].T,
        "gate_up_JCFD": jnp.transpose(gate_up_DCJF, (2, 1, 3, 0)),
        "down_DF": weights["down_FD"].T,
    }


def _normed(layer: LayerSpec, weights: Weights, name: str, x: jax.Array) -> jax.Array:
    """Norms x [..., D]; without a scale where the weights after it have it."""
    scale = weights[name] if name in weights else jnp.ones(x.shape[-1], jnp.float32)
    return rms_norm(x, scale, layer.norm_epsilon)


def _times(x: jax.Array, weights: Weights, *names: str) -> jax.Array:
    """Multiplies by the weight, which lies in one of two ways."""
    (name,) = (name for name in names if name in weights)
    return jnp.einsum(EQUATIONS[name], x, weights[name])


def projection_weights(weights: Weights) -> Weights:
    """Returns those of a layer's weights that `project` takes; they are alike in all layers of a model."""
    return {name: weights[name] for name in ("mixer_norm_D", "qkv_DKAH", "qkv_KAHD") if name in weights}


def project(layer: LayerSpec, weights: Weights, x: jax.Array) -> jax.Array:
    """Norms and projects the residual stream [..., D] to qkv [..., K, A, H]."""
    return _times(_normed(layer, weights, "mixer_norm_D", x), weights, "qkv_DKAH", "qkv_KAHD")


def split(layer: LayerSpec, qkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Splits qkv [..., K, A, H] into q [..., K, G, H] and k, v [..., K, H]."""
    return qkv[..., : layer.group, :], qkv[..., layer.group, :], qkv[..., layer.group + 1, :]


def softmax_query(layer: LayerSpec, weights: Weights, q: jax.Array) -> jax.Array:
    """Norms a projected q for the softmax branch; positions come later."""
    return rms_norm(q, weights["q_norm_H"], layer.norm_epsilon) if layer.qk_norm else q


def softmax_key(layer: LayerSpec, weights: Weights, k: jax.Array) -> jax.Array:
    """Norms a projected k for the softmax branch; positions come later."""
    return rms_norm(k, weights["k_norm_H"], layer.norm_epsilon) if layer.qk_norm else k


def linear_query(layer: LayerSpec, weights: Weights, q: jax.Array) -> jax.Array:
    """Returns a projected q as φ takes it."""
    return softmax_query(layer, weights, q) if layer.feature_map_after_qk_norm else q


def linear_key(layer: LayerSpec, weights: Weights, k: jax.Array) -> jax.Array:
    """Returns a projected k as φ takes it."""
    return softmax_key(layer, weights, k) if layer.feature_map_after_qk_norm else k


def mixed(layer: LayerSpec, weights: Weights, softmax: jax.Array | None, linear: jax.Array | None) -> jax.Array:
    """Makes one o [..., E] of what the branches [..., K, G, H] say."""
    if linear is None:
        o = softmax
    elif softmax is None:
        o = rms_norm(linear, weights["linear_norm_KGH"], layer.norm_epsilon)
    else:
        scales = weights["softmax_norm_KGH"], weights["linear_norm_KGH"]
        o = plain_normed_sum(softmax, linear, *scales, epsilon=layer.norm_epsilon)
    return o.reshape(*o.shape[:-3], -1)


def finish(layer: LayerSpec, weights: Weights, x: jax.Array, o: jax.Array) -> jax.Array:
    """Adds to x [..., D] what attention says, o [..., E], and then the feed-forward."""
    x = x + _times(o, weights, "out_ED", "out_DE")
    h = _normed(layer, weights, "mlp_norm_D", x)
    gate_up = _times(h, weights, "gate_up_DCF", "gate_up_JCFD")
    hidden = ACTIVATIONS[layer.activation](gate_up[..., 0, :]) * gate_up[..., 1, :]
    return x + _times(hidden.reshape(*x.shape[:-1], -1), weights, "down_FD", "down_DF")


def embed(weights: Weights, tokens: jax.Array) -> jax.Array:
    """Returns the residual stream [..., D] of int32 tokens."""
    table_VD = weights["embedding_VD"]
    return table_VD[tokens] * jnp.asarray(table_VD.shape[1] ** 0.5, table_VD.dtype)


def logits(model: ConfigDict, weights: Weights, x: jax.Array) -> jax.Array:
    """Returns float32 logits [..., V] of the residual stream that left the last layer."""
    x = rms_norm(x, weights["final_norm_D"], model.norm_epsilon)
    table_VD = weights.get("unembedding_VD", weights["embedding_VD"])
    out = jnp.einsum("...d,vd->...v", x, table_VD, preferred_element_type=jnp.float32)
    return model.logits_soft_cap * jnp.tanh(out / model.logits_soft_cap) if model.logits_soft_cap else out
