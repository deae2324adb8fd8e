"""Attention of a pass over tokens of many sequences: each sequence looks at its own keys and values alone.

Sequences of which one token each is in the pass, which is how answers are written, share a call where they lie in slots
side by side: a call costs more than what it computes for a short sequence.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from convllava.errors import InputError

NAME = "convllava_ragged"
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments of attention that some models give and that change its numbers."""
_CALL = 256
"""A call saved is worth attending to so many tokens in vain (measured with heads of 32 and of 64, on a CPU)."""


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
            self._layers[index] = (self._zeros(key), self._zeros(value))
        return self._layers[index]

    def _zeros(self, like: Tensor) -> Tensor:
        """Finite where nothing has been written, since a row without weight is still multiplied by it."""
        shape = (self.slots, like.shape[1], self.length, like.shape[3])
        if like.device.type != "cpu":
            return like.new_zeros(shape)
        # torch would write the zeros, where the system promises them.
        memory = mmap.mmap(-1, math.prod(shape) * like.element_size())
        return torch.frombuffer(memory, dtype=like.dtype).view(shape)

    @torch.inference_mode()
    def copy(self, source: int, target: int, count: int) -> None:
        """Give one slot the first `count` tokens of another."""
        for pair in self._layers.values():
            for rows in pair:
                rows[target, :, :count] = rows[source, :, :count]


Run = tuple[Span, ...]
"""Spans that share a call: one of any length, or several of one token each in slots side by side."""


@dataclass
class Pass:
    """What attention must know of the pass it is part of.

    Attributes:
        cache: Where keys and values are held.
        spans: In the order of the pass's tokens.
        slots, positions: (tokens,) of each token.
        windows: What each layer has said of how many tokens a token sees.
    """

    cache: KeyValues
    spans: Sequence[Span]
    slots: Tensor
    positions: Tensor
    runs: list[Run] = field(init=False)
    windows: dict[int, int | None] = field(default_factory=dict)
    _masks: dict[tuple[Run, int | None, int], Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runs = list(_runs(self.spans))

    def mask(self, run: Run, window: int | None, group: int, like: Tensor) -> Tensor | None:
        """What is added to the scores of a run: (spans, 1, group * count, keys from `first_key` on).

        Args:
            window: How many tokens a token sees, if not all.
            group: Query heads to a head of keys.
            like: Has the scores' type.

        Returns:
            None where every token sees all those keys; the same in all layers of one window.
        """
        key = (run, window, group)
        if key not in self._masks:
            self._masks[key] = _mask(run, window, group, like)
        return self._masks[key]


def _runs(spans: Sequence[Span]) -> Iterator[Run]:
    run: Run = ()
    for span in spans:
        if run and _can_share((*run, span)):
            run = (*run, span)
        else:
            if run:
                yield run
            run = (span,)
    if run:
        yield run


def _can_share(run: Run) -> bool:
    """Whether spans can share a call, and its longest sequence does not make the others pay more than it saves."""
    if any(span.count > 1 for span in run) or run[-1].slot != run[-2].slot + 1:
        return False
    ends = [span.end for span in run]
    return len(run) * max(ends) - sum(ends) <= _CALL * (len(run) - 1)


def _first_key(run: Run, window: int | None) -> int:
    """Before it, no token of a run sees any."""
    return 0 if window is None else max(0, min(span.start for span in run) + 1 - window)


def _mask(run: Run, window: int | None, group: int, like: Tensor) -> Tensor | None:
    if run[0].count == 1 and len({span.end for span in run}) == 1:
        return None
    starts = torch.tensor([span.start for span in run], device=like.device)
    queries = starts[:, None, None] + torch.arange(run[0].count, device=like.device)[:, None]
    keys = torch.arange(_first_key(run, window), max(span.end for span in run), device=like.device)
    unseen = keys > queries
    if window is not None:
        unseen |= keys <= queries - window
    added = torch.zeros(unseen.shape, dtype=like.dtype, device=like.device).masked_fill_(unseen, -math.inf)
    return added.repeat(1, group, 1)[:, None]


def register() -> None:
    """Make `attend` known to transformers by `NAME`."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    ragged: Pass | None = None,
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
    # Any layer of transformers has its number; nn.Module does not know of it.
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    ragged.windows[layer] = sliding_window
    keys, values = ragged.cache.layer(layer, key, value)
    keys[ragged.slots, :, ragged.positions] = key[0].transpose(0, 1)
    values[ragged.slots, :, ragged.positions] = value[0].transpose(0, 1)
    parts, offset = [], 0
    for run in ragged.runs:
        tokens = sum(span.count for span in run)
        own = query[0, :, offset : offset + tokens]
        parts.append(_attend_run(own, keys, values, run, ragged, scaling, sliding_window))
        offset += tokens
    return torch.cat(parts)[None], None


def _attend_run(
    query: Tensor, keys: Tensor, values: Tensor, run: Run, ragged: Pass, scaling: float | None, window: int | None
) -> Tensor:
    """(heads, tokens, head size) -> (tokens, heads, head size).

    Heads that share keys are laid out as further queries of the same head: nothing is repeated in memory.
    """
    (heads, tokens, size), shared = query.shape, keys.shape[1]
    group, spans = heads // shared, len(run)
    held = slice(run[0].slot, run[-1].slot + 1)
    seen = slice(_first_key(run, window), max(span.end for span in run))
    by_span = query.reshape(shared, group, spans, tokens // spans, size).permute(2, 0, 1, 3, 4)
    output = F.scaled_dot_product_attention(
        by_span.reshape(spans, shared, -1, size),
        keys[held, :, seen],
        values[held, :, seen],
        attn_mask=ragged.mask(run, window, group, query),
        scale=scaling,
    )
    return output.reshape(spans, heads, -1, size).transpose(1, 2).reshape(tokens, heads, size)
