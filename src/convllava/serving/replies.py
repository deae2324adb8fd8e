"""Answers as OpenAI's JSON: a completion, or chunks of one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from convllava.inference.answer import Answer, Event
from convllava.inference.sampling import TokenLogprob


class TokenTexts:
    """The text of a token within a text: what it adds after another one.

    Alone, some tokenizers would take the space from its front.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._known = tokenizer.decode(self._before)

    def __call__(self, token: int) -> str:
        return str(self._tokenizer.decode([*self._before, token])).removeprefix(self._known)


@dataclass
class Choice:
    """What is known of one of the answers to a request besides its text."""

    tokens: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None

    def add(self, event: Event) -> None:
        self.tokens += event.tokens
        self.finish = event.finish


class Replies:
    """Everything that is said about one request.

    Args:
        model: Its name.
        logprobs: Whether they were asked for.
        texts: Of tokens.
    """

    def __init__(self, model: str, logprobs: bool, texts: TokenTexts) -> None:
        self._frame = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": model}
        self._logprobs, self._texts = logprobs, texts

    def completion(self, choices: Sequence[Choice], answers: Sequence[Answer]) -> dict[str, Any]:
        """The whole reply."""
        found = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._report(choice.tokens),
                "finish_reason": choice.finish,
            }
            for index, (choice, answer) in enumerate(zip(choices, answers, strict=True))
        ]
        return self._frame | {"object": "chat.completion", "choices": found, "usage": usage(answers)}

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a choice, which says who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""}, (), None)

    def chunk(self, index: int, event: Event) -> dict[str, Any]:
        return self._chunk(index, {"content": event.text} if event.text else {}, event.tokens, event.finish)

    def usage_chunk(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The last chunk, where usage was asked for."""
        return self._frame | {"object": "chat.completion.chunk", "choices": [], "usage": usage(answers)}

    def _chunk(
        self, index: int, delta: dict[str, str], tokens: Sequence[TokenLogprob], finish: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": self._report(tokens), "finish_reason": finish}
        return self._frame | {"object": "chat.completion.chunk", "choices": [choice]}

    def _report(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            self._of(token.token, token.logprob) | {"top_logprobs": [self._of(*other) for other in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _of(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._texts(token)
        # A part of a character has no text of its own.
        return {"token": text, "logprob": logprob, "bytes": None if "�" in text else list(text.encode())}


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """What a request took; the prompt counts once, however many answers it has."""
    prompt = answers[0].prompt
    written = sum(answer.written for answer in answers)
    return {
        "prompt_tokens": len(prompt.keys),
        "completion_tokens": written,
        "total_tokens": len(prompt.keys) + written,
        "prompt_tokens_details": {"cached_tokens": answers[0].cached, "image_tokens": prompt.image_tokens},
    }
