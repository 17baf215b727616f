"""One token of a sequence against its keys, as one Triton kernel: all that stands between two of its products.

A program reads a part of the keys of one key/value head of one sequence, every key once; where there is a state, one
more program reads it, and the keys that wait for the fold. Who comes last adds the parts up, always in their order,

    o = Σ e^(m_n − m) o_n / Σ e^(m_n − m) l_n        m_n and l_n: largest score and sum of a part

and norms and adds the two branches. Queries, key and value come as they were projected. Part 0 adds the new key and
writes it to its slot, which nobody reads. Tiles are read from the oldest to the newest, those without a visible key not
at all, so that the cost of a full layer follows the tokens in it and not its capacity. What a program takes besides is
asked for all at once, before its first tile.

Keys, dims of values and dims of the state are the long side of every matrix product and a group's queries the short
one, for tensor cores multiply at least 16 by 8 and a group has few queries: [keys, Q] and [H, Q] come out.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from rattn.decoding.attention_gpu_keys import PositionedKeys, ProjectedKeys, rotated
from rattn.decoding.triton_gpu import exp, let_next_begin
from rattn.model.layers import rope_angles

# Queries of the smallest matrix product, and of the largest group.
LEAST_QUERIES, MOST_QUERIES = 8, 16
# Slots that a program reads at a time, its warps for every 128 dims of a head and its pipeline stages.
TILE, WARPS, STAGES = 32, 2, 3
# Keys that wait for the fold, and rows of a state, that it reads at a time; parts that are added up at a time.
WAITING_TILE, STATE_TILE, PARTS_TILE = 16, 32, 4
# Programs that fill a GPU, and the fewest slots that are worth one.
PROGRAMS, MIN_SLOTS = 512, 128
LEAST = -1e30


class Rotation(NamedTuple):
    """Rotary positions of a call.

    Attributes:
      sin, cos: float32; of a ring [S + TILE, H/2], of positions 0, 1, …; of a full layer [B, H/2], of the new tokens.
      turns_4TR: of a ring, what scales keys and rotates them by their place in their tile, in the keys' dtype.
    """

    sin: jax.Array
    cos: jax.Array
    turns_4TR: jax.Array | None = None


def ring_rotation(slots: int, head_dim: int, theta: float, k_scale_H: jax.Array | None, dtype: jnp.dtype) -> Rotation:
    """Returns the rotation of a ring of so many slots, the same in all calls."""
    sin, cos = rope_angles(jnp.arange(slots + TILE), head_dim, theta)
    a, b = (1.0, 1.0) if k_scale_H is None else jnp.split(k_scale_H[None], 2, axis=1)
    turns_4TR = jnp.stack([cos[:TILE] * a, -sin[:TILE] * b, cos[:TILE] * b, sin[:TILE] * a])
    return Rotation(sin, cos, turns_4TR.astype(dtype))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is fixed when a call is compiled.

    Attributes:
      window: W; the capacity for a full layer.
      epsilon: of all norms.
      normed_features: whether φ takes query and key normed.
      interpret: run on a CPU, to test it.
    """

    window: int
    epsilon: float
    normed_features: bool = False
    interpret: bool = False


def fits(dtype: jnp.dtype, head_dim: int, group: int, feature_map: str) -> bool:
    """Returns whether the kernel takes such heads."""
    power_of_two = head_dim >= 32 and not head_dim & (head_dim - 1)
    return dtype == jnp.bfloat16 and power_of_two and group <= MOST_QUERIES and feature_map == "softmax"


def attend(
    plan: Plan,
    qkv_BKAH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    newest_B: jax.Array,
    known_B: jax.Array,
    arrivals_BK: jax.Array,
    *,
    scales: tuple[jax.Array, jax.Array] | None = None,
    rotation: Rotation | None = None,
    state_BKPH: jax.Array | None = None,
    unfolded: jax.Array | None = None,
    branch_scales: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns o_BKGH in v's dtype, the keys, the values and `arrivals_BK`.

    With a state, keys are kept as projected and positioned when they are read; without, when they are written.

    Args:
      plan: what is fixed.
      qkv_BKAH: as projected: a head's G queries, its key and its value.
      k_BKSH: keys without the new one, which takes its slot; what is past the end is dropped.
      v_BKSH: values, likewise.
      newest_B: int32, the new key's slot; the one before it is to its left, that of slot 0 in the last.
      known_B: int32, how many tokens back a sequence reaches, itself included.
      arrivals_BK: int32, in which programs count themselves: zeros, also when the kernel is done.
      scales: float32 [H], of the norms of query and key, where there are any.
      rotation: where there are rotary positions; with a state that of its ring.
      state_BKPH: the state; o is then the sum of both branches, each normed.
      unfolded: int32, keys that left the window since the fold; with a state.
      branch_scales: float32 [K, G, H], of the norms of the softmax and the linear branch; with a state.
    """
    B, K, A, H = qkv_BKAH.shape
    G, S, dtype = A - 2, k_BKSH.shape[2], v_BKSH.dtype
    linear = state_BKPH is not None
    # One round of programs, as many as the GPU holds at a time, or as many as it takes.
    parts = max(1, min(PROGRAMS // (B * K) - linear, S // MIN_SLOTS))
    unfolded_B = jnp.broadcast_to(jnp.zeros((), jnp.int32) if unfolded is None else unfolded, (B,))
    counts_B3 = jnp.stack([newest_B, known_B, unfolded_B], axis=1)
    given = {"k": k_BKSH, "v": v_BKSH, "arrivals": arrivals_BK, "counts": counts_B3, "qkv": qkv_BKAH}
    if scales is not None:
        given["q scale"], given["k scale"] = scales
    if rotation is not None:
        given["sin"], given["cos"] = rotation.sin, rotation.cos
    if linear and rotation is not None:
        given["turns"] = rotation.turns_4TR
    if linear:
        given["state"] = state_BKPH
        given["softmax scale"], given["linear scale"] = branch_scales
    wanted = {"kept k": k_BKSH, "kept v": v_BKSH, "arrived": arrivals_BK}
    wanted["out"] = jax.ShapeDtypeStruct((B, K, G, H), dtype)
    if parts + linear > 1:
        wanted["o"] = jax.ShapeDtypeStruct((B, K, parts, G, H), jnp.float32)
        wanted |= {name: jax.ShapeDtypeStruct((B, K, parts, G), jnp.float32) for name in ("most", "sum")}
    if linear:
        wanted["linear"] = jax.ShapeDtypeStruct((B, K, G, H), dtype)
    out = pl.pallas_call(
        functools.partial(_kernel, plan, (*given, *wanted), parts),
        grid=(parts + linear, B * K),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in wanted.values()],
        input_output_aliases={0: 0, 1: 1, 2: 2},
        compiler_params=plgpu.CompilerParams(num_warps=WARPS * max(1, H // 128), num_stages=STAGES),
        interpret=plan.interpret,
        name="decode_attention",
    )(*given.values())
    found = dict(zip(wanted, out, strict=True))
    return found["out"], found["kept k"], found["kept v"], found["arrived"]


def _kernel(plan, names, parts, *refs):
    refs = dict(zip(names, refs, strict=True))
    here = _Program(plan, refs, parts)

    def read_keys():
        o, most, total = here.softmax_branch()
        if "o" not in refs:
            here.finish((o / total[None]).T)
            return
        for name, found in (("o", o.T), ("most", most), ("sum", total)):
            here.store(name, found, here.part)

    def read_state():
        here.store("linear", here.linear_branch().T)

    if "state" in refs:
        jax.lax.cond(here.part < parts, read_keys, read_state)
    else:
        read_keys()
    if "o" in refs:
        pl.when(here.comes_last())(lambda: here.finish(here.sum_of_parts()))


class _Program:
    """One program: part n of the slots of one key/value head of one sequence.

    Queries and keys are pairs: the two halves of their dims, which rotation pairs.
    """

    def __init__(self, plan, refs, parts):
        self.plan, self.refs, self.parts = plan, refs, parts
        _, heads, self.slots, self.H = refs["k"].shape
        self.G, self.half = refs["qkv"].shape[2] - 2, self.H // 2
        self.Q = LEAST_QUERIES if self.G <= LEAST_QUERIES else MOST_QUERIES
        self.part, row = pl.program_id(0), let_next_begin(pl.program_id(1), plan.interpret)
        self.batch, self.head = row // heads, row % heads
        self.newest, self.known, self.unfolded = (refs["counts"][self.batch, i] for i in range(3))
        self.kept_as_projected, self.dtype = "state" in refs, refs["v"].dtype
        self.rows = jnp.arange(self.Q)

    def queries(self):
        """Returns the group's queries as projected, [Q, H/2] twice; zero past the group."""
        return self._halves("qkv", self.rows, self.rows < self.G)

    def new_key_and_value(self):
        """Returns the new token's key, [1, H/2] twice, and its value [1, H], as projected."""
        row = self.G + jnp.arange(1)
        return self._halves("qkv", row, row >= 0), self._rows("qkv", row + 1, row >= 0, 0, self.H)

    def keep(self, k, v):
        """Writes the new token's key and value."""
        slot = self.newest + jnp.arange(1)
        for name, first, x in (("kept k", 0, k[0]), ("kept k", self.half, k[1]), ("kept v", 0, v)):
            index, mask = self._window(slot, slot < self.slots, self.slots, first, x.shape[1])
            plgpu.store(self.refs[name].at[self.batch, self.head, *index], x, mask=mask)

    def softmax_branch(self):
        """Returns Σ e^(s − m) v [H, Q], m [Q] and Σ e^(s − m) [Q] over the part's visible keys, float32."""
        tiles = -(-self.slots // TILE)
        newest_tile = self.newest // TILE

        def place(i):
            """Returns the tile that is read as number i, and how old the token in its first slot is."""
            tile = newest_tile + i
            before = tile < tiles  # the slots went round since
            tile = jnp.where(before, tile, tile - tiles)
            age = self.newest - tile * TILE
            return tile, jnp.where(before, age + self.slots, age)

        # The newest slot's tile is the first, for what is older than a round, and the last.
        reach = jnp.minimum(self.plan.window, self.known)
        _, oldest = place(0)
        skipped = jnp.maximum(oldest - reach + 1, 0) // TILE
        per_part = (tiles + 1 - skipped + self.parts - 1) // self.parts
        first = skipped + self.part * per_part
        last = jnp.minimum(first + per_part, tiles + 1)
        new_k, new_v = self.new_key_and_value()
        keys = ProjectedKeys(self, tiles, TILE, place(first)[1]) if self.kept_as_projected else PositionedKeys(self)

        def read(i, carry):
            o, most, total, q = carry
            tile, age = place(i)
            slots, ages = tile * TILE + jnp.arange(TILE), age - jnp.arange(TILE)
            visible = (slots < self.slots) & (ages > 0) & (ages < reach)
            scores, q = keys.scores(q, self._halves("k", slots, slots < self.slots), tile)
            scores = jnp.where(visible[:, None], scores * self.H**-0.5, LEAST)
            now = jnp.maximum(most, jnp.max(scores, axis=0))
            weights = jnp.where(visible[:, None], self.exp(scores, now[None]), 0.0)
            shrink = self.exp(most - now)
            v = self._rows("v", slots, slots < self.slots, 0, self.H)
            o = o * shrink[None] + self.dot(v, weights.astype(self.dtype), 0, 0)
            return o, now, total * shrink + jnp.sum(weights, axis=0), q

        def with_new(o, most, total):
            k = keys.kept(new_k)
            self.keep(k, new_v)
            score = keys.score_of_new(k) * self.H**-0.5
            now = jnp.maximum(most, score)
            shrink, weight = self.exp(most - now), self.exp(score - now)
            return o * shrink[None] + new_v.astype(jnp.float32).T * weight[None], now, total * shrink + weight

        start = jnp.zeros((self.H, self.Q), jnp.float32), jnp.full(self.Q, LEAST), jnp.zeros(self.Q, jnp.float32)
        *found, _ = jax.lax.fori_loop(first, last, read, (*start, keys.start))
        return jax.lax.cond(self.part == 0, with_new, lambda *x: x, *found)

    def linear_branch(self):
        """Returns φ(q) · the state and the keys that wait for the fold, [H, Q]."""
        q = self.queries()
        if self.plan.normed_features:
            q = self.normed(q, "q scale")
        phi_q = self._features(q)

        def state_tile(i, o):
            state = self.refs["state"][self.batch, self.head, pl.ds(i * STATE_TILE, STATE_TILE), :]
            return o + self.dot(state.astype(self.dtype), self._feature_tile(q, i), 0, 1)

        def waiting_tile(i, o):
            waiting = i * WAITING_TILE + jnp.arange(WAITING_TILE)
            ages = self.plan.window + waiting
            valid = (waiting < self.unfolded) & (ages < self.known)
            slots = (self.newest - ages) % self.slots
            slots = jnp.where(slots < 0, slots + self.slots, slots)
            k = self._halves("k", slots, valid)
            phi_k = self._features(self.normed(k, "k scale") if self.plan.normed_features else k)
            scores = sum(self.dot(a, b, 1, 1) for a, b in zip(phi_k, phi_q, strict=True))
            scores = jnp.where(valid[:, None], scores, 0.0).astype(self.dtype)
            return o + self.dot(self._rows("v", slots, valid, 0, self.H), scores, 0, 0)

        o = jnp.zeros((self.H, self.Q), jnp.float32)
        o = jax.lax.fori_loop(0, 2 * self.H // STATE_TILE, state_tile, o)
        return jax.lax.fori_loop(0, (self.unfolded + WAITING_TILE - 1) // WAITING_TILE, waiting_tile, o)

    def store(self, name, value, *part):
        """Writes what was found for the group's queries: [Q] or [Q, H]."""
        index, mask = self._window(self.rows, self.rows < self.G, self.G, 0, self.H)
        if value.ndim == 1:
            index, mask = (jnp.where(self.rows < self.G, self.rows, self.G),), self.rows < self.G
        ref = self.refs[name]
        plgpu.store(ref.at[self.batch, self.head, *part, *index], value.astype(ref.dtype), mask=mask)

    def comes_last(self):
        """Counts the program among its head's; returns whether all others have written what they found."""
        if not self.plan.interpret:
            plgpu.debug_barrier()  # All threads have written; counting publishes it.
        before = plgpu.atomic_add(self.refs["arrived"], (self.batch, self.head), jnp.ones((), jnp.int32))
        return before == pl.num_programs(0) - 1

    def sum_of_parts(self):
        """Returns the softmax branch [Q, H], and counts from zero again."""
        plgpu.store(self.refs["arrived"].at[self.batch, self.head], jnp.zeros((), jnp.int32))

        def read(i, carry):
            o, most, total = carry
            parts = [i * PARTS_TILE + n for n in range(PARTS_TILE)]
            for other_o, other_most, other_total in [
                [self._found(name, n, n < self.parts) for name in ("o", "most", "sum")] for n in parts
            ]:
                now = jnp.maximum(most, other_most)
                shrink, other_shrink = self.exp(most - now), self.exp(other_most - now)
                o = o * shrink[:, None] + other_o * other_shrink[:, None]
                most, total = now, total * shrink + other_total * other_shrink
            return o, most, total

        start = jnp.zeros((self.Q, self.H), jnp.float32), jnp.full(self.Q, LEAST), jnp.zeros(self.Q, jnp.float32)
        o, _, total = jax.lax.fori_loop(0, pl.cdiv(self.parts, PARTS_TILE), read, start)
        return o / total[:, None]

    def finish(self, softmax):
        """Writes o of the softmax branch [Q, H], or of both."""
        softmax = softmax.astype(self.dtype)
        if "linear" in self.refs:
            linear = self._found("linear", None, True)
            softmax = self._branch(softmax, "softmax scale") + self._branch(linear, "linear scale")
        self.store("out", softmax)

    def _branch(self, x, scale):
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.sum(x * x, axis=1) / self.H + self.plan.epsilon)[:, None]
        index, mask = self._window(self.rows, self.rows < self.G, self.G, 0, self.H)
        return x * inverse * plgpu.load(self.refs[scale].at[self.head, *index], mask=mask, other=0.0)

    def _found(self, name, part, valid):
        """Loads what a program of this head stored, [Q] or [Q, H], past caches of an older writing."""
        rows, ref = self.rows, self.refs[name]
        valid, where = (rows < self.G) & valid, () if part is None else (part,)
        index, mask = self._window(rows, valid, self.G, 0, self.H)
        if ref.ndim == 4 and part is not None:
            index, mask = (jnp.where(valid, rows, self.G),), valid
        ref = ref.at[self.batch, self.head, *where, *index]
        other = jnp.full((), LEAST if name == "most" else 0, self.refs[name].dtype)
        return plgpu.load(ref, mask=mask, other=other, volatile=True)

    def _window(self, rows, valid, past, first, count):
        """Returns the indices of [rows, count] columns and their mask.

        A row that is not valid gets an index past the end: interpret mode applies the mask after the access.
        """
        shape = (rows.shape[0], count)
        index = jnp.broadcast_to(jnp.where(valid, rows, past)[:, None], shape)
        columns = jnp.broadcast_to(first + jnp.arange(count)[None], shape)
        return (index, columns), jnp.broadcast_to(valid[:, None], shape)

    def _rows(self, name, rows, valid, first, count):
        """Loads [rows, count] columns of the head's part of an array, zero where not valid."""
        ref = self.refs[name]
        index, mask = self._window(rows, valid, ref.shape[2], first, count)
        return plgpu.load(ref.at[self.batch, self.head, *index], mask=mask, other=jnp.zeros((), ref.dtype))

    def _halves(self, name, rows, valid):
        return [self._rows(name, rows, valid, i * self.half, self.half) for i in (0, 1)]

    def positioned(self, x, scale, rows):
        """Norms x and rotates it by these rows of the angles, with training's roundings."""
        angles = self.angles(rows) if "sin" in self.refs else None
        x = self.normed(x, scale)
        return x if angles is None else self.rounded(rotated(x, angles))

    def angles(self, rows):
        """Loads sines and cosines of these rows, [rows, H/2] each."""
        index, _ = self._window(rows, rows >= 0, 0, 0, self.half)
        return self.refs["sin"][index], self.refs["cos"][index]

    def products(self, a, x, b, y):
        """Returns a·x + b·y in bfloat16, b·y rounded too.

        Two numbers an instruction, or a GPU would take longer over a tile of keys than its memory.
        """
        if self.plan.interpret:
            a, x, b, y = (z.astype(jnp.float32) for z in (a, x, b, y))
            return (a * x + (b * y).astype(self.dtype).astype(jnp.float32)).astype(self.dtype)
        asm = """{
            .reg .b32 by;
            mov.b32 by, 0x80008000;  // -0, for there is no product alone before Hopper
            fma.rn.bf16x2 by, $3, $4, by;
            fma.rn.bf16x2 $0, $1, $2, by;
        }"""
        like = [jax.ShapeDtypeStruct(a.shape, self.dtype)]
        (out,) = plgpu.elementwise_inline_asm(
            asm, args=(a, x, b, y), constraints="=r,r,r,r,r", pack=2, result_shape_dtypes=like
        )
        return out

    def scales(self, name):
        halves = [self.refs[name][pl.ds(i * self.half, self.half)] for i in (0, 1)]
        return [half[None] for half in halves]

    def rounded(self, x):
        return tuple(half.astype(self.dtype) for half in x)

    def normed(self, x, scale):
        if scale not in self.refs:
            return x
        scales = self.scales(scale)
        inverse = self._inverse_rms(x)
        return [self._scaled(half, inverse, by) for half, by in zip(x, scales, strict=True)]

    def _inverse_rms(self, x):
        square = sum(jnp.sum(jnp.square(half.astype(jnp.float32)), axis=1) for half in x) / self.H
        return jax.lax.rsqrt(square + self.plan.epsilon)[:, None]

    def _scaled(self, x, inverse, scale):
        return (x.astype(jnp.float32) * inverse * scale).astype(self.dtype)

    def _powers(self, x, sign):
        """Returns e^(±x − m) of both halves, m [rows, 1] and the inverse of their sum."""
        halves = [half.astype(jnp.float32) if sign > 0 else -half.astype(jnp.float32) for half in x]
        most = jnp.maximum(*(jnp.max(half, axis=1) for half in halves))[:, None]
        powers = [self.exp(half, most) for half in halves]
        return powers, most, 1.0 / sum(jnp.sum(half, axis=1) for half in powers)[:, None]

    def _features(self, x):
        """Returns the pieces of φ(x): softmax(x) and softmax(−x), each in its halves."""
        pieces = []
        for sign in (1.0, -1.0):
            powers, _, inverse = self._powers(x, sign)
            pieces += [(half * inverse).astype(self.dtype) for half in powers]
        return pieces

    def _feature_tile(self, q, i):
        """Returns φ(q)'s dims of tile i, [Q, STATE_TILE], read again, for registers have no number."""
        turned = i >= self.H // STATE_TILE
        first = jnp.where(turned, i * STATE_TILE - self.H, i * STATE_TILE)
        x = self._rows("qkv", self.rows, self.rows < self.G, first, STATE_TILE)
        if self.plan.normed_features and "q scale" in self.refs:
            x = self._scaled(x, self._inverse_rms(self.queries()), self.refs["q scale"][pl.ds(first, STATE_TILE)][None])
        x = x.astype(jnp.float32)
        (_, most, inverse), (_, other_most, other_inverse) = (self._powers(q, sign) for sign in (1.0, -1.0))
        x, most = jnp.where(turned, -x, x), jnp.where(turned, other_most, most)
        return (self.exp(x, most) * jnp.where(turned, other_inverse, inverse)).astype(self.dtype)

    def exp(self, x, less=0.0):
        return exp(x, less, self.plan.interpret)

    def dot(self, a, b, a_dim, b_dim):
        """Sums over these dims, in float32."""
        if self.plan.interpret:  # the CPU multiplies no bfloat16; the products are the same
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jax.lax.dot_general(a, b, (((a_dim,), (b_dim,)), ((), ())), preferred_element_type=jnp.float32)
