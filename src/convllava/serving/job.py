"""One request while it is answered: what the engine's thread says, in the event loop."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from convllava.inference.answer import Event
from convllava.serving.refusal import RefusalError
from convllava.serving.replies import Choice, Replies, usage
from convllava.serving.service import Prepared, Service


class Job:
    """The answers to one request; it is in the engine's queue once it is made.

    Args:
        service: That answers.
        prepared: What is asked.
        arrived: When, by `time.perf_counter`.
    """

    def __init__(self, service: Service, prepared: Prepared, arrived: float) -> None:
        self.request = prepared.request
        self._service, self._arrived = service, arrived
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._replies = Replies(service.name, bool(self.request.logprobs), service.token_texts)
        self._answers = [
            service.engine.submit(
                prepared.prompt,
                self.request.sampling(index, prepared.max_new_tokens, service.temperature, service.top_p),
                partial(self._deliver, index),
            )
            for index in range(self.request.n)
        ]

    def cancel(self) -> None:
        """Free the slots, at whatever point the answers are."""
        for answer in self._answers:
            self._service.engine.cancel(answer)

    def _deliver(self, index: int, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
        except RuntimeError:  # the loop is closed, and with it everybody who waited
            self._answers[index].is_cancelled = True

    def usage(self) -> dict[str, Any]:
        """Tokens of prompt and answers so far."""
        return usage(self._answers)

    async def completion(self) -> dict[str, Any]:
        """The whole reply."""
        choices = [Choice() for _ in range(self.request.n)]
        async for index, event in self.events():
            choices[index].add(event)
        return self._replies.completion(choices, self._answers)

    async def lines(self) -> AsyncIterator[str]:
        """The reply as server-sent events."""
        for index in range(self.request.n):
            yield _line(self._replies.opening(index))
        async for index, event in self.events():
            if event.text or event.tokens or event.finish:
                yield _line(self._replies.chunk(index, event))
        if self.request.stream_options and self.request.stream_options.include_usage:
            yield _line(self._replies.usage_chunk(self._answers))
        yield "data: [DONE]\n\n"

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """What happens, with the number of the answer that it happens to, until all are finished."""
        metrics, unfinished = self._service.metrics, len(self._answers)
        is_first = True
        while unfinished:
            index, event = await self._events.get()
            if event.finish == "error":
                raise RefusalError(500, "the model failed; try again", "engine_failed")
            if is_first:
                metrics.first_token.observe(time.perf_counter() - self._arrived)
                is_first = False
            unfinished -= event.finish is not None
            yield index, event
        metrics.duration.observe(time.perf_counter() - self._arrived)


def _line(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def error_line(refusal: RefusalError) -> str:
    """What a stream says when it breaks off."""
    return _line(refusal.body)
