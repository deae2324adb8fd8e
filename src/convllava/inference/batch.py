"""Answers to a file of questions, written to disk batch by batch, so that a killed run can continue.

convllava ask --input questions.jsonl --output answers.jsonl
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypedDict

from convllava.checkpoints.tensors import weights_digest
from convllava.display import progress_bar
from convllava.errors import DataError, InputError
from convllava.inference.assistant import load
from convllava.inference.types import EncodedImage, Message
from convllava.io import WEIGHTS, ResumableJsonl, parse_json


class Summary(TypedDict):
    """Result of a run: lines in the output with an answer and with an error, and lines that were there before."""

    output: str
    answered: int
    errors: int
    continued: int
    seconds: float


@dataclass(frozen=True)
class Line:
    """One question of a file. If `error` is not empty, it cannot be asked."""

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
    """Answer the questions of a file; answers that `output` holds already are kept.

    Args:
        questions: JSON lines, {"id"?, "image", "question"}; an image's path is relative to this file's folder. A line
            without an id gets the id `line N`.
        output: JSON lines in the same order, {"id", "answer"}, or {"id", "error"} for a line that cannot be answered.
            A file next to it stores the settings.
        model, pixels: See `convllava.load`.
        max_new_tokens: Longest answer.
        batch_size: Questions that are answered together.

    Raises:
        InputError: if the file cannot be read, has no lines or has an id twice, the output was made from other
            questions or with other settings, or the model cannot be loaded.
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
    encoded: dict[Path, EncodedImage] = {}
    with progress_bar("answering") as progress:
        for start in range(0, len(lines), batch_size):
            batch = lines[start : start + batch_size]
            progress(start / len(lines))
            # A batch with an open question is answered again as a whole: the last bits of an answer's numbers depend
            # on the other questions in its batch.
            if all(line.id in journal.entries for line in batch):
                continue
            encoded = {path: encoded[path] for path in {line.image for line in batch} & encoded.keys()}
            entries: dict[str, dict[str, str]] = {}
            for line in batch:
                try:
                    if line.error:
                        raise InputError(line.error)
                    encoded[line.image] = encoded.get(line.image) or assistant.encode(line.image)
                except InputError as error:
                    entries[line.id] = {"id": line.id, "error": str(error)}
            ready = [line for line in batch if line.id not in entries]
            conversations = [([Message(role="user", content=line.question)], [encoded[line.image]]) for line in ready]
            replies = assistant.chat_many(conversations, max_new_tokens=max_new_tokens)
            for line, reply in zip(ready, replies, strict=True):
                kind = "error" if isinstance(reply, InputError) else "answer"
                entries[line.id] = {"id": line.id, kind: str(reply)}
            journal.add([entries[line.id] for line in batch])
        progress(1.0)
    failed = sum("error" in entry for entry in journal.entries.values())
    return {
        "output": str(output),
        "answered": len(journal.entries) - failed,
        "errors": failed,
        "continued": continued,
        "seconds": round(time.monotonic() - started, 1),
    }


def read_lines(path: Path) -> list[Line]:
    """Read the questions of a file; blank lines are skipped.

    Raises:
        DataError: if the file cannot be read, has no lines, or has the same id twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    lines: dict[str, Line] = {}
    for number, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        name = f"line {number}"
        try:
            record = parse_json(content, name)
            if not isinstance(record, dict):
                raise DataError(f"line {number} is not a JSON object")
            if any(isinstance(value, str) and re.search("[\ud800-\udfff]", value) for value in record.values()):
                raise DataError(f"line {number} contains half of a surrogate pair, which is not a character")
            given = record.get("id", name)
            if isinstance(given, bool) or not isinstance(given, str | int):
                raise DataError(f"line {number}: the id must be a string or an integer")
            name = str(given)
            for key in ("image", "question"):
                if not isinstance(record.get(key), str) or not record[key].strip():
                    raise DataError(f"line {number} needs a text under {key!r}")
            line = Line(name, path.parent / record["image"], record["question"])
        except DataError as error:
            line = Line(name, error=str(error))
        if name in lines:
            raise DataError(f"line {number} of {path} repeats the id {name!r}; give each line its own")
        lines[name] = line
    if not lines:
        raise DataError(f'{path} has no questions; write lines such as {{"image": "a.png", "question": "What?"}}')
    return list(lines.values())
