"""The generated world as chat sequences for the language model."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from convllava.data.attention_targets import CAPTION, guides
from convllava.data.collate import CAPTION_REQUESTS, MARKS, encode
from convllava.data.position_labels import marks
from convllava.geometry import Size
from convllava.model.processing import ConvLlavaProcessor
from convllava.synthetic import Sample, Turn, World

_CAPTION_FIRST = 0.25
"""Share of the captions that are asked for before anything else, as people do."""
_OPENINGS = (
    "Look at the page.",
    "One question:",
    "I would like to know:",
    "From the picture:",
    "Can you answer this?",
    "Read the page and say:",
)
"""What people write before a question."""


class ChatDataset(Dataset):
    """Sample i of a world as a supervised conversation: its turns, and in a share of samples the caption among them.

    Items are those of `conversation.encode`; with `guided`, also the guides of `guidance.guides`, and with `marked`
    the marks of `marks.marks`, with `letters` those too. Of the questions a share `casual` is asked as people
    ask: without capitals and final mark, or behind other words.
    """

    def __init__(
        self,
        world: World,
        processor: ConvLlavaProcessor,
        length: int,
        *,
        captions: float = 1.0,
        casual: float = 0.0,
        images: bool = True,
        guided: bool = False,
        marked: bool = False,
        letters: bool = False,
    ) -> None:
        self.world, self.processor, self.length = world, processor, length
        self.captions, self.casual, self.images = captions, casual, images
        self.guided, self.marked, self.letters = guided, marked, letters

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.world.sample(index)
        turns = self.turns(sample)
        item: dict[str, Any] = encode(self.processor, self.messages(sample, turns))
        if self.guided:
            item |= guides(item, turns, sample, self.processor)
        if self.marked:
            pixels = self.processor.image_processor
            placement = pixels.placement(Size(sample.image.height, sample.image.width))
            item[MARKS] = marks(sample, placement, pixels.stride, letters=self.letters)
        return item

    def conversation(self, index: int) -> list[dict[str, Any]]:
        """The sample as messages, with its image."""
        sample = self.world.sample(index)
        return self.messages(sample, self.turns(sample))

    def turns(self, sample: Sample) -> list[Turn]:
        """The sample's turns, and perhaps its caption: mostly last, since it tells what the others ask for, and they
        would be answered from it instead of from the page."""
        draw = random.Random(sample.index)
        turns = list(sample.turns)
        if not turns or draw.random() < self.captions:
            place = 0 if draw.random() < _CAPTION_FIRST else len(turns)
            turns.insert(place, Turn(CAPTION, draw.choice(CAPTION_REQUESTS), sample.caption))
        return (
            [carelessly(turn) if draw.random() < self.casual / 2 else turn for turn in turns] if self.casual else turns
        )

    def messages(self, sample: Sample, turns: list[Turn]) -> list[dict[str, Any]]:
        """The conversation for the chat template; its image is the first part of the first user message."""
        messages: list[dict[str, Any]] = []
        # Not the numbers of `turns`: only samples with a caption would then begin with an opening.
        draw = random.Random(f"openings/{sample.index}")
        for turn in turns:
            opened = turn.task != CAPTION and draw.random() < self.casual / 2
            question = f"{draw.choice(_OPENINGS)} {turn.question}" if opened else turn.question
            messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        if self.images:
            messages[0]["content"].insert(0, {"type": "image", "image": sample.image})
        return messages


def carelessly(turn: Turn) -> Turn:
    """The same question without capitals and final mark."""
    return replace(turn, question=turn.question.lower().rstrip("?."))
