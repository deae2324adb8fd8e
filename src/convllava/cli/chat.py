"""A conversation in a terminal, or through a pipe: answers on stdout, everything else on stderr.

convllava chat receipt.png
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from convllava.errors import InputError
from convllava.inference.assistant import load
from convllava.inference.chat_session import Conversation
from convllava.inference.engine import Engine

HELP = "/image PATH, or a path alone, adds a picture; /reset begins anew; /quit ends; Ctrl-C ends an answer."


def chat(
    model: str = "tiny",
    images: Sequence[str] = (),
    *,
    pixels: Mapping[str, Any] | None = None,
    max_new_tokens: int = 256,
) -> None:
    """Talk with a model until stdin ends.

    Args:
        model, pixels: As of `convllava.load`.
        images: Paths of images to begin with.
        max_new_tokens: Longest answer.

    Raises:
        InputError: the model or one of these images cannot be loaded.
    """
    assistant = load(model, pixels=pixels)
    engine = Engine(assistant, slots=1)
    engine.start()
    conversation = Conversation(assistant, engine, max_new_tokens)
    try:
        for path in images:
            _add(conversation, path)
        _note(HELP)
        converse(conversation, _typed())
    finally:
        engine.close()


def converse(conversation: Conversation, lines: Iterator[str]) -> None:
    """Answer lines until they end, or `/quit`; what is wrong with one is said, and the next one is taken."""
    for line in lines:
        if line.strip() == "/quit":
            return
        try:
            _take(conversation, line.strip())
        except (InputError, RuntimeError) as error:  # the second from the engine, whose next answers begin anew
            _note(str(error))
        except KeyboardInterrupt:
            print(flush=True)


def _take(conversation: Conversation, line: str) -> None:
    command, _, rest = line.partition(" ")
    if command == "/image":
        for path in paths_in(rest) or [rest.strip()]:
            _add(conversation, path)
    elif line == "/reset":
        conversation.reset()
    elif paths := paths_in(line):
        for path in paths:
            _add(conversation, path)
    elif command.startswith("/"):
        _note(f"there is no {command}. {HELP}")
    elif line:
        for piece in conversation.say(line):
            print(piece, end="", flush=True)
        print(flush=True)


def paths_in(line: str) -> list[str]:
    """The files that a line names, as terminals write them when they are dropped or pasted: plain, quoted, with
    backslashes, or as file: addresses. Empty where any of it is something else, such as a question."""
    candidates = [[line.strip()]]
    with suppress(ValueError):  # an apostrophe, in a question
        candidates.append(shlex.split(line))
    for words in candidates:
        paths = [unquote(urlsplit(word).path) if word.startswith("file://") else word for word in words]
        if paths and all(_is_file(path) for path in paths):
            return paths
    return []


def _is_file(path: str) -> bool:
    # A word of a question may be a file's name too; an image's has an ending.
    try:
        return bool(Path(path).suffix) and Path(path).is_file()
    except (OSError, ValueError):
        return False


def _add(conversation: Conversation, path: str) -> None:
    image = conversation.add_image(path)
    height, width = image.size
    _note(f"{path}: seen as {width}x{height}, {len(image.tokens)} tokens")


def _typed() -> Iterator[str]:
    """Lines of stdin; Ctrl-C at the prompt throws the line away."""
    if isinstance(sys.stdin, TextIOWrapper):
        # So that a line that is not UTF-8 is refused, and no more than that line.
        sys.stdin.reconfigure(errors="surrogateescape")
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  # gives input() editing and history
    while True:
        try:
            yield input("> " if is_terminal else "")
        except KeyboardInterrupt:
            _note("")
        except EOFError:
            return


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
