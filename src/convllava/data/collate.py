"""A page and its turns as one supervised sequence; several sequences as one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from torch import Tensor

from convllava.errors import InputError
from convllava.model.processing import ConvLlavaProcessor

IGNORE = -100
GUIDES = ("answer", "mention")
"""What a position can be told to look at (see `guidance.guides`)."""
MARKS = "marks"
"""The key under which an item of a generated page has what its visual tokens are asked for (see `marks.marks`)."""
SKIPPED = "skipped"
"""The key under which an item tells of the samples in whose place it was taken: (data file, what was wrong) each."""
CAPTION_REQUESTS = ("Describe the image.", "What does the page show?", "Read the page.")


def encode(processor: ConvLlavaProcessor, messages: list[dict[str, Any]]) -> dict[str, Tensor]:
    """One conversation -> input ids, labels (the assistant's text and its end, -100 elsewhere) and pixels.

    Returns:
        input_ids, labels: (sequence,). pixel_values: (images, 3, height, width) and image_sizes: (images, 2), where
        the conversation has images.

    Raises:
        InputError: nothing is supervised, as when the chat template marks no assistant text.
    """
    # Lists, not tensors: transformers walks over every token for every answer, which costs tensors 80 ms a sample.
    try:
        encoded = processor.apply_chat_template(
            [messages], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except (TemplateError, UnicodeError, TypeError) as error:
        raise InputError(f"the conversation cannot be written as a prompt: {error}") from None
    input_ids = torch.tensor(encoded["input_ids"][0])
    supervised = torch.tensor(encoded["assistant_masks"][0]).bool()
    if not supervised.any():
        raise InputError(
            "the chat template marks no assistant text; put {% generation %} ... {% endgeneration %} around it"
        )
    item = {"input_ids": input_ids, "labels": torch.where(supervised, input_ids, IGNORE)}
    images = {
        key: torch.as_tensor(np.asarray(encoded[key])) for key in ("pixel_values", "image_sizes") if key in encoded
    }
    return item | images


def collate(items: list[dict[str, Any]], pad_token_id: int, multiple: int = 1) -> dict[str, Any]:
    """Right-padded batch; pixels stay a list of (3, height, width), so that unequal shapes cost nothing.

    Its length is a multiple of `multiple`, so that batches have few different ones.

    Guides (see `guidance.guides`) become (pairs, 3): sequence of the batch, position, position to look at; marks (see
    `marks.marks`) a list.
    """
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    length = multiple * math.ceil(int(lengths.max()) / multiple)
    batch: dict[str, Any] = {
        name: torch.stack([F.pad(item[name], (0, length - len(item[name])), value=padding) for item in items])
        for name, padding in (("input_ids", pad_token_id), ("labels", IGNORE))
    }
    batch["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
    for name in (f"{kind}_guides" for kind in GUIDES):
        if name in items[0]:
            batch[name] = torch.cat([F.pad(item[name], (1, 0), value=row) for row, item in enumerate(items)])
    if MARKS in items[0]:
        batch[MARKS] = [item[MARKS] for item in items]
    return batch | _beside_text(items)


def pack(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The samples end to end in one row, without padding.

    Positions begin anew with each sample; by them, and because there is no attention mask and no cache, transformers
    keeps samples from looking at each other.
    """
    return {
        "use_cache": False,
        "input_ids": torch.cat([item["input_ids"] for item in items])[None],
        # What ends one sample is not asked to foretell how the next begins.
        "labels": torch.cat([F.pad(item["labels"][1:], (1, 0), value=IGNORE) for item in items])[None],
        "position_ids": torch.cat([torch.arange(len(item["input_ids"])) for item in items])[None],
    } | _beside_text(items)


def lengths_of(batch: Mapping[str, Any]) -> list[int]:
    """Tokens of each sample of a padded or packed batch; of one without text, none."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum(1).tolist()
    if "position_ids" in batch:
        places = batch["position_ids"][0]
        return torch.diff(
            (places == 0).nonzero()[:, 0], append=torch.tensor([len(places)], device=places.device)
        ).tolist()
    return []


def supervise_first(batch: Mapping[str, Any], samples: int) -> None:
    """Take the labels of all but the first samples of a padded or packed batch away."""
    if "attention_mask" in batch:
        batch["labels"][samples:] = IGNORE
    else:
        batch["labels"][:, sum(lengths_of(batch)[:samples]) :] = IGNORE


def _beside_text(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Images, and which samples were passed over."""
    batch: dict[str, Any] = {}
    images = [
        pixels[:, :height, :width].contiguous()
        for item in items
        if "pixel_values" in item
        for pixels, (height, width) in zip(item["pixel_values"], item["image_sizes"].tolist(), strict=True)
    ]
    if images:
        batch["pixel_values"] = images
    if skipped := [found for item in items for found in item.get(SKIPPED, ())]:
        batch[SKIPPED] = skipped
    return batch
