"""From tokens, as they come, to text that never changes again."""

from rattn.data.vocabulary import Vocabulary

# A character that is not complete yet decodes to U+FFFD, one for each of its bytes at worst: UTF-8 has up to four.
INCOMPLETE = "\ufffd"
HELD_BACK = 3


class TextStream:
    """Turns a growing list of ids into pieces of text, whose sum is the text of all ids."""

    def __init__(self, vocabulary: Vocabulary):
        """Starts with no ids."""
        self.ids: list[int] = []
        self._vocabulary, self._said = vocabulary, 0

    def push(self, ids: list[int], *, last: bool) -> str:
        """Takes more ids and returns the text that they settle; `last` settles all of it."""
        self.ids += ids
        text = self._vocabulary.decode(self.ids)
        settled = len(text)
        if not last:
            while settled > max(len(text) - HELD_BACK, 0) and text[settled - 1] == INCOMPLETE:
                settled -= 1
        piece = text[self._said : settled]
        self._said = max(settled, self._said)
        return piece
