"""Auxiliary heads: in training, visual tokens predict their position labels and characters.

To answer "Which word is the second on line 3?" a model needs the line and the number of each word. They are not
printed: they follow from the text before the word, and a visual token sees most of this text in the language model.
Answers alone teach this only after very many steps. With a head on every visual token (see `data.position_labels`) a
model learns lines, words of a line and boxes in hundreds of steps. In that time it did not learn the number of an
object among those of its colour, or the values of charts. Attention supervision can use the learned labels to find an
answer.

Answers also spell only a small share of the printed text, and each of their letters reaches the tower through the whole
language model. The character heads let the visual tokens predict all letters of the page at once. Without them, a tower
that trains on answers alone reads letters less well than after alignment.

The output layers start as zeros, so that the heads do not change the model before they have learned something. If the
previous stage had heads, they start from its weights, which are saved next to its checkpoint: new heads would take a
hundred steps to learn the same again. The heads are not part of the model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convllava.checkpoints.tensors import tensors_in
from convllava.data.dense_labels import DENSE_CLASSES, GLYPH_CELL
from convllava.data.position_labels import BOXES, LABEL_CELL, POSITION_CLASSES
from convllava.errors import CheckpointError
from convllava.training.objectives.attention_supervision import supervised_layers
from convllava.training.objectives.losses import box_loss, flatten_cells, label_map_loss, offset_cells

HEAD = "head"
"""The name of the heads among the model's parts."""
HEADS_FILE = "training/heads.safetensors"
"""Their file in a stage's folder. It is not next to the model's file, because vLLM reads every .safetensors there."""
_GLYPHS = DENSE_CLASSES["glyph"]


class CharacterHeads(nn.Module):
    """Heads on visual tokens for the character over each cell of 8 pixels, and for the character after two given ones.

    Args:
        width: Width of the tokens.
        stride: Side of a token in pixels.
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.side = stride // GLYPH_CELL
        self.glyph = nn.Linear(width, self.side**2 * _GLYPHS)
        self.token = nn.Linear(width, 2 * width)
        self.before = nn.Embedding(2 * _GLYPHS, 2 * width)
        self.next = nn.Linear(2 * width, _GLYPHS)

    def forward(
        self, tokens: Tensor, characters: Tensor, spelling: Tensor, outputs: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the two losses, and write the accuracies `glyph` and `spelling` to `outputs`.

        Args:
            tokens: (visual tokens, width) of a batch.
            characters: The class over each of their cells, in the order of `losses.flatten_cells`.
            spelling: (characters, 4), see `dense_labels.spelling_labels`; cells are counted over the batch.
            outputs: Receives the accuracies.
        """
        cell, *before, target = spelling.T
        known = self.before(before[0]) + self.before(_GLYPHS + before[1])
        logits = self.next(F.gelu(self.token(tokens)[cell] + known))
        glyph_loss = label_map_loss("glyph", self.glyph(tokens), characters, outputs, _GLYPHS)
        outputs["spelling"] = (logits.detach().argmax(-1) == target).float().mean()
        return glyph_loss, F.cross_entropy(logits, target, reduction="sum") / max(len(target), 1)


class AuxiliaryHeads(nn.Module):
    """Linear heads on hidden states of visual tokens.

    Args:
        width: Width of the hidden states.
        stride: Side of a visual token in pixels.
        character_labels: Also predict characters, from the tokens as they enter the language model.
    """

    def __init__(self, width: int, stride: int, character_labels: bool = False) -> None:
        super().__init__()
        self.side = stride // LABEL_CELL
        self.unused: dict[str, Tensor] = {}  # weights of the previous stage that a later stage may need again
        self.norm = nn.LayerNorm(width)
        self.maps = nn.ModuleDict(
            {name: _zero_linear(width, self.side**2 * classes) for name, classes in POSITION_CLASSES.items()}
        )
        self.box = _zero_linear(width, 4)
        self.characters = CharacterHeads(width, stride) if character_labels else None
        if self.characters is not None:
            nn.init.zeros_(self.characters.glyph.weight)
            nn.init.zeros_(self.characters.next.weight)

    def forward(self, tokens: Tensor, labels: Sequence[Mapping[str, Tensor]], entering: Tensor) -> dict[str, Tensor]:
        """Return the losses and metrics of the heads.

        Args:
            tokens: (visual tokens, width), hidden states of a batch.
            labels: The result of `data.position_labels.position_labels` for each page.
            entering: The same tokens before the first layer of the language model.

        Returns:
            `loss`, the accuracy of each map over the cells with a number, and the mean `box_error` in cells. With
            character labels also their loss as `character_loss`, and their accuracies.
        """
        tokens = self.norm(tokens)
        outputs: dict[str, Tensor] = {}
        losses = []
        for name, classes in POSITION_CLASSES.items():
            flat = torch.cat([flatten_cells(page[name], self.side) for page in labels])
            losses.append(label_map_loss(name, self.maps[name](tokens), flat, outputs, classes))
        counts = [page["row"].numel() // self.side**2 for page in labels]
        losses.append(box_loss(self.box(tokens), offset_cells([page[BOXES] for page in labels], counts), outputs))
        if self.characters is not None:
            characters = torch.cat([flatten_cells(page["glyph"], self.characters.side) for page in labels])
            spelling = offset_cells([page["spelling"] for page in labels], counts)
            # With their coordinates: here the loss of the language model keeps them from shrinking.
            both = self.characters(entering, characters, spelling, outputs)
            outputs["character_loss"] = torch.stack(both).sum()
        return {"loss": torch.stack(losses).sum(), **outputs}

    @torch.no_grad()
    def load_previous(self, path: Path) -> None:
        """Load the weights of the previous stage's heads; keep those that only a later stage can use.

        Raises:
            CheckpointError: if a weight has another shape, or the file is damaged.
        """
        found, own = tensors_in(path), self.state_dict()
        for name in found:
            if name not in own:
                self.unused[name] = found[name]
            elif own[name].shape == found[name].shape:
                own[name].copy_(found[name])
            else:
                raise CheckpointError(
                    f"{path}: {name} has another shape than in this version; remove the file to start with new heads"
                )


def _zero_linear(width: int, outputs: int) -> nn.Linear:
    head = nn.Linear(width, outputs)
    nn.init.zeros_(head.weight)
    return head


def attach_heads(model: Any, previous: Path | None = None, character_labels: bool = False) -> None:
    """Add heads to a `ConvLlavaForConditionalGeneration`.

    If its forward gets `attention_supervision=` with position labels, and `output_hidden_states=True`, its outputs are
    then `logits` and `auxiliary`, the result of `AuxiliaryHeads`.

    Args:
        model: The model; it is changed in place.
        previous: The folder of the previous stage. If it has heads, the new ones start with their weights.
        character_labels: Also predict characters.

    Raises:
        CheckpointError: if the heads of the previous stage have other shapes, or their file is damaged.
    """
    config = model.config
    heads = AuxiliaryHeads(config.text_config.hidden_size, config.vision_config.stride, character_labels)
    if previous is not None and (previous / HEADS_FILE).exists():
        heads.load_previous(previous / HEADS_FILE)
    model.add_module(HEAD, heads.to(model.device))
    model.head.hook = model.register_forward_hook(_run_heads, with_kwargs=True)


def detach_heads(model: Any) -> dict[str, dict[str, Tensor]]:
    """Remove the heads, if there are any, and return their file and weights for the next stage."""
    if not hasattr(model, HEAD):
        return {}
    heads = model.head
    heads.hook.remove()
    delattr(model, HEAD)
    return {HEADS_FILE: {**heads.unused, **heads.state_dict()}}


def _run_heads(model: Any, args: tuple[Any, ...], inputs: Mapping[str, Any], outputs: Any) -> Any:
    """Run the heads inside the model's forward, so that DDP also shares the gradients of the heads."""
    supervision = inputs.get("attention_supervision")
    if supervision is None or not supervision.position_labels:
        return outputs
    labels = supervision.position_labels
    # The flat positions of the visual tokens, without row separators.
    places = (inputs["input_ids"] == model.config.image_token_id).flatten().nonzero()[:, 0]
    shapes = [tuple(length // model.head.side for length in page["row"].shape) for page in labels]
    is_token = [F.pad(torch.ones(shape, dtype=torch.bool), (0, int(model.config.row_separator))) for shape in shapes]
    visual = places[torch.cat([item.flatten() for item in is_token]).to(places.device)]
    layers = (supervised_layers(model).get("mention", -1) + 1, 0)
    hidden, entering = (outputs.hidden_states[layer].flatten(0, 1)[visual] for layer in layers)
    # A dictionary, because the model's output class has no field for the heads.
    return {"logits": outputs.logits, "auxiliary": model.head(hidden, labels, entering)}
