"""The answers to one request while the engine writes them, as OpenAI's JSON: one completion, or chunks of a stream."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from functools import cached_property, partial
from typing import Any
from uuid import uuid4

from convllava.inference.sampling import Event, TokenLogprob
from convllava.serving.api_error import ApiError
from convllava.serving.service import Prepared, Service


class TokenTexts:
    """Return the text of a token as it appears inside a text.

    A token is decoded after another one, because some tokenizers drop the leading space of the first token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._prefix = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._prefix_text = tokenizer.decode(self._prefix)

    def __call__(self, token: int) -> str:
        return str(self._tokenizer.decode([*self._prefix, token])).removeprefix(self._prefix_text)


class Completion:
    """The answers to one request. Making it puts them into the engine's queue.

    The engine calls back from its own thread; the events are passed on to the event loop.

    Args:
        service: The service that answers.
        prepared: The checked request and its prompt.
        arrived: When the request arrived, by `time.perf_counter`.
    """

    def __init__(self, service: Service, prepared: Prepared, arrived: float) -> None:
        self._request, self._service, self._arrived = prepared.request, service, arrived
        self._header = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": service.name}
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(index: int, event: Event) -> None:
            try:
                loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
            except RuntimeError:  # the event loop is closed, so nobody waits for the answer
                self._answers[index].is_cancelled = True

        self._answers = [
            service.engine.submit(
                prepared.prompt,
                self._request.sampling(index, prepared.max_new_tokens, service.temperature, service.top_p),
                partial(deliver, index),
            )
            for index in range(self._request.n)
        ]

    @cached_property
    def _token_text(self) -> TokenTexts:
        return TokenTexts(self._service.assistant.processor.tokenizer)

    def cancel(self) -> None:
        """Free the slots of all answers, finished or not."""
        for answer in self._answers:
            self._service.engine.cancel(answer)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield (index of the answer, event) until all answers are finished.

        Raises:
            ApiError: if the model failed.
        """
        metrics, unfinished, is_first = self._service.metrics, len(self._answers), True
        while unfinished:
            index, event = await self._events.get()
            if event.finish == "error":
                raise ApiError(500, "the model failed; try again", "engine_failed")
            if is_first:
                metrics.first_token.observe(time.perf_counter() - self._arrived)
                is_first = False
            unfinished -= event.finish is not None
            yield index, event
        metrics.duration.observe(time.perf_counter() - self._arrived)

    async def whole(self) -> dict[str, Any]:
        """Return the completion after all answers are finished."""
        tokens: list[list[TokenLogprob]] = [[] for _ in self._answers]
        async for index, event in self.events():
            tokens[index] += event.tokens
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logprobs(tokens[index]),
                "finish_reason": answer.finish,
            }
            for index, answer in enumerate(self._answers)
        ]
        return self._header | {"object": "chat.completion", "choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncIterator[str]:
        """Yield the completion as server-sent events."""
        for index in range(len(self._answers)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for index, event in self.events():
            if event.text or event.tokens or event.finish:
                delta = {"content": event.text} if event.text else {}
                yield self._chunk(index, delta, event.tokens, event.finish)
        if self._request.stream_options and self._request.stream_options.include_usage:
            usage = {"object": "chat.completion.chunk", "choices": [], "usage": self._usage()}
            yield server_sent_event(self._header | usage)
        yield "data: [DONE]\n\n"

    def _chunk(
        self, index: int, delta: dict[str, str], tokens: Sequence[TokenLogprob] = (), finish: str | None = None
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": finish}
        return server_sent_event(self._header | {"object": "chat.completion.chunk", "choices": [choice]})

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self._token_text(token)
            # The text of a token is empty if it holds only a part of a character.
            return {"token": text, "logprob": logprob, "bytes": None if "�" in text else list(text.encode())}

        content = [
            entry(token.token, token.logprob) | {"top_logprobs": [entry(*other) for other in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _usage(self) -> dict[str, Any]:
        """Return the token counts; the prompt counts once, also if it has several answers."""
        prompt = self._answers[0].prompt
        written = sum(answer.written for answer in self._answers)
        return {
            "prompt_tokens": len(prompt.keys),
            "completion_tokens": written,
            "total_tokens": len(prompt.keys) + written,
            "prompt_tokens_details": {"cached_tokens": self._answers[0].cached, "image_tokens": prompt.image_tokens},
        }


def server_sent_event(content: dict[str, Any]) -> str:
    """Return JSON content as one server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
