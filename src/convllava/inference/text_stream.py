"""Tokens as they come -> text that is safe to show: whole characters, and nothing that may turn out to be a stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer while it grows.

    All pieces together are what the tokenizer makes of all tokens at once, up to the first stop. (Where a model breaks
    a character in the middle, some tokenizers write the characters before it otherwise than they would have: what has
    been shown stays, and `text` is right in the end.)

    Args:
        tokenizer: Of transformers.
        stop: Texts before which the answer ends.

    Attributes:
        text: Of all tokens so far, but for a character that is not complete.
        is_stopped: A stop has been found, and nothing is added any more.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.is_stopped = False
        self._tokens: list[int] = []
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._longest = max(map(len, self._stop), default=0)
        # Only the last tokens are decoded again: those from `_base` on, of which those up to `_read` are in the text.
        self._base = self._read = 0
        self._searched = self._shown = 0

    def push(self, token: int) -> None:
        """Add a token."""
        if token in self._special:  # has no text, and at the beginning of what is decoded would take a space with it
            return
        self._tokens.append(token)
        recent = self._decode(self._base)
        if recent.endswith(_BROKEN):  # perhaps the next token completes the character
            return
        self.text += recent[len(self._decode(self._base, self._read)) :]
        self._base, self._read = self._read, len(self._tokens)
        self._cut_at_stop()

    def take(self) -> str:
        """What can be shown and has not been."""
        return self._show(len(self.text) - (0 if self.is_stopped else self._held()))

    def finish(self) -> str:
        """The rest, when no token follows: halves of characters and of stops included."""
        if not self.is_stopped:
            self.text = self._decode(0)
            self._cut_at_stop()
        return self._show(len(self.text))

    def _decode(self, start: int, end: int | None = None) -> str:
        return str(self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True))

    def _show(self, end: int) -> str:
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _cut_at_stop(self) -> None:
        found = [place for stop in self._stop if (place := self.text.find(stop, self._searched)) >= 0]
        if found:
            self.text, self.is_stopped = self.text[: min(found)], True
        self._searched = max(0, len(self.text) - self._longest)

    def _held(self) -> int:
        """Length of the longest ending that a stop begins with."""
        lengths = range(min(len(self.text), self._longest), 0, -1)
        endings = (length for length in lengths if any(stop.startswith(self.text[-length:]) for stop in self._stop))
        return next(endings, 0)
