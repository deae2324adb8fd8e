"""Time in which a server answers many clients at once, compared with `generate` and with other servers."""

from __future__ import annotations

import base64
import http.client
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import Row, Settings
from benchmarks.servers import RunningServer, Server, convllava_serve, started, transformers_serve, vllm_serve
from convllava import checkpoints
from convllava.errors import InputError
from convllava.inference import load
from convllava.inference.prompts import padded_inputs
from convllava.inference.types import Message
from convllava.io import ResumableJsonl
from convllava.model.builder import build_fresh
from convllava.model.presets import language_models, towers

CLIENTS = (1, 4, 8)
QUESTION = "what does it say"
CLOCK_TICK = 0.01
"""Resolution in seconds of the CPU time of other processes."""


class Seconds(NamedTuple):
    """Wall time, and CPU time in the processes that did the work."""

    wall: float
    cpu: float


Case = tuple[int, int]
"""Clients, and tokens of an answer."""
Times = dict[Case, Seconds]


def serving(settings: Settings, journal: ResumableJsonl) -> list[Row]:
    """Measure the time until all clients, who ask at the same time about different images, have their answers.

    The model has random weights and never ends an answer early. One server runs at a time. The baseline `generate`
    answers one request in this process.

    Args:
        settings: The first tower and the first side count.
        journal: Stores the times of each way; a run that was killed continues after the last one.

    Raises:
        InputError: if a server cannot be started, or does not answer as expected.
    """
    if find_spec("fastapi") is None:
        raise InputError("serving starts our server; pip install 'convllava[serve]'")
    side = settings.sides[0]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        servers = {"convllava serve": convllava_serve(model)}
        if settings.peers:
            servers["transformers serve"] = transformers_serve(model)
        if settings.vllm:
            servers["vLLM"] = vllm_serve(model, settings.vllm)
        _write_model(model, settings.towers[0], settings.language, side)
        times = {"generate": times_of(journal, "generate", partial(_generate_here, model, side, settings))}
        for way, server in servers.items():
            times[way] = times_of(journal, way, partial(_ask_server, server, side, settings))
    return [
        {
            "way": way,
            "tokens": tokens,
            "clients": clients,
            "seconds": round(found.wall, 2),
            "cpu_seconds": round(found.cpu, 2),
            "over_one_client": round(found.wall / cases[1, tokens].wall, 2),
            "cpu_over_one_client": round(found.cpu / max(cases[1, tokens].cpu, CLOCK_TICK), 2),
            "cpu_per_request_over_generate": round(
                found.cpu / clients / max(times["generate"][1, tokens].cpu, CLOCK_TICK), 2
            ),
            "tokens_per_cpu_second": round(clients * tokens / max(found.cpu, CLOCK_TICK), 1),
        }
        for way, cases in times.items()
        for (clients, tokens), found in cases.items()
    ]


def times_of(journal: ResumableJsonl, way: str, measure: Callable[[], Times]) -> Times:
    """Return the times that the journal stores for this way; measure and store them if there are none."""
    name = f"taken by {way}"
    if name not in journal.entries:
        journal.add([{"id": name, "taken": [[*case, *seconds] for case, seconds in measure().items()]}])
    return {(clients, tokens): Seconds(wall, cpu) for clients, tokens, wall, cpu in journal.entries[name]["taken"]}


def _generate_here(folder: Path, side: int, settings: Settings) -> Times:
    """Measure `generate` with single requests in this process, one after another."""
    assistant = load(str(folder))
    model: Any = assistant.model

    @torch.inference_mode()
    def work(tokens: int) -> Seconds:
        image = _random_image(side)
        wall, cpu = time.perf_counter(), time.process_time()
        conversation = ([Message(role="user", content=QUESTION)], [assistant.encode(image)])
        inputs: Any = padded_inputs(model, assistant.processor, [conversation], [tokens])
        model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return Seconds(time.perf_counter() - wall, time.process_time() - cpu)

    return _medians({(1, tokens): partial(work, tokens) for tokens in settings.tokens}, settings.repeats)


def _ask_server(server: Server, side: int, settings: Settings) -> Times:
    cases = [(clients, tokens) for tokens in settings.tokens for clients in CLIENTS]
    with started(server) as running:
        return _medians({case: partial(_ask_all, running, side, *case) for case in cases}, settings.repeats)


def _medians(works: Mapping[Case, Callable[[], Seconds]], repeats: int) -> Times:
    """Return the medians of functions that take turns, after one warm-up call of each."""
    for work in works.values():
        work()
    found: dict[Case, list[Seconds]] = {case: [] for case in works}
    for _ in range(repeats):
        for case, work in works.items():
            found[case].append(work())
    return {case: Seconds(*map(statistics.median, zip(*taken, strict=True))) for case, taken in found.items()}


def _write_model(folder: Path, tower: str, language: str, side: int) -> None:
    shape = towers()[tower]
    model, processor = build_fresh(
        vision={"depths": shape.depths, "hidden_sizes": shape.hidden_sizes},
        language=language_models()[language],
        pixels={"min_pixels": side * side, "max_pixels": side * side},
        words=QUESTION.split(),
    )
    assert model.generation_config is not None
    model.generation_config.eos_token_id = model.config.text_config.vocab_size  # a token that is never written
    checkpoints.write(model.eval(), processor, folder)


def _ask_all(server: RunningServer, side: int, clients: int, tokens: int) -> Seconds:
    """Let many clients ask at the same time, each about a new image."""
    requests = []
    for _ in range(clients):
        buffer = io.BytesIO()
        _random_image(side).save(buffer, "PNG")
        uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": QUESTION}]
        request = {"model": server.model, "messages": [{"role": "user", "content": content}]}
        requests.append(json.dumps({**request, "max_tokens": tokens, "temperature": 0, **server.request}).encode())
    with ThreadPoolExecutor(clients) as pool:
        wall, cpu = time.perf_counter(), server.cpu_seconds()
        written = list(pool.map(lambda request: _tokens_written(server.url, request), requests))
        taken = Seconds(time.perf_counter() - wall, server.cpu_seconds() - cpu)
    if set(written) != {tokens}:
        raise InputError(f"{server.model} at {server.url} wrote {written} tokens instead of {tokens}")
    return taken


def _random_image(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng().integers(0, 256, (side, side, 3), dtype=np.uint8))


def _tokens_written(url: str, request: bytes) -> int:
    """Send a chat request and return the number of tokens of the answer."""
    connection = http.client.HTTPConnection(url, timeout=600)
    connection.request("POST", "/v1/chat/completions", request, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    if response.status != http.HTTPStatus.OK:
        raise InputError(f"a server answers {response.status}: {text[:200].decode(errors='replace')}")
    return int(json.loads(text)["usage"]["completion_tokens"])
