"""Reads a prepared folder: manifest.json, the vocabulary, and ArrayRecord shards of token blocks.

A record is one block of BLOCK_TOKENS tokens (a stream's last block may be shorter): a little-endian uint32 count of the
documents that start in the block, their offsets as uint32, then the tokens in the manifest's `token_dtype`. Blocks are
written uncompressed, one record a group, so any slice of the stream is a few reads at known places.

Paths may be `gs://`: the folder is reached through etils and the shards through ArrayRecord's own Cloud Storage reader.
No such path has been tried.
"""

import bisect
import hashlib
import itertools
import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from rattn.data.vocabulary import Vocabulary, load_vocabulary
from rattn.errors import UserError

FORMAT = 1
MANIFEST_FILE = "manifest.json"
BLOCK_TOKENS = 2048
SPLITS = ("train", "validation")


class Prepared:
    """What one `rattn.prepare` wrote.

    Attributes:
      folder: where it lies.
      manifest: manifest.json as a dict.
      fingerprint: identifies the vocabulary and every token of every source, in order.
      names, weights: the sources and their sampling weights (positive, in any scale).
    """

    def __init__(self, folder: epath.PathLike):
        """Reads the manifest in `folder`.

        Raises:
          UserError: no complete preparation lies there.
        """
        self.folder = epath.Path(folder)
        path = self.folder / MANIFEST_FILE
        if not path.exists():
            raise UserError(
                f"There is no prepared data in {str(folder)!r} (no {MANIFEST_FILE}); "
                f"run python -m rattn.prepare --task TASK --out {folder}."
            )
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text())
            written = self.manifest["format"]
        except (ValueError, KeyError):
            raise UserError(
                f"{path} is not a manifest of prepared data; delete the folder and prepare again."
            ) from None
        if written != FORMAT:
            raise UserError(f"{path} has format {written} and this version reads {FORMAT}; prepare the data again.")
        self.fingerprint: str = self.manifest["fingerprint"]
        self.names = tuple(source["name"] for source in self.manifest["sources"])
        self.weights = tuple(source["weight"] for source in self.manifest["sources"])

    def vocabulary(self) -> Vocabulary:
        """Returns the vocabulary that the tokens were made with."""
        return load_vocabulary(self.folder)

    def streams(self, split: str) -> list["TokenStream"]:
        """Returns one stream a source, "train" or "validation"; a stream may be empty."""
        dtype = np.dtype(self.manifest["token_dtype"])
        sources = self.manifest["sources"]
        return [TokenStream(self.folder, source["splits"][split], dtype=dtype) for source in sources]


def data_fingerprint(vocabulary: dict[str, Any], sources: Sequence[dict[str, Any]]) -> str:
    """Hashes what the tokens are (not where they lie or came from): the same on any machine that prepared the same."""
    identity = [
        [source["name"], source["weight"], *(source["splits"][split]["blocks_sha256"] for split in SPLITS)]
        for source in sources
    ]
    text = json.dumps([FORMAT, BLOCK_TOKENS, vocabulary["fingerprint"], identity], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class BlockStream:
    """Random access to a stream of tokens that is stored, or made, in blocks.

    Attributes:
      tokens: number of tokens, each document's EOS included.
    """

    tokens: int

    def _read_blocks(self, blocks: list[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Returns each block's tokens [BLOCK_TOKENS, the last one fewer] and the offsets of its document starts."""
        raise NotImplementedError

    def read(self, offsets: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Reads the slices of `length` tokens that start at `offsets`.

        Returns:
          tokens int32 [len(offsets), length] and whether a document starts there, bool of the same shape; zeros and
          False past the end of the stream.

        Raises:
          UserError: a block cannot be read; the sentence names its file and record.
        """
        tokens = np.zeros((len(offsets), length), np.int32)
        starts = np.zeros((len(offsets), length), np.bool_)
        stops = [min(offset + length, self.tokens) for offset in offsets]
        spans = [range(o // BLOCK_TOKENS, -(-stop // BLOCK_TOKENS)) for o, stop in zip(offsets, stops, strict=True)]
        blocks = self._read_blocks(sorted({block for span in spans for block in span}))
        for row, (offset, stop, span) in enumerate(zip(offsets, stops, spans, strict=True)):
            for block in span:
                block_tokens, block_starts = blocks[block]
                base = block * BLOCK_TOKENS
                low, high = max(offset - base, 0), min(stop - base, BLOCK_TOKENS)
                tokens[row, base + low - offset : base + high - offset] = block_tokens[low:high]
                inside = block_starts[(block_starts >= low) & (block_starts < high)]
                starts[row, inside + (base - offset)] = True
        return tokens, starts

    def counts(self, offsets: Sequence[int], tokens: np.ndarray) -> np.ndarray:
        """Returns which of the tokens that `read` gave, each row's first aside, may be targets: here all.

        bool [len(offsets), length - 1].
        """
        del offsets
        return np.ones_like(tokens[:, 1:], np.bool_)


class TokenStream(BlockStream):
    """One split of one source of a prepared folder. One call per shard reads a batch's blocks; threads may share it.

    Attributes:
      tokens: number of tokens, each document's EOS included.
      documents: number of documents.
      text_bytes: UTF-8 bytes of their text.
    """

    def __init__(self, folder: epath.Path, split: dict[str, Any], *, dtype: np.dtype):
        """Takes the split's entry in the manifest; checks that each shard is there in its full size.

        Raises:
          UserError: a shard is missing or truncated.
        """
        self.tokens: int = split["tokens"]
        self.documents: int = split["documents"]
        self.text_bytes: int = split["text_bytes"]
        self._dtype = dtype
        self._shards = split["shards"]
        self._paths = [folder / shard["file"] for shard in self._shards]
        self._first_records = list(itertools.accumulate((s["records"] for s in self._shards), initial=0))
        self._readers: list[ArrayRecordReader | None] = [None] * len(self._shards)
        self._lock = threading.Lock()
        for path, shard in zip(self._paths, self._shards, strict=True):
            _check_size(path, shard)

    def _read_blocks(self, blocks: list[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        read = {}
        for shard, group in itertools.groupby(blocks, key=lambda b: bisect.bisect_right(self._first_records, b) - 1):
            records = [block - self._first_records[shard] for block in group]
            for record, data in zip(records, self._read_records(shard, records), strict=True):
                read[self._first_records[shard] + record] = self._decode(data, shard, record)
        return read

    def _decode(self, data: bytes, shard: int, record: int) -> tuple[np.ndarray, np.ndarray]:
        block = self._first_records[shard] + record
        try:
            tokens, starts = decode_block(data, self._dtype)
            complete = len(tokens) == min(BLOCK_TOKENS, self.tokens - block * BLOCK_TOKENS)
        except ValueError:
            complete = False
        if not complete:
            raise _corrupt(self._paths[shard], record, f"it has {len(data)} bytes, which is no block of this stream")
        return tokens, starts

    def _read_records(self, shard: int, records: list[int]) -> list[bytes]:
        try:
            return self._reader(shard).read(records)
        except (RuntimeError, IndexError) as error:
            # ArrayRecord says neither the file nor the record, so the records are tried one by one.
            for record in records:
                try:
                    self._reader(shard).read([record])
                except (RuntimeError, IndexError) as single:
                    raise _corrupt(self._paths[shard], record, str(single)) from None
            raise _corrupt(self._paths[shard], records, str(error)) from None

    def _reader(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            if self._readers[shard] is None:
                options = "readahead_buffer_size:0,max_parallelism:0"
                try:
                    reader = ArrayRecordReader(str(self._paths[shard]), options, file_reader_buffer_size=32768)
                    found = reader.num_records()
                except RuntimeError as error:
                    raise _corrupt(self._paths[shard], "any", str(error)) from None
                if found != self._shards[shard]["records"]:
                    message = f"it holds {found} records and the manifest counts {self._shards[shard]['records']}"
                    raise _corrupt(self._paths[shard], min(found, self._shards[shard]["records"]), message)
                self._readers[shard] = reader
            return self._readers[shard]


def encode_block(tokens: np.ndarray, starts: Sequence[int], dtype: np.dtype) -> bytes:
    """Encodes one record: `tokens` and the offsets at which documents start in it."""
    header = np.array([len(starts), *starts], "<u4")
    return header.tobytes() + np.ascontiguousarray(tokens, dtype.newbyteorder("<")).tobytes()


def decode_block(data: bytes, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Decodes one record into its tokens [n] of `dtype` and the offsets of document starts, int64.

    Raises:
      ValueError: the bytes are no block.
    """
    count = int(np.frombuffer(data, "<u4", count=1)[0])
    starts = np.frombuffer(data, "<u4", count=count, offset=4).astype(np.int64)
    return np.frombuffer(data, dtype.newbyteorder("<"), offset=4 * (count + 1)), starts


def _check_size(path: epath.Path, shard: dict[str, Any]) -> None:
    if not path.exists():
        raise UserError(f"The shard {path} is missing; delete the folder and prepare the data again.")
    size = path.stat().length
    if size != shard["bytes"]:
        raise UserError(
            f"The shard {path} is damaged: it has {size} bytes and the manifest says {shard['bytes']}, so none of its "
            f"records 0 to {shard['records'] - 1} can be trusted; delete the folder and prepare the data again."
        )


def _corrupt(path: epath.Path, record: object, why: str) -> UserError:
    return UserError(
        f"The shard {path} is damaged: record {record} cannot be read ({' '.join(why.split())[:200]}); "
        "delete the folder and prepare the data again."
    )
