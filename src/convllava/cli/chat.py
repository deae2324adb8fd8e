"""A chat in a terminal, or through a pipe: answers go to stdout, everything else to stderr."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote, urlsplit

import typer

from convllava.cli.options import ImageMode, MaxPixels, Model, ShortSide, pixels
from convllava.errors import InputError

if TYPE_CHECKING:
    from convllava.inference.chat_session import ChatSession

HELP = "/image PATH, or only a path, adds an image; /reset starts a new chat; /quit ends; Ctrl-C ends an answer."


def chat(
    images: Annotated[list[str] | None, typer.Argument(help="Images of the first message.")] = None,
    model: Model = "tiny",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    image_mode: ImageMode = None,
    short_side: ShortSide = None,
    max_pixels: MaxPixels = None,
) -> None:
    """Chat about images in the terminal; `/image PATH`, or only a path, adds an image."""
    from convllava.inference import load
    from convllava.inference.chat_session import ChatSession
    from convllava.inference.ragged_model import store_by_columns

    assistant = load(model, pixels=pixels(image_mode, short_side, max_pixels))
    store_by_columns(assistant.model.model.language_model, assistant.model.lm_head)  # this process only decodes
    session = ChatSession(assistant, max_new_tokens)
    for path in images or []:
        _add_image(session, path)
    _note(HELP)
    answer_lines(session, _typed_lines())


def answer_lines(session: ChatSession, lines: Iterator[str]) -> None:
    """Obey commands and answer messages until the lines end, or `/quit`. An error is printed, and the chat goes on."""
    for line in map(str.strip, lines):
        command, _, rest = line.partition(" ")
        try:
            if command == "/image":
                for path in paths_in(rest) or [rest.strip()]:
                    _add_image(session, path)
            elif line == "/reset":
                session.reset()
            elif line == "/quit":
                return
            elif paths := paths_in(line):
                for path in paths:
                    _add_image(session, path)
            elif command.startswith("/"):
                _note(f"there is no {command}. {HELP}")
            elif line:
                for piece in session.say(line):
                    print(piece, end="", flush=True)
                print(flush=True)
        except (InputError, RuntimeError) as error:  # torch raises RuntimeError, for example if memory runs out
            _note(str(error))
        except KeyboardInterrupt:
            print(flush=True)


def paths_in(line: str) -> list[str]:
    """Return the files that a line names, or nothing if a part of the line is something else, such as a question.

    Terminals write a dropped or pasted file plainly, in quotes, with backslashes, or as a file: URL.
    """
    candidates = [[line.strip()]]
    with suppress(ValueError):  # an apostrophe in a question
        candidates.append(shlex.split(line))
    for words in candidates:
        paths = [unquote(urlsplit(word).path) if word.startswith("file://") else word for word in words]
        with suppress(OSError, ValueError):  # a name that is too long, or a null byte
            # A word of a question may also be the name of a file; the name of an image has a suffix.
            if paths and all(Path(path).suffix and Path(path).is_file() for path in paths):
                return paths
    return []


def _add_image(session: ChatSession, path: str) -> None:
    image = session.add_image(path)
    height, width = image.size
    _note(f"{path}: seen as {width}x{height}, {len(image.tokens)} tokens")


def _typed_lines() -> Iterator[str]:
    """Yield the lines of stdin; Ctrl-C at the prompt discards the line."""
    if isinstance(sys.stdin, TextIOWrapper):
        # A line that is not UTF-8 is then rejected alone, and the chat goes on.
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
