"""Published ConvLLaVA checkpoints: read in any layout they come in, written as ours, and back.

    convllava convert ConvLLaVA-sft-1536 my-model

What the layouts are and what each tensor is called on either side: docs/checkpoints.md. Tensors pass through one source
file at a time, and nothing but tensors is ever unpickled.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

from convllava.configuration import ConvLlavaConfig, ConvLlavaVisionConfig
from convllava.errors import InputError
from convllava.image_processing import ConvLlavaImageProcessorPil
from convllava.modeling import ConvLlavaForConditionalGeneration
from convllava.processing import ConvLlavaProcessor

MODEL_TYPE = "llava_llama"
ADAPTER_CONFIG = "adapter_config.json"
_TOWER_PREFIX = "model.vision_tower.vision_tower."
_OUR_TOWER = "model.vision_tower."
_LAYER = re.compile(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.")

V1_TEMPLATE = """\
{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}{{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image> \\n' -}}{%- endfor -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] | trim -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system, turns = text_of(messages[0]), messages[1:] -%}
{%- else -%}
    {%- set system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives \
helpful, detailed, and polite answers to the user's questions." -%}
    {%- set turns = messages -%}
{%- endif -%}
{{- '<s> ' ~ system ~ ' ' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'assistant' -%}
        {{- ' ASSISTANT:' -}}{%- generation -%}{{- ' ' ~ text_of(message) ~ '</s>' -}}{%- endgeneration -%}
    {%- elif message['role'] == 'user' -%}{{- 'USER: ' ~ text_of(message) -}}
    {%- else -%}{{- raise_exception('a system message stands first or nowhere') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""
"""Prompt v1. The original tokenises what follows an image alone, so that it begins with a space of its own: the space
after `<image>`. The one after `<s>` is that of the beginning of a text."""


@dataclass(frozen=True)
class Source:
    """One file of tensors: how they are named in it, and how in our model (None: not wanted)."""

    path: Path
    rename: Callable[[str], str | None]


@dataclass(frozen=True)
class Delta:
    """What LoRA adds to a weight: scale * up @ down."""

    down: Tensor
    up: Tensor
    scale: float

    def added_to(self, weight: Tensor) -> Tensor:
        """The merged weight, in float32."""
        return weight.float() + self.scale * (self.up.float() @ self.down.float())


@dataclass(frozen=True)
class Layout:
    """An official checkpoint, looked through but not loaded.

    Attributes:
        folder: Of the checkpoint.
        config: Its config.json.
        tower_folder: Where the tower's config.json and preprocessor_config.json lie.
        sources: The files to read; of a tensor that is in several, the first counts.
        tokenizer_folder: Where the tokenizer lies.
        deltas: Our name -> what LoRA adds to that weight.
        note: What a user should know of it; empty if nothing.
    """

    folder: Path
    config: dict[str, Any]
    tower_folder: Path
    sources: list[Source]
    tokenizer_folder: Path
    deltas: dict[str, Delta]
    note: str = ""


def is_official(folder: str | Path) -> bool:
    """Whether a folder holds a checkpoint in a layout of the original code."""
    config = Path(folder) / "config.json"
    if not config.is_file():
        return False
    kind = _json(config).get("model_type")
    return kind in (MODEL_TYPE, "llava") and "mm_vision_tower" in _json(config)


def look_through(folder: str | Path, base: str | Path | None = None) -> Layout:
    """Find the parts of an official checkpoint.

    Args:
        folder: The checkpoint.
        base: The language model that a LoRA was trained on; None takes the one its adapter_config.json names.

    Raises:
        InputError: no tower or no base anywhere, or a file that is missing.
    """
    folder = Path(folder)
    config = _json(folder / "config.json")
    adapter = _json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).is_file() else None
    language = folder if adapter is None else _base_of(folder, adapter, base)
    sources = [Source(path, rename_language) for path in tensor_files(language)]
    if adapter is not None:
        sources.insert(0, Source(folder / "non_lora_trainables.bin", rename_trained))
    tower, note = _tower_folder(folder, config)
    if not any(name.startswith(_OUR_TOWER) for part in sources for name in _new_names(part)):
        sources += [Source(path, rename_tower) for path in tensor_files(tower)]
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return Layout(
        folder=folder,
        config=config,
        tower_folder=tower,
        sources=sources,
        tokenizer_folder=folder if has_tokenizer else language,
        deltas={} if adapter is None else _deltas(folder, adapter),
        note=note,
    )


def _tower_folder(folder: Path, config: Mapping[str, Any]) -> tuple[Path, str]:
    """Where the tower lies, and what to say if there are two: config.json names that of the stage before."""
    own, named = folder / "vision_tower", _named_tower(folder, config)
    found = [place for place in (own, named) if place is not None and (place / "config.json").is_file()]
    if not found:
        where = config.get("mm_vision_tower")
        raise InputError(
            f"{folder} has no vision tower: neither {own} nor mm_vision_tower {where!r} holds a config.json; "
            "put the tower's folder beside the model as vision_tower"
        )
    two = len(found) == 2 and found[0].resolve() != found[1].resolve()
    return found[0], f"took the tower in {found[0]}; mm_vision_tower names another, {found[1]}" if two else ""


def _new_names(part: Source) -> list[str]:
    return [new for new in map(part.rename, names_of(part.path)) if new is not None]


def _base_of(folder: Path, adapter: Mapping[str, Any], base: str | Path | None) -> Path:
    place = Path(base or adapter.get("base_model_name_or_path") or "")
    if not (place / "config.json").is_file():
        raise InputError(f"{folder} is a LoRA on {str(place)!r}, which is not here; name the folder with --base")
    return place


def _deltas(folder: Path, adapter: Mapping[str, Any]) -> dict[str, Delta]:
    """What the adapter's file adds to which of our weights."""
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()]
    if not files:
        raise InputError(f"{folder} has {ADAPTER_CONFIG} but no adapter_model.safetensors or adapter_model.bin")
    rank = adapter["r"]
    scale = adapter["lora_alpha"] / (rank**0.5 if adapter.get("use_rslora") else rank)
    deltas: dict[str, Delta] = {}
    with opened(files[0]) as tensors:
        for name in tensors:
            if ".lora_A." in name:
                new = rename_trained(re.sub(r"\.lora_A(\.default)?\.", ".", name))
                if new is not None:
                    up = tensors[name.replace(".lora_A.", ".lora_B.")]
                    deltas[new] = Delta(tensors[name].clone(), up.clone(), scale)
    return deltas


def _named_tower(folder: Path, config: Mapping[str, Any]) -> Path | None:
    """The folder that config.json names, which is a path of whoever trained it, or a hub id."""
    name = config.get("mm_vision_tower") or config.get("vision_tower")
    if not name:
        return None
    return next((place for place in (Path(name), folder / name) if place.is_dir()), None)


def rename_language(name: str) -> str | None:
    """A name in the language model's files -> ours."""
    if name.startswith(_TOWER_PREFIX):
        return rename_tower(name.removeprefix(_TOWER_PREFIX))
    if name.startswith("model.mm_projector."):
        layer, _, kind = name.removeprefix("model.mm_projector.").partition(".")
        return f"model.multi_modal_projector.linear_{int(layer) // 2 + 1}.{kind}"
    if name.endswith("rotary_emb.inv_freq"):
        return None
    if name.startswith("model."):
        return name.replace("model.", "model.language_model.", 1)
    return name


def rename_trained(name: str) -> str | None:
    """A name as PEFT wraps it, in an adapter or in non_lora_trainables.bin -> ours."""
    name = name.removeprefix("base_model.")
    return rename_language(name.removeprefix("model.") if name.startswith("model.model.") else name)


def rename_tower(name: str) -> str | None:
    """A name in the tower's file -> ours; the pooled LayerNorm that classification uses is not wanted."""
    name = name.removeprefix("convnext.").removeprefix(_TOWER_PREFIX)
    if name.startswith(("layernorm.", "classifier.")):
        return None
    return _OUR_TOWER + name


def name_for_official(name: str) -> tuple[str, bool]:
    """Our name -> (the original's, whether it belongs in the tower's file)."""
    if name.startswith(_OUR_TOWER):
        return name.removeprefix(_OUR_TOWER), True
    if match := re.fullmatch(r"model\.multi_modal_projector\.linear_(\d)\.(\w+)", name):
        return f"model.mm_projector.{2 * (int(match[1]) - 1)}.{match[2]}", False
    return name.replace("model.language_model.", "model."), False


def tensor_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors: an index's shards, or the single file.

    Raises:
        InputError: there are none, or one that the index names is missing.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            names = sorted(set(_json(index)["weight_map"].values()))
            for name in names:
                if not (folder / name).is_file():
                    raise InputError(f"{folder / name} is missing; {index.name} names it")
            return [folder / name for name in names]
        if (folder / stem).is_file():
            return [folder / stem]
    raise InputError(f"{folder} holds neither model.safetensors nor pytorch_model.bin nor an index of shards")


@contextmanager
def opened(path: Path) -> Iterator[Mapping[str, Tensor]]:
    """The tensors of a file by name, mapped into memory; nothing but tensors is unpickled.

    Raises:
        InputError: the file is damaged, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                yield _Lazy(file)
        else:
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                content = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
                raise InputError(f"{path} holds more than tensors by name")
            yield content
    except pickle.UnpicklingError:
        raise InputError(f"{path} is damaged, or holds code beside tensors, which is never run") from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise InputError(f"{path} is not a readable file of tensors: {str(error).splitlines()[0]}") from None


class _Lazy(Mapping[str, Tensor]):
    """A safetensors file as a mapping that reads a tensor when it is asked for."""

    def __init__(self, file: Any) -> None:
        self.file, self.names = file, list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def names_of(path: Path) -> list[str]:
    """The names of a file's tensors."""
    with opened(path) as tensors:
        return list(tensors)


def configuration(layout: Layout) -> ConvLlavaConfig:
    """Our configuration of an official checkpoint; the tower's depths are those that its file holds.

    Where the original dropped the last block before it added stage 5 (`mm_vision_select_layer` -2), its tower's
    config.json still counts that block.
    """
    tower, config = _json(layout.tower_folder / "config.json"), layout.config
    depths = list(tower["depths"])
    if config.get("mm_vision_select_layer", -1) == -2 and len(depths) == 4:
        depths[-1] -= 1
    known = {*LlamaConfig().to_dict(), "rope_theta"}
    dropped = ("model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path")
    text = {key: value for key, value in config.items() if key in known and key not in dropped}
    text |= {"pad_token_id": config.get("pad_token_id", 0), "max_position_embeddings": _context(config)}
    return ConvLlavaConfig(
        vision_config=ConvLlavaVisionConfig(
            depths=depths,
            hidden_sizes=list(tower["hidden_sizes"]),
            num_channels=tower.get("num_channels", 3),
            patch_size=tower.get("patch_size", 4),
            hidden_act=tower.get("hidden_act", "gelu"),
        ),
        text_config={"model_type": "llama", **text},
        image_token_id=config["vocab_size"],
    )


def _context(config: Mapping[str, Any]) -> int:
    return int(config.get("max_position_embeddings", 4096))


def processor(layout: Layout, config: ConvLlavaConfig) -> ConvLlavaProcessor:
    """Pixels, tokenizer and prompt of an official checkpoint.

    Raises:
        InputError: the tokenizer does not load, or does not have as many tokens as the model.
    """
    pixels = _json(layout.tower_folder / "preprocessor_config.json")
    side = pixels.get("crop_size", pixels.get("size"))
    side = side.get("height", side.get("shortest_edge")) if isinstance(side, dict) else side
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            layout.tokenizer_folder, config=config.text_config, extra_special_tokens=["<image>"], padding_side="left"
        )
    except (OSError, ValueError, ImportError) as error:
        hint = "; pip install sentencepiece protobuf" if "sentencepiece" in str(error).lower() else ""
        raise InputError(
            f"the tokenizer in {layout.tokenizer_folder} does not load{hint}: {str(error).splitlines()[0]}"
        ) from None
    if (image := tokenizer.convert_tokens_to_ids("<image>")) != config.image_token_id:
        raise InputError(
            f"the tokenizer in {layout.tokenizer_folder} has {image} tokens, "
            f"but config.json says vocab_size {config.image_token_id}"
        )
    image_processor = ConvLlavaImageProcessorPil(
        mode="square" if layout.config.get("image_aspect_ratio") == "pad" else "crop",
        side=side,
        stride=config.vision_config.stride,
        image_mean=pixels["image_mean"],
        image_std=pixels["image_std"],
    )
    return ConvLlavaProcessor(image_processor, tokenizer, chat_template=V1_TEMPLATE)


def convert(source: str | Path, folder: Path, dtype: torch.dtype | None, base: str | Path | None = None) -> str:
    """Write an official checkpoint into `folder` in our layout, one source file after the other.

    Args:
        source: The checkpoint's folder.
        folder: An empty folder; the caller renames it when it is whole.
        dtype: Of the weights; None keeps each tensor's own.
        base: See `look_through`.

    Returns:
        What a user should know of the checkpoint; empty if nothing.

    Raises:
        InputError: a part is missing or damaged, or a tensor has another shape than the configuration asks.
    """
    layout = look_through(source, base)
    config = configuration(layout)
    processor(layout, config).save_pretrained(folder)
    index: dict[str, str] = {}
    for number, tensors in enumerate(native_tensors(layout, config, dtype), start=1):
        name = f"model-{number:05}-of-{len(layout.sources):05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    config.architectures = ["ConvLlavaForConditionalGeneration"]
    config.dtype = dtype
    config.save_pretrained(folder)
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    generation_of(config).save_pretrained(folder)
    return layout.note


def load(source: str | Path, dtype: torch.dtype) -> tuple[ConvLlavaForConditionalGeneration, ConvLlavaProcessor]:
    """An official checkpoint converted in memory."""
    layout = look_through(source)
    config = configuration(layout)
    tensors = {name: tensor for part in native_tensors(layout, config, dtype) for name, tensor in part.items()}
    model: Any = ConvLlavaForConditionalGeneration.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    model.generation_config = generation_of(config)
    return model.eval(), processor(layout, config)


def generation_of(config: ConvLlavaConfig) -> GenerationConfig:
    """How the original ends and pads an answer."""
    text = config.text_config
    return GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )


def native_tensors(layout: Layout, config: ConvLlavaConfig, dtype: torch.dtype | None) -> Iterator[dict[str, Tensor]]:
    """The tensors of one source file after the other under our names, each tensor once.

    Raises:
        InputError: a tensor is missing, strange or of another shape than the configuration asks.
    """
    expected, done = shapes_of(config), set[str]()
    for part in layout.sources:
        tensors = renamed(part, expected, done, layout.deltas, dtype)
        done |= set(tensors)
        yield tensors
    if missing := sorted(set(expected) - done):
        raise InputError(f"{layout.folder} lacks the tensor {missing[0]} (in our naming); its weights are not complete")


def renamed(
    part: Source,
    expected: Mapping[str, torch.Size],
    done: Container[str],
    deltas: Mapping[str, Delta],
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The tensors of one file under our names, merged with LoRA; what is done already is left out.

    Raises:
        InputError: a tensor has another shape than the configuration asks.
    """
    tensors: dict[str, Tensor] = {}
    with opened(part.path) as found:
        for old in found:
            new = part.rename(old)
            if new is None or new in done or _is_dropped_block(new, expected):
                continue
            if new not in expected:
                raise InputError(f"{part.path} has a tensor {old} that a ConvLLaVA model does not")
            tensor = found[old]
            if tensor.shape != expected[new]:
                raise InputError(
                    f"{part.path}: {old} has the shape {list(tensor.shape)}, the configuration asks "
                    f"for {list(expected[new])}"
                )
            merged = deltas[new].added_to(tensor) if new in deltas else tensor
            tensors[new] = merged.to(dtype or tensor.dtype, copy=True).contiguous()
    return tensors


def _is_dropped_block(name: str, expected: Mapping[str, Any]) -> bool:
    """Whether a block of the tower lies beyond the depth of its stage (`mm_vision_select_layer` -2)."""
    match = _LAYER.search(name)
    return match is not None and not any(other.startswith(name[: match.end()]) for other in expected)


def shapes_of(config: ConvLlavaConfig) -> dict[str, torch.Size]:
    """Every tensor of a model and its shape, without allocating it."""
    with torch.device("meta"):
        model = ConvLlavaForConditionalGeneration(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def write_official(model: ConvLlavaForConditionalGeneration, processor: ConvLlavaProcessor, folder: Path) -> None:
    """Write a model of the official kind into `folder` so that the original code can load it.

    Raises:
        InputError: the model has what the original does not know: row separators, coordinates, or another language
            model than Llama.
    """
    config = model.config
    text = config.text_config
    if config.row_separator or config.coordinate_embedding or text.model_type != "llama":
        raise InputError(
            "only a Llama without row separators and coordinate embeddings can be written in the official layout"
        )
    parts: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
    for name, tensor in model.state_dict().items():
        official, in_tower = name_for_official(name)
        parts[in_tower][official] = tensor.contiguous().clone()
    tower = folder / "vision_tower"
    tower.mkdir()
    save_file(parts[False], folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(parts[True], tower / "pytorch_model.bin")
    _write_configs(config, processor, folder, tower)
    processor.tokenizer.save_pretrained(folder)


def _write_configs(config: ConvLlavaConfig, processor: ConvLlavaProcessor, folder: Path, tower: Path) -> None:
    vision, pixels = config.vision_config, processor.image_processor
    text = {
        key: value for key, value in config.text_config.to_dict().items() if key not in ("rope_parameters", "dtype")
    }
    rope = config.text_config.rope_parameters or {}
    language = text | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": MODEL_TYPE,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None,
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
        place.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
