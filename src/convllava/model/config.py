"""The configurations of the vision tower and of the whole model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING


@strict
class ConvLlavaVisionConfig(PreTrainedConfig):
    """A ConvNeXt with four or more stages; by default the five stages of ConvLLaVA.

    Args:
        depths: Blocks in each stage. The default is ConvNeXt-L with the published fifth stage.
        hidden_sizes: Channels of each stage, as many as `depths`.
        num_channels: Channels of the image.
        patch_size: Side of the stem's patches in pixels; every further stage halves the grid.
        hidden_act: Activation inside the blocks.
        layer_norm_eps: Epsilon of every LayerNorm (1e-6 in all published ConvNeXt checkpoints).
        layer_scale_init_value: Initial LayerScale of new blocks.
        initializer_range: Standard deviation of new weights (ConvNeXt, arXiv 2201.03545, appendix A.1).

    Raises:
        ValueError: if there are fewer than four stages, or `depths` and `hidden_sizes` differ in length.
    """

    model_type = "convllava_vision"
    base_config_key = "vision_config"

    depths: list[int] | tuple[int, ...] = (3, 3, 27, 3, 6)
    hidden_sizes: list[int] | tuple[int, ...] = (192, 384, 768, 1536, 3072)
    num_channels: int = 3
    patch_size: int = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    layer_scale_init_value: float = 1e-6
    initializer_range: float = 0.02

    def validate_architecture(self) -> None:
        """Check the stages; `@strict` calls this after every construction."""
        if len(self.depths) != len(self.hidden_sizes) or len(self.depths) < 4:
            raise ValueError(
                f"the tower needs four or more stages with a depth and a width each; "
                f"got depths {tuple(self.depths)} and hidden_sizes {tuple(self.hidden_sizes)}"
            )

    @property
    def num_stages(self) -> int:
        return len(self.depths)

    @property
    def hidden_size(self) -> int:
        """Channels of the last feature map, which the projector reads."""
        return self.hidden_sizes[-1]

    @property
    def stride(self) -> int:
        """Pixels per visual token along one side: 64 for five stages."""
        return self.patch_size * 2 ** (self.num_stages - 1)


@strict
class ConvLlavaConfig(PreTrainedConfig):
    """A vision tower, a two-layer projector and any Hugging Face causal language model.

    Args:
        vision_config: The tower; a dict becomes a `ConvLlavaVisionConfig`.
        text_config: Any causal language model's configuration; a dict is resolved by its `model_type` (default llama).
        image_token_id: Id of the placeholder of one visual token.
        projector_hidden_act: Activation between the projector's two linear layers.
        row_separator: If True, a learned embedding ends every row of visual tokens. A model that sees native aspect
            ratios needs it to know where rows end. Official checkpoints, trained on squares, have none.
        coordinate_embedding: If True, a learned projection of its normalised coordinates is added to every visual
            token. A convolution can derive positions only from the edges of the image; with the embedding a model
            learns positions and boxes much sooner. Official checkpoints have none.
    """

    model_type = "convllava"
    sub_configs = {"vision_config": ConvLlavaVisionConfig, "text_config": AutoConfig}  # type: ignore[dict-item]  # as in transformers

    vision_config: Any = None
    text_config: Any = None
    image_token_id: int = 32000
    projector_hidden_act: str = "gelu"
    row_separator: bool = False
    coordinate_embedding: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None or isinstance(self.vision_config, dict):
            self.vision_config = ConvLlavaVisionConfig(**(self.vision_config or {}))
        if self.text_config is None or isinstance(self.text_config, dict):
            settings = dict(self.text_config or {})
            self.text_config = CONFIG_MAPPING[settings.pop("model_type", "llama")](**settings)
        # Tying is a property of the language model, but generation and saving read it from the outer configuration.
        self.tie_word_embeddings = bool(self.tie_word_embeddings or self.text_config.tie_word_embeddings)
        super().__post_init__(**kwargs)
