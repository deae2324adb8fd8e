"""Answers to a file of questions, on disk as they come, so that a run that was killed continues.

convllava ask --input questions.jsonl --output answers.jsonl
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypedDict

from convllava.checkpoints.tensors import weights_digest
from convllava.display import progress_bar
from convllava.errors import InputError
from convllava.inference.assistant import Assistant, EncodedImage, Message, load
from convllava.io import WEIGHTS, Entry, ResumableJsonl, parse_json


class Summary(TypedDict):
    """What a run has come to: lines in the output with an answer and with an error, and those that were there."""

    output: str
    answered: int
    errors: int
    continued: int
    seconds: float


@dataclass(frozen=True)
class Line:
    """One question of a file; where `error` says something, it cannot be asked."""

    id: str
    image: Path = Path()
    question: str = ""
    error: str = ""


def answer_file(
    questions: Path,
    output: Path,
    model: str = "tiny",
    *,
    pixels: Mapping[str, Any] | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 8,
) -> Summary:
    """Answer the questions of a file; what `output` answers already is kept.

    Args:
        questions: JSON lines, {"id"?, "image", "question"}; an image's path is relative to this file's folder. A line
            without an id is called `line N`.
        output: JSON lines in the same order, {"id", "answer"}, or {"id", "error"} for a line that cannot be answered.
            A file beside it says how they were made.
        model, pixels: As of `convllava.load`.
        max_new_tokens: Longest answer.
        batch_size: Questions that are answered together.

    Raises:
        InputError: the file cannot be read or has no lines, an id stands there twice, the output was made from other
            questions or otherwise, or the model cannot be loaded.
    """
    started, lines = time.monotonic(), read_lines(questions)
    assistant = load(model, pixels=pixels)
    settings = {
        "questions": sha256(questions.read_bytes()).hexdigest(),
        "model": model,
        WEIGHTS: weights_digest(assistant.model),
        "pixels": dict(pixels or {}),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
    }
    journal = ResumableJsonl(output.parent, settings, output.name, f"{output.name}.settings.json")
    continued = len(journal.entries)
    _answer_rest(assistant, lines, journal, max_new_tokens, batch_size)
    errors = sum("error" in entry for entry in journal.entries.values())
    return {
        "output": str(output),
        "answered": len(journal.entries) - errors,
        "errors": errors,
        "continued": continued,
        "seconds": round(time.monotonic() - started, 1),
    }


def read_lines(path: Path) -> list[Line]:
    """The questions of a file; blank lines are left out.

    Raises:
        InputError: it cannot be read, has no lines, or two lines have one id.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    lines: dict[str, Line] = {}
    for number, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            line = _line(content, f"line {number}", path.parent)
            if line.id in lines:
                raise InputError(f"line {number} of {path}: the id {line.id!r} stands there before; give each its own")
            lines[line.id] = line
    if not lines:
        raise InputError(f'{path} has no questions; write lines such as {{"image": "a.png", "question": "What?"}}')
    return list(lines.values())


def _line(content: str, where: str, folder: Path) -> Line:
    try:
        record = parse_json(content, where)
    except (InputError, RecursionError) as error:
        return Line(where, error=str(error))
    if not isinstance(record, dict):
        return Line(where, error=f"{where} is no object")
    if any(isinstance(value, str) and _is_broken(value) for value in record.values()):
        return Line(where, error=f"{where} has half of a surrogate pair, which is no character")
    name = record.get("id", where)
    if isinstance(name, bool) or not isinstance(name, str | int):
        return Line(where, error=f"{where}: the id must be a text or a whole number")
    for key in ("image", "question"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            return Line(str(name), error=f"{where} lacks a text under {key!r}")
    return Line(str(name), folder / record["image"], record["question"])


def _is_broken(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _answer_rest(
    assistant: Assistant, lines: Sequence[Line], journal: ResumableJsonl, max_new_tokens: int, batch_size: int
) -> None:
    """A batch with any question left is done again as a whole: which questions share a batch bears on the last bits
    of their numbers."""
    encoded: dict[Path, EncodedImage] = {}
    with progress_bar("answering") as progress:
        for start in range(0, len(lines), batch_size):
            batch = lines[start : start + batch_size]
            if any(line.id not in journal.entries for line in batch):
                encoded = {path: encoded[path] for path in {line.image for line in batch} & encoded.keys()}
                journal.add(_answered(assistant, batch, encoded, max_new_tokens))
            progress((start + len(batch)) / len(lines))


def _answered(
    assistant: Assistant, batch: Sequence[Line], encoded: dict[Path, EncodedImage], max_new_tokens: int
) -> list[Entry]:
    """In the order of the batch; images that are encoded on the way are added to `encoded`."""
    errors = {line.id: error for line in batch if (error := line.error or _encode(assistant, line.image, encoded))}
    ready = [line for line in batch if line.id not in errors]
    found = {entry["id"]: entry for entry in _replies(assistant, ready, encoded, max_new_tokens)}
    return [found.get(line.id) or {"id": line.id, "error": errors[line.id]} for line in batch]


def _encode(assistant: Assistant, path: Path, encoded: dict[Path, EncodedImage]) -> str:
    """Encode an image that is not encoded yet; what is wrong with it, if anything."""
    try:
        encoded[path] = encoded.get(path) or assistant.encode(path)
    except InputError as error:
        return str(error)
    return ""


def _replies(
    assistant: Assistant, ready: Sequence[Line], encoded: Mapping[Path, EncodedImage], max_new_tokens: int
) -> Iterator[Entry]:
    if not ready:
        return
    asked = [([Message(role="user", content=line.question)], [encoded[line.image]]) for line in ready]
    for line, reply in zip(ready, assistant.chat_each(asked, max_new_tokens=max_new_tokens), strict=True):
        yield {"id": line.id} | ({"error": str(reply)} if isinstance(reply, InputError) else {"answer": reply})
