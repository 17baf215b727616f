"""One token of a sequence against keys that are kept as they are multiplied, as one kernel for a Hopper GPU.

    s_j = q · k_j / √H        o = Σ softmax(s)_j v_j        of full layers, and of rings without a state

A step reads all visible keys and values once, and all that counts is that memory never rests. So there is one program
on a multiprocessor, to which the copy engine brings pair after pair of tiles, of keys and of the values that belong to
them, as fast as there is room in shared memory; the first before the kernel in front is done, for what is in the cache
does not depend on it. All heads' pairs stand in one line, of which every program takes as long a piece: `shares`. So
programs end at the same time, however long sequences are and however many there are.

    copies    pairs of tiles                                                                              `Copies`
    takers    every other pair: scores, maximum, weights, and weights times values                        `Taker`

A program's takers keep a maximum, a sum and a result each. At a head's end the first one takes them together. Where a
head is more than one program's, all but the one with its first pair leave what they found in device memory and say so;
that one, which is at its piece's end then while they were at the beginning of theirs, waits for them and adds up, in
their order. It also takes the new key, and writes it to the cache.

Keys and dims of values are the long side of each product, queries the short one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rattn.decoding import mosaic_gpu
from rattn.decoding.attention_gpu_program import LEAST, rotated
from rattn.decoding.attention_stream_gpu_plan import (
    COLUMNS,
    HALF,
    HEAD_DIM,
    PAIRS,
    TAKERS,
    TILE,
    Call,
    Moment,
)
from rattn.decoding.cache import CacheLayout
from rattn.decoding.layers import LayerSpec
from rattn.decoding.mosaic_gpu import WGMMA, halves, rounded, spread
from rattn.decoding.triton_gpu import LOG2_E

# Key/value heads of all sequences from which it is used. With 4, which many programs share, `attention_gpu` is faster;
# between them nothing has been timed.
LEAST_HEADS = 32

# Of scores, for powers of two.
SCALE = HEAD_DIM**-0.5 * LOG2_E
BY_COLUMN, BY_ROW = WGMMA.reduce(0), WGMMA.reduce(1)


def fits(layer: LayerSpec, layout: CacheLayout) -> bool:
    """Returns whether the kernel takes a layer and its cache."""
    slots = layout.slots(layer)
    return (
        layer.kind in ("full", "swa")
        and layout.batch * layer.kv_heads >= LEAST_HEADS
        and layout.dtype == "bfloat16"
        and layer.head_dim == HEAD_DIM
        and layer.group <= COLUMNS
        # Whole lines of eight for the copy engine.
        and slots >= TILE
        and slots % 8 == 0
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is fixed when a call is compiled.

    Attributes:
      epsilon: of the norms of query and key.
      early: whether the cache and the `Moment` were written before the kernel in front began, so that they may be read
        before it is done.
      interpret: how to run it on a CPU, to test it, or None.
    """

    epsilon: float
    early: bool = False
    interpret: plgpu.InterpretGPUParams | None = None


# Lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames="plan")
def attend(
    plan: Plan,
    qkv_BKAH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    moment: Moment,
    ready_P: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns o_BKGH in v's dtype, the keys, the values and `ready_P`.

    Args:
      plan: what is fixed.
      qkv_BKAH: bfloat16, as projected: a head's G queries, its key and its value; perhaps more rows than sequences.
      k_BKSH: bfloat16, keys without the new one, which takes its slot; what is past the end is dropped.
      v_BKSH: bfloat16, values, likewise.
      moment: of `moment`.
      ready_P: int32, where programs say that a part is there; `mosaic_gpu.none_ready`, also when the kernel is done.
      scales: float32 [H], of the norms of query and key, where there are any.
    """
    B, K, S, H = k_BKSH.shape
    call = Call(B, K, qkv_BKAH.shape[2] - 2, S, len(moment.shares_P5))
    kept = [jax.new_ref(x) for x in (k_BKSH, v_BKSH, ready_P)]
    given = {"qkv": qkv_BKAH, "k": kept[0], "v": kept[1], "ready": kept[2]}
    given |= {"spans": moment.spans_B4, "shares": moment.shares_P5}
    given |= dict(zip(("q_scale", "k_scale"), scales or (), strict=False))
    if moment.angles_2BR is not None:
        given["angles"] = moment.angles_2BR
    found = {
        "found": jax.ShapeDtypeStruct((B, K, call.Q, H), v_BKSH.dtype),
        "parts": jax.ShapeDtypeStruct((call.programs, H, COLUMNS), jnp.float32),
        "part_sums": jax.ShapeDtypeStruct((call.programs, 2, COLUMNS), jnp.float32),
    }
    mesh = plgpu.Mesh(grid=(call.programs,), grid_names=("program",), num_threads=1 + TAKERS, thread_name="warpgroup")
    o_BKQH, *_ = pl.kernel(
        functools.partial(_kernel, call, plan, (*given, *found)),
        out_type=tuple(found.values()),
        mesh=mesh,
        compiler_params=mosaic_gpu.compiler_params(approx_math=True),
        interpret=plan.interpret or False,
        name="decode_attention_stream",
    )(*given.values())
    return o_BKQH[:, :, : call.G], *(jax.freeze(x) for x in kept)


def _kernel(call, plan, names, *refs):
    shared, arrays = call.shared(), dict(zip(names, refs, strict=True))

    def scoped(*shared_refs):
        if not (plan.early or plan.interpret):
            plgpu.griddepcontrol_wait()
        given = call, plan, arrays, dict(zip(shared, shared_refs, strict=True))
        number = jax.lax.axis_index("warpgroup")
        pl.when(number == 0)(lambda: Copies(*given).run())
        pl.when(number > 0)(lambda: Taker(*given).run())

    pl.run_scoped(scoped, *shared.values(), collective_axes="warpgroup")


class Warpgroup:
    """One warpgroup of a program, with the arrays of device memory and what is in shared memory."""

    def __init__(self, call, plan, arrays, shared):
        self.call, self.plan, self.normed, self.rotates = call, plan, "q_scale" in arrays, "angles" in arrays
        for name, ref in (arrays | shared).items():
            setattr(self, name, ref)
        # Those that others wait for begin first, however many run at a time.
        self.program = call.programs - 1 - jax.lax.axis_index("program")
        self.first_head, self.first_pair, self.last_head, self.end, self.sharers = (
            self.shares[self.program, n] for n in range(5)
        )

    def for_heads(self, work):
        """Does work(i, sequence, head, its first pair and the one it ends before, pairs before) for all heads."""

        def body(i, before):
            head = self.first_head + i
            b, h = jax.lax.div(head, jnp.int32(self.call.K)), jax.lax.rem(head, jnp.int32(self.call.K))
            begin = jnp.where(i == 0, self.first_pair, 0)
            end = jnp.where(head == self.last_head, self.end, self.spans[b, 3])
            work(i, b, h, begin, end, before)
            return before + end - begin

        jax.lax.fori_loop(0, self.last_head - self.first_head + 1, body, jnp.int32(0))

    def wait_for_kernel_before(self):
        """Waits until the kernel before this one is done, and so what it and those before it have written is there.

        Only the cache, `shares` and `spans` are read before.
        """
        if not self.plan.interpret:
            plgpu.griddepcontrol_wait()


class Copies(Warpgroup):
    """The warpgroup that copies."""

    def run(self):
        """Copies all pairs, as soon as there is room; what is new of a head before them, when it is written."""
        if not self.plan.interpret:
            plgpu.griddepcontrol_launch_dependents()
        self.for_heads(self.copy_head)

    def copy_head(self, i, b, h, begin, end, before):
        """Copies a head's new queries, key and value, and its pairs."""
        early = jnp.where(i == 0, jnp.minimum(begin + PAIRS, end), begin)
        copy = functools.partial(self.copy_pair, b, h, begin, before)
        jax.lax.fori_loop(begin, early, copy, ())
        pl.when(i == 0)(self.wait_for_kernel_before)
        slot = jax.lax.rem(i, jnp.int32(2))
        mosaic_gpu.wait_if(i >= 2, self.new_empty.at[slot])
        for first, source, count in ((0, 0, self.call.G), (COLUMNS, self.call.G, 2)):
            plgpu.copy_gmem_to_smem(
                self.qkv.at[b, h, pl.ds(source, count)], self.new.at[slot, pl.ds(first, count)], self.new_full.at[slot]
            )
        jax.lax.fori_loop(early, end, copy, ())

    def copy_pair(self, b, h, begin, before, n, _):
        """Copies a head's pair n; what is past the end of the slots reads as zeros."""
        count = before + n - begin
        place = jax.lax.rem(count, jnp.int32(PAIRS))
        tile = jax.lax.rem(self.spans[b, 2] + n, jnp.int32(self.call.tiles))
        mosaic_gpu.wait_if(count >= PAIRS, self.empty.at[place])
        for source, into, full in ((self.k, self.keys, self.keys_full), (self.v, self.values, self.values_full)):
            plgpu.copy_gmem_to_smem(source.at[b, h, pl.ds(tile * TILE, TILE)], into.at[place], full.at[place])
        return ()


class Taker(Warpgroup):
    """A warpgroup that takes every other pair."""

    def __init__(self, *args):
        super().__init__(*args)
        self.taker = jax.lax.axis_index("warpgroup") - 1

    def run(self):
        """Attends with all heads of the program."""
        self.wait_for_kernel_before()
        self.for_heads(self.attend)

    def attend(self, i, b, h, begin, end, before):
        """Makes a head's result, or a part of it."""
        slot = jax.lax.rem(i, jnp.int32(2))
        plgpu.barrier_wait(self.new_full.at[slot])
        self.position(b, slot)
        plgpu.commit_smem()
        newest, reach, first_tile, _ = (self.spans[b, n] for n in range(4))
        row = plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, (TILE, COLUMNS), 0), WGMMA)
        # The first of the head's pairs that is this warpgroup's.
        first = begin + jax.lax.rem(self.taker + (TAKERS - 1) * before, jnp.int32(TAKERS))

        def take(n, carry):
            pair = first + n * TAKERS
            place = jax.lax.rem(before + pair - begin, jnp.int32(PAIRS))
            slots = jax.lax.rem(first_tile + pair, jnp.int32(self.call.tiles)) * TILE + row
            ages = jnp.where(slots <= newest, newest - slots, newest - slots + self.call.S)
            visible = (ages > 0) & (ages < reach) & (slots < self.call.S)
            return self.take(place, visible, *carry)

        def filled(value, shape, layout):
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        nothing = (
            filled(LEAST, (COLUMNS,), BY_COLUMN),
            filled(0, (TILE, COLUMNS), WGMMA),
            filled(0, (HEAD_DIM, COLUMNS), WGMMA),
        )
        count = jax.lax.div(end - first + TAKERS - 1, jnp.int32(TAKERS))
        most, weights, o = jax.lax.fori_loop(0, count, take, nothing)
        mosaic_gpu.wait_if((self.taker > 0) & (i > 0), self.heard)
        mosaic_gpu.store_of_warps("add", weights, self.totals.at[self.taker], self.plan.interpret)

        @pl.when(self.taker > 0)
        def _():
            self.others.at[self.taker - 1][...] = o
            self.most.at[self.taker - 1][...] = most
            plgpu.barrier_arrive(self.told)

        @pl.when(self.taker == 0)
        def _():
            self.join()
            plgpu.barrier_wait(self.told)
            found = self.together(slot, begin == 0, most, o)
            plgpu.barrier_arrive(self.heard)
            self.write(b, h, slot, begin, newest, end == self.spans[b, 3], *found)

        plgpu.barrier_arrive(self.new_empty.at[slot])

    def position(self, b, slot):
        """Norms and rotates a head's queries and its new key, with training's roundings, and multiplies them."""
        layout, shape = mosaic_gpu.rows_layout(COLUMNS, HALF), (COLUMNS, HALF)
        of_halves = [pl.ds(n * HALF, HALF) for n in (0, 1)]

        across = functools.partial(mosaic_gpu.load_across, layout=layout, shape=shape)

        def positioned(x, scale):
            if self.normed:
                inverse = jax.lax.rsqrt(sum((y * y).sum(axis=1) for y in x) / HEAD_DIM + self.plan.epsilon)
                inverse = spread(inverse, layout, shape, 0)
                scales = [across(getattr(self, scale).at[half]) for half in of_halves]
                x = [rounded(y * inverse * by) for y, by in zip(x, scales, strict=True)]
            if self.rotates:
                x = [rounded(y) for y in rotated(x, [across(self.angles.at[n, b]) for n in (0, 1)])]
            return x

        queries = halves(self.new.at[slot, pl.ds(0, COLUMNS)])
        queries = [plgpu.load(half, layout=layout, optimized=False).astype(jnp.float32) for half in queries]
        q = positioned(queries, "q_scale")
        for half, x in zip(halves(self.queries.at[self.taker]), q, strict=True):
            half[...] = x.astype(jnp.bfloat16)

        @pl.when(self.taker == 0)
        def _():
            k = positioned([across(self.new.at[slot, COLUMNS, half]) for half in of_halves], "k_scale")
            for half, x in zip(halves(self.key), k, strict=True):
                half[...] = x.astype(jnp.bfloat16)
            score = sum((x * y).sum(axis=1) for x, y in zip(q, k, strict=True))
            self.score[...] = score * SCALE

    def take(self, place, visible, most, weights, o):
        """Adds a pair of tiles to the maximum [COLUMNS], the weights [TILE, COLUMNS] and the result [H, COLUMNS]."""
        plgpu.barrier_wait(self.keys_full.at[place])
        scores = self.product(self.keys.at[place], self.queries.at[self.taker], TILE)
        scores = jnp.where(visible, scores * SCALE, LEAST)
        maxima = self.maxima.at[self.taker]
        mosaic_gpu.store_of_warps("max", scores, maxima, self.plan.interpret)
        self.join()
        now = functools.reduce(jnp.maximum, self.rows(maxima), most)
        shrink, new = jnp.exp2(most - now), jnp.exp2(scores - of_columns(now, TILE))
        mosaic_gpu.store_transposed(new.astype(jnp.bfloat16), self.weights.at[self.taker])
        plgpu.commit_smem()
        plgpu.barrier_wait(self.values_full.at[place])
        found = self.product(self.values.at[place].transpose((1, 0)), self.weights.at[self.taker], HEAD_DIM)
        plgpu.barrier_arrive(self.empty.at[place])
        return now, weights * of_columns(shrink, TILE) + new, o * of_columns(shrink, HEAD_DIM) + found

    def product(self, x, other, rows):
        """Returns x · otherᵀ of two in shared memory, float32 [rows, COLUMNS]."""

        def scope(sums):
            plgpu.wgmma(sums, x, other.transpose((1, 0)))
            plgpu.wgmma_wait(0)
            return sums[...]

        return pl.run_scoped(scope, plgpu.ACC((rows, COLUMNS), jnp.float32))

    def together(self, slot, begins, most, o):
        """Returns the maximum, the sum [COLUMNS] and the result [H, COLUMNS] of all takers, and of the new key."""
        others = range(TAKERS - 1)
        mosts = [most, *(self.column(self.most.at[n]) for n in others)]
        results = [o, *(plgpu.load(self.others.at[n], layout=WGMMA, optimized=False) for n in others)]
        totals = [sum(self.rows(self.totals.at[n])) for n in range(TAKERS)]
        score = jnp.where(begins, self.column(self.score), LEAST)
        value = plgpu.load(self.new.at[slot, COLUMNS + 1], layout=BY_ROW, optimized=False).astype(jnp.float32)
        new = score, jnp.ones_like(score), jax.lax.broadcast_in_dim(value, (HEAD_DIM, COLUMNS), [0])
        return combined(*zip(mosts, totals, results, strict=True), new)

    def write(self, b, h, slot, begin, newest, ends, most, total, o):
        """Writes a head's result, and the new key and value; or leaves a part to the program that began the head."""

        @pl.when(begin > 0)
        def _():
            self.parts.at[self.program][...] = o
            for n, x in enumerate((most, total)):
                self.part_sums.at[self.program, n][...] = x
            mosaic_gpu.say_ready(self.ready.at[self.program], self.plan.interpret)

        @pl.when(begin == 0)
        def _():
            @pl.when(newest < self.call.S)
            def _():
                layout = mosaic_gpu.rows_layout(COLUMNS, HEAD_DIM).reduce(0)
                for kept, row in ((self.k, self.key.at[0]), (self.v, self.new.at[slot, COLUMNS + 1])):
                    kept.at[b, h, newest][...] = plgpu.load(row, layout=layout, optimized=False)

            sharers = jnp.where(ends, 0, self.sharers)
            _, all_total, all_o = jax.lax.fori_loop(1, sharers + 1, self.add_part, (most, total, o))
            self.finish(b, h, all_o * of_columns(1.0 / all_total, HEAD_DIM))

    def add_part(self, n, carry):
        """Waits for the part of the program that is so many further, and adds it."""
        program = self.program + n
        mosaic_gpu.take_ready(self.ready.at[program], self.plan.interpret)
        sums = self.part_sums.at[program]
        most, total = (self.column(sums.at[which]) for which in (0, 1))
        return combined(carry, (most, total, plgpu.load(self.parts.at[program], layout=WGMMA, optimized=False)))

    def finish(self, b, h, o):
        """Writes a head's result, from [H, COLUMNS]."""
        mosaic_gpu.store_transposed(o, self.out)
        self.join()
        layout = mosaic_gpu.rows_layout(self.call.Q, HEAD_DIM)
        rows = plgpu.load(self.out.at[pl.ds(0, self.call.Q)], layout=layout, optimized=False)
        self.found.at[b, h][...] = rows.astype(jnp.bfloat16)
        self.join()  # Before the next head's result is written there.

    def column(self, ref):
        """Loads [COLUMNS] numbers."""
        return plgpu.load(ref, layout=BY_COLUMN, optimized=False)

    def rows(self, ref):
        """Loads what the four warps left."""
        return [self.column(ref.at[warp]) for warp in range(4)]

    def join(self):
        """Waits for all warps of the warpgroup, and shows each what others wrote."""
        if self.plan.interpret:
            plgpu.commit_smem()
        else:
            mosaic_gpu.join()


def combined(*parts):
    """Adds up parts of a head, each a maximum, a sum [COLUMNS] and a result [H, COLUMNS]."""
    mosts, totals, results = zip(*parts, strict=True)
    now = functools.reduce(jnp.maximum, mosts)
    shrinks = [jnp.exp2(most - now) for most in mosts]
    total = sum(total * shrink for total, shrink in zip(totals, shrinks, strict=True))
    return now, total, sum(o * of_columns(shrink, HEAD_DIM) for o, shrink in zip(results, shrinks, strict=True))


def of_columns(x, rows):
    """Repeats [COLUMNS] numbers in so many rows."""
    return jax.lax.broadcast_in_dim(x, (rows, COLUMNS), [1])
