"""The kernel of a ring and a state for a Hopper GPU: interpreted on the CPU, lowered, and run where there is a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import devices
from kernels_pallas.residual_linear_attention.feature_map import features
from rattn.config import load_config
from rattn.decoding import attention_ring_gpu, attention_ring_gpu_plan, mosaic_gpu, step
from rattn.decoding.attention_ring_gpu import Plan
from rattn.decoding.attention_ring_gpu_plan import HEAD_DIM, KEY_WARPGROUPS, TILE, Call, Division, Job
from rattn.decoding.cache import CacheLayout
from rattn.decoding.kernels import Kernels
from rattn.decoding.layers import layer_specs
from rattn.decoding.sampling import Sampling
from rattn.model.layers import rms_norm, rope_angles, rotate
from tests.rattn.decoding.conftest import TWO_MIXERS, WIDE_HEADS, check_attention, lowered_step, races

H, EPSILON, THETA = HEAD_DIM, 1e-6, 1e4
# Heads that the kernel takes in the first of two layers.
MINIATURE = WIDE_HEADS | TWO_MIXERS


def drawn(batch, heads, group, slots):
    """Returns qkv, keys, values, a state, scales of query and key, and scales of the branches."""
    random = np.random.default_rng(5)

    def draw(*shape, dtype=jnp.bfloat16):
        return random.standard_normal(shape, np.float32).astype(dtype)

    kept = [draw(batch, heads, slots, H) for _ in range(2)]
    scales = tuple(np.float32(1) + np.float32(0.3) * draw(H, dtype=np.float32) for _ in range(2))
    branch_scales = tuple(random.uniform(0.5, 1.5, (heads, group, H)).astype(np.float32) for _ in range(2))
    state = draw(batch, heads, 2 * H, H, dtype=np.float32)
    return draw(batch, heads, group + 2, H), *kept, state, scales, branch_scales


def by_hand(plan, qkv, k, v, state, newest, known, unfolded, theta, scales, branch_scales):
    """Returns both branches, normed, in float64, of keys that are normed and rotated as training does."""
    group, slots = qkv.shape[2] - 2, k.shape[2]
    q, k, v = qkv[:, :, :group], np.array(k), np.array(v)
    k[:, :, newest], v[:, :, newest] = qkv[:, :, group], qkv[:, :, group + 1]
    ages = (newest - np.arange(slots)) % slots

    @jax.jit
    def positioned(x, scale, positions):
        x = rms_norm(x, scale, EPSILON) if plan.normed else x
        if theta is None:
            return x
        return rotate(x, *(angle[None, None] for angle in rope_angles(positions, H, theta)))

    softmax_q, softmax_k = positioned(q, scales[0], np.zeros(1)), positioned(k, scales[1], -ages)
    phi, phi_k = jax.jit(lambda *x: [features("softmax", one) for one in x])(q, k)
    softmax_q, softmax_k, v, phi, phi_k, state = (
        np.asarray(x, np.float64) for x in (softmax_q, softmax_k, v, phi, phi_k, state)
    )
    reach = np.minimum(plan.window, known)[:, None]
    weights = np.exp(np.einsum("bkgh,bksh->bkgs", softmax_q, softmax_k) * H**-0.5)
    weights = np.where((ages[None] < reach)[:, None, None], weights, 0)
    softmax = np.einsum("bkgs,bksh->bkgh", weights / weights.sum(-1, keepdims=True), v)
    waits = (ages[None] >= plan.window) & (ages[None] < plan.window + unfolded) & (ages[None] < known[:, None])
    scores = np.einsum("bkgp,bksp->bkgs", phi, phi_k) * waits[:, None, None]
    linear = np.einsum("bkgs,bksh->bkgh", scores, v) + np.einsum("bkgp,bkph->bkgh", phi, state)
    return [
        o / np.sqrt(np.mean(o * o, axis=-1, keepdims=True) + EPSILON) * scale
        for o, scale in zip((softmax, linear), branch_scales, strict=True)
    ]


def assert_the_rings_never_wait_for_themselves(call):
    """Plays the warpgroups' waits: a kernel that waits for itself would never end, nor its test.

    Three heads, two and the softmax or the linear branch of a third, and a branch alone.
    """
    whole, softmax, linear = (1, 1), (1, 0), (0, 1)
    for branches in (whole,) * 3, (whole, whole, softmax), (whole, whole, linear), (softmax,), (linear,):
        assert_it_never_waits_for_itself(call, [Job(i, 0, 0, *each) for i, each in enumerate(branches)])
    # As FINER divides heads.
    cases = [((whole, linear, linear), Division(1, 1, 2, linear_each=2))]
    if call.pairs_fit:
        cases += [((softmax, softmax), Division(1, 1, 2, 1)), ((whole, softmax, softmax), Division(1, 2, 2, 1))]
    for branches, call.division in cases:
        jobs = [Job(i, 0, 0, *(np.int32(x) for x in each)) for i, each in enumerate(branches)]
        assert_it_never_waits_for_itself(call, jobs)


def assert_it_never_waits_for_itself(call, jobs):
    assert call.places > 1
    programs = {"copy": [], "answers": [], 0: [], 1: []}
    for job in jobs:
        i, first = job.i, call.numbers(job)
        copies = [("copy", (i, number)) for number in range(first.keys, first.end)]
        early, values = call.early * job.softmax, first.values - first.keys
        # What is new is copied for the first job when there is no more room, for others before the values in front.
        programs["copy"] += copies[:early] + ([("copy", (0, "new"))] if i == 0 else [])
        programs["copy"] += copies[early:values]
        programs["copy"] += ([("copy", (i + 1, "new"))] if i + 1 < len(jobs) else []) + copies[values:]
        for number in range(KEY_WARPGROUPS if job.softmax else 0):
            programs[number] += [("need", (i, "new"))]
            programs[number] += [("take", (i, n)) for n in range(first.keys + number, first.waiting, KEY_WARPGROUPS)]
            programs[number] += [("need", (i - 1, "answer"))] if i else []
            programs[number] += [("make", (i, "weights", number))]
        programs["answers"] += [("need", (i, "new"))]
        programs["answers"] += [("take", (i, n)) for n in range(first.waiting, first.values)]
        programs["answers"] += [("need", (i, "weights", number)) for number in (0, 1) if job.softmax]
        programs["answers"] += [("take", (i, n)) for n in range(first.values, first.end)] + [("make", (i, "answer"))]
    used, made, room = {}, set(), {"new": 2}

    def place(number):
        return int(call.place(np.int32(number)))

    def can(act, item):
        if act == "copy":
            return room["new"] > 0 if item[1] == "new" else place(item[1]) not in used
        return act == "make" or item in made

    def perform(act, item):
        if act in ("copy", "make"):
            made.add(item)
        if item[1] in ("new", "answer"):
            room["new"] += {"copy": -1, "make": 1}.get(act, 0)
        elif act == "copy":
            used[place(item[1])] = item
        elif act == "take":
            assert used.pop(place(item[1])) == item

    moved = True
    while moved:
        moved = False
        for program in programs.values():
            while program and can(*program[0]):
                perform(*program.pop(0))
                moved = True
    assert not any(programs.values())


def roundings(found, wanted):
    """Returns how many roundings to bfloat16, one after another, make such an error; see `test_attention_gpu`."""
    each = (1, 2, 3)
    error_B = np.sqrt(np.mean((np.asarray(found, np.float64) - wanted) ** 2, each) / np.mean(wanted**2, each))
    return 3 * (256 * error_B.max()) ** 2


def check(batch, heads, group, window, fold_tokens, newest, unfolded, theta, normed, interpret=None):
    """Compares both branches, each by itself, by a scale of zero for the other, and their sum."""
    slots = window + fold_tokens
    qkv, k, v, state, scales, branch_scales = drawn(batch, heads, group, slots)
    # All that a ring holds, less, the new token alone, and few; the last slots wait or are past the beginning.
    known = np.array([10_000, slots - 7, 1, 5] * batch, np.int32)[:batch]
    plan = Plan(window, EPSILON, normed, interpret)
    wanted = by_hand(plan, qkv, k, v, state, newest, known, unfolded, theta, scales, branch_scales)

    @jax.jit
    def attend(qkv, k, v, state, newest, known, unfolded, scales, branch_scales, ready):
        moment = attention_ring_gpu.moment(newest, known, unfolded, slots, group, H, theta)
        turns = attention_ring_gpu.turns(H, theta, scales[1] if normed else None, jnp.bfloat16)
        return attention_ring_gpu.attend(plan, qkv, k, v, state, moment, turns, scales, branch_scales, ready)

    ready = mosaic_gpu.none_ready()
    given = qkv, k, v, state, np.int32(newest), known, np.int32(unfolded), scales
    zeros = np.zeros_like(branch_scales[0])
    # As the Triton kernel's test derives them: the weights and the result, what enters scores, what a norm makes of a
    # branch; φ of query and key, their product, the branch and its norm.
    for branches, want, most in (
        ((branch_scales[0], zeros), wanted[0], 3 + 5.5),
        ((zeros, branch_scales[1]), wanted[1], 5),
        (branch_scales, sum(wanted), 3 + 5.5),
    ):
        found, kept_k, kept_v, ready = attend(*given, branches, ready)
        assert not np.any(ready)
        assert 0 < roundings(found, want) < most
    for before, after, row in ((k, kept_k, group), (v, kept_v, group + 1)):
        want = np.array(before)
        want[:, :, newest] = qkv[:, :, row]
        np.testing.assert_array_equal(np.asarray(after, np.float32), want.astype(np.float32))


@pytest.mark.parametrize(
    "case",
    [
        # batch, heads, group, window, fold tokens, newest, unfolded, theta, normed
        (3, 1, 4, 100, 28, 90, 20, THETA, True),
        # More tiles than shared memory holds; eight columns for queries.
        (2, 1, 5, 512, 32, 511, 9, None, True),
        (1, 1, 1, 100, 92, 0, 1, THETA, False),
        (2, 1, 8, 96, 64, 0, 64, THETA, True),
    ],
)
def test_both_branches_by_hand(interpreter, monkeypatch, capsys, case):
    """One program takes all heads: each of its warpgroups is a thread of JAX's, which has eight here."""
    batch, heads, group, window, fold_tokens, *_ = case
    assert_the_rings_never_wait_for_themselves(Call(batch, heads, group, window + fold_tokens, window))
    monkeypatch.setattr(attention_ring_gpu_plan, "PROGRAMS", 1)
    check(*case, interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert not races(capsys.readouterr().out)


@pytest.mark.parametrize("case", [(1, 3, 4, 100, 28, 12, 28, THETA, True), (1, 3, 5, 512, 32, 511, 9, None, True)])
def test_two_programs_share_a_third_head(interpreter, monkeypatch, capsys, case):
    """The one with the linear branch is interpreted first, as it begins first on a GPU."""
    monkeypatch.setattr(attention_ring_gpu_plan, "PROGRAMS", 2)
    check(*case, interpret=plgpu.InterpretGPUParams(detect_races=True))
    # The search knows of no program that waits for another's number in device memory. Nor that the newest slot is
    # written after that: it is read before, with the tile in which others wait.
    found = [race for race in races(capsys.readouterr().out) if "(take_ready)" not in race and ".take)" not in race]
    assert not [race for race in found if ".write)" not in race or "(Copies.copy_tiles" not in race]


@pytest.mark.parametrize(
    "heads", [1, 66, 128, 132, 134, 160, 176, 177, 192, 198, 199, 220, 221, 256, 264, 288, 330, 352, 400, 512]
)
@pytest.mark.parametrize("finer", [False, True])
def test_every_branch_of_every_head_is_one_programs(monkeypatch, heads, finer):
    monkeypatch.setattr(attention_ring_gpu_plan, "FINER", finer)
    call = Call(heads, 1, 4, 544, 512)
    programs = np.arange(call.programs, dtype=np.int32)
    count, end, branches = np.asarray(call.jobs(programs)), np.zeros(call.programs, np.int32), {}
    for i in range(count.max()):
        job = call.job(programs, np.int32(i))
        numbers, there = call.numbers(job), count > i
        assert np.array_equal(np.broadcast_to(numbers.keys, there.shape)[there], end[there])
        end = np.where(there, numbers.end, end)
        softmax, linear = (np.broadcast_to(x, there.shape) for x in (job.softmax, job.linear))
        split = np.asarray(call.split_number(job))[there & (softmax * linear == 0)]
        assert np.all((split >= 0) & (split < min(call.division.split, 132)))
        for program, head in zip(programs[there], np.asarray(job.b)[there], strict=True):
            for name, has in (("softmax", softmax), ("linear", linear)):
                if has[program]:
                    assert branches.setdefault((head, name), program) == program
    assert len(branches) == 2 * heads
    for head in range(heads):
        # Who waits for another began after it.
        linear, softmax = branches[head, "linear"], branches[head, "softmax"]
        assert linear >= softmax if call.division.pairs else linear <= softmax
    (each, rest), of_linear = divmod(heads, 132), 2 * call.waiting_tiles + 8
    whole = call.tiles * 2 + call.waiting_tiles + 8
    most = -(-heads // 132) * whole
    if each and 0 < rest <= 66:
        most = each * whole + (of_linear if finer and rest <= 44 else 2 * call.tiles)
    elif each and finer and 66 < rest <= 88:
        most = each * whole + 2 * of_linear
    assert end.max() == most


@pytest.mark.parametrize(("group", "slots"), [(4, 544), (5, 544), (8, 544), (4, 1088), (3, 1056), (8, 1088)])
@pytest.mark.parametrize("fold_tokens", [8, 64, 300])
def test_the_rings_never_wait_for_themselves(group, slots, fold_tokens):
    assert_the_rings_never_wait_for_themselves(Call(3, 1, group, slots, slots - fold_tokens))


def test_the_smallest_ring_never_waits_for_itself():
    assert_the_rings_never_wait_for_themselves(Call(3, 1, 1, 72, 64))


@pytest.mark.parametrize(("slots", "fold_tokens"), [(544, 32), (128, 28), (192, 92), (72, 8), (552, 100)])
def test_tiles_in_which_keys_wait(slots, fold_tokens):
    call = Call(1, 1, 4, slots, slots - fold_tokens)
    for newest in range(slots):
        for unfolded in (0, 1, fold_tokens // 2, fold_tokens):
            waiting = (newest - call.W - np.arange(unfolded)) % slots // TILE
            found = call.waiting_tile(np.arange(call.waiting_tiles), np.int32(newest), np.int32(unfolded))
            assert set(waiting) <= set(np.asarray(found))
            assert len(set(np.asarray(found))) == call.waiting_tiles


def test_it_lowers_for_a_hopper_in_the_layers_that_it_fits(miniature, monkeypatch):
    monkeypatch.setattr(devices, "on_hopper", lambda: True)
    monkeypatch.setattr(attention_ring_gpu, "LEAST_HEADS", 6)
    mini = miniature(fold_tokens=8, attention="pallas_gpu_hopper", **MINIATURE)
    layer, full = mini.decoder.layers
    layout = mini.decoder.layout(3, 96)
    assert attention_ring_gpu.fits(layer, layout)
    assert not attention_ring_gpu.fits(layer, mini.decoder.layout(2, 96))
    assert not attention_ring_gpu.fits(layer, mini.decoder.layout(3, 48))
    assert not attention_ring_gpu.fits(layer, dataclasses.replace(layout, fold_tokens=9))
    assert not attention_ring_gpu.fits(full, layout)
    for change in ({"head_dim": 64}, {"query_heads": 18}, {"feature_map": "elu"}, {"feature_map_after_qk_norm": True}):
        assert not attention_ring_gpu.fits(dataclasses.replace(layer, **change), layout)
    assert not attention_ring_gpu.fits(layer, dataclasses.replace(layout, state_dtype="bfloat16"))
    long = dataclasses.replace(layer, window=2048), dataclasses.replace(layout, capacity=4096)
    assert not attention_ring_gpu.fits(*long)
    assert lowered_step(mini, 3, 96).count("@mosaic_gpu_v2(") == 1


@pytest.mark.parametrize(
    ("attention", "products", "batch", "changes", "graphs"),
    [
        ("pallas_gpu_hopper", "pallas_gpu_hopper", 48, {}, False),
        ("pallas_gpu_hopper", "pallas_gpu_hopper", 32, {}, False),
        ("pallas_gpu_hopper", "pallas_gpu_hopper", 1, {}, True),
        ("pallas_gpu_hopper", "pallas_gpu_hopper", 136, {}, True),
        ("pallas_gpu_hopper", "pallas_gpu_hopper", 49, {}, True),  # XLA pads what attention gives to products.
        ("pallas_gpu_hopper", "pallas_gpu_hopper", 48, {"query_heads": 12}, True),  # XLA cuts a fourth query off.
        ("pallas_gpu_hopper", "pallas_gpu_hopper", 48, {"pattern": ("rattention", "linear", "full")}, True),
        ("pallas_gpu_hopper", "xla", 48, {}, True),
        ("pallas_gpu", "pallas_gpu", 48, {}, True),
        ("xla", "xla", 48, {}, True),
    ],
)
def test_steps_are_no_graphs_where_only_kernels_follow_each_other(attention, products, batch, changes, graphs):
    model = load_config("configs/rattn_3b.py").model
    model.update(changes)
    layers = layer_specs(model)
    layout = CacheLayout(batch, 2048, 512, 32, "bfloat16")
    options = step.compiler_options(layers, layout, Kernels(attention, products))
    assert options == (None if graphs else {"xla_gpu_enable_command_buffer": ""})


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        (3, 2, 4, 512, 32, 40, 17, THETA, True),
        (3, 2, 4, 512, 32, 543, 32, THETA, True),
        (3, 2, 4, 512, 32, 511, 32, None, True),
        (3, 2, 5, 512, 32, 300, 9, THETA, True),
        (150, 4, 4, 128, 32, 70, 20, THETA, True),  # several heads a program
        (48, 4, 4, 512, 32, 70, 20, THETA, True),  # a head and a branch
        (48, 4, 8, 512, 32, 530, 32, THETA, True),
        # 136 heads, of which four are split. A sequence has four: the bound is of a mean, and of one head's 512 numbers
        # the worst of 132 is twice that, where no head is split as where some are.
        (34, 4, 4, 100, 28, 12, 28, THETA, True),
        (2, 1, 3, 1024, 32, 1040, 0, THETA, False),
        (64, 4, 8, 1024, 64, 0, 64, THETA, True),
    ],
)
def test_on_a_gpu_both_branches_by_hand(case):
    check(*case)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # Of products, and of the fold.
@pytest.mark.parametrize("rows", [32, 40])
def test_on_a_gpu_steps_sample_the_same_with_and_without_graphs(miniature, monkeypatch, rows):
    changes = MINIATURE | {"width": 1024, "mlp_width": 1024}
    mini = miniature(fold_tokens=8, attention="pallas_gpu_hopper", products="pallas_gpu_hopper", **changes)
    tokens, keys = np.random.default_rng(4).integers(0, 64, (rows, 70)), jax.random.split(jax.random.key(3), rows)
    found = []
    for batches in (range(0), step.WITHOUT_GRAPHS):
        monkeypatch.setattr(step, "WITHOUT_GRAPHS", batches)
        mini.decoder.compiled.cache_clear()
        _, cache = mini.chunk(mini.decoder.empty_cache(rows, 128), tokens, 70)
        newest, drawn = tokens[:, -1].astype(np.int32), []
        for first in range(0, 32, 8):
            out, cache = mini.decoder.sample(mini.weights, cache, newest, keys, first, Sampling())
            newest = out[:, -1]
            drawn.append(out)
        found.append(jax.tree.map(lambda x: np.asarray(x, np.float32), (drawn, cache.layers)))
    mini.decoder.compiled.cache_clear()
    assert step.compiler_options(mini.decoder.layers, cache.layout, mini.decoder._kernels)
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "pairs", "linear"), [(40, 28, 1), (52, 0, 2), (72, 24, 1)])
def test_on_a_gpu_programs_take_two_branches(monkeypatch, batch, pairs, linear):
    monkeypatch.setattr(attention_ring_gpu_plan, "FINER", True)
    division = Call(batch, 4, 4, 544, 512).division
    assert (division.pairs, division.linear_each) == (pairs, linear)
    check(batch, 4, 4, 512, 32, 70, 20, THETA, True)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # Of the layers that it does not take.
@pytest.mark.parametrize("programs", [attention_ring_gpu_plan.PROGRAMS, 4])  # Of six heads four have one, two a branch.
def test_on_a_gpu_a_model_decodes_as_with_xla(miniature, monkeypatch, programs):
    monkeypatch.setattr(attention_ring_gpu, "LEAST_HEADS", 6)
    monkeypatch.setattr(attention_ring_gpu_plan, "PROGRAMS", programs)
    check_attention(miniature, "pallas_gpu_hopper", MINIATURE)
