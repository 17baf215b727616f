"""The GPU kernels that run over all chunks in parallel, given the states: outputs, and gradients of q, k and v."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas.residual_linear_attention.pallas_gpu_common import (
    Plan,
    divmod_power_of_two,
    half_features,
    half_features_vjp,
    load_rows,
    store_rows,
)


def outputs_call(plan: Plan, documents, q, k, v, ids, states):
    """Returns o, rows of all heads in q's dtype."""
    return _call(plan, _outputs_kernel, plan.query_chunks, plan.blocks.outputs, [q], documents, q, k, v, *ids, states)


def dq_call(plan: Plan, documents, q, k, v, do, ids, states):
    """Returns the gradient of q."""
    return _call(plan, _dq_kernel, plan.query_chunks, plan.blocks.dq, [q], documents, q, k, v, do, *ids, states)


def dkv_call(plan: Plan, documents, q, k, v, do, ids, dstates):
    """Returns the gradients of k and v; `dstates` are those of the states that leave the chunks."""
    return _call(plan, _dkv_kernel, plan.key_chunks, plan.blocks.dkv, [k, v], documents, q, k, v, do, *ids, dstates)


def _call(plan, kernel, chunks, warps_and_stages, like, *arguments):
    warps, stages = warps_and_stages
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type) for x in like]
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(chunks, plan.batch * plan.kv_heads),
        out_shape=outs if len(outs) > 1 else outs[0],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=plan.interpret,
        name="rla" + kernel.__name__.removesuffix("_kernel"),
    )(*arguments)


class _Place:
    """What all three kernels know of the chunk that a program works on."""

    def __init__(self, plan, c, ids_refs, most_heads):
        bk = pl.program_id(1)
        self.plan, self.c, self.bk = plan, c, bk
        self.batch, self.kv_head = bk // plan.kv_heads, bk % plan.kv_heads
        self.key_rows = plan.key_rows(self.batch, c, self.kv_head)
        self.heads = plan.tile_heads(most_heads)
        _, position = divmod_power_of_two(jnp.arange(self.heads * plan.chunk), plan.chunk)
        self.mask = position[:, None] >= jnp.arange(plan.chunk)[None, :]  # of the keys that a tile's queries read
        if plan.has_ids:
            self.q_ids = plan.query_ids(ids_refs[0], self.batch, c, self.heads)
            self.kv_ids = plan.key_ids(ids_refs[1], self.batch, c)
            self.mask = self.mask & (self.q_ids[:, None] == self.kv_ids[None, :])

    def loop(self, body, carry):
        """Runs body(rows of a tile and which of them exist, carry) over the group's tiles."""

        def tile(i, carry):
            first_head = self.kv_head * self.plan.group + i * self.heads
            return body(self.plan.query_rows(self.batch, self.c, first_head, self.heads), carry)

        return jax.lax.fori_loop(0, self.plan.group // self.heads, tile, carry)

    def features(self, x_CH):
        """Returns the halves of φ(x), rounded to x's dtype."""
        halves = (half_features(self.plan, x_CH.astype(jnp.float32), sign) for sign in self.plan.signs)
        return [phi_CH.astype(x_CH.dtype) for phi_CH in halves]

    def load_blocks(self, ref, rows):
        """Returns the column blocks [C, columns] of rows of v or do."""
        return [load_rows(ref, *rows, columns) for columns in self.plan.column_blocks]

    def state_loader(self, states_ref):
        """Returns load(half, column block) -> [H, columns]; a state of one block is loaded once for all heads."""

        def load(half, block):
            return states_ref[self.bk, self.c, half, :, pl.ds(*self.plan.column_blocks[block])]

        if len(self.plan.column_blocks) > 1:
            return load
        loaded = [load(half, 0) for half in range(self.plan.halves)]
        return lambda half, block: loaded[half]


def _outputs_kernel(plan, documents_ref, q_ref, k_ref, v_ref, *refs):
    *ids_refs, states_ref, o_ref = refs
    here = _Place(plan, pl.program_id(0) + plan.past_chunks, ids_refs, plan.blocks.outputs_heads)
    phi_k = here.features(load_rows(k_ref, *here.key_rows))
    v_blocks = here.load_blocks(v_ref, here.key_rows)
    state = here.state_loader(states_ref)

    def tile(rows, _):
        phi_q = here.features(load_rows(q_ref, *rows))
        scores = sum(plan.dot(a, b, 1, 1) for a, b in zip(phi_q, phi_k, strict=True))
        scores = jnp.where(here.mask, scores, 0.0).astype(q_ref.dtype)
        for block, columns in enumerate(plan.column_blocks):
            o_CV = sum(plan.dot(phi_CH, state(half, block)) for half, phi_CH in enumerate(phi_q))
            if plan.has_ids:
                o_CV = jnp.where((here.q_ids == documents_ref[here.batch, here.c])[:, None], o_CV, 0.0)
            store_rows(o_ref, *rows, o_CV + plan.dot(scores, v_blocks[block]), columns)

    here.loop(tile, None)


def _dq_kernel(plan, documents_ref, q_ref, k_ref, v_ref, do_ref, *refs):
    *ids_refs, states_ref, dq_ref = refs
    here = _Place(plan, pl.program_id(0) + plan.past_chunks, ids_refs, plan.blocks.dq_heads)
    phi_k = here.features(load_rows(k_ref, *here.key_rows))
    v_blocks = here.load_blocks(v_ref, here.key_rows)
    state = here.state_loader(states_ref)

    def tile(rows, _):
        q_CH = load_rows(q_ref, *rows).astype(jnp.float32)
        do_blocks = here.load_blocks(do_ref, rows)
        dscores = sum(plan.dot(a, b, 1, 1) for a, b in zip(do_blocks, v_blocks, strict=True))
        dscores = jnp.where(here.mask, dscores, 0.0).astype(q_ref.dtype)
        dq_CH = jnp.zeros(q_CH.shape, jnp.float32)
        for half, sign in enumerate(plan.signs):
            dphi_CH = sum(plan.dot(do_CV, state(half, block), 1, 1) for block, do_CV in enumerate(do_blocks))
            if plan.has_ids:
                dphi_CH = jnp.where((here.q_ids == documents_ref[here.batch, here.c])[:, None], dphi_CH, 0.0)
            dphi_CH += plan.dot(dscores, phi_k[half])
            phi_CH = half_features(plan, q_CH, sign)
            dq_CH += half_features_vjp(plan, phi_CH, dphi_CH, sign)
        store_rows(dq_ref, *rows, dq_CH)

    here.loop(tile, None)


def _dkv_kernel(plan, documents_ref, q_ref, k_ref, v_ref, do_ref, *refs):
    *ids_refs, dstates_ref, dk_ref, dv_ref = refs
    here = _Place(plan, pl.program_id(0), ids_refs, plan.blocks.dkv_heads)  # program ids cannot be read inside `when`

    @pl.when(here.c < plan.chunks)
    def _():
        _dkv_chunk(plan, here, documents_ref, q_ref, k_ref, v_ref, do_ref, dstates_ref, dk_ref, dv_ref)

    @pl.when(here.c >= plan.chunks)
    def _():
        rows = _existing_keys(plan, here)
        for ref in (dk_ref, dv_ref):
            store_rows(ref, *rows, jnp.zeros((plan.chunk, plan.head_dim), ref.dtype))


def _dkv_chunk(plan, here, documents_ref, q_ref, k_ref, v_ref, do_ref, dstates_ref, dk_ref, dv_ref):
    k_CH = load_rows(k_ref, *here.key_rows)
    phi_k = here.features(k_CH)
    v_blocks = here.load_blocks(v_ref, here.key_rows)
    dphi_k, dv_blocks = [0.0] * plan.halves, [0.0] * len(v_blocks)
    for block, columns in enumerate(plan.column_blocks):
        for half in range(plan.halves):
            dstate_HV = dstates_ref[here.bk, here.c, half, :, pl.ds(*columns)]
            dphi_k[half] += plan.dot(v_blocks[block], dstate_HV, 1, 1)
            dv_blocks[block] += plan.dot(phi_k[half], dstate_HV)
    if plan.has_ids:
        joins = (here.kv_ids == documents_ref[here.batch, here.c + 1])[:, None]
        dphi_k, dv_blocks = ([jnp.where(joins, x, 0.0) for x in xs] for xs in (dphi_k, dv_blocks))

    def tile(rows, carry):
        dphi_k, dv_blocks = carry
        phi_q = here.features(load_rows(q_ref, *rows))
        do_blocks = here.load_blocks(do_ref, rows)
        scores = sum(plan.dot(a, b, 1, 1) for a, b in zip(phi_k, phi_q, strict=True))
        scores = jnp.where(here.mask.T, scores, 0.0).astype(q_ref.dtype)
        dscores = sum(plan.dot(a, b, 1, 1) for a, b in zip(v_blocks, do_blocks, strict=True))
        dscores = jnp.where(here.mask.T, dscores, 0.0).astype(q_ref.dtype)
        dphi_k = [a + plan.dot(dscores, b) for a, b in zip(dphi_k, phi_q, strict=True)]
        dv_blocks = [a + plan.dot(scores, b) for a, b in zip(dv_blocks, do_blocks, strict=True)]
        return dphi_k, dv_blocks

    dphi_k, dv_blocks = here.loop(tile, (dphi_k, dv_blocks))
    dk_CH = jnp.zeros(k_CH.shape, jnp.float32)
    for half, sign in enumerate(plan.signs):
        phi_CH = half_features(plan, k_CH.astype(jnp.float32), sign)
        dk_CH += half_features_vjp(plan, phi_CH, dphi_k[half], sign)
    rows, exists = _existing_keys(plan, here)
    read = here.key_rows[1][:, None]
    store_rows(dk_ref, rows, exists, jnp.where(read, dk_CH, 0.0))
    for columns, dv_CV in zip(plan.column_blocks, dv_blocks, strict=True):
        store_rows(dv_ref, rows, exists, jnp.where(read, dv_CV, 0.0), columns)


def _existing_keys(plan, here):
    """Returns the rows of a chunk's keys, and which of them exist, whether or not a query reads them."""
    position = plan.key_positions(here.c)
    return here.key_rows[0], (position >= 0) & (position < plan.kv_len)
