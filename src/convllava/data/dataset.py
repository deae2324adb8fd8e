"""The dataset over sources of conversations: the order of the samples, and the treatment of bad ones."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from convllava.data.collate import IGNORE, SKIPPED, encode
from convllava.data.mixture import Mixture
from convllava.data.records import Conversation, SampleError, conversation_of, with_images
from convllava.errors import DataError, InputError
from convllava.model.processing import ConvLlavaProcessor

_MAX_BAD_IN_A_ROW = 100


@dataclass(eq=False, repr=False)
class FileDataset(Dataset):
    """The samples of a mixture of sources, every epoch in another order.

    Items are those of `collate.encode`. A sample that cannot be used is replaced by the next one; the item then lists
    it under `skipped` as (name of the source, problem).

    Args:
        mixture: The order of the records.
        processor: Encodes the samples.
        length: Number of items, over all epochs.
        max_tokens: Longest sequence; None takes the tokenizer's limit.
        truncate: Whether longer samples are cut; otherwise they are skipped.
    """

    mixture: Mixture
    processor: ConvLlavaProcessor
    length: int
    _: KW_ONLY
    max_tokens: int | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        self.longest = self.max_tokens or self.processor.tokenizer.model_max_length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        skipped = []
        for position in range(index, index + _MAX_BAD_IN_A_ROW):
            source, number = self.mixture[position]
            try:
                item = self.item(self.sample(source, number))
            except InputError as error:
                skipped.append((self.mixture.sources[source].records.name, str(error)))
                continue
            return item | ({SKIPPED: skipped} if skipped else {})
        raise DataError(
            f"{_MAX_BAD_IN_A_ROW} samples in a row cannot be used; the last: {skipped[-1][0]}: {skipped[-1][1]}"
        )

    def conversation(self, position: int) -> list[dict[str, Any]]:
        """Return the sample at a position of the stream as messages with decoded images.

        Raises:
            SampleError: if the sample cannot be used.
        """
        return with_images(self.sample(*self.mixture[position]))

    def sample(self, source: int, number: int) -> Conversation:
        """Return a record of a source of the mixture.

        Raises:
            SampleError: if the record cannot be read or is not a conversation.
        """
        found = self.mixture.sources[source]
        try:
            record = found.records[number]
        except InputError as error:
            raise SampleError(str(number), "unreadable record", str(error)) from None
        return conversation_of(record, number, found.images)

    def item(self, sample: Conversation) -> dict[str, Tensor]:
        """Encode a sample and cut it to the longest sequence.

        Raises:
            SampleError: if the sample cannot be encoded or cut.
        """
        return self.within(sample.id, self.encoded(sample.id, with_images(sample)))

    def encoded(self, name: str, messages: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Encode the messages of a sample, at any length.

        Raises:
            SampleError: if the chat template cannot write them.
        """
        try:
            return encode(self.processor, messages)
        except InputError as error:
            raise SampleError(name, "unwritable text", str(error)) from None

    def within(self, name: str, item: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return an item, cut to the longest sequence if it is longer.

        Raises:
            SampleError: if it must not be cut, the cut would go through an image, or no answer would be left.
        """
        ids = item["input_ids"]
        if len(ids) <= self.longest:
            return item
        if not self.truncate:
            raise SampleError(name, "too long", f"{len(ids)} tokens, more than {self.longest}")
        if (ids[self.longest :] == self.processor.image_token_id).any():
            raise SampleError(name, "too long", f"{len(ids)} tokens; a cut at {self.longest} would go through an image")
        cut = item | {key: item[key][: self.longest] for key in ("input_ids", "labels")}
        if (cut["labels"] == IGNORE).all():
            raise SampleError(name, "too long", f"{len(ids)} tokens, and the answer begins after {self.longest}")
        return cut


def steps_of(samples: int, epochs: float, batch_size: int) -> int:
    """Return the optimiser steps in which every sample is used `epochs` times. The last batch is filled up."""
    return math.ceil(samples * epochs / batch_size)
