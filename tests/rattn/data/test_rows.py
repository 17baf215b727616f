"""Rows, segment ids and masks: literals on a tiny corpus, and a token-by-token count of what becomes a target."""

import numpy as np
import pytest

from rattn.data.rows import gather_rows, read_rows, row_count
from rattn.data.stream import BLOCK_TOKENS, Prepared
from tests.rattn.data.by_hand import EOS, build, joined, random_documents


def open_stream(tmp_path, documents):
    (stream,) = Prepared(build(tmp_path / "data", {"one": (documents, [])})).streams("train")
    return stream


def test_tiny_corpus_literally(tmp_path):
    # The stream is 11 12 13 1 | 21 1 | 31 32 33 1: three documents, 10 tokens, so two rows of 5 (9 targets).
    stream = open_stream(tmp_path, [[11, 12, 13], [21], [31, 32, 33]])
    assert (stream.documents, stream.tokens, row_count(stream.tokens, 5)) == (3, 10, 2)
    rows = read_rows(stream, [0, 1], 5)
    np.testing.assert_array_equal(rows["tokens"], [[11, 12, 13, 1, 21], [1, 31, 32, 33, 1]])
    np.testing.assert_array_equal(rows["targets"], [[12, 13, 1, 21, 1], [31, 32, 33, 1, 0]])
    np.testing.assert_array_equal(rows["segment_ids"], [[1, 1, 1, 1, 2], [1, 2, 2, 2, 2]])
    np.testing.assert_array_equal(rows["loss_mask"], [[1, 1, 1, 0, 1], [0, 1, 1, 1, 0]])
    assert {key: value.dtype.name for key, value in rows.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "segment_ids": "int32",
        "loss_mask": "bool",
    }


def test_last_row_is_padded_literally(tmp_path):
    stream = open_stream(tmp_path, [[11, 12, 13], [21], [31, 32, 33]])
    rows = read_rows(stream, [1], 7)
    np.testing.assert_array_equal(rows["tokens"], [[32, 33, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rows["targets"], [[33, 1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rows["segment_ids"], [[1, 1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rows["loss_mask"], [[1, 1, 0, 0, 0, 0, 0]])


def test_a_row_that_begins_with_a_document_counts_it_as_the_first(tmp_path):
    stream = open_stream(tmp_path, [[11, 12, 13], [21], [31, 32, 33]])
    rows = read_rows(stream, [1], 4)
    np.testing.assert_array_equal(rows["tokens"], [[21, 1, 31, 32]])
    np.testing.assert_array_equal(rows["segment_ids"], [[1, 1, 2, 2]])
    np.testing.assert_array_equal(rows["loss_mask"], [[1, 0, 1, 1]])


@pytest.mark.parametrize("context_length", [1, 7, 512, BLOCK_TOKENS, 3001, 20_000])
def test_every_token_is_a_target_once_and_only_within_its_document(tmp_path, context_length):
    # Documents that end exactly on a block's edge, one token short of it, and one token beyond.
    lengths = [BLOCK_TOKENS - 1, BLOCK_TOKENS - 1, 1, BLOCK_TOKENS - 3, 5000, 3, BLOCK_TOKENS, 17]
    documents = random_documents(0, lengths)
    stream = open_stream(tmp_path, documents)
    tokens = joined(documents)
    document_of = np.repeat(np.arange(len(documents)), [len(d) + 1 for d in documents])
    rows = read_rows(stream, range(row_count(stream.tokens, context_length)), context_length)

    inside = rows["segment_ids"] > 0
    targets = len(tokens) - 1
    np.testing.assert_array_equal(rows["targets"].ravel()[:targets], tokens[1:])
    np.testing.assert_array_equal(rows["tokens"][inside], tokens[: inside.sum()])
    assert targets <= inside.sum() <= targets + 1
    np.testing.assert_array_equal(rows["loss_mask"].ravel()[:targets], document_of[1:] == document_of[:-1])
    assert not rows["loss_mask"].ravel()[targets:].any()
    # Segment ids change where the document changes, and start from 1 in each row.
    place = np.arange(inside.sum())
    first_of_row = document_of[place // context_length * context_length]
    np.testing.assert_array_equal(rows["segment_ids"][inside], document_of[place] - first_of_row + 1)


def test_eos_inside_the_text_is_no_boundary(tmp_path):
    rows = read_rows(open_stream(tmp_path, [[11, EOS, 12], [13]]), [0], 5)
    np.testing.assert_array_equal(rows["segment_ids"], [[1, 1, 1, 1, 2]])
    np.testing.assert_array_equal(rows["loss_mask"], [[1, 1, 1, 0, 1]])


def test_gather_rows_keeps_the_order_and_pads(tmp_path):
    first = open_stream(tmp_path / "a", random_documents(1, [40]))
    second = open_stream(tmp_path / "b", random_documents(2, [40]))
    batch = gather_rows([first, second], [(1, 3), (0, 0), (-1, 0), (1, 0)], 8)
    np.testing.assert_array_equal(batch["tokens"][[0, 3]], read_rows(second, [3, 0], 8)["tokens"])
    np.testing.assert_array_equal(batch["tokens"][1], read_rows(first, [0], 8)["tokens"][0])
    assert not any(value[2].any() for value in batch.values())
