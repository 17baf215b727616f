"""One query a sequence against its cached keys, as one Triton kernel: both branches, every key read once.

A program reads a part of the keys (and of the state) of one key/value head of one sequence, and what the parts found is
added up outside:

    o = Σ e^(m_n − m) o_n / Σ e^(m_n − m) l_n        softmax branch, m_n and l_n: largest score and sum of a part
    o = Σ o_n                                        linear branch

A rattention layer's keys are kept as projected; the kernel norms and rotates a tile of them on the way to the scores,
which XLA would do into an array of its own. Tiles without a visible key are skipped, so that the cost of a full layer
follows the tokens in it and not its capacity.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# Rows of the smallest matrix product.
ROWS = 16
# Slots that a program reads at a time, and its warps and pipeline stages.
TILE, WARPS, STAGES = 32, 4, 3
# Rows of a state, and keys that wait for the fold, at a time.
STATE_TILE, WAITING_TILE = 64, 16
# Programs that fill a GPU, and the fewest slots that are worth one.
PROGRAMS, MIN_SLOTS = 512, 128
LEAST = -1e30


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is fixed when a call is compiled.

    Attributes:
      window: W; the capacity for a full layer.
      fold_tokens: C; 0 without a linear branch, whose keys are then kept as attention reads them.
      epsilon: of the keys' norm; None without.
      rotated: whether keys are rotated.
      interpret: run on a CPU, to test it.
    """

    window: int
    fold_tokens: int = 0
    epsilon: float | None = None
    rotated: bool = False
    interpret: bool = False


def fits(dtype: jnp.dtype, head_dim: int, group: int, feature_map: str) -> bool:
    """Returns whether the kernel takes such heads."""
    power_of_two = head_dim >= 32 and not head_dim & (head_dim - 1)
    return dtype == jnp.bfloat16 and power_of_two and group <= ROWS and feature_map == "softmax"


def attend(
    plan: Plan,
    q_BKGH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    newest_B: jax.Array,
    known_B: jax.Array,
    *,
    phi_BKGP: jax.Array | None = None,
    state_BKPH: jax.Array | None = None,
    unfolded: jax.Array | None = None,
    scale_H: jax.Array | None = None,
    angles: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the branches' o_BKGH in v's dtype: softmax, and linear where there is a state.

    Args:
      plan: what is fixed.
      q_BKGH: queries as the softmax branch reads them.
      k_BKSH: keys, with the query's own.
      v_BKSH: values.
      newest_B: int32, the slot of the query's own key; the one before it is to its left, that of slot 0 in the last.
      known_B: int32, how many tokens back a sequence reaches, itself included.
      phi_BKGP: φ(q), in q's dtype.
      state_BKPH: the state.
      unfolded: int32, keys that left the window since the fold.
      scale_H: float32, of the keys' norm, where `plan.epsilon` is given.
      angles: float32 sines and cosines [S, H/2] by slot, where `plan.rotated`.
    """
    B, K, G, H = q_BKGH.shape
    S, dtype = k_BKSH.shape[2], v_BKSH.dtype
    linear = state_BKPH is not None
    parts = 1
    while 2 * parts * B * K <= 2 * PROGRAMS and 2 * parts * MIN_SLOTS <= S:
        parts *= 2
    if linear:
        parts = min(parts, state_BKPH.shape[2] // STATE_TILE or 1)
    unfolded_B = jnp.broadcast_to(jnp.zeros((), jnp.int32) if unfolded is None else unfolded, (B,))
    counts_B3 = jnp.stack([newest_B, known_B, unfolded_B], axis=1)
    rows = ((0, 0), (0, 0), (0, ROWS - G), (0, 0))
    given = {"counts": counts_B3, "q": jnp.pad(q_BKGH, rows), "k": k_BKSH, "v": v_BKSH}
    if plan.epsilon is not None:
        given["scale"] = scale_H
    if plan.rotated:
        given["sin"], given["cos"] = angles
    if linear:
        given |= {"phi": jnp.pad(phi_BKGP, rows), "state": state_BKPH}
    shapes = {"o": (B, K, parts, G, H), "most": (B, K, parts, G), "sum": (B, K, parts, G)}
    if linear:
        shapes["linear"] = (B, K, parts, G, H)
    out = pl.pallas_call(
        functools.partial(_kernel, plan, tuple(given), tuple(shapes), parts),
        grid=(parts, B * K),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes.values()],
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=plan.interpret,
        name="decode_attention",
    )(*given.values())
    found = dict(zip(shapes, out, strict=True))
    weight = jnp.exp(found["most"] - found["most"].max(axis=2, keepdims=True))
    total = (weight * found["sum"]).sum(axis=2)[..., None]
    softmax = (weight[..., None] * found["o"]).sum(axis=2) / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    return softmax.astype(dtype), found["linear"].sum(axis=2).astype(dtype) if linear else None


def _kernel(plan, given, wanted, parts, *refs):
    refs = dict(zip((*given, *(f"out {name}" for name in wanted)), refs, strict=True))
    here = _Program(plan, refs, parts)
    o, most, total = here.softmax_branch()
    here.store("out o", o)
    here.store("out most", most)
    here.store("out sum", total)
    if "state" in refs:
        here.store("out linear", here.linear_branch())


class _Program:
    """One program: part n of the slots of one key/value head of one sequence."""

    def __init__(self, plan, refs, parts):
        self.plan, self.refs, self.parts = plan, refs, parts
        _, heads, self.slots, self.H = refs["k"].shape
        self.part, row = pl.program_id(0), pl.program_id(1)
        self.batch, self.head = row // heads, row % heads
        self.newest, self.known, self.unfolded = (refs["counts"][self.batch, i] for i in range(3))
        self.dtype = refs["v"].dtype

    def softmax_branch(self):
        """Returns Σ e^(s − m) v, m and Σ e^(s − m) over the part's visible keys, float32, a row a query."""
        half = self.H // 2
        q = [self.refs["q"][self.batch, self.head, :, pl.ds(i * half, half)] for i in (0, 1)]
        reach = jnp.minimum(self.plan.window, self.known)
        tiles = -(-self.slots // TILE)
        per_part = -(-tiles // self.parts)
        first, last = self.part * per_part, jnp.minimum((self.part + 1) * per_part, tiles)
        # The visible slots are one run that ends at the newest, unless they go round.
        whole = reach <= self.newest + 1
        first = jnp.where(whole, jnp.maximum(first, (self.newest + 1 - reach) // TILE), first)
        last = jnp.where(whole, jnp.minimum(last, self.newest // TILE + 1), last)

        def tile(i, carry):
            o, most, total = carry
            slots = i * TILE + jnp.arange(TILE)
            ages = jnp.where(slots <= self.newest, self.newest - slots, self.newest - slots + self.slots)
            visible = (slots < self.slots) & (ages < reach)
            k = self._positioned(self._halves("k", slots, slots < self.slots), slots)
            scores = sum(self._dot(a, b.astype(self.dtype), 1) for a, b in zip(q, k, strict=True)) * self.H**-0.5
            scores = jnp.where(visible[None], scores, LEAST)
            now = jnp.maximum(most, jnp.max(scores, axis=1))
            weights = jnp.where(visible[None], jnp.exp(scores - now[:, None]), 0.0)
            shrink = jnp.exp(most - now)
            v = self._rows("v", slots, slots < self.slots, 0, self.H)
            o = o * shrink[:, None] + self._dot(weights.astype(self.dtype), v, 0)
            return o, now, total * shrink + jnp.sum(weights, axis=1)

        empty = jnp.zeros((ROWS, self.H), jnp.float32), jnp.full(ROWS, LEAST, jnp.float32), jnp.zeros(ROWS, jnp.float32)
        return jax.lax.fori_loop(first, last, tile, empty)

    def linear_branch(self):
        """Returns φ(q) · the part's rows of the state, and of the keys that wait for the fold."""
        half, P = self.H // 2, self.refs["state"].shape[2]
        rows = P // self.parts
        size = min(STATE_TILE, rows)

        def state_tile(i, o):
            place = pl.ds(self.part * rows + i * size, size)
            phi = self.refs["phi"][self.batch, self.head, :, place]
            state = self.refs["state"][self.batch, self.head, place, :]
            return o + self._dot(phi, state.astype(self.dtype), 0)

        def waiting_tile(i, o):
            waiting = (self.part + i * self.parts) * WAITING_TILE + jnp.arange(WAITING_TILE)
            ages = self.plan.window + waiting
            valid = (waiting < self.unfolded) & (ages < self.known)
            slots = (self.newest - ages) % self.slots
            slots = jnp.where(slots < 0, slots + self.slots, slots)
            phi_k = _features(*self._halves("k", slots, valid))
            phi_q = [self.refs["phi"][self.batch, self.head, :, pl.ds(j * half, half)] for j in range(4)]
            scores = sum(self._dot(a, b.astype(self.dtype), 1) for a, b in zip(phi_q, phi_k, strict=True))
            scores = jnp.where(valid[None], scores, 0.0).astype(self.dtype)
            return o + self._dot(scores, self._rows("v", slots, valid, 0, self.H), 0)

        o = jax.lax.fori_loop(0, rows // size, state_tile, jnp.zeros((ROWS, self.H), jnp.float32))
        tiles = -(-self.plan.fold_tokens // (WAITING_TILE * self.parts))
        return jax.lax.fori_loop(0, tiles, waiting_tile, o)

    def store(self, name, value):
        """Writes the rows of the group's queries."""
        ref = self.refs[name]
        rows, G = jnp.arange(ROWS), ref.shape[3]
        # A row that does not exist gets an index past the end: interpret mode applies the mask after the access.
        index, mask = jnp.where(rows < G, rows, G), rows < G
        if value.ndim == 1:
            plgpu.store(ref.at[self.batch, self.head, self.part, index], value, mask=mask)
            return
        columns = jnp.broadcast_to(jnp.arange(self.H)[None], value.shape)
        index, mask = (jnp.broadcast_to(x[:, None], value.shape) for x in (index, mask))
        plgpu.store(ref.at[self.batch, self.head, self.part, index, columns], value, mask=mask)

    def _rows(self, name, slots, valid, first, count):
        """Loads [slots, count] columns of k or v, zero where not valid."""
        ref = self.refs[name]
        shape = (slots.shape[0], count)
        index = jnp.broadcast_to(jnp.where(valid, slots, self.slots)[:, None], shape)
        columns = jnp.broadcast_to(first + jnp.arange(count)[None], shape)
        mask = jnp.broadcast_to(valid[:, None], shape)
        return plgpu.load(ref.at[self.batch, self.head, index, columns], mask=mask, other=jnp.zeros((), ref.dtype))

    def _halves(self, name, slots, valid):
        """Loads the two halves of the keys' dims, which rotation pairs, in float32."""
        half = self.H // 2
        return [self._rows(name, slots, valid, i * half, half).astype(jnp.float32) for i in (0, 1)]

    def _positioned(self, k, slots):
        """Norms and rotates keys as the softmax branch reads them, with training's roundings."""
        half = self.H // 2
        if self.plan.epsilon is not None:
            square = sum(jnp.sum(x * x, axis=1) for x in k) / self.H
            inverse = jax.lax.rsqrt(square + self.plan.epsilon)[:, None]
            scales = [self.refs["scale"][pl.ds(i * half, half)] for i in (0, 1)]
            k = [(x * inverse * scale[None]).astype(self.dtype) for x, scale in zip(k, scales, strict=True)]
            k = [x.astype(jnp.float32) for x in k]
        if not self.plan.rotated:
            return k
        shape = (slots.shape[0], half)
        index = jnp.broadcast_to(jnp.minimum(slots, self.slots - 1)[:, None], shape)
        columns = jnp.broadcast_to(jnp.arange(half)[None], shape)
        sin, cos = (self.refs[name][index, columns] for name in ("sin", "cos"))
        return [k[0] * cos - k[1] * sin, k[1] * cos + k[0] * sin]

    def _dot(self, a, b, b_dim):
        if self.plan.interpret:  # the CPU multiplies no bfloat16; the products are the same
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jax.lax.dot_general(a, b, (((1,), (b_dim,)), ((), ())), preferred_element_type=jnp.float32)


def _features(first, second):
    """Returns the four quarters of φ: softmax(x) and softmax(−x), each in the halves that x came in."""
    quarters = []
    for sign in (1.0, -1.0):
        halves = [sign * first, sign * second]
        most = jnp.maximum(*(jnp.max(x, axis=1) for x in halves))[:, None]
        powers = [jnp.exp(x - most) for x in halves]
        total = sum(jnp.sum(x, axis=1) for x in powers)[:, None]
        quarters += [x / total for x in powers]
    return quarters
