"""How `products_persistent_gpu` divides each product among its programs, and a multiprocessor's shared memory."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from rattn.decoding.layers import GATE_COLUMNS
from rattn.decoding.mosaic_gpu import CHUNK, GROUP_ROWS, LINE, TRANSFORMS, WARPGROUP

# In their order, and those whose sums a pair of programs shares.
PRODUCTS, SHARED_SUMS = ("out", "gate_up", "down", "qkv"), ("out", "down")
# Programs, in clusters of SIDES; a Hopper has 132 multiprocessors and all programs must run at once.
PROGRAMS, SIDES = 128, 2
PAIRS = PROGRAMS // SIDES
# Rows of a product: the kernel takes fewer too, but those in Triton are faster there, and a program has warpgroups for
# no more.
LEAST_ROWS, MOST_ROWS = 33, 2 * GROUP_ROWS
# Weights, and the most numbers of each column, that are copied at a time.
WEIGHT_NUMBERS, MOST_DEPTH = 8192, 256
# Weight columns of a tile at most, and their numbers at a time at least: a line of shared memory, or of the cache.
MOST_COLUMNS, LEAST_DEPTH = 128, LINE
# Bytes of a multiprocessor's 227 KiB that are used.
SHARED_BYTES = 225 * 1024
# Numbers of a row that are copied at a time, and bytes for slots of them, where one warpgroup multiplies and where two
# do: the first of which LEAST_SLOTS slots have room.
ROW_RINGS = ((256, 104 * 1024), (128, 80 * 1024)), ((128, 128 * 1024),)
LEAST_SLOTS = 4
# Copies of weights that are on their way before the first of them is waited for: more than what memory takes to answer
# would only leave fewer for the tensor cores to take.
LATE = 3


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


class Plan:
    """What is fixed when a call is compiled.

    Attributes:
      epsilon: of the norms.
      activation: of the gate.
      groups: warpgroups that multiply, GROUP_ROWS rows each.
      row_numbers: of a row, that are copied at a time.
      rows: that are copied.
      products: how each is divided, by name.
      width, hidden: columns of the residual stream and of the activation's results.
      kept: columns of the residual stream that a program adds to.
      slots: of "weights" and of "rows" in shared memory, in rings.
      late: copies of weights that are on their way before the first of them is waited for.
    """

    def __init__(
        self,
        rows: int,
        shapes: Mapping[str, tuple[int, int]],
        epsilon: float,
        activation: Callable[[jax.Array], jax.Array],
    ):
        """Divides a call's work.

        Args:
          rows: of the sequences.
          shapes: of the weights, [columns, length of sum] by product; gate and up are one.
          epsilon: of the norms.
          activation: of the gate.
        """
        self.epsilon, self.activation = epsilon, activation
        self.groups = -(-rows // GROUP_ROWS)
        # Copies are of whole groups of eight rows, an equal part of them by each program of a cluster.
        self.rows = -(-rows // (8 * SIDES)) * 8 * SIDES
        self.products = {
            name: divided(name, columns // 2 if name == "gate_up" else columns, length)
            for name, (columns, length) in shapes.items()
        }
        self.width, self.hidden = shapes["down"]
        self.kept = self.width // PROGRAMS
        # Products read whole GROUP_ROWS, and so past a slot: the last one, too, has that much behind it.
        read = self.groups * GROUP_ROWS

        def row_slots_of(numbers: int, most_bytes: int) -> int:
            return 1 + max(most_bytes // (2 * numbers) - read, 2 * self.rows) // self.rows

        rings = ROW_RINGS[self.groups - 1]
        ring = next((ring for ring in rings if row_slots_of(*ring) >= LEAST_SLOTS), rings[-1])
        self.row_numbers, row_slots = ring[0], row_slots_of(*ring)
        self._rows_with_rest = (row_slots - 1) * self.rows + read
        used = 2 * self._rows_with_rest * self.row_numbers + 4 * read * self.kept
        self.slots = {"weights": (SHARED_BYTES - used) // (2 * WEIGHT_NUMBERS), "rows": row_slots}
        assert min(self.slots.values()) > 1, "A ring of one slot would wait for itself."
        # A slot is free when the one after it is multiplied, and so one is left.
        self.late = min(LATE, self.slots["weights"] - 1)

    def results(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Types of what the kernel writes, its own notes among them."""
        rows = self.groups * GROUP_ROWS
        found = {
            "middle": jax.ShapeDtypeStruct((rows, self.width), jnp.bfloat16),
            "hidden": jax.ShapeDtypeStruct((rows, self.hidden), jnp.bfloat16),
            "x": jax.ShapeDtypeStruct((rows, self.width), jnp.bfloat16),
            "squares": jax.ShapeDtypeStruct((2, rows, PROGRAMS), jnp.float32),
        }
        if "qkv" in self.products:
            found["qkv"] = jax.ShapeDtypeStruct((rows, self.products["qkv"].columns), jnp.bfloat16)
        return found

    @property
    def depths(self) -> list[int]:
        """Of copies of weights, each of which sees their ring in a shape of its own."""
        return sorted({product.depth for product in self.products.values()})

    def shared(self) -> dict[str, Any]:
        """Types of a program's shared memory, by the names that it has for them."""
        weights, rows = self.slots["weights"], self.slots["rows"]
        rings = [(weights, WEIGHT_NUMBERS // depth, depth) for depth in self.depths]
        halves = plgpu.TilingTransform((8, self.kept)), plgpu.SwizzleTransform(4 * self.kept)
        by_both = {"collective_axes": ("side",), "num_arrivals": self.groups}
        return {
            "rings": plgpu.RefUnion(*(plgpu.SMEM(shape, jnp.bfloat16, transforms=TRANSFORMS) for shape in rings)),
            "rows": plgpu.SMEM((self._rows_with_rest, self.row_numbers), jnp.bfloat16, transforms=TRANSFORMS),
            "half": plgpu.SMEM((self.groups, GROUP_ROWS, self.kept), jnp.float32, transforms=halves),
            "weights_full": plgpu.Barrier(num_barriers=weights),
            "weights_empty": plgpu.Barrier(num_arrivals=self.groups, num_barriers=weights),
            "rows_full": plgpu.Barrier(num_barriers=rows),
            "rows_empty": plgpu.ClusterBarrier(num_barriers=rows, **by_both),
            # One for all groups: of a barrier with a number JAX 0.11.2 finds another at the other program.
            "half_full": plgpu.Barrier(num_arrivals=self.groups),
            "written": plgpu.Barrier(),
            "done": plgpu.ClusterBarrier(**by_both),
        }
