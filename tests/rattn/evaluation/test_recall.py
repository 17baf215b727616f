"""Recall tokens against a search by hand, and the bins they fall into."""

import numpy as np
import pytest

from rattn.errors import UserError
from rattn.evaluation.recall import frequent_ngrams, nearest_distance, ngram_codes, recall_distances
from rattn.evaluation.slices import IN_NO_BIN, Bins, Sums, bins_for, context_tokens, slice_batch

V = 5


def random_batch(seed, rows=6, length=40):
    """Rows of few different tokens, so that n-grams come back, cut into documents; the last row ends in padding."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, V, (rows, length + 1)).astype(np.int32)
    starts = generator.random((rows, length + 1)) < 0.08
    starts[:, 0] = True
    segments = np.cumsum(starts, axis=1).astype(np.int32)[:, :length]
    mask = ~starts[:, 1:]
    segments[-1, length // 2 :] = 0
    mask[-1, length // 2 - 1 :] = False
    return {"tokens": tokens[:, :length], "targets": tokens[:, 1:], "segment_ids": segments, "loss_mask": mask}


def ngram_by_hand(batch, row, t, n):
    """The tokens of the n-gram that ends in the target of position t, or None where a document begins inside it."""
    segments = batch["segment_ids"][row]
    if not batch["loss_mask"][row, t] or t - n + 1 < 0 or segments[t - n + 1] != segments[t]:
        return None
    return (*batch["tokens"][row, t - n + 1 : t + 1].tolist(), int(batch["targets"][row, t]))


def distance_by_hand(batch, row, t, n):
    wanted = ngram_by_hand(batch, row, t, n)
    for earlier in range(t - 1, -1, -1):
        if batch["segment_ids"][row, earlier] != batch["segment_ids"][row, t] or wanted is None:
            return 0
        if ngram_by_hand(batch, row, earlier, n) == wanted:
            return t - earlier
    return 0


def by_hand(function, batch, n):
    rows, length = batch["tokens"].shape
    return [[function(batch, row, t, n) for t in range(length)] for row in range(rows)]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_nearest_occurrence_equals_a_search_of_every_pair(n):
    found = 0
    for seed in range(5):
        batch = random_batch(seed)
        codes = ngram_codes(batch, n, V)
        wanted = np.array(by_hand(distance_by_hand, batch, n))
        np.testing.assert_array_equal(nearest_distance(codes, batch["segment_ids"]), wanted)
        np.testing.assert_array_equal(recall_distances(batch, np.zeros(0, np.int64), n, V), wanted)
        found += (wanted > 0).sum()
    assert found > 5


def test_what_is_frequent_in_training_is_left_out():
    n, batches = 2, [random_batch(seed) for seed in range(5)]
    counts = {}
    for batch in batches:
        for row in by_hand(ngram_by_hand, batch, n):
            for ngram in filter(None, row):
                counts[ngram] = counts.get(ngram, 0) + 1
    total = sum(counts.values())
    limit = 12
    frequent = {ngram for ngram, count in counts.items() if count >= limit}
    assert 0 < len(frequent) < len(counts)
    codes = frequent_ngrams(batches, n, V, (limit - 0.5) / total)
    assert codes.tolist() == sorted(a * V * V + b * V + c for a, b, c in frequent)
    batch = random_batch(9)
    ngrams = by_hand(ngram_by_hand, batch, n)
    wanted = np.array(by_hand(distance_by_hand, batch, n))
    kept = np.array([[ngram not in frequent for ngram in row] for row in ngrams])
    assert (wanted > 0)[~kept].any()
    np.testing.assert_array_equal(recall_distances(batch, codes, n, V), np.where(kept, wanted, 0))
    assert not len(frequent_ngrams(batches, n, V, 1.0))


def test_ngrams_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"5 tokens of a vocabulary of 8192 ids .* fewer with --recall_context_tokens"):
        ngram_codes(random_batch(0), 5, 8192)


def test_bins_are_what_the_result_file_promises():
    bins = Bins.powers_of_two(9)
    assert bins.lasts == (1, 2, 4, 8, 16)
    assert bins.of(np.array([0, 1, 2, 3, 4, 5, 8, 9])).tolist() == [IN_NO_BIN, 0, 1, 2, 2, 3, 3, 4]
    assert Bins.equal(40, 16).lasts[-1] == 40
    assert Bins.equal(3, 16).lasts == (1, 2, 3)
    widths = np.diff((0, *Bins.equal(40, 16).lasts))
    assert set(widths) == {2, 3}


def test_sums_weigh_every_target_once_in_each_slice():
    batch = random_batch(1)
    segments = batch["segment_ids"]
    seen = [[int((row[: t + 1] == row[t]).sum()) for t in range(len(row))] for row in segments]
    np.testing.assert_array_equal(context_tokens(segments), seen)
    distances = recall_distances(batch, np.zeros(0, np.int64), 2, V)
    bins = bins_for(40)
    nats = np.random.default_rng(0).random(segments.shape).astype(np.float32)
    nats[~batch["loss_mask"]] = np.nan
    hits = nats < 0.5
    sums = Sums(bins)
    sums.add(nats, hits, batch["loss_mask"], slice_batch(batch, distances, bins))
    result = sums.result()
    mask = batch["loss_mask"]
    assert result["targets"] == mask.sum()
    assert result["nats_per_token"] == pytest.approx(nats[mask].mean(), rel=1e-6)
    assert result["accuracy"] == pytest.approx(hits[mask].mean())
    assert result["recall"]["targets"] == (distances > 0).sum()
    for name, numbers in (
        ("by_context_tokens", np.array(seen)),
        ("by_row_position", np.broadcast_to(np.arange(1, 41), mask.shape)),
        ("recall_by_distance", distances),
    ):
        for entry in result[name]:
            chosen = mask & (numbers >= entry["first"]) & (numbers <= entry["last"])
            assert entry["targets"] == chosen.sum()
            if chosen.any():
                assert entry["nats_per_token"] == pytest.approx(nats[chosen].mean(), rel=1e-6)
            else:
                assert entry["nats_per_token"] is None
