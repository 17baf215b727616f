"""One token of a sequence against a ring of keys and a state, as one kernel for a Hopper GPU.

    s_j = q · R(age_j) k_j / √H        o₁ = Σ softmax(s)_j v_j                     keys inside the window
    o₂ = φ(q) · state + Σ φ(q)·φ(k_j) v_j                                           keys that wait for the fold
    o = rms_norm(o₁) · γ₁ + rms_norm(o₂) · γ₂

A step reads some 400 KB for a key/value head of a sequence, and all that counts is that memory never rests. So the copy
engine brings tiles of 64 slots through one ring of shared memory, a head after another, a few at a time: keys, the
state, values. The first are asked for before the kernel before this one is done, for what is in the cache does not
depend on it. A program has a multiprocessor for itself and four warpgroups:

    copies    keys … keys that wait … state … values                                         `Copies`
    keys      every other tile of keys: scores, their maximum, weights                       `Keys`, two of them
    answers   φ(q), weights of keys that wait, the state, and when weights are there values  `Answers`

A ring's keys are kept as projected, for the state takes them so. They go from shared memory to registers once, are
normed and turned by their place in their tile there, and from there to the tensor cores. Queries are turned by the age
of the tile's first slot, twice: as if the tile were written since the ring went round, and as if before (the ring's
seam is in the tile of the newest slot); each key counts in one of the two. All scores of a head fit in registers, so
that there is one maximum and one sum for it, no rescaling. Keys that wait for the fold are in one or two of the tiles,
which are copied twice, and have columns of weights of their own. Keys, dims of values and of the state are the long
side of each product and queries the short one.

A program takes whole heads, all programs as many. Of each head that is left then, where there are programs enough, one
takes the softmax branch and another the linear one; the program that begins first leaves its branch in device memory
for the other to add.

Work on tiles is in loops, not written out: instructions that run once are fetched more slowly than they are done.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rattn.decoding import mosaic_gpu
from rattn.decoding.attention_gpu import key_turns
from rattn.decoding.attention_ring_gpu_answers import Answers
from rattn.decoding.attention_ring_gpu_keys import Keys
from rattn.decoding.attention_ring_gpu_plan import (
    COPY_REGISTERS,
    FIRST_TAKER,
    HEAD_DIM,
    KEY_REGISTERS,
    KEY_WARPGROUPS,
    MOST_TILES,
    OTHER_REGISTERS,
    TILE,
    Call,
)
from rattn.decoding.attention_ring_gpu_warpgroup import Copies, shared_memory
from rattn.decoding.cache import CacheLayout
from rattn.decoding.layers import LayerSpec
from rattn.decoding.mosaic_gpu import queries_of
from rattn.model.layers import rope_angles

# Key/value heads of all sequences from which it is used: with 32 it is faster than `attention_gpu`, fewer are untimed.
LEAST_HEADS = 32
# Parameters of Mosaic GPU's profiler, which times the named scopes of every program.
PROFILE = {}


def fits(layer: LayerSpec, layout: CacheLayout) -> bool:
    """Returns whether the kernel takes a layer and its cache."""
    slots = layout.slots(layer)
    return (
        layer.kind == "rattention"
        and layout.batch * layer.kv_heads >= LEAST_HEADS
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
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is fixed when a call is compiled.

    Attributes:
      window: W.
      epsilon: of all norms.
      normed: whether queries and keys are normed for the softmax branch.
      interpret: how to run it on a CPU, to test it, or None.
    """

    window: int
    epsilon: float
    normed: bool
    interpret: plgpu.InterpretGPUParams | None = None


def turns(head_dim: int, theta: float | None, k_scale_H: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """Returns what scales keys and turns them by their place in their tile, [4, TILE, H/2], the same in all calls."""
    return key_turns(*_angles(jnp.arange(TILE), head_dim, theta), k_scale_H, dtype)


class Moment(NamedTuple):
    """What a call takes that follows from where the sequences stand, whatever the layer holds.

    Attributes:
      counts_B3: int32; see `moment`.
      angles: float32 [2, KEY_WARPGROUPS · 2 Q + 1, H/2], sines and cosines by which queries are turned: those of each
        warpgroup's first tile of keys, and what lies between two of its tiles.
    """

    counts_B3: jax.Array
    angles: jax.Array


def moment(
    newest: jax.Array,
    known_B: jax.Array,
    unfolded: jax.Array,
    slots: int,
    group: int,
    head_dim: int,
    theta: float | None,
) -> Moment:
    """Makes a call's `Moment`.

    Args:
      newest: int32, the new key's slot; the one before it is to its left, that of slot 0 in the last.
      known_B: int32, how many tokens back a sequence reaches, itself included.
      unfolded: int32, keys that left the window since the fold.
      slots: of a ring.
      group: query heads of a key/value head.
      head_dim: H.
      theta: of the rotation, or None without one.
    """
    first = jnp.arange(KEY_WARPGROUPS) * TILE
    ages = newest - first[:, None] + jnp.repeat(jnp.array([0, slots]), queries_of(group))[None]
    ages = jnp.append(ages.reshape(-1), -KEY_WARPGROUPS * TILE)
    # The same newest and unfolded for all: `Answers` zeroes the weights of tiles in which no keys wait once a program.
    counts = jnp.broadcast_to(newest, known_B.shape), known_B, jnp.broadcast_to(unfolded, known_B.shape)
    return Moment(jnp.stack(counts, axis=1), jnp.stack(_angles(ages, head_dim, theta)))


def _angles(positions, head_dim, theta):
    if theta is None:
        return jnp.zeros((len(positions), head_dim // 2)), jnp.ones((len(positions), head_dim // 2))
    return rope_angles(positions, head_dim, theta)


# Lowered once for all layers of a model.
@functools.partial(jax.jit, static_argnames="plan")
def attend(
    plan: Plan,
    qkv_BKAH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    state_BKPH: jax.Array,
    moment: Moment,
    turns_4TR: jax.Array,
    scales: tuple[jax.Array, jax.Array],
    branch_scales: tuple[jax.Array, jax.Array],
    ready_P: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns o_BKGH in v's dtype, the keys, the values and `ready_P`.

    Args:
      plan: what is fixed.
      qkv_BKAH: bfloat16, as projected: a head's G queries, its key and its value; perhaps more rows than sequences.
      k_BKSH: bfloat16, keys as projected without the new one, which takes the newest slot.
      v_BKSH: bfloat16, values, likewise.
      state_BKPH: float32, the state.
      moment: of `moment`.
      turns_4TR: of `turns`.
      scales: float32 [H], of the norms of query and key; ones where there are none.
      branch_scales: float32 [K, G, H], of the norms of the softmax and the linear branch.
      ready_P: int32, where programs say that a branch is there; `mosaic_gpu.none_ready`, also when the kernel is done.
    """
    B, K, S, H = k_BKSH.shape
    G = qkv_BKAH.shape[2] - 2
    call = Call(B, K, G, S, plan.window)
    assert call.places > 1, "A place is free when the values in the one after it are multiplied."
    branch_scales = [jnp.pad(x, ((0, 0), (0, call.Q - G), (0, 0))) for x in branch_scales]
    kept = [jax.new_ref(x) for x in (k_BKSH, v_BKSH, ready_P)]
    mesh = plgpu.Mesh(
        grid=(call.programs,),
        grid_names=("program",),
        num_threads=FIRST_TAKER + KEY_WARPGROUPS,
        thread_name="warpgroup",
    )
    found, _ = pl.kernel(
        functools.partial(_kernel, call, plan),
        out_type=(
            jax.ShapeDtypeStruct((B, K, call.Q, H), v_BKSH.dtype),
            jax.ShapeDtypeStruct((max(call.division.split, 1), call.Q, H), jnp.float32),
        ),
        mesh=mesh,
        compiler_params=mosaic_gpu.compiler_params(approx_math=True, **PROFILE),
        interpret=plan.interpret or False,
        name="decode_attention_ring",
    )(qkv_BKAH, *kept, state_BKPH, *moment, turns_4TR, *scales, *branch_scales)
    return found[:, :, :G], *(jax.freeze(x) for x in kept)


def _kernel(call, plan, *refs):
    shared = shared_memory(call, plan.interpret)
    names = "qkv", "k", "v", "ready", "state", "counts", "angles", "turns"
    names += ("q_scale", "k_scale", "softmax_scale", "linear_scale", "found", "parts")
    arrays = dict(zip(names, refs, strict=True))

    def scoped(*shared_refs):
        given = call, plan, arrays, dict(zip(shared, shared_refs, strict=True))
        number = jax.lax.axis_index("warpgroup")
        for chosen, kind, registers in (
            (number == 0, Copies, COPY_REGISTERS),
            (number == 1, Answers, OTHER_REGISTERS),
            (number >= FIRST_TAKER, Keys, KEY_REGISTERS),
        ):
            run = kind(*given).run
            pl.when(chosen)(run if plan.interpret else functools.partial(_with_registers, registers, run))

    pl.run_scoped(scoped, *shared.values(), collective_axes="warpgroup")


def _with_registers(registers, run):
    # All begin with 128.
    plgpu.set_max_registers(registers, action="decrease" if registers < 128 else "increase")
    run()
