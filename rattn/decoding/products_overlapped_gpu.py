"""A layer's weight products in a step, as four kernels for a Hopper GPU of which the next begins before one ends.

    qkv    = rms_norm(x) · W                                              "qkv", of the next layer
    x'     = x + o · W                                                    "out"
    hidden = activation(rms_norm(x') · G) ⊙ rms_norm(x') · U              "gate_up"
    x''    = x' + hidden · W                                              "down"

A program takes half of a multiprocessor: shared memory, and registers, which two warpgroups without `set_max_registers`
leave for another. So while a kernel multiplies, the next one's programs are there and fill their slots with weights,
which depend on nothing; once it is done they copy rows beside them and go on. Nobody counts or waits for all programs,
as in `products_persistent_gpu`; how many multiprocessors there are is only a matter of speed.

One warpgroup copies, by the copy engine, and one multiplies. A slot holds some numbers of a tile of weight columns and
of all rows; these are the same for all programs, and a pair of them, a cluster, is brought them at once.

A norm's scale is part of the weights that follow it (`rattn.decoding.layers`), its 1 / RMS a factor of their product:
who writes x leaves the sums of squares of its columns. A row's result follows from that row alone, in one order.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rattn.decoding import mosaic_gpu
from rattn.decoding.mosaic_gpu import GATE_COLUMNS, GROUP_ROWS

# Rows, as many as one warpgroup multiplies.
MOST_ROWS = GROUP_ROWS
# Bytes of half a multiprocessor's shared memory that slots take.
SHARED_BYTES = 104 * 1024
# Programs that one tile each is made for; weight columns of a tile at most, for which 128 registers a thread do, the
# half of a multiprocessor's.
PROGRAMS, MOST_COLUMNS = 128, 112
# Numbers of a column that are copied at a time, of tiles of up to NARROW columns and of others.
NARROW, NARROW_DEPTH, DEPTH = 32, 128, 64
SIDES = 2

LAYOUT = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Product:
    """How one product is divided.

    Attributes:
      name: "out", "gate_up", "down" or "qkv".
      columns: of its weights, gate and up both.
      length: of its sum.
      tile: weight columns of a program, 0 where it cannot be divided; the last may take some of the one before's.
    """

    name: str
    columns: int
    length: int
    tile: int

    @property
    def adds(self) -> bool:
        """Whether it is added to the residual stream; if not, it follows a norm."""
        return self.name in ("out", "down")

    @property
    def programs(self) -> int:
        """How many there are, in pairs."""
        return -(-self.columns // (SIDES * self.tile)) * SIDES

    @property
    def depth(self) -> int:
        """Numbers of each column that are copied at a time."""
        return NARROW_DEPTH if self.tile <= NARROW else DEPTH

    def slots(self, rows: int) -> int:
        """How many there are; products read GROUP_ROWS rows, and so past the last one."""
        return (SHARED_BYTES - 2 * (GROUP_ROWS - rows) * self.depth) // (2 * self.depth * (self.tile + rows))


def divided(name: str, columns: int, length: int) -> Product:
    """Divides a product, "gate_up" with two weight columns for each of the `columns` of its result."""
    unit = 2 * GATE_COLUMNS if name == "gate_up" else 8
    columns *= 2 if name == "gate_up" else 1
    tiles = [tile for tile in range(unit, MOST_COLUMNS + 1, unit) if tile <= columns]
    if name in ("out", "down"):
        # Each of these columns counts once among the squares, of which as many sums are read together.
        tiles = [tile for tile in tiles if columns % (8 * tile) == 0]
    enough = [tile for tile in tiles if tile * PROGRAMS >= columns]
    tile = 0 if columns % unit or not tiles else min(enough) if enough else max(tiles)
    return Product(name, columns, length, tile)


def fits(dtype: jnp.dtype, shapes: Mapping[str, tuple[int, int]]) -> bool:
    """Returns whether the kernels take the products whose columns and length of sum `shapes` gives by name."""
    products = [divided(name, *shape) for name, shape in shapes.items()]
    return dtype == jnp.bfloat16 and all(one.tile and one.length % one.depth == 0 for one in products)


def run(
    o_BE: jax.Array,
    x_RD: jax.Array,
    weights: Mapping[str, jax.Array],
    *,
    epsilon: float,
    activation: Callable[[jax.Array], jax.Array],
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the residual stream x_RD and the next layer's qkv [R, columns], or None, both in bfloat16.

    Args:
      o_BE: bfloat16, what attention says; up to MOST_ROWS rows.
      x_RD: bfloat16, the residual stream, `mosaic_gpu.padded`; what the last rows are is nothing.
      weights: bfloat16 by product, [columns, length of sum]; "qkv" where a layer follows. Gate and up are
        [tiles, 2, GATE_COLUMNS, length]. They are read before the kernel in front is done, so no kernel that may still
        run may write them.
      epsilon: of the norms.
      activation: of the gate.
      interpret: `plgpu.InterpretGPUParams`, to run it on a CPU.
    """
    # The copy engine takes whole groups of eight rows, an equal part of them for each of a pair.
    rows = -(-o_BE.shape[0] // (8 * SIDES)) * 8 * SIDES
    o_BE = jnp.pad(o_BE, ((0, rows - o_BE.shape[0]), (0, 0)))
    multiply = functools.partial(_multiply, rows=rows, epsilon=epsilon, activation=activation, interpret=interpret)
    x_RD, squares_RP = multiply("out", o_BE, weights["out"], x_RD)
    (hidden_RF,) = multiply("gate_up", x_RD, weights["gate_up"], squares_RP)
    x_RD, squares_RP = multiply("down", hidden_RF, weights["down"], x_RD)
    if "qkv" not in weights:
        return x_RD, None
    return x_RD, *multiply("qkv", x_RD, weights["qkv"], squares_RP)


@functools.partial(jax.jit, static_argnames=("name", "rows", "epsilon", "activation", "interpret"))
def _multiply(name, x, weights, beside, *, rows, epsilon, activation, interpret):
    """Returns a product of `rows` rows, and the squares of what it writes; `beside` is what it adds to, or squares."""
    weights = weights.reshape(-1, weights.shape[-1])
    width = weights.shape[0] // (2 if name == "gate_up" else 1)
    product = divided(name, width, weights.shape[1])
    found = [jax.ShapeDtypeStruct((GROUP_ROWS, width), jnp.bfloat16)]
    if product.adds:
        found.append(jax.ShapeDtypeStruct((GROUP_ROWS, product.programs), jnp.float32))
    mesh = plgpu.Mesh(
        grid=(product.programs // SIDES,),
        grid_names=("pair",),
        cluster=(SIDES,),
        cluster_names=("side",),
        num_threads=2,
        thread_name="warpgroup",
    )
    slots = product.slots(rows)
    assert slots > 1, "A slot is free when the next one is multiplied."
    shared = {
        "rows": plgpu.SMEM(
            (slots * rows + GROUP_ROWS - rows, product.depth), jnp.bfloat16, transforms=mosaic_gpu.TRANSFORMS
        ),
        "weights": plgpu.SMEM((slots, product.tile, product.depth), jnp.bfloat16, transforms=mosaic_gpu.TRANSFORMS),
        # Rows and weights arrive.
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        "empty": plgpu.ClusterBarrier(collective_axes=("side",), num_barriers=slots),
        "done": plgpu.ClusterBarrier(collective_axes=("side",), num_arrivals=2),
    }

    def kernel(*refs):
        def scoped(*shared_refs):
            program = _Program(product, rows, slots, interpret, dict(zip(shared, shared_refs, strict=True)))
            program.x, program.w, program.beside, program.out, *program.squares = refs
            number = jax.lax.axis_index("warpgroup")
            pl.when(number == 0)(program.copy)
            pl.when(number == 1)(functools.partial(program.multiply, epsilon, activation))
            # Neither program of a pair leaves while the other may still arrive at its barriers.
            plgpu.barrier_arrive(program.done)
            plgpu.barrier_wait(program.done)

        pl.run_scoped(scoped, *shared.values(), collective_axes="warpgroup")

    return pl.kernel(
        kernel,
        out_type=tuple(found),
        mesh=mesh,
        compiler_params=mosaic_gpu.compiler_params(),
        interpret=interpret or False,
        name=f"decode_product_{name}",
    )(x, weights, beside)


class _Program:
    """One program: a tile of columns, of all rows."""

    def __init__(self, product, rows, slots, interpret, shared):
        self.product, self.count, self.slots, self.interpret = product, rows, slots, interpret
        for name, ref in shared.items():
            setattr(self, name, ref)
        self.number = jax.lax.axis_index("pair") * SIDES + jax.lax.axis_index("side")
        self.first = jnp.minimum(self.number * product.tile, product.columns - product.tile)
        self.copies = product.length // product.depth

    def copy(self):
        """Copies weights into all slots, and once the kernel before is done rows; then both, where there is room."""
        if not self.interpret:
            plgpu.griddepcontrol_launch_dependents()
        early = min(self.slots, self.copies)
        self.loop(0, early, self.copy_weights)
        if not self.interpret:
            plgpu.griddepcontrol_wait()
            mosaic_gpu.order_copies()
        self.loop(0, early, self.copy_rows)

        def copy_both(j, slot):
            plgpu.barrier_wait(self.empty.at[slot])
            self.copy_weights(j, slot)
            self.copy_rows(j, slot)

        self.loop(early, self.copies, copy_both)

    def copy_weights(self, j, slot):
        """Copies number j of the tile's weights."""
        source = self.w.at[pl.ds(self.first, self.product.tile), self.numbers(j)]
        plgpu.copy_gmem_to_smem(source, self.weights.at[slot], self.full.at[slot])

    def copy_rows(self, j, slot):
        """Copies number j of the rows: half of them, to both programs."""
        source, place = self.x.at[pl.ds(0, self.count), self.numbers(j)], pl.ds(slot * self.count, self.count)
        plgpu.copy_gmem_to_smem(source, self.rows.at[place], self.full.at[slot], collective_axes="side")

    def multiply(self, epsilon, activation):
        """Multiplies and writes the tile."""
        product, tile = self.product, self.product.tile
        if not self.interpret:
            plgpu.griddepcontrol_wait()
        # While rows are on their way.
        if product.adds:
            columns = pl.ds(self.first, tile)
            residual = plgpu.load(self.beside.at[:, columns], layout=LAYOUT, optimized=False).astype(jnp.float32)
            y = (residual + self.sums()).astype(jnp.bfloat16)
            self.out.at[:, columns][...] = y
            wide = y.astype(jnp.float32)
            self.squares[0].at[:, self.number][...] = (wide * wide).sum(axis=1)
            return
        squares = plgpu.load(self.beside, layout=LAYOUT, optimized=False)
        inverse = jax.lax.rsqrt(squares.sum(axis=1) / product.length + epsilon)
        y = self.sums()
        y = y * jax.lax.broadcast_in_dim(inverse, y.shape, [0])
        if product.name != "gate_up":
            self.out.at[:, pl.ds(self.first, tile)][...] = y.astype(jnp.bfloat16)
            return
        for column, hidden in mosaic_gpu.gated(y, activation):
            columns = pl.ds(self.first // 2 + column, GATE_COLUMNS)
            self.out.at[:, columns][...] = hidden.astype(jnp.bfloat16)

    def sums(self):
        """Returns rows · weights, float32 [GROUP_ROWS, tile]."""

        def scope(sums):
            def multiply(j, slot):
                plgpu.barrier_wait(self.full.at[slot])
                x, w = self.rows.at[pl.ds(slot * self.count, GROUP_ROWS)], self.weights.at[slot]
                plgpu.wgmma(sums, x, w.transpose((1, 0)))
                plgpu.wgmma_wait(1)  # All before this one are done.

                # Where the slot of the one before is filled again.
                @pl.when((j > 0) & (j + self.slots <= self.copies))
                def _():
                    if not self.interpret:
                        mosaic_gpu.join()  # At a cluster's barrier one warp arrives for all.
                    plgpu.barrier_arrive(self.empty.at[jax.lax.rem(slot + self.slots - 1, jnp.int32(self.slots))])

            self.loop(0, self.copies, multiply)
            return sums[...]

        return pl.run_scoped(scope, plgpu.ACC((GROUP_ROWS, self.product.tile), jnp.float32))

    def numbers(self, j):
        """Which numbers of a sum the copies of number j have."""
        return pl.ds(j * self.product.depth, self.product.depth)

    def loop(self, lower, upper, work):
        """Does work(j, its slot) for these copies."""

        def body(j, _):
            work(j, jax.lax.rem(j, jnp.int32(self.slots)))
            return ()

        jax.lax.fori_loop(lower, upper, body, ())
