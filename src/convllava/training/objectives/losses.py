"""Losses: weighted answers and prompts (for chat), and label maps and boxes (for the heads of all objectives)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from convllava.data.collate import IGNORE

ANSWER_LOSS = "answer_loss"
"""The name under which training reports the loss of answers if it is only a part of the loss."""
_BACKGROUND_WEIGHT = 0.03
"""Loss weight of empty cells: most cells are empty, and at full weight they dominate."""


def answer_weights(labels: Tensor, length_weighting: float) -> Tensor:
    """Return the weight of each position's prediction: (batch, positions), with mean 1 over supervised positions.

    Args:
        labels: (batch, positions); each run of labels other than -100 is one answer.
        length_weighting: An answer of n tokens has the weight n^(1 - length_weighting): with 0 all tokens have the same
            weight, with 1 all answers have.
    """
    supervised = F.pad(labels[:, 1:] != IGNORE, (0, 1))
    begins = supervised & ~F.pad(supervised, (1, 0))[:, :-1]
    answer = begins.flatten().cumsum(0)[supervised.flatten()] - 1
    weights = answer.bincount()[answer].float() ** -length_weighting
    return torch.zeros(labels.shape, device=labels.device).masked_scatter(supervised, weights / weights.mean())


def answer_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of the next-token cross entropy.

    Args:
        logits: (batch, positions, vocabulary).
        labels: (batch, positions).
        weights: See `answer_weights`.
    """
    chosen = weights[:, :-1] > 0
    losses = F.cross_entropy(logits[:, :-1][chosen], labels[:, 1:][chosen], reduction="none")
    return (weights[:, :-1][chosen] * losses).mean()


def prompt_labels(
    input_ids: Tensor,
    labels: Tensor,
    image_token_id: int,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Return the text outside of answers as labels: (batch, positions), with -100 for answers, images and padding.

    Args:
        input_ids: (batch, positions).
        labels: (batch, positions), those of the answers.
        image_token_id: The placeholder of visual tokens.
        attention_mask: (batch, positions), 0 for padding; None if there is no padding.
        position_ids: (batch, positions) of packed sequences, whose first tokens get -100 too.
    """
    left_out = (labels != IGNORE) | (input_ids == image_token_id)
    if attention_mask is not None:
        left_out |= attention_mask == 0
    if position_ids is not None:
        left_out |= position_ids == 0
    return input_ids.masked_fill(left_out, IGNORE)


def prompt_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean next-token cross entropy over the labels of `prompt_labels`; 0 if there are none."""
    targets = labels[:, 1:].flatten()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")
    return losses / (targets != IGNORE).sum().clamp(min=1)


def flatten_cells(labels: Tensor, side: int) -> Tensor:
    """Flatten a (height, width) label map so that the side x side cells under each feature are next to each other."""
    height, width = labels.shape
    return labels.view(height // side, side, width // side, side).permute(0, 2, 1, 3).flatten()


def label_map_loss(name: str, logits: Tensor, labels: Tensor, outputs: dict[str, Tensor], classes: int) -> Tensor:
    """Return the cross entropy of a label map, and write its accuracy over occupied cells to `outputs[name]`."""
    logits = logits.view(-1, classes)
    occupied = labels > 0
    outputs[name] = (logits.detach().argmax(-1)[occupied] == labels[occupied]).float().mean()
    weight = logits.new_ones(classes)
    weight[0] = _BACKGROUND_WEIGHT
    return F.cross_entropy(logits, labels, weight=weight)


def box_loss(predicted: Tensor, boxes: Tensor, outputs: dict[str, Tensor]) -> Tensor:
    """Return the smooth L1 loss of box sides, in cells (Fast R-CNN, arXiv 1504.08083).

    Args:
        predicted: (cells, 4).
        boxes: (occupied cells, 5), see `dense_labels.box_labels`.
        outputs: Receives the mean distance as `box_error`.
    """
    predicted = predicted[boxes[:, 0].long()]
    outputs["box_error"] = (predicted.detach() - boxes[:, 1:]).abs().mean()
    return F.smooth_l1_loss(predicted, boxes[:, 1:], beta=0.1, reduction="sum") / max(boxes[:, 1:].numel(), 1)


def offset_cells(rows: list[Tensor], counts: list[int]) -> Tensor:
    """Join per-image labels (n, k), whose first column is a cell of the image, so that it indexes cells of the batch.

    Args:
        rows: The labels of each image.
        counts: Number of cells of each image.
    """
    starts = torch.tensor([0, *counts[:-1]]).cumsum(0).tolist()
    return torch.cat(
        [
            F.pad(item[:, :1] + start, (0, item.shape[1] - 1)) + F.pad(item[:, 1:], (1, 0))
            for item, start in zip(rows, starts, strict=True)
        ]
    )
