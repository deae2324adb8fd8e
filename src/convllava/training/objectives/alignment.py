"""Alignment (stage 1 on generated pages): visual tokens learn to name their content in the language model's words.

A projector before a pretrained language model learns from captions which direction means "red". A language model
without pretraining has no such directions yet, so it would treat the output of the new fifth stage and the projector
mostly as noise. Here each visual token predicts the words of the objects and characters in its cell, by its products
with the word embeddings of the language model. Heads that are discarded later predict the character over each cell of 8
pixels, and the character that follows two given characters. Afterwards the embedding of "square" in a question matches
the visual token of a square, and the text in a token can be spelled, before the language model is trained.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from convllava.data.dense_labels import DENSE_NAMES, GLYPH_CELL
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.training.objectives.auxiliary_heads import CharacterHeads
from convllava.training.objectives.losses import box_loss, flatten_cells, offset_cells


def class_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Return for each label map the token that names each class; -1 for class 0 and for names of several tokens."""
    ids = {name: [tokenizer(text).input_ids for text in texts] for name, texts in DENSE_NAMES.items()}
    return {name: [-1] + [own[0] if len(own) == 1 else -1 for own in found] for name, found in ids.items()}


class Alignment(nn.Module):
    """The tower, the projector and the word embeddings, with heads that are discarded after training."""

    def __init__(self, model: ConvLlavaForConditionalGeneration, tokens: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.model = model.model
        self.config = model.config
        self.side = self.config.vision_config.stride // GLYPH_CELL
        width, stride = self.config.text_config.hidden_size, self.config.vision_config.stride
        self.head = nn.ModuleDict({"characters": CharacterHeads(width, stride), "box": nn.Linear(width, 4)})
        self.class_tokens = {name: torch.tensor(ids) for name, ids in tokens.items()}

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
        """Return the loss, the accuracies of characters (over printed cells) and of spelling, and the mean box error.

        `pixel_values` holds images of (3, height, width); the other arguments hold the labels of `AlignmentDataset`,
        one item per image.
        """
        # Without coordinates: they do not depend on the content, so this loss alone would shrink them to nothing.
        tokens = self.model.multi_modal_projector.content(self.model.vision_tower(pixel_values))
        outputs: dict[str, Tensor] = {}
        characters = torch.cat([flatten_cells(item, self.side) for item in glyph])
        counts = [item.numel() // self.side**2 for item in glyph]
        character_loss, spelling_loss = self.head["characters"](
            tokens, characters, offset_cells(spelling, counts), outputs
        )
        naming_loss = self._naming_loss(tokens, self._names(characters, shape, colour, offset_cells(words, counts)))
        boxes_loss = box_loss(self.head["box"](tokens), offset_cells(boxes, counts), outputs)
        losses = [character_loss, naming_loss, spelling_loss, boxes_loss]
        return {"loss": torch.stack(losses).sum(), **outputs}

    def _names(self, characters: Tensor, shape: list[Tensor], colour: list[Tensor], words: Tensor) -> Tensor:
        """Return (cells, vocabulary): 1 for each token that names something in the cell."""
        embeddings: Any = self.model.get_input_embeddings()
        nothing = len(embeddings.weight)
        labels = {"glyph": characters.view(-1, self.side**2)}
        labels |= {
            name: torch.cat([item.flatten() for item in maps])[:, None]
            for name, maps in (("shape", shape), ("colour", colour))
        }
        named = torch.cat(
            [self.class_tokens[name].to(characters.device)[found] for name, found in labels.items()], dim=1
        )
        names = torch.zeros(len(named), nothing + 1, device=characters.device)
        names = names.scatter(1, named.where(named >= 0, nothing), 1.0)[:, :nothing]
        names[words[:, 0], words[:, 1]] = 1.0
        return names

    def _naming_loss(self, tokens: Tensor, names: Tensor) -> Tensor:
        """Return the cross entropy of predicting the names in each occupied cell. The prediction is the softmax of the
        token's products with the word embeddings; all names of a cell have equal probability in the target."""
        embeddings: Any = self.model.get_input_embeddings()
        occupied = names.sum(1) > 0
        shares = names[occupied] / names[occupied].sum(1, keepdim=True)
        log_shares = F.linear(tokens[occupied], embeddings.weight).log_softmax(-1)
        return -(shares * log_shares).sum() / occupied.sum().clamp(min=1)
