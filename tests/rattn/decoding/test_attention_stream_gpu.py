"""The kernel of positioned keys for a Hopper GPU: interpreted on the CPU, lowered, and run where there is a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from rattn.decoding import (
    attention,
    attention_ring_gpu,
    attention_stream_gpu,
    attention_stream_gpu_plan,
    mosaic_gpu,
)
from rattn.decoding.attention_stream_gpu_plan import HEAD_DIM, PAIRS, TAKERS, TILE
from rattn.decoding.cache import Clock
from rattn.model.layers import rope_angles
from tests.rattn.decoding.conftest import WIDE_HEADS, check_attention, lowered_step, races
from tests.rattn.decoding.test_attention_gpu import (
    EPSILON,
    assert_kept,
    assert_within_rounding,
    by_hand,
    positioned,
)

H = HEAD_DIM
# Heads that the kernel takes in both layers.
MINIATURE = WIDE_HEADS | {"pattern": ("swa", "full"), "rope_pattern": (True, False)}


def check(newest, known, slots, window, heads, group, normed, rotated, interpret=None, times=1):
    """Compares a call, or what it finds `times` times one after another, with float64."""
    random = np.random.default_rng(5)

    def draw(*shape):
        return random.standard_normal(shape, np.float32).astype(jnp.bfloat16)

    newest, known = (np.array(x, np.int32) for x in (newest, known))
    batch = len(newest)
    qkv, k, v = draw(batch, heads, group + 2, H), draw(batch, heads, slots, H), draw(batch, heads, slots, H)
    scales = tuple(random.uniform(0.5, 1.5, H).astype(np.float32) for _ in range(2)) if normed else None
    angles = jax.jit(lambda x: rope_angles(x, H, 1e4))(known + 7) if rotated else None
    plan = attention_stream_gpu.Plan(EPSILON, interpret=interpret)

    @jax.jit
    def attend(qkv, k, v, newest, known, ready):
        moment = attention_stream_gpu_plan.moment(newest, known, window, slots, heads, angles)
        return attention_stream_gpu.attend(plan, qkv, k, v, moment, ready, scales)

    q = positioned(qkv[:, :, :group], scales and scales[0], angles)
    new_k = positioned(qkv[:, :, group : group + 1], scales and scales[1], angles)
    found, kept_k, kept_v, ready = attend(qkv, k, v, newest, known, mosaic_gpu.none_ready())
    for _ in range(times - 1):
        found, kept_k, kept_v, ready = attend(qkv, kept_k, kept_v, newest, known, ready)
    assert not np.any(ready)
    k = assert_kept(kept_k, k, np.asarray(new_k)[:, :, 0], newest)
    v = assert_kept(kept_v, v, qkv[:, :, -1], newest)
    ages = (newest[:, None] - np.arange(slots)[None]) % slots
    wanted = by_hand(q, k, v, ages < np.minimum(window, known)[:, None])
    past = newest == slots
    wanted[past] = qkv[past][:, :, -1:].astype(np.float64)
    # The weights and the result; products are added up in float32.
    assert_within_rounding(found, wanted, roundings=2)


CASES = [
    # newest, known, slots, window, heads, group, normed, rotated
    ((299, 270), (300, 271), 300, 300, 2, 4, False, False),  # a full layer: slot = position
    ((100, 100), (150, 70), 300, 120, 2, 8, True, True),  # a ring that goes round in one sequence
    ((5, 5), (1, 300), 300, 300, 2, 1, True, False),  # every slot of a ring
    ((300, 299), (1, 300), 300, 300, 1, 5, False, True),  # one sequence past the end, which sees its own key alone
]


@pytest.fixture
def programs(interpreter, monkeypatch):
    """Returns a function that sets how many programs there are."""
    return lambda count: monkeypatch.setattr(attention_stream_gpu_plan, "programs_of", lambda heads: count)


@pytest.mark.parametrize("case", CASES)
def test_by_hand(programs, capsys, case):
    """One program takes all heads: each of its warpgroups is a thread of JAX's, which has eight here."""
    programs(1)
    check(*case, interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert not races(capsys.readouterr().out)


@pytest.mark.parametrize("case", CASES[:2])
def test_two_programs_share_a_head(programs, case):
    programs(2)
    (newest, *_), (known, *_), *rest = case
    check((newest,), (known,), *rest[:2], 1, *rest[3:], interpret=plgpu.InterpretGPUParams())


@pytest.mark.parametrize(
    ("newest", "known", "window", "slots"),
    [
        ((2047,) * 5, (2048,) * 5, 2048, 2048),
        ((0, 2048, 70, 1000, 64), (1, 2049, 71, 900, 65), 2048, 2048),  # a full layer, also past the end
        ((0, 99, 40, 500, 499), (1000, 100, 3000, 77, 1), 500, 501),  # a ring
        ((3, 3, 3, 3, 3), (1000, 600, 500, 20, 4), 500, 512),
        ((0, 0, 0, 0, 63), (5, 1, 1000, 200, 70), 500, 504),
    ],
)
@pytest.mark.parametrize("count", [1, 7, 132])
def test_shares_divide_all_pairs_in_one_line(newest, known, window, slots, count):
    heads, tiles = 3, -(-slots // TILE)
    newest, known = (np.array(x, np.int32) for x in (newest, known))
    shares = jax.jit(attention_stream_gpu_plan.shares, static_argnums=range(2, 6))
    spans, programs = (np.asarray(x) for x in shares(newest, known, window, slots, heads, count))
    for (at, reach, first, pairs), n, k in zip(spans, newest, known, strict=True):
        assert (at, reach) == (n, min(window, k))
        ages = (n - np.arange(slots)) % slots
        needed = {slot // TILE for slot in np.flatnonzero((ages > 0) & (ages < reach))}
        read = [(first + i) % tiles for i in range(pairs)]
        assert len(set(read)) == len(read) >= 1
        assert needed <= set(read)
        # Nothing else, but for a sequence without older keys.
        assert len(read) == max(1, len(needed))
    line = [(head, pair) for head in range(5 * heads) for pair in range(spans[head // heads, 3])]
    taken, owners = [], {}
    for number, (first, pair, last, end, sharers) in enumerate(programs):
        mine = []
        for head in range(first, last + 1):
            stop = end if head == last else spans[head // heads, 3]
            mine += [(head, n) for n in range(pair if head == first else 0, stop)]
        assert abs(len(mine) - len(line) / count) < 1
        taken += mine
        for head in {head for head, _ in mine}:
            owners.setdefault(head, []).append(number)
        if mine:
            owners[last, "sharers"] = owners.get((last, "sharers"), (number, sharers))
    assert taken == line
    for head in range(5 * heads):
        own = owners[head]
        assert own == list(range(own[0], own[-1] + 1))
        if len(own) > 1:
            assert owners[head, "sharers"] == (own[0], len(own) - 1)


def test_takers_have_places_of_their_own():
    assert PAIRS % TAKERS == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        ((2047,) * 32, (2048,) * 32, 2048, 2048, 4, 4, True, True),  # a head a program
        ((2047,) * 33, (2048,) * 33, 2048, 2048, 4, 4, False, True),  # parts of two heads a program
        ((4000, 0, 700), (4001, 1, 600), 4096, 4096, 2, 8, True, False),  # many programs a head
        ((10, 519, 511, 500) * 40, (5000, 600, 512, 3) * 40, 520, 512, 4, 5, True, True),  # rings, several heads
        ((20,), (21,), 64, 64, 1, 1, False, False),
    ],
)
def test_on_a_gpu_by_hand(case):
    check(*case, times=3)


def test_it_lowers_for_a_hopper_in_the_layers_that_it_fits(miniature, hopper, monkeypatch):
    monkeypatch.setattr(attention_stream_gpu, "LEAST_HEADS", 6)
    mini = miniature(fold_tokens=8, attention="pallas_gpu_hopper", **MINIATURE)
    swa, full = mini.decoder.layers
    layout = mini.decoder.layout(3, 96)
    for layer in (swa, full):
        assert attention_stream_gpu.fits(layer, layout)
        assert not attention_stream_gpu.fits(layer, mini.decoder.layout(2, 96))
        assert not attention_stream_gpu.fits(layer, mini.decoder.layout(3, 56))
        for change in ({"head_dim": 64}, {"query_heads": 18}, {"kind": "rattention"}, {"kind": "linear"}):
            assert not attention_stream_gpu.fits(dataclasses.replace(layer, **change), layout)
        assert not attention_stream_gpu.fits(layer, dataclasses.replace(layout, dtype="float32"))
    assert not attention_stream_gpu.fits(full, mini.decoder.layout(3, 97))
    assert lowered_step(mini, 3, 96).count("@mosaic_gpu_v2(") == 2


def test_few_sequences_have_as_many_programs_as_divide_their_heads(hopper):
    assert [attention_stream_gpu_plan.programs_of(heads) for heads in (128, 256, 192, 512)] == [128, 128, 132, 128]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # Of products.
def test_on_a_gpu_a_model_decodes_as_with_xla(miniature, monkeypatch):
    monkeypatch.setattr(attention_stream_gpu, "LEAST_HEADS", 6)
    check_attention(miniature, "pallas_gpu_hopper", MINIATURE)


def test_moments_of_steps_are_those_of_their_clocks(miniature, hopper, monkeypatch):
    """Of both kernels, whose steps' moments a call makes at once."""
    for kernel in (attention_stream_gpu, attention_ring_gpu):
        monkeypatch.setattr(kernel, "LEAST_HEADS", 6)
    changes = MINIATURE | {"pattern": ("rattention", "full", "swa"), "rope_pattern": (True, False, True), "layers": 3}
    decoder = miniature(fold_tokens=8, attention="pallas_gpu_hopper", **changes).decoder
    layout = decoder.layout(3, 96)

    @jax.jit
    def moments(ahead, steps):
        at = Clock(
            length_B=jnp.array([70, 3, 88]) + ahead,
            start_B=jnp.array([0, 1, 60]),
            segment_B=jnp.zeros(3, jnp.int32),
            steps=jnp.int32(66) + ahead,
            unfolded=ahead,
        )
        return attention.moments(decoder.layers, layout, decoder._kernels, at, len(steps))

    together = moments(np.int32(0), np.zeros(8))
    assert [type(moment).__module__.rpartition(".")[2] for moment in together.values()] == [
        "attention_ring_gpu",
        "attention_stream_gpu_plan",
        "attention_stream_gpu_plan",
    ]
    for ahead in (0, 1, 7):
        alone = moments(np.int32(ahead), np.zeros(1))
        jax.tree.map(lambda x, y, ahead=ahead: np.testing.assert_array_equal(x[ahead], y[0]), together, alone)
