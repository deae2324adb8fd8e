"""A published checkpoint as one of ours."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

from convllava.checkpoints.original_layout import Layout, Source, look_through
from convllava.checkpoints.original_names import LAYER
from convllava.checkpoints.stored_model import StoredModel, shapes_of, without_tied
from convllava.checkpoints.tensors import VOCABULARY, tensors_in
from convllava.errors import InputError
from convllava.io import one_line, read_json
from convllava.model.config import ConvLlavaConfig, ConvLlavaVisionConfig
from convllava.model.image_processing import ConvLlavaImageProcessorPil
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.processing import ConvLlavaProcessor
from convllava.model.prompt_templates import template_of


def configuration(layout: Layout) -> ConvLlavaConfig:
    """Our configuration of an official checkpoint.

    Raises:
        InputError: a setting is missing, or makes no model.
    """
    tower, config = read_json(layout.tower_folder / "config.json"), layout.config
    require(config, layout.folder / "config.json", "vocab_size")
    require(tower, layout.tower_folder / "config.json", "depths", "hidden_sizes")
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"}
    dropped = ("model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path")
    text = {key: value for key, value in config.items() if key in known and key not in dropped and value is not None}
    depths, widths = shape_of(layout, tower["depths"])
    try:
        return ConvLlavaConfig(
            vision_config=ConvLlavaVisionConfig(
                depths=depths,
                hidden_sizes=widths,
                num_channels=tower.get("num_channels", 3),
                patch_size=tower.get("patch_size", 4),
                hidden_act=tower.get("hidden_act", "gelu"),
            ),
            text_config={"model_type": "llama", "pad_token_id": 0, "max_position_embeddings": 4096, **text},
            image_token_id=config["vocab_size"],
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"the settings in {layout.folder} make no model: {one_line(error)}") from None


def shape_of(layout: Layout, told: Sequence[int]) -> tuple[list[int], list[int]]:
    """Blocks and channels of each stage of the tower, read off its tensors.

    The original's config.json counts a block too many where `mm_vision_select_layer` -2 drops one before a fifth stage
    is added, and none of the fifth stage where a run's checkpoint still names the four-stage tower. The file of a
    four-stage tower has the block that is dropped.

    Args:
        told: Blocks, as the tower's config.json says.
    """
    depths: dict[int, int] = {}
    widths: dict[int, int] = {}
    for part in layout.sources:
        found = tensors_in(part.path)
        for old in found:
            match = LAYER.search(part.rename(old) or "")
            if match is None:
                continue
            stage, layer = int(match[1]), int(match[2])
            depths[stage] = max(depths.get(stage, 0), layer + 1)
            if stage not in widths and old.endswith("dwconv.bias"):
                widths[stage] = len(found[old])
    if sorted(depths) != list(range(len(depths))) or depths.keys() != widths.keys():
        raise InputError(f"{layout.folder} has no whole vision tower: blocks of the stages {sorted(depths)} only")
    blocks = [depths[stage] for stage in sorted(depths)]
    if _drops_last_block(layout) and len(blocks) == 4 and told and blocks[-1] == told[-1]:
        blocks[-1] -= 1
    return blocks, [widths[stage] for stage in sorted(widths)]


def _drops_last_block(layout: Layout) -> bool:
    return layout.config.get("mm_vision_select_layer", -1) == -2


def processor(layout: Layout, config: ConvLlavaConfig) -> ConvLlavaProcessor:
    """Pixels, tokenizer and prompt of an official checkpoint.

    Raises:
        InputError: the tokenizer does not load, or does not have as many tokens as the model.
    """
    pixels = read_json(layout.tower_folder / "preprocessor_config.json")
    require(pixels, layout.tower_folder / "preprocessor_config.json", "size", "image_mean", "image_std")
    if not any((layout.tokenizer_folder / name).is_file() for name in ("tokenizer.json", VOCABULARY)):
        raise InputError(f"{layout.tokenizer_folder} has neither tokenizer.json nor {VOCABULARY}; fetch one of them")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            layout.tokenizer_folder, config=config.text_config, extra_special_tokens=["<image>"], padding_side="left"
        )
    except (OSError, ValueError, ImportError) as error:
        hint = "; pip install 'convllava[convert]'" if "sentencepiece" in str(error).lower() else ""
        raise InputError(f"the tokenizer in {layout.tokenizer_folder} does not load{hint}: {one_line(error)}") from None
    if (image := tokenizer.convert_tokens_to_ids("<image>")) != config.image_token_id:
        raise InputError(
            f"the tokenizer in {layout.tokenizer_folder} has {image} tokens, "
            f"but config.json says vocab_size {config.image_token_id}"
        )
    image_processor = ConvLlavaImageProcessorPil(
        mode="square" if layout.config.get("image_aspect_ratio") == "pad" else "crop",
        side=_side_of(pixels, layout.tower_folder / "preprocessor_config.json"),
        stride=config.vision_config.stride,
        image_mean=pixels["image_mean"],
        image_std=pixels["image_std"],
    )
    return ConvLlavaProcessor(image_processor, tokenizer, chat_template=template_of(layout.config))


def _side_of(pixels: Mapping[str, Any], path: Path) -> int:
    """Pixels of the square's side, which published checkpoints resize to and crop to."""
    sides = [_number(pixels.get(key, pixels["size"])) for key in ("crop_size", "size")]
    if not isinstance(sides[0], int) or sides[0] < 1 or sides[0] != sides[1]:
        raise InputError(f"{path}: size and crop_size must be one number of pixels; got {sides[1]!r} and {sides[0]!r}")
    return sides[0]


def _number(side: Any) -> Any:
    return side.get("height", side.get("shortest_edge")) if isinstance(side, dict) else side


def look_up(source: str | Path, dtype: torch.dtype | None, base: str | Path | None = None) -> StoredModel:
    """An official checkpoint as one of ours whose tensors are read as they are asked for.

    Args:
        source: The checkpoint's folder.
        dtype: Of the weights; None keeps each tensor's own.
        base: See `look_through`.

    Raises:
        InputError: a part is missing or damaged; when tensors are asked for, one has another shape than the
            configuration asks.
    """
    layout = look_through(source, base)
    config = configuration(layout)
    return StoredModel(
        config=config,
        processor=processor(layout, config),
        generation=generation_of(config),
        tensors=partial(native_tensors, layout, config, dtype),
        tokenizer_folder=layout.tokenizer_folder,
        note=layout.note,
    )


def load(source: str | Path, dtype: torch.dtype) -> tuple[ConvLlavaForConditionalGeneration, ConvLlavaProcessor]:
    """An official checkpoint converted in memory."""
    found = look_up(source, dtype)
    model: Any = ConvLlavaForConditionalGeneration.from_pretrained(
        None, config=found.config, state_dict=dict(found.tensors()), dtype=dtype
    )
    model.generation_config = found.generation
    return model.eval(), found.processor


def generation_of(config: ConvLlavaConfig) -> GenerationConfig:
    """How the original ends and pads an answer."""
    text = config.text_config
    return GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )


def native_tensors(
    layout: Layout, config: ConvLlavaConfig, dtype: torch.dtype | None, prefix: str = ""
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one source file after the other under our names, each once, those that begin with a prefix.

    Raises:
        InputError: a tensor is missing, strange or of another shape than the configuration asks.
    """
    expected, done = shapes_of(config), set[str]()
    _check_deltas(layout, expected)
    for part in layout.sources:
        for name, tensor in renamed(part, expected, done, layout):
            done.add(name)
            if name.startswith(prefix):
                yield name, tensor.to(dtype or tensor.dtype).contiguous()
    if missing := without_tied(set(expected) - done, config):
        raise InputError(
            f"{layout.folder} lacks the tensor {min(missing)} (in our naming); its weights are not complete"
        )


def _check_deltas(layout: Layout, expected: Mapping[str, torch.Size]) -> None:
    for name, delta in layout.deltas.items():
        shape = (delta.up.shape[0], delta.down.shape[1])
        if tuple(expected.get(name, ())) != shape or delta.up.shape[1] != delta.down.shape[0]:
            raise InputError(f"{layout.folder}: the LoRA on {name} (in our naming) does not fit the model")


def renamed(
    part: Source,
    expected: Mapping[str, torch.Size],
    done: Container[str],
    layout: Layout,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file under our names, merged with LoRA; what is done already is left out.

    Raises:
        InputError: a tensor is strange or has another shape than the configuration asks.
    """
    found = tensors_in(part.path)
    for old in found:
        new = part.rename(old)
        if new is None or new in done or (new not in expected and _is_dropped_block(new, expected, layout)):
            continue
        if new not in expected:
            raise InputError(f"{part.path} has a tensor {old} that a ConvLLaVA model does not")
        tensor = found[old]
        if tensor.shape != expected[new]:
            raise InputError(
                f"{part.path}: {old} has the shape {list(tensor.shape)}, the configuration asks "
                f"for {list(expected[new])}"
            )
        yield new, layout.deltas[new].added_to(tensor) if new in layout.deltas else tensor


def _is_dropped_block(name: str, expected: Iterable[str], layout: Layout) -> bool:
    """Whether a tensor is of the block that `mm_vision_select_layer` -2 drops: the first beyond its stage."""
    match = LAYER.search(name)
    if match is None or not _drops_last_block(layout):
        return False
    stage = re.compile(re.escape(name[: match.start(2)]) + r"\d+\.dwconv\.weight")
    return int(match[2]) == sum(stage.fullmatch(other) is not None for other in expected)


def require(content: Mapping[str, Any], path: Path, *keys: str) -> None:
    """Raise `InputError` for the first key that a JSON file lacks."""
    for key in keys:
        if key not in content:
            raise InputError(f"{path} lacks {key!r}; it is not that of a published checkpoint")
