"""One answer while it is written: choose each token, and turn tokens into text that is safe to show."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from convllava.errors import ConfigError
from convllava.inference.prompts import Prompt

Finish = Literal["stop", "length", "error"]

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Appears in decoded text instead of a character whose bytes are incomplete."""


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of `Assistant.ask` and the similar methods; see `Sampling`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: str | Sequence[str]


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one answer.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token; more than 0 draws.
        top_p: Draw from the smallest set of likeliest tokens with at least this probability (arXiv 1904.09751).
        seed: The same seed draws the same answer; None draws a different one each time.
        stop: The answer ends before the first of these texts.
        logprobs: Number of likeliest alternatives to report for each token, next to its own log probability; None
            reports nothing.

    Raises:
        ConfigError: if a number is out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if self.max_new_tokens < 1:
            raise ConfigError(f"`max_new_tokens` is {self.max_new_tokens}; give at least 1")
        if self.temperature < 0:
            raise ConfigError(f"`temperature` is {self.temperature}; give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"`top_p` is {self.top_p}; give more than 0 and at most 1")


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log probability of a token before temperature, and (token, log probability) of the likeliest tokens."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """One token of an answer.

    Attributes:
        text: New text; empty while a character or a stop text is not complete.
        tokens: Log probabilities of the new token, if requested.
        finish: Why the answer ends here: "stop" (the model or a stop text), "length" or "error" (a step failed); None
            if it goes on.
    """

    text: str
    tokens: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None


class Sampler:
    """Draws the tokens of one answer with its own random generator, so that other answers do not affect it."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def pick(self, logits: Tensor) -> int:
        """Choose a token from (vocabulary,) float32 logits."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        # On the CPU, so that a seed draws the same answer on every device. The maximum is subtracted so that no
        # temperature overflows.
        scaled = (logits - logits.max()).cpu().double() / self.sampling.temperature
        probabilities, tokens = scaled.softmax(-1).sort(descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        kept = probabilities.masked_fill(before >= self.sampling.top_p, 0.0)
        kept[0] = probabilities[0]
        return int(tokens[torch.multinomial(kept, 1, generator=self._generator)])

    def report(self, logits: Tensor, token: int) -> TokenLogprob | None:
        """Return the log probabilities of a picked token, if requested."""
        if self.sampling.logprobs is None:
            return None
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(min(self.sampling.logprobs, len(logprobs)))
        top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return TokenLogprob(token, float(logprobs[token]), tuple(top))


class TextStream:
    """The text of one answer while it grows: whole characters only, and nothing that may become a stop text.

    All pieces together equal the decoded text of all tokens, up to the first stop text. There is one exception: if a
    model breaks a character in the middle, some tokenizers then decode earlier characters differently. Pieces that were
    returned stay as they are; `text` is correct at the end. (`tokenizers.decoders.DecodeStream` raises in this case.)

    Args:
        tokenizer: A tokenizer of transformers.
        stop: Texts before which the answer ends.

    Attributes:
        text: Text of all tokens so far, without an incomplete last character.
        is_stopped: True if a stop text was found; the text does not grow any more.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.is_stopped = False
        self._tokens: list[int] = []
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._longest = max(map(len, self._stop), default=0)
        # Only the last tokens are decoded again: those from `_base` on. Those before `_read` are in the text already.
        self._base = self._read = 0
        self._searched = self._shown = 0

    def push(self, token: int) -> None:
        """Add a token."""
        if token in self._special:  # it has no text, and the decoder would remove a space after it
            return
        self._tokens.append(token)
        recent = self._decode(self._base)
        if recent.endswith(_INCOMPLETE):  # the next token may complete the character
            return
        self.text += recent[len(self._decode(self._base, self._read)) :]
        self._base, self._read = self._read, len(self._tokens)
        self._cut_at_stop()

    def take(self) -> str:
        """Return the new text that can be shown already."""
        end = len(self.text)
        if not self.is_stopped:  # the end of the text may be the beginning of a stop text
            lengths = range(min(end, self._longest), 0, -1)
            end -= next((n for n in lengths if any(stop.startswith(self.text[-n:]) for stop in self._stop)), 0)
        return self._show(end)

    def finish(self) -> str:
        """Return the rest when no token follows, including incomplete characters and beginnings of stop texts."""
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


class Answer:
    """A submitted prompt and the part of its answer that is written; made by `Engine.submit`.

    Attributes:
        deliver: Called with every event.
        cached: Tokens of the prompt whose keys and values were in the cache already.
        written: Tokens of the answer so far, including the token that ends it.
        last: The token that was picked last.
        finish: Why the answer ended; None while it is written.
        is_cancelled: True if nobody waits for it any more.
    """

    def __init__(
        self, prompt: Prompt, sampling: Sampling, tokenizer: Any, deliver: Callable[[Event], None] = lambda event: None
    ) -> None:
        self.prompt, self.sampling = prompt, sampling
        self.cached = self.written = self.last = 0
        self.finish: Finish | None = None
        self.is_cancelled = False
        self.deliver = deliver
        self._sampler, self._text = Sampler(sampling), TextStream(tokenizer, sampling.stop)

    @property
    def text(self) -> str:
        """All text so far; exact when the answer is finished."""
        return self._text.text

    def write(self, logits: Tensor, likeliest: int, ends: Container[int]) -> Event:
        """Pick the next token.

        Args:
            logits: (vocabulary,) float32.
            likeliest: Index of the largest logit, which a greedy answer takes.
            ends: Tokens that end an answer.
        """
        self.last = likeliest if self.sampling.temperature == 0 else self._sampler.pick(logits)
        self.written += 1
        if self.last in ends:
            self.finish = "stop"
            return Event(self._text.finish(), finish="stop")
        self._text.push(self.last)
        report = self._sampler.report(logits, self.last)
        tokens = (report,) if report else ()
        if self._text.is_stopped or self.written == self.sampling.max_new_tokens:
            rest = self._text.finish()
            self.finish = "stop" if self._text.is_stopped else "length"
            return Event(rest, tokens, self.finish)
        return Event(self._text.take(), tokens)
