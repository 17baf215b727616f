"""seqio tasks as sources of token ids. The one module, with `rattn.prepare`, that imports TensorFlow and seqio."""

import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from rattn.data.corpora import CORPORA, Corpus, position
from rattn.data.vocabulary import MODEL_FILE, ByteVocabulary, SentencePieceVocabulary, Vocabulary
from rattn.errors import UserError, nearest

# TensorFlow would otherwise take a GPU's memory, and look for one (loudly) at its first operation.
tf.config.set_visible_devices([], "GPU")


@dataclasses.dataclass(frozen=True)
class Source:
    """One task of a mixture, or the task itself.

    Attributes:
      name: the task's.
      weight: its rate in the mixture (1 for a single task).
      documents: gives the ids (int [n]) of each document of "train" or "validation".
    """

    name: str
    weight: float
    documents: Callable[[str], Iterator[np.ndarray]]


def shipped_source(
    name: str, corpus: Corpus, vocabulary: Vocabulary, vocabulary_folder: pathlib.Path, validation_fraction: float
) -> Source:
    """Registers the seqio task `name` over `corpus` and returns it as a source.

    `vocabulary_folder` holds the SentencePiece model, if `vocabulary` is one.
    """
    model = str(vocabulary_folder / MODEL_FILE)
    encoder = seqio.ByteVocabulary() if vocabulary.name == "bytes" else seqio.SentencePieceVocabulary(model)

    def dataset(split: str, shuffle_files: bool = False) -> tf.data.Dataset:
        del shuffle_files
        return tf.data.Dataset.from_generator(
            lambda: ({"targets": d.text.encode()} for d in corpus.split(split, validation_fraction)),
            output_signature={"targets": tf.TensorSpec((), tf.string)},
        )

    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    task = seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset, splits=("train", "validation")),
        preprocessors=[seqio.preprocessors.tokenize],
        output_features={"targets": seqio.Feature(encoder, add_eos=False)},
    )
    return Source(name, 1.0, lambda split: _documents(task, split))


def registered_sources(name: str, module: str, validation_fraction: float) -> tuple[list[Source], Vocabulary]:
    """Finds a registered task or mixture and returns its tasks as sources, with their vocabulary.

    A task with a validation split keeps it; else its training documents are split by the hash of their ids.

    Args:
      name: the task's or mixture's.
      module: what to import first, because it registers the task; "" for nothing.

    Raises:
      UserError: no such module or task, or a task without training split, "targets" or a usable vocabulary.
    """
    if module:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UserError(
                f"The module {module!r} cannot be imported ({error}); give --module a Python module."
            ) from None
    known = [*CORPORA, *seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in known:
        raise UserError(
            f"There is no task or mixture {name!r}{nearest(name, known)}; use {', '.join(CORPORA)}, or a registered "
            "seqio task with --module naming the module that registers it."
        )
    provider = seqio.get_mixture_or_task(name)
    mixture = isinstance(provider, seqio.Mixture)
    tasks = provider.tasks if mixture else [provider]
    vocabularies = [_vocabulary_of(task) for task in tasks]
    if len({vocabulary.fingerprint for vocabulary in vocabularies}) > 1:
        raise UserError(
            f"The tasks of the mixture {name!r} have different vocabularies; give all of them the same one."
        )
    sources = []
    for task in tasks:
        if "train" not in task.splits:
            raise UserError(
                f"The task {task.name!r} has no train split (only {', '.join(task.splits)}); use another task."
            )
        weight = float(provider.get_rate(task)) if mixture else 1.0
        sources.append(Source(task.name, weight, _registered_documents(task, validation_fraction)))
    return sources, vocabularies[0]


def _registered_documents(task: seqio.Task, validation_fraction: float) -> Callable[[str], Iterator[np.ndarray]]:
    def documents(split: str) -> Iterator[np.ndarray]:
        if "validation" in task.splits:
            yield from _documents(task, split)
            return
        for ids in _documents(task, "train"):
            held_out = position(np.asarray(ids, "<i4").tobytes().hex()) < validation_fraction
            if held_out == (split == "validation"):
                yield ids

    return documents


def _documents(task: seqio.Task, split: str) -> Iterator[np.ndarray]:
    # sequence_length=None: anything else trims silently.
    dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False, num_epochs=1)
    for example in dataset.as_numpy_iterator():
        if len(example.get("inputs", ())):
            raise UserError(
                f"The task {task.name!r} has inputs beside targets; rattn trains on targets alone: join them."
            )
        yield example["targets"]


def _vocabulary_of(task: seqio.Task) -> Vocabulary:
    feature: Any = task.output_features.get("targets")
    if feature is None:
        raise UserError(f"The task {task.name!r} has no feature 'targets'; rattn trains on that one.")
    vocabulary = feature.vocabulary
    if isinstance(vocabulary, seqio.ByteVocabulary) and not vocabulary.extra_ids:
        return ByteVocabulary()
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return SentencePieceVocabulary(vocabulary.sp_model, where=f"the vocabulary of the task {task.name!r}")
    raise UserError(
        f"The task {task.name!r} has the vocabulary {vocabulary}; rattn reads seqio's ByteVocabulary without extra ids "
        "and SentencePieceVocabulary."
    )
