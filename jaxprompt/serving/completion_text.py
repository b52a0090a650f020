"""The text of a completion as its tokens come: blanks, halves of characters, stop strings."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxprompt.data.tokenizer import Tokenizer

_HALF = "\ufffd"  # how a decoder shows the first bytes of a character
_CONTEXT = 8  # ids before the completion that decide whether it begins with a blank


class Piece(NamedTuple):
    """Text that is new, and whether a stop string ended the completion."""

    text: str
    stopped: bool


class CompletionText:
    """Decodes ids piece by piece. The pieces together are the text of all ids.

    Args:
        tokenizer: of the backbone.
        before: ids that the completion continues, in one sequence.
        stop: texts that end the completion; they are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str] = ()):
        special = {*tokenizer.special_ids}
        context = [id for id in before if id not in special] if tokenizer.one_sequence else []
        self.ids: list[int] = []
        self.text = ""  # that was given out
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._context = context[-_CONTEXT:]
        self._skip = len(tokenizer.decode_all(self._context)) if self._context else 0
        self._held = max((len(text) - 1 for text in self._stop), default=0)

    def add(self, ids: Sequence[int], last: bool) -> Piece:
        """The text that further ids make certain; all that is left with the ``last`` ones."""
        self.ids += ids
        if self.stopped:
            return Piece("", True)
        text = self._decoded()
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            text = text[: min(found)]
        elif not last:
            text = text.rstrip(_HALF)
            text = text[: max(len(text) - self._held, 0)]
        new = text[len(self.text) :]
        self.text += new
        return Piece(new, self.stopped)

    def _decoded(self) -> str:
        if not self._tokenizer.one_sequence:
            return self._tokenizer.decode_all(self.ids).lstrip()
        return self._tokenizer.decode_all([*self._context, *self.ids])[self._skip :]
