"""The Hopper kernels of the backward: the gradients of q, and of k and v. The sums over φ(q)ᵀ do are the forward's."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.residual_linear_attention.pallas_gpu_common import Plan
from kernels_pallas.residual_linear_attention.pallas_gpu_hopper import (
    TILE,
    WGMMA,
    columns,
    computing,
    copying,
    half_features,
    half_features_vjp,
    launch,
    load_places,
    load_tile,
    masked,
    matmul,
    matmul_add,
    program,
    put,
    rows_to,
    tiles,
    wait_if,
)


def dq_call(plan: Plan, q, k, v, do, places, states):
    """Returns the gradient of q [B, T, N, H]. Compute warpgroups take a tile each, head by head."""
    C, H, group = plan.chunk, plan.head_dim, plan.group

    def kernel(
        q_ref,
        k_ref,
        v_ref,
        do_ref,
        q_places_ref,
        kv_places_ref,
        states_ref,
        dq_ref,
        phi_k_s,
        state_s,
        v_s,
        q_s,
        do_s,
        *barriers,
    ):
        q_full, q_empty, do_full, do_empty, loaded, met = barriers
        wg, i, bk, b, kv_head = program(plan, "chunk")
        c, t = i + plan.past_chunks, i * C

        def query_tile(ref, tile, head):
            return ref.at[b, pl.ds(t + tile * TILE, TILE), kv_head * group + head]

        @copying(wg == 2)
        def _():
            for tile in range(2):
                k_tile = k_ref.at[b, pl.ds(t + plan.lag + tile * TILE, TILE), kv_head]
                plgpu.copy_gmem_to_smem(k_tile, q_s.at[tile], q_full.at[tile])
            plgpu.copy_gmem_to_smem(v_ref.at[b, pl.ds(t + plan.lag, C), kv_head], v_s, loaded)
            for tile in range(2):
                plgpu.copy_gmem_to_smem(query_tile(do_ref, tile, 0), do_s.at[tile], do_full.at[tile])
            for half in range(2):
                plgpu.copy_gmem_to_smem(states_ref.at[bk, c, half], state_s.at[half], loaded)

            @pl.loop(0, group)
            def _(g):
                for tile in range(2):
                    plgpu.barrier_wait(q_empty.at[tile])
                    plgpu.copy_gmem_to_smem(query_tile(q_ref, tile, g), q_s.at[tile], q_full.at[tile])

                @pl.when(g < group - 1)
                def _():
                    for tile in range(2):
                        plgpu.barrier_wait(do_empty.at[tile])
                        plgpu.copy_gmem_to_smem(query_tile(do_ref, tile, g + 1), do_s.at[tile], do_full.at[tile])

        @computing(wg < 2, registers=232)
        def _():
            rows = pl.ds(wg * TILE, TILE)
            readable, reads = load_places(plan, q_places_ref, kv_places_ref, (b, c), rows, rows_are_queries=True)
            reads = rows_to((TILE, H), reads.astype(jnp.float32)).astype(jnp.bfloat16)
            plgpu.barrier_wait(q_full.at[wg])
            k_tile = load_tile(q_s.at[wg])
            for half, sign in enumerate(plan.signs):
                phi_k_s.at[half, rows][...] = half_features(plan, k_tile, sign).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.barrier_arrive(q_empty.at[wg])
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)
            plgpu.barrier_wait(loaded)
            column = columns((TILE, C))

            @pl.loop(0, group)
            def _(g):
                plgpu.barrier_wait(do_full.at[wg])
                do = plgpu.load(do_s.at[wg], layout=WGMMA)
                dscores = matmul((TILE, C), (do, v_s.transpose((1, 0))))
                plgpu.barrier_arrive(do_empty.at[wg])
                dscores = masked(dscores, column, readable)
                do = do * reads
                plgpu.barrier_wait(q_full.at[wg])
                dq = None
                for half, sign in enumerate(plan.signs):
                    dphi = matmul((TILE, H), (do, state_s.at[half].transpose((1, 0))), (dscores, phi_k_s.at[half]))
                    phi = half_features(plan, load_tile(q_s.at[wg]), sign)
                    part = half_features_vjp(plan, phi, dphi, sign)
                    dq = part if dq is None else dq + part
                put(q_s.at[wg], dq)
                plgpu.copy_smem_to_gmem(q_s.at[wg], query_tile(dq_ref, wg, g))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_empty.at[wg])

            plgpu.wait_smem_to_gmem(0)

    return launch(
        plan,
        kernel,
        "rla_dq",
        ("chunk", plan.query_chunks),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[
            tiles(2, C, H),
            tiles(2, H, H),
            tiles(C, H),
            tiles(2, TILE, H),
            tiles(2, TILE, H),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_arrivals=2),
        ],
    )(q, k, v, do, *places, states)


def dkv_call(plan: Plan, q, k, v, do, places, dstates):
    """Returns the gradients of k and v [B, S, K, H].

    One program serves one tile of keys. Compute warpgroups 0 and 1 take a half of φ each: φ(q) for everybody, dφ(k) and
    so dk; warpgroup 2 takes dv.
    """
    C, H, group = plan.chunk, plan.head_dim, plan.group
    per_chunk = C // TILE

    def kernel(q_ref, k_ref, v_ref, do_ref, q_places_ref, kv_places_ref, dstates_ref, dk_ref, dv_ref, *scratch):
        k_s, v_s, phi_k_s, dstate_s, phi_q_s, q_s, do_s, *barriers = scratch
        (
            q_full,
            q_empty,
            do_full,
            do_empty,
            phi_full,
            phi_empty,
            part_full,
            part_empty,
            loaded,
            phi_k_full,
        ) = barriers
        wg, i, bk, b, kv_head = program(plan, "tile")
        c, tile = jax.lax.div(i, per_chunk), jax.lax.rem(i, per_chunk)
        t = (c - plan.past_chunks) * C
        query_tiles = per_chunk - tile  # those before the keys' own read none of them
        items = jnp.where((c >= plan.past_chunks) & (c < plan.chunks), group * query_tiles, 0)
        first_key = t + plan.lag + tile * TILE
        at_keys = (b, pl.ds(first_key, TILE), kv_head)

        def store_keys(tile_s, ref):
            """Starts the copy of a result's rows that exist: the copy engine may not write from before row 0 on."""
            missing = -plan.lag % TILE  # rows, in the one tile that lies across row 0

            @pl.when(first_key >= 0)
            def _():
                plgpu.copy_smem_to_gmem(tile_s, ref.at[at_keys])

            if missing:

                @pl.when(first_key == -missing)
                def _():
                    rest = TILE - missing
                    plgpu.copy_smem_to_gmem(tile_s.at[pl.ds(missing, rest)], ref.at[b, pl.ds(0, rest), kv_head])

        def query_tile_of(item):
            return tile + jax.lax.rem(item, query_tiles)

        @copying(wg == 3)
        def _():
            plgpu.copy_gmem_to_smem(k_ref.at[at_keys], k_s, loaded)
            plgpu.copy_gmem_to_smem(v_ref.at[at_keys], v_s, loaded)
            for half in range(2):
                of_state = dstates_ref.at[bk, jnp.minimum(c, plan.chunks - 1), half]
                plgpu.copy_gmem_to_smem(of_state, dstate_s.at[half], loaded)

            @pl.loop(0, items)
            def _(item):
                slot = jax.lax.rem(item, 2)
                head = kv_head * group + jax.lax.div(item, query_tiles)
                at = (b, pl.ds(t + query_tile_of(item) * TILE, TILE), head)
                wait_if(item >= 2, q_empty.at[slot])
                plgpu.copy_gmem_to_smem(q_ref.at[at], q_s.at[slot], q_full.at[slot])
                wait_if(item >= 2, do_empty.at[slot])
                plgpu.copy_gmem_to_smem(do_ref.at[at], do_s.at[slot], do_full.at[slot])

        def mask_and_joins():
            """Returns mask(scores, item) for the item's tile of queries, and which keys join, over a tile."""
            rows = pl.ds(tile * TILE, TILE)
            readable, joins = load_places(plan, kv_places_ref, q_places_ref, (b, c), rows, rows_are_queries=False)
            column = columns((TILE, TILE))

            def mask(scores, item):
                return masked(scores, column + query_tile_of(item) * TILE, readable)

            return mask, rows_to((TILE, H), joins.astype(jnp.float32))

        @computing(wg < 2, registers=152)
        def _():
            mask, joins = mask_and_joins()
            sign = (1 - 2 * wg).astype(jnp.float32)
            plgpu.barrier_wait(loaded)
            phi_k = half_features(plan, load_tile(k_s), sign)
            put(phi_k_s.at[wg], phi_k)
            plgpu.barrier_arrive(phi_k_full)

            def step(item, dphi):
                slot = jax.lax.rem(item, 2)
                plgpu.barrier_wait(q_full.at[slot])
                phi_q = half_features(plan, load_tile(q_s.at[slot]), sign).astype(jnp.bfloat16)
                plgpu.barrier_arrive(q_empty.at[slot])
                wait_if(item > 0, phi_empty)
                put(phi_q_s.at[wg], phi_q)
                plgpu.barrier_arrive(phi_full)
                plgpu.barrier_wait(do_full.at[slot])
                dscores = matmul((TILE, TILE), (v_s, do_s.at[slot].transpose((1, 0))))
                plgpu.barrier_arrive(do_empty.at[slot])
                dscores = mask(dscores, item)
                return matmul_add(dphi, (dscores, phi_q_s.at[wg]))

            dphi = matmul((TILE, H), (v_s, dstate_s.at[wg].transpose((1, 0)))) * joins
            dphi = jax.lax.fori_loop(0, items, step, dphi)
            phi_k = half_features(plan, load_tile(k_s), sign)
            part = half_features_vjp(plan, phi_k, dphi, sign)

            # Half 1 goes to warpgroup 0 through shared memory, as two bfloat16 that add up to it.
            @pl.when(wg == 1)
            def _():
                wait_if(items > 0, phi_empty)
                high = part.astype(jnp.bfloat16)
                put(phi_q_s.at[1], high)
                plgpu.barrier_arrive(part_full)
                plgpu.barrier_wait(part_empty)
                put(phi_q_s.at[1], part - high.astype(jnp.float32))
                plgpu.barrier_arrive(part_full)

            @pl.when(wg == 0)
            def _():
                plgpu.barrier_wait(part_full)
                dk = part + load_tile(phi_q_s.at[1])
                plgpu.barrier_arrive(part_empty)
                plgpu.barrier_wait(part_full)
                put(k_s, dk + load_tile(phi_q_s.at[1]))
                store_keys(k_s, dk_ref)
                plgpu.wait_smem_to_gmem(0)

        @computing(wg == 2, registers=152)
        def _():
            mask, joins = mask_and_joins()
            plgpu.barrier_wait(phi_k_full)
            plgpu.barrier_wait(loaded)

            def step(item, dv):
                slot = jax.lax.rem(item, 2)
                plgpu.barrier_wait(phi_full)
                scores = matmul((TILE, TILE), *((phi_k_s.at[h], phi_q_s.at[h].transpose((1, 0))) for h in range(2)))
                plgpu.barrier_arrive(phi_empty)
                scores = mask(scores, item)
                plgpu.barrier_wait(do_full.at[slot])
                dv = matmul_add(dv, (scores, do_s.at[slot]))
                plgpu.barrier_arrive(do_empty.at[slot])
                return dv

            dv = matmul((TILE, H), *((phi_k_s.at[half], dstate_s.at[half]) for half in range(2))) * joins
            put(phi_k_s.at[0], jax.lax.fori_loop(0, items, step, dv))
            store_keys(phi_k_s.at[0], dv_ref)
            plgpu.wait_smem_to_gmem(0)

    return launch(
        plan,
        kernel,
        "rla_dkv",
        ("tile", plan.key_chunks * per_chunk),
        warpgroups=4,
        out_type=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        scratch_types=[
            tiles(TILE, H),
            tiles(TILE, H),
            tiles(2, TILE, H),
            tiles(2, H, H),
            tiles(2, TILE, H),
            tiles(2, TILE, H),
            tiles(2, TILE, H),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=2, num_arrivals=2),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=2, num_arrivals=3),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(),
            plgpu.Barrier(),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=4),
            plgpu.Barrier(num_arrivals=2),
        ],
    )(q, k, v, do, *places, dstates)
