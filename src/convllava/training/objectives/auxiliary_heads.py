"""Heads, no part of what is trained, that ask the language model's lower layers what pieces of a page are numbers of.

To answer "Which word is the second on line 3?" a model has to know of each word its line and its number in it. Nothing
printed says so: it follows from what stands before, most of which a visual token sees in the ones before it in the
language model, and less of in the tower. Answers alone teach that after very many of them. Asked for it at every visual
token (`data.marks`) a model learns lines, the words of a line and boxes in hundreds of steps; which of the things of
its colour a thing is, and what a chart shows there, it did not. Attention that is told where an answer stands
(`training.attention`) then has something to find it by.

The heads begin as zeros, so that they ask nothing of the model before they have learnt something themselves; in a stage
after another with heads they begin as that one's, which lie beside its checkpoint: new ones would take a hundred steps
to learn what those knew, and the model with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convllava.checkpoints.tensors import tensors_in
from convllava.data.position_labels import BOXES, MARK_CELL, MARK_CLASSES
from convllava.errors import InputError
from convllava.training.objectives.attention_supervision import guided_layers
from convllava.training.objectives.character_head import LetterHeads
from convllava.training.objectives.dense import box_loss, cells, judge, numbered

HEAD = "head"
"""What the heads are called among the model's parts."""
HEADS_FILE = "training/heads.safetensors"
"""Where in a stage's folder they lie: not beside the model's file, since vLLM reads every .safetensors there."""


class MarkHeads(nn.Module):
    """Linear heads on hidden states of visual tokens.

    Args:
        width: Of the hidden states.
        stride: Side in pixels of a visual token.
        letters: Whether to ask the tokens, as they enter the language model, for their characters too.
    """

    def __init__(self, width: int, stride: int, letters: bool = False) -> None:
        super().__init__()
        self.side = stride // MARK_CELL
        self.others: dict[str, Tensor] = {}  # of a stage before that asked for more, for one after that does again
        self.norm = nn.LayerNorm(width)
        self.maps = nn.ModuleDict(
            {name: _zero_head(width, self.side**2 * classes) for name, classes in MARK_CLASSES.items()}
        )
        self.box = _zero_head(width, 4)
        self.letters = LetterHeads(width, stride) if letters else None
        if self.letters is not None:
            self.letters.begin_as_zeros()

    def forward(self, tokens: Tensor, marks: Sequence[Mapping[str, Tensor]], entering: Tensor) -> dict[str, Tensor]:
        """What the heads find, and how far they are from right.

        Args:
            tokens: Hidden states (visual tokens, width) of a batch.
            marks: What `data.marks.marks` gives of each page.
            entering: As `tokens`, before the language model's first layer.

        Returns:
            loss, the accuracy of each map over the cells that have a number, and the mean error of boxes in cells; with
            letters also their loss, `letters`, and their accuracies.
        """
        tokens = self.norm(tokens)
        outputs: dict[str, Tensor] = {}
        labels = {name: torch.cat([cells(page[name], self.side) for page in marks]) for name in MARK_CLASSES}
        losses = [
            judge(name, self.maps[name](tokens), labels[name], outputs, classes)
            for name, classes in MARK_CLASSES.items()
        ]
        counts = [page["row"].numel() // self.side**2 for page in marks]
        losses.append(box_loss(self.box(tokens), numbered([page[BOXES] for page in marks], counts), outputs))
        if self.letters is not None:
            printed = torch.cat([cells(page["glyph"], self.letters.side) for page in marks])
            spelling = numbered([page["spelling"] for page in marks], counts)
            # With their coordinates, which the language model's loss keeps from shrinking.
            outputs["letters"] = torch.stack(self.letters(entering, printed, spelling, outputs)).sum()
        return {"loss": torch.stack(losses).sum(), **outputs}

    @torch.no_grad()
    def begin_as(self, path: Path) -> None:
        """Take the weights of a file, as far as it has them; keep those of heads that these are not for the next stage.

        Raises:
            InputError: a weight of another shape, or a damaged file.
        """
        found, own = tensors_in(path), self.state_dict()
        for name in found:
            if name not in own:
                self.others[name] = found[name]
            elif own[name].shape == found[name].shape:
                own[name].copy_(found[name])
            else:
                raise InputError(
                    f"{path}: {name} has another shape than this version's; remove the file, and heads begin anew"
                )


def _zero_head(width: int, outputs: int) -> nn.Linear:
    head = nn.Linear(width, outputs)
    nn.init.zeros_(head.weight)
    return head


def attach_heads(model: Any, before: Path | None = None, letters: bool = False) -> None:
    """Give a `ConvLlavaForConditionalGeneration` heads: where it is called with `guidance=` that has marks, and for
    hidden states, its outputs are then `logits`, and `marks`, what `MarkHeads` gives.

    Args:
        model: Gets them.
        before: The folder of the stage before, whose heads they begin as, those that it had.
        letters: Whether tokens are asked for their characters too.

    Raises:
        InputError: the stage before has heads of other shapes, or its file is damaged.
    """
    config = model.config
    heads = MarkHeads(config.text_config.hidden_size, config.vision_config.stride, letters)
    if before is not None and (before / HEADS_FILE).exists():
        heads.begin_as(before / HEADS_FILE)
    model.add_module(HEAD, heads.to(model.device))
    model.head.hook = model.register_forward_hook(_tell, with_kwargs=True)


def detach_heads(model: Any) -> dict[str, dict[str, Tensor]]:
    """Take the heads off again, if there are any: the file that the next stage finds them in -> their weights."""
    if not hasattr(model, HEAD):
        return {}
    heads = model.head
    heads.hook.remove()
    delattr(model, HEAD)
    return {HEADS_FILE: {**heads.others, **heads.state_dict()}}


def _tell(model: Any, args: tuple[Any, ...], inputs: Mapping[str, Any], outputs: Any) -> Any:
    """Inside the model's forward, so that processes which share gradients wait for those of the heads."""
    guidance = inputs.get("guidance")
    if guidance is None or not guidance.marks:
        return outputs
    visual = _visual(model, inputs, guidance.marks)
    layers = (guided_layers(model).get("mention", -1) + 1, 0)
    hidden, entering = (outputs.hidden_states[layer].flatten(0, 1)[visual] for layer in layers)
    told = model.head(hidden, guidance.marks, entering)
    return {"logits": outputs.logits, "marks": told}  # its own class has no other fields


def _visual(model: Any, inputs: Mapping[str, Any], marks: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The positions of the visual tokens in the flattened batch; what separates rows is none."""
    places = (inputs["input_ids"] == model.config.image_token_id).flatten().nonzero()[:, 0]
    side = model.head.side
    shapes = [tuple(length // side for length in page["row"].shape) for page in marks]
    kept = [F.pad(torch.ones(shape, dtype=torch.bool), (0, int(model.config.row_separator))) for shape in shapes]
    return places[torch.cat([item.flatten() for item in kept]).to(places.device)]
