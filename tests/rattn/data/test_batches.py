"""The batch of a step is a pure function of (seed, step), whoever reads it and from wherever it starts."""

import subprocess
import sys

import numpy as np
import pytest

from rattn.data.batches import PERMUTED_ROWS, EvaluationBatches, _RowOrder, open_data, prefetched
from rattn.data.preparation import ensure_prepared
from rattn.data.rows import read_rows, row_count
from rattn.data.stream import Prepared
from rattn.data.synthetic import SyntheticStream
from rattn.data.vocabulary import train_sentencepiece
from rattn.errors import UserError
from tests.rattn.data.by_hand import build, data_config, joined, random_documents

T, B = 16, 4
# 1,000, 40 and 600 tokens a document and its EOS: 63, 3 and 38 rows of 16.
DOCUMENTS = {
    "books": (random_documents(0, [499, 299, 199]), random_documents(10, [100, 70])),
    "notes": (random_documents(1, [39]), random_documents(11, [30])),
    "letters": (random_documents(2, [199, 399]), []),
}
FIRST_ROWS = [28, 34, 0, 8]
ROWS = {"books": 63, "notes": 3, "letters": 38}


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    return build(tmp_path_factory.mktemp("books") / "data", {"books": DOCUMENTS["books"]})


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return build(tmp_path_factory.mktemp("mixture") / "data", DOCUMENTS, weights=[5.0, 1.0, 2.0])


def open_by_hand(folder, *, seed=0, process=(0, 1), batch_size=B, context_length=T, **changes):
    return open_data(
        data_config(folder, **changes),
        context_length=context_length,
        batch_size=batch_size,
        seed=seed,
        local_rows=lambda size: range(size * process[0] // process[1], size * (process[0] + 1) // process[1]),
    )


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_a_batch_holds_the_rows_that_it_names(mixture):
    data = open_by_hand(mixture)
    streams = dict(zip(ROWS, Prepared(mixture).streams("train"), strict=True))
    assert {name: row_count(stream.tokens, T) for name, stream in streams.items()} == ROWS
    for step in (0, 1, 77):
        batch, ids = data.train[step], data.train.row_ids(step)
        assert len(ids) == B
        for place, (source, row) in enumerate(ids):
            assert_same({k: v[place : place + 1] for k, v in batch.items()}, read_rows(streams[source], [row], T))


def test_the_order_is_fixed_by_seed_and_step_alone(books):
    # A change here is a change of every run's batches: data of one version cannot be continued by another.
    assert open_by_hand(books, seed=0).train.row_ids(0) == [("books", row) for row in FIRST_ROWS]
    forwards = [open_by_hand(books).train[step] for step in range(20)]
    again = open_by_hand(books).train
    for step in reversed(range(20)):
        assert_same(again[step], forwards[step])
    assert open_by_hand(books, seed=1).train.row_ids(0) != open_by_hand(books, seed=0).train.row_ids(0)


@pytest.mark.parametrize("permuted_rows", [0, PERMUTED_ROWS])
def test_neighbouring_seeds_do_not_repeat_each_others_epochs(books, monkeypatch, permuted_rows):
    monkeypatch.setattr("rattn.data.batches.PERMUTED_ROWS", permuted_rows)
    epochs = set()
    for seed in (0, 1):
        train = open_by_hand(books, seed=seed).train
        rows = [row for step in range(100) for _, row in train.row_ids(step)]
        epochs |= {tuple(rows[start : start + 63]) for start in range(0, 6 * 63, 63)}
    assert len(epochs) == 2 * 6


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_same_global_batch(mixture, processes):
    whole = open_by_hand(mixture)
    parts = [open_by_hand(mixture, process=(index, processes)) for index in range(processes)]
    for step in (0, 3, 10**6):
        shares = [part.train[step] for part in parts]
        assert shares[0]["tokens"].shape == (B // processes, T)
        assert_same({key: np.concatenate([share[key] for share in shares]) for key in shares[0]}, whole.train[step])
        assert all(part.train.row_ids(step) == whole.train.row_ids(step) for part in parts)
    evaluations = [part.evaluation_batches(batch_size=B) for part in parts]
    for index, batch in enumerate(whole.evaluation_batches(batch_size=B)):
        shares = [evaluation[index] for evaluation in evaluations]
        assert_same({key: np.concatenate([share[key] for share in shares]) for key in shares[0]}, batch)


@pytest.mark.parametrize("permuted_rows", [0, PERMUTED_ROWS])
def test_an_epoch_visits_each_row_once_and_the_next_in_another_order(books, monkeypatch, permuted_rows):
    monkeypatch.setattr("rattn.data.batches.PERMUTED_ROWS", permuted_rows)
    train = open_by_hand(books).train
    rows = [row for step in range(63) for _, row in train.row_ids(step)]
    epochs = [rows[start : start + 63] for start in range(0, 4 * 63, 63)]
    assert all(sorted(epoch) == list(range(63)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != list(range(63))
    assert train.epoch(0) == 0
    assert train.epoch(63) == pytest.approx(4)


# Of 4⁸ + 1 rows Grain's own shuffle leaves out the last.
@pytest.mark.parametrize("rows", [2**16 + 1, 2**16 + 2])
def test_an_epoch_of_many_rows_visits_each_once(rows):
    order = _RowOrder(0, rows, seed=5)
    assert len({order[n][1] for n in range(3 * rows, 4 * rows)}) == rows


def test_a_mixture_keeps_its_proportions_and_each_source_its_epochs(mixture):
    train = open_by_hand(mixture).train
    ids = [row for step in range(2000) for row in train.row_ids(step)]
    for first in (0, 4000):
        part = [source for source, _ in ids[first : first + 800]]
        assert {name: part.count(name) for name in ROWS} == pytest.approx(
            {"books": 500, "notes": 100, "letters": 200}, abs=1
        )
    for name, rows in ROWS.items():
        visited = [row for source, row in ids if source == name]
        assert sorted(visited[:rows]) == sorted(visited[rows : 2 * rows]) == list(range(rows))
    # Notes are passed most often: one row in eight of only three.
    assert train.epoch(6) == pytest.approx(6 * B / 8 / 3)


def test_weights_of_the_config_replace_those_of_the_mixture(mixture):
    train = open_by_hand(mixture, weights=(1.0, 0.0, 1.0)).train
    part = [source for step in range(100) for source, _ in train.row_ids(step)]
    assert {name: part.count(name) for name in ROWS} == {"books": 200, "notes": 0, "letters": 200}
    assert open_by_hand(mixture, weights=(1.0, 0.0, 1.0)).fingerprint == open_by_hand(mixture).fingerprint


@pytest.mark.parametrize("start", [0, 5, 10**12])
@pytest.mark.parametrize("threads", [0, 3])
def test_prefetching_keeps_the_order_from_any_step(mixture, start, threads):
    train = open_by_hand(mixture).train
    iterator = prefetched(train, start, read_threads=threads, prefetch_batches=4)
    for step in range(start, start + 12):
        assert_same(next(iterator), train[step])
    iterator.close()


def test_a_damaged_shard_is_named_through_the_threads(tmp_path):
    folder = build(tmp_path / "data", {"books": DOCUMENTS["books"]})
    shard = folder / "books-train-00000.array_record"
    data = bytearray(shard.read_bytes())
    data[data.find(joined(DOCUMENTS["books"][0])[100:108].astype("<u2").tobytes())] ^= 1
    shard.write_bytes(data)
    iterator = prefetched(open_by_hand(folder).train, read_threads=2, prefetch_batches=2)
    with pytest.raises(UserError, match=r"books-train-00000\.array_record is damaged: record 0"):
        next(iterator)
    iterator.close()


def test_evaluation_reads_each_row_once_in_order(mixture):
    data = open_by_hand(mixture)
    batches = list(data.evaluation_batches(batch_size=B))
    streams = [stream for stream in Prepared(mixture).streams("validation") if stream.tokens]
    expected = [read_rows(stream, range(row_count(stream.tokens, T)), T) for stream in streams]
    rows = np.concatenate([rows["targets"] for rows in expected])
    found = np.concatenate([batch["targets"] for batch in batches])
    np.testing.assert_array_equal(found[: len(rows)], rows)
    assert len(rows) % B  # so the last batch is padded
    assert len(found) == -(-len(rows) // B) * B
    mask = np.concatenate([batch["loss_mask"] for batch in batches])
    assert not mask[len(rows) :].any()
    # Every token is a target but the first of each document.
    assert mask.sum() == sum(stream.tokens - stream.documents for stream in streams)


def test_limited_evaluation_spreads_over_the_split(mixture):
    whole = EvaluationBatches(Prepared(mixture).streams("validation"), context_length=T, batch_size=1)
    limited = open_by_hand(mixture).evaluation_batches(batch_size=2, max_batches=2)
    assert (len(whole), len(limited)) == (13, 2)
    rows = np.concatenate([batch["tokens"] for batch in limited])
    np.testing.assert_array_equal(rows, [whole[index]["tokens"][0] for index in (0, 3, 6, 9)])
    assert len(open_by_hand(mixture).evaluation_batches(batch_size=2, max_batches=100)) == 7


def test_synthetic_data_needs_no_files_and_is_pure():
    data = open_by_hand("/nowhere", source="synthetic", context_length=4000)
    again = open_by_hand("/nowhere", source="synthetic", context_length=4000)
    ensure_prepared(data_config("/nowhere", source="synthetic"))
    batches = [data.train[step] for step in range(12)]
    assert_same(batches[7], again.train[7])
    assert data.fingerprint == again.fingerprint != open_by_hand("/nowhere", source="synthetic", seed=1).fingerprint
    assert (
        data.train[0]["tokens"] != open_by_hand("/", source="synthetic", context_length=4000, seed=1).train[0]["tokens"]
    ).any()
    tokens = np.concatenate([batch["tokens"].ravel() for batch in batches])
    assert 0 <= tokens.min() < tokens.max() < 259
    streams = [SyntheticStream(0, split, data.vocabulary) for split in ("train", "validation")]
    assert (streams[0].read([0], 4000)[0] != streams[1].read([0], 4000)[0]).any()
    ends = np.count_nonzero(tokens == 1)
    starts = sum(int((np.diff(batch["segment_ids"], axis=1) > 0).sum()) for batch in batches)
    assert abs(ends - starts) <= 12 * B  # every EOS ends a document; a row's last may be followed in the next row
    assert len(tokens) / ends == pytest.approx(1024, rel=0.3)
    # A Zipf law: the commonest id has probability log 2 / log 258.
    assert np.mean(tokens == 0) == pytest.approx(np.log(2) / np.log(258), rel=0.05)
    assert len(data.evaluation_batches(batch_size=2, max_batches=3)) == 3


def test_synthetic_documents_are_as_long_as_asked():
    data = open_by_hand("/nowhere", source="synthetic", context_length=4000, document_tokens=2**40)
    assert all((data.train[step]["segment_ids"] == 1).all() for step in range(3))
    assert data.fingerprint != open_by_hand("/nowhere", source="synthetic", context_length=4000).fingerprint


def test_nothing_to_train_or_evaluate_on(tmp_path):
    folder = build(tmp_path / "data", {"books": ([[5, 6]], []), "empty": ([], [])})
    with pytest.raises(UserError, match="source 'empty' has no training tokens"):
        open_by_hand(folder)
    with pytest.raises(UserError, match="nothing to evaluate on"):
        open_by_hand(folder, weights=(1.0, 0.0)).evaluation_batches(batch_size=2)
    with pytest.raises(UserError, match="Every source has weight 0"):
        open_by_hand(folder, weights=(0.0, 0.0))
    with pytest.raises(UserError, match=r"data.weights is \(1.0,\) .* holds 2 sources \(books, empty\)"):
        open_by_hand(folder, weights=(1.0,))


def test_a_folder_prepared_for_something_else(books, tmp_path):
    model = tmp_path / "other.model"
    model.write_bytes(train_sentencepiece(["one two three four five six"] * 20, 280))
    sentence = r"prepared with another vocabulary \(bytes of 259 ids, .*other.model' \(sentencepiece of 280 ids"
    with pytest.raises(UserError, match=sentence):
        open_by_hand(books, vocabulary=str(model))
    with pytest.raises(UserError, match="was prepared with task 'by_hand' and this asks for 'python_source'"):
        open_by_hand(books, task="python_source")
    with pytest.raises(UserError, match=r"prepared with validation_fraction 0.05 and this asks for 0.1"):
        ensure_prepared(data_config(books, validation_fraction=0.1))
    with pytest.raises(UserError, match=r"no prepared data in '.*nowhere'"):
        open_by_hand(tmp_path / "nowhere")


def test_without_a_task_any_prepared_folder_will_do(books, tmp_path):
    taken = open_by_hand(books, task="", vocabulary="nowhere.model", validation_fraction=0.5)
    assert taken.fingerprint == open_by_hand(books).fingerprint
    ensure_prepared(data_config(books, task=""))
    with pytest.raises(UserError, match=r"data.path is '.*nowhere', which holds no prepared data"):
        ensure_prepared(data_config(tmp_path / "nowhere", task=""))


def test_the_data_path_imports_neither_tensorflow_nor_seqio(mixture):
    code = f"""
import sys
from configs.base import get_config
from rattn.data.batches import open_data, prefetched
from rattn.data.preparation import ensure_prepared
config = get_config().data
config.update({{"path": {str(mixture)!r}, "task": "by_hand"}})
ensure_prepared(config)
data = open_data(config, context_length=8, batch_size=2, seed=0)
next(prefetched(data.train, read_threads=1, prefetch_batches=1))
data.vocabulary.encode("text"), data.evaluation_batches(batch_size=2)[0]
print(sorted(name for name in ("tensorflow", "seqio", "tensorflow_datasets", "numpy") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "['numpy']"
