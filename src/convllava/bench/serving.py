"""What a server does for many clients at once, beside one `generate` after the other and `transformers serve`."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image

from convllava import checkpoints
from convllava.building import build_fresh
from convllava.errors import InputError
from convllava.inference import Assistant
from convllava.inspection import language_models, towers

CLIENTS = (1, 4, 8)
TOKENS = 32
QUESTION = "what does it say"
_STARTING_SECONDS = 300


@dataclass(frozen=True)
class _Taken:
    """What some work took: seconds by the clock, and of processors in the process that did it."""

    wall: float
    cpu: float


def serving(tower: str, language: str, side: int, repeats: int, peers: bool) -> Iterator[dict[str, Any]]:
    """Seconds in which so many clients, who all ask at once about an image of their own, have all been answered.

    Args:
        tower, language: Shapes of a model with random weights, whose answers never end before `TOKENS`.
        side: Of the images.
        repeats: Of each, in turns; the median counts.
        peers: Measure `transformers serve` too.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        assistant = _write(Path(folder) / "model", tower, language, side)
        servers = {"convllava serve": _ours(Path(folder) / "model")}
        if peers:
            servers["transformers serve"] = _stock(Path(folder) / "model")
        running = {name: stack.enter_context(_started(*server)) for name, server in servers.items()}
        works: dict[tuple[str, int], Callable[[], _Taken]] = {("generate", 1): _generating(assistant, side)}
        for name, server in running.items():
            works |= {(name, clients): _asking(server, side, clients) for clients in CLIENTS}
        taken = _in_turns(works, repeats)
    alone = taken["generate", 1]
    for (name, clients), found in taken.items():
        yield {
            "way": name,
            "clients": clients,
            "seconds": round(found.wall, 2),
            "cpu_seconds": round(found.cpu, 2),
            "over_one_client": round(found.wall / taken[name, 1].wall, 2),
            "cpu_over_one_client": round(found.cpu / taken[name, 1].cpu, 2),
            "cpu_per_request_over_generate": round(found.cpu / clients / alone.cpu, 2),
        }


def _in_turns(works: dict[tuple[str, int], Callable[[], _Taken]], repeats: int) -> dict[tuple[str, int], _Taken]:
    """Medians of each, after one client of each way who does not count."""
    for (_, clients), work in works.items():
        if clients == 1:
            work()
    found: dict[tuple[str, int], list[_Taken]] = {key: [] for key in works}
    for _ in range(repeats):
        for key, work in works.items():
            found[key].append(work())
    return {
        key: _Taken(statistics.median(one.wall for one in taken), statistics.median(one.cpu for one in taken))
        for key, taken in found.items()
    }


def _write(folder: Path, tower: str, language: str, side: int) -> Assistant:
    shape = towers()[tower]
    model, processor = build_fresh(
        vision={"depths": shape.depths, "hidden_sizes": shape.hidden_sizes},
        language=language_models()[language],
        pixels={"min_pixels": side * side, "max_pixels": side * side},
        words=QUESTION.split(),
    )
    checkpoints.write(model.eval(), processor, folder)
    return Assistant(model, processor)


_Server = tuple[list[str], int, str]
"""Command, port, and the name of the model there."""


def _ours(folder: Path) -> _Server:
    port = _free_port()
    command = [sys.executable, "-m", "convllava", "serve", "--model", str(folder), "--port", str(port)]
    return command, port, folder.name


def _stock(folder: Path) -> _Server:
    if find_spec("requests") is None or find_spec("openai") is None:
        raise InputError("--peers needs transformers serve; pip install 'transformers[serving]' requests")
    port = _free_port()
    options = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    return [sys.executable, "-m", "convllava.bench.stock_server", *options], port, str(folder)


@dataclass(frozen=True)
class _Running:
    """A server: its address, the name of its model, and its process."""

    url: str
    model: str
    pid: int

    def cpu_seconds(self) -> float:
        """Of the process so far (man 5 proc; counted in hundredths)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _started(command: Sequence[str], port: int, model: str) -> Iterator[_Running]:
    """A server in a process of its own, with as many threads of one operation as here."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment) as process,
    ):
        try:
            _await(process, port, log)
            yield _Running(f"127.0.0.1:{port}", model, process.pid)
        finally:
            process.terminate()


def _await(process: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    deadline = time.monotonic() + _STARTING_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    process.kill()
    log.seek(0)
    raise InputError(f"the server does not start: {log.read()[-300:].decode(errors='replace')}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _generating(assistant: Assistant, side: int) -> Callable[[], _Taken]:
    def work() -> _Taken:
        image = _image(side)
        wall, cpu = time.perf_counter(), time.process_time()
        assistant.ask(image, QUESTION, max_new_tokens=TOKENS)
        return _Taken(time.perf_counter() - wall, time.process_time() - cpu)

    return work


def _asking(server: _Running, side: int, clients: int) -> Callable[[], _Taken]:
    """As many clients as there are, each with an image that the server has not seen."""

    def work() -> _Taken:
        bodies = [_body(server.model, _image(side)) for _ in range(clients)]
        with ThreadPoolExecutor(clients) as pool:
            wall, cpu = time.perf_counter(), server.cpu_seconds()
            list(pool.map(lambda body: _answer(server.url, body), bodies))
            return _Taken(time.perf_counter() - wall, server.cpu_seconds() - cpu)

    return work


def _image(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng().integers(0, 256, (side, side, 3), dtype=np.uint8))


def _body(model: str, image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": QUESTION}]
    request = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS}
    return json.dumps(request | {"temperature": 0}).encode()


def _answer(url: str, body: bytes) -> None:
    connection = http.client.HTTPConnection(url, timeout=600)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    if response.status != http.HTTPStatus.OK:
        raise InputError(f"a server answers {response.status}: {text[:200].decode(errors='replace')}")
