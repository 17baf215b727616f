"""How the programs of `products_persistent_gpu` divide each product among them."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from rattn.decoding.mosaic_gpu import CHUNK, GATE_COLUMNS, GROUP_ROWS, LINE, WARPGROUP

# In their order, and those whose sums a pair of programs shares.
PRODUCTS, SHARED_SUMS = ("out", "gate_up", "down", "qkv"), ("out", "down")
# Programs, in clusters of SIDES; a Hopper has 132 multiprocessors and all programs must run at once.
PROGRAMS, SIDES = 128, 2
PAIRS = PROGRAMS // SIDES
# Rows that a program multiplies at most.
MOST_ROWS = 2 * GROUP_ROWS
# Weights, and the most numbers of each column, that are copied at a time.
WEIGHT_NUMBERS, MOST_DEPTH = 8192, 256
# Weight columns of a tile at most, and their numbers at a time at least: a line of shared memory, or of the cache.
MOST_COLUMNS, LEAST_DEPTH = 128, LINE


@dataclasses.dataclass(frozen=True)
class Product:
    """How one product is divided.

    Attributes:
      columns: of its weights, gate and up both.
      length: of the sum that a program takes.
      tile: weight columns that a program takes at a time.
      shared: whether a pair has its tile in common, each program with one half of the sum.
      own: weight columns of a program, where a pair's lie side by side; those in the middle may be both's. None where
        programs take tiles in turn.
    """

    columns: int
    length: int
    tile: int
    shared: bool = False
    own: int | None = None

    @property
    def tiles(self) -> int:
        """How many tiles there are; where programs have columns of their own, a program's."""
        return -(-(self.own or self.columns) // self.tile)

    @property
    def depth(self) -> int:
        """Numbers of each column that are copied at a time."""
        depth = LEAST_DEPTH
        while 2 * depth * self.tile <= WEIGHT_NUMBERS and 2 * depth <= MOST_DEPTH:
            depth *= 2
        return depth

    def fits(self) -> bool:
        """Whether the kernel takes it: whole copies, and as many tiles for both programs of a cluster."""
        if not self.tile or self.length % MOST_DEPTH or (self.shared and self.tiles != PAIRS):
            return False
        if self.own is None and self.tiles % SIDES:
            return False
        return 2 * self.tile * self.depth % (WARPGROUP * CHUNK) == 0


def groups(rows: int) -> int:
    """Returns how many warpgroups multiply so many rows."""
    return -(-rows // GROUP_ROWS)


def divided(name: str, columns: int, length: int) -> Product:
    """Divides a product, so that all programs have about as much to read, in tiles of at least eight columns.

    Args:
      name: "gate_up" has two weight columns for each column of its result.
      columns: of its result.
      length: of its sum.
    """
    if name == "gate_up":
        groups, rest = divmod(columns, GATE_COLUMNS * PAIRS)
        own = -(-groups // SIDES)
        tiles = -(-own * 2 * GATE_COLUMNS // MOST_COLUMNS)
        tile = 0 if rest or not own else -(-own // tiles) * 2 * GATE_COLUMNS
        return Product(2 * columns, length, tile, own=own * 2 * GATE_COLUMNS)
    if name in SHARED_SUMS:
        # Who writes a part of the residual stream keeps it, half of a tile, in lines that shared memory swizzles.
        tile = columns // PAIRS if columns in (8 * PROGRAMS, 16 * PROGRAMS, 32 * PROGRAMS) else 0
        return Product(columns, length // SIDES, tile, shared=True)
    tiles = [tile for tile in range(8, MOST_COLUMNS + 1, 8) if columns % (tile * SIDES) == 0]
    few = [tile for tile in tiles if columns // tile <= PROGRAMS]
    return Product(columns, length, min(few) if few else max(tiles, default=0))


def fits(dtype: jnp.dtype, shapes: Mapping[str, tuple[int, int]]) -> bool:
    """Returns whether the kernel takes the products whose columns and length of sum `shapes` gives by name."""
    return dtype == jnp.bfloat16 and all(divided(name, *shape).fits() for name, shape in shapes.items())
