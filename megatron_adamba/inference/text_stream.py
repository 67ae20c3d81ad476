"""Text out of tokens one by one: nothing is shown that a later token could still change or a stop string take away."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_adamba.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"
"""what decoders put in place of bytes that are no character yet"""
_LONGEST_CHARACTER = 4
"""bytes; a replacement that is followed by so many stands for bytes that will never be a character"""
_CONTEXT = 16
"""tokens before that are decoded again with new ones"""


def clean_text(text: str) -> str:
    """Text that can be encoded: halves of surrogate pairs, alone in JSON or in words of a command line that are not
    UTF-8, become U+FFFD; pairs become the character that they are."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def finished_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of tokens without what they end with, where that may yet become a character."""
    text = tokenizer.decode(tokens)
    return text[: _certain(text)]


class Stripped:
    """Text in pieces, without white space at its beginning and end."""

    def __init__(self) -> None:
        self._begun, self._held = False, ""

    def push(self, piece: str) -> str:
        """What of it is known to be inside."""
        text = self._held + piece
        if not self._begun:
            text = text.lstrip()
        kept = text.rstrip()
        self._begun, self._held = self._begun or bool(kept), text[len(kept) :]
        return kept


class TextStream:
    """The text that one sequence of new tokens makes."""

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int], stop: Sequence[str] = (), unfinished: bool = False
    ) -> None:
        """context: tokens before, which decoders of whole pieces need for the spaces between, and whose last bytes the
        first tokens may make a character of; stop: strings that end the text, themselves left out; unfinished: such
        bytes at the end of the context are shown with the text where they do not become a character either."""
        self.tokenizer, self.stop, self.unfinished = tokenizer, tuple(text for text in stop if text), unfinished
        self.stopped, self.pending = False, 0
        self._begin(list(context[-_CONTEXT:]))

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self.tokens.append(token)
        text = self._text()
        self.pending = self.pending + 1 if text.endswith(UNFINISHED) else 0
        # some decoders spell a whole run of bytes as unknown while its last character is not there
        certain = len(text.rstrip(UNFINISHED)) if self.pending < _LONGEST_CHARACTER else _certain(text)
        end = len(text)
        for stop in self.stop:
            found = text.find(stop, max(0, self.shown - len(stop)))
            if found >= 0:
                self.stopped, end = True, min(end, found)
        if not self.stopped:
            end = min(certain, *(self._before_beginning(text, stop) for stop in self.stop), end)
        new = self._show(text, end)
        if self.shown == len(text) and len(self.tokens) > 4 * _CONTEXT:
            self._begin_anew(text)
        return new

    def finish(self) -> str:
        """What was held back."""
        text = self._text()
        return "" if self.stopped else self._show(text, len(text))

    def _begin(self, context: list[int]) -> None:
        self.tokens, self.shown = context, 0
        self.before = self.tokenizer.decode(context)

    def _begin_anew(self, text: str) -> None:
        """From a few tokens back, where these by themselves are the end of the text: none begins inside a character."""
        for count in range(_CONTEXT, _CONTEXT + _LONGEST_CHARACTER):
            context = self.tokens[-count:]
            if text.endswith(self.tokenizer.decode(context)):
                self._begin(context)
                return

    def _text(self) -> str:
        """Of the new tokens."""
        text = self.tokenizer.decode(self.tokens)
        if text.startswith(self.before) and not self.unfinished:
            return text[len(self.before) :]
        # the last bytes before have become a part of the first new character
        return text[_certain(self.before) :]

    def _show(self, text: str, end: int) -> str:
        end = max(end, self.shown)
        new, self.shown = text[self.shown : end], end
        return new

    @staticmethod
    def _before_beginning(text: str, stop: str) -> int:
        """Characters before an end of the text that a stop string may begin with."""
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                return len(text) - length
        return len(text)


def _certain(text: str) -> int:
    """Characters that further bytes can't change."""
    end = len(text)
    while end > max(0, len(text) - _LONGEST_CHARACTER) and text[end - 1] == UNFINISHED:
        end -= 1
    return end
