"""One pass of a language model over tokens of many sequences, each with its own keys and values.

The tokens lie behind one another in a batch of one, so that every layer but attention is one product for all of them,
with no padding between long and short. Attention alone looks at each sequence by itself: it is reached through
transformers' attention interface, so that any causal language model which uses that interface can be run this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from convllava.errors import InputError
from convllava.inference.ragged_attention import NAME, KeyValues, Pass, Span, register


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
        register()
        self._check_positions()
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
        places = [(span.slot, position) for span in spans for position in range(span.start, span.end)]
        slots, positions = torch.tensor(places, device=self.device).unbind(1)
        ragged = Pass(self.cache, spans, slots, positions)
        output = self._decode(embeddings[None], positions[None], ragged)
        ends = torch.tensor([span.count for span in spans], device=self.device).cumsum(0) - 1
        return self.head(output[0, ends]).float()

    def _decode(self, embeddings: Tensor, positions: Tensor, ragged: Pass) -> Tensor:
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

    def _check_positions(self) -> None:
        """Refuse rotary embeddings whose angles change with the longest sequence of a pass, in which others are."""
        config = self.decoder.config
        for rope in _ropes(config):
            kind, trained = rope.get("rope_type"), rope.get("original_max_position_embeddings")
            most = trained or config.max_position_embeddings
            if kind in ("dynamic", "longrope") and self.cache.length > most:
                raise InputError(
                    f"{_kind(self.decoder)} with rope_type {kind} turns positions by the longest of several texts; "
                    f"give a context of at most {most} tokens, not {self.cache.length}"
                )

    @torch.inference_mode()
    def _check(self) -> None:
        """Compare a few tokens in two spans with the model's own forward pass."""
        count = min(8, self.cache.length)
        ids = torch.arange(count, device=self.device) % self.decoder.config.vocab_size
        embeddings = self.embed(ids)
        expected = self.head(self.decoder(inputs_embeds=embeddings[None], use_cache=False).last_hidden_state[0, -1:])
        try:
            self._check_windows(embeddings)
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

    def _check_windows(self, embeddings: Tensor) -> None:
        """Refuse models that keep a window in their mask alone, in whose place ours stands."""
        config, count = self.decoder.config, len(embeddings)
        places = torch.arange(count, device=self.device)
        ragged = Pass(self.cache, [Span(0, 0, count)], torch.zeros_like(places), places)
        self._decode(embeddings[None], places[None], ragged)
        types = getattr(config, "layer_types", None) or []
        windowed = {number for number, kind in enumerate(types) if kind in ("sliding_attention", "chunked_attention")}
        window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
        if not types and window:
            windowed = set(ragged.windows)
        told = {number for number, size in ragged.windows.items() if size is not None}
        if windowed - told and self.cache.length > (window or 0):
            raise InputError(f"{_kind(self.decoder)} does not tell attention how far it sees, and a context is longer")


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Settings of rotary embeddings: one for all layers, or one for each kind of layer."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [found] if "rope_type" in found else [each for each in found.values() if isinstance(each, dict)]


def _kind(decoder: PreTrainedModel) -> str:
    return f"a language model of type {decoder.config.model_type}"


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
