"""Attention supervision: a loss that moves the language model's attention to given visual tokens.

The loss of a position is -log of the share of its attention, averaged over heads, that falls on its target tokens (see
`data.attention_targets`). From answers alone a small language model without pretraining learns to look things up only
after many thousands of steps; with supervision it takes hundreds. A layer in the middle learns where the words of the
question are on the page, the last layer where the next token of the answer is.

Attention itself runs as scaled dot product attention. The shares are computed a second time, only for the supervised
positions of the two layers, because attention that returns all its weights takes several times as long.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from convllava.errors import ConfigError
from convllava.training.recipe import Stage

IMPLEMENTATION = "convllava_supervised"
_FLOOR = 1e-6
"""Added to shares, so that the logarithm of zero attention is finite."""


class AttentionSupervision:
    """The targets of a batch, passed through the model's forward, and the attention shares that the model records.

    Args:
        layers: Kind of target (see `data.collate.TARGET_KINDS`) -> index of the supervised layer.
        targets: Kind -> (pairs, 3): sequence of the batch, position, position that it should attend to.
        position_labels: The labels of each page for the auxiliary heads, if any (see `auxiliary_heads`).
    """

    def __init__(
        self,
        layers: Mapping[str, int],
        targets: Mapping[str, Tensor],
        position_labels: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        self.layers = dict(layers)
        self.targets = {kind: targets[kind] for kind in layers}
        self.position_labels = position_labels
        self.shares: dict[str, Tensor] = {}

    def loss(self, kind: str, weights: Tensor) -> Tensor:
        """Return the loss of one kind of target, after the model has run.

        Args:
            kind: The kind of target.
            weights: (batch, positions), above 0 for supervised answers; other positions with targets have weight 1.

        Returns:
            A scalar: the weighted mean over positions of -log(share of attention on all their targets); 0 if there are
            no targets.
        """
        targets, shares = self.targets[kind], self.shares[kind]
        if not len(targets):
            return weights.new_zeros(())
        rows, groups = torch.unique(targets[:, 0] * weights.shape[1] + targets[:, 1], return_inverse=True)
        total = torch.zeros(len(rows), dtype=shares.dtype, device=shares.device).index_add(0, groups, shares)
        chosen = weights.flatten()[rows]
        chosen = chosen.where(chosen > 0, 1.0)
        return -(chosen * (total + _FLOOR).log()).sum() / chosen.sum()


def supervised_layers(model: Any) -> dict[str, int]:
    """Return which layer of the model's language model is supervised for each kind of target."""
    last = model.config.text_config.num_hidden_layers - 1
    return {"answer": last} if last == 0 else {"mention": (last - 1) // 2, "answer": last}


def check_attention(model: Any, stage: Stage) -> None:
    """Check that the language model supports the attention that a stage needs.

    Raises:
        ConfigError: if attention supervision or packing does not work with this family of models.
    """
    language_model, family = model.model.language_model, model.config.text_config.model_type
    needs = [name for name in ("attention_supervision", "packing") if getattr(stage, name)]
    if needs and not getattr(language_model, "_supports_attention_backend", False):
        raise ConfigError(f"stage {stage.name}: the attention of a {family} cannot have {needs[0]}; leave it out")
    if stage.packing and not isolates_packed_samples(language_model):
        raise ConfigError(f"stage {stage.name}: samples in one row of a {family} see each other; leave out packing")


@torch.no_grad()
def isolates_packed_samples(language_model: Any) -> bool:
    """Return whether a sequence after another one in a packed row gives the same result as alone.

    Layers other than attention, such as convolutions over time, and models with their own position ids do not isolate.
    """
    was_training, weight = language_model.training, next(language_model.parameters())
    language_model.eval()
    ids = torch.arange(1, 13, device=weight.device)[None] % language_model.config.vocab_size
    places = torch.cat([torch.arange(5), torch.arange(7)]).to(weight.device)[None]
    together = language_model(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state[:, 5:]
    alone = language_model(input_ids=ids[:, 5:], position_ids=places[:, 5:], use_cache=False).last_hidden_state
    language_model.train(was_training)
    return bool((together - alone).abs().max() <= 1e-5 * alone.abs().max())


def enable_attention_supervision(model: Any) -> None:
    """Let a `ConvLlavaForConditionalGeneration` take `attention_supervision=` in its forward."""
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation({"text_config": IMPLEMENTATION})


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attention_supervision: AttentionSupervision | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if torch.is_autocast_enabled("cpu"):  # the gradient of torch's attention in bfloat16 takes longer on a CPU
        with torch.autocast("cpu", enabled=False):
            single = query.float(), key.float(), value.float()
            return _attend(module, *single, attention_mask, attention_supervision, **kwargs)
    if attention_supervision is not None:
        for kind, layer in attention_supervision.layers.items():
            if layer == getattr(module, "layer_idx", None):
                targets = attention_supervision.targets[kind]
                attention_supervision.shares[kind] = attention_shares(query, key, targets, kwargs["scaling"])
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def attention_shares(query: Tensor, key: Tensor, targets: Tensor, scaling: float) -> Tensor:
    """Return the share of causal attention, averaged over heads, of each pair of positions: (pairs,).

    Args:
        query: (batch, heads, positions, head width), right-padded.
        key: (batch, key heads, positions, head width); the number of heads is a multiple of the number of key heads.
        targets: (pairs, 3): sequence, position, position that it should attend to.
        scaling: Factor of the products.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    positions = torch.arange(key.shape[2], device=key.device)
    shares = [query.new_zeros(0)]
    for sequence in targets[:, 0].unique().tolist():
        _, source, target = targets[targets[:, 0] == sequence].T
        rows, row_of = source.unique(return_inverse=True)
        scores = (query[sequence, :, rows] @ key[sequence].mT) * scaling
        scores = scores.masked_fill(positions > rows[:, None], -torch.inf)
        shares.append(scores.softmax(-1).mean(0)[row_of, target])
    return torch.cat(shares)
