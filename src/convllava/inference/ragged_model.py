"""One pass of a language model over tokens of many sequences, each with its own keys and values.

The tokens are concatenated in a batch of one. So every layer except attention is one product for all of them, without
padding between long and short sequences. Only attention treats each sequence separately. It is reached through the
attention interface of transformers, so any causal language model that uses this interface can run this way.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from convllava.errors import ConfigError, InputError
from convllava.inference.ragged_attention import NAME, KeyValues, RaggedBatch, Span, register


class RaggedModel:
    """A language model that takes spans of many sequences at once. Its own `forward` and `generate` work as before.

    Args:
        decoder: The model without its head.
        head: Maps hidden states to logits.
        slots: Number of sequences whose keys and values are kept.
        length: Most tokens of a sequence.

    Raises:
        InputError: if the model does not use the attention interface of transformers, keeps state other than keys and
            values, or changes its positions with the longest sequence of a batch.
    """

    def __init__(self, decoder: PreTrainedModel, head: nn.Module, slots: int, length: int) -> None:
        self.decoder, self.head = decoder, head
        self.cache = KeyValues(slots, length)
        self.device = next(decoder.parameters()).device
        self._kind = f"a language model of type {decoder.config.model_type}"
        register()
        self._check()

    def embed(self, ids: Tensor) -> Tensor:
        """Look up embeddings: (tokens,) -> (tokens, width)."""
        return self.decoder.get_input_embeddings()(ids)

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span], embeddings: Tensor) -> Tensor:
        """Run the tokens of the spans, keep their keys and values, and predict the token after each span.

        Args:
            spans: At most one per slot.
            embeddings: (tokens of all spans, width), in the order of the spans.

        Returns:
            (spans, vocabulary) float32 logits.
        """
        places = [(span.slot, position) for span in spans for position in range(span.start, span.end)]
        slots, positions = torch.tensor(places, device=self.device).unbind(1)
        output = self._decode(embeddings[None], positions[None], RaggedBatch(self.cache, spans, slots, positions))
        ends = torch.tensor([span.count for span in spans], device=self.device).cumsum(0) - 1
        return self.head(output[0, ends]).float()

    def _decode(self, embeddings: Tensor, positions: Tensor, ragged: RaggedBatch) -> Tensor:
        before = self.decoder.config._attn_implementation
        self.decoder.config._attn_implementation = NAME
        try:
            # transformers uses a mask with four dimensions unchanged; our attention makes its own mask for each span.
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
        """Reject models that this class cannot run, by their configuration and by comparing a few tokens."""
        config = self.decoder.config
        # Angles of rotary embeddings must not change with the longest sequence of a pass. There is one setting for all
        # layers, or one for each kind of layer.
        found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        for rope in [found] if "rope_type" in found else [each for each in found.values() if isinstance(each, dict)]:
            longest = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            if rope.get("rope_type") in ("dynamic", "longrope") and self.cache.length > longest:
                raise ConfigError(
                    f"{self._kind} with rope_type {rope['rope_type']} changes its positions with the longest of "
                    f"several texts; give a `context` of at most {longest} tokens, not {self.cache.length}"
                )
        count = min(8, self.cache.length)
        positions = torch.arange(count, device=self.device)
        embeddings = self.embed(positions % config.vocab_size)
        expected = self.head(self.decoder(inputs_embeds=embeddings[None], use_cache=False).last_hidden_state[0, -1:])
        try:
            ragged = RaggedBatch(self.cache, [Span(0, 0, count)], torch.zeros_like(positions), positions)
            self._decode(embeddings[None], positions[None], ragged)
            # A sliding window must reach our attention, which does not use the model's mask.
            types = getattr(config, "layer_types", None) or []
            windowed = {layer for layer, kind in enumerate(types) if kind in ("sliding_attention", "chunked_attention")}
            window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
            if not types and window:
                windowed = set(ragged.windows)
            passed = {layer for layer, size in ragged.windows.items() if size is not None}
            if windowed - passed and self.cache.length > (window or 0):
                raise InputError(f"{self._kind} does not pass its sliding window to attention; the context is longer")
            self.forward([Span(0, 0, count // 2)], embeddings[: count // 2])
            result = self.forward([Span(0, count // 2, count - count // 2)], embeddings[count // 2 :])
        except InputError:
            raise
        except Exception as error:  # an unsupported model may raise anything
            raise InputError(f"{self._kind} cannot decode several texts at once: {error}") from error
        tolerance = 0.05 * float(expected.float().std()) + 1e-5
        if not torch.allclose(result, expected.float(), rtol=0.05, atol=tolerance):
            raise InputError(
                f"{self._kind} gives other numbers when it decodes several texts at once; it keeps state other than "
                "keys and values, or does not use the attention interface of transformers"
            )


@torch.no_grad()
def store_by_columns(*modules: nn.Module) -> None:
    """Store the weights of all linear layers in memory as (in, out). The values stay the same.

    A CPU then reads them faster if a product has few rows. A head that shares its weight with an embedding gets its own
    copy, so use this only for models that decode, and do not train or save them afterwards.
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
