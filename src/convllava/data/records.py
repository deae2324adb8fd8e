"""One sample of a data file as a conversation. Each image is at the position of its mark.

The layout is LLaVA's: `conversations` is a list of `{"from": "human" or "gpt", "value": text}`. In the text, `<image>`
marks the position of an image. `image` is absent, one image or a list of images.
"""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

from convllava.data import storage
from convllava.data.formats import Embedded
from convllava.errors import DataError, InputError
from convllava.model.images import load_image

IMAGE_MARK = "<image>"
Problem = Literal[
    "unreadable record",
    "no conversation",
    "malformed turn",
    "empty answer",
    "unbalanced roles",
    "marks and images differ",
    "missing image",
    "undecodable image",
    "unwritable text",
    "too long",
    "cut",
]
"""The problems of a sample. Training skips a sample with any of them except "cut"."""
PROBLEMS: tuple[Problem, ...] = get_args(Problem)
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class SampleError(DataError):
    """A sample that cannot be used.

    Attributes:
        name: Id of the sample.
        problem: The kind of problem.
        detail: A description of the problem.
    """

    def __init__(self, name: str, problem: Problem, detail: str) -> None:
        super().__init__(f"sample {name}: {detail}")
        self.name, self.problem, self.detail = name, problem, detail


@dataclass(frozen=True)
class Conversation:
    """One sample of a file.

    Attributes:
        id: Its id in the file, or its number.
        messages: In the form of chat templates. An image part holds an address or an `Embedded` under `image`.
    """

    id: str
    messages: list[dict[str, Any]]


def conversation_of(record: dict[str, Any], number: int, images: str) -> Conversation:
    """Turn a record into messages.

    Images without marks come first in the first user message. Otherwise there must be as many marks as images; the
    LLaVA mix has a few records with one mark too many, which are rejected like any other.

    Args:
        record: A record of a data file.
        number: Number of the record; it replaces a missing id.
        images: Folder that image paths are relative to.

    Raises:
        SampleError: if the record is not a conversation; the message names the sample and the problem.
    """
    name = str(record.get("id", number))
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise SampleError(name, "no conversation", "no conversations")
    pictures = _pictures(record, name, images)
    messages: list[dict[str, Any]] = []
    for turn in turns:
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in _ROLES or not isinstance(turn.get("value"), str):
            detail = f"a turn needs from, one of {', '.join(_ROLES)}, and value; got {turn!r}"
            raise SampleError(name, "malformed turn", detail[:200])
        role, text = _ROLES[speaker], turn["value"]
        if role == "assistant" and not text.strip():
            raise SampleError(name, "empty answer", "an empty answer")
        pieces = [text] if role == "assistant" else text.split(IMAGE_MARK)
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if len(pieces) > 1:
            # As in LLaVA, blanks at both ends of a text with marks are removed.
            filled = [number for number, piece in enumerate(pieces) if piece.strip()]
            if filled:
                pieces[filled[0]] = pieces[filled[0]].lstrip()
                pieces[filled[-1]] = pieces[filled[-1]].rstrip()
            parts = []
            for number, piece in enumerate(pieces):
                parts += [{"type": "image"}] if number else []
                parts += [{"type": "text", "text": piece}] if piece.strip() else []
        messages.append({"role": role, "content": parts})
    roles = [message["role"] for message in messages]
    roles = roles[1:] if roles[0] == "system" else roles
    if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        detail = "turns must alternate, human first and gpt last, after an optional system turn"
        raise SampleError(name, "unbalanced roles", f"{detail}; got {', '.join(roles)}")
    marks = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if pictures and not marks:
        first = next(message for message in messages if message["role"] == "user")
        marks = [{"type": "image"} for _ in pictures]
        first["content"] = [*marks, *first["content"]]
    if len(marks) != len(pictures):
        detail = f"{len(marks)} {IMAGE_MARK} marks for {len(pictures)} images"
        raise SampleError(name, "marks and images differ", detail)
    for mark, picture in zip(marks, pictures, strict=True):
        mark["image"] = picture
    return Conversation(name, messages)


def _pictures(record: dict[str, Any], name: str, folder: str) -> list[str | Embedded]:
    """Return the images of a record, or their addresses. Addresses must be below the folder that the recipe names.

    Only the text of a path is checked: symbolic links inside the folder are the decision of its owner.
    """
    given = record.get("image") or []
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(image, str | Embedded) for image in given):
        raise SampleError(name, "unreadable record", f"image must be a path or a list of paths; got {given!r}"[:200])
    home = Path(folder)
    homes = () if storage.is_remote(folder) else (home.absolute(), home.resolve())
    for image in (image for image in given if not isinstance(image, Embedded)):
        if storage.is_remote(image):
            detail = "is an address; addresses inside the data are not fetched"
            raise SampleError(name, "missing image", f"{image[:120]} {detail}")
        path = Path(image)
        if ".." in path.parts or (path.is_absolute() and not any(map(path.is_relative_to, homes))):
            detail = (
                f"{image[:120]} leads out of {folder or '.'}; give a path below it without '..', or set another folder "
                "as the source's images"
            )
            raise SampleError(name, "missing image", detail)
    return [image if isinstance(image, Embedded) else storage.within(folder, image) for image in given]


def with_images(sample: Conversation) -> list[dict[str, Any]]:
    """Return the messages of a conversation with decoded images.

    Raises:
        SampleError: if an image is missing or cannot be decoded.
    """

    def decoded(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        source = part["image"]
        try:
            if isinstance(source, Embedded):
                return part | {"image": load_image(_NamedBytes(*source))}
            if storage.is_remote(source):
                with storage.opened(source) as file:
                    return part | {"image": load_image(_NamedBytes(source, file.read()))}
            return part | {"image": load_image(source)}
        except InputError as error:
            is_there = isinstance(source, Embedded) or storage.exists(source)
            raise SampleError(sample.id, "undecodable image" if is_there else "missing image", str(error)) from None

    return [message | {"content": list(map(decoded, message["content"]))} for message in sample.messages]


class _NamedBytes(BytesIO):
    """A file in memory with a name, which `load_image` uses in its messages."""

    def __init__(self, name: str, content: bytes) -> None:
        super().__init__(content)
        self.name = name
