"""Time limits of connections: nobody can hold one without sending a request or reading an answer."""

from __future__ import annotations

import asyncio
import copy
import json
import socket
import time
from contextlib import AsyncExitStack, suppress
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from serving import PATH, request, serving, until

from convllava.inference import Assistant
from convllava.serving import connection
from convllava.serving.app import EventStream
from convllava.serving.limits import Limits

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def server(parts):
    with serving(Assistant(copy.deepcopy(parts[0]), parts[1]), slots=1, api_key="key") as running:
        yield running


@pytest.fixture
def connect(server):
    """Open connections that are closed after the test."""
    opened: list[socket.socket] = []

    def connect(sent: bytes = b"") -> socket.socket:
        parts = urlsplit(server.url)
        opened.append(socket.create_connection((parts.hostname, parts.port), timeout=20))
        opened[-1].sendall(sent)
        return opened[-1]

    yield connect
    for one in opened:
        one.close()
    until(lambda: not held(server))


def held(server):
    return server.server.server_state.connections


def answer(client: socket.socket) -> tuple[bytes, dict]:
    """Return the header and JSON of everything until the connection ends."""
    found = b"".join(iter(lambda: client.recv(10_000), b""))
    header, _, body = found.partition(b"\r\n\r\n")
    return header, json.loads(body)


def trickle(client: socket.socket, seconds: float = 5) -> float:
    """Send single bytes until the server closes the connection; return the seconds it took."""
    started = time.monotonic()
    with suppress(ConnectionError):
        while time.monotonic() - started < seconds:
            client.sendall(b"x")
            time.sleep(0.05)
    return time.monotonic() - started


def post(length: int, key: str = "key") -> bytes:
    lines = (f"POST {PATH} HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join((*lines, f"Authorization: Bearer {key}", f"Content-Length: {length}", "", "")).encode()


@pytest.mark.parametrize("sent", [b"", HEALTH[:20], HEALTH + HEALTH[:20]], ids=["nothing", "half", "after an answer"])
def test_connection_without_a_header_in_time_is_closed(server, connect, monkeypatch, sent):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.4)
    connect(sent)
    until(lambda: held(server), 5)
    until(lambda: not held(server), 4)


def test_slow_bytes_do_not_extend_the_time(connect, monkeypatch):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.4)
    assert trickle(connect(HEALTH[:20])) < 4
    rejected = connect(post(10_000, "another"))
    assert rejected.recv(1000).startswith(b"HTTP/1.1 401")
    assert trickle(rejected) < 4


def test_time_for_the_header_does_not_cut_off_a_slow_body(connect, monkeypatch):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.2)
    body = json.dumps(request()).encode()
    client = connect(post(len(body)))
    time.sleep(0.5)
    client.sendall(body)
    assert client.recv(1000).startswith(b"HTTP/1.1 200")


def test_client_that_does_not_read_is_disconnected(server, connect, monkeypatch):
    monkeypatch.setattr(connection, "UNREAD_SECONDS", 0.4)
    client = connect()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(2)
    with suppress(OSError):
        while True:  # until the buffers are full
            client.sendall(HEALTH.replace(b"health", b"x" * 10_000))  # the error repeats the path
    until(lambda: not held(server), 5)


def test_connections_beyond_the_limit_get_an_api_error(server, connect, monkeypatch):
    monkeypatch.setattr(connection, "CONNECTIONS", 2)
    first = connect(HEALTH[:20])
    connect(HEALTH[:20])
    until(lambda: len(held(server)) == 2)
    header, body = answer(connect(HEALTH))
    assert header.startswith(b"HTTP/1.1 503")
    assert b"retry-after" in header.lower()
    assert (body["error"]["code"], body["error"]["type"]) == ("too_many_connections", "server_error")
    first.sendall(HEALTH[20:])
    assert first.recv(1000).startswith(b"HTTP/1.1 200")


def test_invalid_http_gets_an_api_error(connect):
    for sent in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: " + b"x" * 100_000):
        header, body = answer(connect(sent))
        assert header.startswith(b"HTTP/1.1 400")
        assert body["error"]["code"] == "invalid_http"


def test_unread_stream_ends_soon_after_its_deadline(server):
    async def endless():
        while True:
            yield "data: x\n\n"

    async def forever(*_):
        await asyncio.Event().wait()

    async def run() -> None:
        closed, stack, started = [], AsyncExitStack(), time.monotonic()
        stack.callback(closed.append, True)
        service = SimpleNamespace(limits=Limits(), metrics=server.service.metrics)
        deadline = asyncio.get_running_loop().time() + 0.2
        stream = EventStream(service, SimpleNamespace(stream=endless), deadline, stack)
        await stream({}, forever, lambda message: forever() if message["type"] == "http.response.body" else sent())
        assert closed
        assert 0.2 < time.monotonic() - started < 3

    async def sent() -> None:
        pass

    asyncio.run(run())
