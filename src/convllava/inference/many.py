"""Many questions about few images: what their prompts have in common is read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from convllava.errors import InputError
from convllava.inference.answer import Event
from convllava.inference.assistant import Assistant, EncodedImage, Message
from convllava.inference.engine import Engine
from convllava.inference.prompt import build_prompt
from convllava.inference.sampling import Sampling

SLOTS, STEP_TOKENS = 16, 512
"""More slots find fewer beginnings that have been read; fewer, or shorter steps, leave the processor idle."""


def answer_all(
    assistant: Assistant,
    questions: Sequence[tuple[EncodedImage, str]],
    *,
    max_new_tokens: int = 64,
    progress: Callable[[float], None] = lambda share: None,
) -> list[str]:
    """Greedy answers to (image, question) pairs. What questions in a row about one image have in common, the image and
    all before it, is read once; a language model that the engine cannot run reads it for each (`answer_many`).

    Args:
        progress: Called with the share of answers done, 0 to 1.

    Raises:
        InputError: as `Assistant.ask`.
    """
    try:
        engine = Engine(assistant, SLOTS, step_tokens=STEP_TOKENS, by_columns=False)
    except InputError:
        return _answer_in_batches(assistant, questions, max_new_tokens, progress)

    answers = [""] * len(questions)

    def collect(number: int, event: Event) -> None:
        answers[number] += event.text

    for number, (image, question) in enumerate(questions):
        prompt = build_prompt(assistant, [Message(role="user", content=question)], [image], [str(id(image))])
        engine.submit(prompt, Sampling(max_new_tokens), partial(collect, number))
        while engine.scheduler.waiting >= SLOTS:
            engine.step()
        progress(number / len(questions))
    while engine.step():
        pass
    progress(1.0)
    return answers


def _answer_in_batches(
    assistant: Assistant,
    questions: Sequence[tuple[EncodedImage, str]],
    max_new_tokens: int,
    progress: Callable[[float], None],
) -> list[str]:
    answers: list[str] = []
    for batch in assistant.answer_many(questions, max_new_tokens=max_new_tokens):
        answers += batch
        progress(len(answers) / len(questions))
    return answers
