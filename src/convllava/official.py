"""Published ConvLLaVA checkpoints: read in any layout they come in, written as ours, and back.

    convllava convert ConvLLaVA-sft-1536 my-model

What the layouts are and what each tensor is called on either side: docs/checkpoints.md. Into our layout
tensors pass one source file at a time, and nothing but tensors is ever unpickled.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
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
_VOCABULARY = "tokenizer.model"
ADAPTER_CONFIG = "adapter_config.json"
_TOWER_PREFIX = "model.vision_tower.vision_tower."
_OUR_TOWER = "model.vision_tower."
_PUBLISHED = re.compile(r"ConvLLaVA/[\w.-]+")
"""Hub ids whose repositories are in the published layout."""
_LAYER = re.compile(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.")

V1_TEMPLATE = """\
{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}{{- message['content'] -}}
    {%- else -%}
        {%- set images = message['content'] | selectattr('type', 'equalto', 'image') | list -%}
        {%- set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
        {%- for image in images -%}{{- '<image> \\n' -}}{%- endfor -%}
        {{- texts | trim if images else texts -}}
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


def on_disk(name: str | Path) -> str | Path:
    """The folder of a published checkpoint that goes by a hub id, fetched if need be; anything else passes through.

    Raises:
        InputError: it cannot be fetched.
    """
    if Path(name).exists() or not _PUBLISHED.fullmatch(str(name)):
        return name
    try:
        return snapshot_download(
            str(name), allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model", "vision_tower/*"]
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(f"{name} cannot be fetched: {_line(error)}") from None


def is_official(folder: str | Path) -> bool:
    """Whether a folder holds a checkpoint in a layout of the original code."""
    folder = Path(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return True
    config = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return config.get("model_type") in (MODEL_TYPE, "llava") and "mm_vision_tower" in config


def look_through(folder: str | Path, base: str | Path | None = None) -> Layout:
    """Find the parts of an official checkpoint.

    Args:
        folder: The checkpoint.
        base: The language model that a LoRA was trained on; None takes the one its adapter_config.json names.

    Raises:
        InputError: no tower or no base anywhere, or a file that is missing.
    """
    folder = Path(folder)
    adapter = _json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).is_file() else None
    language = folder if adapter is None else _base_of(folder, adapter, base)
    config = _json((folder if (folder / "config.json").is_file() else language) / "config.json")
    if config.get("mm_projector_type", "mlp2x_gelu") != "mlp2x_gelu":
        raise InputError(
            f"{folder} has a projector of the type {config['mm_projector_type']}; only mlp2x_gelu is known"
        )
    own, named = _towers(folder, language, config)
    trained = folder / "non_lora_trainables.bin"
    files = {
        rename_trained: [trained] if adapter is not None and trained.is_file() else [],
        rename_own_tower: tensor_files(own, required=False) if own else [],
        rename_language: tensor_files(language),
        rename_tower: tensor_files(named, required=False) if named else [],
    }
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    sources = [Source(path, rename) for rename, paths in files.items() for path in paths]
    return Layout(
        folder=folder,
        config=config,
        tower_folder=own or named or folder,
        sources=sources,
        tokenizer_folder=folder if has_tokenizer else language,
        deltas={} if adapter is None else _deltas(folder, adapter),
        note="; ".join(_notes(own, named, sources, adapter is not None and not trained.is_file())),
    )


def _towers(folder: Path, language: Path, config: Mapping[str, Any]) -> tuple[Path | None, Path | None]:
    """The checkpoint's own tower, and the one its config.json names: the one that its training was given."""
    places = [place / "vision_tower" for place in dict.fromkeys((folder, language))]
    own = next((place for place in places if (place / "config.json").is_file()), None)
    name = config.get("mm_vision_tower") or ""
    candidates = [Path(on_disk(name)) if own is None else Path(name), folder / name]
    named = next((place for place in candidates if name and (place / "config.json").is_file()), None)
    if own is None and named is None:
        raise InputError(
            f"{folder} has no vision tower: neither {places[0]} nor mm_vision_tower {name!r} holds a config.json; "
            "put the tower's folder beside the model as vision_tower"
        )
    return own, named if own is None or named is None or named.resolve() != own.resolve() else None


def _notes(own: Path | None, named: Path | None, sources: list[Source], untrained: bool) -> Iterator[str]:
    if own and named:
        yield f"took the tower in {own}; mm_vision_tower names another, {named}"
    places = {part.rename for part in sources if any(name.startswith(_OUR_TOWER) for name in _new_names(part))}
    if {rename_own_tower, rename_language} <= places:
        yield f"took the tower in {own}; there is another among the language model's tensors"
    if untrained:
        yield "the LoRA came without non_lora_trainables.bin: the projector is that of its base"


def _new_names(part: Source) -> list[str]:
    return [new for new in map(part.rename, tensors_in(part.path)) if new is not None]


def _base_of(folder: Path, adapter: Mapping[str, Any], base: str | Path | None) -> Path:
    place = Path(on_disk(base or adapter.get("base_model_name_or_path") or ""))
    if not (place / "config.json").is_file():
        raise InputError(f"{folder} is a LoRA on {str(place)!r}, which is not here; name the folder with --base")
    return place


def _deltas(folder: Path, adapter: Mapping[str, Any]) -> dict[str, Delta]:
    """What the adapter's file adds to which of our weights."""
    for setting in ("use_dora", "rank_pattern", "alpha_pattern"):
        if adapter.get(setting):
            raise InputError(f"{folder / ADAPTER_CONFIG} sets {setting}, which the original code does not write")
    if not {"r", "lora_alpha"} <= set(adapter):
        raise InputError(f"{folder / ADAPTER_CONFIG} lacks r or lora_alpha; it is not a LoRA's")
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()]
    if not files:
        raise InputError(f"{folder} has {ADAPTER_CONFIG} but no adapter_model.safetensors or adapter_model.bin")
    scale = adapter["lora_alpha"] / (adapter["r"] ** 0.5 if adapter.get("use_rslora") else adapter["r"])
    tensors = tensors_in(files[0])
    deltas: dict[str, Delta] = {}
    for down in (name for name in tensors if ".lora_A." in name):
        up = down.replace(".lora_A.", ".lora_B.")
        new = rename_trained(re.sub(r"\.lora_A(\.default)?\.", ".", down))
        if new is None or up not in tensors:
            raise InputError(f"{files[0]} has {down} but not {up}")
        deltas[new] = Delta(tensors[down], tensors[up], scale)
    return deltas


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
    return rename_language(name.removeprefix("base_model.model."))


def rename_tower(name: str) -> str | None:
    """A name in the tower's file -> ours; the pooled LayerNorm that classification uses is not wanted."""
    name = name.removeprefix("convnext.").removeprefix(_TOWER_PREFIX)
    if name.startswith(("layernorm.", "classifier.")):
        return None
    return _OUR_TOWER + name


def rename_own_tower(name: str) -> str | None:
    """As `rename_tower`, of the tower in the checkpoint's own folder."""
    return rename_tower(name)


def name_for_official(name: str) -> tuple[str, bool]:
    """Our name -> (the original's, whether it belongs in the tower's file)."""
    if name.startswith(_OUR_TOWER):
        return name.removeprefix(_OUR_TOWER), True
    if match := re.fullmatch(r"model\.multi_modal_projector\.linear_(\d)\.(\w+)", name):
        return f"model.mm_projector.{2 * (int(match[1]) - 1)}.{match[2]}", False
    return name.replace("model.language_model.", "model."), False


def tensor_files(folder: Path, required: bool = True) -> list[Path]:
    """The files that hold a checkpoint's tensors: an index's shards, or the single file.

    Raises:
        InputError: there are none where they are required, or one that the index names is missing.
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
    if not required:
        return []
    raise InputError(f"{folder} holds neither model.safetensors nor pytorch_model.bin nor an index of shards")


def tensors_in(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file by name, mapped into memory; nothing but tensors is unpickled.

    Raises:
        InputError: the file is damaged, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return _Lazy(safe_open(path, framework="pt"))
        # Only the zip format of today's torch.save can be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise InputError(f"{path} is damaged, or holds code beside tensors, which is never run") from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise InputError(f"{path} is not a readable file of tensors: {_line(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path} holds more than tensors by name")
    return content


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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


def configuration(layout: Layout) -> ConvLlavaConfig:
    """Our configuration of an official checkpoint."""
    tower, config = _json(layout.tower_folder / "config.json"), layout.config
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"}
    dropped = ("model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path")
    text = {key: value for key, value in config.items() if key in known and key not in dropped and value is not None}
    return ConvLlavaConfig(
        vision_config=ConvLlavaVisionConfig(
            depths=depths_of(layout, tower["depths"]),
            hidden_sizes=list(tower["hidden_sizes"]),
            num_channels=tower.get("num_channels", 3),
            patch_size=tower.get("patch_size", 4),
            hidden_act=tower.get("hidden_act", "gelu"),
        ),
        text_config={"model_type": "llama", "pad_token_id": 0, "max_position_embeddings": 4096, **text},
        image_token_id=config["vocab_size"],
    )


def depths_of(layout: Layout, told: Sequence[int]) -> list[int]:
    """Blocks in each stage of the tower: as many as its tensors show, for the original's config.json still counts the
    block that `mm_vision_select_layer` -2 drops before a fifth stage is added. The file of a four-stage tower has it.

    Args:
        told: What the tower's config.json says.
    """
    found: dict[int, int] = {}
    for match in filter(None, (_LAYER.search(name) for part in layout.sources for name in _new_names(part))):
        stage, layer = int(match[1]), int(match[2])
        found[stage] = max(found.get(stage, 0), layer + 1)
    depths = [min(found.get(stage, depth), depth) for stage, depth in enumerate(told)]
    if _drops_last_block(layout) and len(depths) == 4 and depths[-1] == told[-1]:
        depths[-1] -= 1
    return depths


def _drops_last_block(layout: Layout) -> bool:
    return layout.config.get("mm_vision_select_layer", -1) == -2


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
    _copy_vocabulary(layout.tokenizer_folder, folder)
    index: dict[str, str] = {}
    for number, tensors in enumerate(native_tensors(layout, config, dtype), start=1):
        name = f"model-{number:05}-of-{len(layout.sources):05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        tensors.clear()  # before the next file is read
    config.architectures = ["ConvLlavaForConditionalGeneration"]
    config.dtype = dtype
    config.save_pretrained(folder)
    content = {"metadata": {}, "weight_map": index}
    _write_json(folder / "model.safetensors.index.json", content)
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
    _check_deltas(layout, expected)
    for part in layout.sources:
        tensors = renamed(part, expected, done, layout, dtype)
        done |= set(tensors)
        yield tensors
    if missing := sorted(set(expected) - done):
        raise InputError(f"{layout.folder} lacks the tensor {missing[0]} (in our naming); its weights are not complete")


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
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The tensors of one file under our names, merged with LoRA; what is done already is left out.

    Raises:
        InputError: a tensor is strange or has another shape than the configuration asks.
    """
    tensors: dict[str, Tensor] = {}
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
        merged = layout.deltas[new].added_to(tensor) if new in layout.deltas else tensor
        tensors[new] = merged.to(dtype or tensor.dtype).contiguous()
    return tensors


def _is_dropped_block(name: str, expected: Iterable[str], layout: Layout) -> bool:
    """Whether a tensor is of the block that `mm_vision_select_layer` -2 drops: the first beyond its stage."""
    match = _LAYER.search(name)
    if match is None or not _drops_last_block(layout):
        return False
    stage = re.compile(re.escape(name[: match.start(2)]) + r"\d+\.dwconv\.weight")
    return int(match[2]) == sum(stage.fullmatch(other) is not None for other in expected)


def shapes_of(config: ConvLlavaConfig) -> dict[str, torch.Size]:
    """Every tensor of a model and its shape, without allocating it."""
    with torch.device("meta"):
        model = ConvLlavaForConditionalGeneration(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _copy_vocabulary(source: Path, folder: Path) -> None:
    """Keep the tokenizer in the form that the original's slow tokenizer reads, for the way back."""
    if (source / _VOCABULARY).is_file():
        shutil.copyfile(source / _VOCABULARY, folder / _VOCABULARY)


def write_official(
    model: ConvLlavaForConditionalGeneration, processor: ConvLlavaProcessor, folder: Path, source: Path
) -> None:
    """Write a model of the official kind into `folder` so that the original code can load it.

    Args:
        source: Where the model was read from, for its tokenizer.model; without one the original's slow tokenizer
            cannot be made, only the fast one.

    Raises:
        InputError: the model has what the original does not know: row separators, coordinates, another language model
            than Llama, or images that are neither padded to a square nor cropped.
    """
    config = model.config
    text = config.text_config
    if config.row_separator or config.coordinate_embedding or text.model_type != "llama":
        raise InputError(
            "only a Llama without row separators and coordinate embeddings can be written in the official layout"
        )
    if processor.image_processor.mode not in ("square", "crop"):
        raise InputError(
            f"the official layout knows no images of mode {processor.image_processor.mode}; use square or crop"
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
    _write_tokenizer(processor, folder)
    _copy_vocabulary(source, folder)


def _write_tokenizer(processor: ConvLlavaProcessor, folder: Path) -> None:
    """Without the image's placeholder, which the original does not have: it would make its vocabulary grow."""
    processor.tokenizer.save_pretrained(folder)
    content = _json(folder / "tokenizer.json")
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != processor.image_token]
    _write_json(folder / "tokenizer.json", content)
    settings = _json(folder / "tokenizer_config.json")
    for key in ("extra_special_tokens", "image_token", "processor_class"):
        settings.pop(key, None)
    _write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": "LlamaTokenizer", "legacy": False})


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
        _write_json(place, content)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
