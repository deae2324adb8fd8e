"""Attention over tokens of many sequences in one pass: each sequence attends only to its own keys and values.

If several sequences in neighbouring slots have one token each in the pass, as they do while answers are written, they
share one call. For a short sequence a call costs more than its computation.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
"""Arguments that some models pass to attention and that change its result."""
_CALL = 256
"""Saving one call is worth this many masked tokens (measured on a CPU with head sizes 32 and 64)."""


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence in a pass: `count` tokens after the `start` tokens that its slot holds already."""

    slot: int
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


class KeyValues:
    """Keys and values of `slots` sequences of at most `length` tokens, layer by layer.

    A layer is (slots, heads, length, head size). It is allocated at its first use, because only the model knows its
    sizes. On a CPU the operating system allocates memory when it is first written, so that short conversations use
    little of it.
    """

    def __init__(self, slots: int, length: int) -> None:
        self.slots, self.length = slots, length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer, sized like `key` and `value`: (1, heads, tokens, head size)."""
        if index not in self._layers:
            # Zeros, because a masked row is multiplied by its weight 0, so it must be finite.
            shape = (self.slots, key.shape[1], self.length, key.shape[3])
            if key.device.type == "cpu":
                # torch would write the zeros; memory from the system is zero without being written.
                size = math.prod(shape) * key.element_size()
                memory = [torch.frombuffer(mmap.mmap(-1, size), dtype=key.dtype) for _ in range(2)]
                self._layers[index] = (memory[0].view(shape), memory[1].view(shape))
            else:
                self._layers[index] = (key.new_zeros(shape), key.new_zeros(shape))
        return self._layers[index]

    def clear(self) -> None:
        """Free all keys and values."""
        self._layers.clear()

    @torch.inference_mode()
    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` tokens of one slot to another."""
        for pair in self._layers.values():
            for rows in pair:
                rows[target, :, :count] = rows[source, :, :count]


Run = tuple[Span, ...]
"""Spans that share a call: one of any length, or several of one token each in neighbouring slots."""


@dataclass
class RaggedBatch:
    """The sequences of one pass, for the attention of every layer.

    Attributes:
        cache: Keys and values of all slots.
        spans: Spans in the order of the pass's tokens.
        slots, positions: (tokens,) slot and position of each token.
        windows: Sliding window that each layer passed to attention, in tokens.
    """

    cache: KeyValues
    spans: Sequence[Span]
    slots: Tensor
    positions: Tensor
    windows: dict[int, int | None] = field(default_factory=dict)
    _masks: dict[tuple[Run, int | None, int], Tensor | None] = field(default_factory=dict)

    @cached_property
    def runs(self) -> list[Run]:
        """Spans grouped by calls."""
        return _runs(self.spans)

    def mask(self, run: Run, window: int | None, group: int, like: Tensor) -> Tensor | None:
        """Return the additive mask of a run: (spans, 1, group * count, keys from `_first_key` on).

        All layers with the same window share it.

        Args:
            window: Number of tokens that a token attends to; None means all.
            group: Query heads per key head.
            like: A tensor with the dtype of the scores.

        Returns:
            None if every token attends to all these keys.
        """
        key = (run, window, group)
        if key not in self._masks:
            added = None
            if run[0].count > 1 or len({span.end for span in run}) > 1:
                starts = torch.tensor([span.start for span in run], device=like.device)
                queries = starts[:, None, None] + torch.arange(run[0].count, device=like.device)[:, None]
                keys = torch.arange(_first_key(run, window), max(span.end for span in run), device=like.device)
                hidden = keys > queries
                if window is not None:
                    hidden |= keys <= queries - window
                scores = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -math.inf)
                added = scores.repeat(1, group, 1)[:, None]
            self._masks[key] = added
        return self._masks[key]


def _runs(spans: Sequence[Span]) -> list[Run]:
    """Group spans that can share a call, if padding to the longest costs less than the calls saved."""
    runs: list[Run] = []
    for span in spans:
        run = (*runs[-1], span) if runs else (span,)
        ends = [span.end for span in run]
        if (
            len(run) > 1
            and all(span.count == 1 for span in run)
            and run[-1].slot == run[-2].slot + 1
            and len(run) * max(ends) - sum(ends) <= _CALL * (len(run) - 1)
        ):
            runs[-1] = run
        else:
            runs.append((span,))
    return runs


def _first_key(run: Run, window: int | None) -> int:
    """Return the first key that any token of a run attends to."""
    return 0 if window is None else max(0, min(span.start for span in run) + 1 - window)


def register() -> None:
    """Register `attend` with transformers under `NAME`."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    ragged: RaggedBatch | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention of (1, heads, tokens, head size) queries, each span to its own slot (transformers' interface).

    Returns:
        (1, tokens, heads, head size), and None for the attention weights.

    Raises:
        InputError: if the model's attention has a feature that is not supported here.
    """
    if ragged is None:  # a forward pass of the model itself
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise InputError(f"attention with {name} cannot decode several texts at once")
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # transformers sets it; nn.Module does not declare it
    ragged.windows[layer] = sliding_window
    keys, values = ragged.cache.layer(layer, key, value)
    keys[ragged.slots, :, ragged.positions] = key[0].transpose(0, 1)
    values[ragged.slots, :, ragged.positions] = value[0].transpose(0, 1)
    (heads, _, size), shared = query.shape[1:], key.shape[1]
    parts, offset = [], 0
    for run in ragged.runs:
        spans, tokens = len(run), sum(span.count for span in run)
        held = slice(run[0].slot, run[-1].slot + 1)
        seen = slice(_first_key(run, sliding_window), max(span.end for span in run))
        # Query heads that share keys become additional queries of the same head: no key is repeated in memory.
        queries = query[0, :, offset : offset + tokens].reshape(shared, heads // shared, spans, tokens // spans, size)
        output = F.scaled_dot_product_attention(
            queries.permute(2, 0, 1, 3, 4).reshape(spans, shared, -1, size),
            keys[held, :, seen],
            values[held, :, seen],
            attn_mask=ragged.mask(run, sliding_window, heads // shared, query),
            scale=scaling,
        )
        parts.append(output.reshape(spans, heads, -1, size).transpose(1, 2).reshape(tokens, heads, size))
        offset += tokens
    return torch.cat(parts)[None], None
