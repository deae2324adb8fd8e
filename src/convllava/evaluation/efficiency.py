"""What answering costs: visual tokens, seconds to the first token, tokens a second, memory."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from typing import TypedDict

import torch

from convllava.errors import InputError
from convllava.evaluation.answering import Asking, ask
from convllava.evaluation.questions import Question
from convllava.inference.assistant import Assistant
from convllava.inference.sampling import Sampling


class Efficiency(TypedDict):
    """Medians over some questions, asked one at a time; None where it cannot be told.

    `seconds_to_first_token` counts from the image in memory: pixels, tower, projector, prefill. `prefill_tokens_per_
    second` is the language model's part of it, and `decode_tokens_per_second` all tokens after the first.
    `peak_memory_mb` is the largest that the process has been, or on a GPU what torch has held there.
    """

    questions: int
    pixels: float | None
    visual_tokens: float | None
    prompt_tokens: float | None
    seconds_to_first_token: float | None
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    peak_memory_mb: float | None
    device: str
    threads: int


_MEASURED = (
    "pixels",
    "visual_tokens",
    "prompt_tokens",
    "seconds_to_first_token",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
)


def measure(assistant: Assistant, questions: Sequence[Question], asking: Asking) -> Efficiency:
    """Ask some questions one by one with a watch in hand, after one that does not count."""
    rows = []
    for question in [*questions[:1], *questions]:
        try:
            rows.append(_row(assistant, question, asking))
        except InputError:
            continue  # it is among the broken ones of the result
    medians = {name: _median([row[name] for row in rows[1:] if name in row]) for name in _MEASURED}
    return {
        "questions": len(rows[1:]),
        **medians,  # type: ignore[typeddict-item]  # the rest of the keys
        "peak_memory_mb": _peak_memory(assistant.model.device),
        "device": str(assistant.model.device),
        "threads": torch.get_num_threads(),
    }


def _median(found: Sequence[float]) -> float | None:
    return round(statistics.median(found), 4) if found else None


def _row(assistant: Assistant, question: Question, asking: Asking) -> dict[str, float]:
    images = {picture: picture.load() for picture in question.pictures}
    started = time.perf_counter()
    encoded = {picture: assistant.encode(image) for picture, image in images.items()}
    prompt = assistant.prompt(*ask(question, asking.templates, encoded.__getitem__))
    prefill = time.perf_counter()
    events = assistant.write(prompt, Sampling(asking.max_new_tokens))
    first, *rest = [time.perf_counter() for _ in events]
    row = {
        "visual_tokens": sum(len(image.tokens) for image in encoded.values()),
        "pixels": sum(image.size[0] * image.size[1] for image in encoded.values()),
        "prompt_tokens": len(prompt.keys),
        "seconds_to_first_token": first - started,
        "prefill_tokens_per_second": len(prompt.keys) / (first - prefill),
    }
    if rest:
        row["decode_tokens_per_second"] = len(rest) / (rest[-1] - first)
    return row


def _peak_memory(device: torch.device) -> float | None:
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux, bytes on a Mac
    return round(highest / 1e6 if sys.platform == "darwin" else highest * 1024 / 1e6, 1)
