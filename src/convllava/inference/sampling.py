"""Which token comes next: greedy or drawn, each sequence by its own seed and never by its company."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How one answer is written.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 takes the likeliest token, more than 0 draws.
        top_p: Draw from the likeliest tokens that together have at least this probability (arXiv 1904.09751).
        seed: The same seed draws the same answer; None draws another one each time.
        stop: The answer ends before the first of these texts.
        logprobs: How many likeliest alternatives to report beside each token's own logarithm; None reports nothing.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural logarithm of probability before temperature, and those of the likeliest at its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Draws the tokens of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def pick(self, logits: Tensor) -> int:
        """(vocabulary,) float32 logits -> a token."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        # On the CPU, so that a seed means the same on every device; less the largest, so that no temperature overflows.
        scaled = (logits - logits.max()).cpu().double() / self.sampling.temperature
        probabilities, tokens = scaled.softmax(-1).sort(descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        kept = probabilities.masked_fill(before >= self.sampling.top_p, 0.0)
        kept[0] = probabilities[0]
        return int(tokens[torch.multinomial(kept, 1, generator=self._generator)])

    def report(self, logits: Tensor, token: int) -> TokenLogprob | None:
        """What was asked to be known of a picked token."""
        if self.sampling.logprobs is None:
            return None
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(min(self.sampling.logprobs, len(logprobs)))
        top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return TokenLogprob(token, float(logprobs[token]), tuple(top))
