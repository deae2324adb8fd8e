"""Connections that only stay are ended, so that nobody keeps others out by holding them."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import h11
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from convllava.serving.refusal import RefusalError
from convllava.serving.transport import discard_body

CONNECTIONS = 512
"""Open at a time, idle ones included; those that come beyond them are answered with a refusal."""
HEADER_SECONDS = 10.0
"""From the connection, or from the last answer on it, to the end of a request's header, whatever trickles in."""
UNREAD_SECONDS = 30.0
"""For which a client may leave an answer unread that waits to be sent."""


class PunctualProtocol(H11Protocol):
    """Uvicorn's HTTP/1.1, where a client must say in time what it wants, and take what it asked for.

    Between header and answer a connection is the application's, which has limits of its own.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._silent: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            self.app = _refuse
        self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._silent)
        _cancel(self._unread)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            _cancel(self._silent)

    def on_response_complete(self) -> None:
        self._await_header()  # first, for the next request may be here already
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._unread)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP as everything else is refused."""
        body = json.dumps(RefusalError(400, msg, "invalid_http").body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        response = h11.Response(status_code=400, reason=b"Bad Request", headers=list(headers.items()))
        with suppress(h11.LocalProtocolError):  # an answer is on its way already
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _await_header(self) -> None:
        _cancel(self._silent)
        self._silent = self.loop.call_later(HEADER_SECONDS, self._close)

    def _close(self) -> None:
        """End the connection, and at once where the last answer on it is not read to its end either."""
        self.transport.close()
        self._silent = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of a connection too many."""
    refusal = RefusalError(503, f"{CONNECTIONS} connections are open; try again later", "too_many_connections")
    await discard_body(Request(scope, receive))
    headers = {**refusal.headers, "Connection": "close"}
    await JSONResponse(refusal.body, refusal.status, headers)(scope, receive, send)
