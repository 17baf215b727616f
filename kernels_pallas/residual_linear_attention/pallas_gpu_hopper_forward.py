"""The Hopper kernels of the forward: sums over chunks, which the backward uses too, and outputs."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.residual_linear_attention.pallas_gpu_common import Plan
from kernels_pallas.residual_linear_attention.pallas_gpu_hopper import (
    TILE,
    columns,
    computing,
    copying,
    half_features,
    launch,
    load_places,
    load_rows,
    load_tile,
    masked,
    matmul,
    matmul_add,
    program,
    put,
    rows_to,
    tiles,
    wait_if,
    zeros,
)


def sums_call(plan: Plan, x, y, places, *, of_queries: bool):
    """Returns the sums φ(x)ᵀ y of all chunks, [B·K, chunks, 2, H, H]; x and y are q and do [B, T, N, H] or k and v.

    Each of two compute warpgroups takes one half of φ. `places` is that of
    the queries or the keys.
    """
    C, H = plan.chunk, plan.head_dim
    heads = plan.group if of_queries else 1
    span = 1 if of_queries else 4  # chunks of one program: enough work to hide the copies behind
    first = -plan.past_chunks * C + (0 if of_queries else plan.lag)

    def kernel(x_ref, y_ref, places_ref, sums_ref, x_s, y_s, phi_s, full, empty):
        wg, block, bk, b, kv_head = program(plan, "chunks")
        start = block * span
        count = jnp.minimum(span, plan.chunks - start)

        @copying(wg == 2)
        def _():
            @pl.loop(0, count * heads)
            def _(item):
                slot = jax.lax.rem(item, 2)
                wait_if(item >= 2, empty.at[slot])
                position = first + (start + jax.lax.div(item, heads)) * C
                at = (b, pl.ds(position, C), kv_head * heads + jax.lax.rem(item, heads))
                plgpu.copy_gmem_to_smem(x_ref.at[at], x_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(y_ref.at[at], y_s.at[slot], full.at[slot])

        @computing(wg < 2, registers=232)
        def _():
            sign = (1 - 2 * wg).astype(jnp.float32)

            @pl.loop(0, count)
            def _(i):
                c = start + i
                tile_rows = [pl.ds(tile * TILE, TILE) for tile in range(C // TILE)]
                takes = [load_rows(places_ref.at[b, c, 1, rows]).astype(jnp.float32) for rows in tile_rows]

                def head(h, sum_HV):
                    slot = jax.lax.rem(i * heads + h, 2)
                    plgpu.barrier_wait(full.at[slot])
                    for rows, take in zip(tile_rows, takes, strict=True):
                        phi = half_features(plan, load_tile(x_s.at[slot, rows]), sign)
                        phi_s.at[wg, rows][...] = (phi * rows_to(phi.shape, take)).astype(jnp.bfloat16)
                    plgpu.commit_smem()
                    sum_HV = matmul_add(sum_HV, (phi_s.at[wg].transpose((1, 0)), y_s.at[slot]))
                    plgpu.barrier_arrive(empty.at[slot])
                    return sum_HV

                sum_HV = jax.lax.fori_loop(0, heads, head, zeros((H, H)))
                put(phi_s.at[wg], sum_HV)
                plgpu.copy_smem_to_gmem(phi_s.at[wg], sums_ref.at[bk, c, wg])
                plgpu.wait_smem_to_gmem(0)

    return launch(
        plan,
        kernel,
        "rla_sums_of_queries" if of_queries else "rla_sums",
        ("chunks", -(-plan.chunks // span)),
        out_type=jax.ShapeDtypeStruct(plan.state_shape, x.dtype),
        scratch_types=[
            tiles(2, C, H),
            tiles(2, C, H),
            tiles(2, C, H),
            plgpu.Barrier(num_barriers=2, num_arrivals=2),
            plgpu.Barrier(num_barriers=2, num_arrivals=2),
        ],
    )(x, y, places)


def outputs_call(plan: Plan, q, k, v, places, states):
    """Returns o [B, T, N, H]. Each of two compute warpgroups takes one tile of the chunk's queries, head by head."""
    C, H, group = plan.chunk, plan.head_dim, plan.group

    def kernel(
        q_ref,
        k_ref,
        v_ref,
        q_places_ref,
        kv_places_ref,
        states_ref,
        o_ref,
        phi_k_s,
        state_s,
        v_s,
        ring,
        full,
        empty,
        loaded,
        met,
    ):
        wg, i, bk, b, kv_head = program(plan, "chunk")
        c, t = i + plan.past_chunks, i * C

        def query_tile(ref, tile, head):
            return ref.at[b, pl.ds(t + tile * TILE, TILE), kv_head * group + head]

        @copying(wg == 2)
        def _():
            for tile in range(2):
                k_tile = k_ref.at[b, pl.ds(t + plan.lag + tile * TILE, TILE), kv_head]
                plgpu.copy_gmem_to_smem(k_tile, ring.at[tile, 0], full.at[2 * tile + 0])
            for tile in range(2):
                plgpu.copy_gmem_to_smem(query_tile(q_ref, tile, 0), ring.at[tile, 1], full.at[2 * tile + 1])
            for half in range(2):
                plgpu.copy_gmem_to_smem(states_ref.at[bk, c, half], state_s.at[half], loaded)
            plgpu.copy_gmem_to_smem(v_ref.at[b, pl.ds(t + plan.lag, C), kv_head], v_s, loaded)

            @pl.loop(1, group)
            def _(g):
                slot = jax.lax.rem(g + 1, 2)
                for tile in range(2):
                    plgpu.barrier_wait(empty.at[2 * tile + slot])
                    plgpu.copy_gmem_to_smem(query_tile(q_ref, tile, g), ring.at[tile, slot], full.at[2 * tile + slot])

        @computing(wg < 2, registers=232)
        def _():
            rows = pl.ds(wg * TILE, TILE)
            readable, reads = load_places(plan, q_places_ref, kv_places_ref, (b, c), rows, rows_are_queries=True)
            reads = rows_to((TILE, H), reads.astype(jnp.float32)).astype(jnp.bfloat16)

            def features(slot):
                x = load_tile(ring.at[wg, slot])
                return [half_features(plan, x, sign).astype(jnp.bfloat16) for sign in plan.signs]

            plgpu.barrier_wait(full.at[2 * wg + 0])
            for half, phi in enumerate(features(0)):
                phi_k_s.at[half, rows][...] = phi
            plgpu.commit_smem()
            plgpu.barrier_arrive(empty.at[2 * wg + 0])
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)
            plgpu.barrier_wait(loaded)
            column = columns((TILE, C))

            @pl.loop(0, group)
            def _(g):
                slot = jax.lax.rem(g + 1, 2)
                plgpu.barrier_wait(full.at[2 * wg + slot])
                phi_q = features(slot)
                scores = matmul((TILE, C), *((phi, phi_k_s.at[h].transpose((1, 0))) for h, phi in enumerate(phi_q)))
                scores = masked(scores, column, readable)
                old = ((phi * reads, state_s.at[h]) for h, phi in enumerate(phi_q))
                put(ring.at[wg, slot], matmul((TILE, H), *old, (scores, v_s)))
                plgpu.copy_smem_to_gmem(ring.at[wg, slot], query_tile(o_ref, wg, g))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(empty.at[2 * wg + slot])

            plgpu.wait_smem_to_gmem(0)

    return launch(
        plan,
        kernel,
        "rla_outputs",
        ("chunk", plan.query_chunks),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[
            tiles(2, C, H),
            tiles(2, H, H),
            tiles(C, H),
            tiles(2, 2, TILE, H),
            plgpu.Barrier(num_barriers=4),
            plgpu.Barrier(num_barriers=4),
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_arrivals=2),
        ],
    )(q, k, v, *places, states)
