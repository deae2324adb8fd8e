"""Encode one conversation as a supervised sequence, and several sequences as one batch."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from torch import Tensor

from convllava.errors import DataError
from convllava.model.processing import ConvLlavaProcessor

IGNORE = -100
"""The label of positions without a loss."""
TARGET_KINDS = ("answer", "mention")
"""Kinds of attention targets (see `attention_targets`)."""
POSITION_LABELS = "position_labels"
"""The key of the labels of a page's visual tokens (see `position_labels`)."""
SKIPPED = "skipped"
"""Key of an item with the bad samples that it replaces: a list of (name of the source, problem)."""
CAPTION_REQUESTS = ("Describe the image.", "What does the page show?", "Read the page.")


def encode(processor: ConvLlavaProcessor, messages: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Encode one conversation.

    Returns:
        `input_ids` and `labels` of shape (sequence,); labels are the ids of the assistant's text and of its end, and
        -100 elsewhere. With images also `pixel_values` (images, 3, height, width) and `image_sizes` (images, 2).

    Raises:
        DataError: if the chat template cannot write the conversation, or marks no assistant text to supervise.
    """
    # No return_tensors: transformers loops over the tokens for each answer, which takes 80 ms a sample with tensors.
    try:
        encoded = processor.apply_chat_template(
            [messages], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except (TemplateError, UnicodeError, TypeError) as error:
        raise DataError(f"the conversation cannot be written as a prompt: {error}") from None
    input_ids = torch.tensor(encoded["input_ids"][0])
    supervised = torch.tensor(encoded["assistant_masks"][0]).bool()
    if not supervised.any():
        raise DataError(
            "the chat template marks no assistant text; put {% generation %} ... {% endgeneration %} around it"
        )
    item = {"input_ids": input_ids, "labels": torch.where(supervised, input_ids, IGNORE)}
    images = {
        key: torch.as_tensor(np.asarray(encoded[key])) for key in ("pixel_values", "image_sizes") if key in encoded
    }
    return item | images


def collate(items: list[dict[str, Any]], pad_token_id: int, multiple: int = 1) -> dict[str, Any]:
    """Pad items on the right to one batch. Pixels stay a list of (3, height, width), so nothing pads unequal images.

    The length is a multiple of `multiple`, so that batches have few different lengths.

    Attention targets become (pairs, 3): sequence of the batch, position, position to attend to. Position labels stay a
    list.
    """
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    length = multiple * math.ceil(int(lengths.max()) / multiple)
    batch: dict[str, Any] = {
        name: torch.stack([F.pad(item[name], (0, length - len(item[name])), value=padding) for item in items])
        for name, padding in (("input_ids", pad_token_id), ("labels", IGNORE))
    }
    batch["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
    for name in (f"{kind}_targets" for kind in TARGET_KINDS):
        if name in items[0]:
            batch[name] = torch.cat([F.pad(item[name], (1, 0), value=row) for row, item in enumerate(items)])
    if POSITION_LABELS in items[0]:
        batch[POSITION_LABELS] = [item[POSITION_LABELS] for item in items]
    return batch | _images_and_skips(items)


def pack(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Concatenate the samples in one row without padding.

    The positions start at 0 in each sample. With such positions, no attention mask and no cache, transformers prevents
    attention between samples.
    """
    return {
        "use_cache": False,
        "input_ids": torch.cat([item["input_ids"] for item in items])[None],
        # The last token of a sample does not predict the first token of the next one.
        "labels": torch.cat([F.pad(item["labels"][1:], (1, 0), value=IGNORE) for item in items])[None],
        "position_ids": torch.cat([torch.arange(len(item["input_ids"])) for item in items])[None],
    } | _images_and_skips(items)


def lengths_of(batch: Mapping[str, Any]) -> list[int]:
    """Return the number of tokens of each sample of a padded or packed batch; [] for a batch without text."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum(1).tolist()
    if "position_ids" in batch:
        positions = batch["position_ids"][0]
        end = torch.tensor([len(positions)], device=positions.device)
        return torch.diff((positions == 0).nonzero()[:, 0], append=end).tolist()
    return []


def supervise_first(batch: Mapping[str, Any], samples: int) -> None:
    """Remove the labels of all samples after the first `samples` of a padded or packed batch."""
    if "attention_mask" in batch:
        batch["labels"][samples:] = IGNORE
    else:
        batch["labels"][:, sum(lengths_of(batch)[:samples]) :] = IGNORE


def _images_and_skips(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Collect the images without padding, and the skipped samples."""
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
