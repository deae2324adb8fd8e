"""Stage 1 of the generated world: visual tokens learn to name what they show, in the language model's own words.

A projector before a pretrained language model learns from captions which directions mean "red". A language model from
nothing has no such directions yet, and what the new fifth stage and the projector write is mostly background to it. So
each visual token is asked, by its products with the language model's word embeddings, for the words of the things and
the characters in its cell; and, through heads that are thrown away, for the character over each 8-pixel cell in it and
for the character after a given one. The embedding of a question's "square" and the token of a square then match before
the language model is trained, and a token's text is ready to be spelled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from convllava.data.dense_labels import DENSE_NAMES, GLYPH_CELL
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.training.objectives.character_head import LetterHeads
from convllava.training.objectives.dense import box_loss, cells, numbered


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Per label map the token that names each class; -1 for class 0, nothing, and for names of several tokens."""
    ids = {name: [tokenizer(text).input_ids for text in texts] for name, texts in DENSE_NAMES.items()}
    return {name: [-1] + [own[0] if len(own) == 1 else -1 for own in found] for name, found in ids.items()}


class Alignment(nn.Module):
    """The model without its language model's layers, under heads that training throws away."""

    def __init__(self, model: ConvLlavaForConditionalGeneration, vocabulary: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.model = model.model
        self.config = model.config
        self.side = self.config.vision_config.stride // GLYPH_CELL
        width, stride = self.config.text_config.hidden_size, self.config.vision_config.stride
        self.head = nn.ModuleDict({"letters": LetterHeads(width, stride), "box": nn.Linear(width, 4)})
        self.vocabulary = {name: torch.tensor(ids) for name, ids in vocabulary.items()}

    def forward(
        self,
        pixel_values: list[Tensor],
        glyph: list[Tensor],
        shape: list[Tensor],
        colour: list[Tensor],
        spelling: list[Tensor],
        words: list[Tensor],
        boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Images of (3, height, width) and the labels of `AlignDataset` at the tower's stride -> loss, the accuracy of
        the glyph map over the cells where something is printed, that of spelling, and the mean error of boxes."""
        # Without coordinates: they say nothing of what is shown, so this loss alone would shrink them to nothing.
        tokens = self.model.multi_modal_projector.content(self.model.vision_tower(pixel_values))
        outputs: dict[str, Tensor] = {}
        printed = torch.cat([cells(item, self.side) for item in glyph])
        counts = [item.numel() // self.side**2 for item in glyph]
        glyph_loss, spelling_loss = self.head["letters"](tokens, printed, numbered(spelling, counts), outputs)
        losses = [
            glyph_loss,
            self._naming_loss(tokens, self._bags(printed, shape, colour, numbered(words, counts))),
            spelling_loss,
            box_loss(self.head["box"](tokens), numbered(boxes, counts), outputs),
        ]
        return {"loss": torch.stack(losses).sum(), **outputs}

    def _bags(self, printed: Tensor, shape: list[Tensor], colour: list[Tensor], words: Tensor) -> Tensor:
        """(cells, vocabulary): 1 for each token that names something in the cell."""
        embeddings: Any = self.model.get_input_embeddings()
        nothing = len(embeddings.weight)
        labels = {"glyph": printed.view(-1, self.side**2)}
        labels |= {
            name: torch.cat([item.flatten() for item in maps])[:, None]
            for name, maps in (("shape", shape), ("colour", colour))
        }
        named = torch.cat([self.vocabulary[name].to(printed.device)[found] for name, found in labels.items()], dim=1)
        bags = torch.zeros(len(named), nothing + 1, device=printed.device)
        bags = bags.scatter(1, named.where(named >= 0, nothing), 1.0)[:, :nothing]
        bags[words[:, 0], words[:, 1]] = 1.0
        return bags

    def _naming_loss(self, tokens: Tensor, bags: Tensor) -> Tensor:
        """Cross entropy between each token's products with the word embeddings and the words of its cell, all alike."""
        embeddings: Any = self.model.get_input_embeddings()
        occupied = bags.sum(1) > 0
        shares = bags[occupied] / bags[occupied].sum(1, keepdim=True)
        log_shares = F.linear(tokens[occupied], embeddings.weight).log_softmax(-1)
        return -(shares * log_shares).sum() / occupied.sum().clamp(min=1)
