"""Connections: time limits for clients that send or read too slowly, and noticing clients that disconnect."""

import asyncio
import json
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import h11
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from convllava.serving.api_error import ApiError, client_gone
from convllava.serving.limits import Limits

CONNECTIONS = 512
"""Most open connections, including idle ones; the server answers further ones with 503."""
HEADER_SECONDS = 10.0
"""Time for a request's complete header, from the connection or the last answer on it."""
UNREAD_SECONDS = 30.0
"""Time after which a client that does not read its answer is disconnected."""
_DISCARD_SECONDS = 0.5
_Result = TypeVar("_Result")


class TimeLimitedProtocol(H11Protocol):
    """Uvicorn's HTTP/1.1 protocol with time limits for reading a header and for sending an answer.

    Between header and answer, the application has its own limits.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._header_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            self.app = _reject_connection
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._header_timer)
        _cancel(self._unread_timer)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            _cancel(self._header_timer)

    def on_response_complete(self) -> None:
        self._start_header_timer()  # before super(), because the next request may already be in the buffer
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_timer = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._unread_timer)

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP with the same error object as everything else."""
        body = json.dumps(ApiError(400, msg, "invalid_http").body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        response = h11.Response(status_code=400, reason=b"Bad Request", headers=list(headers.items()))
        with suppress(h11.LocalProtocolError):  # an answer has already begun
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _start_header_timer(self) -> None:
        _cancel(self._header_timer)
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._close)

    def _close(self) -> None:
        """Close the connection; abort it later if the client does not read the rest of the last answer."""
        self.transport.close()
        self._header_timer = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


async def _reject_connection(scope: Scope, receive: Receive, send: Send) -> None:
    """ASGI application for connections beyond `CONNECTIONS`."""
    error = ApiError(503, f"{CONNECTIONS} connections are open; try again later", "too_many_connections")
    await discard_body(Request(scope, receive))
    await JSONResponse(error.body, error.status, {**error.headers, "Connection": "close"})(scope, receive, send)


async def read_body(request: Request, limits: Limits) -> bytes:
    """Return the body of a JSON request.

    Raises:
        ApiError: if the Content-Type is not JSON (a form on any web page could send other types), or if the body is
            too large or too slow.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(400, "the Content-Type must be application/json", "invalid_content_type")
    most = f"{limits.body_bytes / 2**20:g} MiB"
    too_large = ApiError(413, f"the body has more than {most}; send fewer or smaller images", "body_too_large")
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
        raise ApiError(408, f"the body took more than {limits.body_seconds:g} s", "body_too_slow") from None
    except ClientDisconnect:
        raise client_gone() from None
    return bytes(body)


async def discard_body(request: Request) -> None:
    """Read and drop the rest of a body for a short time; a client that is still sending would miss the error."""
    with suppress(TimeoutError, ClientDisconnect, RuntimeError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            async for _ in request.stream():
                pass


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Return the result of a coroutine; cancel it if the client disconnects first.

    Args:
        receive: ASGI receive function of a request whose body has been read.
        work: The coroutine.

    Raises:
        ApiError: 499 if the client disconnects. Errors of the coroutine are passed on.
    """

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise client_gone()
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
