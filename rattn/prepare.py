"""python -m rattn.prepare: runs a seqio task or mixture once and writes it as an indexed token stream.

    python -m rattn.prepare --task state_of_the_union --out data/state_of_the_union
    python -m rattn.prepare --task text_files --files 'books/*.txt' a.jsonl --train_vocabulary_size 8000 --out mine
    python -m rattn.prepare --task my_mixture --module my_package.tasks --vocabulary path.model --out data/my_mixture

The rules of documents, EOS and rows are in `rattn.data`, the form of the folder in `rattn.data.stream`. Any row length
and any weights can be read from what is written here. One process reads and tokenizes on one machine.
"""

import argparse
import dataclasses
import importlib.metadata
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from etils import epath

from rattn.console import stopped_quietly
from rattn.data.corpora import CORPORA, Corpus, open_corpus, position
from rattn.data.preparation import Request
from rattn.data.stream import MANIFEST_FILE, SPLITS, Prepared
from rattn.data.vocabulary import MODEL_FILE, Vocabulary, load_vocabulary, train_sentencepiece
from rattn.data.writer import StreamWriter, unfinished_folder, write_manifest
from rattn.errors import UserError, nearest

# A vocabulary is trained on about this much of the training documents.
VOCABULARY_TEXT_BYTES = 100 * 2**20


@stopped_quietly()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    try:
        request, out = _parse(arguments)
        prepare(request, out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def prepare(request: Request, out: epath.PathLike) -> None:
    """Writes what `request` asks for into the folder `out`, unless it is there already.

    Raises:
      UserError: `out` holds something else, or the request cannot be met.
    """
    if _is_prepared(request, out):
        return
    corpus = _shipped_corpus(request)
    origin = _origin(request, corpus)
    with unfinished_folder(out) as folder:
        if _is_prepared(request, out):
            return
        sources, vocabulary = _open_sources(request, corpus, folder)
        entries = []
        for index, source in enumerate(sources):
            stem = f"{index:02d}-{re.sub(r'[^0-9A-Za-z_]+', '_', source.name)}"
            splits = {
                split: _write_split(source, split, StreamWriter(folder, f"{stem}-{split}", vocabulary), origin)
                for split in SPLITS
            }
            for split, change in (("train", "smaller"), ("validation", "larger")):
                if not splits[split]["documents"] and (split == "train" or (corpus and request.validation_fraction)):
                    raise UserError(
                        f"The task {source.name!r} gave no {split} documents; give it more documents, or a {change} "
                        "--validation_fraction."
                    )
            entries.append({"name": source.name, "weight": source.weight, "origin": origin, "splits": splits})
        write_manifest(
            folder, task=request.task, arguments=dataclasses.asdict(request), vocabulary=vocabulary, sources=entries
        )
    print(_table(entries))
    print(f"{vocabulary.name} vocabulary of {vocabulary.size} ids; everything is in {out}")


def _parse(arguments: Sequence[str] | None) -> tuple[Request, str]:
    parser = argparse.ArgumentParser(
        prog="python -m rattn.prepare", description="Write a seqio task or mixture as an indexed token stream."
    )
    parser.add_argument("--task", required=True, help=f"{', '.join(CORPORA)}, or a registered seqio task or mixture")
    parser.add_argument("--out", required=True, help="the folder to write; it must not exist yet")
    parser.add_argument("--files", nargs="+", default=(), help="text_files: .txt or .jsonl (or .gz) paths and globs")
    parser.add_argument("--module", default="", help="a Python module to import first, which registers the task")
    parser.add_argument("--vocabulary", default="bytes", help="bytes, or the path of a SentencePiece model")
    parser.add_argument(
        "--train_vocabulary_size", type=int, default=0, help="train a SentencePiece model of this many ids (0: do not)"
    )
    parser.add_argument("--validation_fraction", type=float, default=0.05, help="share of the groups to hold out")
    flags = vars(parser.parse_args(arguments))
    out = flags.pop("out")
    request = Request(**{**flags, "files": tuple(flags["files"])})
    if not 0 <= request.validation_fraction < 1:
        raise UserError(f"--validation_fraction is {request.validation_fraction}; it must be at least 0 and below 1.")
    if request.train_vocabulary_size and request.vocabulary != "bytes":
        raise UserError(
            f"--train_vocabulary_size and --vocabulary {request.vocabulary!r} exclude each other; leave one out."
        )
    return request, out


def _is_prepared(request: Request, out: epath.PathLike) -> bool:
    path = epath.Path(out)
    if (path / MANIFEST_FILE).exists():
        request.check_same(Prepared(path))
        print(f"{out} is already prepared with these arguments; nothing to do")
        return True
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"{str(out)!r} exists and is no prepared data (no {MANIFEST_FILE}); name another folder with --out."
        )
    return False


def _shipped_corpus(request: Request) -> Corpus | None:
    if request.task in CORPORA:
        return open_corpus(request.task, request.files)
    if not request.module:
        raise UserError(
            f"There is no task {request.task!r}{nearest(request.task, CORPORA)}; use {', '.join(CORPORA)}, or a "
            "registered seqio task or mixture with --module naming the module that registers it."
        )
    if request.files or request.train_vocabulary_size:
        raise UserError(
            f"The task {request.task!r} of {request.module} brings its own text and vocabulary; leave out --files and "
            "--train_vocabulary_size."
        )
    return None


def _origin(request: Request, corpus: Corpus | None) -> dict[str, Any]:
    if corpus is None:
        return {"module": request.module, "packages": {"seqio": importlib.metadata.version("seqio")}}
    survey = corpus.survey
    return {
        **corpus.origin,
        "documents": survey.documents,
        "text_bytes": survey.text_bytes,
        "sha256": survey.sha256,
    }


def _open_sources(request: Request, corpus: Corpus | None, folder: pathlib.Path) -> tuple[list[Any], Vocabulary]:
    if corpus is None:
        tasks = _import_tasks()
        sources, vocabulary = tasks.registered_sources(request.task, request.module, request.validation_fraction)
        wanted = load_vocabulary(request.vocabulary)
        if wanted.fingerprint != vocabulary.fingerprint:
            raise UserError(
                f"The task {request.task!r} is defined with a {vocabulary.name} vocabulary of {vocabulary.size} ids "
                f"and --vocabulary is {request.vocabulary!r} ({wanted.name} of {wanted.size} ids); give the task's own."
            )
        return sources, vocabulary
    if request.train_vocabulary_size:
        print(f"training a SentencePiece vocabulary of {request.train_vocabulary_size} ids", file=sys.stderr)
        texts = _vocabulary_texts(corpus, request.validation_fraction)
        (folder / MODEL_FILE).write_bytes(train_sentencepiece(texts, request.train_vocabulary_size))
        vocabulary = load_vocabulary(folder / MODEL_FILE)
    else:
        vocabulary = load_vocabulary(request.vocabulary)
        vocabulary.copy_to(folder)
    source = _import_tasks().shipped_source(request.task, corpus, vocabulary, folder, request.validation_fraction)
    return [source], vocabulary


def _import_tasks() -> ModuleType:
    """Imports seqio and TensorFlow, kept quiet."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    print("loading seqio and TensorFlow", file=sys.stderr)
    # TensorFlow's C++ logs about missing accelerators ignore its own log level; a failing import still raises.
    kept, silent = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)
    try:
        return importlib.import_module("rattn.data.tasks")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(silent)


def _vocabulary_texts(corpus: Corpus, validation_fraction: float) -> Iterator[str]:
    """Takes training documents, chosen by the hash of their text, of about VOCABULARY_TEXT_BYTES."""
    share = VOCABULARY_TEXT_BYTES / corpus.survey.text_bytes
    for document in corpus.split("train", validation_fraction):
        if position(document.text) < share:
            yield document.text


def _write_split(source: Any, split: str, writer: StreamWriter, origin: dict[str, Any]) -> dict[str, Any]:
    progress = _Progress(f"{source.name} {split}", origin.get("text_bytes", 0))
    for ids in source.documents(split):
        writer.add(ids)
        progress.show(writer)
    entry = writer.finish()
    progress.show(writer, last=True)
    return entry


class _Progress:
    """A line about the split being written, on stderr: rewritten in place on a terminal, else now and then."""

    def __init__(self, title: str, corpus_bytes: int):
        """`corpus_bytes` is the size of all splits together, 0 where unknown."""
        self._title, self._corpus_bytes = title, corpus_bytes
        self._terminal = sys.stderr.isatty()
        self._began = self._shown = time.monotonic()

    def show(self, writer: StreamWriter, *, last: bool = False) -> None:
        """Shows the counts of `writer` if it is time to."""
        now = time.monotonic()
        if not last and now - self._shown < (0.2 if self._terminal else 10):
            return
        self._shown = now
        of = f" of {self._corpus_bytes / 1e6:.3g}" if self._corpus_bytes else ""
        line = (
            f"{self._title}: {writer.documents} documents, {writer.text_bytes / 1e6:.3g}{of} MB, "
            f"{writer.tokens} tokens, {writer.tokens / max(now - self._began, 1e-3) / 1e6:.2f} M tokens/s"
        )
        start, end = ("\r\x1b[K", "\n" if last else "") if self._terminal else ("", "\n")
        print(start + line, end=end, file=sys.stderr, flush=True)


def _table(entries: Sequence[dict[str, Any]]) -> str:
    rows = [("source", "weight", "split", "documents", "tokens", "text bytes", "shards")]
    for entry in entries:
        for split in SPLITS:
            counts = entry["splits"][split]
            numbers = [f"{counts[key]:,}" for key in ("documents", "tokens", "text_bytes")]
            rows.append((entry["name"], f"{entry['weight']:g}", split, *numbers, str(len(counts["shards"]))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = (0, 2)
    return "\n".join(
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
