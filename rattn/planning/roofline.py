"""How long a training step takes at best, by what it would wait for: arithmetic, vector work, memory, networks.

Every term is a lower bound in seconds of one device's step: the work that the program does (recomputation and
masked-out blocks included) over the peak of what does it.
"""

import dataclasses

from ml_collections import ConfigDict

from rattn import accounting
from rattn.attention import SPLASH_BLOCK, SPLASH_WIDE_BLOCK, SPLASH_WIDE_WINDOW
from rattn.model.parameters import ModelSpec
from rattn.planning.topologies import Topology

# Backward over forward of softmax attention: five matrix products (the scores again, four gradients) over two. Splash's
# two backward kernels compute the scores twice; that is left to the calibrated efficiency.
ATTENTION_BACKWARD = 2.5


@dataclasses.dataclass(frozen=True)
class LinearKernel:
    """Static cycles of a residual linear attention kernel, summed over the cores that share the work.

    Counted at B=1, T=8192, N=16, K=4, H=128, P=256, W=512 in bfloat16: bundles of the compiler's final schedule, each
    at least a cycle. They leave out waiting for memory. The work is taken to grow with tokens × query heads × P·H.
    """

    name: str
    forward_cycles: float
    backward_cycles: float

    def cycles(self, passes_forward: float, tokens: float, heads: int, state_size: int) -> float:
        """Cycles of `passes_forward` forwards and one backward."""
        scale = tokens / 8192 * heads / 16 * state_size / (256 * 128)
        return (passes_forward * self.forward_cycles + self.backward_cycles) * scale


# At its best setting: chunk 512, inner loop unrolled (JAX 0.11.2, libtpu 0.0.48.1).
RELEASED_KERNEL = LinearKernel("the paper's released kernel", 1.70e6, 3.96e6)
# By `scripts/bench_tpu_static.py` for each chip (docs/performance.md), with segment ids; v4 was not counted.
OUR_KERNEL = {
    "v5p": LinearKernel("kernels_pallas", 0.225e6, 0.495e6),
    "v5e": LinearKernel("kernels_pallas", 0.227e6, 0.504e6),
    "v6e": LinearKernel("kernels_pallas", 0.150e6, 0.293e6),
    "tpu7x": LinearKernel("kernels_pallas", 0.140e6, 0.280e6),
}
OUR_KERNEL["v4"] = OUR_KERNEL["v5p"]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What no datasheet says: the share of the peak that matrix products reach, and a fixed cost of every step.

    Fitted to the eight `full` and `swa` step times of the paper's Table 3 by `scripts/paper_forecast.py`, on the
    reading that v5p-1024 means 1024 chips (512 would need more than the peak).
    """

    efficiency: float
    fixed_seconds: float


CALIBRATION = Calibration(efficiency=0.627, fixed_seconds=0.330)
CALIBRATED_ON = "v5p"


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step by what the devices would wait for, and what they make together.

    Attributes:
      mxu: matrix products at the chip's peak.
      linear: the residual linear attention kernels at their static cycles.
      hbm: bytes through each device's memory.
      ici: bytes between the chips of a slice.
      dcn: bytes between slices.
      fixed: what the calibration adds to every step, 0 where it does not apply.
      efficiency: the share of the peak that the forecast grants to matrix products.
    """

    mxu: float
    linear: float
    hbm: float
    ici: float
    dcn: float
    fixed: float
    efficiency: float

    @property
    def bound(self) -> float:
        """No step is faster: arithmetic at the peak, memory and networks hidden behind it where they can be."""
        return max(self.mxu + self.linear, self.hbm, self.ici, self.dcn)

    @property
    def limit(self) -> str:
        """The name of the term that sets the bound."""
        return max(
            {"MXU + RLA": self.mxu + self.linear, "HBM": self.hbm, "ICI": self.ici, "DCN": self.dcn}.items(),
            key=lambda item: item[1],
        )[0]

    @property
    def forecast(self) -> float:
        """The bound with matrix products at the calibrated efficiency, and the fixed cost."""
        return max(self.mxu / self.efficiency + self.linear, self.hbm, self.ici, self.dcn) + self.fixed


def forwards_again(model: ConfigDict, part: str) -> int:
    """How often the backward pass repeats the forward of "matrices", "softmax" or "linear".

    Saved attention spares both kernels, for their states are saved with the outputs.
    """
    spared = {
        "none": ("matrices", "softmax", "linear"),
        "save_attention": ("softmax", "linear"),
        "save_products": ("matrices", "softmax", "linear"),
        "save_operands": ("matrices", "softmax", "linear"),
    }
    return int(part not in spared.get(model.remat, ()))


def keys_computed(context_length: int, window: int | None) -> float:
    """Average keys that splash computes for a query: whole blocks, without those that no query of a block sees."""
    window = min(window or context_length, context_length)
    block = min(SPLASH_WIDE_BLOCK if window >= SPLASH_WIDE_WINDOW else SPLASH_BLOCK, context_length)
    starts = range(0, context_length, block)
    seen = [start + block - max(0, start - window + 1) // block * block for start in starts]
    return sum(seen) / len(seen)


def mxu_flops(config: ConfigDict, spec: ModelSpec, seq_shards: int = 1) -> float:
    """FLOPs of all matrix products of a step but the linear branch's, over all devices.

    With `seq_shards` contiguous shards of a row, all devices wait in global layers for the last one: they count as if
    each had its work.
    """
    model, T = config.model, config.context_length
    tokens = config.batch_size * T
    kinds = accounting.layer_kinds(model)
    window_layers = kinds.count("swa") + kinds.count("rattention")
    keys = window_layers * keys_computed(T, model.window) if model.window else 0.0
    keys += kinds.count("full") * keys_computed(T, None) * last_shard_load(seq_shards)
    forward = accounting.forward_flops_per_token(model, spec, accounting.keys_seen(model, T))
    attention = 4.0 * model.query_heads * model.head_dim * keys
    logits_again = 1 if config.loss.chunk_tokens else 0
    return tokens * (
        (3 + forwards_again(model, "matrices")) * forward["matrices"]
        + (3 + logits_again) * forward["unembedding"]
        + (1 + forwards_again(model, "softmax") + ATTENTION_BACKWARD) * attention
    )


def last_shard_load(shards: int) -> float:
    """Work of the last of `shards` contiguous shards in a causal global layer, over the average shard's."""
    return 2 - 1 / shards


def linear_seconds(config: ConfigDict, topology: Topology, kernel: LinearKernel) -> float:
    """Seconds of a step's residual linear attention on every core."""
    model, chip = config.model, topology.chip
    kinds = accounting.layer_kinds(model)
    layers = kinds.count("linear") + kinds.count("rattention")
    cycles = kernel.cycles(
        1 + forwards_again(model, "linear"),
        config.batch_size * config.context_length,
        model.query_heads,
        accounting.feature_dim(model) * model.head_dim,
    )
    return layers * cycles / (topology.chips * chip.cores * chip.clock_hz)


def hbm_bytes(config: ConfigDict, spec: ModelSpec, mesh: dict[str, int], memory: dict[str, float]) -> float:
    """Bytes that a step moves through one device's memory.

    Float32 state is read and written once; gathered weights are written and read once a pass; what goes into and comes
    out of matrix products and kernels is written and read in every pass over a layer, twice in the backward; logits are
    written and read in every pass. Everything else is taken to be fused into these.
    """
    model = config.model
    itemsize = accounting.compute_itemsize(model)
    tokens = config.batch_size * config.context_length / (mesh["data"] * mesh["fsdp"] * mesh["seq"])
    passes = 3 + forwards_again(model, "matrices")
    state = 2 * (memory["parameters"] + memory["optimizer"] + memory["gradients"])
    gathered = accounting.matrix_parameters(spec) / mesh["model"] * itemsize
    weights = gathered * 2 * passes
    N, K, H = model.query_heads, model.kv_heads, model.head_dim
    layer = 4 * model.width + (2 * (N + 2 * K) + 3 * N) * H + 3 * model.mlp_width
    inside = layer * model.layers / mesh["model"] * tokens * itemsize
    logits = model.vocab_size / mesh["model"] * tokens * accounting.FLOAT32_BYTES
    return state + weights + 2 * inside * passes + 2 * logits * (2 + bool(config.loss.chunk_tokens))


def network_bytes(config: ConfigDict, spec: ModelSpec, mesh: dict[str, int], slices: int) -> dict[str, float]:
    """Bytes that one device receives in a step, by what they are and by network ("ici …", "dcn …").

    As the compiled step has it: every microbatch gathers the weights and all-reduces its gradients, where a scatter
    would send half as much. What is exchanged once a step is scattered.
    """
    model = config.model
    itemsize = accounting.compute_itemsize(model)
    matrices = accounting.matrix_parameters(spec) / mesh["model"]
    embedding = model.vocab_size * model.width / mesh["model"]
    rows = config.batch_size / (mesh["data"] * mesh["fsdp"])
    tokens = rows * config.context_length / mesh["seq"]
    passes, times = 1 + forwards_again(model, "matrices"), config.accumulation_steps
    fsdp, seq, tensor = (_share(mesh[axis]) for axis in ("fsdp", "seq", "model"))
    inside, outside = _share(mesh["data"] // slices * mesh["seq"]), _share(slices)
    # A layer's weights are gathered forward and back. What is recomputed gathers them too, but in the last layer of a
    # block, which goes back at once.
    gathers = 2 if passes == 1 else 3 - 1 / len(model.pattern)
    weights = (gathers * matrices + embedding) * itemsize
    # The embedding's gradient has two parts: the look-up's, and the unembedding's in float32.
    gradients = matrices * itemsize + embedding * (itemsize + accounting.FLOAT32_BYTES)
    reduced = 2 * fsdp
    if times > 1 and config.mesh.exchange == "step":
        weights = matrices * itemsize + embedding * accounting.FLOAT32_BYTES
        gradients = (matrices + embedding) * accounting.FLOAT32_BYTES
        times, reduced = 1, fsdp
    result = {
        "ici weights": times * weights * fsdp,
        "ici gradients": times * gradients * (reduced + 2 * inside / mesh["fsdp"]),
        "ici activations": 2 * (passes + 1) * model.layers * 2 * tensor * tokens * model.width * itemsize,
        "dcn gradients": times * 2 * gradients / mesh["fsdp"] * outside,
    }
    kinds = accounting.layer_kinds(model)
    local = len(kinds) - kinds.count("full")
    pair = 2 * model.kv_heads * model.head_dim * itemsize * rows / mesh["model"]
    states = kinds.count("rattention") + kinds.count("linear")
    state = model.kv_heads * accounting.feature_dim(model) * model.head_dim * accounting.FLOAT32_BYTES * rows
    halo = min(model.window, config.context_length) * pair * local
    result["ici sequence"] = (passes + 1) * (
        (halo + states * state * mesh["seq"] / mesh["model"]) * (seq > 0)
        + kinds.count("full") * config.context_length * pair * seq
    )
    return result


def _share(parts: int) -> float:
    """What each of `parts` devices lacks of what they hold together."""
    return (parts - 1) / parts


def step_time(
    config: ConfigDict,
    spec: ModelSpec,
    topology: Topology,
    mesh: dict[str, int],
    memory: dict[str, float],
) -> StepTime:
    """Seconds of one training step.

    Args:
      config: the whole config.
      spec: the model's shapes.
      topology: the slices.
      mesh: devices along each mesh axis.
      memory: bytes on a device by part, `rattn.accounting.memory_by_part`.
    """
    chip = topology.chip
    received = network_bytes(config, spec, mesh, topology.slices)
    by_network = {
        network: sum(size for name, size in received.items() if name.startswith(network)) for network in ("ici", "dcn")
    }
    return StepTime(
        mxu=mxu_flops(config, spec, mesh["seq"]) / (topology.chips * chip.flops),
        linear=linear_seconds(config, topology, OUR_KERNEL[chip.name]),
        hbm=hbm_bytes(config, spec, mesh, memory) * chip.devices / chip.hbm_bandwidth,
        ici=by_network["ici"] * chip.devices / chip.ici_bandwidth,
        dcn=by_network["dcn"] * chip.devices / chip.dcn_bandwidth,
        fixed=CALIBRATION.fixed_seconds if chip.name == CALIBRATED_ON else 0.0,
        efficiency=CALIBRATION.efficiency,
    )
