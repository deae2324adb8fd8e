"""Tokens as they come -> text that is safe to show: whole characters, and nothing that may turn out to be a stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one answer while it grows.

    All pieces together are what the tokenizer makes of all tokens at once, up to the first stop.

    Args:
        tokenizer: Of transformers, backed by `tokenizers`.
        stop: Texts before which the answer ends.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.is_stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._searched = self._shown = 0

    def push(self, token: int) -> None:
        """Add a token."""
        self.tokens.append(token)
        self.text += self._decoder.step(self._tokenizer.backend_tokenizer, token) or ""
        self._cut_at_stop()

    def take(self) -> str:
        """What can be shown and has not been."""
        return self._show(len(self.text) - (0 if self.is_stopped else self._held()))

    def finish(self) -> str:
        """The rest, when no token follows: halves of characters and of stops included."""
        if not self.is_stopped:
            whole = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
            if whole.startswith(self.text):
                self.text = whole
                self._cut_at_stop()
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _cut_at_stop(self) -> None:
        found = [place for stop in self._stop if (place := self.text.find(stop, self._searched)) >= 0]
        if found:
            self.text, self.is_stopped = self.text[: min(found)], True
        self._searched = max(0, len(self.text) - max(map(len, self._stop), default=0))

    def _held(self) -> int:
        """Length of the longest ending that a stop begins with."""
        lengths = range(min(len(self.text), max(map(len, self._stop), default=0)), 0, -1)
        endings = (length for length in lengths if any(stop.startswith(self.text[-length:]) for stop in self._stop))
        return next(endings, 0)
