"""The Triton kernel of a step: interpreted on the CPU, lowered for a Hopper, and compiled where there is a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels_pallas.residual_linear_attention.feature_map import features
from rattn.decoding import pallas_gpu
from rattn.model.layers import rms_norm, rope_angles, rotate
from tests.rattn.decoding import test_parity

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

B, K, G, H = 2, 2, 4, 32


def arrays(slots):
    random = np.random.default_rng(5)

    def draw(*shape, dtype=jnp.bfloat16):
        return random.standard_normal(shape, np.float32).astype(dtype)

    state, scale = draw(B, K, 2 * H, H, dtype=np.float32), np.float32(0.1) * draw(H, dtype=np.float32)
    return draw(B, K, G, H), draw(B, K, slots, H), draw(B, K, slots, H), state, scale + np.float32(1)


def by_hand(q, k, v, visible_BS):
    """Softmax attention in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bkgh,bksh->bkgs", q, k) * H**-0.5
    weights = np.where(visible_BS[:, None, None], np.exp(scores), 0)
    return np.einsum("bkgs,bksh->bkgh", weights / weights.sum(-1, keepdims=True), v)


def assert_within_rounding(found, wanted, roundings):
    """Compares each sequence's root mean square error with what roundings to bfloat16, one after another, make of it.

    Each changes the terms of a sum by up to 2⁻⁸ of their size, evenly spread and independently: 2⁻⁸ / √3 root mean
    square, of the terms and so of the sum, for the terms have random signs. R of them make √R · 2⁻⁸ / √3.
    """
    each = (1, 2, 3)
    error_B = np.sqrt(np.mean((np.asarray(found, np.float64) - wanted) ** 2, each) / np.mean(wanted**2, each))
    assert 0 < error_B.max() < np.sqrt(roundings / 3) * 2.0**-8


@pytest.mark.parametrize(
    ("newest", "known", "window"),
    [
        ((299, 270), (300, 271), 300),  # a full layer: slot = position, sequences of two lengths
        ((100, 100), (150, 70), 120),  # a ring that goes round in one sequence
        ((5, 5), (1, 300), 300),
    ],
)
def test_plain_keys(newest, known, window):
    q, k, v, _, _ = arrays(300)
    newest, known = (np.array(x, np.int32) for x in (newest, known))
    plan = pallas_gpu.Plan(window, interpret=True)
    found, linear = jax.jit(lambda *x: pallas_gpu.attend(plan, *x))(q, k, v, newest, known)
    ages = (newest[:, None] - np.arange(300)[None]) % 300
    assert linear is None
    # The weights and the result; products are added up in float32.
    assert_within_rounding(found, by_hand(q, k, v, ages < np.minimum(window, known)[:, None]), roundings=2)


def test_keys_as_projected_and_the_linear_branch():
    """A ring of W + C that goes round: keys normed and rotated on the way, the state, and keys that wait."""
    window, fold_tokens, unfolded, newest = 250, 20, 17, 40
    slots = window + fold_tokens
    q, k, v, state, scale = arrays(slots)
    known = np.array([400, 260], np.int32)
    ages = (newest - np.arange(slots)) % slots
    sin, cos = jax.jit(lambda x: rope_angles(x, H, 1e4))(-ages)
    phi, phi_k = jax.jit(lambda *x: [features("softmax", one) for one in x])(q, k)
    plan = pallas_gpu.Plan(window, fold_tokens, 1e-6, True, interpret=True)
    softmax, linear = jax.jit(lambda **x: pallas_gpu.attend(plan, **x))(
        q_BKGH=q,
        k_BKSH=k,
        v_BKSH=v,
        newest_B=np.full(B, newest, np.int32),
        known_B=known,
        phi_BKGP=phi.astype(jnp.bfloat16),
        state_BKPH=state,
        unfolded=np.int32(unfolded),
        scale_H=scale,
        angles=(sin, cos),
    )
    positioned = jax.jit(lambda k, sin, cos: rotate(rms_norm(k, scale, 1e-6), sin, cos))(
        k, sin[None, None], cos[None, None]
    )
    reach = np.minimum(window, known)[:, None]
    assert_within_rounding(softmax, by_hand(q, positioned, v, ages[None] < reach), roundings=2)
    waits = (ages[None] >= window) & (ages[None] < window + unfolded) & (ages[None] < known[:, None])
    assert waits.sum(axis=1).tolist() == [17, 10]
    phi, phi_k, v, state = (np.asarray(x, np.float64) for x in (phi, phi_k, v, state))
    scores = np.einsum("bkgp,bksp->bkgs", phi, phi_k) * waits[:, None, None]
    wanted = np.einsum("bkgs,bksh->bkgh", scores, v) + np.einsum("bkgp,bkph->bkgh", phi, state)
    # φ of query and key, their product and the result; beside the state, three.
    assert_within_rounding(linear, wanted, roundings=4)


def test_the_kernel_lowers_for_a_hopper():
    shapes = {
        "q_BKGH": (B, K, 4, 128),
        "k_BKSH": (B, K, 528, 128),
        "v_BKSH": (B, K, 528, 128),
        "phi_BKGP": (B, K, 4, 256),
    }
    given = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    given |= {name: jax.ShapeDtypeStruct((B,), jnp.int32) for name in ("newest_B", "known_B")}
    given["state_BKPH"] = jax.ShapeDtypeStruct((B, K, 256, 128), jnp.float32)
    given["unfolded"], given["scale_H"] = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((128,), jnp.float32)
    given["angles"] = (jax.ShapeDtypeStruct((528, 64), jnp.float32),) * 2
    attend = jax.jit(lambda **x: pallas_gpu.attend(pallas_gpu.Plan(512, 16, 1e-6, True), **x))
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        lowered = attend.trace(**given).lower(lowering_platforms=("cuda",))
    assert "__gpu$xla.gpu.triton" in lowered.as_text()


@pytest.mark.gpu
def test_on_a_gpu_a_model_decodes_with_the_kernel_as_it_was_trained(miniature):
    test_parity.test_bfloat16_stays_within_its_rounding(miniature, "pallas_gpu")
