"""A new model from pretrained parts: a ConvNeXt encoder and a causal language model.

assembly = convllava.build(vision="facebook/convnext-large-224", language="lmsys/vicuna-7b-v1.5")
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import convllava.model.auto  # noqa: F401  the Auto classes must know the model
from convllava.checkpoints.tensors import tensor_files, tensors_in
from convllava.errors import CheckpointError, ConfigError
from convllava.io import one_line, read_json
from convllava.model.config import ConvLlavaConfig, ConvLlavaVisionConfig
from convllava.model.image_processing import ConvLlavaImageProcessorPil
from convllava.model.modeling import ConvLlavaForConditionalGeneration, check_embeddings
from convllava.model.part_names import part_of
from convllava.model.processing import ConvLlavaProcessor
from convllava.model.prompt_templates import template

STAGE5_DEPTH = 6
"""Blocks of the published fifth stage. It is twice as wide as the fourth."""


@dataclass(frozen=True)
class Assembly:
    """A model built from pretrained parts, and where every tensor came from.

    Attributes:
        loaded, new, left_over: Names of the tensors that were taken from the parts, that were initialised, and that are
            in the parts but not in the model.
    """

    model: ConvLlavaForConditionalGeneration
    processor: ConvLlavaProcessor
    loaded: list[str]
    new: list[str]
    left_over: list[str]

    def table(self) -> Table:
        """Return the number of tensors by part: loaded, new, left over."""
        table = Table(title="what the model is made of", title_justify="left")
        for title in ("tensors of", "loaded", "new", "left over"):
            table.add_column(title, justify="left" if title == "tensors of" else "right")
        rows: dict[str, list[int]] = {}
        for column, names in enumerate((self.loaded, self.new, self.left_over)):
            for name in names:
                row = f"encoder {name.split('.')[0]}" if names is self.left_over else part_of(name)
                rows.setdefault(row, [0, 0, 0])[column] += 1
        for row, counts in rows.items():
            table.add_row(row, *(str(count) if count else "" for count in counts))
        return table


def build(
    *,
    vision: str | Path | Mapping[str, Tensor],
    language: str | Path,
    stage5_depth: int = STAGE5_DEPTH,
    pixels: Mapping[str, Any] | None = None,
    row_separator: bool = True,
    coordinate_embedding: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Assembly:
    """Build a model that is ready for stage 1: a pretrained four-stage ConvNeXt with a new fifth stage, a new projector
    and a pretrained causal language model.

    Args:
        vision: Folder of a Hugging Face `convnext` or `dinov3_convnext`; or the tensors of a timm or open_clip
            ConvNeXt.
        language: Folder or hub id of a causal language model with its tokenizer.
        stage5_depth: Blocks of the new stage, which is twice as wide as the fourth; 0 keeps four stages.
        pixels: Settings of `ConvLlavaImageProcessorPil`. Mean and standard deviation default to those in the encoder's
            folder, else to CLIP's.
        row_separator, coordinate_embedding: See `ConvLlavaConfig`.
        dtype: Precision of the weights.
        seed: Seed of the new weights.

    Raises:
        CheckpointError: if there is no ConvNeXt, a tensor has a wrong shape, or the head of the language model is not a
            plain linear layer.
        ConfigError: if `stage5_depth` does not fit the encoder.
    """
    tower, left_over, statistics = _encoder_tensors(vision)
    causal, tokenizer = _language_model(language, dtype)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    blocks: dict[int, list[int]] = {}  # of each stage the channels of each block
    for name, tensor in tower.items():
        if match := re.fullmatch(r"encoder\.stages\.(\d)\.layers\.\d+\.dwconv\.weight", name):
            blocks.setdefault(int(match[1]), []).append(tensor.shape[0])
    widths, depths = [blocks[stage][-1] for stage in sorted(blocks)], [len(blocks[stage]) for stage in sorted(blocks)]
    if stage5_depth and len(widths) != 4:
        raise ConfigError(f"vision: the encoder has {len(widths)} stages, not four; `stage5_depth` 0 keeps its stages")
    if stage5_depth:
        widths, depths = [*widths, 2 * widths[-1]], [*depths, stage5_depth]
    config = ConvLlavaConfig(
        vision_config=ConvLlavaVisionConfig(depths=depths, hidden_sizes=widths),
        text_config=causal.config.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        row_separator=row_separator,
        coordinate_embedding=coordinate_embedding,
    )
    torch.manual_seed(seed)
    model = ConvLlavaForConditionalGeneration(config).to(dtype)  # type: ignore[arg-type]  # a decorated method loses self
    tensors = {f"model.vision_tower.{name}": tensor for name, tensor in tower.items()}
    tensors |= {f"model.language_model.{name}": tensor for name, tensor in causal.base_model.state_dict().items()}
    tensors["lm_head.weight"] = causal.get_output_embeddings().weight
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name not in own:
            raise CheckpointError(f"the model has no tensor {name}")
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name} has the shape {list(tensor.shape)}, but the model needs {list(own[name].shape)}"
            )
    new = [name for name in own if name not in tensors]
    for name in new:
        if name.startswith("model.vision_tower.") and not (stage5_depth and ".stages.4." in name):
            raise CheckpointError(f"vision: the encoder lacks {name.removeprefix('model.vision_tower.')}")
    model.load_state_dict(tensors, strict=False)
    # Keep only the special tokens: penalties and temperature were chosen for the language model's own conversations.
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{key: getattr(causal.generation_config, key) for key in special})
    settings = {"stride": config.vision_config.stride, **statistics, **dict(pixels or {})}
    return Assembly(model, _processor(tokenizer, settings, row_separator), list(tensors), new, left_over)


def build_processor(
    language: str | Path, *, pixels: Mapping[str, Any], row_separator: bool = True
) -> ConvLlavaProcessor:
    """Build the processor of `build` without loading any weights.

    Args:
        language: Folder or hub id with a tokenizer.
        pixels: Settings of `ConvLlavaImageProcessorPil`; mean and standard deviation default to CLIP's.
        row_separator: See `ConvLlavaConfig`.

    Raises:
        CheckpointError: if there is no tokenizer.
    """
    tokenizer = _tokenizer(language)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    return _processor(tokenizer, pixels, row_separator)


def _processor(tokenizer: Any, pixels: Mapping[str, Any], row_separator: bool) -> ConvLlavaProcessor:
    prompt = template("v1", bos="(bos_token or '')", eos="eos_token")
    return ConvLlavaProcessor(
        ConvLlavaImageProcessorPil(**pixels), tokenizer, chat_template=prompt, row_separator=row_separator
    )


def rename_encoder(name: str) -> str | None:
    """Return our name of a tensor of a Hugging Face, DINOv3, timm or open_clip ConvNeXt; None if the tower lacks it."""
    name = name.removeprefix("module.").removeprefix("visual.trunk.").removeprefix("model.").removeprefix("convnext.")
    for pattern, replacement in _ENCODER_NAMES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            name = renamed
            break
    for old, new in _BLOCK_NAMES.items():
        name = name.replace(old, new)
    known = name.startswith("embeddings.") or re.match(r"encoder\.stages\.\d\.(downsampling_layer|layers)\.", name)
    return name if known else None


_ENCODER_NAMES = (
    (r"^(?:stem|stages\.0\.downsample_layers)\.0\.", "embeddings.patch_embeddings."),
    (r"^(?:stem|stages\.0\.downsample_layers)\.1\.", "embeddings.layernorm."),
    (r"^stages\.(\d)\.downsample(?:_layers)?\.", r"encoder.stages.\1.downsampling_layer."),
    (r"^stages\.(\d)\.(?:blocks|layers)\.", r"encoder.stages.\1.layers."),
)
_BLOCK_NAMES = {
    ".gamma": ".layer_scale_parameter",
    ".conv_dw.": ".dwconv.",
    ".depthwise_conv.": ".dwconv.",
    ".norm.": ".layernorm.",
    ".layer_norm.": ".layernorm.",
    ".mlp.fc1.": ".pwconv1.",
    ".mlp.fc2.": ".pwconv2.",
    ".pointwise_conv1.": ".pwconv1.",
    ".pointwise_conv2.": ".pwconv2.",
}


def _encoder_tensors(vision: str | Path | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str], dict[str, Any]]:
    """Return the encoder's tensors under our names, the names of unused tensors, and mean and standard deviation of
    its pixels."""
    statistics: dict[str, Any] = {}
    if isinstance(vision, Mapping):
        pairs = list(vision.items())
    else:
        folder = Path(vision)
        pairs = [pair for path in tensor_files(folder) for pair in tensors_in(path).items()]
        preprocessor = folder / "preprocessor_config.json"
        if preprocessor.is_file():
            content = read_json(preprocessor)
            statistics = {key: content[key] for key in ("image_mean", "image_std") if key in content}
    renamed = [(rename_encoder(name), name, tensor) for name, tensor in pairs]
    found = {new: tensor for new, _, tensor in renamed if new is not None}
    if "embeddings.patch_embeddings.weight" not in found:
        raise CheckpointError("vision: there is no ConvNeXt in it; give a Hugging Face, timm or open_clip one")
    return found, [name for new, name, _ in renamed if new is None], statistics


def _language_model(language: str | Path, dtype: torch.dtype) -> tuple[Any, Any]:
    try:
        causal = AutoModelForCausalLM.from_pretrained(language, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"language: {language} does not load as a causal language model: {one_line(error)}"
        ) from None
    tokenizer = _tokenizer(language)
    head, config = causal.get_output_embeddings(), causal.config
    scales = [getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling")]
    if getattr(head, "bias", None) is not None or getattr(config, "final_logit_softcapping", None) or scales != [1, 1]:
        raise CheckpointError(f"language: the head of {config.model_type} is more than a linear layer without bias")
    check_embeddings(causal.base_model)
    if len(tokenizer) < 0.5 * config.vocab_size:
        raise CheckpointError(
            f"language: the tokenizer in {language} has {len(tokenizer)} tokens, but the model knows "
            f"{config.vocab_size}; a file of the tokenizer is missing"
        )
    return causal, tokenizer


def _tokenizer(language: str | Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(language, padding_side="left")
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise CheckpointError(f"language: {language} has no tokenizer that loads: {one_line(error)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer
