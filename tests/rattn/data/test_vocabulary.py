"""Text to ids and back, and how many bytes each id stands for."""

import hashlib

import numpy as np
import pytest

from rattn.data.vocabulary import load_vocabulary, train_sentencepiece
from rattn.errors import UserError

LINES = "We the People of the United States,\n\tin Order to form a more perfect Union.\n\n"
TEXTS = [LINES, " leading and trailing ", "\n", "a\r\nb\t\tc   d", "naïve 東京 🚀 \x00", "never seen: qzxj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "small.model"
    path.write_bytes(train_sentencepiece([LINES] * 50, 300))
    return path


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_byte_counts(kind, text, model):
    vocabulary = load_vocabulary("bytes" if kind == "bytes" else model)
    assert vocabulary.name == kind
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert vocabulary.decode([*ids, vocabulary.eos_id, vocabulary.pad_id]) == text
    token_bytes = vocabulary.token_bytes()
    assert (token_bytes.shape, token_bytes.dtype) == ((vocabulary.size,), np.int32)
    assert token_bytes[ids].sum() == len(text.encode())
    assert token_bytes[[vocabulary.pad_id, vocabulary.eos_id, 2]].tolist() == [0, 0, 0]


def test_bytes_literally():
    vocabulary = load_vocabulary("bytes")
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.eos_id) == (259, 0, 1)
    assert vocabulary.encode("A\n\u00e9") == [68, 13, 198, 172]
    assert vocabulary.decode([68, 198]) == "A\ufffd"  # a sample may stop inside a character


def test_bare_ids(tmp_path):
    vocabulary = load_vocabulary("ids:1000")
    assert (vocabulary.name, vocabulary.size) == ("ids", 1000)
    assert vocabulary.decode([*vocabulary.encode("2 999 17"), 1, 0]) == "2 999 17"
    vocabulary.copy_to(tmp_path)
    assert load_vocabulary(tmp_path).fingerprint == vocabulary.fingerprint
    with pytest.raises(UserError, match="'1000' is no id; write numbers below 1000"):
        vocabulary.encode("17 1000")
    with pytest.raises(UserError, match="'ids:many' has no size; write a number of at least 3"):
        load_vocabulary("ids:many")


def test_sentencepiece_ids(model):
    vocabulary = load_vocabulary(str(model))
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.eos_id) == (300, 0, 1)
    assert len(vocabulary.encode(LINES)) < len(LINES) / 1.5
    assert vocabulary.encode("\n") == [3 + 10]  # ids 3 to 258 are the bytes
    assert vocabulary.fingerprint == hashlib.sha256(model.read_bytes()).hexdigest()


def test_long_lines_take_part_in_training():
    # SentencePiece drops sentences longer than its limit without a word; "zebra" occurs only at the end of such a line.
    text = "short\n" * 50 + "short " * 10_000 + "zebra " * 10_000
    vocabulary_bytes = train_sentencepiece([text], 285)
    assert b"zebra" in vocabulary_bytes


def test_training_is_reproducible():
    assert train_sentencepiece([LINES] * 9, 290) == train_sentencepiece([LINES] * 9, 290)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_copies_load_from_their_folder(kind, model, tmp_path):
    vocabulary = load_vocabulary("bytes" if kind == "bytes" else model)
    vocabulary.copy_to(tmp_path / "workdir")
    copy = load_vocabulary(tmp_path / "workdir")
    assert (copy.name, copy.size, copy.fingerprint) == (vocabulary.name, vocabulary.size, vocabulary.fingerprint)
    assert copy.encode(LINES) == vocabulary.encode(LINES)


def test_sentences(tmp_path):
    with pytest.raises(UserError, match="There is no vocabulary 'byts', did you mean 'bytes'"):
        load_vocabulary("byts")
    with pytest.raises(UserError, match=rf"There is no vocabulary.json in '{tmp_path}'; name a folder"):
        load_vocabulary(tmp_path)
    (tmp_path / "text.model").write_text("no model at all")
    with pytest.raises(UserError, match=r"text\.model is not a SentencePiece model"):
        load_vocabulary(tmp_path / "text.model")
    with pytest.raises(UserError, match="SentencePiece vocabulary of 9000 ids cannot be trained on this text"):
        train_sentencepiece(["too little text"], 9000)
    with pytest.raises(UserError, match="SentencePiece vocabulary of 100 ids cannot be trained on this text"):
        train_sentencepiece([LINES], 100)
