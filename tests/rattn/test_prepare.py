"""python -m rattn.prepare, from its arguments to the streams that it writes."""

import dataclasses
import gzip
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from configs.base import get_config
from rattn import prepare
from rattn.data.batches import open_data
from rattn.data.corpora import position, state_of_the_union
from rattn.data.preparation import Request, ensure_prepared
from rattn.data.stream import Prepared
from rattn.data.vocabulary import load_vocabulary, train_sentencepiece
from rattn.errors import UserError
from tests.rattn import run_prepare

MODULE = "tests.rattn.seqio_tasks"
NOTES = [f"Note number {i} says: {'word ' * i}\n" for i in range(1, 40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepare")
    lines = "\n".join(json.dumps({"text": note}) for note in NOTES)
    (folder / "notes.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "own.model").write_bytes(train_sentencepiece(NOTES, 290))
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """Every preparation that needs seqio, in one process with warnings as errors."""
    notes = ["--task", "text_files", "--files", f"{folder}/*.jsonl.gz", "--validation_fraction", "0.2"]
    registered = ["--module", MODULE, "--task"]
    commands = {
        "sotu": ["--task", "state_of_the_union"],
        "notes": notes,
        "trained": [*notes, "--train_vocabulary_size", "300"],
        "model": [*notes, "--vocabulary", f"{folder}/own.model"],
        "letters": [*registered, "letters", "--validation_fraction", "0.3"],
        "mixture": [*registered, "letters_and_words"],
        "pieces": [*registered, "pieces", "--vocabulary", f"{folder}/own.model"],
        "wrong_vocabulary": [*registered, "pieces"],
        "two_vocabularies": [*registered, "two_vocabularies"],
        "extra_ids": [*registered, "extra_ids"],
        "no_train_split": [*registered, "no_train_split"],
        "with_inputs": [*registered, "with_inputs"],
        "misspelt": [*registered, "leters"],
        "no_module": ["--module", "tests.rattn.nowhere", "--task", "letters"],
    }
    commands = {name: [*arguments, "--out", f"{folder}/{name}"] for name, arguments in commands.items()}
    # Twice: nothing to do. And once with other arguments.
    commands["again"] = commands["notes"]
    commands["otherwise"] = [*commands["notes"], "--train_vocabulary_size", "300"]
    environment = {**os.environ, "RATTN_TEST_MODEL": str(folder / "own.model")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", run_prepare.__name__],
        input=json.dumps(commands),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def documents_of(folder, split, source=0):
    """The documents of a stream, cut at its boundaries; each must end with the EOS."""
    prepared = Prepared(folder)
    stream = prepared.streams(split)[source]
    tokens, starts = stream.read([0], stream.tokens)
    documents = np.split(tokens[0], np.flatnonzero(starts[0])[1:]) if stream.tokens else []
    vocabulary = prepared.vocabulary()
    assert all(document[-1] == vocabulary.eos_id for document in documents)
    assert len(documents) == stream.documents
    texts = [vocabulary.decode(document[:-1]) for document in documents]
    assert stream.text_bytes == sum(len(text.encode()) for text in texts)
    return texts


def test_state_of_the_union(runs, folder):
    assert runs["sotu"]["status"] == 0
    corpus = state_of_the_union()
    for split in ("train", "validation"):
        assert documents_of(folder / "sotu", split) == [d.text for d in corpus.split(split, 0.05)]
    manifest = Prepared(folder / "sotu").manifest
    (source,) = manifest["sources"]
    assert source["origin"]["packages"] == {"sotu": "0.1.2"}
    assert source["origin"]["sha256"] == corpus.survey.sha256
    assert manifest["token_dtype"] == "uint16"
    assert {split: source["splits"][split]["documents"] for split in source["splits"]} == {
        "train": 238,
        "validation": 11,
    }
    assert re.search(r"state_of_the_union +1 +train +238 +11,728,283 +11,728,045 +1\n", runs["sotu"]["stdout"])
    assert f"everything is in {folder}/sotu" in runs["sotu"]["stdout"]
    assert "train: 238 documents, 11.7 of 12.2 MB" in runs["sotu"]["stderr"]


def test_text_files_are_split_by_document(runs, folder):
    assert runs["notes"]["status"] == 0
    held_out = [note for note in NOTES if position(note) < 0.2]
    assert 0 < len(held_out) < len(NOTES)
    assert documents_of(folder / "notes", "validation") == held_out
    assert documents_of(folder / "notes", "train") == [note for note in NOTES if note not in held_out]


def test_a_trained_vocabulary_lies_beside_the_stream(runs, folder):
    assert runs["trained"]["status"] == 0
    vocabulary = Prepared(folder / "trained").vocabulary()
    assert (vocabulary.name, vocabulary.size) == ("sentencepiece", 300)
    assert load_vocabulary(folder / "trained" / "vocabulary.model").fingerprint == vocabulary.fingerprint
    assert documents_of(folder / "trained", "train") == documents_of(folder / "notes", "train")
    assert (
        Prepared(folder / "trained").streams("train")[0].tokens < Prepared(folder / "notes").streams("train")[0].tokens
    )


def test_a_given_vocabulary_encodes_as_seqio_does(runs, folder):
    vocabulary = load_vocabulary(folder / "own.model")
    assert Prepared(folder / "model").vocabulary().fingerprint == vocabulary.fingerprint
    (stream,) = Prepared(folder / "model").streams("train")
    expected = [i for text in documents_of(folder / "notes", "train") for i in (*vocabulary.encode(text), 1)]
    np.testing.assert_array_equal(stream.read([0], stream.tokens)[0][0], expected)


def test_the_byte_vocabulary_is_seqios(runs):
    vocabulary = load_vocabulary("bytes")
    own = [vocabulary.encode(run_prepare.TEXT), vocabulary.size, vocabulary.pad_id, vocabulary.eos_id]
    assert runs["byte_vocabulary"] == own


def test_a_registered_task_is_split_by_content_and_keeps_one_eos(runs, folder):
    assert runs["letters"]["status"] == 0
    held_out, trained = (documents_of(folder / "letters", split) for split in ("validation", "train"))
    assert sorted([*held_out, *trained]) == sorted(
        letter * (i + 1) for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")
    )
    assert [text[0] for text in held_out] == ["l", "o", "v", "y"]  # fixed by the ids


def test_a_mixture_keeps_its_sources_apart_and_their_own_validation(runs, folder):
    assert runs["mixture"]["status"] == 0
    prepared = Prepared(folder / "mixture")
    assert (prepared.names, prepared.weights) == (("letters", "words"), (3.0, 1.0))
    assert documents_of(folder / "mixture", "train", 1) == ["one", "two", "three"]
    assert documents_of(folder / "mixture", "validation", 1) == ["four"]


def test_a_sentencepiece_task_keeps_its_vocabulary(runs, folder):
    assert runs["pieces"]["status"] == 0
    assert documents_of(folder / "pieces", "train") == ["one", "two", "three"]
    assert Prepared(folder / "pieces").vocabulary().fingerprint == load_vocabulary(folder / "own.model").fingerprint


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "wrong_vocabulary",
            r"'pieces' is defined with a sentencepiece vocabulary of 290 ids and --vocabulary is 'bytes'",
        ),
        ("two_vocabularies", r"mixture 'two_vocabularies' have different vocabularies"),
        ("extra_ids", r"'extra_ids' has the vocabulary .*ByteVocabulary without extra ids"),
        ("no_train_split", r"'no_train_split' has no train split \(only test\)"),
        ("with_inputs", r"'with_inputs' has inputs beside targets"),
        ("misspelt", r"no task or mixture 'leters', did you mean 'letters'"),
        ("no_module", r"module 'tests\.rattn\.nowhere' cannot be imported"),
        ("otherwise", r"notes' was prepared with train_vocabulary_size 0 and this asks for 300"),
    ],
)
def test_sentences_of_seqio_tasks(runs, folder, name, sentence):
    assert runs[name]["status"] == 1
    assert re.search(sentence, runs[name]["stderr"].splitlines()[-1])
    assert not (folder / name).exists()
    assert not (folder / f"{name}.unfinished").exists()


def test_a_second_time_there_is_nothing_to_do(runs):
    assert runs["again"] == {
        "status": 0,
        "stdout": runs["again"]["stdout"],
        "stderr": "",
    }
    assert "is already prepared with these arguments; nothing to do" in runs["again"]["stdout"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--task", "state_of_the_onion"], "no task 'state_of_the_onion', did you mean 'state_of_the_union'?; use"),
        (["--task", "text_files"], "'text_files' needs files"),
        (["--task", "text_files", "--files", "/nowhere/*.txt"], "No file matches '/nowhere/*.txt'"),
        (["--task", "state_of_the_union", "--validation_fraction", "1"], "--validation_fraction is 1.0; it must be"),
        (["--task", "state_of_the_union", "--vocabulary", "none.model"], "There is no vocabulary 'none.model'"),
        (["--task", "python_source", "--vocabulary", "x", "--train_vocabulary_size", "9"], "exclude each other"),
        (["--task", "x", "--module", "y", "--train_vocabulary_size", "9"], "brings its own text and vocabulary"),
    ],
)
def test_sentences_that_need_no_seqio(arguments, sentence, tmp_path, capsys):
    assert prepare.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
    assert "tensorflow" not in sys.modules


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert prepare.main(["--task", "state_of_the_union", "--out", str(tmp_path)]) == 1
    assert "exists and is no prepared data" in capsys.readouterr().err


def test_the_command_line_gives_the_request_back():
    request = Request("text_files", "a.b", ("x.txt", "y z.txt"), "v.model", 0, 0.1)
    assert prepare._parse(request.command_line("out")) == (request, "out")
    assert {field.name for field in dataclasses.fields(Request)} <= set(get_config().data.keys())


def test_ensure_prepared_runs_the_command_and_then_trusts_it(tmp_path, capfd):
    (tmp_path / "only.txt").write_text("one document, whose end is held out for validation")
    config = get_config().data
    config.update({"path": str(tmp_path / "deep" / "data"), "task": "text_files", "files": f"{tmp_path}/only.txt"})
    ensure_prepared(config)
    assert "already" not in capfd.readouterr().out
    ensure_prepared(config)
    data = open_data(config, context_length=8, batch_size=2, seed=0)
    assert documents_of(config.path, "train") == ["one document, whose end is held out for validati"[:48]]
    assert documents_of(config.path, "validation") == ["on"]
    assert len(data.evaluation_batches(batch_size=2)) == 1

    config.path = str(tmp_path / "none")
    config.files = f"{tmp_path}/missing.txt"
    with pytest.raises(UserError, match=r"Preparing task 'text_files' into '.*none' failed with status 1"):
        ensure_prepared(config)
    assert f"No file matches '{tmp_path}/missing.txt'" in capfd.readouterr().err
    assert not pathlib.Path(config.path).exists()
