"""One row of the plan: what a (mixer, window) of a config needs on some slices, from formulas."""

import copy
import dataclasses
from typing import Any

from ml_collections import ConfigDict

from rattn import accounting
from rattn.config import set_mixer, validate
from rattn.errors import UserError
from rattn.model.parameters import ModelSpec, model_spec
from rattn.optimizer import make_optimizer
from rattn.planning import roofline
from rattn.planning.topologies import Topology
from rattn.sharding import Sharding, make_mesh
from rattn.train import state_layout

# Context lengths of the table of decode caches, beside the config's own.
CACHE_CONTEXTS = (4096, 32_768, 131_072)


@dataclasses.dataclass(frozen=True)
class _StandIn:
    """A device that only counts: formulas need a mesh's shape, and no libtpu."""

    id: int
    slice_index: int
    platform: str = "cpu"
    process_index: int = 0
    device_kind: str = "stand-in"


@dataclasses.dataclass(frozen=True)
class Row:
    """The forecast of one mixer and window.

    Attributes:
      config: the resolved config.
      topology: the slices.
      mesh: devices along each mesh axis.
      parameters: scalars of the model.
      memory: bytes on a device by part.
      largest_batch: rows that fit, a multiple of what the mesh and accumulation divide; 0: not even the least.
      flops_per_token: model FLOPs, forward and backward.
      time: a step's terms.
      network: bytes that a device receives in a step.
      cache: decode cache bytes of a sequence by context length.
      compiled: what the compiler said, None where it was not asked.
    """

    config: ConfigDict
    topology: Topology
    mesh: dict[str, int]
    parameters: int
    memory: dict[str, float]
    largest_batch: int
    flops_per_token: float
    time: roofline.StepTime
    network: dict[str, float]
    cache: dict[int, dict[str, int]]
    compiled: Any = None

    @property
    def mixer(self) -> str:
        """The mixer of the local layers."""
        local = [name for name in self.config.model.pattern if name != "full"]
        return local[0] if local else "full"

    @property
    def name(self) -> str:
        """Mixer and window."""
        return self.mixer if self.mixer in ("full", "linear") else f"{self.mixer}-{self.config.model.window}"

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.config.batch_size * self.config.context_length

    @property
    def mfu_bound(self) -> float:
        """Model FLOPs over the peak, at the roofline's bound."""
        return self._utilisation(self.time.bound)

    @property
    def mfu_forecast(self) -> float:
        """Model FLOPs over the peak, at the calibrated step time."""
        return self._utilisation(self.time.forecast)

    @property
    def fits(self) -> bool:
        """Whether the formula's memory is within what the compiler lets a program have."""
        return sum(self.memory.values()) <= self.topology.chip.hbm_bytes_per_device

    def chip_hours(self, tokens: float) -> float:
        """Chip-hours for so many tokens, at the calibrated step time."""
        return tokens / self.tokens * self.time.forecast / 3600 * self.topology.chips

    def _utilisation(self, seconds: float) -> float:
        return self.flops_per_token * self.tokens / (seconds * self.topology.chips * self.topology.chip.flops)


def variants(config: ConfigDict, mixers: list[str], windows: list[int]) -> list[ConfigDict]:
    """The config once for every mixer and window; a mixer without a window, once."""
    result = []
    for mixer in mixers or [None]:
        for window in windows or [config.model.window]:
            variant = copy.deepcopy(config)
            variant.model.window = window
            if mixer:
                set_mixer(variant, mixer)
            windowless = all(name in ("full", "linear") for name in variant.model.pattern)
            if windowless:
                variant.model.window_choices = variant.model.window_weights = ()
            if not windowless or window == (windows or [config.model.window])[0]:
                result.append(validate(variant))
    return result


def forecast(config: ConfigDict, topology: Topology) -> Row:
    """Computes a row from formulas alone.

    Raises:
      UserError: the mesh does not fit the slices, or sizes do not divide over it.
    """
    sharding = Sharding(make_mesh(config.mesh, _stand_ins(topology)))
    mesh = dict(sharding.mesh.shape)
    if mesh["data"] % topology.slices:
        raise UserError(
            f"config.mesh.data comes to {mesh['data']} and there are {topology.slices} slices; make it a multiple, for "
            "slices are joined along 'data' alone."
        )
    sharding.check_batch(config)
    spec = model_spec(config.model)
    layout = state_layout(spec, make_optimizer(config.optimizer, config.total_steps, spec.logical), sharding)
    memory = accounting.memory_by_part(config, spec, *layout)
    keys = accounting.keys_seen(config.model, config.context_length)
    return Row(
        config=config,
        topology=topology,
        mesh=mesh,
        parameters=sum(accounting.parameters_by_part(spec).values()),
        memory=memory,
        largest_batch=_largest_batch(config, spec, layout, mesh, topology),
        flops_per_token=accounting.training_flops_per_token(config.model, spec, keys),
        time=roofline.step_time(config, spec, topology, mesh, memory),
        network=roofline.network_bytes(config, spec, mesh, topology.slices),
        cache={
            length: accounting.cache_bytes_per_sequence(config.model, length)
            for length in sorted(
                {
                    config.context_length,
                    # Context lengths of the table of decode caches, beside the config's own.
                    *CACHE_CONTEXTS,
                }
            )
        },
    )


def _stand_ins(topology: Topology) -> list[_StandIn]:
    per_slice = topology.devices // topology.slices
    return [_StandIn(index, index // per_slice) for index in range(topology.devices)]


def _largest_batch(
    config: ConfigDict, spec: ModelSpec, layout: tuple[Any, Any], mesh: dict[str, int], topology: Topology
) -> int:
    """Most rows a step whose memory fits, by bisection over multiples of what a step must divide into."""
    least = mesh["data"] * mesh["fsdp"] * config.accumulation_steps

    def fits(multiple: int) -> bool:
        trial = copy.deepcopy(config)
        trial.batch_size = least * multiple
        return sum(accounting.memory_by_part(trial, spec, *layout).values()) <= topology.chip.hbm_bytes_per_device

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return least * low
