"""The prepared folder: what is written comes back, and damage is named."""

import json
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from etils import epath

from rattn.data.rows import read_rows
from rattn.data.stream import BLOCK_TOKENS, MANIFEST_FILE, Prepared, TokenStream
from rattn.data.writer import StreamWriter, token_dtype, unfinished_folder
from rattn.errors import UserError
from tests.rattn.data.by_hand import EOS, build, joined, random_documents

DOCUMENTS = random_documents(0, [5000, 1, 8000, BLOCK_TOKENS - 1, 3000])
TWO_BLOCKS = 2 * BLOCK_TOKENS * 2


@pytest.fixture
def folder(tmp_path):
    return build(tmp_path / "prepared", {"one": (DOCUMENTS, DOCUMENTS[:1])}, shard_bytes=TWO_BLOCKS)


def read_all(folder):
    (stream,) = Prepared(folder).streams("train")
    return stream.read([0], stream.tokens)


def test_round_trip_over_several_shards(folder):
    entry = Prepared(folder).manifest["sources"][0]["splits"]["train"]
    assert [shard["records"] for shard in entry["shards"]] == [2, 2, 2, 2, 1]
    assert entry["documents"] == 5
    assert entry["text_bytes"] == sum(map(len, DOCUMENTS))
    tokens, starts = read_all(folder)
    np.testing.assert_array_equal(tokens[0], joined(DOCUMENTS))
    lengths = [len(document) + 1 for document in DOCUMENTS]
    np.testing.assert_array_equal(np.flatnonzero(starts[0]), np.cumsum([0, *lengths[:-1]]))


def test_slices_anywhere(folder):
    (stream,) = Prepared(folder).streams("train")
    tokens = joined(DOCUMENTS)
    offsets = [0, 2047, 2048, 4095, 4096, 9000, len(tokens) - 1, 9000]
    read, _ = stream.read(offsets, 2500)
    padded = np.append(tokens, np.zeros(2500, np.int32))
    np.testing.assert_array_equal(read, [padded[offset : offset + 2500] for offset in offsets])


def test_a_stream_that_fills_its_last_block(tmp_path):
    documents = random_documents(3, [3 * BLOCK_TOKENS - 1])
    (stream,) = Prepared(build(tmp_path / "full", {"one": (documents, [])})).streams("train")
    assert stream.tokens == 3 * BLOCK_TOKENS
    np.testing.assert_array_equal(stream.read([0], stream.tokens + 5)[0][0, :-5], joined(documents))


def test_a_document_ends_with_exactly_one_eos_and_empty_ones_are_left_out(tmp_path):
    out = build(tmp_path / "eos", {"one": ([[5, EOS, EOS], [], [EOS], [6]], [])})
    (stream,) = Prepared(out).streams("train")
    assert stream.documents == 2
    np.testing.assert_array_equal(stream.read([0], stream.tokens)[0], [[5, EOS, 6, EOS]])


def test_large_vocabularies_take_four_bytes_a_token(tmp_path):
    class Large:
        name, size, eos_id, fingerprint = "large", 70_000, 1, "0"
        token_bytes = staticmethod(lambda: np.ones(70_000, np.int32))

    writer = StreamWriter(tmp_path, "large", Large())
    writer.add(np.array([3, 69_999, 65_536]))
    assert token_dtype(Large()) == np.uint32
    stream = TokenStream(epath.Path(tmp_path), writer.finish(), dtype=token_dtype(Large()))
    np.testing.assert_array_equal(stream.read([0], 4)[0], [[3, 69_999, 65_536, 1]])


def test_same_documents_give_the_same_fingerprint_and_others_another(tmp_path, folder):
    again = build(tmp_path / "again", {"one": (DOCUMENTS, DOCUMENTS[:1])})
    other = build(tmp_path / "other", {"one": (DOCUMENTS[::-1], DOCUMENTS[:1])})
    assert Prepared(again).fingerprint == Prepared(folder).fingerprint  # though cut into other shards
    assert Prepared(other).fingerprint != Prepared(folder).fingerprint


def test_threads_share_a_stream(folder):
    (stream,) = Prepared(folder).streams("train")
    expected = [stream.read([offset], 3000)[0] for offset in range(8)]
    (fresh,) = Prepared(folder).streams("train")
    got = {}
    threads = [
        threading.Thread(target=lambda o=offset: got.update({o: fresh.read([o], 3000)[0]})) for offset in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for offset in range(8):
        np.testing.assert_array_equal(got[offset], expected[offset])


def test_truncated_shard(folder):
    shard = folder / "one-train-00001.array_record"
    shard.write_bytes(shard.read_bytes()[:40_000])
    with pytest.raises(
        UserError, match=r"one-train-00001\.array_record is damaged: it has 40000 bytes .* records 0 to 1"
    ):
        Prepared(folder).streams("train")


def test_missing_shard(folder):
    (folder / "one-train-00001.array_record").unlink()
    with pytest.raises(UserError, match=r"one-train-00001\.array_record is missing"):
        Prepared(folder).streams("train")


def test_flipped_bit_is_named_by_file_and_record(folder):
    shard = folder / "one-train-00002.array_record"
    data = bytearray(shard.read_bytes())
    # The second record of that shard is block 5: find its tokens in the file.
    at = data.find(joined(DOCUMENTS)[5 * BLOCK_TOKENS + 700 : 5 * BLOCK_TOKENS + 708].astype("<u2").tobytes())
    assert at > 0
    data[at] ^= 4
    shard.write_bytes(data)
    (stream,) = Prepared(folder).streams("train")
    read_rows(stream, range(9), 2048 // 2)
    with pytest.raises(UserError, match=r"one-train-00002\.array_record is damaged: record 1 cannot be read"):
        read_rows(stream, range(20), 2048 // 2)


def test_any_damaged_byte_is_harmless_or_named(folder):
    shard = folder / "one-train-00000.array_record"
    whole, expected = shard.read_bytes(), read_all(folder)
    generator = np.random.default_rng(0)
    named = []
    # The frame (headers and index) lies at the ends, the blocks between.
    places = [*range(0, 120, 5), *range(len(whole) - 120, len(whole), 5), *generator.integers(0, len(whole), 60)]
    for place in places:
        data = bytearray(whole)
        data[place] ^= generator.integers(1, 256)
        shard.write_bytes(data)
        try:
            for found, right in zip(read_all(folder), expected, strict=True):
                np.testing.assert_array_equal(found, right)
        except UserError as error:
            named.append(str(error))
    assert len(named) > 5
    assert all(re.search(r"one-train-00000\.array_record is damaged: record (\d+|any) ", text) for text in named)


def test_a_whole_shard_of_other_data_is_named(folder):
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["sources"][0]["splits"]["train"]["shards"][0]["records"] = 3
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"one-train-00000\.array_record is damaged: record 2 .* holds 2 records"):
        read_all(folder)


def test_missing_manifest(tmp_path):
    with pytest.raises(UserError, match=r"There is no prepared data in '.*nowhere' .* run python -m rattn\.prepare"):
        Prepared(tmp_path / "nowhere")


@pytest.mark.parametrize(("text", "sentence"), [("{", "is not a manifest"), ('{"format": 99}', "has format 99")])
def test_unusable_manifest(folder, text, sentence):
    (folder / MANIFEST_FILE).write_text(text)
    with pytest.raises(UserError, match=sentence):
        Prepared(folder)


KILLED = """
import os, pathlib, signal, sys
import numpy as np
from rattn.data.vocabulary import load_vocabulary
from rattn.data.writer import StreamWriter, unfinished_folder
with unfinished_folder(sys.argv[1]) as folder:
    writer = StreamWriter(folder, "one-train", load_vocabulary("bytes"), shard_bytes=8192)
    for _ in range(10):
        writer.add(np.full(3000, 7, np.int32))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_preparation_leaves_nothing_that_looks_complete(tmp_path):
    out = tmp_path / "prepared"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["prepared.unfinished"]
    with pytest.raises(UserError, match="no prepared data"):
        Prepared(out)
    build(out, {"one": (DOCUMENTS, [])})
    assert [path.name for path in tmp_path.iterdir()] == ["prepared"]
    np.testing.assert_array_equal(read_all(out)[0][0], joined(DOCUMENTS))


def test_a_failed_preparation_leaves_nothing(tmp_path):
    def fail():
        with unfinished_folder(tmp_path / "prepared") as folder:
            (folder / "half").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_not_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="already holds files"):
        build(tmp_path / "mine", {"one": (DOCUMENTS, [])})
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_folder_that_no_preparation_wrote_is_not_emptied(tmp_path):
    (tmp_path / "my.unfinished").mkdir()
    (tmp_path / "my.unfinished" / "notes.txt").write_text("years of work")
    with pytest.raises(
        UserError, match=r"my.unfinished is where a preparation writes and holds 'notes.txt', which none"
    ):
        build(tmp_path / "my", {"one": (DOCUMENTS, [])})
    assert (tmp_path / "my.unfinished" / "notes.txt").read_text() == "years of work"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/sub cannot be written \(.*\); name another folder with --out"):
        build(tmp_path / "file" / "sub", {"one": (DOCUMENTS, [])})


def test_a_second_preparation_waits_for_the_first(tmp_path, capfd):
    out = tmp_path / "prepared"
    second = threading.Thread(target=build, args=(tmp_path / "prepared", {"two": (DOCUMENTS, [])}))
    with unfinished_folder(out) as folder:
        (folder / "first").write_text("kept")
        second.start()
        while not re.search("waiting for it", capfd.readouterr().err):
            assert second.is_alive()
        assert (folder / "first").exists()
    second.join()
    assert Prepared(out).names == ("two",)
