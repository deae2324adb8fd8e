"""Starting, and ending without cutting anybody off.

convllava serve --model tiny
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn

from convllava.errors import InputError
from convllava.inference import Assistant, load
from convllava.inference.engine import Engine
from convllava.inference.image_queue import ON_CPU, ImageEncoder
from convllava.serving.app import create_app
from convllava.serving.connection import PunctualProtocol
from convllava.serving.gate import Gate
from convllava.serving.hosts import HostGuard, is_loopback
from convllava.serving.limits import Limits
from convllava.serving.service import Service


class DrainingServer(uvicorn.Server):
    """On the first SIGTERM or SIGINT it finishes what runs and refuses what comes; on the second it ends at once.

    Args:
        config: Of uvicorn.
        gate: That says whether anything runs.
        seconds: It waits at most so long.
        announce: Called with the address, once there is one.
    """

    def __init__(
        self, config: uvicorn.Config, gate: Gate, seconds: float, announce: Callable[[str], None] = lambda _: None
    ) -> None:
        super().__init__(config)
        self._gate, self._seconds, self._announce = gate, seconds, announce
        self._deadline: float | None = None

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce(self.address)

    @property
    def address(self) -> str:
        """Where it listens, as the beginning of a URL."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._gate.is_draining:
            super().handle_exit(sig, frame)
        else:
            self.drain()

    def drain(self) -> None:
        """End when nothing runs any more."""
        self._gate.drain()

    async def on_tick(self, counter: int) -> bool:
        if await super().on_tick(counter):
            return True
        if not self._gate.is_draining:
            return False
        now = asyncio.get_running_loop().time()
        self._deadline = self._deadline or now + self._seconds
        return self._gate.inside == 0 or now > self._deadline


def make_server(
    assistant: Assistant,
    name: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    names: Collection[str] = (),
    hosts: Collection[str] = (),
    limits: Limits | None = None,
    slots: int = 8,
    context: int | None = None,
    step_tokens: int = 128,
    cache_bytes: int = 256 * 2**20,
    ui: bool = False,
    announce: Callable[[str], None] = lambda _: None,
) -> DrainingServer:
    """A server of one model, not yet running.

    Args:
        assistant: The model; it answers nobody else from now on.
        name: By which clients ask for it.
        host, port: Where to listen; port 0 takes a free one.
        api_key: That clients must bring.
        names: That requests may ask for beside localhost; where there are none and others reach the server, any.
        hosts: From which images behind URLs may be fetched.
        limits: Of a request; None takes the defaults.
        slots, context, step_tokens: Of `Engine`.
        cache_bytes: Of encoded images that are remembered.
        ui: Serve the web page too.
        announce: Called with the address, once there is one.

    Raises:
        InputError: as `Engine`, the key is empty, or what the page needs is not installed.
    """
    if api_key is not None and not api_key.strip():
        raise InputError("the API key is empty; give one or leave the option out")
    limits = limits or Limits()
    engine = Engine(assistant, slots, context, step_tokens)
    encoder = ImageEncoder(assistant, cache_bytes, **(ON_CPU if assistant.model.device.type == "cpu" else {}))
    service = Service(assistant, name, engine, encoder, limits, hosts)
    app = create_app(service, api_key)
    if ui:
        _page().mount_page(app, service, api_key)
    own = [host] if is_loopback(host) else []
    if names or own:
        app.add_middleware(HostGuard, names=[*names, *own])
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        http=PunctualProtocol,
        ws="none",
        timeout_graceful_shutdown=1,
    )
    return DrainingServer(config, service.gate, limits.seconds, announce)


def serve(
    model: str = "tiny",
    pixels: Mapping[str, Any] | None = None,
    threads: int | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    ui: bool = False,
    **options: Any,
) -> None:
    """Serve a model until a signal ends it.

    Args:
        model, pixels: As of `convllava.load`.
        threads: Of one operation; None takes half of torch's, since images are encoded while answers are written.
        host, port, api_key, ui, options: As of `make_server`.

    Raises:
        InputError: the place is taken, the model does not load or cannot be served this way, or a setting is bad.
    """
    # Both before the model is loaded, which takes longer than to find out that it is in vain.
    place = _bind(host, port)
    if ui:
        _page()
    torch.set_num_threads(threads or max(1, torch.get_num_threads() // 2))
    assistant = load(model, pixels=pixels)
    if api_key is None and not is_loopback(host):
        print(f"convllava: {host} can be reached from elsewhere, and there is no --api-key", file=sys.stderr)
    name = Path(model).name if Path(model).is_dir() else model  # a client has no business with our folders
    server = make_server(
        assistant, name, host=host, port=port, api_key=api_key, ui=ui, announce=_announce(name, ui), **options
    )
    server.run(sockets=[place])


def _bind(host: str, port: int) -> socket.socket:
    place = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
    except OSError as error:
        place.close()
        raise InputError(f"nothing can listen at {host}, port {port}: {error.strerror}; choose another") from None
    return place


def _page() -> Any:
    try:
        from convllava.serving import page
    except ImportError as error:
        raise InputError(f"the page needs {error.name}; pip install 'convllava[ui]'") from None
    return page


def _announce(name: str, ui: bool) -> Callable[[str], None]:
    def announce(address: str) -> None:
        page = f"; the page is {address}/ui/" if ui else ""
        print(f"serving {name} at {address}/v1{page}", file=sys.stderr, flush=True)

    return announce
