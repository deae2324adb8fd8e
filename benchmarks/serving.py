"""What a server does for many clients at once, beside one `generate` after the other and other servers."""

from __future__ import annotations

import base64
import http.client
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.servers import Running, Server, ours, started, stock, vllm
from benchmarks.settings import Settings
from convllava import checkpoints
from convllava.checkpoints.inspection import language_models, towers
from convllava.errors import InputError
from convllava.inference import Assistant, load
from convllava.io import ResumableJsonl
from convllava.model.builder import build_fresh

CLIENTS = (1, 4, 8)
QUESTION = "what does it say"

_TICK = 0.01
"""Seconds in which the system counts the time of other processes: what is shorter counts as nothing."""


@dataclass(frozen=True)
class _Taken:
    """What some work took: seconds by the clock, and of processors in the processes that did it."""

    wall: float
    cpu: float


_Work = Callable[[], _Taken]
_Key = tuple[int, int]
"""Clients, and tokens of an answer."""


def serving(settings: Settings, journal: ResumableJsonl) -> Iterator[dict[str, Any]]:
    """Seconds in which so many clients, who all ask at once about an image of their own, have all been answered.

    The model has random weights, and its answers do not end before they are as long as they may be. One server runs at
    a time; `generate` answers one request.

    Args:
        settings: Its first tower and side count; the median of `repeats`.
        journal: Keeps what each way took, for a run that is killed.

    Raises:
        InputError: a server cannot be started, or does not answer as it should; or the system does not tell what
            other processes take.
    """
    _check_machine()
    tower, side = settings.towers[0], settings.sides[0]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        servers = _servers(model, settings)
        _write(model, tower, settings.language, side)
        alone = _kept(journal, "generate", partial(_generated, model, side, settings))
        yield from _rows("generate", alone, alone)
        for name, server in servers.items():
            yield from _rows(name, _kept(journal, name, partial(_asked, server, side, settings)), alone)


def _check_machine() -> None:
    """Refuse before anything is measured."""
    if not Path("/proc/self/task").is_dir():
        raise InputError("bench serving counts the processor time of servers by /proc, which this system has not")
    if find_spec("fastapi") is None:
        raise InputError("bench serving starts our server; pip install 'convllava[serve]'")


def _kept(journal: ResumableJsonl, way: str, measure: Callable[[], dict[_Key, _Taken]]) -> dict[_Key, _Taken]:
    """What a way took, measured where the journal does not have it."""
    name = f"taken by {way}"
    if name not in journal.entries:
        journal.add([{"id": name, "taken": [[*key, one.wall, one.cpu] for key, one in measure().items()]}])
    return {(clients, tokens): _Taken(wall, cpu) for clients, tokens, wall, cpu in journal.entries[name]["taken"]}


def _servers(model: Path, settings: Settings) -> dict[str, Server]:
    servers = {"convllava serve": ours(model)}
    if settings.peers:
        servers["transformers serve"] = stock(model)
    if settings.vllm:
        servers["vLLM"] = vllm(model, settings.vllm)
    return servers


def _generated(model: Path, side: int, settings: Settings) -> dict[_Key, _Taken]:
    assistant = load(str(model))
    return _measured({(1, tokens): _generating(assistant, side, tokens) for tokens in settings.tokens}, settings)


def _asked(server: Server, side: int, settings: Settings) -> dict[_Key, _Taken]:
    keys = [(clients, tokens) for tokens in settings.tokens for clients in CLIENTS]
    with started(server) as running:
        return _measured({key: _asking(running, side, *key) for key in keys}, settings)


def _measured(works: Mapping[_Key, _Work], settings: Settings) -> dict[_Key, _Taken]:
    """Medians of works that take turns, after a call of each that does not count."""
    for work in works.values():
        work()
    found: dict[_Key, list[_Taken]] = {key: [] for key in works}
    for _ in range(settings.repeats):
        for key, work in works.items():
            found[key].append(work())
    return {
        key: _Taken(statistics.median(one.wall for one in taken), statistics.median(one.cpu for one in taken))
        for key, taken in found.items()
    }


def _rows(way: str, taken: Mapping[_Key, _Taken], alone: Mapping[_Key, _Taken]) -> Iterator[dict[str, Any]]:
    for (clients, tokens), found in taken.items():
        one = taken[1, tokens]
        yield {
            "way": way,
            "tokens": tokens,
            "clients": clients,
            "seconds": round(found.wall, 2),
            "cpu_seconds": round(found.cpu, 2),
            "over_one_client": round(found.wall / one.wall, 2),
            "cpu_over_one_client": round(found.cpu / max(one.cpu, _TICK), 2),
            "cpu_per_request_over_generate": round(found.cpu / clients / max(alone[1, tokens].cpu, _TICK), 2),
            "tokens_per_cpu_second": round(clients * tokens / max(found.cpu, _TICK), 1),
        }


def _write(folder: Path, tower: str, language: str, side: int) -> None:
    shape = towers()[tower]
    model, processor = build_fresh(
        vision={"depths": shape.depths, "hidden_sizes": shape.hidden_sizes},
        language=language_models()[language],
        pixels={"min_pixels": side * side, "max_pixels": side * side},
        words=QUESTION.split(),
    )
    assert model.generation_config is not None
    model.generation_config.eos_token_id = model.config.text_config.vocab_size  # none that could be written
    checkpoints.write(model.eval(), processor, folder)


def _generating(assistant: Assistant, side: int, tokens: int) -> _Work:
    def work() -> _Taken:
        image = _image(side)
        wall, cpu = time.perf_counter(), time.process_time()
        assistant.ask(image, QUESTION, max_new_tokens=tokens)
        return _Taken(time.perf_counter() - wall, time.process_time() - cpu)

    return work


def _asking(server: Running, side: int, clients: int, tokens: int) -> _Work:
    """As many clients as there are, each with an image that the server has not seen."""

    def work() -> _Taken:
        bodies = [_body(server, _image(side), tokens) for _ in range(clients)]
        with ThreadPoolExecutor(clients) as pool:
            wall, cpu = time.perf_counter(), server.cpu_seconds()
            written = list(pool.map(lambda body: _answer(server.url, body), bodies))
            taken = _Taken(time.perf_counter() - wall, server.cpu_seconds() - cpu)
        if set(written) != {tokens}:
            raise InputError(f"{server.model} at {server.url} wrote {written} tokens in place of {tokens}")
        return taken

    return work


def _image(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng().integers(0, 256, (side, side, 3), dtype=np.uint8))


def _body(server: Running, image: Image.Image, tokens: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": QUESTION}]
    request = {"model": server.model, "messages": [{"role": "user", "content": content}]}
    return json.dumps({**request, "max_tokens": tokens, "temperature": 0, **server.asked}).encode()


def _answer(url: str, body: bytes) -> int:
    """The number of tokens that were written."""
    connection = http.client.HTTPConnection(url, timeout=600)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    if response.status != http.HTTPStatus.OK:
        raise InputError(f"a server answers {response.status}: {text[:200].decode(errors='replace')}")
    return int(json.loads(text)["usage"]["completion_tokens"])
