"""What a stage asks beside the mean over all supervised tokens: answers of equal weight, and attention that points.

Attention guidance: -log of the share of its attention, averaged over heads, that a position gives to the visual tokens
which its next token is about (`data.guidance` finds them). Answers alone teach a small model from nothing to look
things up only after many thousands of steps; pointing does in hundreds, and what it finds there the answers teach.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convllava.data.conversation import IGNORE

_FLOOR = 1e-6
"""Keeps the logarithm of attention that is nowhere near finite."""


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


def guidance_loss(attention: Tensor, guides: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over the guided positions of -log(attention to the places they are guided to).

    Args:
        attention: (batch, heads, positions, positions) attention of one layer, rows summing to one.
        guides: (pairs, 3): sequence of the batch, position, a position that it should look at.
        weights: (batch, positions), as of `answer_weights`.

    Returns:
        A scalar; 0 where there are no guides.
    """
    if not len(guides):
        return attention.new_zeros(())
    sequence, position, target = guides.unbind(1)
    shares = attention.mean(1)[sequence, position, target]
    rows, groups = torch.unique(sequence * attention.shape[2] + position, return_inverse=True)
    total = torch.zeros(len(rows), dtype=shares.dtype, device=shares.device).index_add(0, groups, shares)
    weights = weights.flatten()[rows]
    return -(weights * (total + _FLOOR).log()).sum() / weights.sum()
