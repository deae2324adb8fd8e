"""A model's answers to questions, in batches that are the same whether a run was interrupted or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from convllava.errors import InputError
from convllava.evaluation.prompts import conversation
from convllava.evaluation.questions import Picture, Question
from convllava.evaluation.results import Answer
from convllava.inference.assistant import Assistant
from convllava.inference.likelihood import log_likelihoods
from convllava.inference.types import EncodedImage, Message
from convllava.io import ResumableJsonl

Asked = tuple[Sequence[Message], Sequence[EncodedImage]]
CHOICES = ("generate", "likelihood")


@dataclass(frozen=True)
class Asking:
    """How questions are asked.

    Attributes:
        templates: See `prompts.templates_of`.
        max_new_tokens: Longest answer.
        choices: One of `CHOICES`: read the letter in a written answer, or take the letter with the highest likelihood.
        batch_size: Questions that are answered together.
    """

    templates: dict[str, str]
    max_new_tokens: int
    choices: str = "generate"
    batch_size: int = 16


class Encoder:
    """Images through the tower, each once while questions about it follow each other."""

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant
        self.kept: dict[Picture, EncodedImage] = {}
        self.recent: dict[Picture, EncodedImage] = {}

    def __call__(self, picture: Picture) -> EncodedImage:
        found = self.recent.get(picture) or self.kept.get(picture)
        found = found or self.assistant.encode(picture.load())
        self.recent[picture] = found
        return found

    def turn(self) -> None:
        """Forget the images of all batches but the last."""
        self.kept, self.recent = self.recent, {}


def answer_all(
    assistant: Assistant,
    questions: Sequence[Question],
    asking: Asking,
    journal: ResumableJsonl,
    progress: Callable[[float], None] = lambda share: None,
) -> None:
    """Answer what the journal has no answer to. A question that cannot be asked gets the reason in place of an answer.

    A batch with any question left is done again as a whole: which questions share a batch bears on the last bits of
    their numbers.
    """
    encoder = Encoder(assistant)
    for start in range(0, len(questions), asking.batch_size):
        batch = questions[start : start + asking.batch_size]
        if any(question.id not in journal.entries for question in batch):
            journal.add(_answered(batch, asking, encoder))
            encoder.turn()
        progress((start + len(batch)) / len(questions))


def _answered(batch: Sequence[Question], asking: Asking, encoder: Encoder) -> list[Answer]:
    """In the order of the batch."""
    found: dict[str, Answer] = {}
    ready: list[tuple[Question, Asked]] = []
    for question in batch:
        try:
            ready.append((question, ask(question, asking.templates, encoder)))
        except InputError as error:
            found[question.id] = {"id": question.id, "error": str(error)}
    for answer in _replies(ready, asking, encoder.assistant):
        found[answer["id"]] = answer
    return [found[question.id] for question in batch]


def ask(question: Question, templates: dict[str, str], encode: Callable[[Picture], EncodedImage]) -> Asked:
    """The conversation, with its images encoded.

    Raises:
        InputError: an image is missing or damaged.
    """
    messages, pictures = conversation(question, templates)
    return messages, [encode(picture) for picture in pictures]


def _replies(ready: Sequence[tuple[Question, Asked]], asking: Asking, assistant: Assistant) -> list[Answer]:
    """Letters by likelihood one by one, what is written together."""
    alone = [item for item in ready if _is_by_likelihood(item[0], asking)]
    together = [item for item in ready if not _is_by_likelihood(item[0], asking)]
    found = [_answer(question, _letter(assistant, question, asked)) for question, asked in alone]
    if together:
        replies = assistant.chat_many([asked for _, asked in together], max_new_tokens=asking.max_new_tokens)
        found += [_answer(question, reply) for (question, _), reply in zip(together, replies, strict=True)]
    return found


def _is_by_likelihood(question: Question, asking: Asking) -> bool:
    return asking.choices == "likelihood" and bool(question.options)


def likeliest_letter(
    assistant: Assistant, messages: Sequence[Message], images: Sequence[EncodedImage], letters: str
) -> str:
    """The letter with the highest likelihood; of equal ones the first."""
    scores = log_likelihoods(assistant, [(images, messages, letter) for letter in letters])
    return letters[max(range(len(letters)), key=lambda number: scores[number].total)]


def _letter(assistant: Assistant, question: Question, asked: Asked) -> str | InputError:
    try:
        return likeliest_letter(assistant, *asked, question.letters)
    except InputError as error:
        return error


def _answer(question: Question, reply: str | InputError) -> Answer:
    if isinstance(reply, InputError):
        return {"id": question.id, "error": str(reply)}
    return {"id": question.id, "answer": reply.strip()}
