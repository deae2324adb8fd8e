"""One sample, whatever file it comes from: a conversation whose images are where their marks stand.

The layout is LLaVA's: `conversations` is a list of `{"from": "human" or "gpt", "value": text}`, in which `<image>`
marks where an image stands; `image` is absent, one image or a list of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from convllava.data import storage
from convllava.data.formats import Embedded
from convllava.errors import InputError
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
"""What can be wrong with a sample; with all but the last it is skipped in training."""
PROBLEMS: tuple[Problem, ...] = get_args(Problem)
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class SampleError(InputError):
    """A sample that cannot be used.

    Attributes:
        name: Of the sample.
        problem: Which kind of problem it has.
        detail: What exactly is wrong.
    """

    def __init__(self, name: str, problem: Problem, detail: str) -> None:
        super().__init__(f"sample {name}: {detail}")
        self.name, self.problem, self.detail = name, problem, detail


@dataclass(frozen=True)
class Conversation:
    """One sample of a file.

    Attributes:
        id: What the file calls it, else its number.
        messages: As chat templates take them; an image part holds its address, or an `Embedded`, as `image`.
    """

    id: str
    messages: list[dict[str, Any]]


def conversation_of(record: dict[str, Any], number: int, images: str) -> Conversation:
    """A record as messages.

    Images that no mark places stand first in the first message of the user. As many marks as images is the rule; the
    LLaVA mix has records with one image and a mark too many, which are refused like any other.

    Args:
        record: As in the file.
        number: Of the record, for its name where it has no id.
        images: Folder that the paths of its images are relative to.

    Raises:
        SampleError: names the sample, and what is wrong with it.
    """
    name = str(record.get("id", number))
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise SampleError(name, "no conversation", "no conversations")
    pictures = _pictures(record, name, images)
    messages = [_message(turn, name) for turn in turns]
    _check_order(messages, name)
    marks = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if pictures and not marks:
        first = next(message for message in messages if message["role"] == "user")
        marks = [{"type": "image"} for _ in pictures]
        first["content"] = [*marks, *first["content"]]
    if len(marks) != len(pictures):
        told = f"{len(marks)} {IMAGE_MARK} marks for {len(pictures)} images"
        raise SampleError(name, "marks and images differ", told)
    for mark, picture in zip(marks, pictures, strict=True):
        mark["image"] = picture
    return Conversation(name, messages)


def _pictures(record: dict[str, Any], name: str, folder: str) -> list[str | Embedded]:
    """Addresses of a record's images, or the images themselves."""
    given = record.get("image") or []
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(image, str | Embedded) for image in given):
        raise SampleError(name, "unreadable record", f"image is a path or a list of paths; got {given!r}"[:200])
    for image in given:
        if isinstance(image, str) and (told := _leading_out(image, folder)):
            raise SampleError(name, "missing image", f"{image[:120]} {told}")
    return [image if isinstance(image, Embedded) else storage.within(folder, image) for image in given]


def _leading_out(image: str, folder: str) -> str | None:
    """Why an image's path is not opened: it does not lie below the folder that the recipe names. By its words alone:
    what links in the folder point to is its owner's choice."""
    if storage.is_remote(image):
        return "is an address, and nothing that data name is fetched"
    path, home = Path(image), Path(folder)
    homes = () if storage.is_remote(folder) else (home.absolute(), home.resolve())
    is_below = not path.is_absolute() or any(map(path.is_relative_to, homes))
    if ".." in path.parts or not is_below:
        return (
            f"leads out of {folder or '.'}; write it below that, without '..', or name another folder as the source's "
            "images"
        )
    return None


def _message(turn: Any, name: str) -> dict[str, Any]:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(speaker, str) or speaker not in _ROLES or not isinstance(turn.get("value"), str):
        told = f"a turn has from, one of {', '.join(_ROLES)}, and value; got {turn!r}"
        raise SampleError(name, "malformed turn", told[:200])
    role, text = _ROLES[speaker], turn["value"]
    if role == "assistant":
        if not text.strip():
            raise SampleError(name, "empty answer", "an empty answer")
        return {"role": role, "content": [{"type": "text", "text": text}]}
    return {"role": role, "content": _parts(text)}


def _parts(text: str) -> list[dict[str, Any]]:
    """Text around marks as it stands, but without the blanks at its ends where there are marks, as in LLaVA."""
    pieces = text.split(IMAGE_MARK)
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    filled = [number for number, piece in enumerate(pieces) if piece.strip()]
    if filled:
        pieces[filled[0]] = pieces[filled[0]].lstrip()
        pieces[filled[-1]] = pieces[filled[-1]].rstrip()
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece.strip() else []
    return parts


def _check_order(messages: list[dict[str, Any]], name: str) -> None:
    roles = [message["role"] for message in messages]
    roles = roles[1:] if roles[0] == "system" else roles
    if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        told = f"turns alternate, human first and gpt last, a system turn before or nowhere; got {', '.join(roles)}"
        raise SampleError(name, "unbalanced roles", told)


def with_images(sample: Conversation) -> list[dict[str, Any]]:
    """The messages with decoded images.

    Raises:
        SampleError: an image that is not there, or cannot be decoded.
    """
    return [
        message | {"content": [_decoded(part, sample.id) for part in message["content"]]} for message in sample.messages
    ]


def _decoded(part: dict[str, Any], name: str) -> dict[str, Any]:
    return part | {"image": _image(part["image"], name)} if part["type"] == "image" else part


def _image(source: str | Embedded, name: str) -> Image.Image:
    try:
        file: Any = source
        if isinstance(source, Embedded) or storage.is_remote(source):
            file = _NamedBytes(source)
        return load_image(file)
    except InputError as error:
        is_there = isinstance(source, Embedded) or storage.exists(source)
        raise SampleError(name, "undecodable image" if is_there else "missing image", str(error)) from None


class _NamedBytes(BytesIO):
    """A file in memory that says in messages what it is."""

    def __init__(self, source: str | Embedded) -> None:
        if isinstance(source, Embedded):
            self.name, content = source
        else:
            self.name = source
            with storage.opened(source) as file:
                content = file.read()
        super().__init__(content)
