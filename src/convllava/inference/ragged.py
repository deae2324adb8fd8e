"""One pass of a language model over tokens of many sequences, each with its own keys and values.

The tokens lie behind one another in a batch of one, so that every layer but attention is one product for all of them,
with no padding between long and short. Attention alone looks at one sequence after the other: it is reached through
transformers' attention interface, so that any causal language model which uses that interface can be run this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from convllava.errors import InputError

NAME = "convllava_ragged"
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments of attention that some models give and that change its numbers."""


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence in a pass: `count` of them, after the `start` tokens that its slot holds already."""

    slot: int
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


class KeyValues:
    """Keys and values of `slots` sequences of at most `length` tokens, layer by layer.

    A layer is (slots, heads, length, head size), made when it is first used, for only the model knows its sizes. On a
    CPU the system gives memory to a row when it is first written: short conversations do not pay for long ones.
    """

    def __init__(self, slots: int, length: int) -> None:
        self.slots, self.length = slots, length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer; `key` and `value` of (1, heads, tokens, head size) tell their sizes."""
        if index not in self._layers:
            self._layers[index] = (self._empty(key), self._empty(value))
        return self._layers[index]

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_empty(self.slots, like.shape[1], self.length, like.shape[3])

    @torch.inference_mode()
    def copy(self, source: int, target: int, count: int) -> None:
        """Give one slot the first `count` tokens of another."""
        for pair in self._layers.values():
            for rows in pair:
                rows[target, :, :count] = rows[source, :, :count]


@dataclass
class _Pass:
    """What attention must know of the pass it is part of."""

    cache: KeyValues
    spans: Sequence[Span]
    slots: Tensor
    positions: Tensor
    masks: dict[tuple[Span, int | None], Tensor] = field(default_factory=dict)

    def mask(self, span: Span, window: int | None) -> Tensor:
        """(count, end): which tokens each token of a span sees; the same in all layers of one window."""
        if (span, window) not in self.masks:
            queries = torch.arange(span.start, span.end, device=self.slots.device)[:, None]
            keys = torch.arange(span.end, device=self.slots.device)
            seen = keys <= queries
            self.masks[span, window] = seen if window is None else seen & (keys > queries - window)
        return self.masks[span, window]


class RaggedModel:
    """A language model that takes spans of many sequences at once.

    Its own `forward` and `generate` go on working as before.

    Args:
        decoder: The model without its head.
        head: Hidden states -> logits.
        slots: Sequences whose keys and values are held.
        length: Most tokens of a sequence.

    Raises:
        InputError: the model does not attend through transformers' interface, or keeps state besides keys and values.
    """

    def __init__(self, decoder: PreTrainedModel, head: nn.Module, slots: int, length: int) -> None:
        self.decoder, self.head = decoder, head
        self.cache = KeyValues(slots, length)
        self.device = next(decoder.parameters()).device
        _register()
        self._check()

    def embed(self, ids: Tensor) -> Tensor:
        """(tokens,) -> (tokens, width)."""
        return self.decoder.get_input_embeddings()(ids)

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span], embeddings: Tensor) -> Tensor:
        """Run the spans' tokens, hold their keys and values, and predict what follows each span.

        Args:
            spans: At most one per slot.
            embeddings: (tokens of all spans, width), in the order of the spans.

        Returns:
            (spans, vocabulary) float32 logits.
        """
        positions = torch.cat([torch.arange(span.start, span.end) for span in spans]).to(self.device)
        slots = torch.cat([torch.full((span.count,), span.slot) for span in spans]).to(self.device)
        ragged = _Pass(self.cache, spans, slots, positions)
        output = self._decode(embeddings[None], positions[None], ragged)
        ends = torch.tensor([span.count for span in spans], device=self.device).cumsum(0) - 1
        return self.head(output[0, ends]).float()

    def _decode(self, embeddings: Tensor, positions: Tensor, ragged: _Pass) -> Tensor:
        before = self.decoder.config._attn_implementation
        self.decoder.config._attn_implementation = NAME
        try:
            # A mask of four dimensions is taken as it is, and ours is made span by span.
            mask = torch.empty(1, 1, 1, 1, device=self.device)
            return self.decoder(
                inputs_embeds=embeddings,
                position_ids=positions,
                attention_mask=mask,
                use_cache=False,
                return_dict=True,
                ragged=ragged,
            ).last_hidden_state
        finally:
            self.decoder.config._attn_implementation = before

    @torch.inference_mode()
    def _check(self) -> None:
        """Compare a few tokens in two spans with the model's own forward pass."""
        count = min(8, self.cache.length)
        ids = torch.arange(count, device=self.device) % self.decoder.config.vocab_size
        embeddings = self.embed(ids)
        expected = self.head(self.decoder(inputs_embeds=embeddings[None], use_cache=False).last_hidden_state[0, -1:])
        try:
            self.forward([Span(0, 0, count // 2)], embeddings[: count // 2])
            found = self.forward([Span(0, count // 2, count - count // 2)], embeddings[count // 2 :])
            same = torch.allclose(found, expected.float(), rtol=0.05, atol=0.05 * float(expected.float().std()) + 1e-5)
        except InputError:
            raise
        except Exception as error:  # a model of another build raises nearly anything
            raise InputError(f"{_kind(self.decoder)} cannot decode several texts at once: {error}") from error
        if not same:
            raise InputError(
                f"{_kind(self.decoder)} gives other numbers when it decodes several texts at once; it keeps more than "
                "keys and values, or does not use transformers' attention interface"
            )


def _kind(decoder: PreTrainedModel) -> str:
    return f"a language model of type {decoder.config.model_type}"


def _register() -> None:
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    ragged: _Pass | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of (1, heads, tokens, head size) queries, each span's to its own slot (transformers' interface).

    Returns:
        (1, tokens, heads, head size), and no weights.

    Raises:
        InputError: the model's attention does what this one cannot.
    """
    if ragged is None:  # not one of our passes
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise InputError(f"attention with {name} cannot decode several texts at once")
    keys, values = ragged.cache.layer(int(module.layer_idx), key, value)  # type: ignore[arg-type]
    keys[ragged.slots, :, ragged.positions] = key[0].transpose(0, 1)
    values[ragged.slots, :, ragged.positions] = value[0].transpose(0, 1)
    parts, offset = [], 0
    for span in ragged.spans:
        own = query[0, :, offset : offset + span.count]
        parts.append(_attend_span(own, keys, values, span, ragged, scaling, sliding_window))
        offset += span.count
    return torch.cat(parts)[None], None


def _attend_span(
    query: Tensor, keys: Tensor, values: Tensor, span: Span, ragged: _Pass, scaling: float | None, window: int | None
) -> Tensor:
    """(heads, count, head size) -> (count, heads, head size).

    Heads that share keys are laid out as further queries of the same head: nothing is repeated in memory.
    """
    heads, shared = query.shape[0], keys.shape[1]
    group = heads // shared
    first = max(0, span.end - window) if window is not None and span.count == 1 else 0
    rows = slice(first, span.end)
    mask = None if span.count == 1 else ragged.mask(span, window).repeat(group, 1)
    output = F.scaled_dot_product_attention(
        query.reshape(1, shared, group * span.count, -1),
        keys[span.slot, None, :, rows],
        values[span.slot, None, :, rows],
        attn_mask=mask,
        scale=scaling,
    )
    return output.reshape(heads, span.count, -1).transpose(0, 1)


@torch.no_grad()
def store_by_columns(*modules: nn.Module) -> None:
    """Lay the weights of all linear layers out in memory as (in, out): the same values, in the order in which a CPU
    reads them faster where a product has few rows. A head that shares its weight with an embedding gets its own copy.

    For models that only decode: what trains or saves them afterwards would find two weights in place of one.
    """
    parts = [part for module in modules for part in module.modules()]
    shared = {id(part.weight) for part in parts if isinstance(part, nn.Embedding)}
    for part in parts:
        if isinstance(part, nn.Linear):
            columns = part.weight.t().contiguous().t()
            if id(part.weight) in shared:
                part.weight = nn.Parameter(columns, requires_grad=False)
            else:
                part.weight.data = columns
