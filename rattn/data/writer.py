"""Writes a prepared folder: token blocks into shards, and a folder that appears only when it is complete."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from rattn.data.stream import BLOCK_TOKENS, FORMAT, MANIFEST_FILE, data_fingerprint, encode_block
from rattn.data.vocabulary import Vocabulary
from rattn.errors import UserError

SHARD_BYTES = 256 * 2**20
# How the names of files end that a preparation writes.
OWN_SUFFIXES = (".array_record", ".json", ".model")


class StreamWriter:
    """Writes one split of one source: shards `{stem}-00000.array_record`, … of at most about `shard_bytes` each."""

    def __init__(self, folder: pathlib.Path, stem: str, vocabulary: Vocabulary, *, shard_bytes: int = SHARD_BYTES):
        self.documents = self.tokens = self.text_bytes = 0
        self._folder, self._stem = folder, stem
        self._dtype = token_dtype(vocabulary)
        self._eos_id = vocabulary.eos_id
        self._token_bytes = vocabulary.token_bytes()
        self._shard_blocks = max(1, shard_bytes // (BLOCK_TOKENS * self._dtype.itemsize))
        self._block = np.empty(BLOCK_TOKENS, self._dtype)
        self._filled = 0
        self._starts: list[int] = []
        self._shards: list[dict[str, Any]] = []
        self._digest = hashlib.sha256()
        self._writer: ArrayRecordWriter | None = None

    def add(self, ids: np.ndarray) -> None:
        """Appends a document and its EOS. EOS ids that end `ids` are dropped first; an empty document is left out.

        Args:
          ids: int [n], the document's tokens.
        """
        while len(ids) and ids[-1] == self._eos_id:
            ids = ids[:-1]
        if not len(ids):
            return
        self.documents += 1
        self.tokens += len(ids) + 1
        self.text_bytes += int(self._token_bytes[ids].sum())
        self._starts.append(self._filled)
        ids = np.append(ids, self._eos_id)
        while len(ids):
            taken = ids[: BLOCK_TOKENS - self._filled]
            self._block[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            ids = ids[len(taken) :]
            if self._filled == BLOCK_TOKENS:
                self._flush()

    def finish(self) -> dict[str, Any]:
        """Writes what is left and returns the split's entry in the manifest."""
        if self._filled:
            self._flush()
        self._close_shard()
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "blocks_sha256": self._digest.hexdigest(),
            "shards": self._shards,
        }

    def _flush(self) -> None:
        if self._writer is None:
            name = f"{self._stem}-{len(self._shards):05d}.array_record"
            self._shards.append({"file": name, "records": 0})
            self._writer = ArrayRecordWriter(str(self._folder / name), "group_size:1,uncompressed")
        record = encode_block(self._block[: self._filled], self._starts, self._dtype)
        self._writer.write(record)
        self._digest.update(record)
        self._filled, self._starts = 0, []
        self._shards[-1]["records"] += 1
        if self._shards[-1]["records"] == self._shard_blocks:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        with (self._folder / self._shards[-1]["file"]).open("rb") as file:
            self._shards[-1]["bytes"] = os.fstat(file.fileno()).st_size
            self._shards[-1]["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()


def token_dtype(vocabulary: Vocabulary) -> np.dtype:
    """Returns uint16 where it holds every id, else uint32."""
    return np.dtype(np.uint16 if vocabulary.size <= 2**16 else np.uint32)


def write_manifest(
    folder: pathlib.Path,
    *,
    task: str,
    arguments: dict[str, Any],
    vocabulary: Vocabulary,
    sources: Sequence[dict[str, Any]],
) -> None:
    """Writes the vocabulary and then the manifest, whose presence says that the folder is complete.

    Args:
      folder: holds the shards.
      task: the task's name.
      arguments: what the preparation was asked for.
      vocabulary: what made the tokens.
      sources: for each its `name`, `weight`, `origin` (versions and hashes) and `splits` (from `StreamWriter.finish`).
    """
    vocabulary.copy_to(folder)
    described = {"name": vocabulary.name, "size": vocabulary.size, "fingerprint": vocabulary.fingerprint}
    manifest = {
        "format": FORMAT,
        "task": task,
        "fingerprint": data_fingerprint(described, sources),
        "arguments": arguments,
        "vocabulary": described,
        "token_dtype": token_dtype(vocabulary).name,
        "sources": list(sources),
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")


@contextlib.contextmanager
def unfinished_folder(out: epath.PathLike) -> Iterator[pathlib.Path]:
    """Gives a folder to write in, which becomes `out` at the end if a manifest was written in it, and else goes.

    It is `out`.unfinished beside `out` and is renamed, so a killed preparation leaves nothing that looks complete; the
    next one starts it afresh. A second preparation of the same `out` on the same machine waits for the first.
    Where `out` is remote (not tried) the folder is a local temporary one and is copied, the manifest last.

    Raises:
      UserError: `out` already holds something.
    """
    out = epath.Path(out)
    if "://" in str(out):
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder)
            _upload(pathlib.Path(folder), out)
        return
    out = pathlib.Path(out).resolve()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder with --out.")
    folder = out.with_name(out.name + ".unfinished")
    try:
        claim = _claim(folder)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); name another folder with --out.") from None
    if strange := [path.name for path in folder.iterdir() if path.is_dir() or not path.name.endswith(OWN_SUFFIXES)]:
        os.close(claim)
        raise UserError(
            f"{folder} is where a preparation writes and holds {strange[0]!r}, which none wrote; move it, or name "
            "another folder with --out."
        )
    try:
        for old in folder.iterdir():
            old.unlink()
        yield folder
        if (folder / MANIFEST_FILE).exists():
            if out.is_dir() and any(out.iterdir()):
                raise UserError(f"The folder {out} already holds files; name another with --out, or delete it.")
            folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(claim)


def _claim(folder: pathlib.Path) -> int:
    """Makes `folder` and locks it; the lock goes when the file descriptor closes or the process dies."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another preparation is writing {folder}: waiting for it", file=sys.stderr)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # The folder may have been renamed or removed by whoever held the lock.
        if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
        os.close(descriptor)


def _upload(folder: pathlib.Path, out: epath.Path) -> None:
    files = sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST_FILE)
    if files and files[-1].name == MANIFEST_FILE:
        out.mkdir(parents=True, exist_ok=True)
        for file in files:
            epath.Path(file).copy(out / file.name)
