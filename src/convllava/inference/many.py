"""Many questions about few images: what their prompts have in common is read once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import torch

from convllava.errors import InputError
from convllava.inference.answer import Event
from convllava.inference.assistant import Assistant, EncodedImage, Message
from convllava.inference.engine import Engine
from convllava.inference.prompts import build_prompt
from convllava.inference.sampling import Sampling

SLOTS, STEP_TOKENS = 16, 512
"""More slots find fewer beginnings that have been read; fewer, or shorter steps, leave the processor idle."""

Questions = Sequence[tuple[EncodedImage, str]]


def answerer(assistant: Assistant, max_new_tokens: int) -> Callable[[Questions], list[str]]:
    """What answers batch after batch, greedily: by an engine, or each prompt read whole where that cannot be."""
    engine = _engine(assistant)
    if engine is None:
        return lambda questions: assistant.chat_many(
            [([Message(role="user", content=question)], [image]) for image, question in questions],
            max_new_tokens=max_new_tokens,
        )
    return partial(_answer, assistant, engine, Sampling(max_new_tokens))


def _engine(assistant: Assistant) -> Engine | None:
    """None on a device, where slots as long as the context take memory that a CPU gives when it is written, and for a
    language model that cannot be run this way."""
    if assistant.model.device.type != "cpu":
        return None
    try:
        return Engine(assistant, SLOTS, step_tokens=STEP_TOKENS, by_columns=False)
    except InputError:
        return None


def _answer(assistant: Assistant, engine: Engine, sampling: Sampling, questions: Questions) -> list[str]:
    answers = [""] * len(questions)

    def collect(number: int, event: Event) -> None:
        answers[number] += event.text

    digests = {id(image): _digest(image) for image, _ in questions}
    for number, (image, question) in enumerate(questions):
        messages = [Message(role="user", content=question)]
        prompt = build_prompt(assistant, messages, [image], [digests[id(image)]])
        engine.submit(prompt, sampling, partial(collect, number))
    while engine.step():
        pass
    return answers


def _digest(image: EncodedImage) -> str:
    content = image.tokens.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(content.data, digest_size=20).hexdigest()
