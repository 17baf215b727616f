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

In a program one warpgroup copies weights, one copies rows, and one multiplies, or two with more than 64 rows. Programs
work in pairs, clusters of two. Where there are tiles enough ("gate_up", "qkv") each has its own, and the copy engine
brings rows, which are the same for all, to both at once. "out" and "down" have as few columns as the residual stream is
wide, and a program would read more rows than weights: there a pair shares a tile, each takes half of the sum, and they
exchange what they found. Weights are copied by threads, for the copy engine serves in order: rows, which all wait for,
would stand behind what memory has yet to find.

A norm's scale is part of the weights that follow it (`rattn.decoding.layers`) and its 1 / RMS a factor of their
product, from the sums of squares that those who write a row leave beside it. A row's results follow from that row
alone, and are added up in one order however many there are.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rattn.decoding import mosaic_gpu
from rattn.decoding.layers import GATE_COLUMNS
from rattn.decoding.mosaic_gpu import GROUP_ROWS, WGMMA
from rattn.decoding.products_persistent_plan import PAIRS, PRODUCTS, PROGRAMS, SIDES, Plan

# Of `counters`: one for each product, a line of the cache apart.
COUNTERS, APART = 128, 32
# The copy engine takes whole groups of so many rows, or less than one.
ROWS_OF_A_COPY = 8
# Parameters of Mosaic GPU's profiler, which times the named scopes of every program.
PROFILE = {}
# The number of the first warpgroup that multiplies.
FIRST_MULTIPLIER = 2
# Registers of a thread that copies weights, that copies rows, that multiplies. All begin with 168, or with 128 where
# there are four warpgroups, which have 512 together.
REGISTERS = 40, 24, 224


def zero_counters() -> tuple[jax.Array, jax.Array]:
    """Returns the counters of a first layer's `run`."""
    return (jnp.zeros(COUNTERS, jnp.int32),) * 2


# Lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("epsilon", "activation"))
def run(
    o_BE: jax.Array,
    x_RD: jax.Array,
    weights: Mapping[str, jax.Array],
    counters: tuple[jax.Array, jax.Array],
    *,
    epsilon: float,
    activation: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array | None, tuple[jax.Array, jax.Array]]:
    """Returns the residual stream x_RD, the next layer's qkv [R, columns] or None, and the counters for the next call.

    Args:
      o_BE: bfloat16, what attention says; up to MOST_ROWS rows.
      x_RD: bfloat16, the residual stream, `mosaic_gpu.padded`; what the last rows are is nothing.
      weights: bfloat16 by product, [columns, length of sum]; "qkv" where a layer follows. Gate and up are
        [tiles, 2, GATE_COLUMNS, length]. They are read before the kernel in front is done, so no kernel that may still
        run may write them.
      counters: in which programs wait for each other; of the call before, or `zero_counters`.
      epsilon: of the norms.
      activation: of the gate.
    """
    weights = {name: weights[name].reshape(-1, weights[name].shape[-1]) for name in PRODUCTS if name in weights}
    rows = o_BE.shape[0]
    if rows > ROWS_OF_A_COPY:
        o_BE = jnp.pad(o_BE, ((0, -rows % ROWS_OF_A_COPY), (0, 0)))
    plan = Plan(rows, {name: x.shape for name, x in weights.items()}, epsilon, activation)
    mesh = plgpu.Mesh(
        grid=(PAIRS,),
        grid_names=("pair",),
        cluster=(SIDES,),
        cluster_names=("side",),
        num_threads=FIRST_MULTIPLIER + plan.groups,
        thread_name="warpgroup",
    )
    mine, others = (jax.new_ref(counter) for counter in counters)
    results = plan.results()
    found = pl.kernel(
        functools.partial(_kernel, plan),
        out_type=tuple(results.values()),
        mesh=mesh,
        compiler_params=mosaic_gpu.compiler_params(**PROFILE),
        name="decode_products",
    )(o_BE, x_RD, *weights.values(), mine, others)
    found = dict(zip(results, found, strict=True))
    # This call cleared the other counters, which the next one counts in.
    return found["x"], found.get("qkv"), (jax.freeze(others), jax.freeze(mine))


def _kernel(plan, o, x, *refs):
    names, results, refs = list(plan.products), list(plan.results()), iter(refs)
    counts = len(names), 2, len(results)
    weights, (mine, others), found = ([next(refs) for _ in range(count)] for count in counts)
    shared = plan.shared()

    def scoped(*shared_refs):
        program = _Program(plan, dict(zip(shared, shared_refs, strict=True)))
        program.o, program.x, program.mine, program.others = o, x, mine, others
        program.weights = dict(zip(names, weights, strict=True))
        program.found = dict(zip(results, found, strict=True))
        warpgroup = jax.lax.axis_index("warpgroup")
        for chosen, work, registers, action in (
            (warpgroup == 0, program.copy_weights, REGISTERS[0], "decrease"),
            (warpgroup == 1, program.copy_rows, REGISTERS[1], "decrease"),
            (warpgroup >= FIRST_MULTIPLIER, program.multiply_all, REGISTERS[2], "increase"),
        ):
            pl.when(chosen)(functools.partial(_with_registers, registers, action, work))

    pl.run_scoped(scoped, *shared.values(), collective_axes="warpgroup")


def _with_registers(registers, action, work):
    plgpu.set_max_registers(registers, action=action)
    work()


def _next(slot, slots):
    return jnp.where(slot == slots - 1, 0, slot + 1)


def _back(slot, by, slots):
    """Returns the slot that was `by` before."""
    return jnp.where(slot >= by, slot - by, slot + slots - by)


class _Program:
    """One program."""

    def __init__(self, plan, shared):
        self.plan, self.products = plan, plan.products
        for name, ref in shared.items():
            setattr(self, name, ref)
        self.rings = dict(zip(plan.depths, self.rings, strict=True))
        self.pair, self.side = (jax.lax.axis_index(name) for name in ("pair", "side"))
        self.number = self.pair * SIDES + self.side

    def tiles(self, product):
        """How many tiles of a product the program takes; its pair takes as many."""
        if product.shared:
            return 1
        if product.own:
            return product.tiles
        return jax.lax.div(product.tiles // SIDES - self.pair + PAIRS - 1, jnp.int32(PAIRS))

    def first_column(self, product, i):
        """The first weight column of the program's tile i."""
        if product.shared:
            return self.pair * product.tile
        if product.own:
            both = product.columns // PAIRS
            within = jnp.minimum(i * product.tile, product.own - product.tile)
            return self.pair * both + self.side * (both - product.own) + within
        return (self.number + i * PROGRAMS) * product.tile

    def first(self, product):
        """Where in the sum the program begins."""
        return self.side * product.length if product.shared else 0

    def copy_weights(self):
        """Copies the tiles of all products one after another, as soon as there is room."""
        if "qkv" in self.plan.products:
            plgpu.griddepcontrol_launch_dependents()
        slots, late = self.plan.slots["weights"], self.plan.late

        def show(but, slot):
            mosaic_gpu.wait_for_copies(but)
            plgpu.barrier_arrive(self.weights_full.at[_back(slot, late, slots)])

        carry = jnp.int32(0), jnp.int32(0)
        for name, product in self.products.items():
            ring, weights = self.rings[product.depth], self.weights[name]

            def copy_tile(i, carry, product=product, ring=ring, weights=weights):
                columns = pl.ds(self.first_column(product, i), product.tile)

                def copy(j, carry):
                    count, slot = carry
                    pl.when(count >= late)(lambda: show(late - 1, slot))
                    mosaic_gpu.wait_if(count >= slots, self.weights_empty.at[slot])
                    source = weights.at[columns, pl.ds(self.first(product) + j * product.depth, product.depth)]
                    place = ring.at[slot, pl.ds(0, product.tile)]
                    mosaic_gpu.copy(source, place, product.tile, product.depth, weights.shape[1])
                    return count + 1, _next(slot, slots)

                return jax.lax.fori_loop(0, product.length // product.depth, copy, carry)

            carry = jax.lax.fori_loop(0, self.tiles(product), copy_tile, carry)
        _, slot = carry
        for but in reversed(range(late)):
            show(but, slot)
            slot = _next(slot, slots)

    def copy_rows(self):
        """Copies the rows of all products as soon as they are written; those that both take, to both."""
        plgpu.griddepcontrol_wait()

        @pl.when(self.number == 0)
        def _():
            self.others[...] = jnp.zeros(COUNTERS, jnp.int32)

        carry = jnp.int32(0), jnp.int32(0)
        slots, numbers = self.plan.slots["rows"], self.plan.row_numbers
        sources = [self.o, *(self.found[name] for name in ("middle", "hidden", "x"))]
        for index, (product, source) in enumerate(zip(self.products.values(), sources, strict=False)):
            if index:
                mosaic_gpu.wait_for_count(self.mine.at[(index - 1) * APART], PROGRAMS * self.plan.groups)
                plgpu.barrier_arrive(self.written)

            def copy_tile(_, carry, product=product, source=source):
                def copy(j, carry):
                    count, slot = carry
                    at = pl.ds(self.first(product) + j * numbers, numbers)
                    mosaic_gpu.wait_if(count >= slots, self.rows_empty.at[slot])
                    plgpu.copy_gmem_to_smem(
                        source.at[pl.ds(0, self.plan.rows), at],
                        self.rows.at[pl.ds(slot * self.plan.rows, self.plan.rows)],
                        self.rows_full.at[slot],
                        collective_axes=None if product.shared else "side",
                    )
                    return count + 1, _next(slot, slots)

                return jax.lax.fori_loop(0, product.length // numbers, copy, carry)

            carry = jax.lax.fori_loop(0, self.tiles(product), copy_tile, carry)

    def multiply_all(self):
        """Multiplies the tiles of all products and writes their results."""
        # The slots that come next.
        self.slots = {"weights": jnp.int32(0), "rows": jnp.int32(0)}
        self.group = jax.lax.axis_index("warpgroup") - FIRST_MULTIPLIER
        self.group_rows = pl.ds(self.group * GROUP_ROWS, GROUP_ROWS)
        self.columns = pl.ds(self.number * self.plan.kept, self.plan.kept)
        plgpu.griddepcontrol_wait()
        with jax.named_scope("out"):
            self.add("out", self.x, "middle", 0)
        self.meet(0)
        with jax.named_scope("gate_up"):
            self.normed_tiles("gate_up", 0)
        self.meet(1)
        with jax.named_scope("down"):
            self.add("down", self.found["middle"], "x", 1)
        if "qkv" in self.products:
            self.meet(2)
            with jax.named_scope("qkv"):
                self.normed_tiles("qkv", 1)
        # Neither program of a cluster leaves while the other may still arrive at its barriers.
        plgpu.barrier_arrive(self.done)
        plgpu.barrier_wait(self.done)

    def add(self, name, residual, wanted, which):
        """Adds a product to the program's part of the residual stream, rounds it and leaves its squares."""
        product, kept = self.products[name], self.plan.kept
        # On the way while the product is multiplied.
        x = plgpu.load(residual.at[self.group_rows, self.columns], layout=WGMMA, optimized=False)
        sums, self.slots = self.multiply(product, self.slots)
        halves, second = (sums[:, :kept], sums[:, kept:]), jnp.broadcast_to(self.side == 1, (GROUP_ROWS, kept))
        mine, theirs = (jnp.where(second, *order) for order in (halves[::-1], halves))
        half = self.half.at[self.group]
        plgpu.async_store_smem(
            theirs, half, self.half_full, cluster_idx=1 - self.side, cluster_dim="side", optimized=False
        )
        plgpu.barrier_wait(self.half_full)
        y = x.astype(jnp.float32) + (mine + plgpu.load(half, layout=WGMMA, optimized=False))
        y = y.astype(jnp.bfloat16)
        self.found[wanted].at[self.group_rows, self.columns][...] = y
        wide = y.astype(jnp.float32)
        self.found["squares"].at[which, self.group_rows, self.number][...] = (wide * wide).sum(axis=1)

    def normed_tiles(self, name, which):
        """Writes the program's tiles of "gate_up" or "qkv"."""
        product, plan = self.products[name], self.plan
        # While the rows are on their way.
        squares = plgpu.load(self.found["squares"].at[which, self.group_rows], layout=WGMMA, optimized=False)
        inverse = jax.lax.rsqrt(squares.sum(axis=1) / plan.width + plan.epsilon)

        def tile(i, slots):
            first = self.first_column(product, i)
            y, slots = self.multiply(product, slots)
            y = y * jax.lax.broadcast_in_dim(inverse, y.shape, [0])
            if name == "gate_up":
                for n in range(0, product.tile, 2 * GATE_COLUMNS):
                    gate, up = y[:, n : n + GATE_COLUMNS], y[:, n + GATE_COLUMNS : n + 2 * GATE_COLUMNS]
                    columns = pl.ds((first + n) // 2, GATE_COLUMNS)
                    hidden = (plan.activation(gate) * up).astype(jnp.bfloat16)
                    self.found["hidden"].at[self.group_rows, columns][...] = hidden
            else:
                self.found[name].at[self.group_rows, pl.ds(first, product.tile)][...] = y.astype(jnp.bfloat16)
            return slots

        self.slots = jax.lax.fori_loop(0, self.tiles(product), tile, self.slots)

    def multiply(self, product, slots):
        """Returns rows · weights of a tile that begins in `slots`, float32 [GROUP_ROWS, tile], and the slots after."""
        ring, depths = self.rings[product.depth], {"weights": product.depth, "rows": self.plan.row_numbers}
        block, step = max(depths.values()), min(depths.values())

        def scope(sums):
            def multiply_block(i, slots):
                slots = dict(slots)
                for at in range(0, block, step):
                    begun = [kind for kind, depth in depths.items() if at % depth == 0]
                    for kind in begun:
                        self.wait_full(kind, slots[kind])
                    rows = pl.ds(slots["rows"] * self.plan.rows + self.group * GROUP_ROWS, GROUP_ROWS)
                    x = self.rows.at[rows, pl.ds(at % depths["rows"], step)]
                    w = ring.at[slots["weights"], pl.ds(0, product.tile), pl.ds(at % depths["weights"], step)]
                    plgpu.wgmma(sums, x, w.transpose((1, 0)))
                    plgpu.wgmma_wait(1)  # All before this one are done.
                    for kind in begun:
                        free = functools.partial(self.free_before, kind, slots[kind])
                        free() if at else pl.when(i > 0)(free)
                    for kind, depth in depths.items():
                        if (at + step) % depth == 0:
                            slots[kind] = _next(slots[kind], self.plan.slots[kind])
                return slots

            slots_after = jax.lax.fori_loop(0, product.length // block, multiply_block, slots)
            return sums[...], slots_after

        sums, slots = pl.run_scoped(scope, plgpu.ACC((GROUP_ROWS, product.tile), jnp.float32))
        for kind in depths:
            self.free_before(kind, slots[kind])
        return sums, slots

    def wait_full(self, kind, slot):
        """Waits until what comes next to a slot is there, and tensor cores can read it."""
        plgpu.barrier_wait((self.weights_full if kind == "weights" else self.rows_full).at[slot])
        if kind == "weights":  # Copied by threads.
            mosaic_gpu.show_copies()

    def free_before(self, kind, slot):
        """Says that the warpgroup no longer needs the slot before this one."""
        if kind == "rows":  # At a cluster's barrier one warp arrives for all.
            mosaic_gpu.join()
        empty = self.weights_empty if kind == "weights" else self.rows_empty
        plgpu.barrier_arrive(empty.at[_back(slot, 1, self.plan.slots[kind])])

    def meet(self, index):
        """Tells all programs that this one has written its part of a product, and waits for theirs."""
        with jax.named_scope("tell"):
            mosaic_gpu.count(self.mine.at[index * APART])
        with jax.named_scope("meet"):
            plgpu.barrier_wait(self.written)
