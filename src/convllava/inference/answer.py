"""One answer while it is written."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from convllava.inference.prompts import Prompt
from convllava.inference.sampling import Sampler, Sampling, TokenLogprob
from convllava.inference.text_stream import TextStream

Finish = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Event:
    """What a step adds to an answer.

    Attributes:
        text: New text; empty where a character or a stop is not decided yet.
        tokens: The new tokens' logarithms of probability, where asked for.
        finish: Why the answer ends here: the model or a stop ended it, it is as long as allowed, or a step failed.
    """

    text: str
    tokens: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None


class Answer:
    """What is asked for and how much of it is written; made by `Engine.submit`.

    Attributes:
        cached: Tokens of the prompt whose keys and values were there already.
        written: Tokens of the answer so far, the one that ends it included.
        last: The token that was picked last.
        is_cancelled: Nobody wants it any more.
    """

    def __init__(self, prompt: Prompt, sampling: Sampling, text: TextStream, deliver: Callable[[Event], None]) -> None:
        self.prompt, self.sampling, self.deliver = prompt, sampling, deliver
        self.cached = self.written = self.last = 0
        self.is_cancelled = False
        self._sampler, self._text = Sampler(sampling), text

    @property
    def text(self) -> str:
        """All of it; exact once it is finished."""
        return self._text.text

    def write(self, logits: Tensor, likeliest: int, ends: Container[int]) -> Event:
        """Pick the next token.

        Args:
            logits: (vocabulary,) float32.
            likeliest: The token of the largest, which a greedy answer takes.
            ends: Tokens that end an answer.
        """
        self.last = likeliest if self.sampling.temperature == 0 else self._sampler.pick(logits)
        self.written += 1
        if self.last in ends:
            return Event(self._text.finish(), finish="stop")
        self._text.push(self.last)
        report = self._sampler.report(logits, self.last)
        tokens = (report,) if report else ()
        if self._text.is_stopped or self.written == self.sampling.max_new_tokens:
            rest = self._text.finish()
            return Event(rest, tokens, "stop" if self._text.is_stopped else "length")
        return Event(self._text.take(), tokens)
