"""A model of ours in the layout of the published checkpoints, for the original code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from convllava.checkpoints.original_layout import MODEL_TYPE
from convllava.checkpoints.original_names import OUR_TOWER, name_for_official
from convllava.checkpoints.stored_model import StoredModel
from convllava.checkpoints.tensors import write_pickled, write_tensors
from convllava.errors import InputError
from convllava.io import read_json, write_json
from convllava.model.config import ConvLlavaConfig
from convllava.model.processing import ConvLlavaProcessor


def write_official(source: StoredModel, folder: Path) -> None:
    """Write a model of the official kind into an empty folder so that the original code can load it.

    Without a tokenizer.model in the source, the original's slow tokenizer cannot be made, only the fast one.

    Raises:
        InputError: the model has what the original does not know: row separators, coordinates, another language model
            than Llama, or images that are neither padded to a square nor cropped.
    """
    check_official(source)
    tower = folder / "vision_tower"
    tower.mkdir()
    write_tensors(_renamed(source, in_tower=False), folder)
    write_pickled(_renamed(source, in_tower=True), tower)
    _write_configs(source.config, source.processor, folder, tower)
    _write_tokenizer(source.processor, folder)
    source.copy_vocabulary(folder)


def check_official(source: StoredModel) -> None:
    """Refuse a model that the original does not know how to build.

    Raises:
        InputError: says what it does not know.
    """
    config, mode = source.config, source.processor.image_processor.mode
    if config.row_separator or config.coordinate_embedding or config.text_config.model_type != "llama":
        raise InputError(
            "only a Llama without row separators and coordinate embeddings can be written in the official layout"
        )
    if mode not in ("square", "crop"):
        raise InputError(f"the official layout knows no images of mode {mode}; use square or crop")


def _renamed(source: StoredModel, in_tower: bool) -> Iterator[tuple[str, Tensor]]:
    """The tower's tensors, or the others, by the original's names."""
    for name, tensor in source.tensors(OUR_TOWER if in_tower else ""):
        official, is_towers = name_for_official(name)
        if is_towers == in_tower:
            yield official, tensor


def _write_tokenizer(processor: ConvLlavaProcessor, folder: Path) -> None:
    """Without the image's placeholder, which the original does not have: it would make its vocabulary grow."""
    processor.tokenizer.save_pretrained(folder)
    content = read_json(folder / "tokenizer.json")
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != processor.image_token]
    write_json(folder / "tokenizer.json", content)
    settings = read_json(folder / "tokenizer_config.json")
    for key in ("extra_special_tokens", "image_token", "processor_class"):
        settings.pop(key, None)
    write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": "LlamaTokenizer", "legacy": False})


def _write_configs(config: ConvLlavaConfig, processor: ConvLlavaProcessor, folder: Path, tower: Path) -> None:
    vision, pixels = config.vision_config, processor.image_processor
    text = {
        key: value for key, value in config.text_config.to_dict().items() if key not in ("rope_parameters", "dtype")
    }
    rope = dict(config.text_config.rope_parameters or {})
    theta, kind = rope.pop("rope_theta", 10000.0), rope.pop("rope_type", "default")
    language = text | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": MODEL_TYPE,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "image_aspect_ratio": "pad" if pixels.mode == "square" else "square",
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -1,
        "mm_vision_tower": "./vision_tower",
    }
    convnext = {
        "architectures": ["ConvNextModel"],
        "model_type": "convnext",
        "depths": list(vision.depths),
        "hidden_sizes": list(vision.hidden_sizes),
        "num_stages": vision.num_stages,
        "num_channels": vision.num_channels,
        "patch_size": vision.patch_size,
        "hidden_act": vision.hidden_act,
    }
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        **{f"do_{step}": True for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")},
        "size": {"shortest_edge": pixels.side},
        "crop_size": {"height": pixels.side, "width": pixels.side},
        "resample": 3,
        "image_mean": list(pixels.image_mean),
        "image_std": list(pixels.image_std),
    }
    for place, content in (
        (folder / "config.json", language),
        (tower / "config.json", convnext),
        (tower / "preprocessor_config.json", preprocessor),
    ):
        write_json(place, content)
