"""The Hopper kernels, forward and backward, in Mosaic GPU.

The work is moving memory, so a program is one warpgroup that computes on a tile of tokens of one head while the copy
engine brings the next one, and several programs share a multiprocessor. The backward knows a, b and the scales only: it
computes the norms again. A row of a tile lies in four lanes, a column in all warps.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import devices
from kernels_pallas.normed_sum import plain
from kernels_pallas.residual_linear_attention import pallas_gpu_hopper as hopper
from kernels_pallas.residual_linear_attention.pallas_gpu_hopper import TILE, WGMMA, load_tile, put, rows_to

TILES = 8  # tiles of one program
SCRATCH_BYTES = 8192  # with which a sum over rows meets in half of its columns at a time
COLUMNS = WGMMA.reduce(0)  # one value for each column of a tile


def forward(a_BTNH, b_BTNH, a_scale_NH, b_scale_NH, *, epsilon):
    """Returns o_BTNH; arguments as `normed_sum` checks them."""
    if not (devices.on_hopper() and fits(str(a_BTNH.dtype), a_BTNH.shape)):
        return plain.forward(a_BTNH, b_BTNH, a_scale_NH, b_scale_NH, epsilon=epsilon)
    a_MNH, b_MNH = (x.reshape(-1, *x.shape[2:]) for x in (a_BTNH, b_BTNH))
    return _kernels(epsilon, a_MNH, b_MNH, a_scale_NH, b_scale_NH).reshape(a_BTNH.shape)


def fits(dtype: str, shape: tuple[int, int, int, int]) -> bool:
    """Returns whether the kernels serve these inputs: whole tiles of tokens, whichever sequence they are of."""
    B, T, _, H = shape
    return dtype == "bfloat16" and H == 128 and B * T % TILE == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernels(epsilon, a_MNH, b_MNH, a_scale_NH, b_scale_NH):
    """Returns o_MNH; M counts the tokens of all sequences."""
    return _sum_call(epsilon, a_MNH, b_MNH, a_scale_NH, b_scale_NH)


def _kernels_forward(epsilon, *operands):
    return _kernels(epsilon, *operands), operands


def _kernels_backward(epsilon, operands, do_MNH):
    da_MNH, db_MNH, dscales_P2NH = _gradients_call(epsilon, *operands, do_MNH)
    return da_MNH, db_MNH, *dscales_P2NH.sum(axis=0)


_kernels.defvjp(_kernels_forward, _kernels_backward)


def _sum_call(epsilon, a_MNH, b_MNH, a_scale_NH, b_scale_NH):
    def kernel(a_ref, b_ref, a_scale_ref, b_scale_ref, o_ref, a_s, b_s, full):
        def work(place, head, slot, carry):
            o = 0.0
            for x_s, scale_ref in ((a_s, a_scale_ref), (b_s, b_scale_ref)):
                x = load_tile(x_s.at[slot])
                o += x * rows_to(x.shape, _inverse_rms(x, epsilon)) * _over_rows(x.shape, scale_ref.at[head])
            put(a_s.at[slot], o)
            plgpu.copy_smem_to_gmem(a_s.at[slot], o_ref.at[place])
            return carry

        _each_tile((a_ref, b_ref), (a_s, b_s), full, work, ())

    run = _launch(kernel, "normed_sum", a_MNH.shape, tensors=2, scratch_bytes=0, out_type=_like(a_MNH))
    return run(a_MNH, b_MNH, a_scale_NH, b_scale_NH)


def _gradients_call(epsilon, a_MNH, b_MNH, a_scale_NH, b_scale_NH, do_MNH):
    """Returns the gradients of a and b, and those of the scales [P, 2, N, H] in float32, a part from each program."""
    _, N, H = a_MNH.shape

    def kernel(a_ref, b_ref, a_scale_ref, b_scale_ref, do_ref, da_ref, db_ref, dscales_ref, a_s, b_s, do_s, full):
        sides = ((a_s, a_scale_ref, da_ref), (b_s, b_scale_ref, db_ref))

        def work(place, head, slot, dscales):
            added = []
            for (x_s, scale_ref, dx_ref), dscale in zip(sides, dscales, strict=True):
                x, do = load_tile(x_s.at[slot]), load_tile(do_s.at[slot])
                inverse = _inverse_rms(x, epsilon)
                added.append(dscale + (do * x * rows_to(x.shape, inverse)).sum(axis=0))
                dnormed = do * _over_rows(x.shape, scale_ref.at[head])
                along = inverse * (x * dnormed).sum(axis=1) / H
                dx = dnormed * rows_to(x.shape, inverse) - x * rows_to(x.shape, inverse * inverse * along)
                put(x_s.at[slot], dx)
                plgpu.copy_smem_to_gmem(x_s.at[slot], dx_ref.at[place])
            return tuple(added)

        zero = plgpu.layout_cast(jnp.full((H,), 0, jnp.float32), COLUMNS)
        dscales = _each_tile((a_ref, b_ref, do_ref), (a_s, b_s, do_s), full, work, (zero, zero))
        for side, dscale in enumerate(dscales):
            dscales_ref.at[jax.lax.axis_index("program"), side, jax.lax.axis_index("head")][...] = dscale

    parts = jax.ShapeDtypeStruct((_programs(a_MNH.shape), 2, N, H), jnp.float32)
    run = _launch(
        kernel,
        "normed_sum_gradients",
        a_MNH.shape,
        tensors=3,
        scratch_bytes=SCRATCH_BYTES,
        out_type=[_like(a_MNH), _like(b_MNH), parts],
    )
    return run(a_MNH, b_MNH, a_scale_NH, b_scale_NH, do_MNH)


def _launch(kernel, name, shape, *, tensors, scratch_bytes, out_type):
    """Returns a function of arrays that runs `kernel` with two tiles of shared memory for each of `tensors` arrays."""
    _, N, H = shape
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        # The last dim runs fastest: neighbours take the heads of the same tokens, which lie side by side.
        grid=(_programs(shape), N),
        grid_names=("program", "head"),
        kernel_name=name,
        scratch_types=[
            *(hopper.tiles(2, TILE, H) for _ in range(tensors)),
            plgpu.Barrier(num_barriers=2, num_arrivals=tensors),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=scratch_bytes),
    )


def _programs(shape):
    return pl.cdiv(shape[0], TILES * TILE)


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _each_tile(refs, tiles_s, full, work, carry):
    """Runs carry = work(place in the arrays, head, slot, carry) on a program's tiles; returns the last carry.

    Tiles of `refs` come to the slots of `tiles_s`; `work` may start copies from there, and reads nothing after that.
    """
    head, start = jax.lax.axis_index("head"), jax.lax.axis_index("program") * TILES
    count = jnp.minimum(TILES, refs[0].shape[0] // TILE - start)

    def place(i):
        return pl.ds((start + i) * TILE, TILE), head

    def fetch(i, slot):
        for ref, tile_s in zip(refs, tiles_s, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[place(i)], tile_s.at[slot], full.at[slot])

    fetch(0, 0)

    def step(i, carry):
        slot = jax.lax.rem(i, 2)
        # The slot that is filled next is the one that the results before this tile leave from.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(i + 1 < count)
        def _():
            fetch(i + 1, 1 - slot)

        plgpu.barrier_wait(full.at[slot])
        return work(place(i), head, slot, carry)

    carry = jax.lax.fori_loop(0, count, step, carry)
    plgpu.wait_smem_to_gmem(0)
    return carry


def _inverse_rms(x, epsilon):
    """Returns 1 / √(mean(x²) + ε) for each row of a tile."""
    return jax.lax.rsqrt((x * x).sum(axis=1) / x.shape[1] + epsilon)


def _over_rows(shape, ref):
    """Spreads one float32 a column, of device memory, over a tile."""
    return jax.lax.broadcast_in_dim(plgpu.load(ref, layout=COLUMNS, optimized=False), shape, [1])
