"""Bodies in, streams out, and noticing that nobody listens any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from convllava.serving.limits import Limits
from convllava.serving.refusal import RefusalError

_Result = TypeVar("_Result")
_DISCARD_SECONDS = _LAST_SECONDS = 0.5


async def read_body(request: Request, limits: Limits, kind: str = "application/json") -> bytes:
    """The whole body.

    Raises:
        RefusalError: it is not said to be of the kind (what is not JSON a web page of any site could send), or too
            large, or too slow.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
        raise RefusalError(400, f"the Content-Type must be {kind}", "invalid_content_type")
    most = f"{limits.body_bytes / 2**20:g} MiB"
    too_large = RefusalError(413, f"the body has more than {most}; send fewer or smaller images", "body_too_large")
    if int(request.headers.get("content-length") or 0) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise RefusalError(408, f"the body took more than {limits.body_seconds:g} s", "body_too_slow") from None
    except ClientDisconnect:
        raise gone() from None
    return bytes(body)


async def discard_body(request: Request) -> None:
    """Take what is still on its way, for a while: a client that cannot finish sending would not read the refusal."""
    with suppress(TimeoutError, ClientDisconnect, RuntimeError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            async for _ in request.stream():
                pass


def gone() -> RefusalError:
    return RefusalError(499, "the client went away", "client_gone")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of some work, which is cancelled when the client goes away first.

    Args:
        receive: Of a request whose body has been read.

    Raises:
        RefusalError: 499; or whatever the work raises.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise gone()
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, with what must be left when they end, however they end.

    Args:
        lines: The events.
        deadline: When they must have been sent, by the event loop's clock.
        too_late: Makes the event that says that they were not.
        stack: Is closed in the end.
    """

    media_type = "text/event-stream"

    def __init__(
        self, lines: AsyncIterator[str], deadline: float, too_late: Callable[[], str], stack: AsyncExitStack
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._lines, self._deadline, self._too_late, self._stack = lines, deadline, too_late, stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            with suppress(RefusalError, OSError, TimeoutError):  # nobody is left to tell
                await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with asyncio.timeout_at(self._deadline):
                async for line in self._lines:
                    await _send_piece(send, line)
        except TimeoutError:
            async with asyncio.timeout(_LAST_SECONDS):  # a client that does not read would keep us here
                await _send_piece(send, self._too_late())
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_piece(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
