"""Draws, and text that comes in pieces."""

import jax
import numpy as np
import pytest

from rattn.data.vocabulary import load_vocabulary
from rattn.decoding.sampling import Sampling, sample
from rattn.decoding.text import TextStream
from rattn.errors import UserError

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.3, 0.15])
LOGITS = np.log(PROBABILITIES).astype(np.float32)


draw = jax.jit(sample, static_argnames="sampling")


def keys(rows):
    return jax.random.split(jax.random.key(0), rows)


def drawn(sampling, rows=4000):
    """How often each token is drawn."""
    logits = np.broadcast_to(LOGITS, (rows, 5))
    return np.bincount(np.asarray(draw(logits, keys(rows), 0, sampling)), minlength=5) / rows


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), PROBABILITIES),
        (Sampling(0.0), np.eye(5)[1]),
        (Sampling(top_k=2), np.array([0, 0.4, 0, 0.3, 0]) / 0.7),
        # 0.4 + 0.3 does not reach 0.71, the next best token is the last.
        (Sampling(top_p=0.71), np.array([0, 0.4, 0, 0.3, 0.15]) / 0.85),
        (Sampling(temperature=0.5), PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        (Sampling(top_k=3, top_p=0.6), np.array([0, 0.4, 0, 0.3, 0]) / 0.7),
        (Sampling(ids=3), np.array([0.05, 0.4, 0.1, 0, 0]) / 0.55),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(sampling, expected):
    found = drawn(sampling)
    assert (found[expected == 0] == 0).all()
    # Five standard deviations of a share.
    np.testing.assert_array_less(np.abs(found - expected), 5 * np.sqrt(expected * (1 - expected) / 4000) + 1e-9)


def test_a_draw_follows_its_key_and_place_alone():
    logits = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)

    def of(rows, place=0):
        return np.asarray(draw(logits[rows], keys(6)[rows], place, Sampling())).tolist()

    assert of(slice(2, 4)) == of(slice(6))[2:4]
    assert of(slice(6)) != of(slice(6), place=1)
    assert len(set(of(slice(6)))) > 2


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1e-38}, "temperature is 1e-38; give 0 for the best token, or 1e-06 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_what_cannot_be_gets_a_sentence(values, sentence):
    with pytest.raises(UserError, match=sentence):
        Sampling(**values)


def test_pieces_of_text_never_change():
    vocabulary = load_vocabulary("bytes")
    text = "naïve – 😀 ok"
    stream, said = TextStream(vocabulary), ""
    for i in vocabulary.encode(text):
        piece = stream.push([i], last=False)
        assert "\ufffd" not in piece
        said += piece
        assert text.startswith(said)
    assert said + stream.push([], last=True) == text


def test_a_space_after_the_prompt_is_text():
    words = load_vocabulary("ids:20")
    stream = TextStream(words, [7, 8])
    assert [stream.push([9], last=False), stream.push([10], last=True)] == [" 9", " 10"]
    # A prompt that stops inside a character: what completes it is the first text.
    letters = load_vocabulary("bytes")
    ids = letters.encode("a😀b")
    assert TextStream(letters, ids[:3]).push(ids[3:], last=True) == "😀b"
    # U+FFFD itself, which is whole, is not said again.
    for prompt in ("x\ufffd", "\ufffd" * 4):
        assert TextStream(letters, letters.encode(prompt)).push(letters.encode("yz"), last=True) == "yz"


def test_text_that_stops_inside_a_character_ends_in_its_mark():
    vocabulary = load_vocabulary("bytes")
    stream = TextStream(vocabulary)
    assert stream.push(vocabulary.encode("a😀")[:3], last=False) == "a"
    assert stream.push([], last=True) == "\ufffd"
    # Bytes that no character begins with do not hold the rest back for ever.
    stream = TextStream(vocabulary)
    assert stream.push([0x80 + 3] * 10, last=False) == "\ufffd" * 7
