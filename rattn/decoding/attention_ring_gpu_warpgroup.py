"""What the warpgroups of `attention_ring_gpu` share, and the one that copies."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rattn.decoding import attention_ring_gpu_plan, mosaic_gpu
from rattn.decoding.attention_ring_gpu_plan import HALF, HEAD_DIM, KEY_WARPGROUPS, LINEAR, STATE_TILES, TILE, Call

WGMMA = plgpu.Layout.WGMMA


def shared_memory(call: Call, interpret: Any) -> dict[str, Any]:
    """Types of a program's shared memory, by the names of `Warpgroup`."""
    bf16, tiled = jnp.bfloat16, mosaic_gpu.TRANSFORMS
    halves = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)
    Q = call.Q
    tiles = (
        plgpu.SMEM((call.slots, TILE, HEAD_DIM), bf16, transforms=tiled),
        plgpu.SMEM((call.slots, TILE, HALF), jnp.float32, transforms=halves),
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
        # Of tiles and not of slots: who waits for a barrier has to wait for it every time, and a slot is now one
        # warpgroup's and now another's.
        "keys_full": plgpu.Barrier(num_barriers=call.tiles),
        "others_full": plgpu.Barrier(num_barriers=call.slots),
        "empty": plgpu.Barrier(num_barriers=call.slots),
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
        self.rows, self.states = self.tiles
        self.number = jax.lax.axis_index("program")

    def head(self, i):
        """Returns the sequence and the key/value head that the program takes as number i."""
        head = self.number + i * attention_ring_gpu_plan.PROGRAMS
        return jax.lax.div(head, jnp.int32(self.call.K)), jax.lax.rem(head, jnp.int32(self.call.K))

    def heads(self):
        """Returns how many heads the program takes."""
        heads, programs = self.call.B * self.call.K, attention_ring_gpu_plan.PROGRAMS
        return jax.lax.div(heads - self.number + programs - 1, jnp.int32(programs))

    def for_heads(self, work: Callable[..., None]) -> None:
        """Does work(i, sequence, head) for all heads of the program."""
        if self.call.B * self.call.K <= attention_ring_gpu_plan.PROGRAMS:
            work(jnp.int32(0), *self.head(jnp.int32(0)))
            return

        def body(i, _):
            work(i, *self.head(i))
            return ()

        jax.lax.fori_loop(0, self.heads(), body, ())

    def wait_for_kernel_before(self):
        """Waits until the kernel before this one is done, and so what it and those before it have written is there.

        Caches may be read before: they are the last step's. So may what is made once for all steps.
        """
        if not self.plan.interpret:
            plgpu.griddepcontrol_wait()

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
        place = self.weights.at[t, pl.ds(first, weights.shape[1])].transpose((1, 0))
        place[...] = plgpu.layout_cast(weights.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)


class Copies(Warpgroup):
    """The warpgroup that copies."""

    def run(self) -> None:
        """Copies what all heads need, as soon as there is room; what is new, when it is written."""
        if not self.plan.interpret:
            plgpu.griddepcontrol_launch_dependents()

        call, heads = self.call, self.heads()
        # There is room for so many copies before what is new, which is of the kernel before, as is where keys wait.
        first = min(call.slots, call.waiting)

        def of_head(i, b, h):
            def copy(begin, end):
                for kind, lowest, highest in (
                    ("k", 0, call.waiting),
                    ("w", call.waiting, call.states),
                    ("s", call.states, call.values),
                    ("v", call.values, call.copies),
                ):
                    self.copy_tiles(i, b, h, kind, lowest, max(begin, lowest), min(end, highest))

            copy(0, first)

            @pl.when(i == 0)
            def _():
                self.wait_for_kernel_before()
                self.copy_new(i)

            copy(first, call.values)
            # While the head's last keys are weighed.
            pl.when(i + 1 < heads)(lambda: self.copy_new(i + 1))
            copy(call.values, call.copies)

        self.for_heads(of_head)

    def copy_tiles(self, i, b, h, kind, first, begin, end):
        """Copies a head's copies from `begin` to `end`, all of one kind, whose first is `first`."""
        call = self.call

        def body(number, _):
            n, slot = number - first, call.slot(number)
            # Every head begins with the first slot, where it finds the last tiles of the head before it.
            mosaic_gpu.wait_if((number >= call.slots) | (i > 0), self.empty.at[slot])
            if kind == "s":
                tiles = jnp.int32(STATE_TILES // 2)
                half, tile = jax.lax.div(n, tiles), jax.lax.rem(n, tiles)
                source, slots = self.state.at[b, h, pl.ds(tile * TILE, TILE), pl.ds(half * HALF, HALF)], self.states
            else:
                # What is past the ring's end reads as zeros.
                tile = call.waiting_tile(n, self.counts[b, 0], self.counts[b, 2]) if kind == "w" else n
                source, slots = (self.v if kind == "v" else self.k).at[b, h, pl.ds(tile * TILE, TILE)], self.rows
            full = self.keys_full.at[n] if kind == "k" else self.others_full.at[slot]
            plgpu.copy_gmem_to_smem(source, slots.at[slot], full)
            return ()

        if begin < end:
            jax.lax.fori_loop(jnp.int32(begin), jnp.int32(end), body, ())

    def copy_new(self, i):
        """Copies a head's new queries, twice, and the new key and value."""
        call, (b, h) = self.call, self.head(i)
        Q, G = call.Q, call.G
        slot = jax.lax.rem(i, jnp.int32(2))
        mosaic_gpu.wait_if(i >= 2, self.new_empty.at[slot])
        for first, source, count in ((0, 0, G), (Q, 0, G), (2 * Q, G, 2)):
            plgpu.copy_gmem_to_smem(
                self.qkv.at[b, h, pl.ds(source, count)],
                self.new.at[slot, pl.ds(first, count)],
                self.new_full.at[slot],
            )


def rounded(x: jax.Array) -> jax.Array:
    """Rounds float32 numbers to bfloat16."""
    return x.astype(jnp.bfloat16).astype(jnp.float32)
