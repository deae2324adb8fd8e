"""A server in this process, and helpers to send it requests."""

from __future__ import annotations

import base64
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from convllava.inference import Assistant
from convllava.serving.server import DrainingServer, make_server

PATH = "/v1/chat/completions"


class Running:
    """A running server on a free port."""

    def __init__(self, server: DrainingServer) -> None:
        self.server, self.url = server, server.address
        self.service = server.config.app.state.service  # type: ignore[union-attr]

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Return status, JSON and headers of a raw request."""
        connection = self.connect()
        connection.request(method, path, body, {"Content-Type": "application/json"} | headers)
        response = connection.getresponse()
        text = response.read()
        connection.close()
        return response.status, json.loads(text), dict(response.headers)

    def post(self, content: Any, **headers: str) -> tuple[int, Any, dict[str, str]]:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.send("POST", PATH, body, **headers)


@contextmanager
def serving(assistant: Assistant, name: str = "test", **options: Any) -> Iterator[Running]:
    """Run a server and drain it at the end."""
    server = make_server(assistant, name, port=0, **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started or not thread.is_alive())
    try:
        yield Running(server)
    finally:  # also if a test fails, which would otherwise wait for the thread forever
        server.drain()
        thread.join(30)
    assert not thread.is_alive()


def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.005)


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(data)}}


def question(text: str, *images: bytes) -> list[dict[str, Any]]:
    """Return one user message with its images first."""
    return [{"role": "user", "content": [*map(part, images), {"type": "text", "text": text}]}]


def request(text: str = "what?", *images: bytes, **settings: Any) -> dict[str, Any]:
    return {"model": "test", "messages": question(text, *images), "max_tokens": 4} | settings
