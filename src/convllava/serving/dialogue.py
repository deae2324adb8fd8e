"""A conversation on the web page about one picture.

What it asks is a request as any client of the API sends it, and the same service answers.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from convllava.geometry import Size
from convllava.serving.job import Job
from convllava.serving.refusal import RefusalError, too_late
from convllava.serving.service import Service

_DOT = " \N{MIDDLE DOT} "
_FRAME = 0.1
"""Seconds between two looks at an answer; whoever does not listen any more is noticed as often."""


@dataclass(frozen=True)
class Picture:
    """A picture's file, and its height and width in pixels."""

    path: Path
    size: Size


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str


@dataclass(frozen=True)
class Talk:
    """A conversation so far."""

    picture: Picture | None = None
    turns: tuple[Turn, ...] = ()

    def answered(self, question: str, answer: str) -> Talk:
        return replace(self, turns=(*self.turns, Turn(question, answer)))


@dataclass
class Reply:
    """What is known of an answer.

    Attributes:
        first: Seconds from the question to the first token.
        usage: As the API reports it, when the answer is finished.
    """

    text: str = ""
    first: float | None = None
    seconds: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """What it took, in a line; empty before its end."""
        if not self.usage:
            return ""
        visual = self.usage["prompt_tokens_details"]["image_tokens"]
        return _DOT.join(
            (
                f"{visual} visual + {self.usage['prompt_tokens'] - visual} text tokens",
                f"first token {self.first:.2f} s",
                f"{self.usage['completion_tokens']} tokens in {self.seconds:.2f} s",
            )
        )


async def reply_to(
    service: Service, talk: Talk, question: str, max_pixels: int | None = None
) -> AsyncGenerator[Reply, None]:
    """The answer as it grows, ten times a second until it is finished; whoever closes the iterator ends the answer.

    Args:
        service: That answers.
        talk: What was said before.
        question: What is asked.
        max_pixels: Of what the tower sees of the picture; None is the server's own budget.

    Raises:
        RefusalError: as a client of the API would hear it.
    """
    reply = Reply()
    work = asyncio.create_task(_answer(service, talk, question, max_pixels, reply))
    try:
        while not (await asyncio.wait({work}, timeout=_FRAME))[0]:
            yield replace(reply)
        work.result()
        yield reply  # whole, though it may have ended while the last look at it was being shown
    finally:
        work.cancel()


async def _answer(service: Service, talk: Talk, question: str, max_pixels: int | None, reply: Reply) -> None:
    arrived = time.perf_counter()
    with service.metrics.counting(), service.gate.entered():
        try:
            async with asyncio.timeout(service.limits.seconds):
                body = await asyncio.to_thread(request_body, service.name, talk, question, max_pixels)
                await _follow(Job(service, await service.prepare(body), arrived), arrived, reply)
        except TimeoutError:
            raise too_late(service.limits.seconds) from None
    service.metrics.requests.labels(200).inc()


async def _follow(job: Job, arrived: float, reply: Reply) -> None:
    try:
        async for _, event in job.events():
            reply.seconds = time.perf_counter() - arrived
            reply.first = reply.first or reply.seconds
            reply.text += event.text
        reply.usage = job.usage()
    finally:
        job.cancel()


def request_body(model: str, talk: Talk, question: str, max_pixels: int | None) -> bytes:
    """A question as a request of the API.

    Raises:
        RefusalError: there is no picture, or its file is not there any more.
    """
    if talk.picture is None:
        raise RefusalError(400, "there is no picture yet; drop one first", "no_picture")
    try:
        data = base64.b64encode(talk.picture.path.read_bytes()).decode()
    except FileNotFoundError:
        raise RefusalError(
            422, "the picture was kept for an hour and is gone; drop it again", "invalid_image"
        ) from None
    image = {"type": "image_url", "image_url": {"url": f"data:image;base64,{data}"}}
    texts = [text for turn in talk.turns for text in (turn.question, turn.answer)] + [question]
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)
    ]
    messages[0]["content"] = [image, {"type": "text", "text": texts[0]}]
    body: dict[str, Any] = {"model": model, "messages": messages}
    if max_pixels is not None:
        body["mm_processor_kwargs"] = {"max_pixels": max_pixels}
    return json.dumps(body).encode()
