"""A model before its first stage: from nothing, or from a pretrained ConvNeXt and a pretrained language model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import convllava.model.auto  # noqa: F401  the Auto classes must know the model
from convllava.checkpoints.tensors import tensor_files, tensors_in
from convllava.errors import InputError
from convllava.io import one_line, read_json
from convllava.model.config import ConvLlavaConfig, ConvLlavaVisionConfig
from convllava.model.image_processing import ConvLlavaImageProcessorPil
from convllava.model.modeling import ConvLlavaForConditionalGeneration, check_embeddings
from convllava.model.processing import ConvLlavaProcessor
from convllava.model.prompt_templates import template
from convllava.model.tokenizer import COORDINATES, END, PAD, build_tokenizer

Parts = tuple[ConvLlavaForConditionalGeneration, ConvLlavaProcessor]
STAGE5_DEPTH = 6
"""Blocks of the published fifth stage, which is twice as wide as the fourth."""


def build_fresh(
    *,
    vision: dict[str, Any],
    language: dict[str, Any],
    pixels: dict[str, Any],
    words: Iterable[str],
    row_separator: bool = True,
    coordinate_embedding: bool = True,
    seed: int = 0,
) -> Parts:
    """A model with random weights and a processor with a spelling tokenizer, ready for the first stage.

    Args:
        vision: Settings of `ConvLlavaVisionConfig`.
        language: Settings of a causal language model; `model_type` names its family. The vocabulary is filled in.
        pixels: Settings of `ConvLlavaImageProcessorPil`; the stride is filled in.
        words: What the tokenizer knows as single tokens (see `tokenization.build_tokenizer`).
        seed: Of the weights.

    Raises:
        InputError: settings that make no model.
    """
    with _making():
        tower = ConvLlavaVisionConfig(**vision)
        tokenizer = build_tokenizer(words, context=language.get("max_position_embeddings", 2048))
        processor = ConvLlavaProcessor(
            ConvLlavaImageProcessorPil(**{**pixels, "stride": tower.stride}), tokenizer, row_separator=row_separator
        )
        ids = {
            "pad_token_id": tokenizer.convert_tokens_to_ids(PAD),
            "eos_token_id": tokenizer.convert_tokens_to_ids(END),
        }
        config = ConvLlavaConfig(
            vision_config=tower,
            text_config={**language, "vocab_size": len(tokenizer), "bos_token_id": None, **ids},
            image_token_id=processor.image_token_id,
            row_separator=row_separator,
            coordinate_embedding=coordinate_embedding,
        )
        torch.manual_seed(seed)
        model = ConvLlavaForConditionalGeneration(config)
    initialise_from_nothing(model.model.vision_tower)
    initialise_attention(model.model.language_model)
    tables: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    for rows in dict.fromkeys(table.weight for table in tables):  # one where they are tied
        initialise_coordinates(rows, [tokenizer.get_vocab()[text] for text in COORDINATES])
    for key, value in ids.items():
        setattr(model.generation_config, key, value)
    return model, processor


_STAGE5 = ".stages.4."
_UNMAKEABLE = (
    AttributeError,  # torch has no such dtype
    ValueError,
    TypeError,
    KeyError,
    ZeroDivisionError,
    RuntimeError,
    StrictDataclassError,
)


@contextmanager
def _making() -> Iterator[None]:
    """What transformers and torch raise over settings, as one line."""
    try:
        yield
    except InputError:
        raise
    except _UNMAKEABLE as error:
        told = repr(error) if isinstance(error, KeyError) else one_line(error)
        raise InputError(f"model: the settings of vision, language and pixels make no model: {told}") from error


@dataclass(frozen=True)
class Assembly:
    """A model put together from parts, and what became of every tensor.

    Attributes:
        loaded, new, left_over: Names of tensors: taken from the parts, initialised, found in the parts and not used.
    """

    model: ConvLlavaForConditionalGeneration
    processor: ConvLlavaProcessor
    loaded: list[str]
    new: list[str]
    left_over: list[str]

    def table(self) -> Table:
        """Numbers of tensors by part: loaded, new, left over."""
        table = Table(title="what the model is made of", title_justify="left")
        for title in ("tensors of", "loaded", "new", "left over"):
            table.add_column(title, justify="left" if title == "tensors of" else "right")
        groups: dict[str, list[int]] = {}
        for column, names in enumerate((self.loaded, self.new, self.left_over)):
            for name in names:
                groups.setdefault(_group(name), [0, 0, 0])[column] += 1
        for group, counts in groups.items():
            table.add_row(group, *(str(count) if count else "" for count in counts))
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
    """A model ready for stage 1: a pretrained four-stage ConvNeXt with a new fifth stage, a new projector, and a
    pretrained causal language model.

    Args:
        vision: Folder of a Hugging Face `convnext` or `dinov3_convnext`; or the tensors of a timm or open_clip
            ConvNeXt.
        language: Folder or hub id of a causal language model with its tokenizer.
        stage5_depth: Blocks of the new stage, twice as wide as the fourth; 0 keeps four stages.
        pixels: Settings of `ConvLlavaImageProcessorPil`; mean and deviation are those in the encoder's folder, else
            CLIP's.
        row_separator, coordinate_embedding: As of `ConvLlavaConfig`.
        seed: Of what is new.

    Raises:
        InputError: no ConvNeXt there, a tensor of another shape, or a language model whose head is not a plain linear
            layer.
    """
    tower, extra, statistics = _tower_tensors(vision)
    causal, tokenizer = _language_model(language, dtype)
    image_token_id = _add_image_token(tokenizer)
    widths, depths = _shape_of(tower)
    if stage5_depth and len(widths) != 4:
        raise InputError(f"vision: the encoder has {len(widths)} stages, not four; stage5_depth=0 takes it as it is")
    if stage5_depth:
        widths, depths = [*widths, 2 * widths[-1]], [*depths, stage5_depth]
    config = ConvLlavaConfig(
        vision_config=ConvLlavaVisionConfig(depths=depths, hidden_sizes=widths),
        text_config=causal.config.to_dict(),
        image_token_id=image_token_id,
        row_separator=row_separator,
        coordinate_embedding=coordinate_embedding,
    )
    torch.manual_seed(seed)
    model = ConvLlavaForConditionalGeneration(config).to(dtype)  # type: ignore[arg-type]  # a decorated method loses self
    tensors = {f"model.vision_tower.{name}": tensor for name, tensor in tower.items()} | _language_tensors(causal)
    loaded = _copy_into(model, tensors)
    new = [name for name in model.state_dict() if name not in tensors]
    lacking = [
        name for name in new if name.startswith("model.vision_tower.") and not (stage5_depth and _STAGE5 in name)
    ]
    if lacking:
        raise InputError(f"vision: the encoder lacks {lacking[0].removeprefix('model.vision_tower.')}")
    model.generation_config = _generation_of(causal.generation_config)
    settings = {"stride": config.vision_config.stride, **statistics, **dict(pixels or {})}
    return Assembly(model, _processor(tokenizer, settings, row_separator), loaded, new, extra)


def _generation_of(told: GenerationConfig) -> GenerationConfig:
    """How the language model begins, ends and pads; penalties and temperatures are of the conversations that it was
    trained for, and the new model is for others."""
    return GenerationConfig(**{key: getattr(told, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")})


def build_processor(
    language: str | Path, *, pixels: Mapping[str, Any], row_separator: bool = True
) -> ConvLlavaProcessor:
    """The processor that `build` makes, of the tokenizer alone; the pixels' mean and deviation are CLIP's unless given.

    Raises:
        InputError: there is no tokenizer.
    """
    tokenizer = _tokenizer(language)
    _add_image_token(tokenizer)
    return _processor(tokenizer, pixels, row_separator)


def _processor(tokenizer: Any, pixels: Mapping[str, Any], row_separator: bool) -> ConvLlavaProcessor:
    prompt = template("v1", bos="(bos_token or '')", eos="eos_token")
    return ConvLlavaProcessor(
        ConvLlavaImageProcessorPil(**pixels), tokenizer, chat_template=prompt, row_separator=row_separator
    )


def rename_encoder(name: str) -> str | None:
    """A tensor of a Hugging Face, DINOv3, timm or open_clip ConvNeXt -> its name in our tower; None: not wanted."""
    name = name.removeprefix("module.").removeprefix("visual.trunk.").removeprefix("model.").removeprefix("convnext.")
    for pattern, replacement in _ENCODER_NAMES:
        renamed, count = pattern.subn(replacement, name)
        if count:
            name = renamed
            break
    for old, new in _BLOCK_NAMES.items():
        name = name.replace(old, new)
    known = name.startswith("embeddings.") or re.match(r"encoder\.stages\.\d\.(downsampling_layer|layers)\.", name)
    return name if known else None


_ENCODER_NAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(?:stem|stages\.0\.downsample_layers)\.0\.", "embeddings.patch_embeddings."),
        (r"^(?:stem|stages\.0\.downsample_layers)\.1\.", "embeddings.layernorm."),
        (r"^stages\.(\d)\.downsample(?:_layers)?\.", r"encoder.stages.\1.downsampling_layer."),
        (r"^stages\.(\d)\.(?:blocks|layers)\.", r"encoder.stages.\1.layers."),
    )
]
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


def _tower_tensors(
    vision: str | Path | Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], list[str], dict[str, Any]]:
    """The encoder under our names, the tensors that are not wanted, and mean and deviation of its pixels."""
    statistics: dict[str, Any] = {}
    found: dict[str, Tensor] = {}
    extra: list[str] = []
    if isinstance(vision, Mapping):
        pairs = list(vision.items())
    else:
        folder = Path(vision)
        pairs = [pair for path in tensor_files(folder) for pair in tensors_in(path).items()]
        preprocessor = folder / "preprocessor_config.json"
        if preprocessor.is_file():
            content = read_json(preprocessor)
            statistics = {key: content[key] for key in ("image_mean", "image_std") if key in content}
    for name, tensor in pairs:
        new = rename_encoder(name)
        if new is None:
            extra.append(name)
        else:
            found[new] = tensor
    if "embeddings.patch_embeddings.weight" not in found:
        raise InputError("vision: there is no ConvNeXt in it; give a Hugging Face, timm or open_clip one")
    return found, extra, statistics


def _shape_of(tower: Mapping[str, Tensor]) -> tuple[list[int], list[int]]:
    """Width and number of blocks of each stage, read off the tensors."""
    blocks: dict[int, set[int]] = {}
    widths: dict[int, int] = {}
    for name, tensor in tower.items():
        if match := re.fullmatch(r"encoder\.stages\.(\d)\.layers\.(\d+)\.dwconv\.weight", name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
            widths[int(match[1])] = tensor.shape[0]
    return [widths[stage] for stage in sorted(widths)], [len(blocks[stage]) for stage in sorted(blocks)]


def _language_model(language: str | Path, dtype: torch.dtype) -> tuple[Any, Any]:
    try:
        causal = AutoModelForCausalLM.from_pretrained(language, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(f"language: {language} does not load as a causal language model: {one_line(error)}") from None
    tokenizer = _tokenizer(language)
    head, config = causal.get_output_embeddings(), causal.config
    scales = [getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling")]
    if getattr(head, "bias", None) is not None or getattr(config, "final_logit_softcapping", None) or scales != [1, 1]:
        raise InputError(f"language: the head of {config.model_type} is more than a linear layer without bias")
    check_embeddings(causal.base_model)
    if len(tokenizer) < 0.5 * config.vocab_size:
        raise InputError(
            f"language: the tokenizer in {language} has {len(tokenizer)} tokens where the model knows "
            f"{config.vocab_size}; a file of it is missing"
        )
    return causal, tokenizer


def _tokenizer(language: str | Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(language, padding_side="left")
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise InputError(f"language: {language} has no tokenizer that loads: {one_line(error)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _add_image_token(tokenizer: Any) -> int:
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    return tokenizer.convert_tokens_to_ids("<image>")


def _language_tensors(causal: Any) -> dict[str, Tensor]:
    body = {f"model.language_model.{name}": tensor for name, tensor in causal.base_model.state_dict().items()}
    return body | {"lm_head.weight": causal.get_output_embeddings().weight}


def _copy_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name not in own:
            raise InputError(f"{name} has no place in the model")
        if own[name].shape != tensor.shape:
            raise InputError(f"{name} has the shape {list(tensor.shape)}, the model asks for {list(own[name].shape)}")
    model.load_state_dict(dict(tensors), strict=False)
    return list(tensors)


def _group(name: str) -> str:
    """The part of a tensor, for the table."""
    if match := re.match(r"model\.vision_tower\.(?:encoder\.)?(stages\.\d|embeddings)", name):
        return f"tower {match[1]}"
    if name.startswith("model.multi_modal_projector."):
        return "projector"
    return (
        "language model" if name.startswith(("model.language_model.", "lm_head.")) else f"encoder {name.split('.')[0]}"
    )


_ALIKE = 0.06
"""How far apart in the image, in shares of its side, two coordinates are still much alike to begin with."""


@torch.no_grad()
def initialise_coordinates(weight: Tensor, ids: Sequence[int]) -> None:
    """Lay the rows of coordinates' tokens, given in rising order, along a smooth curve, where 0.37 is next to 0.38:
    with rows drawn one by one a box that is nearly right is as wrong as any other, and each number has to be met alone.

    The products of two of them fall with their distance as a Gaussian does: random Fourier features (Rahimi and Recht,
    2007).
    """
    values = torch.linspace(0, 1, len(ids), device=weight.device)[:, None]
    frequencies, phases = torch.randn(weight.shape[1]) / _ALIKE, torch.rand(weight.shape[1]) * 2 * torch.pi
    features = (values * frequencies.to(weight.device) + phases.to(weight.device)).cos() * 2**0.5
    weight[list(ids)] = (features * weight.std()).to(weight.dtype)


@torch.no_grad()
def initialise_from_nothing(tower: nn.Module) -> None:
    """LeCun-normal weights (standard deviation 1/sqrt(fan-in)).

    The 0.02 of ConvNeXt suits its hundreds of channels; in a tower of tens the blocks would hardly act at first.
    """
    for module in tower.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)


@torch.no_grad()
def initialise_attention(language_model: nn.Module) -> None:
    """Let attention begin by matching and copying: keys equal queries, and what is read is written back as it was.

    A question's "square" then looks at what holds something square from the first step on, where a small model
    otherwise needs thousands of steps to find that out. In the manner of mimetic initialisation (arXiv 2305.09828),
    which gives random weights the correlations of trained ones. Only where keys have as many heads as queries.
    """
    for module in language_model.modules():
        projections = [getattr(module, f"{name}_proj", None) for name in "qkvo"]
        weights = [projection.weight for projection in projections if isinstance(projection, nn.Linear)]
        if len(weights) == 4:
            query, key, value, output = weights
            if key.shape == query.shape:
                key.copy_(query)
                output.copy_(value.T)
