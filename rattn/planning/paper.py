"""The forecast against the paper's Table 3: two constants from eight measured step times, four more unseen.

Fixed before fitting: a vocabulary of 131,072 (the paper names none), every block and the logits recomputed in the
backward pass (the paper says so for its v6e runs), softmax attention computed in whole blocks of 512 keys (1024 for
windows of 4096 and more), and the peak of v5p, 459 TFLOP/s. The paper's window w counts w previous tokens, ours w + 1.
"""

import dataclasses
import functools

import numpy as np

from rattn.config import load_config
from rattn.model.parameters import ModelSpec, model_spec
from rattn.planning import roofline
from rattn.planning.topologies import Topology, parse_topology

# "v5p-1024" is 1024 cores, 512 chips, in the names of Cloud TPU, and may be meant as 1024 chips.
READINGS = ("v5p:8x8x16", "v5p:8x8x8")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measured step of the paper: batch 1024 on "v5p-1024"."""

    model: str
    context_length: int
    mixer: str
    window: int
    seconds: float

    def __str__(self) -> str:
        window = "" if self.mixer == "full" else f"-{self.window}"
        return f"{self.model} {self.context_length} {self.mixer}{window}"


TABLE_3 = tuple(
    Cell(model, context, mixer, window, seconds)
    for model, context, cells in (
        ("3b", 4096, (("full", 0, 0.84), ("swa", 2048, 0.80), ("rattention", 512, 0.87))),
        ("3b", 8192, (("full", 0, 1.20), ("swa", 4096, 1.05), ("rattention", 1024, 1.08))),
        ("12b", 4096, (("full", 0, 2.21), ("swa", 2048, 2.10), ("rattention", 512, 2.26))),
        ("12b", 8192, (("full", 0, 3.99), ("swa", 4096, 3.89), ("rattention", 1024, 3.97))),
    )
    for mixer, window, seconds in cells
)
FITTED = tuple(cell for cell in TABLE_3 if cell.mixer != "rattention")
UNSEEN = tuple(cell for cell in TABLE_3 if cell.mixer == "rattention")


def fit(topology: Topology) -> roofline.Calibration:
    """Efficiency and fixed cost that make the squared relative errors of the eight `full` and `swa` cells least."""
    seconds = np.array([cell.seconds for cell in FITTED])
    at_peak = np.array([arithmetic(cell, topology)[0] for cell in FITTED])
    equations = np.stack([at_peak / seconds, 1 / seconds], axis=1)
    (slope, fixed), *_ = np.linalg.lstsq(equations, np.ones(len(seconds)))
    return roofline.Calibration(efficiency=float(1 / slope), fixed_seconds=float(fixed))


def forecast(cell: Cell, topology: Topology, calibration: roofline.Calibration, kernel: roofline.LinearKernel) -> float:
    """Seconds of a step as the calibration has it, the linear branch at the kernel's static cycles."""
    at_peak, linear = arithmetic(cell, topology, kernel)
    return at_peak / calibration.efficiency + linear + calibration.fixed_seconds


def arithmetic(
    cell: Cell, topology: Topology, kernel: roofline.LinearKernel = roofline.RELEASED_KERNEL
) -> tuple[float, float]:
    """Returns seconds of (matrix products at the peak, the linear branch)."""
    arguments = f"context={cell.context_length},mixer={cell.mixer},window={cell.window + 1}"
    config = load_config(f"configs/rattn_{cell.model}.py", arguments)
    at_peak = roofline.mxu_flops(config, _spec(cell.model, cell.mixer)) / (topology.chips * topology.chip.flops)
    return at_peak, roofline.linear_seconds(config, topology, kernel)


@functools.cache
def _spec(model: str, mixer: str) -> ModelSpec:
    return model_spec(load_config(f"configs/rattn_{model}.py", f"mixer={mixer}").model)


def relative_errors(
    cells: tuple[Cell, ...], topology: Topology, calibration: roofline.Calibration, kernel: roofline.LinearKernel
) -> np.ndarray:
    """Forecast over measurement, minus one, of each cell."""
    return np.array([forecast(cell, topology, calibration, kernel) / cell.seconds - 1 for cell in cells])


def readings() -> dict[str, tuple[Topology, roofline.Calibration]]:
    """The two readings of "v5p-1024", each with its own fit."""
    topologies = {name: parse_topology(name) for name in READINGS}
    return {name: (topology, fit(topology)) for name, topology in topologies.items()}
