"""What kernels of a step need and Pallas' Mosaic GPU has no word for, in Mosaic's own and in assembly.

Copies to shared memory by threads, which do not stand in the copy engine's line; counters in device memory, by which
programs wait for each other; a layout of few rows, and what warps find of theirs.

And what those kernels have in common: how many rows they multiply, what the compiler may not add.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu

# Threads of a warpgroup, and bytes that one of them copies at a time.
WARPGROUP, CHUNK = 128, 16
# Numbers of bfloat16 in a line of shared memory, or of the cache.
LINE = 64
# Rows that a warpgroup multiplies, whatever there are: the fewest that tensor cores take.
GROUP_ROWS = 64
# Multiprocessors of an H100 or H200; with another number only speed differs.
MULTIPROCESSORS = 132
# How sums of products lie, and tiles that they read.
WGMMA = plgpu.Layout.WGMMA
TRANSFORMS = (plgpu.TilingTransform((8, LINE)), plgpu.SwizzleTransform(2 * LINE))


def compiler_params(**more):
    """Returns parameters of kernels that say all layouts and barriers themselves: none is inferred, none added."""
    return plgpu.CompilerParams(
        unsafe_no_auto_barriers=True,
        reduction_scratch_bytes=0,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        **more,
    )


def padded(x_BD):
    """Returns the rows of x with others behind them, to as many as warpgroups multiply."""
    return jnp.pad(x_BD, ((0, -x_BD.shape[0] % GROUP_ROWS), (0, 0)))


def rows_layout(rows, columns):
    """Returns the layout of [rows, columns] in which a warp has rows / 4, and a lane neighbours in a row."""
    warp_rows = rows // 4
    vector = columns * warp_rows // 32
    tiles = (rows, columns), (warp_rows, columns), (1, vector)
    layout = fragmented_array.TiledLayout(
        fragmented_array.Tiling(tiles), warp_dims=(-6,), lane_dims=(-4, -3), vector_dim=-1, _check_canonical=False
    ).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def halves(ref):
    """Returns both halves of rows [rows, H]."""
    half = ref.shape[1] // 2
    return [ref.at[:, pl.ds(m * half, half)] for m in (0, 1)]


def spread(x, layout, shape, dim):
    """Repeats x, a number for every index of `dim`, over the other dim of `shape`."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(x, shape, [dim]), layout)


def rounded(x):
    """Rounds float32 numbers to bfloat16."""
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def load_across(ref, layout, shape):
    """Loads as many numbers as `shape` has columns, for each of its rows, as float32."""
    x = plgpu.load(ref, layout=layout.reduce(0), optimized=False).astype(jnp.float32)
    return spread(x, layout, shape, 1)


def store_transposed(x, place):
    """Stores x, [rows, columns] as WGMMA lies, in place [columns, rows]."""
    place.transpose((1, 0))[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


def queries_of(group):
    """Returns how many rows or columns a group's queries have: as many as four warps write, at most eight."""
    return 4 if group <= 4 else 8


def store_of_warps(kind, x, place, interpret):
    """Stores in place [4, columns] the "max" or "add" of each warp's 16 rows of x, float32 [64, columns] as WGMMA lies.

    Nobody is told: a barrier has to follow.
    """
    if interpret:
        x = x.reshape(4, -1, x.shape[1])
        place[...] = x.max(axis=1) if kind == "max" else x.sum(axis=1)
        return
    operation = {"max": arith.maximumf, "add": arith.addf}[kind]

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
    def store(_, x, place):
        number = _Number
        warp, pair = number.thread() // 32, number.thread() % 4
        at = llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(place))
        columns = x.shape[1]
        # [tiles of eight columns, halves of a warp's rows] of pairs.
        for tile, halves in enumerate(x.registers.reshape(columns // 8, 2)):
            found = operation(*halves)
            for lanes in (4, 8, 16):
                found = operation(found, utils.shfl_bfly(found, lanes))
            address = warp * (4 * columns) + pair * 8 + _Number(at)
            numbers = [llvm.extractelement(found, arith.constant(ir.IntegerType.get_signless(32), n)) for n in (0, 1)]
            _assembly(f"st.shared.v2.f32 [$0 + {32 * tile}], {{$1, $2}};", "r,f,f,~{memory}", address.value, *numbers)

    store(x, place)


def wait_if(condition, barrier):
    """Waits for a barrier where `condition` is true."""
    pl.when(condition)(lambda: plgpu.barrier_wait(barrier))


def copy(source, slot, rows, numbers, stride):
    """Copies a tile [rows, numbers] to shared memory, as one group; `stride` is what lies between the source's rows."""
    chunks = 2 * numbers // CHUNK
    # A thread's chunks stand below each other, so many rows apart, and lie alike every eight rows.
    apart = WARPGROUP // chunks
    alike = max(1, 8 // apart)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(TRANSFORMS)))
    def begin(_, source, slot):
        number, i64 = _Number, ir.IntegerType.get_signless(64)
        place = number(llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(slot)))
        row, column = number.thread() // chunks, number.thread() % chunks
        at = (row * (2 * stride) + column * CHUNK).beside(llvm.ptrtoint(i64, utils.memref_ptr(source)))
        to = [offset(row + n * apart, column, numbers) + place for n in range(alike)]
        for n in range(rows // apart):
            # Only the first of those that lie alike is computed.
            below = n // alike * alike * apart
            text = "cp.async.cg.shared.global.L2::256B [$0 + {}], [$1 + {}], 16;"
            text = text.format(below // 8 * (numbers // LINE) * 1024, n * apart * 2 * stride)
            _assembly(text, "r,l", to[n % alike].value, at)
        _assembly("cp.async.commit_group;")

    begin(source, slot)


def offset(row, chunk, numbers):
    """Returns where a chunk of a tile [rows, numbers] lies in shared memory, in bytes, as matrix products read it.

    In tiles of eight rows by LINE numbers, 1 KiB each, in whose row r chunk c is at c xor r.
    """
    tile = row // 8 * (numbers // LINE) + chunk // 8
    return tile * 1024 + row % 8 * 128 + (chunk % 8 ^ row % 8) * CHUNK


@dataclasses.dataclass(frozen=True)
class _Number:
    """An unsigned number of 32 bits in a thread, with Python's arithmetic."""

    value: ir.Value

    @classmethod
    def thread(cls):
        """The thread's number in its warpgroup."""
        return cls(utils.thread_idx()) % WARPGROUP

    def __add__(self, other):
        return _Number(arith.addi(self.value, self._of(other)))

    def __mul__(self, other):
        return _Number(arith.muli(self.value, self._of(other)))

    def __floordiv__(self, other):
        return _Number(arith.divui(self.value, self._of(other)))

    def __mod__(self, other):
        return _Number(arith.remui(self.value, self._of(other)))

    def __xor__(self, other):
        return _Number(arith.xori(self.value, self._of(other)))

    def beside(self, address):
        """Returns an address of 64 bits that is so many bytes further."""
        return arith.addi(address, arith.extui(address.type, self.value))

    def _of(self, other):
        return other.value if isinstance(other, _Number) else utils.c(other, self.value.type)


def wait_for_copies(but):
    """Waits for the thread's groups of copies but for the newest.

    Tensor cores are shown them by who waits for this thread (`show_copies`): here it would wait for the newest, too.
    """
    plgpu.inline_mgpu()(lambda _: _assembly(f"cp.async.wait_group {but};"))()


def show_copies():
    """Shows the tensor cores what other threads have copied to shared memory."""
    plgpu.inline_mgpu()(lambda _: _assembly("fence.proxy.async.shared::cta;"))()


def join():
    """Waits for all warps of the warpgroup."""
    plgpu.inline_mgpu()(lambda _: utils.warpgroup_barrier())()


def count(counter):
    """Adds one to an int32 of device memory, after all that the warpgroup has written."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def add(_, counter):
        utils.warpgroup_barrier()
        utils.SemaphoreRef(utils.memref_ptr(counter)).signal(1, memory_scope="gpu")

    add(counter)


def wait_for_count(counter, value):
    """Waits until an int32 of device memory is at least `value`; what its counters wrote before can then be read."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def wait(_, counter):
        utils.SemaphoreRef(utils.memref_ptr(counter)).wait(value, decrement=False, memory_scope="gpu")
        _assembly("fence.proxy.async;")  # For what the copy engine reads.

    wait(counter)


def none_ready() -> jax.Array:
    """Returns what a first call of attention takes as `ready`: for each program whether a part of its is there."""
    return jnp.zeros(MULTIPROCESSORS, jnp.int32)


def say_ready(ready, interpret):
    """Sets an int32 of device memory to one, after all that the warpgroup has written."""
    if interpret:
        ready[...] = jnp.int32(1)
    else:
        count(ready)


def take_ready(ready, interpret):
    """Waits until `say_ready` was called for an int32 of device memory, and clears it for the next time."""
    if interpret:
        jax.lax.while_loop(lambda found: found < 1, lambda _: ready[...], ready[...])
    else:
        wait_for_count(ready, 1)
    ready[...] = jnp.int32(0)


def _assembly(text, constraints="", *operands):
    llvm.inline_asm(ir.Type.parse("!llvm.void"), list(operands), text, constraints, has_side_effects=True)
