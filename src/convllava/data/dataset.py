"""The dataset over one or more sources of conversations: which sample comes when, and what happens to bad ones."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from convllava.data.collate import IGNORE, SKIPPED, encode
from convllava.data.mixture import Mixture
from convllava.data.records import Conversation, SampleError, conversation_of, with_images
from convllava.errors import InputError
from convllava.model.processing import ConvLlavaProcessor

_PATIENCE = 100
"""So many bad samples in a row are no longer a few bad samples."""


class FileDataset(Dataset):
    """The samples of a mixture of sources, every epoch in another order.

    Items are those of `conversation.encode`. A sample that cannot be used is replaced by the next one, and the item
    tells of it under `skipped`: a list of (name of the source, what was wrong).

    Args:
        mixture: Which record comes when.
        processor: Encodes them.
        length: Items in all, over the epochs.
        max_tokens: Longest sequence; None takes the tokenizer's.
        truncate: Whether a longer one is cut, else it is skipped.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: ConvLlavaProcessor,
        length: int,
        *,
        max_tokens: int | None = None,
        truncate: bool = True,
    ) -> None:
        self.mixture, self.processor, self.length = mixture, processor, length
        self.max_tokens = max_tokens or processor.tokenizer.model_max_length
        self.truncate = truncate

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        skipped = []
        for place in range(index, index + _PATIENCE):
            part, number = self.mixture[place]
            try:
                item = self.item(self.sample(part, number))
            except InputError as error:
                skipped.append((self.mixture.parts[part].records.name, str(error)))
                continue
            return item | ({SKIPPED: skipped} if skipped else {})
        raise InputError(f"{_PATIENCE} samples in a row cannot be used; the last: {skipped[-1][0]}: {skipped[-1][1]}")

    def conversation(self, place: int) -> list[dict[str, Any]]:
        """The sample at a place as messages, with its images.

        Raises:
            SampleError: it cannot be used.
        """
        return with_images(self.sample(*self.mixture[place]))

    def sample(self, part: int, number: int) -> Conversation:
        """A record of a part of the mixture.

        Raises:
            SampleError: it cannot be read, or is no conversation.
        """
        source = self.mixture.parts[part]
        try:
            record = source.records[number]
        except InputError as error:
            raise SampleError(str(number), "unreadable record", str(error)) from None
        return conversation_of(record, number, source.images)

    def item(self, sample: Conversation) -> dict[str, Tensor]:
        """A sample encoded, within the longest sequence.

        Raises:
            SampleError: it cannot be encoded, or not be cut.
        """
        return self.within(sample.id, self.encoded(sample.id, with_images(sample)))

    def encoded(self, name: str, messages: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The messages of a sample encoded, however long.

        Raises:
            SampleError: the chat template cannot write them.
        """
        try:
            return encode(self.processor, messages)
        except InputError as error:
            raise SampleError(name, "unwritable text", str(error)) from None

    def within(self, name: str, item: dict[str, Tensor]) -> dict[str, Tensor]:
        """An item, cut to the longest sequence where it may be.

        Raises:
            SampleError: it must not be cut, or there would be no answer left.
        """
        ids = item["input_ids"]
        if len(ids) <= self.max_tokens:
            return item
        if not self.truncate:
            raise SampleError(name, "too long", f"{len(ids)} tokens, more than {self.max_tokens}")
        if (ids[self.max_tokens :] == self.processor.image_token_id).any():
            told = f"{len(ids)} tokens, and a cut at {self.max_tokens} would go through an image"
            raise SampleError(name, "too long", told)
        cut = item | {key: item[key][: self.max_tokens] for key in ("input_ids", "labels")}
        if (cut["labels"] == IGNORE).all():
            raise SampleError(name, "too long", f"{len(ids)} tokens, and the answer begins after {self.max_tokens}")
        return cut


def steps_of(samples: int, epochs: float, batch_size: int) -> int:
    """Optimiser steps in which every sample comes `epochs` times, the last batch filled up."""
    return math.ceil(samples * epochs / batch_size)
