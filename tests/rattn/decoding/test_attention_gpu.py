"""The Triton kernel of a step: interpreted on the CPU, lowered for a Hopper, and compiled where there is a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels_pallas import devices
from kernels_pallas.residual_linear_attention.feature_map import features
from rattn.decoding import attention_gpu
from rattn.model.layers import rms_norm, rope_angles, rotate
from tests.rattn.decoding import test_parity

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

B, K, H, EPSILON = 2, 2, 32, 1e-6


def arrays(slots, group, normed):
    """Returns qkv, keys, values, a state and the scales of a norm, or None."""
    random = np.random.default_rng(5)

    def draw(*shape, dtype=jnp.bfloat16):
        return random.standard_normal(shape, np.float32).astype(dtype)

    scales = tuple(np.float32(1) + np.float32(0.3) * draw(H, dtype=np.float32) for _ in range(2)) if normed else None
    kept = (draw(B, K, slots, H) for _ in range(2))
    return draw(B, K, group + 2, H), *kept, draw(B, K, 2 * H, H, dtype=np.float32), scales


@jax.jit
def positioned(x, scale=None, angles=None):
    """Norms and rotates as training does; angles are of x's dim before the last, or of its first."""
    if scale is not None:
        x = rms_norm(x, scale, EPSILON)
    if angles is None:
        return x
    half = x.shape[-1] // 2
    shape = (1, 1, -1, half) if angles[0].shape[0] == x.shape[2] else (-1, 1, 1, half)
    return rotate(x, *(angle.reshape(shape) for angle in angles))


def assert_kept(found, before, new_BKH, slot_B):
    """Compares a cache with what it was and the new token in its slot.

    Norm and rotation round to bfloat16 as training does, from float32 sums in another order: a rounding may fall to the
    other side, which is a unit in the last place, 2⁻⁷ of a number or less.
    """
    wanted = np.array(before, np.float32)
    for row, slot in enumerate(slot_B):
        if slot < wanted.shape[2]:
            wanted[row, :, slot] = new_BKH[row].astype(np.float32)
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, rtol=0, atol=2.0**-7 * np.abs(new_BKH).max())
    return wanted


def by_hand(q, k, v, visible_BS):
    """Softmax attention in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bkgh,bksh->bkgs", q, k) * q.shape[-1] ** -0.5
    weights = np.where(visible_BS[:, None, None], np.exp(scores), 0)
    return np.einsum("bkgs,bksh->bkgh", weights / weights.sum(-1, keepdims=True), v)


def normed_by_hand(o, scale):
    return o / np.sqrt(np.mean(o * o, axis=-1, keepdims=True) + EPSILON) * scale


def assert_within_rounding(found, wanted, roundings):
    """Compares each sequence's root mean square error with what roundings to bfloat16, one after another, make of it.

    Each changes the terms of a sum by up to 2⁻⁸ of their size, evenly spread and independently: 2⁻⁸ / √3 root mean
    square, of the terms and so of the sum, for the terms have random signs. R of them make √R · 2⁻⁸ / √3.
    """
    each = (1, 2, 3)
    error_B = np.sqrt(np.mean((np.asarray(found, np.float64) - wanted) ** 2, each) / np.mean(wanted**2, each))
    assert 0 < error_B.max() < np.sqrt(roundings / 3) * 2.0**-8


@pytest.mark.parametrize(
    ("newest", "known", "window", "group", "normed", "rotated"),
    [
        ((299, 270), (300, 271), 300, 4, False, False),  # a full layer: slot = position, sequences of two lengths
        ((100, 100), (150, 70), 120, 8, True, True),  # a ring that goes round in one sequence
        ((5, 5), (1, 300), 300, 1, True, False),
        ((299, 300), (300, 1), 300, 4, False, True),  # one sequence past the end, which sees its own key alone
    ],
)
def test_keys_as_read(newest, known, window, group, normed, rotated):
    qkv, k, v, _, scales = arrays(300, group, normed)
    newest, known = (np.array(x, np.int32) for x in (newest, known))
    angles = jax.jit(lambda x: rope_angles(x, H, 1e4))(known + 7) if rotated else None
    plan = attention_gpu.Plan(window, EPSILON, interpret=True)
    rotation = attention_gpu.Rotation(*angles) if rotated else None
    attend = jax.jit(lambda *x: attention_gpu.attend(plan, *x, scales=scales, rotation=rotation))
    found, kept_k, kept_v, arrivals = attend(qkv, k, v, newest, known, np.zeros((B, K), np.int32))
    assert not np.any(arrivals)
    q = positioned(qkv[:, :, :group], scales and scales[0], angles)
    new_k = positioned(qkv[:, :, group : group + 1], scales and scales[1], angles)
    k = assert_kept(kept_k, k, np.asarray(new_k)[:, :, 0], newest)
    v = assert_kept(kept_v, v, qkv[:, :, -1], newest)
    ages = (newest[:, None] - np.arange(300)[None]) % 300
    wanted = by_hand(q, k, v, ages < np.minimum(window, known)[:, None])
    past = newest == 300
    wanted[past] = qkv[past][:, :, -1:].astype(np.float64)
    # The weights and the result; products are added up in float32.
    assert_within_rounding(found, wanted, roundings=2)


@pytest.mark.parametrize(
    ("group", "normed", "rotated", "normed_features", "newest"),
    [
        (4, True, True, False, 40),
        (1, True, False, True, 40),
        (9, False, True, False, 269),
        (4, True, True, False, 0),
        (4, True, True, True, 127),
    ],
)
def test_keys_as_projected_and_the_linear_branch(group, normed, rotated, normed_features, newest):
    """A ring of W + C that goes round: keys normed and rotated on the way, the state, and keys that wait.

    Each branch by itself, by a scale of zero for the other, and both.
    """
    window, fold_tokens, unfolded = 250, 20, 17
    slots = window + fold_tokens
    qkv, k, v, state, scales = arrays(slots, group, normed)
    known = np.array([400, 260], np.int32)
    ages = (newest - np.arange(slots)) % slots
    angles, rotation = None, None
    if rotated:
        angles = jax.jit(lambda x: rope_angles(x, H, 1e4))(-ages)
        rotation = jax.jit(lambda: attention_gpu.ring_rotation(slots, H, 1e4, scales and scales[1], jnp.bfloat16))()
    plan = attention_gpu.Plan(window, EPSILON, normed_features, interpret=True)
    attend = jax.jit(functools.partial(attention_gpu.attend, plan))
    branch_scales = np.random.default_rng(6).uniform(0.5, 1.5, (2, K, group, H)).astype(np.float32)
    given = {
        "qkv_BKAH": qkv,
        "k_BKSH": k,
        "v_BKSH": v,
        "newest_B": np.full(B, newest, np.int32),
        "known_B": known,
        "arrivals_BK": np.zeros((B, K), np.int32),
        "scales": scales,
        "rotation": rotation,
        "state_BKPH": state,
        "unfolded": np.int32(unfolded),
    }

    def found_with(*of_branches):
        o, *kept, arrivals = attend(**given, branch_scales=tuple(np.float32(x) * y for x, y in of_branches))
        assert not np.any(arrivals)
        return o, *kept

    softmax, kept_k, kept_v = found_with((1, branch_scales[0]), (0, branch_scales[1]))
    linear, *_ = found_with((0, branch_scales[0]), (1, branch_scales[1]))
    both, *_ = found_with((1, branch_scales[0]), (1, branch_scales[1]))
    q_scale, k_scale = scales or (None, None)
    q = qkv[:, :, :group]
    k = assert_kept(kept_k, k, qkv[:, :, group], [newest] * B).astype(jnp.bfloat16)
    v = assert_kept(kept_v, v, qkv[:, :, group + 1], [newest] * B)
    reach = np.minimum(window, known)[:, None]
    wanted = by_hand(positioned(q, q_scale), positioned(k, k_scale, angles), v, ages[None] < reach)
    wanted_softmax = wanted = normed_by_hand(wanted, branch_scales[0])
    # The weights and the result, and what enters scores of size 1: by hand the norm of a key and its rotation; here the
    # query's scale, or its rotation and with a key half the cosines, half the sines, half their products and the sum.
    # The branch and what its norm makes of it are both rounded.
    positions = 2 + 1 + 2.5 if rotated else 2
    assert_within_rounding(softmax, wanted, roundings=3 + positions)
    waits = (ages[None] >= window) & (ages[None] < window + unfolded) & (ages[None] < known[:, None])
    assert waits.sum(axis=1).tolist() == [17, 10]
    projected = (positioned(q, q_scale), positioned(k, k_scale)) if normed_features else (q, k)
    phi, phi_k = jax.jit(lambda *x: [features("softmax", one) for one in x])(*projected)
    phi, phi_k, v, state = (np.asarray(x, np.float64) for x in (phi, phi_k, v, state))
    scores = np.einsum("bkgp,bksp->bkgs", phi, phi_k) * waits[:, None, None]
    wanted = np.einsum("bkgs,bksh->bkgh", scores, v) + np.einsum("bkgp,bkph->bkgh", phi, state)
    wanted = normed_by_hand(wanted, branch_scales[1])
    # φ of query and key, their product, the branch and what its norm makes of it; beside the state, one less.
    assert_within_rounding(linear, wanted, roundings=5)
    assert_within_rounding(both, wanted_softmax + wanted, roundings=3 + positions)


@pytest.mark.parametrize("check", ["read", "projected"])
def test_many_parts(monkeypatch, check):
    """More than are added up at a time and no multiple, some without a key that is seen, some without a tile."""
    for name in ("TILING", "FULL_TILING"):
        monkeypatch.setattr(attention_gpu, name, dataclasses.replace(getattr(attention_gpu, name), least=50))
    monkeypatch.setattr(attention_gpu, "PARTS_TILE", 4)  # Six parts of 300 slots, five of 270.
    if check == "read":
        test_keys_as_read((5, 5), (1, 300), 300, 1, True, False)
    else:
        test_keys_as_projected_and_the_linear_branch(16, True, True, False, 40)


def test_the_kernel_lowers_for_a_hopper(monkeypatch):
    monkeypatch.setattr(devices, "on_hopper", lambda: True)
    shapes = {"qkv_BKAH": (B, K, 6, 128), "k_BKSH": (B, K, 528, 128), "v_BKSH": (B, K, 528, 128)}
    given = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    given |= {name: jax.ShapeDtypeStruct((B,), jnp.int32) for name in ("newest_B", "known_B")}
    given["state_BKPH"] = jax.ShapeDtypeStruct((B, K, 256, 128), jnp.float32)
    given["unfolded"], given["scales"] = jax.ShapeDtypeStruct((), jnp.int32), (jax.ShapeDtypeStruct((128,), "f4"),) * 2
    given["rotation"] = jax.eval_shape(lambda: attention_gpu.ring_rotation(528, 128, 1e4, None, jnp.bfloat16))
    given["branch_scales"] = (jax.ShapeDtypeStruct((K, 4, 128), jnp.float32),) * 2
    given["arrivals_BK"] = jax.ShapeDtypeStruct((B, K), jnp.int32)
    attend = jax.jit(lambda **x: attention_gpu.attend(attention_gpu.Plan(512, 1e-6), **x))
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        lowered = attend.trace(**given).lower(lowering_platforms=("cuda",))
    assert "__gpu$xla.gpu.triton" in lowered.as_text()
    # Keys, values and counts are written where they lie.
    assert lowered.as_text().count("#stablehlo.output_operand_alias<") == 3


@pytest.mark.gpu
def test_on_a_gpu_a_model_decodes_with_the_kernel_as_it_was_trained(miniature):
    test_parity.test_bfloat16_stays_within_its_rounding(miniature, "pallas_gpu")
