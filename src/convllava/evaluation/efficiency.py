"""What answering costs: visual tokens, seconds to the first token, tokens a second, memory."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from transformers.generation.streamers import BaseStreamer

from convllava.errors import InputError
from convllava.evaluation.generation import Asking, ask
from convllava.evaluation.questions import Question
from convllava.inference.assistant import Assistant


class Efficiency(TypedDict):
    """Medians over some questions, asked one at a time; None where none of them could be.

    `seconds_to_first_token` counts from the image in memory: pixels, tower, projector, prefill. `prefill_tokens_per_
    second` is the language model's part of it, and `decode_tokens_per_second` all tokens after the first.
    `peak_memory_mb` is the largest that the process has been, or on a GPU what torch has held there.
    """

    questions: int
    visual_tokens: float | None
    prompt_tokens: float | None
    seconds_to_first_token: float | None
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    peak_memory_mb: float
    device: str
    threads: int
    pixels: float | None


class _Clock(BaseStreamer):
    """Notes when each token comes; the first call is of the prompt."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: Any) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        pass


def measure(assistant: Assistant, questions: Sequence[Question], asking: Asking) -> Efficiency:
    """Ask some questions one by one with a watch in hand, after one that does not count."""
    rows = []
    for question in [*questions[:1], *questions]:
        try:
            rows.append(_row(assistant, question, asking))
        except InputError:
            continue  # it is among the broken ones of the result
    rows = rows[1:]

    def median(name: str) -> float | None:
        found = [row[name] for row in rows if name in row]
        return round(statistics.median(found), 4) if found else None

    return {
        "questions": len(rows),
        "visual_tokens": median("visual_tokens"),
        "prompt_tokens": median("prompt_tokens"),
        "seconds_to_first_token": median("seconds_to_first_token"),
        "prefill_tokens_per_second": median("prefill_tokens_per_second"),
        "decode_tokens_per_second": median("decode_tokens_per_second"),
        "peak_memory_mb": round(_peak_memory(assistant.model.device), 1),
        "device": str(assistant.model.device),
        "threads": torch.get_num_threads(),
        "pixels": median("pixels"),
    }


def _row(assistant: Assistant, question: Question, asking: Asking) -> dict[str, float]:
    images = {picture: picture.load() for picture in question.pictures}
    started = time.perf_counter()
    encoded = {picture: assistant.encode(image) for picture, image in images.items()}
    asked = ask(question, asking.templates, encoded.__getitem__)
    inputs = assistant.prompts([asked], asking.max_new_tokens)
    clock, prefill = _Clock(), time.perf_counter()
    with torch.inference_mode():
        assistant.model.generate(  # type: ignore[misc]  # its self is a protocol
            **inputs, do_sample=False, max_new_tokens=asking.max_new_tokens, streamer=clock
        )
    _, first, *rest = clock.moments
    row = {
        "visual_tokens": sum(len(image.tokens) for image in encoded.values()),
        "pixels": sum(image.size[0] * image.size[1] for image in encoded.values()),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "seconds_to_first_token": first - started,
        "prefill_tokens_per_second": inputs["input_ids"].shape[1] / (first - prefill),
    }
    if rest:
        row["decode_tokens_per_second"] = len(rest) / (rest[-1] - first)
    return row


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux, bytes on a Mac
    return highest / 1e6 if sys.platform == "darwin" else highest * 1024 / 1e6
