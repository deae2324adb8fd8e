"""Start a server for a model, and shut it down without cutting off running requests.

convllava serve --model tiny
"""

import asyncio
import socket
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn

from convllava.errors import ConfigError
from convllava.inference import Assistant, load
from convllava.inference.engine import Engine
from convllava.inference.image_queue import ON_CPU, ImageEncoder
from convllava.serving.app import create_app
from convllava.serving.connection import TimeLimitedProtocol
from convllava.serving.hosts import HostCheck, is_loopback
from convllava.serving.limits import Admission, Limits
from convllava.serving.service import Service


class DrainingServer(uvicorn.Server):
    """A uvicorn server that finishes running requests after the first SIGTERM or SIGINT and rejects new ones; the
    second signal ends it at once.

    Args:
        config: Settings of uvicorn.
        admission: Counts the running requests.
        seconds: Longest wait for running requests.
        announce: Called with the address once the server listens.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        admission: Admission,
        seconds: float,
        announce: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(config)
        self._admission, self._seconds, self._announce = admission, seconds, announce
        self._deadline: float | None = None

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce(self.address)

    @property
    def address(self) -> str:
        """Return the address of the server, as the beginning of a URL."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._admission.is_draining:
            super().handle_exit(sig, frame)
        else:
            self.drain()

    def drain(self) -> None:
        """Reject new requests, and end the server once no request runs."""
        self._admission.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        if await super().on_tick(counter):
            return True
        if not self._admission.is_draining:
            return False
        now = asyncio.get_running_loop().time()
        self._deadline = self._deadline or now + self._seconds
        return self._admission.active == 0 or now > self._deadline


def make_server(
    assistant: Assistant,
    name: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allow_hosts: Collection[str] = (),
    allow_urls: Collection[str] = (),
    limits: Limits | None = None,
    slots: int = 8,
    context: int | None = None,
    step_tokens: int = 128,
    cache_bytes: int = 256 * 2**20,
    ui: bool = False,
    announce: Callable[[str], None] = lambda _: None,
) -> DrainingServer:
    """Return a server of one model; call its `run`.

    Args:
        assistant: The model. Nothing else may use it while the server runs.
        name: Name of the model in the API.
        host, port: Address to listen at; port 0 takes a free one.
        api_key: Key that clients must send.
        allow_hosts: Names that the Host header may have, in addition to localhost. If empty and other machines can
            reach the server, any name is accepted.
        allow_urls: Hosts from which images behind URLs may be fetched.
        limits: Limits of a request; None takes the defaults.
        slots, context, step_tokens: Settings of `Engine`.
        cache_bytes: Most bytes of cached image features.
        ui: Serve the web page too.
        announce: Called with the address once the server listens.

    Raises:
        InputError: if the key is empty or `Engine` cannot run the model this way.
    """
    if api_key is not None and not api_key.strip():
        raise ConfigError("`api_key` is empty; give a key or leave it out")
    limits = limits or Limits()
    engine = Engine(assistant.model, assistant.processor, slots, context, step_tokens)
    on_cpu = ON_CPU if assistant.model.device.type == "cpu" else {}
    encoder = ImageEncoder(assistant.encode_pixels, cache_bytes, **on_cpu)
    service = Service(assistant, name, engine, encoder, limits, allow_urls)
    app = create_app(service, api_key, ui)
    if names := [*allow_hosts, *([host] if is_loopback(host) else [])]:
        app.add_middleware(HostCheck, names=names)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        http=TimeLimitedProtocol,
        ws="none",
        timeout_graceful_shutdown=1,
    )
    return DrainingServer(config, service.admission, limits.seconds, announce)


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
    """Load a model and serve it until a signal ends the server.

    Args:
        model, pixels: See `convllava.load`.
        threads: torch's threads per operation; None takes half of torch's default, because image encoding and
            decoding run at the same time.
        host, port, api_key, ui, options: See `make_server`.

    Raises:
        InputError: if the address is taken, the model does not load or cannot be served this way, or a setting is bad.
    """
    # Listen before loading the model, which takes longer.
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen at `host` {host}, `port` {port}: {error.strerror}; choose another") from None
    torch.set_num_threads(threads or max(1, torch.get_num_threads() // 2))
    assistant = load(model, pixels=pixels)
    if api_key is None and not is_loopback(host):
        print(f"convllava: other machines can reach {host}, and there is no API key", file=sys.stderr)
    name = Path(model).name if Path(model).is_dir() else model  # clients must not see paths of this machine

    def announce(address: str) -> None:
        page = f"; the web page is at {address}/ui/" if ui else ""
        print(f"serving {name} at {address}/v1{page}", file=sys.stderr, flush=True)

    server = make_server(assistant, name, host=host, port=port, api_key=api_key, ui=ui, announce=announce, **options)
    server.run(sockets=[listener])
