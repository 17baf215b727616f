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

from rattn.decoding.attention_gpu_linear import linear_branch
from rattn.decoding.attention_gpu_program import LEAST, MOST_QUERIES, Program
from rattn.decoding.attention_gpu_softmax import softmax_branch
from rattn.model.layers import rope_angles

# Parts of a head at most, which one program adds up; how many at a time.
MOST_PARTS, PARTS_TILE = 32, 4


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel divides its work, by scripts/bench_decode_kernels.py.

    Attributes:
      slots: that a program reads at a time.
      warps: of a program, for every 128 dims of a head.
      stages: of its pipeline.
      programs: that fill a GPU.
      least: slots that are worth a program.
    """

    slots: int
    warps: int
    stages: int
    programs: int
    least: int = 128


TILING = Tiling(slots=32, warps=2, stages=3, programs=512)
# Without a state. A fourth stage leaves a multiprocessor no room for more than its share of programs, some of which
# would otherwise come early, several to one.
FULL_TILING = dataclasses.replace(TILING, stages=4)


class Rotation(NamedTuple):
    """Rotary positions of a call.

    Attributes:
      sin, cos: float32; of a ring [S + tile, H/2], of positions 0, 1, …; of a full layer [B, H/2], of the new tokens.
      turns_4TR: of a ring, what scales keys and rotates them by their place in their tile, in the keys' dtype.
    """

    sin: jax.Array
    cos: jax.Array
    turns_4TR: jax.Array | None = None


def ring_rotation(slots: int, head_dim: int, theta: float, k_scale_H: jax.Array | None, dtype: jnp.dtype) -> Rotation:
    """Returns the rotation of a ring of so many slots, the same in all calls."""
    tile = TILING.slots
    sin, cos = rope_angles(jnp.arange(slots + tile), head_dim, theta)
    return Rotation(sin, cos, key_turns(sin[:tile], cos[:tile], k_scale_H, dtype))


def key_turns(sin_TR: jax.Array, cos_TR: jax.Array, k_scale_H: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """Returns what scales keys and rotates them by their place in their tile, [4, T, H/2]: aa, ab, bb, ba.

    Of halves a and b of a key a · aa + b · ab and b · bb + a · ba are made.
    """
    a, b = (1.0, 1.0) if k_scale_H is None else jnp.split(k_scale_H[None], 2, axis=1)
    return jnp.stack([cos_TR * a, -sin_TR * b, cos_TR * b, sin_TR * a]).astype(dtype)


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
      qkv_BKAH: as projected: a head's G queries, its key and its value; there may be more rows than sequences.
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
    B, K, S, H = k_BKSH.shape
    G, dtype = qkv_BKAH.shape[2] - 2, v_BKSH.dtype
    linear = state_BKPH is not None
    # One round of programs, as many as the GPU holds at a time, or as many as it takes.
    tiling = TILING if linear else FULL_TILING
    parts = max(1, min(tiling.programs // (B * K) - linear, S // tiling.least, MOST_PARTS))
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
        functools.partial(_kernel, plan, tiling, (*given, *wanted), parts),
        grid=(parts + linear, B * K),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in wanted.values()],
        input_output_aliases={0: 0, 1: 1, 2: 2},
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps * max(1, H // 128), num_stages=tiling.stages),
        interpret=plan.interpret,
        name="decode_attention",
    )(*given.values())
    found = dict(zip(wanted, out, strict=True))
    return found["out"], found["kept k"], found["kept v"], found["arrived"]


def _kernel(plan, tiling, names, parts, *refs):
    refs = dict(zip(names, refs, strict=True))
    program = Program(plan, refs, parts, tiling.slots)

    def read_keys():
        o, most, total = softmax_branch(program)
        if "o" not in refs:
            _finish(program, (o / total[None]).T)
            return
        for name, found in (("o", o.T), ("most", most), ("sum", total)):
            program.store(name, found, program.part)

    def read_state():
        program.store("linear", linear_branch(program).T)

    if "state" in refs:
        jax.lax.cond(program.part < parts, read_keys, read_state)
    else:
        read_keys()
    if "o" in refs:
        pl.when(_comes_last(program))(lambda: _finish(program, _sum_of_parts(program)))


def _comes_last(program):
    """Counts the program among its head's; returns whether all others have written what they found."""
    if not program.plan.interpret:
        plgpu.debug_barrier()  # All threads have written; counting publishes it.
    before = plgpu.atomic_add(program.refs["arrived"], (program.batch, program.head), jnp.ones((), jnp.int32))
    return before == program.programs - 1


def _sum_of_parts(program):
    """Returns the softmax branch [Q, H], and counts from zero again."""
    plgpu.store(program.refs["arrived"].at[program.batch, program.head], jnp.zeros((), jnp.int32))

    def read(i, carry):
        o, most, total = carry
        parts = [i * PARTS_TILE + n for n in range(PARTS_TILE)]
        for other_o, other_most, other_total in [
            [program.load_found(name, n, n < program.parts) for name in ("o", "most", "sum")] for n in parts
        ]:
            now = jnp.maximum(most, other_most)
            shrink, other_shrink = program.exp(most - now), program.exp(other_most - now)
            o = o * shrink[:, None] + other_o * other_shrink[:, None]
            most, total = now, total * shrink + other_total * other_shrink
        return o, most, total

    H, Q = program.H, program.Q
    start = jnp.zeros((Q, H), jnp.float32), jnp.full(Q, LEAST), jnp.zeros(Q, jnp.float32)
    o, _, total = jax.lax.fori_loop(0, pl.cdiv(program.parts, PARTS_TILE), read, start)
    return o / total[:, None]


def _finish(program, softmax):
    """Writes o of the softmax branch [Q, H], or of both."""
    softmax = softmax.astype(program.dtype)
    if "linear" in program.refs:
        linear = program.load_found("linear", None, True)
        softmax = _branch(program, softmax, "softmax scale") + _branch(program, linear, "linear scale")
    program.store("out", softmax)


def _branch(program, x, scale):
    inverse = program.inverse_rms([x])
    index, mask = program.window(program.rows, program.rows < program.G, program.G, 0, program.H)
    return (
        x.astype(jnp.float32) * inverse * plgpu.load(program.refs[scale].at[program.head, *index], mask=mask, other=0.0)
    )
