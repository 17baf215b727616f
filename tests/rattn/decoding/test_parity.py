"""Training's forward pass = prefill + decode, token by token."""

import numpy as np
import pytest

from tests.rattn.decoding.conftest import TOKENS

LENGTHS = (5, 9, 1)
MODELS = {
    "window below the prompts": {"fold_tokens": 5},
    "window above everything": {
        "fold_tokens": 1,
        "window": 40,
        "pattern": ("rattention", "swa"),
        "rope_pattern": (True, False),
        "layers": 2,
        "feature_map": "relu",
        "qk_norm": False,
    },
    "window 0": {
        "fold_tokens": 2,
        "window": 0,
        "pattern": ("rattention", "linear"),
        "rope_pattern": (True, False),
        "layers": 2,
        "feature_map_after_qk_norm": True,
        "tied_embeddings": False,
        "logits_soft_cap": 5.0,
    },
}


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def prefix(lengths):
    return [TOKENS[row, :length].tolist() for row, length in enumerate(lengths)]


def following(lengths, steps):
    return np.stack([TOKENS[np.arange(3), np.asarray(lengths) + i] for i in range(steps)])


def check_steps(mini, cache, lengths, steps, wanted):
    """Decodes the next `steps` tokens of TOKENS and compares every logit."""
    found, cache = mini.steps(cache, following(lengths, steps))
    for i in range(steps):
        assert_close(found[i], wanted[np.arange(3), np.asarray(lengths) + i])
    return cache


@pytest.mark.parametrize("name", MODELS)
def test_ragged_prompts_and_every_token_after_them(miniature, name):
    mini = miniature(**MODELS[name])
    wanted = mini.trained(TOKENS)
    logits, cache = mini.chunk(mini.decoder.empty_cache(3, 24), prefix(LENGTHS), 10)
    for row, length in enumerate(LENGTHS):
        assert_close(logits[row], wanted[row, :length])
    check_steps(mini, cache, LENGTHS, 11, wanted)


def test_a_resumed_cache_continues_where_it_stood(miniature):
    """Prompt, seven tokens (a fold and two more), another ragged chunk in which one row has no token, more tokens."""
    mini = miniature(**MODELS["window below the prompts"])
    wanted = mini.trained(TOKENS)
    _, cache = mini.chunk(mini.decoder.empty_cache(3, 24), prefix(LENGTHS), 10)
    cache = check_steps(mini, cache, LENGTHS, 7, wanted)
    middle, end = (12, 16, 8), (12, 20, 14)
    rows = [TOKENS[row, a:b].tolist() for row, (a, b) in enumerate(zip(middle, end, strict=True))]
    logits, cache = mini.chunk(cache, rows, 10)
    for row, (a, b) in enumerate(zip(middle, end, strict=True)):
        if a < b:
            assert_close(logits[row], wanted[row, a:b])
    check_steps(mini, cache, end, 4, wanted)


def test_a_prompt_may_be_cut_anywhere(miniature):
    """Into pieces that are longer than a ring and do not divide the prompts; rows begin in different pieces."""
    cut, mini = 10, miniature(**MODELS["window below the prompts"])
    wanted = mini.trained(TOKENS)
    cache, lengths = mini.decoder.empty_cache(3, 24), np.array([18, 13, 2])
    total = -(-max(lengths) // cut) * cut
    for start in range(0, total, cut):
        before, after = (np.clip(lengths - (total - x), 0, None) for x in (start, start + cut))
        rows = [TOKENS[row, a:b].tolist() for row, (a, b) in enumerate(zip(before, after, strict=True))]
        logits, cache = mini.chunk(cache, rows, cut)
        for row in range(3):
            if before[row] < after[row]:
                assert_close(logits[row], wanted[row, before[row] : after[row]])
    check_steps(mini, cache, lengths, 6, wanted)


def test_packed_history_stays_out(miniature):
    """Documents end inside the first chunk, at a cut, and a token before the last cut; decoding goes on in the last."""
    mini = miniature(**MODELS["window below the prompts"])
    segments = np.array([[1] * 4 + [2] * 20, [1] * 2 + [2] * 8 + [3] * 14, [1] * 19 + [2] * 5], np.int32)
    wanted = mini.trained(TOKENS, segments)
    cache = mini.decoder.empty_cache(3, 24)
    for start in (0, 10):
        rows, ids = TOKENS[:, start : start + 10].tolist(), segments[:, start : start + 10]
        logits, cache = mini.chunk(cache, rows, 10, ids)
        for row in range(3):
            assert_close(logits[row], wanted[row, start : start + 10])
    check_steps(mini, cache, (20, 20, 20), 4, wanted)


def test_what_padding_holds_is_never_seen(miniature):
    mini = miniature(**MODELS["window below the prompts"])
    found = []
    for filler in (0, 10):
        tokens = np.full((3, 10), filler, np.int32)
        for row, length in enumerate(LENGTHS):
            tokens[row, 10 - length :] = TOKENS[row, :length]
        x_BTD, cache = mini.decoder.prefill(mini.weights, mini.decoder.empty_cache(3, 24), tokens, np.array(LENGTHS))
        steps, _ = mini.steps(cache, following(LENGTHS, 5))
        found.append((np.asarray(x_BTD)[:, -1], steps))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("attention", ["xla", "pallas_gpu"])
def test_bfloat16_stays_within_its_rounding(miniature, attention):
    """Keys, values, states and activations in bfloat16, beside the training forward in bfloat16.

    A layer rounds a token's activations about 14 times on the way (two norms, projection, qk-norm, rotation, weights,
    two outputs, two branch norms, output, two sums, gate and its product), each time by up to 2⁻⁸ of their size, evenly
    spread: 2⁻⁸ / √3 root mean square. Both sides round independently, so that R·L roundings each add up to
    √(2·R·L) · 2⁻⁸ / √3.
    """
    # A layer of each mixer.
    changes = {"compute_dtype": "bfloat16", "layers": 4, "head_dim": 32, "mlp_width": 16}
    mini = miniature(fold_tokens=5, state_dtype="bfloat16", attention=attention, **changes)
    wanted = mini.trained(TOKENS)
    logits, cache = mini.chunk(mini.decoder.empty_cache(3, 24), prefix(LENGTHS), 10)
    steps, _ = mini.steps(cache, following(LENGTHS, 11))
    bound = np.sqrt(2 * 14 * mini.model.layers) * 2.0**-8 / np.sqrt(3)
    for row, length in enumerate(LENGTHS):
        found, expected = np.concatenate([logits[row], steps[:, row]]), wanted[row, : length + 11]
        error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
        assert 0 < error < bound
