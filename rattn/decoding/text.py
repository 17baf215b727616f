"""From tokens, as they come, to text that never changes again."""

from collections.abc import Sequence

from rattn.data.vocabulary import Vocabulary

# A character that is not complete yet decodes to U+FFFD, one for each of its bytes at worst: UTF-8 has up to four.
INCOMPLETE = "\ufffd"
HELD_BACK = 3
# Of what came before, as many ids as the text of the next can depend on: a space before a word, a character's bytes.
CONTEXT = 8


class TextStream:
    """Turns a growing list of ids into pieces of text, whose sum is what the ids add to the text before them.

    Attributes:
      ids: so far.
      text: the pieces so far.
    """

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int] = ()):
        """Starts with no ids, after those of `before`: a word's first space is text only where it is not the first."""
        self.ids: list[int] = []
        self.text = ""
        self._vocabulary, self._before = vocabulary, list(before[-CONTEXT:])
        text = vocabulary.decode(self._before)
        # What is encoded as it was decoded ends in no part of a character, though perhaps in U+FFFD itself.
        whole = vocabulary.encode(text)[-HELD_BACK:] == self._before[-HELD_BACK:]
        self._said = len(text) if whole else _settled(text)

    def push(self, ids: list[int], *, last: bool) -> str:
        """Takes more ids and returns the text that they settle; `last` settles all of it."""
        self.ids += ids
        text = self._vocabulary.decode(self._before + self.ids)
        settled = len(text) if last else _settled(text)
        piece = text[self._said : settled]
        self._said = max(settled, self._said)
        self.text += piece
        return piece


def _settled(text: str) -> int:
    """Returns how many of the text's characters no further token changes."""
    settled = len(text)
    while settled > max(len(text) - HELD_BACK, 0) and text[settled - 1] == INCOMPLETE:
        settled -= 1
    return settled
