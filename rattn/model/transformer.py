"""The decoder: embedding, repeated blocks scanned over depth, the layers that remain, the unembedding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

from rattn.model.layers import GatedMLP, RMSNorm, float32_product, look_up, matrix_init
from rattn.model.mixer import Mixer
from rattn.model.operators import Operators
from rattn.model.remat import OPERAND, rematerialised


class Layer(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, model: ConfigDict, kind: str, use_rope: bool, operators: Operators, *, rngs: nnx.Rngs):
        self.mixer_norm = RMSNorm((model.width,), ("embed",), model.norm_epsilon)
        self.mixer = Mixer(model, kind, use_rope, operators, rngs=rngs)
        self.mlp_norm = RMSNorm((model.width,), ("embed",), model.norm_epsilon)
        self.mlp = GatedMLP(model.width, model.mlp_width, model.layers, model.activation, rngs=rngs)
        self.constrain = operators.constrain

    def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
        """Returns [B, T, D] in x's dtype."""
        x_BTD = x_BTD + self.mixer(checkpoint_name(self.mixer_norm(x_BTD), OPERAND), segment_ids_BT)
        x_BTD = x_BTD + self.mlp(checkpoint_name(self.mlp_norm(x_BTD), OPERAND))
        return self.constrain(x_BTD, "batch", "length", None)


class Block(nnx.Module):
    """One repeat of the pattern."""

    def __init__(self, model: ConfigDict, operators: Operators, *, rngs: nnx.Rngs):
        kinds = zip(model.pattern, model.rope_pattern, strict=True)
        self.layers = nnx.List([Layer(model, kind, use_rope, operators, rngs=rngs) for kind, use_rope in kinds])


class Transformer(nnx.Module):
    """A decoder-only language model over packed rows.

    The embedding starts with deviation 1/√D and is scaled by √D on the way in (Vaswani et al. 2017), so that tied
    logits start near unit variance.
    """

    def __init__(self, model: ConfigDict, operators: Operators | None = None, *, rngs: nnx.Rngs):
        operators = operators or Operators()
        repeats, remaining = divmod(model.layers, len(model.pattern))
        V, D = model.vocab_size, model.width
        self.embedding_VD = nnx.Param(
            jax.random.normal(rngs.params(), (V, D), jnp.float32) * D**-0.5, logical=("vocab", "embed")
        )

        @nnx.split_rngs(splits=repeats)
        @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers", "logical": "layers"})
        def make_blocks(rngs: nnx.Rngs) -> Block:
            return Block(model, operators, rngs=rngs)

        self.blocks = make_blocks(rngs)
        kinds = list(zip(model.pattern, model.rope_pattern, strict=True))[:remaining]
        self.remainder = nnx.List([Layer(model, kind, use_rope, operators, rngs=rngs) for kind, use_rope in kinds])
        self.final_norm = RMSNorm((D,), ("embed",), model.norm_epsilon)
        if not model.tied_embeddings:
            self.unembedding_DV = nnx.Param(
                matrix_init(D)(rngs.params(), (D, V), jnp.float32), logical=("embed", "vocab")
            )
        self.tied_embeddings = model.tied_embeddings
        self.compute_dtype = jnp.dtype(model.compute_dtype)
        self.logits_soft_cap = model.logits_soft_cap
        self.remat = model.remat
        self.scan_blocks = model.scan_blocks
        self.constrain = operators.constrain

    def __call__(self, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        """Returns logits_BTV in float32."""
        return self.logits(self.hidden(tokens_BT, segment_ids_BT))

    def hidden(self, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        """Returns the normed x_BTD in the compute dtype, from int32 tokens and document ids (None: one a row)."""
        return self.walk(tokens_BT, segment_ids_BT, lambda layer, x_BTD: None)[0]

    def walk(
        self, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None, look: Callable[[Layer, jax.Array], Any]
    ) -> tuple[jax.Array, list[Any]]:
        """Returns what `hidden` does, and what `look(layer, x_BTD)` makes of each layer and its input.

        The list holds an entry for each of the pattern's layers, in which arrays have a leading dim over the repeats,
        then one for each layer that remains.
        """
        # Whole in D on every device: a look-up of tokens in slices of D would move the tokens' activations instead.
        embedding_VD = self.constrain(self.embedding_VD[...].astype(self.compute_dtype), "vocab", None)
        x_BTD = look_up(embedding_VD, tokens_BT) * jnp.asarray(embedding_VD.shape[1] ** 0.5, self.compute_dtype)
        x_BTD = self.constrain(x_BTD, "batch", "length", None)
        graph, stacked = nnx.split(self.blocks)

        def body(x_BTD: jax.Array, weights: nnx.State) -> tuple[jax.Array, list[Any]]:
            seen = []
            for layer in nnx.merge(graph, weights).layers:
                seen.append(look(layer, x_BTD))
                x_BTD = layer(x_BTD, segment_ids_BT)
            return x_BTD, seen

        body = rematerialised(body, self.remat, scanned=self.scan_blocks)
        if self.scan_blocks:
            x_BTD, seen = jax.lax.scan(body, x_BTD, stacked)
        else:
            by_repeat = []
            for weights in [jax.tree.map(lambda x: x[0], block) for block in cut_blocks(stacked)]:
                x_BTD, seen = body(x_BTD, weights)
                by_repeat.append(seen)
            seen = jax.tree.map(lambda *repeats: jnp.stack(repeats), *by_repeat)
        for layer in self.remainder:
            seen.append(look(layer, x_BTD))
            x_BTD = rematerialised(layer, self.remat, scanned=False)(x_BTD, segment_ids_BT)
        return self.final_norm(x_BTD), seen

    def unembedding(self) -> jax.Array:
        """Returns the float32 unembedding_VD, whole in D on every device."""
        weight_VD = self.embedding_VD[...] if self.tied_embeddings else self.unembedding_DV[...].T
        return self.constrain(weight_VD, "vocab", None)

    def logits(self, x_BTD: jax.Array, unembedding_VD: jax.Array | None = None) -> jax.Array:
        """Returns logits_BTV in float32 from the normed hidden state.

        Args:
          x_BTD: slice of the rows.
          unembedding_VD: what `unembedding` returned, for a caller that needs the logits of many slices.
        """
        if unembedding_VD is None:
            unembedding_VD = self.unembedding()
        logits_BTV = float32_product("btd,vd->btv", x_BTD, unembedding_VD.astype(x_BTD.dtype))
        logits_BTV = self.constrain(logits_BTV, "batch", "length", "vocab")
        if self.logits_soft_cap:
            logits_BTV = self.logits_soft_cap * jnp.tanh(logits_BTV / self.logits_soft_cap)
        return logits_BTV


def cut_blocks(stacked: Any) -> list[Any]:
    """Cuts a tree of stacks [R, ...] into R trees of stacks [1, ...].

    In the backward pass the gradients of the parts are joined once; those of R slices would each be padded and added.
    """
    leaves, tree = jax.tree.flatten(stacked)
    cut = [jax.lax.split(leaf, (1,) * leaf.shape[0]) for leaf in leaves]
    return [tree.unflatten(parts) for parts in zip(*cut, strict=True)]
