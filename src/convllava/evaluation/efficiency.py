"""The cost of an answer: visual tokens, seconds to the first token, tokens per second, memory."""

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch

from convllava.errors import InputError
from convllava.evaluation.questions import Question, conversation
from convllava.inference import Assistant
from convllava.inference.sampling import Sampling


class Efficiency(TypedDict):
    """Medians over questions that are asked one at a time; None if a value is not known.

    `seconds_to_first_token` begins with the image in memory and contains preprocessing, tower, projector and prefill.
    `prefill_tokens_per_second` is the language model's part of it; `decode_tokens_per_second` is about all tokens after
    the first. `peak_memory_mb` is the largest resident memory of the process, or on a GPU the most that torch has
    allocated.
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


def measure_efficiency(
    assistant: Assistant, questions: Sequence[Question], templates: Mapping[str, str], max_new_tokens: int
) -> Efficiency:
    """Ask questions one at a time and measure them; the first is asked once before as a warm-up.

    Args:
        questions: Those that cannot be asked are skipped.
        templates: See `questions.prompt`.
        max_new_tokens: Longest answer.
    """
    rows: list[dict[str, float]] = []
    for question in [*questions[:1], *questions]:
        try:
            messages, pictures = conversation(question, templates)
            images = {picture: picture.load() for picture in pictures}
            started = time.perf_counter()
            encoded = {picture: assistant.encode(image) for picture, image in images.items()}
            prompt = assistant.prompt(messages, [encoded[picture] for picture in pictures])
            prefill = time.perf_counter()
            first, *rest = [time.perf_counter() for _ in assistant.write(prompt, Sampling(max_new_tokens))]
        except InputError:
            continue  # the result lists it under `broken`
        row = {
            "visual_tokens": sum(len(image.tokens) for image in encoded.values()),
            "pixels": sum(image.size[0] * image.size[1] for image in encoded.values()),
            "prompt_tokens": len(prompt.keys),
            "seconds_to_first_token": first - started,
            "prefill_tokens_per_second": len(prompt.keys) / (first - prefill),
        }
        rows.append(row | ({"decode_tokens_per_second": len(rest) / (rest[-1] - first)} if rest else {}))

    def median(name: str) -> float | None:
        values = [row[name] for row in rows[1:] if name in row]
        return round(statistics.median(values), 4) if values else None

    device = assistant.model.device
    peak_memory = None
    if device.type == "cuda":
        peak_memory = round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    elif sys.platform != "win32":
        import resource  # not on Windows; psutil reports no peak on Linux

        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux, bytes on macOS
        peak_memory = round(highest / 1e6 if sys.platform == "darwin" else highest * 1024 / 1e6, 1)
    return {
        "questions": len(rows[1:]),
        "pixels": median("pixels"),
        "visual_tokens": median("visual_tokens"),
        "prompt_tokens": median("prompt_tokens"),
        "seconds_to_first_token": median("seconds_to_first_token"),
        "prefill_tokens_per_second": median("prefill_tokens_per_second"),
        "decode_tokens_per_second": median("decode_tokens_per_second"),
        "peak_memory_mb": peak_memory,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
