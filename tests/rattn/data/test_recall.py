"""Associative recall: what a row holds, that it is a pure function, and that distances are uniform."""

import numpy as np
import pytest

from rattn.config import load_config
from rattn.data.batches import open_data
from rattn.data.recall import RecallStream
from rattn.data.rows import read_rows
from rattn.data.vocabulary import load_vocabulary
from rattn.errors import UserError
from rattn.evaluation.recall import recall_distances

PAIRS, T = 4, 64
NO_NGRAMS = np.array([], np.int64)


def stream(seed=0, split="train", pairs=PAIRS, document_tokens=T, vocabulary="ids:302"):
    return RecallStream(seed, split, load_vocabulary(vocabulary), pairs=pairs, document_tokens=document_tokens)


def test_each_pair_is_asked_for_once_and_nothing_else_counts():
    batch = read_rows(stream(), range(200), T)
    np.testing.assert_array_equal(batch["segment_ids"], 1)
    np.testing.assert_array_equal(batch["loss_mask"].sum(axis=1), PAIRS)
    for tokens, targets, mask in zip(batch["tokens"], batch["targets"], batch["loss_mask"], strict=True):
        keys, values = tokens[1 : 2 * PAIRS : 2], tokens[2 : 2 * PAIRS + 1 : 2]
        assert len(set(keys)) == PAIRS
        asked = dict(zip(tokens[mask], targets[mask], strict=True))
        assert asked == dict(zip(keys, values, strict=True))
        assert mask[: 2 * PAIRS + 1].sum() == 0
        # Each key stands in its pair and in its query, and nowhere else.
        assert all((tokens == key).sum() == 2 for key in keys)


def test_any_slice_is_a_pure_function_of_seed_split_and_place():
    whole, starts = stream().read([0], 5 * T)
    for offset, length in ((0, 3), (T - 1, 2), (2 * T + 5, 2 * T), (4 * T, T)):
        tokens, begins = stream().read([offset, 0], length)
        np.testing.assert_array_equal(tokens[0], whole[0, offset : offset + length])
        np.testing.assert_array_equal(begins[0], starts[0, offset : offset + length])
        np.testing.assert_array_equal(tokens[1], whole[0, :length])
    np.testing.assert_array_equal(np.flatnonzero(starts), np.arange(0, 5 * T, T))


def test_training_depends_on_the_seed_and_validation_does_not():
    def rows(seed, split):
        return read_rows(stream(seed, split), [0, 1], T)["tokens"]

    assert (rows(0, "train") != rows(1, "train")).any()
    np.testing.assert_array_equal(rows(0, "validation"), rows(1, "validation"))
    assert (rows(0, "train") != rows(0, "validation")).any()


def test_distances_are_found_and_uniform():
    """Query slots are uniform, so a distance's density is that of slot minus pair: a trapezoid, never a power law.

    On its plateau each even distance comes from every pair by one of the document's 123 slots, so that a bin of 24 of
    them holds a binomial count (less spread, for the queries of a document take different slots): within 4 deviations.
    """
    documents, slots = 1000, (256 - 1 - 2 * PAIRS) // 2
    batch = read_rows(stream(document_tokens=256), range(documents), 256)
    distances = recall_distances(batch, NO_NGRAMS, 1, 302)
    found = distances[batch["loss_mask"]]
    assert (found > 0).all()
    assert (distances[~batch["loss_mask"]] > 0).mean() < 0.1
    plateau = np.histogram(found, bins=[15, 63, 111, 159, 207])[0]
    draws, share = PAIRS * documents, 24 / slots
    deviation = np.sqrt(draws * share * (1 - share))
    np.testing.assert_allclose(plateau, draws * share, rtol=0, atol=4 * deviation)


def test_training_rows_hold_one_document_or_several_smaller_ones():
    """In equal parts, each asking for as many pairs; validation has whole rows alone."""
    config = load_config("configs/recall.py", "pairs=4,length=64,ids=302").data
    config.recall_halvings = 2
    data = open_data(config, context_length=T, batch_size=30, seed=3)
    documents = []
    for step in range(10):
        batch = data.train[step]
        np.testing.assert_array_equal(batch["loss_mask"].sum(axis=1), PAIRS)
        documents.extend(batch["segment_ids"].max(axis=1))
    counts = np.bincount(documents, minlength=5)
    # A draw for each of 300 rows: within 4 deviations of a third.
    np.testing.assert_allclose(counts[[1, 2, 4]], 100, rtol=0, atol=4 * (300 * 2 / 9) ** 0.5)
    assert counts.sum() == counts[[1, 2, 4]].sum()
    assert (data.evaluation_batches(8)[0]["segment_ids"] == 1).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocabulary": "bytes"}, "is 'bytes' of 259 ids and recall needs bare ids, 14 at least for 4 pairs"),
        ({"vocabulary": "ids:10"}, "set it to ids:SIZE"),
        ({"document_tokens": 16}, "recall_pairs is 4 and a row has 16 tokens; pairs and queries need 17"),
    ],
)
def test_what_cannot_be_is_said(changes, words):
    with pytest.raises(UserError, match=words):
        stream(**changes)


@pytest.mark.parametrize("halvings", [-1, 3])
def test_more_halvings_than_pairs_are_refused(halvings):
    config = load_config("configs/recall.py", "pairs=4,length=64").data
    config.recall_halvings = halvings
    with pytest.raises(UserError, match=f"recall_halvings is {halvings} and 4 pairs can be halved 2 times"):
        open_data(config, context_length=T, batch_size=2, seed=0)
