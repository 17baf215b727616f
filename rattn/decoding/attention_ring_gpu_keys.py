"""The warpgroups of `attention_ring_gpu` that make weights of keys for the softmax branch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rattn.decoding import mosaic_gpu
from rattn.decoding.attention_gpu_program import LEAST, rotated
from rattn.decoding.attention_ring_gpu_plan import FIRST_TAKER, HALF, HEAD_DIM, KEY_WARPGROUPS, TILE
from rattn.decoding.attention_ring_gpu_warpgroup import Warpgroup
from rattn.decoding.mosaic_gpu import WGMMA, halves, rounded, spread
from rattn.decoding.triton_gpu import LOG2_E

COLUMNS_OF_WGMMA = WGMMA.reduce(0)


class Keys(Warpgroup):
    """A warpgroup that takes every other tile of keys."""

    def __init__(self, *args: Any):
        """Takes what `Warpgroup` does."""
        super().__init__(*args)
        self.taker = jax.lax.axis_index("warpgroup") - FIRST_TAKER
        self.count = jax.lax.div(self.call.tiles - self.taker + KEY_WARPGROUPS - 1, jnp.int32(KEY_WARPGROUPS))

    def run(self) -> None:
        """Makes weights of the keys."""
        table = [plgpu.load(self.turns.at[n], layout=WGMMA, optimized=False) for n in range(4)]
        rows = 2 * self.call.Q
        ones = plgpu.layout_cast(jnp.ones((rows, TILE), jnp.bfloat16), mosaic_gpu.rows_layout(rows, TILE))
        self.ones.at[self.taker][...] = ones
        self.wait_for_kernel_before()

        def weigh(job):
            self.if_one(job.softmax, lambda: self.weigh(table, job))
            if self.call.division.linear_each > 1:
                pl.when(job.softmax == 0)(lambda: self.pass_over(job))

        self.for_jobs(weigh)

    def pass_over(self, job):
        """Waits for what is new of a job without keys, as for every other job's."""
        slot = self.new_slot(job.i)
        plgpu.barrier_wait(self.new_full.at[slot])
        plgpu.barrier_arrive(self.new_empty.at[slot])

    def tile(self, n):
        """Returns the warpgroup's tile number n."""
        return self.taker + n * KEY_WARPGROUPS

    def weigh(self, table, job):
        """Writes the softmax branch's weights of a head's keys, their maximum and sums."""
        call, i, b = self.call, job.i, job.b
        newest, known = self.counts[b, 0], self.counts[b, 1]
        reach = jnp.minimum(call.W, known)
        with jax.named_scope("turn queries"):
            self.turn_queries(i)
            plgpu.commit_smem()
        shape = TILE, 2 * call.Q
        row, column = (plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, shape, dim), WGMMA) for dim in (0, 1))
        # Ages of the first tile's keys, were they written since the ring went round (columns below Q) or before it did.
        begin = newest + jnp.where(column >= call.Q, call.S, 0) - row

        def of_tile(n, scores):
            t = self.tile(n)
            place = call.place(call.numbers(job).keys + t)
            with jax.named_scope("wait for keys"):
                plgpu.barrier_wait(self.keys_full.at[t])
            keys = [plgpu.load(half, layout=WGMMA, optimized=False) for half in halves(self.rows.at[place])]
            plgpu.barrier_arrive(self.empty.at[place])
            with jax.named_scope("score keys"):
                found = self.products(table, keys, t)
                ages = begin - t * TILE
                visible = (ages > 0) & (ages < reach)
                if call.S % TILE:
                    visible = visible & (row < call.S - t * TILE)
                found = jnp.where(visible, found * (HEAD_DIM**-0.5 * LOG2_E), LEAST)
            # The last tile's scores are the last: registers have no numbers that are known only when a program runs. A
            # warpgroup that has a tile less keeps a first one of LEAST.
            return *scores[1:], found

        none = plgpu.layout_cast(jnp.full(shape, LEAST, jnp.float32), WGMMA)
        scores = jax.lax.fori_loop(0, self.count, of_tile, (none,) * call.most_key_tiles)
        with jax.named_scope("wait for answers"):
            mosaic_gpu.wait_if(i > 0, self.weights_empty)
        with jax.named_scope("most"):
            most, new = self.most_of(scores)
        with jax.named_scope("weigh"):
            self.store_softmax(scores, most, new)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.weights_full)

    def store_softmax(self, scores, most, new):
        """Stores e^(score − most) of the warpgroup's tiles, their sums, and the new key's."""
        call, total = self.call, None
        for number, score in enumerate(scores):
            n = self.count - call.most_key_tiles + number
            weights = jnp.exp2(score - jax.lax.broadcast_in_dim(most, score.shape, [1]))
            total = weights if total is None else total + weights
            pl.when(n >= 0)(functools.partial(self.store_weights, 0, self.tile(n), weights))
        mosaic_gpu.store_of_warps("add", total, self.totals.at[self.taker], self.plan.interpret)

        @pl.when(self.taker == 0)
        def _():
            self.most[...] = most
            self.weight[...] = jnp.exp2(new - most)

    def most_of(self, scores):
        """Returns the largest score of all tiles and the new key, and the new key's, [2 Q]."""
        most = functools.reduce(jnp.maximum, scores)
        mosaic_gpu.store_of_warps("max", most, self.maxima.at[self.taker], self.plan.interpret)
        plgpu.barrier_arrive(self.maxima_full)
        plgpu.barrier_wait(self.maxima_full)
        rows = [
            self.score.at[self.taker],
            *(self.maxima.at[n, warp] for n in range(KEY_WARPGROUPS) for warp in range(4)),
        ]
        new, *others = [plgpu.load(row, layout=COLUMNS_OF_WGMMA, optimized=False) for row in rows]
        return functools.reduce(jnp.maximum, others, new), new

    def turn_queries(self, i):
        """Norms and turns the new queries for the warpgroup's tiles, and writes the new key's score."""
        call = self.call
        Q, rows = call.Q, 2 * call.Q
        layout, shape = mosaic_gpu.rows_layout(rows, HALF), (rows, HALF)
        of_halves = [pl.ds(n * HALF, HALF) for n in (0, 1)]

        across = functools.partial(mosaic_gpu.load_across, layout=layout, shape=shape)
        # On their way before the queries are there.
        first = pl.ds(self.taker * rows, rows)
        sin, cos = (plgpu.load(self.angles.at[n, first], layout=layout, optimized=False) for n in (0, 1))
        next_sin, next_cos = (across(self.angles.at[n, KEY_WARPGROUPS * rows]) for n in (0, 1))
        scales = (
            [[across(scale.at[half]) for half in of_halves] for scale in (self.q_scale, self.k_scale)]
            if self.plan.normed
            else None
        )
        slot = self.new_slot(i)
        plgpu.barrier_wait(self.new_full.at[slot])

        def normed(x, which):
            if not self.plan.normed:
                return x
            square = (x[0] * x[0] + x[1] * x[1]).sum(axis=1)
            inverse = jax.lax.rsqrt(square / HEAD_DIM + self.plan.epsilon)
            inverse = spread(inverse, layout, shape, 0)
            return [rounded(y * inverse * scale) for y, scale in zip(x, scales[which], strict=True)]

        queries = halves(self.new.at[slot, pl.ds(0, rows)])
        q = [plgpu.load(half, layout=layout, optimized=False) for half in queries]
        q = normed([x.astype(jnp.float32) for x in q], 0)
        k = normed([across(self.new.at[slot, 2 * Q, half]) for half in of_halves], 1)
        plgpu.barrier_arrive(self.new_empty.at[slot])

        def of_tile(n, turned):
            for half, x in zip(halves(self.queries.at[self.tile(n)]), turned, strict=True):
                half[...] = x.astype(jnp.bfloat16)
            return rotated(turned, (next_sin, next_cos))

        jax.lax.fori_loop(0, self.count, of_tile, rotated(q, (sin, cos)))
        score = sum((x * y).sum(axis=1) for x, y in zip(q, k, strict=True)) * (HEAD_DIM**-0.5 * LOG2_E)
        row = plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, shape, 0), layout).max(axis=1)
        self.score.at[self.taker][...] = jnp.where(row < Q, score, LEAST)

    def products(self, table, keys, t):
        """Returns the products, float32 [TILE, 2 Q], of a tile's keys, normed and turned, and its queries.

        All that is multiplied is bfloat16: both halves of the keys, [TILE, H/2] each, and the four of `table`, which
        scales them and turns them by their place in their tile (`attention_gpu.key_turns`).

        Squares are rounded to bfloat16, which their sum does not notice, and added up by a product, whose result lies
        as the scores do.
        """
        columns = 2 * self.call.Q
        (ka, kb), (aa, ab, bb, ba) = keys, table
        products = [([ka * aa + kb * ab, kb * bb + ka * ba], halves(self.queries.at[t]), columns)]
        if not self.plan.normed:
            return self.multiply(*products)[0]
        found, squares = self.multiply(*products, ([ka * ka + kb * kb], [self.ones.at[self.taker]], columns))
        return found * jax.lax.rsqrt(squares / HEAD_DIM + self.plan.epsilon)
