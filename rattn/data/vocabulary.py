"""Vocabularies: bytes, a SentencePiece model, or bare ids; without TensorFlow and seqio."""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import sentencepiece
from etils import epath

from rattn.errors import UserError, nearest

MODEL_FILE = "vocabulary.model"
DESCRIPTION_FILE = "vocabulary.json"
LINE_CHARACTERS = 10_000


class Vocabulary(Protocol):
    """Text to ids and back.

    Attributes:
      name: "bytes", "sentencepiece" or "ids".
      size: number of ids.
      eos_id: ends each document.
      pad_id: fills the last row; never a target that counts.
      fingerprint: SHA-256, in hex, of what fixes the ids.
    """

    name: str
    size: int
    eos_id: int
    pad_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without EOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; padding and EOS have none."""

    def token_bytes(self) -> np.ndarray:
        """Returns int32 [size]: how many UTF-8 bytes of text each id stands for (0 for padding, EOS and unknown)."""

    def copy_to(self, folder: epath.PathLike) -> None:
        """Writes what `load_vocabulary(folder)` needs."""


def load_vocabulary(name_or_path: epath.PathLike) -> Vocabulary:
    """Loads "bytes", "ids:SIZE", a SentencePiece model file, or the folder that `Vocabulary.copy_to` wrote.

    Raises:
      UserError: there is no such vocabulary, or it cannot be used.
    """
    if str(name_or_path) == "bytes":
        return ByteVocabulary()
    if str(name_or_path).startswith("ids:"):
        return IdVocabulary(str(name_or_path).removeprefix("ids:"))
    path = epath.Path(name_or_path)
    if (path / DESCRIPTION_FILE).exists():
        description = json.loads((path / DESCRIPTION_FILE).read_text())
        names = {"bytes": "bytes", "ids": f"ids:{description['size']}"}
        return load_vocabulary(names.get(description["name"], path / MODEL_FILE))
    if path.is_dir():
        raise UserError(
            f"There is no {DESCRIPTION_FILE} in {str(path)!r}; name a folder of prepared data or of a run that has one."
        )
    if not path.exists():
        hint = nearest(str(name_or_path), ["bytes"])
        raise UserError(
            f'There is no vocabulary {str(name_or_path)!r}{hint}; give "bytes" or the path of a SentencePiece model.'
        )
    return SentencePieceVocabulary(path.read_bytes(), where=str(path))


class ByteVocabulary:
    """UTF-8 bytes: 0 padding, 1 EOS, 2 unknown (never produced), byte b is b + 3. The ids of seqio.ByteVocabulary."""

    name = "bytes"
    size = 259
    eos_id = 1
    pad_id = 0
    fingerprint = hashlib.sha256(b"bytes: pad 0, eos 1, unknown 2, byte b is b + 3").hexdigest()

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary`."""
        return [byte + 3 for byte in text.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Vocabulary`; bytes that are not UTF-8 (a sample may stop inside a character) become U+FFFD."""
        return bytes(i - 3 for i in ids if i >= 3).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        """See `Vocabulary`."""
        return (np.arange(self.size) >= 3).astype(np.int32)

    def copy_to(self, folder: epath.PathLike) -> None:
        """See `Vocabulary`."""
        _write_description(self, folder)


class IdVocabulary:
    """Ids that stand for no text, for synthetic tokens: 0 padding, 1 EOS; the others count as one byte each."""

    name = "ids"
    eos_id = 1
    pad_id = 0

    def __init__(self, size: str):
        """Takes the number of ids, in digits.

        Raises:
          UserError: it is no number of at least 3.
        """
        if not size.isdecimal() or int(size) < 3:
            raise UserError(f"The vocabulary 'ids:{size}' has no size; write a number of at least 3, as in ids:8192.")
        self.size = int(size)
        self.fingerprint = hashlib.sha256(f"ids: pad 0, eos 1, {self.size} in all".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary`; the text is ids in digits, with spaces between.

        Raises:
          UserError: it is something else.
        """
        for word in text.split():
            if not word.isdecimal() or int(word) >= self.size:
                raise UserError(f"{word!r} is no id; write numbers below {self.size} with spaces between.")
        return [int(word) for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Vocabulary`; ids in digits, with spaces between."""
        return " ".join(str(int(i)) for i in ids if i >= 2)

    def token_bytes(self) -> np.ndarray:
        """See `Vocabulary`."""
        return (np.arange(self.size) >= 2).astype(np.int32)

    def copy_to(self, folder: epath.PathLike) -> None:
        """See `Vocabulary`."""
        _write_description(self, folder)


class SentencePieceVocabulary:
    """A SentencePiece model.

    A model with normalization or a dummy prefix counts the bytes of the text as it sees it, in which U+2581 is a
    space; the models that `rattn.prepare` trains have neither.
    """

    name = "sentencepiece"

    def __init__(self, model: bytes, *, where: str):
        """Takes the serialized model; `where` names it in errors."""
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise UserError(f"{where} is not a SentencePiece model; give the path of one, or bytes.") from None
        self.size = self._processor.vocab_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{where} has no EOS id; documents end with one, so train the model with eos_id set.")
        # A model without a padding id: 0, as in seqio. Padding is masked, so its id matters to nobody.
        self.pad_id = max(self._processor.pad_id(), 0)
        self.fingerprint = hashlib.sha256(model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary`."""
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Vocabulary`."""
        return self._processor.decode([int(i) for i in ids])

    def token_bytes(self) -> np.ndarray:
        """See `Vocabulary`."""
        return np.array([self._bytes_of(i) for i in range(self.size)], np.int32)

    def _bytes_of(self, i: int) -> int:
        processor = self._processor
        if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            return 0
        return 1 if processor.is_byte(i) else len(processor.id_to_piece(i).replace("\u2581", " ").encode())

    def copy_to(self, folder: epath.PathLike) -> None:
        """See `Vocabulary`."""
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
        (epath.Path(folder) / MODEL_FILE).write_bytes(self._model)
        _write_description(self, folder)


def train_sentencepiece(texts: Iterable[str], size: int) -> bytes:
    """Trains a SentencePiece BPE model of `size` ids and returns it serialized; the same texts give the same bytes.

    Ids: 0 padding, 1 EOS, 2 unknown, then the 256 bytes, then pieces. Nothing is normalized and unknown characters fall
    back to bytes, so any text without U+2581 comes back exactly (that character comes back as a space).

    Raises:
      UserError: the texts do not support `size` ids.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            vocab_size=size,
            model_type="bpe",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=4 * LINE_CHARACTERS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"A SentencePiece vocabulary of {size} ids cannot be trained on this text ({reason}); "
            "give another size (it must exceed 259 and what the characters need) or more text."
        ) from None
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    # SentencePiece drops longer sentences silently.
    for text in texts:
        for line in text.splitlines(keepends=True):
            for start in range(0, len(line), LINE_CHARACTERS):
                yield line[start : start + LINE_CHARACTERS]


def _write_description(vocabulary: Vocabulary, folder: epath.PathLike) -> None:
    description = {"name": vocabulary.name, "size": vocabulary.size, "fingerprint": vocabulary.fingerprint}
    epath.Path(folder).mkdir(parents=True, exist_ok=True)
    (epath.Path(folder) / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")
