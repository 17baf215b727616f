"""One token of a sequence against a ring of keys and a state, as one kernel for a Hopper GPU.

    s_j = q · R(age_j) k_j / √H        o₁ = Σ softmax(s)_j v_j                     keys inside the window
    o₂ = φ(q) · state + Σ φ(q)·φ(k_j) v_j                                           keys that wait for the fold
    o = rms_norm(o₁) · γ₁ + rms_norm(o₂) · γ₂

A step reads some 400 KB for a key/value head of a sequence, and all that counts is that memory never rests. So the copy
engine brings them, a head after another, as fast as there is room, and the first before the kernel before this one is
done: what is in the cache does not depend on it. One program on a multiprocessor has four warpgroups: one copies, two
take the keys, a tile each in turn, and one takes the state and the values.

A ring's keys are kept as projected, for the state takes them so. They go from shared memory to registers once, are
normed and turned by their place in their tile there, and from there to the tensor cores. Queries are turned by the age
of the tile's first slot, twice: as if the tile were written since the ring went round, and as if before (the ring's
seam is in the tile of the newest slot); each key counts in one of the two. All scores of a head fit in registers, so
that there is one maximum and one sum for it, no rescaling. Keys that wait for the fold are two columns of weights more.
Keys, dims of values and of the state are the long side of each product and queries the short one.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rattn.decoding import mosaic_gpu
from rattn.decoding.cache import CacheLayout
from rattn.decoding.layers import LayerSpec
from rattn.model.layers import rope_angles

# Slots of a tile; bytes of one.
TILE, TILE_BYTES = 64, 16 * 1024
HEAD_DIM = 128
HALF = HEAD_DIM // 2
# Tiles of a head's state.
STATE_TILES = 8
# Scores of a head that fit in registers.
MOST_TILES = 17
# Bytes of a multiprocessor's 227 KiB that are used, and of them what barriers and the ends of small arrays take.
SHARED_BYTES, SMALL_BYTES = 224 * 1024, 6 * 1024
# Warpgroups that take keys, most tiles in the ring of each, and tiles of state and values that come first.
KEY_WARPGROUPS, MOST_KEY_SLOTS, LEAST_OTHER_SLOTS = 2, 3, 4
# Registers of a thread that copies, that takes keys, that takes the rest: 512 together.
COPY_REGISTERS, KEY_REGISTERS, OTHER_REGISTERS = 24, 192, 104
PROGRAMS = 132
LOG2_E = 1.4426950408889634
# Of no key.
LEAST = -1e30
# Columns of the linear branch: the least that a product has.
LINEAR = 8

WGMMA = plgpu.Layout.WGMMA
COLUMNS_OF_WGMMA = WGMMA.reduce(0)


def fits(layer: LayerSpec, layout: CacheLayout) -> bool:
    """Returns whether the kernel takes a layer and its cache."""
    slots = layout.slots(layer)
    return (
        layer.kind == "rattention"
        and layer.window > 0
        and layout.dtype == "bfloat16"
        and layout.state_dtype == "float32"
        and layer.head_dim == HEAD_DIM
        and layer.group <= 8
        and layer.feature_map == "softmax"
        and not (layer.qk_norm and layer.feature_map_after_qk_norm)
        # Whole lines of eight for the copy engine, and a tile for each warpgroup that takes keys.
        and slots % 8 == 0
        and (KEY_WARPGROUPS - 1) * TILE < slots <= MOST_TILES * TILE
        and _Call(None, 1, 1, layer.group, slots).other_slots > 1
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is fixed when a call is compiled.

    Attributes:
      window: W.
      epsilon: of all norms.
      normed: whether queries and keys are normed for the softmax branch.
      interpret: run on a CPU, to test it.
    """

    window: int
    epsilon: float
    normed: bool
    interpret: bool = False


def turns(head_dim: int, theta: float | None, k_scale_H: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """Returns what scales keys and turns them by their place in their tile, [4, TILE, H/2], the same in all calls."""
    sin, cos = _angles(jnp.arange(TILE), head_dim, theta)
    a, b = (1.0, 1.0) if k_scale_H is None else jnp.split(k_scale_H[None], 2, axis=1)
    return jnp.stack([cos * a, -sin * b, cos * b, sin * a]).astype(dtype)


def angles(
    newest: jax.Array, slots: int, group: int, head_dim: int, theta: float | None
) -> tuple[jax.Array, jax.Array]:
    """Returns sines and cosines by which queries are turned, float32 [tiles · 2 Q, H/2].

    Args:
      newest: int32, the slot of the newest key.
      slots: of a ring.
      group: query heads of a key/value head.
      head_dim: H.
      theta: of the rotation, or None without one.
    """
    first = jnp.arange(_tiles(slots)) * TILE
    ages = newest - first[:, None] + jnp.repeat(jnp.array([0, slots]), _queries(group))[None]
    return _angles(ages.reshape(-1), head_dim, theta)


def _angles(positions, head_dim, theta):
    if theta is None:
        return jnp.zeros((len(positions), head_dim // 2)), jnp.ones((len(positions), head_dim // 2))
    return rope_angles(positions, head_dim, theta)


def _tiles(slots):
    return -(-slots // TILE)


def _queries(group):
    """Columns of a product for the queries of a group."""
    return 4 if group <= 4 else 8


def attend(
    plan: Plan,
    qkv_BKAH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    state_BKPH: jax.Array,
    newest: jax.Array,
    known_B: jax.Array,
    unfolded: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    turns_4TR: jax.Array,
    scales: tuple[jax.Array, jax.Array],
    branch_scales: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns o_BKGH in v's dtype, the keys and the values.

    Args:
      plan: what is fixed.
      qkv_BKAH: bfloat16, as projected: a head's G queries, its key and its value; perhaps more rows than sequences.
      k_BKSH: bfloat16, keys as projected without the new one, which takes the slot `newest`.
      v_BKSH: bfloat16, values, likewise.
      state_BKPH: float32, the state.
      newest: int32, the new key's slot; the one before it is to its left, that of slot 0 in the last.
      known_B: int32, how many tokens back a sequence reaches, itself included.
      unfolded: int32, keys that left the window since the fold.
      angles: of `angles`.
      turns_4TR: of `turns`.
      scales: float32 [H], of the norms of query and key; ones where there are none.
      branch_scales: float32 [K, G, H], of the norms of the softmax and the linear branch.
    """
    B, K, S, H = k_BKSH.shape
    G = qkv_BKAH.shape[2] - 2
    call = _Call(plan, B, K, G, S)
    assert call.other_slots > 1, "A slot is free when the one after it is multiplied."
    counts = jnp.stack([jnp.broadcast_to(newest, (B,)), known_B, jnp.broadcast_to(unfolded, (B,))], axis=1)
    branch_scales = [jnp.pad(x, ((0, 0), (0, call.Q - G), (0, 0))) for x in branch_scales]
    kept = [jax.new_ref(x) for x in (k_BKSH, v_BKSH)]
    mesh = plgpu.Mesh(
        grid=(min(PROGRAMS, B * K),), grid_names=("program",), num_threads=2 + KEY_WARPGROUPS, thread_name="warpgroup"
    )
    found = pl.kernel(
        functools.partial(_kernel, call),
        out_type=jax.ShapeDtypeStruct((B, K, call.Q, H), v_BKSH.dtype),
        mesh=mesh,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=plgpu.InterpretGPUParams() if plan.interpret else False,
        name="decode_attention_ring",
    )(qkv_BKAH, *kept, state_BKPH, counts, *angles, turns_4TR, *scales, *branch_scales)
    return found[:, :, :G], *(jax.freeze(x) for x in kept)


class _Call:
    """What is fixed when a call is compiled, and what follows from it."""

    def __init__(self, plan, B, K, G, S):
        self.plan, self.B, self.K, self.G, self.S = plan, B, K, G, S
        self.Q, self.tiles = _queries(G), _tiles(S)
        self.columns = 2 * self.Q + LINEAR
        self.key_tiles = [range(number, self.tiles, KEY_WARPGROUPS) for number in range(KEY_WARPGROUPS)]
        used = 2 * HEAD_DIM * (self.tiles * 2 * self.Q + 2 * LINEAR + 2 * (2 * self.Q + 2))
        used += 2 * self.columns * self.tiles * TILE + 4 * HEAD_DIM * (self.columns + LINEAR) + 4 * self.Q * TILE
        room = (SHARED_BYTES - SMALL_BYTES - used) // TILE_BYTES
        self.key_slots = max(2, min(MOST_KEY_SLOTS, (room - LEAST_OTHER_SLOTS) // KEY_WARPGROUPS))
        self.other_slots = room - KEY_WARPGROUPS * self.key_slots
        # Copies of a head in the order in which they are asked for: the first are all that there is room for at once.
        # Values wait for the weights of all keys, so keys come before them.
        keys, states = ([(kind, n) for n in range(count)] for kind, count in (("k", self.tiles), ("s", STATE_TILES)))
        first = KEY_WARPGROUPS * self.key_slots, max(self.other_slots, 0)
        self.early, self.late = (
            [x for pair in itertools.zip_longest(keys[of_keys], states[of_states]) for x in pair if x]
            for of_keys, of_states in (map(slice, first), (slice(n, None) for n in first))
        )
        self.late += [("v", n) for n in range(self.tiles)]

    def shared(self):
        """Types of a program's shared memory, by the names of `_Program`."""
        bf16, tiled = jnp.bfloat16, mosaic_gpu.TRANSFORMS
        halves = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)
        Q = self.Q
        return {
            "keys": plgpu.SMEM((KEY_WARPGROUPS * self.key_slots, TILE, HEAD_DIM), bf16, transforms=tiled),
            "others": plgpu.RefUnion(
                plgpu.SMEM((self.other_slots, TILE, HEAD_DIM), bf16, transforms=tiled),
                plgpu.SMEM((self.other_slots, TILE, HALF), jnp.float32, transforms=halves),
            ),
            "new": plgpu.SMEM((2, 2 * Q + 2, HEAD_DIM), bf16),
            "queries": plgpu.SMEM((self.tiles * 2 * Q, HEAD_DIM), bf16, transforms=tiled),
            "ones": plgpu.SMEM((2 * Q, TILE), bf16, transforms=tiled),
            "phi": plgpu.SMEM((LINEAR, 2 * HEAD_DIM), bf16, transforms=tiled),
            "weights": plgpu.SMEM((self.columns, self.tiles * TILE), bf16, transforms=tiled),
            "out": plgpu.SMEM((self.columns + LINEAR, HEAD_DIM), jnp.float32),
            "score": plgpu.SMEM((KEY_WARPGROUPS, 2 * Q), jnp.float32),
            "maxima": plgpu.SMEM((KEY_WARPGROUPS * 4, 2 * Q), jnp.float32),
            "totals": plgpu.SMEM((KEY_WARPGROUPS * 4, 2 * Q), jnp.float32),
            "most": plgpu.SMEM((2 * Q,), jnp.float32),
            "weight": plgpu.SMEM((2 * Q,), jnp.float32),
            "keys_full": plgpu.Barrier(num_barriers=KEY_WARPGROUPS * self.key_slots),
            "keys_empty": plgpu.Barrier(num_barriers=KEY_WARPGROUPS * self.key_slots),
            "others_full": plgpu.Barrier(num_barriers=self.other_slots),
            "others_empty": plgpu.Barrier(num_barriers=self.other_slots),
            "new_full": plgpu.Barrier(num_arrivals=3, num_barriers=2),
            "new_empty": plgpu.Barrier(num_arrivals=KEY_WARPGROUPS + 1, num_barriers=2),
            "phi_full": plgpu.Barrier(),
            "phi_empty": plgpu.Barrier(num_arrivals=KEY_WARPGROUPS),
            "maxima_full": plgpu.Barrier(num_arrivals=KEY_WARPGROUPS),
            "weights_full": plgpu.Barrier(num_arrivals=KEY_WARPGROUPS),
            "weights_empty": plgpu.Barrier(),
        }


def _kernel(call, qkv, k, v, state, counts, sin, cos, turns, q_scale, k_scale, softmax_scale, linear_scale, out):
    shared = call.shared()

    def scoped(*shared_refs):
        program = _Program(call, dict(zip(shared, shared_refs, strict=True)))
        program.qkv, program.k, program.v, program.state, program.counts = qkv, k, v, state, counts
        program.sin, program.cos, program.turns, program.found = sin, cos, turns, out
        program.scales, program.branch_scales = (q_scale, k_scale), (softmax_scale, linear_scale)
        warpgroup = jax.lax.axis_index("warpgroup")
        works = [(program.copy, COPY_REGISTERS), (program.take_others, OTHER_REGISTERS)]
        works += [(functools.partial(program.take_keys, number), KEY_REGISTERS) for number in range(KEY_WARPGROUPS)]
        for number, (work, registers) in enumerate(works):
            if not call.plan.interpret:
                work = functools.partial(_with_registers, registers, work)
            pl.when(warpgroup == number)(work)

    pl.run_scoped(scoped, *shared.values(), collective_axes="warpgroup")


def _with_registers(registers, work):
    # All begin with 128.
    plgpu.set_max_registers(registers, action="decrease" if registers < 128 else "increase")
    work()


class _Program:
    """One program."""

    def __init__(self, call, shared):
        self.call, self.plan = call, call.plan
        for name, ref in shared.items():
            setattr(self, name, ref)
        self.values, self.states = self.others
        self.number = jax.lax.axis_index("program")
        self.heads = jax.lax.div(call.B * call.K - self.number + PROGRAMS - 1, jnp.int32(PROGRAMS))

    def head(self, i):
        """Returns the sequence and the key/value head that the program takes as number i."""
        head = self.number + i * PROGRAMS
        return jax.lax.div(head, jnp.int32(self.call.K)), jax.lax.rem(head, jnp.int32(self.call.K))

    def for_heads(self, work):
        """Does work(i, sequence, head) for all heads of the program."""
        if self.call.B * self.call.K <= PROGRAMS:
            work(jnp.int32(0), *self.head(jnp.int32(0)))
            return

        def body(i, _):
            work(i, *self.head(i))
            return ()

        jax.lax.fori_loop(0, self.heads, body, ())

    # Copying.

    def copy(self):
        """Copies what all heads need, as soon as there is room; what is new, when it is written."""
        wait = (lambda: None) if self.plan.interpret else plgpu.griddepcontrol_wait
        if not self.plan.interpret:
            plgpu.griddepcontrol_launch_dependents()

        def of_head(i, b, h):
            for item in self.call.early:
                self.copy_tile(i, b, h, *item)
            pl.when(i == 0)(wait)
            self.copy_new(i, b, h)
            for item in self.call.late:
                self.copy_tile(i, b, h, *item)

        self.for_heads(of_head)

    def copy_tile(self, i, b, h, kind, number):
        """Copies tile `number` of keys, state or values."""
        # What is past the ring's end reads as zeros; a slice that is known to pass it would be refused.
        rows = pl.ds(number * TILE + 0 * i, TILE)
        if kind == "k":
            count, slot = self.key_slot(i, number)
            mosaic_gpu.wait_if(count >= self.call.key_slots, self.keys_empty.at[slot])
            plgpu.copy_gmem_to_smem(self.k.at[b, h, rows], self.keys.at[slot], self.keys_full.at[slot])
            return
        count, slot = self.other_slot(i, number if kind == "s" else STATE_TILES + number)
        mosaic_gpu.wait_if(count >= self.call.other_slots, self.others_empty.at[slot])
        if kind == "v":
            source, ring = self.v.at[b, h, rows], self.values
        else:
            half, first = divmod(number, STATE_TILES // 2)
            source = self.state.at[b, h, pl.ds(first * TILE, TILE), pl.ds(half * HALF, HALF)]
            ring = self.states
        plgpu.copy_gmem_to_smem(source, ring.at[slot], self.others_full.at[slot])

    def key_slot(self, i, t):
        """Returns how many tiles its warpgroup took before tile t of head i, and the slot of the tile."""
        number, n = t % KEY_WARPGROUPS, t // KEY_WARPGROUPS
        count = i * len(self.call.key_tiles[number]) + n
        return count, number * self.call.key_slots + jax.lax.rem(count, jnp.int32(self.call.key_slots))

    def other_slot(self, i, n):
        """Returns how many tiles of state and values were before tile n of head i, and the slot of the tile."""
        count = i * (STATE_TILES + self.call.tiles) + n
        return count, jax.lax.rem(count, jnp.int32(self.call.other_slots))

    def copy_new(self, i, b, h):
        """Copies the new queries, twice, and the new key and value."""
        call = self.call
        Q, G = call.Q, call.G
        slot = jax.lax.rem(i, jnp.int32(2))
        mosaic_gpu.wait_if(i >= 2, self.new_empty.at[slot])
        for first, source, count in ((0, 0, G), (Q, 0, G), (2 * Q, G, 2)):
            plgpu.copy_gmem_to_smem(
                self.qkv.at[b, h, pl.ds(source, count)],
                self.new.at[slot, pl.ds(first, count)],
                self.new_full.at[slot],
            )

    # Keys.

    def take_keys(self, number):
        """Makes weights of the keys of every other tile, of both branches."""
        table = [plgpu.load(self.turns.at[n], layout=WGMMA, optimized=False) for n in range(4)]
        self.for_heads(functools.partial(self.weigh, number, table))

    def weigh(self, number, table, i, b, h):
        """Writes the weights of a head's keys, their maximum and sums."""
        call, plan = self.call, self.plan
        tiles = call.key_tiles[number]
        newest, known, unfolded = (self.counts[b, n] for n in range(3))
        reach = jnp.minimum(plan.window, known)
        self.turn_queries(number, i)
        plgpu.commit_smem()
        plgpu.barrier_wait(self.phi_full)
        mosaic_gpu.wait_if(i > 0, self.weights_empty)
        shape = TILE, 2 * call.Q
        row, column = (plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, shape, dim), WGMMA) for dim in (0, 1))
        # How old a key in slot 0 would be, were it of this round or of the one before.
        begin = newest + jnp.where(column >= call.Q, call.S, 0) - row
        scores = []
        for t in tiles:
            _, slot = self.key_slot(i, t)
            plgpu.barrier_wait(self.keys_full.at[slot])
            halves = [self.keys.at[slot, :, pl.ds(n * HALF, HALF)] for n in (0, 1)]
            keys = [plgpu.load(half, layout=WGMMA, optimized=False) for half in halves]
            found = self.products(table, keys, t)
            ages = begin - t * TILE
            visible = (ages > 0) & (ages < reach)
            if (t + 1) * TILE > call.S:
                visible = visible & (row < call.S - t * TILE)
            scores.append(jnp.where(visible, found * (HEAD_DIM**-0.5 * LOG2_E), LEAST))
            self.weigh_waiting(keys, t, newest, known, unfolded)
            plgpu.barrier_arrive(self.keys_empty.at[slot])
        plgpu.barrier_arrive(self.phi_empty)
        most, new = self.most_of(number, scores)
        total = None
        for t, score in zip(tiles, scores, strict=True):
            weights = jnp.exp2(score - jax.lax.broadcast_in_dim(most, shape, [1]))
            total = weights if total is None else total + weights
            self.store_weights(0, 2 * call.Q, t, weights)
        mosaic_gpu.store_of_warps("add", total, self.totals.at[pl.ds(4 * number, 4)], plan.interpret)
        if number == 0:
            self.most[...] = most
            self.weight[...] = jnp.exp2(new - most)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.weights_full)

    def most_of(self, number, scores):
        """Returns the largest score of all tiles and the new key, and the new key's, [2 Q]."""
        most = functools.reduce(jnp.maximum, scores)
        mosaic_gpu.store_of_warps("max", most, self.maxima.at[pl.ds(4 * number, 4)], self.plan.interpret)
        plgpu.barrier_arrive(self.maxima_full)
        plgpu.barrier_wait(self.maxima_full)
        rows = [self.score.at[number], *(self.maxima.at[n] for n in range(4 * KEY_WARPGROUPS))]
        new, *others = [plgpu.load(row, layout=COLUMNS_OF_WGMMA, optimized=False) for row in rows]
        return functools.reduce(jnp.maximum, others, new), new

    def store_weights(self, first, columns, t, weights):
        """Stores a tile's weights [TILE, columns]."""
        place = self.weights.at[pl.ds(first, columns), pl.ds(t * TILE, TILE)].transpose((1, 0))
        place[...] = plgpu.layout_cast(weights.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)

    def turn_queries(self, number, i):
        """Norms and turns the new queries for a warpgroup's tiles, and writes the new key's score."""
        call = self.call
        Q, rows = call.Q, 2 * call.Q
        layout = mosaic_gpu.rows_layout(rows, HALF)
        halves = [pl.ds(n * HALF, HALF) for n in (0, 1)]
        # On their way before the queries are there.
        places = {t: pl.ds(t * rows, rows) for t in call.key_tiles[number]}
        angles = {
            t: [plgpu.load(x.at[place], layout=layout, optimized=False) for x in (self.sin, self.cos)]
            for t, place in places.items()
        }

        def across(ref):
            """Loads [HALF] numbers for every row."""
            x = plgpu.load(ref, layout=layout.reduce(0), optimized=False).astype(jnp.float32)
            return plgpu.layout_cast(jax.lax.broadcast_in_dim(x, (rows, HALF), [1]), layout)

        scales = [[across(scale.at[half]) for half in halves] for scale in self.scales] if self.plan.normed else None
        slot = jax.lax.rem(i, jnp.int32(2))
        plgpu.barrier_wait(self.new_full.at[slot])

        def normed(x, which):
            if not self.plan.normed:
                return x
            square = (x[0] * x[0] + x[1] * x[1]).sum(axis=1)
            inverse = jax.lax.rsqrt(square / HEAD_DIM + self.plan.epsilon)
            inverse = plgpu.layout_cast(jax.lax.broadcast_in_dim(inverse, (rows, HALF), [0]), layout)
            return [_rounded(y * inverse * scale) for y, scale in zip(x, scales[which], strict=True)]

        q = [plgpu.load(self.new.at[slot, pl.ds(0, rows), half], layout=layout, optimized=False) for half in halves]
        a, b = q = normed([x.astype(jnp.float32) for x in q], 0)
        k = normed([across(self.new.at[slot, 2 * Q, half]) for half in halves], 1)
        plgpu.barrier_arrive(self.new_empty.at[slot])
        for t, (sin, cos) in angles.items():
            for half, x in zip(halves, (a * cos - b * sin, b * cos + a * sin), strict=True):
                self.queries.at[places[t], half][...] = x.astype(jnp.bfloat16)
        score = sum((x * y).sum(axis=1) for x, y in zip(q, k, strict=True)) * (HEAD_DIM**-0.5 * LOG2_E)
        row = plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, (rows, HALF), 0), layout).max(axis=1)
        self.score.at[number][...] = jnp.where(row < Q, score, LEAST)

    def products(self, table, keys, t):
        """Returns the products [TILE, 2 Q] of a tile's keys, normed and turned, and its queries.

        Squares are rounded to bfloat16, which their sum does not notice, and added up by a product, whose result lies
        as the scores do.
        """
        columns = 2 * self.call.Q
        (ka, kb), (aa, ab, bb, ba) = keys, table
        queries = self.queries.at[pl.ds(t * columns, columns)]
        queries = [queries.at[:, pl.ds(n * HALF, HALF)] for n in (0, 1)]
        found = self.multiply([ka * aa + kb * ab, kb * bb + ka * ba], queries, columns)
        if not self.plan.normed:
            return found
        squares = self.multiply([ka * ka + kb * kb], [self.ones], columns)
        return found * jax.lax.rsqrt(squares / HEAD_DIM + self.plan.epsilon)

    def multiply(self, x, others, columns):
        """Returns Σ x · otherᵀ, float32 [TILE, columns], of registers and shared memory."""
        if self.plan.interpret:  # Its products read both from shared memory.
            return sum(
                jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32).T) for a, b in zip(x, others, strict=True)
            )

        def scope(sums):
            for a, b in zip(x, others, strict=True):
                plgpu.wgmma(sums, a, b.transpose((1, 0)))
            plgpu.wgmma_wait(0)
            return sums[...]

        return pl.run_scoped(scope, plgpu.ACC((TILE, columns), jnp.float32))

    def weigh_waiting(self, keys, t, newest, known, unfolded):
        """Writes the linear branch's weights of a tile's keys: zero but for those that wait for the fold."""
        call, W = self.call, self.plan.window
        last, shape = newest - W, (TILE, LINEAR)
        first = last - unfolded + 1
        begin, end = t * TILE, (t + 1) * TILE - 1
        some = ((first <= end) & (last >= begin)) | ((first + call.S <= end) & (last + call.S >= begin))

        @pl.when(some)
        def _():
            row = plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, shape, 0), WGMMA) + begin
            ages = jnp.where(row <= newest, newest - row, newest - row + call.S)
            waits = (ages >= W) & (ages < W + unfolded) & (ages < known) & (row < call.S)
            x, found = [half.astype(jnp.float32) for half in keys], None
            highest = jnp.maximum(*(half.max(axis=1) for half in x))
            lowest = jnp.minimum(*(half.min(axis=1) for half in x))
            for n, (scale, most) in enumerate(((LOG2_E, highest), (-LOG2_E, lowest))):
                most = jax.lax.broadcast_in_dim(most * scale, x[0].shape, [0])
                powers = [jnp.exp2(half * scale - most) for half in x]
                inverse = 1.0 / sum(half.sum(axis=1) for half in powers)
                phi = [self.phi.at[:, pl.ds(n * HEAD_DIM + m * HALF, HALF)] for m in (0, 1)]
                product = self.multiply([half.astype(jnp.bfloat16) for half in powers], phi, LINEAR)
                product = product * jax.lax.broadcast_in_dim(inverse, product.shape, [0])
                found = product if found is None else found + product
            self.store_weights(2 * call.Q, LINEAR, t, jnp.where(waits, found, 0.0))

        @pl.when(jnp.logical_not(some))
        def _():
            zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)
            self.store_weights(2 * call.Q, LINEAR, t, zeros)

    # The state and the values.

    def take_others(self):
        """Makes the result of weights, state and values."""
        self.for_heads(self.answer)

    def answer(self, i, b, h):
        """Writes a head's result, and the new key and value."""
        call = self.call
        layout = mosaic_gpu.rows_layout(call.Q, HEAD_DIM)
        scales = [plgpu.load(scale.at[h], layout=layout, optimized=False) for scale in self.branch_scales]
        self.store_phi(i)
        for half in range(2):
            self.store_out(call.columns, half * HALF, self.read_state(i, half))
        plgpu.barrier_wait(self.weights_full)
        self.store_out(0, 0, self.read_values(i))
        plgpu.commit_smem()
        self.finish(i, b, h, layout, scales)
        plgpu.barrier_arrive(self.weights_empty)

    def store_phi(self, i):
        """Writes φ(q), and once the ones by which squares are added up."""

        @pl.when(i == 0)
        def _():
            ones = mosaic_gpu.rows_layout(2 * self.call.Q, TILE)
            self.ones[...] = plgpu.layout_cast(jnp.ones((2 * self.call.Q, TILE), jnp.bfloat16), ones)

        layout = mosaic_gpu.rows_layout(LINEAR, HEAD_DIM)
        slot = jax.lax.rem(i, jnp.int32(2))
        plgpu.barrier_wait(self.new_full.at[slot])
        mosaic_gpu.wait_if(i > 0, self.phi_empty)
        x = plgpu.load(self.new.at[slot, pl.ds(0, LINEAR)], layout=layout, optimized=False).astype(jnp.float32)

        def across(y):
            return plgpu.layout_cast(jax.lax.broadcast_in_dim(y, x.shape, [0]), layout)

        for n, sign in enumerate((LOG2_E, -LOG2_E)):
            y = x * sign
            powers = jnp.exp2(y - across(y.max(axis=1)))
            y = powers * across(1.0 / powers.sum(axis=1))
            self.phi.at[:, pl.ds(n * HEAD_DIM, HEAD_DIM)][...] = y.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.phi_full)

    def read_state(self, i, half):
        """Returns half of the state's dims, times φ(q): float32 [HALF, LINEAR]."""
        total, tiles = None, STATE_TILES // 2
        for j in range(tiles):
            _, slot = self.other_slot(i, half * tiles + j)
            plgpu.barrier_wait(self.others_full.at[slot])
            tile = self.states.at[slot].transpose((1, 0))
            x = plgpu.load(tile, layout=plgpu.Layout.WGMMA_TRANSPOSED, optimized=False)
            x = plgpu.layout_cast(x.astype(jnp.bfloat16), WGMMA)
            plgpu.barrier_arrive(self.others_empty.at[slot])
            found = self.multiply([x], [self.phi.at[:, pl.ds(j * TILE, TILE)]], LINEAR)
            total = found if total is None else total + found
        return total

    def read_values(self, i):
        """Returns values times weights, float32 [HEAD_DIM, columns]."""

        def scope(sums):
            slots = [self.other_slot(i, STATE_TILES + t)[1] for t in range(self.call.tiles)]
            for t, slot in enumerate(slots):
                plgpu.barrier_wait(self.others_full.at[slot])
                weights = self.weights.at[:, pl.ds(t * TILE, TILE)]
                plgpu.wgmma(sums, self.values.at[slot].transpose((1, 0)), weights.transpose((1, 0)))
                if t:
                    plgpu.wgmma_wait(1)  # All before this tile are done.
                    plgpu.barrier_arrive(self.others_empty.at[slots[t - 1]])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(self.others_empty.at[slots[-1]])
            return sums[...]

        return pl.run_scoped(scope, plgpu.ACC((HEAD_DIM, self.call.columns), jnp.float32))

    def store_out(self, row, first, found):
        """Stores [dims, columns] of a result, beginning with this row and dim, as rows."""
        place = self.out.at[pl.ds(row, found.shape[1]), pl.ds(first, found.shape[0])].transpose((1, 0))
        place[...] = plgpu.layout_cast(found, plgpu.Layout.WGMMA_TRANSPOSED)

    def finish(self, i, b, h, layout, scales):
        """Adds up, norms and adds the branches."""
        call, Q = self.call, self.call.Q
        shape, slot = (Q, HEAD_DIM), jax.lax.rem(i, jnp.int32(2))

        def across(x, dim=0):
            return plgpu.layout_cast(jax.lax.broadcast_in_dim(x, shape, [dim]), layout)

        def rows(ref, part):
            """Loads [Q] numbers of those keys that were written since the ring went round, or before."""
            return plgpu.load(ref.at[pl.ds(part * Q, Q)], layout=layout.reduce(1), optimized=False)

        def out(first):
            return plgpu.load(self.out.at[pl.ds(first, Q)], layout=layout, optimized=False)

        most = [rows(self.most, part) for part in (0, 1)]
        shrink = [jnp.exp2(part - jnp.maximum(*most)) for part in most]
        weight = rows(self.weight, 0)
        totals = [[rows(self.totals.at[n], part) for n in range(4 * KEY_WARPGROUPS)] for part in (0, 1)]
        total = (sum(totals[0]) + weight) * shrink[0] + sum(totals[1]) * shrink[1]
        new_k, new_v = (
            plgpu.load(self.new.at[slot, 2 * Q + n], layout=layout.reduce(0), optimized=False) for n in (0, 1)
        )
        o = (out(0) + across(new_v.astype(jnp.float32), 1) * across(weight)) * across(shrink[0])
        softmax = _rounded((o + out(Q) * across(shrink[1])) * across(1.0 / total))
        linear = _rounded(out(2 * Q) + out(call.columns))
        result = None
        for x, scale in zip((softmax, linear), scales, strict=True):
            inverse = jax.lax.rsqrt((x * x).sum(axis=1) / HEAD_DIM + self.plan.epsilon)
            y = x * across(inverse) * scale
            result = y if result is None else result + y
        self.found.at[b, h][...] = result.astype(jnp.bfloat16)
        for kept, row in ((self.k, new_k), (self.v, new_v)):
            kept.at[b, h, self.counts[b, 0]][...] = row
        plgpu.barrier_arrive(self.new_empty.at[slot])


def _rounded(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)
