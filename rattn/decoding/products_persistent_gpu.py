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

A program has three warpgroups: one copies weights, one copies rows, one multiplies. Weights come by the copy engine,
which serves in order; rows, which are in the L2 cache, would wait there for weights that are not, and so are copied by
threads. A norm's scale is part
of the weights that follow it (`rattn.decoding.layers`) and its 1 / RMS a factor of their product, from the sums of
squares that those who write a row leave beside it.

Results are added up in one order whatever the rows are, and a row's follow from that row alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from rattn.decoding.products_gpu import GATE_COLUMNS

# In their order.
PRODUCTS = ("out", "gate_up", "down", "qkv")
# A Hopper has 132 multiprocessors, and all programs must run at once.
PROGRAMS = 128
# Rows of a product, whatever there are: the fewest that tensor cores multiply.
ROWS = 64
# Numbers of a row, and of weights, that are copied at a time.
ROW_NUMBERS, WEIGHT_NUMBERS = 256, 8192
# Bytes of a multiprocessor's 227 KiB for copies, and of them those of rows.
SHARED_BYTES, ROW_BYTES = 225 * 1024, 144 * 1024
# Weight columns of a tile at most, and their numbers at a time at least: a line of shared memory.
MOST_COLUMNS, LEAST_DEPTH = 128, 64
# Threads of a warpgroup.
WARPGROUP = 128
# Of `counters`: one for each product, a line of the cache apart.
COUNTERS, APART = 128, 32
# Copies that are brought as far as the L2 cache before there is room for them, and what is read next in so many pieces.
# Where rows came by the copy engine too this made a step slower (docs/kernel_log_gpu.md); not measured since.
AHEAD, PIECES = 0, 8
# Numbers of a dim that the copy engine takes at most.
MOST_BROUGHT = 256

LAYOUT = plgpu.Layout.WGMMA
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


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
        """Whether the kernel takes it."""
        return self.tile > 0 and self.length % self.block == 0


def divided(name: str, columns: int, length: int) -> Product:
    """Divides a product: as many tiles as programs where that can be, of at least eight columns.

    Args:
      name: "gate_up" has two weight columns, side by side in a tile, for each column of its result.
      columns: of its result.
      length: of its sum.
    """
    if name == "gate_up":
        return Product(2 * columns, length, 2 * GATE_COLUMNS if columns % GATE_COLUMNS == 0 else 0)
    tiles = [tile for tile in range(8, MOST_COLUMNS + 1, 8) if columns % tile == 0]
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
      read_next: what the kernel after this one reads, [..., H], in the order of its use; as much of it as may be is
        brought to the L2 cache, while memory has nothing else to do.
    """
    read_next = [x.reshape(-1, x.shape[-1]) for x in read_next]
    read_next = [x for x in read_next if x.shape[0] % (PROGRAMS * PIECES) == 0]
    weights = {name: weights[name].reshape(-1, weights[name].shape[-1]) for name in PRODUCTS if name in weights}
    plan = _Plan(o_BE.shape[0], {name: x.shape for name, x in weights.items()}, len(read_next), epsilon, activation)
    mesh = plgpu.Mesh(grid=(PROGRAMS,), grid_names=("program",), num_threads=3, thread_name="warpgroup")
    mine, others = (jax.new_ref(counter) for counter in counters)
    results = plan.results()
    found = pl.kernel(
        functools.partial(_kernel, plan),
        out_type=tuple(results.values()),
        mesh=mesh,
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        name="decode_products",
    )(o_BE, x_RD, *weights.values(), *read_next, mine, others)
    found = dict(zip(results, found, strict=True))
    # This call cleared the other counters, which the next one counts in.
    return found["x"], found.get("qkv"), (jax.freeze(others), jax.freeze(mine))


class _Plan:
    """What is fixed when a call is compiled."""

    def __init__(self, rows, shapes, read_next, epsilon, activation):
        self.read_next, self.epsilon, self.activation = read_next, epsilon, activation
        # Shared memory holds them in groups of eight.
        self.rows = -(-rows // 8) * 8
        self.products = {
            name: divided(name, columns // 2 if name == "gate_up" else columns, length)
            for name, (columns, length) in shapes.items()
        }
        self.width, self.hidden = shapes["down"]
        # Products read ROWS rows, and so past a slot: the last one, too, has that much behind it.
        self.row_slots = 1 + (ROW_BYTES // (2 * ROW_NUMBERS) - ROWS) // self.rows
        self.kept_rows = (self.row_slots - 1) * self.rows + ROWS
        self.weight_slots = (SHARED_BYTES - 2 * self.kept_rows * ROW_NUMBERS) // (2 * WEIGHT_NUMBERS)

    def late(self, product):
        """How many copies of rows are on the way before the first of them is waited for.

        A slot is free when the one after it is multiplied, and so two must be left: one that is multiplied and one that
        is shown to be there.
        """
        return min(self.row_slots - 2, product.length // ROW_NUMBERS)

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

    def shared(self):
        """Types of a program's shared memory, by the names of `_Program`; one ring of weights serves all depths."""
        depths = sorted({product.depth for product in self.products.values()})
        rings = [(self.weight_slots, WEIGHT_NUMBERS // depth, depth) for depth in depths]
        rows = (self.kept_rows, ROW_NUMBERS)
        return {
            "rings": plgpu.RefUnion(*(plgpu.SMEM(shape, jnp.bfloat16, transforms=TRANSFORMS) for shape in rings)),
            "rows": plgpu.SMEM(rows, jnp.bfloat16, transforms=TRANSFORMS),
            "weights_full": plgpu.Barrier(num_barriers=self.weight_slots),
            "weights_empty": plgpu.Barrier(num_barriers=self.weight_slots),
            "rows_full": plgpu.Barrier(num_barriers=self.row_slots),
            "rows_empty": plgpu.Barrier(num_barriers=self.row_slots),
            "written": plgpu.Barrier(),
        }, depths


def _kernel(plan, o, x, *refs):
    names, results = list(plan.products), list(plan.results())
    refs = iter(refs)
    weights, read_next, (mine, others), found = (
        [next(refs) for _ in range(count)] for count in (len(names), plan.read_next, 2, len(results))
    )
    shared, depths = plan.shared()

    def scoped(rings, *shared_refs):
        program = _Program(plan, dict(zip(list(shared)[1:], shared_refs, strict=True)))
        program.rings = dict(zip(depths, rings, strict=True))
        program.o, program.x, program.mine, program.others = o, x, mine, others
        program.weights, program.read_next = dict(zip(names, weights, strict=True)), read_next
        program.found = dict(zip(results, found, strict=True))
        warpgroup = jax.lax.axis_index("warpgroup")
        for number, (work, registers) in enumerate(
            [(program.copy_weights, 40), (program.copy_rows, 72), (program.multiply_all, 232)]
        ):
            pl.when(warpgroup == number)(functools.partial(_with_registers, registers, work))

    pl.run_scoped(scoped, *shared.values(), collective_axes="warpgroup")


def _with_registers(registers, work):
    plgpu.set_max_registers(registers, action="increase" if registers > 168 else "decrease")
    work()


class _Program:
    """One program."""

    def __init__(self, plan, shared):
        self.plan, self.products = plan, plan.products
        for name, ref in shared.items():
            setattr(self, name, ref)
        self.number = jax.lax.axis_index("program")

    def tiles(self, product):
        """How many tiles of a product the program takes."""
        return jax.lax.div(product.tiles - self.number + PROGRAMS - 1, jnp.int32(PROGRAMS))

    def copy_weights(self):
        """Copies the tiles of all products one after another, as soon as there is room."""
        plgpu.griddepcontrol_launch_dependents()
        count, slots = jnp.int32(0), self.plan.weight_slots
        for name, product in self.products.items():

            def copy(i, count, name=name, product=product):
                slot = jax.lax.rem(count, jnp.int32(slots))
                if AHEAD:
                    self.bring(count + AHEAD)
                _wait_if(count >= slots, self.weights_empty.at[slot])
                ring = self.rings[product.depth].at[slot, pl.ds(0, product.tile)]
                plgpu.copy_gmem_to_smem(self.of_copy(name, i), ring, self.weights_full.at[slot])

                @pl.when(count == slots - 1)
                def _():
                    pl.loop(jnp.int32(slots), jnp.int32(AHEAD))(self.bring)

                return count + 1

            count = jax.lax.fori_loop(0, self.copies(product), copy, count)

    def copies(self, product):
        """How many copies of a product's weights the program takes."""
        return self.tiles(product) * (product.length // product.depth)

    def of_copy(self, name, i):
        """Returns the weights of copy i of a product."""
        product = self.products[name]
        copies = jnp.int32(product.length // product.depth)
        columns = (self.number + jax.lax.div(i, copies) * PROGRAMS) * product.tile
        depth = jax.lax.rem(i, copies) * product.depth
        return self.weights[name].at[pl.ds(columns, product.tile), pl.ds(depth, product.depth)]

    def bring(self, n):
        """Brings copy n, counted through all products, to the L2 cache; behind the last one what is read next."""
        first = jnp.int32(0)
        for name, product in self.products.items():
            last = first + self.copies(product)

            @pl.when((n >= first) & (n < last))
            def _(name=name, first=first):
                self.bring_weights(name, n - first)

            first = last
        for ref in self.read_next:
            rows = ref.shape[0] // (PROGRAMS * PIECES)

            @pl.when((n >= first) & (n < first + PIECES))
            def _(ref=ref, rows=rows, first=first):
                plgpu.async_prefetch(ref.at[pl.ds((self.number * PIECES + n - first) * rows, rows)])

            first += PIECES

    def bring_weights(self, name, i):
        """Brings copy i of a product, as many numbers at a time as the copy engine takes."""
        depth = self.products[name].depth
        for at in range(0, depth, MOST_BROUGHT):
            plgpu.async_prefetch(self.of_copy(name, i).at[:, pl.ds(at, min(depth, MOST_BROUGHT))])

    def copy_rows(self):
        """Copies the rows of all products, as soon as they are written."""
        plgpu.griddepcontrol_wait()

        @pl.when(self.number == 0)
        def _():
            self.others[...] = jnp.zeros(COUNTERS, jnp.int32)

        count = jnp.int32(0)
        sources = [self.o, *(self.found[name] for name in ("middle", "hidden", "x"))]
        for index, (product, source) in enumerate(zip(self.products.values(), sources, strict=False)):
            if index:
                self.wait_for(index - 1)
                plgpu.barrier_arrive(self.written)
            each = product.length // ROW_NUMBERS
            copies = self.tiles(product) * each
            late = self.plan.late(product)

            def copy(i, count, source=source, each=each, copies=copies, late=late):
                @pl.when(i < copies)
                def _():
                    slot = jax.lax.rem(count + i, jnp.int32(self.plan.row_slots))
                    _wait_if(count + i >= self.plan.row_slots, self.rows_empty.at[slot])
                    numbers = pl.ds(jax.lax.rem(i, jnp.int32(each)) * ROW_NUMBERS, ROW_NUMBERS)
                    _copy_rows(
                        source.at[:, numbers], self.rows.at[pl.ds(slot * self.plan.rows, self.plan.rows)], source.shape
                    )

                _end_of_copies()

                @pl.when(i >= late)
                def _():
                    _wait_for_copies(late)
                    slot = jax.lax.rem(count + i - late, jnp.int32(self.plan.row_slots))
                    plgpu.barrier_arrive(self.rows_full.at[slot])

                return count

            jax.lax.fori_loop(0, jnp.where(copies > 0, copies + late, 0), copy, count)
            count += copies

    def multiply_all(self):
        """Multiplies the tiles of all products and writes their results."""
        self.counts = jnp.int32(0), jnp.int32(0)
        plgpu.griddepcontrol_wait()
        out, down = self.products["out"], self.products["down"]
        columns = pl.ds(self.number * out.tile, out.tile)
        x = plgpu.load(self.x.at[:, columns], layout=LAYOUT, optimized=False).astype(jnp.float32)
        x = self.add(out, x, columns, "middle", 0)
        self.signal(0)
        plgpu.barrier_wait(self.written)
        self.normed_tiles("gate_up", 0)
        self.signal(1)
        plgpu.barrier_wait(self.written)
        self.add(down, x, columns, "x", 1)
        if "qkv" in self.products:
            self.signal(2)
            plgpu.barrier_wait(self.written)
            self.normed_tiles("qkv", 1)

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

    def signal(self, index):
        """Tells all programs that this one has written its part of a product."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def count(_, counter):
            utils.warpgroup_barrier()
            utils.SemaphoreRef(utils.memref_ptr(counter)).signal(1, memory_scope="gpu")

        count(self.mine.at[index * APART])

    def wait_for(self, index):
        """Waits until all programs have written their parts of a product."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def wait(_, counter):
            counter = utils.SemaphoreRef(utils.memref_ptr(counter))
            counter.wait(PROGRAMS, decrement=False, memory_scope="gpu")

        wait(self.mine.at[index * APART])


def _wait_if(condition, barrier):
    pl.when(condition)(lambda: plgpu.barrier_wait(barrier))


def _copy_rows(source, slot, shape):
    """Begins to copy rows [:, ROW_NUMBERS] to shared memory, sixteen bytes a thread; the last one stands for others.

    They lie there as matrix products read them: tiles of eight rows by 64 numbers, 1 KiB each, in whose row r the
    sixteen bytes of column c are at c xor r.
    """
    rows, chunks = slot.shape[0], ROW_NUMBERS // 8
    at_a_time = WARPGROUP // chunks

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(TRANSFORMS)))
    def copy(_, source, slot):
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)

        def constant(x):
            return utils.c(x, i32)

        first = llvm.ptrtoint(i64, utils.memref_ptr(source))
        place = llvm.ptrtoint(i32, utils.memref_ptr(slot))
        thread = arith.remui(utils.thread_idx(), constant(WARPGROUP))
        first_row, chunk = arith.divui(thread, constant(chunks)), arith.remui(thread, constant(chunks))
        tile, column = arith.divui(chunk, constant(8)), arith.remui(chunk, constant(8))
        for more in range(0, rows, at_a_time):
            row = arith.addi(first_row, constant(more))
            in_tile = arith.remui(row, constant(8))
            group = arith.muli(arith.divui(row, constant(8)), constant(ROW_NUMBERS // 64))
            to = arith.muli(arith.addi(group, tile), constant(1024))
            to = arith.addi(to, arith.muli(in_tile, constant(128)))
            to = arith.addi(to, arith.muli(arith.xori(column, in_tile), constant(16)))
            row = arith.minui(row, constant(shape[0] - 1))
            at = arith.addi(arith.muli(row, constant(2 * shape[1])), arith.muli(chunk, constant(16)))
            _assembly(
                "cp.async.cg.shared.global [$0], [$1], 16;",
                "r,l",
                arith.addi(place, to),
                arith.addi(first, arith.extui(i64, at)),
            )

    copy(source, slot)


def _end_of_copies():
    plgpu.inline_mgpu()(lambda _: _assembly("cp.async.commit_group;"))()


def _wait_for_copies(but):
    """Waits for copies of rows but for the newest, and shows them to the tensor cores."""

    @plgpu.inline_mgpu()
    def wait(_):
        _assembly(f"cp.async.wait_group {but};")
        _assembly("fence.proxy.async.shared::cta;")

    wait()


def _assembly(text, constraints="", *operands):
    llvm.inline_asm(ir.Type.parse("!llvm.void"), list(operands), text, constraints, has_side_effects=True)
