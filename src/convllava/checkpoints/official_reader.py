"""Read a checkpoint in the official layout as one of ours."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

from convllava.checkpoints.official_layout import LAYER, Layout, find_parts
from convllava.checkpoints.stored_model import StoredModel, shapes_of, without_tied
from convllava.checkpoints.tensors import VOCABULARY, tensors_in
from convllava.errors import CheckpointError
from convllava.io import one_line, read_json
from convllava.model.config import ConvLlavaConfig, ConvLlavaVisionConfig
from convllava.model.image_processing import ConvLlavaImageProcessorPil
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.processing import ConvLlavaProcessor
from convllava.model.prompt_templates import template_of


def load(source: str | Path, dtype: torch.dtype) -> tuple[ConvLlavaForConditionalGeneration, ConvLlavaProcessor]:
    """Load an official checkpoint; it is converted in memory.

    Raises:
        CheckpointError: see `open_official`.
    """
    stored = open_official(source, dtype)
    model: Any = ConvLlavaForConditionalGeneration.from_pretrained(
        None, config=stored.config, state_dict=dict(stored.tensors()), dtype=dtype
    )
    model.generation_config = stored.generation
    return model.eval(), stored.processor


def open_official(source: str | Path, dtype: torch.dtype, base: str | Path | None = None) -> StoredModel:
    """Open an official checkpoint as one of ours. Its tensors are read when they are requested.

    Args:
        source: Folder of the checkpoint.
        dtype: Precision of the tensors.
        base: The language model that a LoRA was trained on; None takes the one that its adapter_config.json names.

    Raises:
        CheckpointError: if a part is missing or damaged; when tensors are requested, if one has a wrong shape.
    """
    layout = find_parts(source, base)
    config = configuration(layout)
    text = config.text_config
    return StoredModel(
        config=config,
        processor=processor(layout, config),
        generation=GenerationConfig(
            bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
        ),
        tensors=partial(_tensors, layout, config, dtype),
        tokenizer_folder=layout.tokenizer_folder,
        note=layout.note,
    )


def configuration(layout: Layout) -> ConvLlavaConfig:
    """Return our configuration of an official checkpoint.

    Raises:
        CheckpointError: if a setting is missing, or no model can have the settings.
    """
    tower, config = read_json(layout.tower_folder / "config.json"), layout.config
    _require(config, layout.folder / "config.json", "vocab_size")
    _require(tower, layout.tower_folder / "config.json", "depths", "hidden_sizes")
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"}
    dropped = ("model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path")
    text = {key: value for key, value in config.items() if key in known and key not in dropped and value is not None}
    depths, widths = _depths_and_widths(layout, tower["depths"])
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
        raise CheckpointError(
            f"the settings in {layout.folder} do not fit a ConvLLaVA model: {one_line(error)}"
        ) from None


def _depths_and_widths(layout: Layout, configured_depths: list[int]) -> tuple[list[int], list[int]]:
    """Read the number of blocks and the channels of each stage from the tower's tensors.

    The tower's config.json may be wrong. It counts one block too many if `mm_vision_select_layer` -2 removed the last
    block before the fifth stage was added. It lacks the fifth stage if a run's checkpoint still names the four-stage
    tower that it started from. The file of a four-stage tower still has the block that -2 removes.
    """
    depths: dict[int, int] = {}
    widths: dict[int, int] = {}
    for source in layout.sources:
        tensors = tensors_in(source.path)
        for name in tensors:
            match = LAYER.search(source.rename(name) or "")
            if match is None:
                continue
            stage, block = int(match[1]), int(match[2])
            depths[stage] = max(depths.get(stage, 0), block + 1)
            if stage not in widths and name.endswith("dwconv.bias"):
                widths[stage] = len(tensors[name])
    if sorted(depths) != list(range(len(depths))) or depths.keys() != widths.keys():
        raise CheckpointError(
            f"{layout.folder} has no complete vision tower: only blocks of the stages {sorted(depths)}"
        )
    blocks = [depths[stage] for stage in sorted(depths)]
    if _drops_last_block(layout) and len(blocks) == 4 and configured_depths and blocks[-1] == configured_depths[-1]:
        blocks[-1] -= 1
    return blocks, [widths[stage] for stage in sorted(widths)]


def _drops_last_block(layout: Layout) -> bool:
    return layout.config.get("mm_vision_select_layer", -1) == -2


def processor(layout: Layout, config: ConvLlavaConfig) -> ConvLlavaProcessor:
    """Return image processor, tokenizer and prompt format of an official checkpoint.

    Raises:
        CheckpointError: if the tokenizer does not load, or does not have as many tokens as the model.
    """
    path = layout.tower_folder / "preprocessor_config.json"
    pixels = read_json(path)
    _require(pixels, path, "size", "image_mean", "image_std")
    side, crop_side = (
        value.get("height", value.get("shortest_edge")) if isinstance(value, dict) else value
        for value in (pixels["size"], pixels.get("crop_size", pixels["size"]))
    )
    if not isinstance(side, int) or side < 1 or side != crop_side:
        raise CheckpointError(
            f"{path}: size and crop_size must be one number of pixels; got {side!r} and {crop_side!r}"
        )
    folder = layout.tokenizer_folder
    if not any((folder / name).is_file() for name in ("tokenizer.json", VOCABULARY)):
        raise CheckpointError(f"{folder} has neither tokenizer.json nor {VOCABULARY}; download one of them")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=config.text_config, extra_special_tokens=["<image>"], padding_side="left"
        )
    except (OSError, ValueError, ImportError) as error:
        needs_package = not (folder / "tokenizer.json").is_file() and find_spec("sentencepiece") is None
        hint = "; pip install 'convllava[convert]'" if needs_package else ""
        raise CheckpointError(f"the tokenizer in {folder} does not load{hint}: {one_line(error)}") from None
    if (tokens := tokenizer.convert_tokens_to_ids("<image>")) != config.image_token_id:
        raise CheckpointError(
            f"the tokenizer in {folder} has {tokens} tokens, but config.json says vocab_size {config.image_token_id}"
        )
    image_processor = ConvLlavaImageProcessorPil(
        mode="square" if layout.config.get("image_aspect_ratio") == "pad" else "crop",
        side=side,
        stride=config.vision_config.stride,
        image_mean=pixels["image_mean"],
        image_std=pixels["image_std"],
    )
    return ConvLlavaProcessor(image_processor, tokenizer, chat_template=template_of(layout.config))


def _tensors(
    layout: Layout, config: ConvLlavaConfig, dtype: torch.dtype, prefix: str = ""
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors under our names that begin with a prefix, each once, merged with LoRA, file after file.

    Raises:
        CheckpointError: if a tensor is missing or unknown, or its shape does not fit the configuration.
    """
    expected, done = shapes_of(config), set[str]()
    for name, delta in layout.deltas.items():
        shape = (delta.up.shape[0], delta.down.shape[1])
        if tuple(expected.get(name, ())) != shape or delta.up.shape[1] != delta.down.shape[0]:
            raise CheckpointError(f"{layout.folder}: the LoRA on {name} (our name) does not fit the model")
    for source in layout.sources:
        tensors = tensors_in(source.path)
        for old in tensors:
            new = source.rename(old)
            if new is None or new in done or (new not in expected and _is_dropped_block(new, expected, layout)):
                continue
            if new not in expected:
                raise CheckpointError(f"{source.path} has a tensor {old}, which no ConvLLaVA model has")
            tensor = tensors[old]
            if tensor.shape != expected[new]:
                raise CheckpointError(
                    f"{source.path}: {old} has the shape {list(tensor.shape)}, but the configuration says "
                    f"{list(expected[new])}"
                )
            done.add(new)
            if new.startswith(prefix):
                if (lora := layout.deltas.get(new)) is not None:
                    tensor = tensor.float() + lora.scale * (lora.up.float() @ lora.down.float())
                yield new, tensor.to(dtype).contiguous()
    if missing := without_tied(set(expected) - done, config):
        raise CheckpointError(
            f"{layout.folder} lacks the tensor {min(missing)} (our name); its weights are not complete"
        )


def _is_dropped_block(name: str, expected: Mapping[str, torch.Size], layout: Layout) -> bool:
    """Return whether a tensor belongs to the block that `mm_vision_select_layer` -2 removes: the block after the last
    one that our stage has."""
    match = LAYER.search(name)
    if match is None or not _drops_last_block(layout):
        return False
    stage = re.compile(re.escape(name[: match.start(2)]) + r"\d+\.dwconv\.weight")
    return int(match[2]) == sum(stage.fullmatch(other) is not None for other in expected)


def _require(content: Mapping[str, Any], path: Path, *keys: str) -> None:
    for key in keys:
        if key not in content:
            raise CheckpointError(f"{path} lacks {key!r}; it does not belong to a published checkpoint")
