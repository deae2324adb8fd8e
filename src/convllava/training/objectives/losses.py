"""What a stage asks in place of the mean over all supervised tokens: answers of equal weight, questions too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convllava.data.collate import IGNORE

ANSWER_LOSS = "answer_loss"
"""What training reports the loss of answers as, where it is not all of the loss."""


def answer_weights(labels: Tensor, balance: float) -> Tensor:
    """What the prediction made at each position counts: (batch, positions), with the mean 1 over those supervised.

    Args:
        labels: (batch, positions); each run of labels that are not -100 is one answer.
        balance: An answer of n tokens counts n^(1 - balance): 0, all tokens alike; 1, all answers.
    """
    supervised = F.pad(labels[:, 1:] != IGNORE, (0, 1))
    begins = supervised & ~F.pad(supervised, (1, 0))[:, :-1]
    answer = begins.flatten().cumsum(0)[supervised.flatten()] - 1
    weights = answer.bincount()[answer].float() ** -balance
    return torch.zeros(labels.shape, device=labels.device).masked_scatter(supervised, weights / weights.mean())


def answer_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the next-token cross entropy; logits (batch, positions, vocabulary), weights as above."""
    chosen = weights[:, :-1] > 0
    losses = F.cross_entropy(logits[:, :-1][chosen], labels[:, 1:][chosen], reduction="none")
    return (weights[:, :-1][chosen] * losses).mean()


def asked_labels(
    input_ids: Tensor,
    labels: Tensor,
    image_token_id: int,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """(batch, positions): the text that is no answer as labels, -100 where there is an answer, an image or padding, or
    where a packed sequence begins.

    Args:
        attention_mask: (batch, positions), 0 for padding; None where there is none.
        position_ids: (batch, positions), of packed sequences.
    """
    left_out = (labels != IGNORE) | (input_ids == image_token_id)
    if attention_mask is not None:
        left_out |= attention_mask == 0
    if position_ids is not None:
        left_out |= position_ids == 0
    return input_ids.masked_fill(left_out, IGNORE)


def asked_loss(logits: Tensor, asked: Tensor) -> Tensor:
    """Mean of the next-token cross entropy over the text of `asked_labels`, 0 where there is none."""
    targets = asked[:, 1:].flatten()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")
    return losses / (targets != IGNORE).sum().clamp(min=1)
