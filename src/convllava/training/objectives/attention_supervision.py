"""Attention guidance: the language model's attention told where to look.

-log of the share of its attention, averaged over heads, that a position gives to the visual tokens it is guided to
(`data.guidance` finds them). Answers alone teach a small model from nothing to look things up only after many thousands
of steps; pointing does in hundreds, and what it finds there the answers teach. A layer in the middle is told where on
the page stands what the question names, the last one where the next token stands.

The attention itself runs as scaled dot product attention; shares are computed a second time, and only for the guided
positions of the two layers, because attention that returns all its weights takes several times as long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from convllava.errors import InputError
from convllava.training.recipe import Stage

IMPLEMENTATION = "convllava_guided"
_FLOOR = 1e-6
"""Keeps the logarithm of attention that is nowhere near finite."""


class Guidance:
    """Passed through the model's forward as `guidance=`: where to look in which layer, and the shares found.

    Args:
        layers: Kind of guide (see `convllava.data.collate.GUIDES`) -> the layer that is guided.
        guides: Kind -> (pairs, 3): sequence of the batch, position, a position that it should look at.
        marks: What heads on the visual tokens of each page are asked for (see `training.marks`), if anything.
    """

    def __init__(
        self, layers: Mapping[str, int], guides: Mapping[str, Tensor], marks: Sequence[Mapping[str, Tensor]] = ()
    ) -> None:
        self.layers = dict(layers)
        self.guides = {kind: guides[kind] for kind in layers}
        self.marks = marks
        self.shares: dict[str, Tensor] = {}

    def loss(self, kind: str, weights: Tensor) -> Tensor:
        """How far attention is from where it should be; the model has run.

        Args:
            kind: Of guide.
            weights: (batch, positions), above 0 where an answer is supervised; other guided positions count 1.

        Returns:
            A scalar: the weighted mean over the guided positions of -log(share of attention on all their places); 0
            where there are no guides.
        """
        guides, shares = self.guides[kind], self.shares[kind]
        if not len(guides):
            return weights.new_zeros(())
        rows, groups = torch.unique(guides[:, 0] * weights.shape[1] + guides[:, 1], return_inverse=True)
        total = torch.zeros(len(rows), dtype=shares.dtype, device=shares.device).index_add(0, groups, shares)
        chosen = weights.flatten()[rows]
        chosen = chosen.where(chosen > 0, 1.0)
        return -(chosen * (total + _FLOOR).log()).sum() / chosen.sum()


def guided_layers(model: Any) -> dict[str, int]:
    """Which layer of the model's language model looks where: at what the question mentions, and at the answer."""
    last = model.config.text_config.num_hidden_layers - 1
    return {"answer": last} if last == 0 else {"mention": (last - 1) // 2, "answer": last}


def check_attention(model: Any, stage: Stage) -> None:
    """Refuse a stage that needs more of the language model's attention than transformers' attention interface, if it
    does not go through it.

    Raises:
        InputError: names the family.
    """
    needs = [name for name in ("attention_supervision", "packing") if getattr(stage, name)]
    if needs and not getattr(model.model.language_model, "_supports_attention_backend", False):
        family = model.config.text_config.model_type
        raise InputError(f"stage {stage.name}: the attention of a {family} cannot have {needs[0]}; leave it out")
    if stage.packing and not keeps_apart(model.model.language_model):
        family = model.config.text_config.model_type
        raise InputError(f"stage {stage.name}: samples in one row of a {family} see each other; leave out packing")


@torch.no_grad()
def keeps_apart(language_model: Any) -> bool:
    """Whether a sequence behind another in one row gives what it gives alone, which layers that are no attention (such
    as convolutions over time) and families with places of their own do not."""
    was_training, weight = language_model.training, next(language_model.parameters())
    language_model.eval()
    ids = torch.arange(1, 13, device=weight.device)[None] % language_model.config.vocab_size
    places = torch.cat([torch.arange(5), torch.arange(7)]).to(weight.device)[None]
    together = language_model(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state[:, 5:]
    alone = language_model(input_ids=ids[:, 5:], position_ids=places[:, 5:], use_cache=False).last_hidden_state
    language_model.train(was_training)
    return bool((together - alone).abs().max() <= 1e-5 * alone.abs().max())


def guide_attention(model: Any) -> None:
    """Let the language model of a `ConvLlavaForConditionalGeneration` take `guidance=`."""
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation({"text_config": IMPLEMENTATION})


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    guidance: Guidance | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if torch.is_autocast_enabled("cpu"):  # the gradient of torch's attention in bfloat16 takes longer on a CPU
        with torch.autocast("cpu", enabled=False):
            given = query.float(), key.float(), value.float()
            return _attend(module, *given, attention_mask, guidance, **kwargs)
    if guidance is not None:
        for kind, layer in guidance.layers.items():
            if layer == getattr(module, "layer_idx", None):
                guidance.shares[kind] = shares_of(query, key, guidance.guides[kind], kwargs["scaling"])
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def shares_of(query: Tensor, key: Tensor, guides: Tensor, scaling: float) -> Tensor:
    """The share of causal attention, averaged over heads, that each guide's position gives to its place: (pairs,).

    Args:
        query: (batch, heads, positions, head width), right-padded.
        key: (batch, key heads, positions, head width); heads are a multiple of key heads.
        guides: (pairs, 3): sequence, position, place looked at.
        scaling: Of the products.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    positions = torch.arange(key.shape[2], device=key.device)
    shares = [query.new_zeros(0)]
    for sequence in guides[:, 0].unique().tolist():
        _, asked, place = guides[guides[:, 0] == sequence].T
        rows, row_of = asked.unique(return_inverse=True)
        scores = (query[sequence, :, rows] @ key[sequence].mT) * scaling
        scores = scores.masked_fill(positions > rows[:, None], -torch.inf)
        shares.append(scores.softmax(-1).mean(0)[row_of, place])
    return torch.cat(shares)
