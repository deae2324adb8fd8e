"""Generated pages as conversations for the language model."""

import random
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from torch.utils.data import Dataset

from convllava.data.attention_targets import CAPTION, attention_targets
from convllava.data.collate import CAPTION_REQUESTS, POSITION_LABELS, encode
from convllava.data.position_labels import position_labels
from convllava.geometry import Size
from convllava.model.processing import ConvLlavaProcessor
from convllava.synthetic import Sample, Turn, World

_OPENINGS = (
    "Look at the page.",
    "One question:",
    "I would like to know:",
    "From the picture:",
    "Can you answer this?",
    "Read the page and say:",
)
"""Words that people write before a question."""


@dataclass(eq=False, repr=False)
class ChatDataset(Dataset):
    """Generated pages as supervised conversations: the turns of a page, and for a share of the pages its caption.

    Items are those of `collate.encode`.

    Args:
        world: The source of the pages.
        processor: Encodes the conversations.
        length: Number of samples.
        captions: Share of the samples with a caption.
        casual: Share of the questions in casual form: without capitals and final mark, or after an opening such as
            "One question:".
        images: False leaves the image out.
        attention_targets: Add the items of `attention_targets.attention_targets`.
        position_labels: Add those of `position_labels.position_labels`.
        character_labels: Add the character labels to the position labels.
    """

    world: World
    processor: ConvLlavaProcessor
    length: int
    _: KW_ONLY
    captions: float = 1.0
    casual: float = 0.0
    images: bool = True
    attention_targets: bool = False
    position_labels: bool = False
    character_labels: bool = False

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.world.sample(index)
        turns = self.turns(sample)
        item: dict[str, Any] = encode(self.processor, self.messages(sample, turns))
        if self.attention_targets:
            item |= attention_targets(item, turns, sample, self.processor)
        if self.position_labels:
            pixels = self.processor.image_processor
            placement = pixels.placement(Size(sample.image.height, sample.image.width))
            item[POSITION_LABELS] = position_labels(sample, placement, pixels.stride, self.character_labels)
        return item

    def conversation(self, index: int) -> list[dict[str, Any]]:
        """Return a sample as messages, with its image."""
        sample = self.world.sample(index)
        return self.messages(sample, self.turns(sample))

    def turns(self, sample: Sample) -> list[Turn]:
        """Return the sample's turns, perhaps with its caption.

        Only a quarter of the captions come first: a caption contains the answers, and the model would copy them
        instead of reading the page.
        """
        draw = random.Random(sample.index)
        turns = list(sample.turns)
        if not turns or draw.random() < self.captions:
            place = 0 if draw.random() < 0.25 else len(turns)
            turns.insert(place, Turn(CAPTION, draw.choice(CAPTION_REQUESTS), sample.caption))
        for place, turn in enumerate(turns if self.casual else ()):
            if draw.random() < self.casual / 2:
                turns[place] = replace(turn, question=turn.question.lower().rstrip("?."))
        return turns

    def messages(self, sample: Sample, turns: list[Turn]) -> list[dict[str, Any]]:
        """Return the conversation for the chat template; the image is the first part of the first user message."""
        messages: list[dict[str, Any]] = []
        # A separate random generator: with the one of `turns`, only samples with a caption would get an opening.
        draw = random.Random(f"openings/{sample.index}")
        for turn in turns:
            opened = turn.task != CAPTION and draw.random() < self.casual / 2
            question = f"{draw.choice(_OPENINGS)} {turn.question}" if opened else turn.question
            messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        if self.images:
            messages[0]["content"].insert(0, {"type": "image", "image": sample.image})
        return messages
