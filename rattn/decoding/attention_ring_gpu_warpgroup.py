"""What the warpgroups of `attention_ring_gpu` share, and the one that copies."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rattn.decoding import mosaic_gpu
from rattn.decoding.attention_ring_gpu_plan import HALF, HEAD_DIM, KEY_WARPGROUPS, LINEAR, STATE_TILES, TILE, Call, Job


def shared_memory(call: Call, interpret: Any) -> dict[str, Any]:
    """Types of a program's shared memory, by the names of `Warpgroup`.

    Who writes and who reads:

        tiles             Copies; keys by `Keys`, all others by `Answers`
        new               Copies; all. A head's queries, the same again, its key and its value; rows G to Q of each Q
                          are never written: what lies there stays in columns of its own, which `attend` drops
        queries, ones,
        score             a `Keys`, for itself
        maxima            each `Keys`; both
        phi               Answers, for itself: halves of φ's two parts, by query
        weights           columns to 2 Q Keys, the others Answers; Answers
        totals            each `Keys`; Answers
        most, weight      the first `Keys`; Answers
        out               Answers, for itself: 2 Q rows of the softmax branch, those of keys that wait, of the state

    A warpgroup counts as one arrival at a barrier, and its threads do not wait for each other there:

        keys_full         a tile's copy, once a job; its `Keys` waits, and Copies before it asks for many more
        others_full       a copy of another kind, as often as one comes to the place; Answers waits, and Copies likewise
        empty             who took a tile from the place; Copies waits, but for the program's first tile there
        new_full          three copies; all wait
        new_empty         all but Copies; Copies waits, from the third job on
        maxima_full       both `Keys`, who both wait
        weights_full      both `Keys`; Answers waits
        weights_empty     Answers; both `Keys` wait, from the second job on

    Of a job that is the linear branch alone `Keys` only wait for what is new, and only where one may come after it.
    """
    bf16, tiled = jnp.bfloat16, mosaic_gpu.TRANSFORMS
    tiled_f32 = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)
    Q = call.Q
    tiles = (
        plgpu.SMEM((call.places, TILE, HEAD_DIM), bf16, transforms=tiled),
        plgpu.SMEM((call.places, TILE, HALF), jnp.float32, transforms=tiled_f32),
    )
    return {
        # As one it would not do for the search for races, which knows no parts of a union.
        "tiles": tiles if interpret else plgpu.RefUnion(*tiles),
        "new": plgpu.SMEM((2, 2 * Q + 2, HEAD_DIM), bf16),
        "queries": plgpu.SMEM((call.tiles, 2 * Q, HEAD_DIM), bf16, transforms=tiled),
        "ones": plgpu.SMEM((KEY_WARPGROUPS, 2 * Q, TILE), bf16, transforms=tiled),
        "phi": plgpu.SMEM((2 * HEAD_DIM // TILE, LINEAR, TILE), bf16, transforms=tiled),
        "weights": plgpu.SMEM((call.tiles, call.columns, TILE), bf16, transforms=tiled),
        "out": plgpu.SMEM((call.columns + LINEAR, HEAD_DIM), jnp.float32),
        "score": plgpu.SMEM((KEY_WARPGROUPS, 2 * Q), jnp.float32),
        "maxima": plgpu.SMEM((KEY_WARPGROUPS, 4, 2 * Q), jnp.float32),
        "totals": plgpu.SMEM((KEY_WARPGROUPS, 4, 2 * Q), jnp.float32),
        "most": plgpu.SMEM((2 * Q,), jnp.float32),
        "weight": plgpu.SMEM((2 * Q,), jnp.float32),
        # Of tiles and not of places: who waits for a barrier has to wait for it every time, and a place is now one
        # warpgroup's and now another's.
        "keys_full": plgpu.Barrier(num_barriers=call.tiles),
        "others_full": plgpu.Barrier(num_barriers=call.places),
        "empty": plgpu.Barrier(num_barriers=call.places),
        "new_full": plgpu.Barrier(num_arrivals=3, num_barriers=2),
        "new_empty": plgpu.Barrier(num_arrivals=KEY_WARPGROUPS + 1, num_barriers=2),
        "maxima_full": plgpu.Barrier(num_arrivals=KEY_WARPGROUPS),
        "weights_full": plgpu.Barrier(num_arrivals=KEY_WARPGROUPS),
        "weights_empty": plgpu.Barrier(),
    }


class Warpgroup:
    """One warpgroup of a program, with the arrays of device memory and what is in shared memory."""

    def __init__(self, call: Call, plan: Any, arrays: dict[str, Any], shared: dict[str, Any]):
        self.call, self.plan = call, plan
        for name, ref in (arrays | shared).items():
            setattr(self, name, ref)
        # The same places, as 64 keys or values of bfloat16 and as 64 rows of half a state.
        self.rows, self.states = self.tiles
        self.program = jax.lax.axis_index("program")

    def new_slot(self, i):
        """Returns where what is new of job i lies, in turns."""
        return jax.lax.rem(i, jnp.int32(2))

    def for_jobs(self, work: Callable[[Job], None]) -> None:
        """Does work(job) for all jobs of the program."""

        def body(i, _):
            work(self.call.job(self.program, i))
            return ()

        if self.call.programs == self.call.B * self.call.K:  # One each.
            body(jnp.int32(0), ())
        else:
            jax.lax.fori_loop(0, self.call.jobs(self.program), body, ())

    def wait_for_kernel_before(self):
        """Waits until the kernel before this one is done, and so what it and those before it have written is there.

        Only keys of the cache and `turns` are read before, so no kernel that may still run may write them. In a step
        products lie between two layers, and all other layers between two calls for one.
        """
        if not self.plan.interpret:
            plgpu.griddepcontrol_wait()

    def if_one(self, branch: jax.Array | int, work: Callable[[], None]) -> None:
        """Does the work if a job has a branch, which is known now where all jobs are whole heads."""
        work() if isinstance(branch, int) else pl.when(branch == 1)(work)

    def multiply(self, *products):
        """Returns Σ x · otherᵀ, float32 [TILE, columns], of each (x in registers, others in shared memory, columns)."""
        if self.plan.interpret:  # Its products read both from shared memory.
            return [
                sum(
                    jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32).T) for a, b in zip(x, others, strict=True)
                )
                for x, others, _ in products
            ]

        def scope(*sums):
            for total, (x, others, _) in zip(sums, products, strict=True):
                for a, b in zip(x, others, strict=True):
                    plgpu.wgmma(total, a, b.transpose((1, 0)))
            plgpu.wgmma_wait(0)
            return [total[...] for total in sums]

        return pl.run_scoped(scope, *(plgpu.ACC((TILE, columns), jnp.float32) for *_, columns in products))

    def store_weights(self, first, t, weights):
        """Stores a tile's weights [TILE, columns], from row `first` on."""
        place = self.weights.at[t, pl.ds(first, weights.shape[1])]
        mosaic_gpu.store_transposed(weights.astype(jnp.bfloat16), place)


class Copies(Warpgroup):
    """The warpgroup that copies."""

    def run(self) -> None:
        """Copies what all jobs need, a few tiles at a time; what is new, when it is written."""
        if not self.plan.interpret:
            plgpu.griddepcontrol_launch_dependents()
        call, jobs = self.call, self.call.jobs(self.program)

        def of_job(job):
            first = call.numbers(job)
            early = first.keys + job.softmax * call.early
            self.copy_tiles(job, "keys", first.keys, early)

            @pl.when(job.i == 0)
            def _():
                self.wait_for_kernel_before()
                self.copy_new(job)

            self.copy_tiles(job, "keys", early, first.waiting)
            self.copy_tiles(job, "waiting", first.waiting, first.states)
            self.copy_tiles(job, "states", first.states, first.values)
            # While the job's last keys are weighed.
            pl.when(job.i + 1 < jobs)(lambda: self.copy_new(call.job(self.program, job.i + 1)))
            self.copy_tiles(job, "values", first.values, first.end)

        self.for_jobs(of_job)

    def wait_in_turn(self, job, number):
        """Waits until the copy that is `on_the_way` before this one has come."""
        before, first = number - self.call.on_the_way, self.call.numbers(job)
        keys = (before >= first.keys) & (before < first.waiting)
        others = (before >= 0) & ((before < first.keys) | (before >= first.waiting))
        mosaic_gpu.wait_if(keys, self.keys_full.at[jnp.where(keys, before - first.keys, 0)])
        mosaic_gpu.wait_if(others, self.others_full.at[self.call.place(jnp.maximum(before, 0))])

    def copy_tiles(self, job, kind, begin, end):
        """Copies a job's copies from `begin` to `end`, all of one kind, whose name `Numbers` has."""
        call, b, h = self.call, job.b, job.h
        first = getattr(call.numbers(job), kind)

        def body(number, _):
            n, place = number - first, call.place(number)
            self.wait_in_turn(job, number)
            mosaic_gpu.wait_if(number >= call.places, self.empty.at[place])
            if kind == "states":
                tiles = jnp.int32(STATE_TILES // 2)
                half, tile = jax.lax.div(n, tiles), jax.lax.rem(n, tiles)
                source, into = self.state.at[b, h, pl.ds(tile * TILE, TILE), pl.ds(half * HALF, HALF)], self.states
            else:
                # What is past the ring's end reads as zeros.
                tile = n
                if kind == "waiting":
                    tile = call.waiting_tile(n, self.counts[b, 0], self.counts[b, 2])
                elif kind == "values":
                    tile = call.value_tile(job, n, self.counts[b, 0], self.counts[b, 2])
                source, into = (self.v if kind == "values" else self.k).at[b, h, pl.ds(tile * TILE, TILE)], self.rows
            full = self.keys_full.at[n] if kind == "keys" else self.others_full.at[place]
            plgpu.copy_gmem_to_smem(source, into.at[place], full)
            return ()

        jax.lax.fori_loop(jnp.int32(begin), jnp.int32(end), body, ())

    def copy_new(self, job):
        """Copies a head's new queries, twice, and the new key and value."""
        (i, b, h, *_), Q, G = job, self.call.Q, self.call.G
        slot = self.new_slot(i)
        mosaic_gpu.wait_if(i >= 2, self.new_empty.at[slot])
        for first, source, count in ((0, 0, G), (Q, 0, G), (2 * Q, G, 2)):
            plgpu.copy_gmem_to_smem(
                self.qkv.at[b, h, pl.ds(source, count)],
                self.new.at[slot, pl.ds(first, count)],
                self.new_full.at[slot],
            )
