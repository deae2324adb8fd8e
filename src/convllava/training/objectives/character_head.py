"""Heads, no part of what is trained, that ask visual tokens for the characters that they hold.

A page's answers spell a small share of what is printed on it, and each of their letters reaches the tower through the
whole language model. Heads on the tokens themselves ask for every letter of the page at once: in the stages before
conversation (`training.alignment`), and with `letters` in those of it, without which a tower that trains on answers
alone comes to tell letters less well than it had learnt to.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from convllava.data.dense_labels import DENSE_CLASSES, GLYPH_CELL
from convllava.training.objectives.dense import judge

GLYPHS = DENSE_CLASSES["glyph"]


class LetterHeads(nn.Module):
    """Heads on visual tokens for the character over each 8-pixel cell, and for the one after two given ones.

    Args:
        width: Of the tokens.
        stride: Side in pixels of a token.
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.side = stride // GLYPH_CELL
        self.glyph = nn.Linear(width, self.side**2 * GLYPHS)
        self.token = nn.Linear(width, 2 * width)
        self.before = nn.Embedding(2 * GLYPHS, 2 * width)
        self.next = nn.Linear(2 * width, GLYPHS)

    def forward(
        self, tokens: Tensor, printed: Tensor, spelling: Tensor, outputs: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The losses of both, scalars; notes their accuracies in `outputs`.

        Args:
            tokens: (visual tokens, width) of a batch.
            printed: The character over each of their cells, as `dense.cells` orders them.
            spelling: As of `data.cells.spelling`, cells counted through the batch.
            outputs: Gets the accuracies, by name.
        """
        cell, *before, char = spelling.T
        known = self.before(before[0]) + self.before(GLYPHS + before[1])
        logits = self.next(F.gelu(self.token(tokens)[cell] + known))
        glyph_loss = judge("glyph", self.glyph(tokens), printed, outputs, GLYPHS)
        outputs["spelling"] = (logits.detach().argmax(-1) == char).float().mean()
        return glyph_loss, F.cross_entropy(logits, char, reduction="sum") / max(len(char), 1)

    def begin_as_zeros(self) -> None:
        """Ask nothing of the tokens before something is learnt."""
        for head in (self.glyph, self.next):
            nn.init.zeros_(head.weight)
