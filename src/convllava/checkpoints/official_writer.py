"""Write one of our models in the official layout, so that the original code can load it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from convllava.checkpoints.official_layout import MODEL_TYPE, OUR_TOWER, official_name
from convllava.checkpoints.stored_model import StoredModel
from convllava.checkpoints.tensors import write_pickled, write_tensors
from convllava.errors import CheckpointError
from convllava.io import read_json, write_json


def write_official(source: StoredModel, folder: Path) -> None:
    """Write a model in the official layout into an empty folder.

    If the source has no tokenizer.model, only the fast tokenizer is written; the original code asks for the slow one.

    Raises:
        CheckpointError: if the original code has no such model: row separators, coordinate embeddings, another language
            model than Llama, or images that are neither padded to a square nor cropped.
    """
    config, processor = source.config, source.processor
    pixels = processor.image_processor
    if config.row_separator or config.coordinate_embedding or config.text_config.model_type != "llama":
        raise CheckpointError(
            "only a Llama without row separators and coordinate embeddings can be written in the official layout"
        )
    if pixels.mode not in ("square", "crop"):
        raise CheckpointError(f"the official layout has no image mode {pixels.mode}; use square or crop")

    def renamed(in_tower: bool) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in source.tensors(OUR_TOWER if in_tower else ""):
            new, belongs_in_tower = official_name(name)
            if belongs_in_tower == in_tower:
                yield new, tensor

    tower = folder / "vision_tower"
    tower.mkdir()
    write_tensors(renamed(in_tower=False), folder)
    write_pickled(renamed(in_tower=True), tower)

    vision = config.vision_config
    text: dict[str, Any] = config.text_config.to_dict()
    rope = dict(config.text_config.rope_parameters or {})
    theta, kind = rope.pop("rope_theta", 10000.0), rope.pop("rope_type", "default")
    language = {key: value for key, value in text.items() if key not in ("rope_parameters", "dtype")} | {
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
    write_json(folder / "config.json", language)
    write_json(tower / "config.json", convnext)
    write_json(tower / "preprocessor_config.json", preprocessor)

    # The original has no image placeholder in its vocabulary; with it the vocabulary would be one token too large.
    processor.tokenizer.save_pretrained(folder)
    content = read_json(folder / "tokenizer.json")
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != processor.image_token]
    write_json(folder / "tokenizer.json", content)
    settings = read_json(folder / "tokenizer_config.json")
    for key in ("extra_special_tokens", "image_token", "processor_class"):
        settings.pop(key, None)
    write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": "LlamaTokenizer", "legacy": False})
    source.copy_vocabulary(folder)
