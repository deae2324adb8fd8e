"""The door of the web page: who comes in, to which places, and with what.

Gradio can do more than our page needs: it reads files and fetches addresses that a request names, and it has places for
many things. So everything is looked at here before any of it sees a request.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from convllava.serving.gate import Gate
from convllava.serving.limits import Limits
from convllava.serving.refusal import RefusalError
from convllava.serving.transport import discard_body, read_body

PAGE = "/ui"
_PLACES = re.compile(
    r"|/|/config|/theme\.css|/(assets|static|svelte)/.+"
    r"|/gradio_api/(startup-events|heartbeat/\w+|queue/join|queue/data|cancel|reset|upload|upload_progress|file=.+)"
)
"""What a page asks for while it is used."""
_UPLOAD, _FILE = "/gradio_api/upload", "/gradio_api/file="
KEPT_SECONDS = 3600
"""Of an uploaded file."""
_MOST_HELD, _LEAST = 2**30, 4096
"""Bytes of uploaded files that are held at a time, and what each counts for at least, a folder too."""
_LOOK_SECONDS = 0.3
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
        "base-uri 'self'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""The browser asks nobody but us, and shows the page within no other."""
_CHALLENGE = {"WWW-Authenticate": 'Basic realm="any name, and the key as the password", charset="UTF-8"'}


class PageGuard:
    """ASGI middleware before everything under `PAGE`; the rest passes.

    Args:
        app: What it stands before.
        gate: That an upload is inside of while it is read; when it drains and is empty, streams to open pages end.
        limits: Of bodies, as for the API.
        folder: The only one whose files a request may name.
        api_key: That a browser must bring as the password of HTTP's basic authentication.
    """

    def __init__(self, app: ASGIApp, gate: Gate, limits: Limits, folder: Path, api_key: str | None = None) -> None:
        self.app, self._gate, self._limits, self._api_key = app, gate, limits, api_key
        self._folder = os.path.realpath(folder)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not f"{scope['path']}/".startswith(f"{PAGE}/"):
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            receive = await self._admit(request)
        except RefusalError as refusal:
            if request.method == "POST":
                await discard_body(request)
            await _answer(refusal, _place(request))(scope, receive, send)
            return
        await self.app(scope, receive, _with_headers(send))

    async def _admit(self, request: Request) -> Receive:
        """What the page reads a request from."""
        _check_origin(request)
        self._check_key(request)
        place = _place(request)
        if not _PLACES.fullmatch(place) or (place.startswith(_FILE) and not self._is_ours(place.removeprefix(_FILE))):
            raise RefusalError(404, "the page has no such place", "unknown_url")
        if request.method != "POST":
            return self._until_the_end(request.receive)
        body = await (self._upload(request) if place == _UPLOAD else self._message(request))
        return _again(body, request.receive)

    def _until_the_end(self, receive: Receive) -> Receive:
        """The streams that an open page listens to must not keep a server that has nothing else to do."""

        async def receive_or_end() -> Message:
            message = asyncio.ensure_future(receive())
            try:
                while not message.done():
                    await asyncio.wait({message}, timeout=_LOOK_SECONDS)
                    if self._gate.is_draining and self._gate.inside == 0:
                        return {"type": "http.disconnect"}
                return message.result()
            finally:
                message.cancel()

        return receive_or_end

    def _check_key(self, request: Request) -> None:
        if self._api_key is None:
            return
        scheme, _, encoded = request.headers.get("authorization", "").partition(" ")
        try:
            _, _, password = base64.b64decode(encoded if scheme.lower() == "basic" else "").partition(b":")
        except ValueError:
            password = b""
        if not hmac.compare_digest(password, self._api_key.encode()):
            raise RefusalError(401, "give the server's key as the password", "invalid_api_key")

    async def _message(self, request: Request) -> bytes:
        body = await read_body(request, self._limits)
        self._check_files(body)
        return body

    async def _upload(self, request: Request) -> bytes:
        with self._gate.entered():
            if await asyncio.to_thread(_held, self._folder) > _MOST_HELD:
                raise RefusalError(503, "too many pictures are held; try again later", "too_many_files")
            return await read_body(request, self._limits, "multipart/form-data")

    def _check_files(self, body: bytes) -> None:
        try:
            paths = list(_paths(json.loads(body)))
        except (ValueError, RecursionError):
            raise RefusalError(400, "the body is not JSON", "invalid_request") from None
        if not all(isinstance(path, str) and self._is_ours(path) for path in paths):
            raise RefusalError(400, "only files that were uploaded can be named", "invalid_request")

    def _is_ours(self, path: str) -> bool:
        try:
            return os.path.realpath(path).startswith(self._folder + os.sep)
        except ValueError:  # no file can have such a name
            return False


def _place(request: Request) -> str:
    return str(request.scope["path"]).removeprefix(PAGE)


def _answer(refusal: RefusalError, place: str) -> Response:
    headers = _CHALLENGE if refusal.status == HTTPStatus.UNAUTHORIZED else refusal.headers
    if place == _UPLOAD:  # Gradio shows a person all that the answer to a failed upload holds
        return PlainTextResponse(refusal.message, refusal.status, headers)
    return JSONResponse(refusal.body, refusal.status, headers)


def _held(folder: str) -> int:
    """Bytes of all within, once what is too old is gone: Gradio forgets folders, and files that it did not ask for."""
    total, oldest = 0, time.time() - KEPT_SECONDS
    for parent, folders, files in os.walk(folder, topdown=False):
        for path in (Path(parent, name) for name in (*files, *folders)):
            with suppress(OSError):  # removed meanwhile, or not empty
                found = path.lstat()
                if found.st_ctime > oldest:
                    total += max(found.st_size, _LEAST)
                elif path.is_dir():
                    path.rmdir()
                else:
                    path.unlink()
    return total


def _check_origin(request: Request) -> None:
    """A page of another site must not make its visitors' browsers send anything."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise RefusalError(403, "the request comes from a page of another site", "foreign_origin")


def _paths(content: Any) -> Iterator[Any]:
    """What any object within calls its path."""
    waiting = [content]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if "path" in one:
                yield one["path"]
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _again(body: bytes, receive: Receive) -> Receive:
    """A body that was read, and then whatever comes after it."""
    unread = [body]

    async def receive_again() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return receive_again


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(_HEADERS)
        await send(message)

    return send_with_headers
