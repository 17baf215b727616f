"""seqio tasks and mixtures that a user might have registered; `rattn.prepare --module` imports this."""

import functools
import os

import seqio
import tensorflow as tf

BYTES = seqio.ByteVocabulary()
LETTERS = [letter * (i + 1) for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")]
WORDS = {"train": ["one", "two", "three"], "validation": ["four"]}


def dataset(texts, split, shuffle_files=False):
    del shuffle_files
    return tf.data.Dataset.from_tensor_slices({"targets": texts[split]})


def add(name, texts, vocabulary, *preprocessors, feature="targets"):
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(functools.partial(dataset, texts), splits=tuple(texts)),
        preprocessors=list(preprocessors),
        output_features={feature: seqio.Feature(vocabulary)},
    )


add("letters", {"train": LETTERS}, BYTES, seqio.preprocessors.tokenize_and_append_eos)
add("words", WORDS, BYTES, seqio.preprocessors.tokenize)
seqio.MixtureRegistry.add("letters_and_words", [("letters", 3), ("words", 1)])

add("extra_ids", WORDS, seqio.ByteVocabulary(extra_ids=100), seqio.preprocessors.tokenize)
add("no_train_split", {"test": ["x"]}, BYTES, seqio.preprocessors.tokenize)
add("with_inputs", WORDS, BYTES, seqio.preprocessors.tokenize, lambda ds: ds.map(lambda x: {**x, "inputs": [5]}))

pieces = seqio.SentencePieceVocabulary(os.environ["RATTN_TEST_MODEL"])
add("pieces", WORDS, pieces, seqio.preprocessors.tokenize)
seqio.MixtureRegistry.add("two_vocabularies", [("words", 1), ("pieces", 1)])
