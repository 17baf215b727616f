"""Prepared folders made by hand, without seqio."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs.base import get_config
from rattn.data.preparation import Request
from rattn.data.stream import SPLITS
from rattn.data.vocabulary import load_vocabulary
from rattn.data.writer import SHARD_BYTES, StreamWriter, unfinished_folder, write_manifest

EOS = 1
TASK = "by_hand"
Documents = Sequence[Sequence[int]]


def random_documents(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    """Documents of text ids (3 and up) of the byte vocabulary."""
    generator = np.random.default_rng(seed)
    return [generator.integers(3, 259, length).tolist() for length in lengths]


def joined(documents: Documents) -> np.ndarray:
    """The stream that the documents make: each and its EOS."""
    return np.array([i for document in documents for i in (*document, EOS)], np.int32)


def build(
    out: pathlib.Path,
    sources: Mapping[str, tuple[Documents, Documents]],
    weights: Sequence[float] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> pathlib.Path:
    """Writes `out` from {source: (train documents, validation documents)}, with the byte vocabulary."""
    vocabulary = load_vocabulary("bytes")
    with unfinished_folder(out) as folder:
        entries = []
        for index, (source, documents) in enumerate(sources.items()):
            splits = {}
            for split, part in zip(SPLITS, documents, strict=True):
                writer = StreamWriter(folder, f"{source}-{split}", vocabulary, shard_bytes=shard_bytes)
                for ids in part:
                    writer.add(np.array(ids, np.int32))
                splits[split] = writer.finish()
            weight = weights[index] if weights else 1.0
            entries.append({"name": source, "weight": weight, "origin": {}, "splits": splits})
        arguments = dataclasses.asdict(Request(task=TASK))
        write_manifest(folder, task=TASK, arguments=arguments, vocabulary=vocabulary, sources=entries)
    return out


def data_config(path: pathlib.Path, **changes: Any) -> ConfigDict:
    """`config.data` for a folder of `build`."""
    config = get_config().data
    config.update({"path": str(path), "task": TASK, **changes})
    return config
