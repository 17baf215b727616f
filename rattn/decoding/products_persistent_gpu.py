"""The weight products between two layers' attention in a step, as one kernel for a Hopper GPU.

    x'     = x + o · Wₒ                                             "out"
    hidden = activation(rms_norm(x') · G) ⊙ rms_norm(x') · U        "gate_up"
    x''    = x' + hidden · W_d                                      "down"
    qkv    = rms_norm(x'') · W of the next layer                    "qkv"

A step reads every weight once for few rows, so all that counts is that memory never rests. Four kernels would each let
it: while their last programs end, while the next ones start and fill their pipelines. So one program on a
multiprocessor stays for all four products. Its weights come through a ring of shared memory that no product's end holds
up: while the programs finish one product and wait for each other, the weights of the next are on their way, and those
of the first come while attention still ends.

A program has three warpgroups: one copies weights, one copies rows, one multiplies. Rows of all programs are the same,
so the copy engine brings them to both programs of a cluster, which halves what is read from the L2 cache. It serves in
order: rows, which all wait for, would stand there behind weights, which memory has yet to find. So weights are copied
by threads. A norm's scale is part of the weights that follow it (`rattn.decoding.layers`) and its 1 / RMS a factor of
their product, from the sums of squares that those who write a row leave beside it.

Results are added up in one order whatever the rows are, and a row's follow from that row alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rattn.decoding import mosaic_gpu
from rattn.decoding.products_gpu import GATE_COLUMNS

# In their order.
PRODUCTS = ("out", "gate_up", "down", "qkv")
# Programs, in clusters of SIDES; a Hopper has 132 multiprocessors and all programs must run at once.
PROGRAMS, SIDES = 128, 2
# Rows of a product, whatever there are: the fewest that tensor cores multiply.
ROWS = 64
# Numbers of a row, and of weights, that are copied at a time.
ROW_NUMBERS, WEIGHT_NUMBERS = 256, 8192
# Bytes of a multiprocessor's 227 KiB for copies, and of them those of rows.
SHARED_BYTES, ROW_BYTES = 225 * 1024, 112 * 1024
# Copies of weights that are brought as far as the L2 cache before there is room for them, and whether it gets what the
# next kernel reads once all weights are on their way.
AHEAD, BRING_NEXT = 0, False
# Weight columns of a tile at most, and their numbers at a time at least: a line of shared memory, or of the cache.
MOST_COLUMNS, LEAST_DEPTH = 128, mosaic_gpu.LINE
# Of `counters`: one for each product, a line of the cache apart.
COUNTERS, APART = 128, 32
# Parameters of Mosaic GPU's profiler, which times the named scopes of every program.
PROFILE = {}

LAYOUT = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Product:
    """How one product is divided.

    Attributes:
      columns: of its weights, gate and up both.
      length: of its sum.
      tile: weight columns that a program takes at a time.
    """

    columns: int
    length: int
    tile: int

    @property
    def tiles(self) -> int:
        """How many tiles there are."""
        return self.columns // self.tile

    @property
    def depth(self) -> int:
        """Numbers of each column that are copied at a time."""
        depth = LEAST_DEPTH
        while 2 * depth * self.tile <= WEIGHT_NUMBERS and self.length % (2 * depth) == 0:
            depth *= 2
        return depth

    @property
    def unit(self) -> int:
        """Numbers of the sum that are multiplied at a time."""
        return min(self.depth, ROW_NUMBERS)

    @property
    def block(self) -> int:
        """Numbers after which a copy of weights and one of rows end together."""
        return max(self.depth, ROW_NUMBERS)

    def fits(self) -> bool:
        """Whether the kernel takes it: whole copies, and as many tiles for both programs of a cluster."""
        if not self.tile or self.length % self.block or self.tiles % SIDES:
            return False
        return 2 * self.tile * self.depth % (mosaic_gpu.WARPGROUP * mosaic_gpu.CHUNK) == 0


def divided(name: str, columns: int, length: int) -> Product:
    """Divides a product: as many tiles as programs where that can be, of at least eight columns.

    Args:
      name: "gate_up" has two weight columns, side by side in a tile, for each column of its result.
      columns: of its result.
      length: of its sum.
    """
    if name == "gate_up":
        return Product(2 * columns, length, 2 * GATE_COLUMNS if columns % GATE_COLUMNS == 0 else 0)
    tiles = [tile for tile in range(8, MOST_COLUMNS + 1, 8) if columns % (tile * SIDES) == 0]
    few = [tile for tile in tiles if columns // tile <= PROGRAMS]
    return Product(columns, length, min(few) if few else max(tiles, default=0))


def fits(dtype: jnp.dtype, shapes: Mapping[str, tuple[int, int]]) -> bool:
    """Returns whether the kernel takes the products whose columns and length of sum `shapes` gives by name."""
    products = {name: divided(name, *shape) for name, shape in shapes.items()}
    if dtype != jnp.bfloat16 or not all(product.fits() for product in products.values()):
        return False
    # Who writes a part of the residual stream keeps it.
    return all(products[name].tiles == PROGRAMS for name in ("out", "down"))


def zero_counters() -> tuple[jax.Array, jax.Array]:
    """Returns the counters of a first layer's `run`."""
    return (jnp.zeros(COUNTERS, jnp.int32),) * 2


def run(
    o_BE: jax.Array,
    x_RD: jax.Array,
    weights: Mapping[str, jax.Array],
    counters: tuple[jax.Array, jax.Array],
    *,
    epsilon: float,
    activation: Callable[[jax.Array], jax.Array],
    read_next: Sequence[jax.Array] = (),
) -> tuple[jax.Array, jax.Array | None, tuple[jax.Array, jax.Array]]:
    """Returns the residual stream x_RD, the next layer's qkv [R, columns] or None, and the counters for the next call.

    Args:
      o_BE: bfloat16, what attention says; up to ROWS rows.
      x_RD: bfloat16, the residual stream, with ROWS rows of which the first are the sequences'; others are anything.
      weights: bfloat16 by product, [columns, length of sum]; "qkv" where a layer follows. Gate and up are
        [tiles, 2, GATE_COLUMNS, length].
      counters: in which programs wait for each other; of the call before, or `zero_counters`.
      epsilon: of the norms.
      activation: of the gate.
      read_next: bfloat16 [..., H], what the next kernel reads; an array that does not divide by PROGRAMS is left out.
    """
    read_next = [x.reshape(-1, x.shape[-1]) for x in read_next if BRING_NEXT]
    read_next = [x for x in read_next if x.shape[0] % PROGRAMS == 0 and x.shape[1] % LEAST_DEPTH == 0]
    weights = {name: weights[name].reshape(-1, weights[name].shape[-1]) for name in PRODUCTS if name in weights}
    rows = o_BE.shape[0]
    if rows > 8:  # The copy engine takes what is less than eight rows, or whole groups of them.
        o_BE = jnp.pad(o_BE, ((0, -rows % 8), (0, 0)))
    plan = _Plan(rows, {name: x.shape for name, x in weights.items()}, len(read_next), epsilon, activation)
    mesh = plgpu.Mesh(
        grid=(PROGRAMS // SIDES,),
        grid_names=("pair",),
        cluster=(SIDES,),
        cluster_names=("side",),
        num_threads=3,
        thread_name="warpgroup",
    )
    mine, others = (jax.new_ref(counter) for counter in counters)
    results = plan.results()
    found = pl.kernel(
        functools.partial(_kernel, plan),
        out_type=tuple(results.values()),
        mesh=mesh,
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0, **PROFILE),
        name="decode_products",
    )(o_BE, x_RD, *weights.values(), *read_next, mine, others)
    found = dict(zip(results, found, strict=True))
    # This call cleared the other counters, which the next one counts in.
    return found["x"], found.get("qkv"), (jax.freeze(others), jax.freeze(mine))


class _Plan:
    """What is fixed when a call is compiled."""

    def __init__(self, rows, shapes, read_next, epsilon, activation):
        self.read_next, self.epsilon, self.activation = read_next, epsilon, activation
        # Copies are of whole groups of eight rows, an equal part of them by each program of a cluster.
        self.rows = -(-rows // (8 * SIDES)) * 8 * SIDES
        self.products = {
            name: divided(name, columns // 2 if name == "gate_up" else columns, length)
            for name, (columns, length) in shapes.items()
        }
        self.width, self.hidden = shapes["down"]
        # Products read ROWS rows, and so past a slot: the last one, too, has that much behind it.
        self.row_slots = 1 + (ROW_BYTES // (2 * ROW_NUMBERS) - ROWS) // self.rows
        self.kept_rows = (self.row_slots - 1) * self.rows + ROWS
        self.weight_slots = (SHARED_BYTES - 2 * self.kept_rows * ROW_NUMBERS) // (2 * WEIGHT_NUMBERS)
        # So many copies of weights are on the way before the first of them is waited for. A slot is free when the one
        # after it is multiplied, and so one is left.
        self.late = self.weight_slots - 1
        assert min(self.row_slots, self.weight_slots) > 1, "A ring of one slot would wait for itself."

    def results(self):
        """Types of what the kernel writes, its own notes among them."""
        found = {
            "middle": jax.ShapeDtypeStruct((ROWS, self.width), jnp.bfloat16),
            "hidden": jax.ShapeDtypeStruct((ROWS, self.hidden), jnp.bfloat16),
            "x": jax.ShapeDtypeStruct((ROWS, self.width), jnp.bfloat16),
            "squares": jax.ShapeDtypeStruct((2, ROWS, PROGRAMS), jnp.float32),
        }
        if "qkv" in self.products:
            found["qkv"] = jax.ShapeDtypeStruct((ROWS, self.products["qkv"].columns), jnp.bfloat16)
        return found

    @property
    def depths(self):
        """Of copies, each of which sees the ring of weights in a shape of its own."""
        return sorted({product.depth for product in self.products.values()})

    def shared(self):
        """Types of a program's shared memory, by the names of `_Program`."""
        rings = [(self.weight_slots, WEIGHT_NUMBERS // depth, depth) for depth in self.depths]
        rows = (self.kept_rows, ROW_NUMBERS)
        return {
            "rings": plgpu.RefUnion(
                *(plgpu.SMEM(shape, jnp.bfloat16, transforms=mosaic_gpu.TRANSFORMS) for shape in rings)
            ),
            "rows": plgpu.SMEM(rows, jnp.bfloat16, transforms=mosaic_gpu.TRANSFORMS),
            "weights_full": plgpu.Barrier(num_barriers=self.weight_slots),
            "weights_empty": plgpu.Barrier(num_barriers=self.weight_slots),
            "rows_full": plgpu.Barrier(num_barriers=self.row_slots),
            "rows_empty": plgpu.ClusterBarrier(collective_axes=("side",), num_barriers=self.row_slots),
            "written": plgpu.Barrier(),
            "done": plgpu.ClusterBarrier(collective_axes=("side",)),
        }


def _kernel(plan, o, x, *refs):
    names, results, refs = list(plan.products), list(plan.results()), iter(refs)
    counts = len(names), plan.read_next, 2, len(results)
    weights, read_next, (mine, others), found = ([next(refs) for _ in range(count)] for count in counts)
    shared = plan.shared()

    def scoped(*shared_refs):
        program = _Program(plan, dict(zip(shared, shared_refs, strict=True)))
        program.o, program.x, program.mine, program.others = o, x, mine, others
        program.weights, program.read_next = dict(zip(names, weights, strict=True)), read_next
        program.found = dict(zip(results, found, strict=True))
        warpgroup = jax.lax.axis_index("warpgroup")
        for number, (work, registers, action) in enumerate(
            [
                (program.copy_weights, 136, "decrease"),
                (program.copy_rows, 40, "decrease"),
                (program.multiply_all, 232, "increase"),
            ]
        ):
            pl.when(warpgroup == number)(functools.partial(_with_registers, registers, action, work))

    pl.run_scoped(scoped, *shared.values(), collective_axes="warpgroup")


def _with_registers(registers, action, work):
    plgpu.set_max_registers(registers, action=action)
    work()


class _Program:
    """One program."""

    def __init__(self, plan, shared):
        self.plan, self.products = plan, plan.products
        for name, ref in shared.items():
            setattr(self, name, ref)
        self.rings = dict(zip(plan.depths, self.rings, strict=True))
        self.pair = jax.lax.axis_index("pair")
        self.number = self.pair * SIDES + jax.lax.axis_index("side")

    def tiles(self, product):
        """How many tiles of a product the program takes; its pair takes as many."""
        pairs = PROGRAMS // SIDES
        return jax.lax.div(product.tiles // SIDES - self.pair + pairs - 1, jnp.int32(pairs))

    def copy_weights(self):
        """Copies the tiles of all products one after another, as soon as there is room."""
        plgpu.griddepcontrol_launch_dependents()
        slots, late = self.plan.weight_slots, self.plan.late
        total = sum(self.copies(product) for product in self.products.values())

        def step(n, carry):
            @pl.when(n >= late)
            def _():
                mosaic_gpu.wait_for_copies(late - 1)
                plgpu.barrier_arrive(self.weights_full.at[jax.lax.rem(n - late, jnp.int32(slots))])

            @pl.when(n < total)
            def _():
                slot = jax.lax.rem(n, jnp.int32(slots))
                mosaic_gpu.wait_if(n >= slots, self.weights_empty.at[slot])
                self.of_product(n, lambda name, i: self.copy(name, i, slot))
                if AHEAD:
                    # The ring first, then what there is no room for.
                    pl.when(n == slots)(lambda: pl.loop(jnp.int32(slots), jnp.int32(slots + AHEAD))(self.bring))
                    pl.when(n >= slots)(lambda: self.bring(n + AHEAD))

            pl.when(n == total)(self.bring_next)
            mosaic_gpu.end_of_copies()
            return carry

        jax.lax.fori_loop(0, total + late, step, None)

    def copies(self, product):
        """How many copies of a product's weights the program takes."""
        return self.tiles(product) * (product.length // product.depth)

    def of_product(self, n, work):
        """Runs work(name, i) for copy n, counted through all products, which is copy i of a product."""
        first = jnp.int32(0)
        for name, product in self.products.items():
            last = first + self.copies(product)
            pl.when((n >= first) & (n < last))(functools.partial(work, name, n - first))
            first = last

    def copy(self, name, i, slot):
        """Begins to copy the weights of copy i of a product."""
        product, stride = self.products[name], self.weights[name].shape[1]
        ring = self.rings[product.depth].at[slot, pl.ds(0, product.tile)]
        mosaic_gpu.copy(self.of_copy(name, i), ring, product.tile, product.depth, stride)

    def bring(self, n):
        """Brings the weights of copy n, counted through all products, to the L2 cache."""

        def work(name, i):
            product, stride = self.products[name], self.weights[name].shape[1]
            mosaic_gpu.bring(self.of_copy(name, i), product.tile, product.depth, stride)

        self.of_product(n, work)

    def bring_next(self):
        """Brings the program's share of what the next kernel reads to the L2 cache."""
        for ref in self.read_next:
            rows, numbers = ref.shape[0] // PROGRAMS, ref.shape[1]
            mosaic_gpu.bring(ref.at[pl.ds(self.number * rows, rows)], rows, numbers, numbers)

    def of_copy(self, name, i):
        """Returns the weights of copy i of a product."""
        product = self.products[name]
        copies = jnp.int32(product.length // product.depth)
        columns = (self.number + jax.lax.div(i, copies) * PROGRAMS) * product.tile
        depth = jax.lax.rem(i, copies) * product.depth
        return self.weights[name].at[pl.ds(columns, product.tile), pl.ds(depth, product.depth)]

    def copy_rows(self):
        """Copies the rows of all products, as soon as they are written, to both programs of the cluster."""
        plgpu.griddepcontrol_wait()

        @pl.when(self.number == 0)
        def _():
            self.others[...] = jnp.zeros(COUNTERS, jnp.int32)

        count, slots = jnp.int32(0), self.plan.row_slots
        sources = [self.o, *(self.found[name] for name in ("middle", "hidden", "x"))]
        for index, (product, source) in enumerate(zip(self.products.values(), sources, strict=False)):
            copies = product.length // ROW_NUMBERS
            if index:
                mosaic_gpu.wait_for_count(self.mine.at[(index - 1) * APART], PROGRAMS)
                plgpu.barrier_arrive(self.written)

            def copy(i, count, source=source, copies=copies):
                numbers = pl.ds(jax.lax.rem(i, jnp.int32(copies)) * ROW_NUMBERS, ROW_NUMBERS)
                slot = jax.lax.rem(count, jnp.int32(slots))
                mosaic_gpu.wait_if(count >= slots, self.rows_empty.at[slot])
                plgpu.copy_gmem_to_smem(
                    source.at[pl.ds(0, self.plan.rows), numbers],
                    self.rows.at[pl.ds(slot * self.plan.rows, self.plan.rows)],
                    self.rows_full.at[slot],
                    collective_axes="side",
                )
                return count + 1

            count = jax.lax.fori_loop(0, self.tiles(product) * copies, copy, count)

    def multiply_all(self):
        """Multiplies the tiles of all products and writes their results."""
        self.counts = jnp.int32(0), jnp.int32(0)
        plgpu.griddepcontrol_wait()
        out, down = self.products["out"], self.products["down"]
        columns = pl.ds(self.number * out.tile, out.tile)
        x = plgpu.load(self.x.at[:, columns], layout=LAYOUT, optimized=False).astype(jnp.float32)
        with jax.named_scope("out"):
            x = self.add(out, x, columns, "middle", 0)
        self.meet(0)
        with jax.named_scope("gate_up"):
            self.normed_tiles("gate_up", 0)
        self.meet(1)
        with jax.named_scope("down"):
            self.add(down, x, columns, "x", 1)
        if "qkv" in self.products:
            self.meet(2)
            with jax.named_scope("qkv"):
                self.normed_tiles("qkv", 1)
        # Neither program of a cluster leaves while the other may still arrive at its barriers.
        plgpu.barrier_arrive(self.done)
        plgpu.barrier_wait(self.done)

    def add(self, product, x, columns, name, which):
        """Adds a product to the program's part of the residual stream, float32 [ROWS, tile]; returns it rounded."""
        y = (x + self.multiply(product, *self.counts)).astype(jnp.bfloat16)
        self.counts = self.after(product, *self.counts)
        self.found[name].at[:, columns][...] = y
        x = y.astype(jnp.float32)
        self.found["squares"].at[which, :, self.number][...] = (x * x).sum(axis=1)
        return x

    def normed_tiles(self, name, which):
        """Writes the program's tiles of "gate_up" or "qkv"."""
        product, plan = self.products[name], self.plan
        # On the way while the product is multiplied.
        squares = plgpu.load(self.found["squares"].at[which], layout=LAYOUT, optimized=False)

        def tile(i, counts):
            y = self.multiply(product, *counts)
            inverse = jax.lax.rsqrt(squares.sum(axis=1) / plan.width + plan.epsilon)
            y, wide = y * jax.lax.broadcast_in_dim(inverse, y.shape, [0]), product.tile
            if name == "gate_up":
                wide //= 2
                y = plan.activation(y[:, :wide]) * y[:, wide:]
            columns = pl.ds((self.number + i * PROGRAMS) * wide, wide)
            self.found["hidden" if name == "gate_up" else name].at[:, columns][...] = y.astype(jnp.bfloat16)
            return self.after(product, *counts)

        self.counts = jax.lax.fori_loop(0, self.tiles(product), tile, self.counts)

    def after(self, product, weights, rows):
        """Returns how many copies of weights and of rows there were after one more tile."""
        return weights + product.length // product.depth, rows + product.length // ROW_NUMBERS

    def multiply(self, product, first_weights, first_rows):
        """Returns rows · weights of a tile, float32 [ROWS, tile], whose copies begin with these; frees their slots."""
        depth, unit, block = product.depth, product.unit, product.block

        def weight_slot(copy):
            return jax.lax.rem(first_weights + copy, jnp.int32(self.plan.weight_slots))

        def row_slot(copy):
            return jax.lax.rem(first_rows + copy, jnp.int32(self.plan.row_slots))

        def scope(sums):
            def multiply_block(i, carry):
                for at in range(0, block, unit):
                    weights, rows = (i * (block // size) + at // size for size in (depth, ROW_NUMBERS))

                    def free_before(at=at, weights=weights, rows=rows):
                        if at % depth == 0:
                            plgpu.barrier_arrive(self.weights_empty.at[weight_slot(weights - 1)])
                        if at % ROW_NUMBERS == 0:
                            plgpu.barrier_arrive(self.rows_empty.at[row_slot(rows - 1)])

                    if at % depth == 0:
                        plgpu.barrier_wait(self.weights_full.at[weight_slot(weights)])
                    if at % ROW_NUMBERS == 0:
                        plgpu.barrier_wait(self.rows_full.at[row_slot(rows)])
                    x = self.rows.at[pl.ds(row_slot(rows) * self.plan.rows, ROWS), pl.ds(at % ROW_NUMBERS, unit)]
                    ring = self.rings[depth]
                    w = ring.at[weight_slot(weights), pl.ds(0, product.tile), pl.ds(at % depth, unit)]
                    plgpu.wgmma(sums, x, w.transpose((1, 0)))
                    plgpu.wgmma_wait(1)  # All before this one are done.
                    if at:
                        free_before()
                    else:
                        pl.when(i > 0)(free_before)
                return carry

            jax.lax.fori_loop(0, product.length // block, multiply_block, None)
            return sums[...]

        sums = pl.run_scoped(scope, plgpu.ACC((ROWS, product.tile), jnp.float32))
        plgpu.barrier_arrive(self.weights_empty.at[weight_slot(product.length // depth - 1)])
        plgpu.barrier_arrive(self.rows_empty.at[row_slot(product.length // ROW_NUMBERS - 1)])
        return sums

    def meet(self, index):
        """Tells all programs that this one has written its part of a product, and waits for theirs."""
        with jax.named_scope("tell"):
            mosaic_gpu.count(self.mine.at[index * APART])
        with jax.named_scope("meet"):
            plgpu.barrier_wait(self.written)
