"""The warpgroup of `attention_ring_gpu` that reads state and values, and makes the result."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rattn.decoding import mosaic_gpu
from rattn.decoding.attention_ring_gpu_plan import HALF, HEAD_DIM, KEY_WARPGROUPS, LINEAR, STATE_TILES, TILE
from rattn.decoding.attention_ring_gpu_warpgroup import Warpgroup
from rattn.decoding.mosaic_gpu import WGMMA, halves, rounded, spread
from rattn.decoding.triton_gpu import LOG2_E


class Answers(Warpgroup):
    """The warpgroup that takes the state and the values."""

    def run(self) -> None:
        """Makes the result of weights, state and values."""
        self.wait_for_kernel_before()
        self.for_jobs(self.answer)

    def answer(self, job):
        """Writes a head's result, and the new key and value; or leaves its only branch to another program."""
        call, h = self.call, job.h
        layout = mosaic_gpu.rows_layout(call.Q, HEAD_DIM)
        scales = [
            plgpu.load(scale.at[h], layout=layout, optimized=False) for scale in (self.softmax_scale, self.linear_scale)
        ]
        plgpu.barrier_wait(self.new_full.at[self.new_slot(job.i)])
        self.if_one(job.linear, lambda: self.read_linear(job))
        plgpu.commit_smem()  # The weights of keys that wait, for all warps and the tensor cores.
        with jax.named_scope("wait for weights"):
            self.if_one(job.softmax, lambda: plgpu.barrier_wait(self.weights_full))
        with jax.named_scope("values"):
            self.store_out(0, 0, self.read_values(job))
        plgpu.commit_smem()
        with jax.named_scope("finish"):
            self.finish(job, layout, scales)
        self.if_one(job.softmax, lambda: plgpu.barrier_arrive(self.weights_empty))

    def read_linear(self, job):
        """Takes what only the linear branch needs: weights of keys that wait, and the state."""
        call = self.call
        first = call.numbers(job)
        with jax.named_scope("phi"):
            self.store_phi(job.i)
        with jax.named_scope("weigh waiting"):
            weigh = functools.partial(self.weigh_waiting, job.b, first.waiting)
            jax.lax.fori_loop(0, call.waiting_tiles, weigh, ())
        with jax.named_scope("state"):
            for half in range(2):
                found = self.read_state(first.states + half * (STATE_TILES // 2))
                self.store_out(call.columns, half * HALF, found)

    def store_phi(self, i):
        """Writes φ of a head's queries; for the first job, zeros as weights of keys that wait."""

        @pl.when(i == 0)
        def _():
            # Of tiles in which no keys wait: the same for all heads, as newest and unfolded are.
            none = plgpu.layout_cast(jnp.zeros((LINEAR, TILE), jnp.bfloat16), mosaic_gpu.rows_layout(LINEAR, TILE))

            def store(t, _):
                self.weights.at[t, pl.ds(2 * self.call.Q, LINEAR)][...] = none
                return ()

            jax.lax.fori_loop(0, self.call.tiles, store, ())

        layout = mosaic_gpu.rows_layout(LINEAR, HALF)
        queries = halves(self.new.at[self.new_slot(i), pl.ds(0, LINEAR)])
        queries = [plgpu.load(half, layout=layout, optimized=False).astype(jnp.float32) for half in queries]

        def across(x):
            return spread(x, layout, (LINEAR, HALF), 0)

        for n, sign in enumerate((LOG2_E, -LOG2_E)):
            scaled = [half * sign for half in queries]
            most = across(jnp.maximum(*(half.max(axis=1) for half in scaled)))
            powers = [jnp.exp2(half - most) for half in scaled]
            inverse = across(1.0 / sum(half.sum(axis=1) for half in powers))
            for m, half in enumerate(powers):
                self.phi.at[2 * n + m][...] = (half * inverse).astype(jnp.bfloat16)
        plgpu.commit_smem()

    def weigh_waiting(self, b, first_copy, n, _):
        """Writes the linear branch's weights of tile number n of those in which keys may wait for the fold."""
        call, W = self.call, self.call.W
        newest, known, unfolded = (self.counts[b, column] for column in range(3))
        t, place = call.waiting_tile(n, newest, unfolded), call.place(first_copy + n)
        plgpu.barrier_wait(self.others_full.at[place])
        last = newest - W
        first = last - unfolded + 1
        begin, end = t * TILE, (t + 1) * TILE - 1
        some = ((first <= end) & (last >= begin)) | ((first + call.S <= end) & (last + call.S >= begin))

        @pl.when(some)
        def _():
            keys = [plgpu.load(half, layout=WGMMA, optimized=False) for half in halves(self.rows.at[place])]

            def of_sign(sign, total):
                """Adds φ(q) · φ(k) over half of φ, of k or of −k."""
                scaled = [half.astype(jnp.float32) * (LOG2_E * (1 - 2 * sign)) for half in keys]
                most = jnp.maximum(*(half.max(axis=1) for half in scaled))
                powers = [jnp.exp2(half - jax.lax.broadcast_in_dim(most, half.shape, [0])) for half in scaled]
                inverse = 1.0 / sum(half.sum(axis=1) for half in powers)
                phi = [self.phi.at[2 * sign + m] for m in (0, 1)]
                (found,) = self.multiply(([half.astype(jnp.bfloat16) for half in powers], phi, LINEAR))
                return total + found * jax.lax.broadcast_in_dim(inverse, found.shape, [0])

            none = plgpu.layout_cast(jnp.zeros((TILE, LINEAR), jnp.float32), WGMMA)
            found = jax.lax.fori_loop(0, 2, of_sign, none)
            row = plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, found.shape, 0), WGMMA) + begin
            ages = jnp.where(row <= newest, newest - row, newest - row + call.S)
            waits = (ages >= W) & (ages < W + unfolded) & (ages < known) & (row < call.S)
            self.store_weights(2 * call.Q, t, jnp.where(waits, found, 0.0))

        plgpu.barrier_arrive(self.empty.at[place])
        return ()

    def read_state(self, first_copy):
        """Returns half of the state's dims, times φ(q): float32 [HALF, LINEAR]."""

        def of_tile(n, total):
            place = self.call.place(first_copy + n)
            plgpu.barrier_wait(self.others_full.at[place])
            tile = self.states.at[place].transpose((1, 0))
            x = plgpu.load(tile, layout=plgpu.Layout.WGMMA_TRANSPOSED, optimized=False)
            x = plgpu.layout_cast(x.astype(jnp.bfloat16), WGMMA)
            plgpu.barrier_arrive(self.empty.at[place])
            return total + self.multiply(([x], [self.phi.at[n]], LINEAR))[0]

        none = plgpu.layout_cast(jnp.zeros((HALF, LINEAR), jnp.float32), WGMMA)
        return jax.lax.fori_loop(0, STATE_TILES // 2, of_tile, none)

    def read_values(self, job):
        """Returns values times weights, float32 [HEAD_DIM, columns]; those of a branch that it lacks are nothing."""
        call, first = self.call, self.call.numbers(job)
        newest, unfolded = self.counts[job.b, 0], self.counts[job.b, 2]

        def scope(sums):
            def of_tile(n, _):
                place = call.place(first.values + n)
                plgpu.barrier_wait(self.others_full.at[place])
                values, weights = self.rows.at[place], self.weights.at[call.value_tile(job, n, newest, unfolded)]
                plgpu.wgmma(sums, values.transpose((1, 0)), weights.transpose((1, 0)))
                plgpu.wgmma_wait(1)  # All before this tile are done.
                pl.when(n > 0)(lambda: plgpu.barrier_arrive(self.empty.at[call.place(first.values + n - 1)]))
                return ()

            jax.lax.fori_loop(0, call.value_tiles(job), of_tile, ())
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(self.empty.at[call.place(jnp.int32(first.end - 1))])
            return sums[...]

        return pl.run_scoped(scope, plgpu.ACC((HEAD_DIM, call.columns), jnp.float32))

    def store_out(self, row, first, found):
        """Stores [dims, columns] of a result, beginning with this row and dim, as rows."""
        place = self.out.at[pl.ds(row, found.shape[1]), pl.ds(first, found.shape[0])]
        mosaic_gpu.store_transposed(found, place)

    def finish(self, job, layout, scales):
        """Adds up and norms the branches; writes their sum, or leaves the only one, or adds one that was left."""
        call, Q = self.call, self.call.Q
        (i, b, h, *_), shape = job, (Q, HEAD_DIM)
        slot = self.new_slot(i)

        def across(x, dim=0):
            return spread(x, layout, shape, dim)

        def normed(branch, scale):
            x = rounded(branch)
            inverse = jax.lax.rsqrt((x * x).sum(axis=1) / HEAD_DIM + self.plan.epsilon)
            return x * across(inverse) * scale

        def rows(ref, part):
            """Loads [Q] numbers of the keys written since the ring went round (part 0), or before (1)."""
            return plgpu.load(ref.at[pl.ds(part * Q, Q)], layout=layout.reduce(1), optimized=False)

        def out(first):
            return plgpu.load(self.out.at[pl.ds(first, Q)], layout=layout, optimized=False)

        linear = normed(out(2 * Q) + out(call.columns), scales[1])

        new_k, new_v = (
            plgpu.load(self.new.at[slot, 2 * Q + n], layout=layout.reduce(0), optimized=False) for n in (0, 1)
        )

        def softmax():
            most = [rows(self.most, part) for part in (0, 1)]
            # A part of which no key is visible has LEAST as its maximum and weights of 1, which this makes 0.
            shrink = [jnp.exp2(part - jnp.maximum(*most)) for part in most]
            weight = rows(self.weight, 0)
            warps = [self.totals.at[n, warp] for n in range(KEY_WARPGROUPS) for warp in range(4)]
            totals = [[rows(warp, part) for warp in warps] for part in (0, 1)]
            total = (sum(totals[0]) + weight) * shrink[0] + sum(totals[1]) * shrink[1]
            o = (out(0) + across(new_v.astype(jnp.float32), 1) * across(weight)) * across(shrink[0])
            return normed((o + out(Q) * across(shrink[1])) * across(1.0 / total), scales[0])

        def write(one, other):
            self.found.at[b, h][...] = (one + other).astype(jnp.bfloat16)
            for kept, row in ((self.k, new_k), (self.v, new_v)):
                kept.at[b, h, self.counts[b, 0]][...] = row

        if not call.division.split:
            write(softmax(), linear)
        elif call.division.pairs:  # Softmax branches are there first.
            pl.when(job.softmax == 0)(lambda: write(self.take(job, layout), linear))
            pl.when(job.softmax == 1)(lambda: self.write_or_leave(job, write, softmax(), linear))
        else:
            pl.when(job.softmax == 0)(lambda: self.leave(job, linear))
            pl.when(job.softmax == 1)(lambda: write(softmax(), self.own_or_taken(job, layout, linear)))
        plgpu.barrier_arrive(self.new_empty.at[slot])

    def own_or_taken(self, job, layout, linear):
        """Returns the linear branch of a head that has the softmax one: its own, or another program's."""
        return jax.lax.fori_loop(0, 1 - job.linear, lambda *_: self.take(job, layout), linear)  # None or one.

    def write_or_leave(self, job, write, softmax, linear):
        """Writes a whole head's result, or leaves the softmax branch."""
        pl.when(job.linear == 1)(lambda: write(softmax, linear))
        pl.when(job.linear == 0)(lambda: self.leave(job, softmax))

    def leave(self, job, branch):
        """Leaves one branch of a head, float32 [Q, H], to the program that has the other."""
        number = self.call.split_number(job)
        self.parts.at[number][...] = branch
        mosaic_gpu.say_ready(self.ready.at[number], self.plan.interpret)

    def take(self, job, layout):
        """Waits for the branch of a head that another program has, and returns it."""
        number = self.call.split_number(job)
        mosaic_gpu.take_ready(self.ready.at[number], self.plan.interpret)
        return plgpu.load(self.parts.at[number], layout=layout, optimized=False)
