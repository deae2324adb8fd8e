"""The model: vision tower -> projector -> language model."""

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from convllava.errors import ConfigError, InputError
from convllava.geometry import Size
from convllava.model.config import ConvLlavaConfig
from convllava.model.vision_tower import ConvLlavaVisionModel, ConvLlavaVisionOutput


@dataclass
class ConvLlavaImageFeatures(ConvLlavaVisionOutput):
    """Output of the tower and of the projector.

    Attributes:
        pooler_output: One (visual tokens, LLM width) tensor per image; with row separators, one more token per row.
            `generate` and vLLM look for image features under this name.
    """

    pooler_output: list[Tensor] = None  # type: ignore[assignment]  # ModelOutput demands defaults


@dataclass
class ConvLlavaModelOutputWithPast(BaseModelOutputWithPast):
    """Output of the model without its head, with the visual tokens (one tensor per image)."""

    image_hidden_states: list[Tensor] | None = None


@dataclass
class ConvLlavaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of the whole model, with the visual tokens (one tensor per image)."""

    image_hidden_states: list[Tensor] | None = None


_CACHE = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in ("cache", "past_key_values"))
"""Name of the keys and values in transformers: `cache` since 5.23, `past_key_values` before."""
_OCTAVES = 4
"""Frequencies per coordinate in `coordinate_features`."""


def coordinate_features(grid: Size, device: torch.device) -> Tensor:
    """Encode the position of each cell's centre: (rows * columns, 16), row by row.

    The features are sines and cosines of pi * 2^k * u for k = 0..3, where u is the normalised vertical and horizontal
    coordinate: positional encodings (arXiv 1706.03762) of coordinates that do not depend on the image's shape.
    """
    axes = [(torch.arange(count, device=device) + 0.5) / count for count in grid]
    angles = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)[..., None]
    angles = (angles * torch.pi * 2.0 ** torch.arange(_OCTAVES, device=device)).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ConvLlavaMultiModalProjector(nn.Module):
    """Two linear layers with an activation between them (`mlp2x_gelu`).

    Optionally it adds the coordinates of each token and a learned separator after each row.
    """

    def __init__(self, config: ConvLlavaConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width)
        self.row_separator = nn.Parameter(torch.zeros(width)) if config.row_separator else None
        self.coordinates = nn.Linear(4 * _OCTAVES, width, bias=False) if config.coordinate_embedding else None

    def forward(self, features: ConvLlavaVisionOutput) -> list[Tensor]:
        """Project feature maps to one (visual tokens, LLM width) tensor per image, row by row."""
        tokens = self.content(features)
        if self.coordinates is not None:
            places = torch.cat([coordinate_features(grid, tokens.device) for grid in features.grids])
            tokens = tokens + self.coordinates(places.to(tokens.dtype))
        maps = ConvLlavaVisionOutput(tokens, features.grids).maps()
        if self.row_separator is not None:
            separator = self.row_separator.to(tokens.dtype)
            maps = [torch.cat([rows, separator.expand(rows.shape[0], 1, -1)], dim=1) for rows in maps]
        return [rows.flatten(0, 1) for rows in maps]

    def content(self, features: ConvLlavaVisionOutput) -> Tensor:
        """Project the content of all cells, without coordinates and separators: (all cells, LLM width)."""
        tokens = self.linear_2(self.act(self.linear_1(features.last_hidden_state)))
        # Without this norm the content grows in training until the coordinates are too small to matter.
        return tokens if self.coordinates is None else F.rms_norm(tokens, tokens.shape[-1:])


class ConvLlavaPreTrainedModel(PreTrainedModel):
    config: ConvLlavaConfig
    config_class = ConvLlavaConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["ConvLlavaVisionLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ConvLlavaMultiModalProjector) and module.row_separator is not None:
            init.normal_(module.row_separator, std=self.config.text_config.initializer_range)


def check_embeddings(language_model: nn.Module) -> None:
    """Check that the word embeddings are in `embed_tokens`, where `lm_head` can be tied to them.

    Raises:
        ConfigError: if this family of language models has them elsewhere.
    """
    if not hasattr(language_model, "embed_tokens"):
        config: Any = language_model.config
        raise ConfigError(
            f"language: {config.model_type} keeps its embeddings elsewhere than in embed_tokens; use a family such as "
            "llama, qwen2, mistral or gemma"
        )


class ConvLlavaModel(ConvLlavaPreTrainedModel):
    """Tower, projector and language model without its head."""

    def __init__(self, config: ConvLlavaConfig) -> None:
        super().__init__(config)
        self.vision_tower = ConvLlavaVisionModel._from_config(config.vision_config)
        self.multi_modal_projector = ConvLlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        check_embeddings(self.language_model)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor | list[Tensor], image_sizes: Tensor | None = None, **kwargs: Any
    ) -> ConvLlavaImageFeatures:
        """Encode images into visual tokens: `.pooler_output` has one (visual tokens, LLM width) tensor per image.

        Args:
            pixel_values, image_sizes: See `ConvLlavaVisionModel.forward`; the image processor returns both.
        """
        features = self.vision_tower(pixel_values, image_sizes)
        return ConvLlavaImageFeatures(
            last_hidden_state=features.last_hidden_state,
            grids=features.grids,
            pooler_output=self.multi_modal_projector(features),
        )

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """Return the (batch, sequence, 1) mask of the image placeholders.

        Raises:
            InputError: if placeholders and visual tokens differ in number.
        """
        if input_ids is not None:
            mask = input_ids == self.config.image_token_id
        else:
            embeddings: Any = self.get_input_embeddings()
            if self.config.image_token_id >= len(embeddings.weight):
                raise InputError("image placeholders cannot be found in `inputs_embeds`; give `input_ids` instead")
            token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        if int(mask.sum()) != image_features.shape[0]:
            raise InputError(
                f"the prompt has {int(mask.sum())} image placeholder tokens but the images give "
                f"{image_features.shape[0]} visual tokens; let the processor write the placeholders"
            )
        return mask.unsqueeze(-1)

    def _with_image_side(self, inputs_embeds: Tensor) -> Tensor:
        """Return the same values, but let them depend on the trainable weights of tower and projector.

        Without this a batch of text alone would have no gradient if only these weights train, and its process would not
        take part when several processes add up their gradients. If the processes shard the weights, this process must
        also provide its shards for the images of the others: it encodes the smallest possible image.
        """
        if self._is_sharded():
            channels, stride = self.config.vision_config.num_channels, self.config.vision_config.stride
            features = self.get_image_features([inputs_embeds.new_zeros(channels, stride, stride)], return_dict=True)
            return inputs_embeds + 0.0 * torch.cat(features.pooler_output).sum().to(inputs_embeds.dtype)
        parts = (self.multi_modal_projector, self.vision_tower)
        training = [weight.flatten()[0] for part in parts for weight in part.parameters() if weight.requires_grad]
        return inputs_embeds + 0.0 * torch.stack(training).sum() if training else inputs_embeds

    def _is_sharded(self) -> bool:
        """Return whether FSDP2 or ZeRO-3 shards the tower's weights over several processes."""
        stages: Any = self.vision_tower.encoder.stages
        layer = stages[-1].layers[-1]
        return isinstance(layer, FSDPModule) or hasattr(next(layer.parameters()), "ds_id")

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | list[Tensor] | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, ConvLlavaImageFeatures] | None = None,
        **kwargs: Any,
    ) -> ConvLlavaModelOutputWithPast:
        """Replace the placeholders by the visual tokens and run the language model.

        `mm_encoder_outputs["image"]` takes the result of `get_image_features` instead of pixels. For other arguments
        see `ConvLlavaForConditionalGeneration.forward`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            # In published checkpoints the placeholder is not in the vocabulary, so it is never looked up.
            text_ids = input_ids.masked_fill(input_ids == self.config.image_token_id, 0)
            inputs_embeds = self.get_input_embeddings()(text_ids)
        assert inputs_embeds is not None
        features = (mm_encoder_outputs or {}).get("image")
        if features is None and pixel_values is not None and len(pixel_values):
            features = self.get_image_features(pixel_values, image_sizes, return_dict=True)
        cache = past_key_values if cache is None else cache
        is_prefill = cache is None or cache.get_seq_length() == 0
        if features is not None:
            tokens = torch.cat(features.pooler_output).to(inputs_embeds)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, tokens)
            inputs_embeds = inputs_embeds.masked_scatter(mask, tokens)
        elif input_ids is not None and is_prefill:
            self.get_placeholder_mask(input_ids, inputs_embeds, inputs_embeds.new_empty(0))
        if features is None and (self.training or (is_prefill and self._is_sharded())):
            inputs_embeds = self._with_image_side(inputs_embeds)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **{_CACHE: cache},
            **kwargs,
        )
        return ConvLlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=None if features is None else features.pooler_output,
            **{_CACHE: getattr(outputs, _CACHE)},
        )


class ConvLlavaForConditionalGeneration(ConvLlavaPreTrainedModel, GenerationMixin):
    """The whole model: it answers prompts of text and images with text."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: ConvLlavaConfig) -> None:
        super().__init__(config)
        self.model = ConvLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_image_features(
        self, pixel_values: Tensor | list[Tensor], image_sizes: Tensor | None = None, **kwargs: Any
    ) -> ConvLlavaImageFeatures:
        """See `ConvLlavaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_sizes, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | list[Tensor] | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, ConvLlavaImageFeatures] | None = None,
        **kwargs: Any,
    ) -> ConvLlavaCausalLMOutputWithPast:
        """Run the model over text and images.

        Args:
            input_ids: (batch, sequence), with one image placeholder per visual token.
            pixel_values: (images, channels, height, width), padded to the largest image, or a list of images.
            image_sizes: (images, 2), height and width of each image without padding.
            past_key_values: Keys and values of earlier tokens; `cache` is their name since transformers 5.23.
            labels: (batch, sequence), -100 for tokens that are not supervised; the loss is the mean over the others.
            logits_to_keep: Compute logits for the last positions only, this many (0: all).

        Raises:
            InputError: if placeholders and visual tokens differ in number, or a side of an image is not a multiple of
                the stride.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, positions])
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return ConvLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **{_CACHE: getattr(outputs, _CACHE)},
        )
