"""TPU slices by name: how many chips and devices, and what each can do. Needs no libtpu."""

import dataclasses
import math
import re

from rattn.errors import UserError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip, from the pages of cloud.google.com/tpu/docs unless said otherwise.

    Attributes:
      name: as in a topology's name.
      devices: JAX devices that a chip shows to a program: v5p's two cores are one device, those of v4 (as the
        compiler's topology has it) and tpu7x are two.
      cores: TensorCores of a chip.
      clock_hz: cycles a second; the bf16 peak over what the matrix units do in a cycle.
      flops: dense bf16 peak.
      hbm_bytes_per_device: what the compiler lets a program have, read from its refusal of a larger one (libtpu
        0.0.48.1).
      hbm_bandwidth: bytes/s.
      ici_bandwidth: bytes/s that a chip sends while it receives as much (half of "bidirectional"), over all its links.
      dcn_bandwidth: bytes/s that a chip sends to other slices, its share of the host's network cards.
      dims: of the torus.
      max_chips: the largest slice.
    """

    name: str
    devices: int
    cores: int
    clock_hz: float
    flops: float
    hbm_bytes_per_device: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    dims: int
    max_chips: int


# v6e and tpu7x publish no clock: 1.75 GHz and 2.2 GHz are assumptions, used only for the vector work of the linear
# branch. v4's network share is taken to be v5p's.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 2, 2, 1.05e9, 275e12, 15.25 * GIB, 1.2e12, 300e9, 6.25e9, 3, 4096),
        Chip("v5e", 1, 1, 1.5e9, 197e12, 15.75 * GIB, 0.819e12, 200e9, 3.125e9, 2, 256),
        Chip("v5p", 1, 2, 1.75e9, 459e12, 95.73 * GIB, 2.765e12, 600e9, 6.25e9, 3, 6144),
        Chip("v6e", 1, 1, 1.75e9, 918e12, 31.24 * GIB, 1.638e12, 400e9, 12.5e9, 2, 256),
        Chip("tpu7x", 2, 2, 2.2e9, 2307e12, 94.74 * GIB, 7.38e12, 600e9, 12.5e9, 3, 9216),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Some slices of equal shape, joined over the data-centre network."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        """Chips over all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """JAX devices over all slices."""
        return self.chips * self.chip.devices

    def __str__(self) -> str:
        slices = f"{self.slices} slices of " if self.slices > 1 else ""
        each = f", {self.devices:,} devices" if self.chip.devices > 1 else ""
        return f"{slices}{self.name} ({self.chips:,} chips{each})"


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Reads a topology's name, such as v6e:16x16 or v5p:8x8x8.

    Raises:
      UserError: a name that no Cloud TPU has; the sentence lists those that there are.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", name)
    chip = CHIPS.get(match[1]) if match else None
    if chip is None:
        hint = nearest(name.partition(":")[0], CHIPS)
        raise UserError(f"There is no TPU topology {name!r}{hint}; {_known()}.")
    shape = tuple(int(size) for size in match[2].split("x"))
    if not _exists(chip, shape):
        raise UserError(f"There is no TPU topology {name!r}; {_known()}.")
    if slices < 1:
        raise UserError(f"--slices is {slices}; give at least 1.")
    return Topology(name, chip, shape, slices)


def _exists(chip: Chip, shape: tuple[int, ...]) -> bool:
    if len(shape) != chip.dims or math.prod(shape) > chip.max_chips:
        return False
    if chip.dims == 2:
        return shape in ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
    # Below a cube of 4 × 4 × 4 a slice is a part of it; above, whole cubes, the sizes in order.
    return shape in ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)) or (
        all(size % 4 == 0 and size for size in shape) and shape == tuple(sorted(shape))
    )


def _known() -> str:
    flat = "/".join(name for name, chip in CHIPS.items() if chip.dims == 2)
    deep = "/".join(name for name, chip in CHIPS.items() if chip.dims == 3)
    return (
        f"known are {flat}: 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16, and {deep}: 2x2x1, 2x2x2, 2x2x4, 2x4x4 and "
        "multiples of 4 in ascending order, such as v5p:4x4x4 or v5p:8x8x16 (at most "
        f"{', '.join(f'{chip.max_chips:,} chips of {name}' for name, chip in CHIPS.items() if chip.dims == 3)})"
    )
