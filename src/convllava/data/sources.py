"""Files of conversations in LLaVA's layout, and one dataset over several of them.

A file is a JSON list, or JSONL, of records: `id`, `image` (absent, a path or a list of paths) and `conversations`, a
list of `{"from": "human" or "gpt", "value": text}`, in which `<image>` marks where an image stands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from convllava.data.conversation import IGNORE, SKIPPED, encode
from convllava.errors import InputError
from convllava.images import load_image
from convllava.processing import ConvLlavaProcessor

IMAGE_MARK = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PATIENCE = 100
"""So many bad samples in a row are no longer a few bad samples."""


@dataclass(frozen=True)
class Conversation:
    """One sample of a file.

    Attributes:
        id: What the file calls it, else its number.
        messages: As chat templates take them; an image part holds its path as `image`.
    """

    id: str
    messages: list[dict[str, Any]]


class Records:
    """The records of a file, kept as bytes: hundreds of thousands of dicts would be copied by every worker.

    Raises:
        InputError: no such file, not JSON, or no list.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self.path = path
        lines = [json.dumps(record).encode() for record in _records_in(path)][:limit]
        self.ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
        self.content = np.frombuffer(b"".join(lines), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = self.ends[index - 1] if index else 0
        return json.loads(self.content[start : self.ends[index]].tobytes())


def _records_in(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"there is no data file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if path.suffix == ".jsonl":
        content = [_parsed(line, f"line {n} of {path}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        content = _parsed(text, str(path))
    if not isinstance(content, list) or not content or not all(isinstance(record, dict) for record in content):
        raise InputError(f"{path} must hold a list of records, one or more, each an object with conversations")
    return content


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from None


def conversation_of(record: dict[str, Any], number: int, images: Path) -> Conversation:
    """A record as messages.

    Images that no mark places stand first in the first message of the user. As many marks as images is the rule; the
    LLaVA mix has records with one image and a mark too many, which are refused like any other.

    Args:
        record: As in the file.
        number: Of the record, for its name where it has no id.
        images: Folder that the paths of its images are relative to.

    Raises:
        InputError: names the sample, and what is wrong with it.
    """
    name = str(record.get("id", number))
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise InputError(f"sample {name}: no conversations")
    named = record.get("image") or []
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not all(isinstance(path, str) for path in named):
        raise InputError(f"sample {name}: image is a path or a list of paths; got {named!r}"[:200])
    paths = [str(images / path) for path in named]
    messages = [_message(turn, name) for turn in turns]
    _check_order(messages, name)
    marks = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if paths and not marks:
        first = next(message for message in messages if message["role"] == "user")
        marks = [{"type": "image"} for _ in paths]
        first["content"] = [*marks, *first["content"]]
    if len(marks) != len(paths):
        raise InputError(f"sample {name}: {len(marks)} {IMAGE_MARK} marks for {len(paths)} images")
    for mark, path in zip(marks, paths, strict=True):
        mark["image"] = path
    return Conversation(name, messages)


def _message(turn: Any, name: str) -> dict[str, Any]:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(speaker, str) or speaker not in _ROLES or not isinstance(turn.get("value"), str):
        raise InputError(f"sample {name}: a turn has from, one of {', '.join(_ROLES)}, and value; got {turn!r}"[:200])
    role, text = _ROLES[speaker], turn["value"]
    if role == "assistant":
        if not text.strip():
            raise InputError(f"sample {name}: an empty answer")
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
        raise InputError(
            f"sample {name}: turns alternate, human first and gpt last, a system turn before or nowhere; "
            f"got {', '.join(roles)}"
        )


class Mixture:
    """One epoch over several sources: (source, record) pairs, each record as often as its source repeats.

    Raises:
        InputError: that is never.
    """

    def __init__(self, lengths: Sequence[int], repeats: Sequence[float]) -> None:
        counts = [round(length * repeat) for length, repeat in zip(lengths, repeats, strict=True)]
        if not sum(counts):
            raise InputError("an epoch of the data sources has no sample; raise repeat or limit")
        self.lengths, self.ends = list(lengths), np.cumsum(counts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> tuple[int, int]:
        source = int(np.searchsorted(self.ends, index, side="right"))
        place = index - (int(self.ends[source - 1]) if source else 0)
        return source, place % self.lengths[source]


class FileDataset(Dataset):
    """The samples of several files, every epoch in another order.

    Items are those of `conversation.encode`. A sample that cannot be used is replaced by the next one, and the item
    tells of it under `skipped`: a list of (name of the file, what was wrong).

    Args:
        files: Records, the folder of their images, and how often an epoch repeats them.
        processor: Encodes them.
        length: Items in all, over the epochs.
        seed: Of the order.
        max_tokens: Longest sequence; None takes the tokenizer's.
        truncate: Whether a longer one is cut, else it is skipped.
    """

    def __init__(
        self,
        files: Sequence[tuple[Records, Path, float]],
        processor: ConvLlavaProcessor,
        length: int,
        *,
        seed: int = 0,
        max_tokens: int | None = None,
        truncate: bool = True,
    ) -> None:
        self.files, self.processor, self.length, self.seed = files, processor, length, seed
        self.max_tokens = max_tokens or processor.tokenizer.model_max_length
        self.truncate = truncate
        self.mixture = Mixture([len(records) for records, _, _ in files], [repeat for _, _, repeat in files])
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        skipped = []
        for place in range(index, index + _PATIENCE):
            source, number = self.mixture[self._drawn(place)]
            records, images, _ = self.files[source]
            try:
                item = self.item(conversation_of(records[number], number, images))
            except InputError as error:
                skipped.append((records.path.name, str(error)))
                continue
            return item | ({SKIPPED: skipped} if skipped else {})
        raise InputError(f"{_PATIENCE} samples in a row cannot be used; the last: {skipped[-1][0]}: {skipped[-1][1]}")

    def item(self, sample: Conversation) -> dict[str, Tensor]:
        """A sample encoded, within the longest sequence.

        Raises:
            InputError: it cannot be read or encoded, or not be cut.
        """
        try:
            messages = [
                message | {"content": [_opened(part) for part in message["content"]]} for message in sample.messages
            ]
            return self._within(encode(self.processor, messages))
        except InputError as error:
            raise InputError(f"sample {sample.id}: {error}") from None

    def _within(self, item: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = item["input_ids"]
        if len(ids) <= self.max_tokens:
            return item
        if not self.truncate:
            raise InputError(f"{len(ids)} tokens, more than {self.max_tokens}")
        if (ids[self.max_tokens :] == self.processor.image_token_id).any():
            raise InputError(f"{len(ids)} tokens, and a cut at {self.max_tokens} would go through an image")
        item |= {name: item[name][: self.max_tokens] for name in ("input_ids", "labels")}
        if (item["labels"] == IGNORE).all():
            raise InputError(f"{len(ids)} tokens, and the answer begins after {self.max_tokens}")
        return item

    def _drawn(self, place: int) -> int:
        """The number in an epoch of the item at a place in the stream."""
        epoch, number = divmod(place, len(self.mixture))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.mixture)))
        return int(self._order[1][number])


def _opened(part: dict[str, Any]) -> dict[str, Any]:
    return part | {"image": load_image(part["image"])} if part["type"] == "image" else part


def steps_of(samples: int, epochs: float, batch_size: int) -> int:
    """Optimiser steps in which every sample comes `epochs` times, the last batch filled up."""
    return math.ceil(samples * epochs / batch_size)
