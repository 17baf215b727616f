"""What a config costs, counted by us from shapes and masks: parameters, FLOPs, memory, decode cache.

FLOPs are never XLA's `cost_analysis`, which counts a scanned body once and knows of a kernel only what we tell it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rattn.model.parameters import ModelSpec, flatten, parameter_count

# Dense bf16 peak of one device, FLOP/s, from the vendors' datasheets; keys are prefixes of jax's device_kind.
PEAK_FLOPS = {
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
FLOAT32_BYTES = 4
# Tokens that decoding collects before it adds them to a linear branch's state (`rattn.decoding`).
FOLD_TOKENS = 32


def peak_flops(device: jax.Device) -> float | None:
    """Dense bf16 FLOP/s of a device, or None where it is not known (a CPU)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if device.device_kind.startswith(name)), None)


def layer_kinds(model: ConfigDict) -> list[str]:
    """The mixer of every layer, the pattern repeated over the depth."""
    return [model.pattern[i % len(model.pattern)] for i in range(model.layers)]


def feature_dim(model: ConfigDict) -> int:
    """P of φ: 2H, or H for the identity."""
    return model.head_dim * (1 if model.feature_map == "identity" else 2)


@dataclasses.dataclass(frozen=True)
class KeysSeen:
    """Average keys that a query of a row really sees in each kind of softmax attention."""

    full: float
    window: float


def keys_seen(model: ConfigDict, context_length: int) -> KeysSeen:
    """Keys seen where each row is one document (packed rows see fewer; the training step counts them)."""
    positions = np.arange(1, context_length + 1)
    return KeysSeen(float(positions.mean()), float(np.minimum(positions, model.window).mean()))


def matrix_parameters(spec: ModelSpec) -> int:
    """Weights of matrix products: all parameters but norm scales, embedding and unembedding."""
    flat = flatten(spec.shapes)
    return sum(leaf.size for path, leaf in flat.items() if not path.endswith("scale") and "embedding" not in path)


def compute_itemsize(model: ConfigDict) -> int:
    """Bytes of an activation."""
    return 4 if model.compute_dtype == "float32" else 2


def forward_flops_per_token(model: ConfigDict, spec: ModelSpec, keys: KeysSeen) -> dict[str, float]:
    """Model FLOPs of the forward pass by part.

    2 per weight of a matrix product (the embedding's look-up is none, the unembedding is one); softmax attention 4·N·H
    per key really seen; residual linear attention 2·P·H·(N + K). Nothing for recomputation or for work inside a chunk.
    """
    kinds = layer_kinds(model)
    N, K, H = model.query_heads, model.kv_heads, model.head_dim
    softmax = kinds.count("full") * keys.full + (kinds.count("swa") + kinds.count("rattention")) * keys.window
    linear = kinds.count("linear") + kinds.count("rattention")
    return {
        "matrices": 2.0 * matrix_parameters(spec),
        "unembedding": 2.0 * model.vocab_size * model.width,
        "softmax attention": 4.0 * N * H * softmax,
        "linear attention": 2.0 * feature_dim(model) * H * (N + K) * linear,
    }


def training_flops_per_token(model: ConfigDict, spec: ModelSpec, keys: KeysSeen) -> float:
    """Model FLOPs of a training step for each token: forward, and backward at twice that."""
    return 3 * sum(forward_flops_per_token(model, spec, keys).values())


def parameters_by_part(spec: ModelSpec) -> dict[str, int]:
    """Scalars in each part of the model."""
    parts = {"embedding": 0, "mixers": 0, "feed-forward": 0, "norms": 0}
    for path, leaf in flatten(spec.shapes).items():
        if "embedding" in path:
            part = "embedding"
        elif path.endswith("scale"):
            part = "norms"
        else:
            part = "feed-forward" if ".mlp." in path else "mixers"
        parts[part] += leaf.size
    return parts


def memory_by_part(config: ConfigDict, spec: ModelSpec, shapes: Any, shardings: Any) -> dict[str, float]:
    """Bytes that a training step takes on each device: the state is exact, the rest a formula's estimate.

    Args:
      config: the whole config.
      spec: the model's shapes.
      shapes: tree of ShapeDtypeStructs, {"parameters", "optimizer", …}, as `rattn.train.state_layout` gives it.
      shardings: the same tree of NamedShardings.
    """
    held = {name: _bytes_per_device(shapes[name], shardings[name]) for name in ("parameters", "optimizer")}
    mesh = jax.tree.leaves(shardings["parameters"])[0].mesh
    slices = len({getattr(device, "slice_index", 0) for device in mesh.devices.flat})
    gradients = held["parameters"]
    if config.accumulation_steps > 1:
        if config.mesh.exchange == "step":
            gradients = float(FLOAT32_BYTES * parameter_count(spec.shapes))
        # Weights rounded to the compute dtype, and the gradients of one microbatch.
        gradients *= 1 + 2 * compute_itemsize(config.model) / FLOAT32_BYTES
    rest = {"gradients": gradients, "activations": _kept_bytes(config, mesh.shape)}
    return held | rest | {"temporaries": _temporary_bytes(config, spec, mesh.shape, slices)}


def _bytes_per_device(shapes: Any, shardings: Any) -> float:
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return float(sum(np.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in leaves))


def layer_activations(model: ConfigDict) -> int:
    """Elements that one layer makes for a token.

    Two norms and two residual sums (4D), q, k, v before and after norm and RoPE, branch outputs and their norms, gate,
    up and their product.
    """
    heads = model.query_heads + 2 * model.kv_heads
    return 4 * model.width + (3 * heads + 4 * model.query_heads) * model.head_dim + 4 * model.mlp_width


def _tokens_per_device(config: ConfigDict, mesh: Mapping[str, int]) -> float:
    """Tokens of a microbatch that one device holds."""
    tokens = config.batch_size * config.context_length / config.accumulation_steps
    return tokens / (mesh["data"] * mesh["fsdp"] * mesh["seq"])


def _kept_bytes(config: ConfigDict, mesh: Mapping[str, int]) -> float:
    """What lives from the forward to the backward pass: the residual stream at checkpoints, or all that layers make."""
    model = config.model
    tokens, itemsize = _tokens_per_device(config, mesh), compute_itemsize(model)
    if model.remat == "none":
        return tokens * itemsize * layer_activations(model) / mesh["model"] * model.layers
    stream = 0 if model.remat == "offload" else model.width * model.layers / len(model.pattern)
    saved = 0.0
    if model.remat in ("save_attention", "save_products", "save_operands"):
        outputs = sum(2 if kind == "rattention" else 1 for kind in layer_kinds(model))
        saved += outputs * model.query_heads * model.head_dim
    if model.remat in ("save_products", "save_operands"):
        projections = (model.query_heads + 2 * model.kv_heads) * model.head_dim
        saved += model.layers * (projections + 2 * model.mlp_width + 2 * model.width)
    if model.remat == "save_operands":
        rotated = (model.query_heads + model.kv_heads) * model.head_dim
        saved += model.layers * (rotated + model.query_heads * model.head_dim + 2 * model.width)
    return tokens * itemsize * (stream + saved / mesh["model"])


def _temporary_bytes(config: ConfigDict, spec: ModelSpec, mesh: Mapping[str, int], slices: int) -> float:
    """The largest of three moments: a chunk's loss, the backward pass through a block, the embedding's gradients."""
    model = config.model
    tokens, itemsize = _tokens_per_device(config, mesh), compute_itemsize(model)
    chunk = tokens * (config.loss.chunk_tokens or config.context_length) / config.context_length
    vocabulary = model.vocab_size / mesh["model"]
    loss = vocabulary * (chunk * 2 * FLOAT32_BYTES + model.width * (itemsize + FLOAT32_BYTES))
    # The look-up's gradient, added up in float32, and the unembedding's, which slices exchange whole and so hold twice.
    embedding = vocabulary * model.width * FLOAT32_BYTES * (1 + min(slices, 2))
    # What a block recomputes, its gathered weights, and the embedding, which stays whole from the forward pass on, as
    # does what slices exchange of its gradient. Adjusted on compiled steps: docs/forecast.md says which.
    layers = len(model.pattern)
    recomputed = 0 if model.remat == "none" else layer_activations(model) * layers / mesh["model"]
    weights = matrix_parameters(spec) / model.layers * layers / mesh["model"]
    copies = 1 + (slices > 1)
    block = itemsize * (tokens * recomputed + weights + copies * vocabulary * model.width)
    return max(loss, block, embedding)


def cache_bytes_per_sequence(
    model: ConfigDict,
    context_length: int,
    *,
    fold_tokens: int = FOLD_TOKENS,
    state_itemsize: int = FLOAT32_BYTES,
) -> dict[str, int]:
    """Bytes that decoding keeps for one sequence of `context_length` tokens, by kind of cache.

    A window layer keeps the newest W keys and values, a linear branch P × H sums per key/value head and the C keys and
    values that await being added to them, a full layer every key and value.

    Args:
      model: `config.model`; keys and values have its compute dtype.
      context_length: tokens in the cache.
      fold_tokens: C, tokens that wait until all are added to the state at once.
      state_itemsize: bytes of an element of the state.
    """
    kinds = layer_kinds(model)
    K, H = model.kv_heads, model.head_dim
    per_token = 2 * K * H * compute_itemsize(model)
    window_layers = kinds.count("swa") + kinds.count("rattention")
    linear_layers = kinds.count("linear") + kinds.count("rattention")
    return {
        "full": kinds.count("full") * context_length * per_token,
        "window": window_layers * min(model.window, context_length) * per_token,
        "pending": linear_layers * fold_tokens * per_token,
        "state": linear_layers * K * feature_dim(model) * H * state_itemsize,
    }


def decode_bytes(
    model: ConfigDict,
    spec: ModelSpec,
    context_length: int,
    *,
    fold_tokens: int = FOLD_TOKENS,
    state_itemsize: int = FLOAT32_BYTES,
) -> dict[str, float]:
    """Bytes that a decode step must read and write: `weights` once a step, all else for each sequence.

    Every matrix and the unembedding are read; so is every key and value that a softmax branch sees, and every state. A
    new key and value is written in each layer, a state is read and written at a fold, once in C steps. Reading the keys
    that wait for the fold is not counted: it is the price of C, and no matter of necessity.

    Args:
      model: `config.model`.
      spec: the model's shapes.
      context_length: tokens of each sequence, the new one included.
      fold_tokens: C.
      state_itemsize: bytes of an element of the state.
    """
    itemsize = compute_itemsize(model)
    seen = cache_bytes_per_sequence(model, context_length, fold_tokens=0, state_itemsize=state_itemsize)
    written = 2 * model.kv_heads * model.head_dim * itemsize * model.layers
    return {
        "weights": itemsize * (matrix_parameters(spec) + model.vocab_size * model.width),
        "keys and values": seen["full"] + seen["window"] + written,
        "states": seen["state"] * (1 + 2 / fold_tokens),
    }


def summary(config: ConfigDict, spec: ModelSpec, shapes: Any, shardings: Any) -> str:
    """The table that a run starts with; arguments as `memory_by_part`."""
    model = config.model
    parts = parameters_by_part(spec)
    tokens = config.batch_size * config.context_length
    flops = training_flops_per_token(model, spec, keys_seen(model, config.context_length))
    memory = memory_by_part(config, spec, shapes, shardings)
    cache = cache_bytes_per_sequence(model, config.context_length)
    named = ", ".join(f"{name} {readable_count(count)}" for name, count in parts.items())
    rows = [
        ("parameters", f"{readable_count(sum(parts.values()))} ({named})"),
        ("layers", _runs(layer_kinds(model)) + f", window {model.window}"),
        ("tokens a step", f"{tokens:,} ({config.batch_size} rows × {config.context_length})"),
        ("FLOPs a token", f"{readable_count(flops)} (forward and backward, one document a row)"),
        (
            "memory estimate",
            f"{readable_bytes(sum(memory.values()))} a device "
            f"({', '.join(f'{name} {readable_bytes(size)}' for name, size in memory.items())})",
        ),
        (
            "decode cache",
            f"{readable_bytes(sum(cache.values()))} a sequence of {config.context_length} tokens "
            f"({', '.join(f'{name} {readable_bytes(size)}' for name, size in cache.items() if size)}; "
            f"keys and values in {model.compute_dtype}, states in float32)",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _runs(kinds: list[str]) -> str:
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def readable_count(value: float) -> str:
    """Three digits and a unit: 2.88 B."""
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"


def readable_bytes(value: float) -> str:
    """Three digits and a unit: 1.5 GiB."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= limit:
            # 1000 to 1023 have four digits.
            return f"{value / limit:.{3 if value < 999.5 * limit else 4}g} {unit}"
    return f"{value:.0f} B"
