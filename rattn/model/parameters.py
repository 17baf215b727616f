"""The model as a pure tree: its shapes and logical dims without allocating, and its initial values."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from rattn.model.operators import Operators
from rattn.model.transformer import Transformer

Tree = Any


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What a model is before it has weights.

    Attributes:
      graph: the static part; `nnx.merge(graph, parameters)` gives a callable `Transformer`.
      shapes: tree of float32 `jax.ShapeDtypeStruct`.
      logical: the same tree with a tuple of logical dim names for each parameter.
    """

    graph: nnx.GraphDef
    shapes: Tree
    logical: Tree

    def merge(self, parameters: Tree) -> Transformer:
        """Returns the model with these parameters."""
        return nnx.merge(self.graph, parameters)


def model_spec(model: ConfigDict, operators: Operators | None = None) -> ModelSpec:
    """Describes the model of `config.model` without allocating it."""
    abstract = nnx.eval_shape(lambda: Transformer(model, operators, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract, nnx.Param)
    logical = jax.tree.map(
        lambda variable: variable.get_metadata("logical"), state, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    return ModelSpec(graph, nnx.to_pure_dict(state), nnx.to_pure_dict(logical))


def initial_parameters(model: ConfigDict, seed: int) -> Tree:
    """Draws the initial float32 parameters, a pure function of (model, seed)."""
    return jax.jit(lambda: nnx.to_pure_dict(nnx.state(Transformer(model, rngs=nnx.Rngs(params=seed)), nnx.Param)))()


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts to {"blocks.layers.0.mixer.q_DNH": leaf}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def parameter_count(shapes: Tree) -> int:
    """Number of scalars in a tree of shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
