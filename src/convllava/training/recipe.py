"""A recipe is data: what is built, and the ordered list of stages that train it. YAML <-> dataclasses, strictly."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from convllava.errors import InputError
from convllava.training import recipe_yaml
from convllava.training.recipe_data import Data, Source

Objective = Literal["dense", "align", "chat"]


@dataclass(frozen=True)
class ModelSpec:
    """What the first stage starts from: a saved model, or a fresh one built from configurations."""

    checkpoint: str | None = None
    """Folder or hub id of a model to start from, alone."""
    vision_from: str | None = None
    """Folder of a pretrained four-stage ConvNeXt, to which a fifth stage is added; with `language_from`."""
    language_from: str | None = None
    """Folder or hub id of a pretrained causal language model with its tokenizer; with `vision_from`."""
    preset: str | None = None
    """A published architecture (see `convllava info`) that the two must fit, and its pixels."""
    vision: dict[str, Any] = field(default_factory=dict)
    """Settings of a fresh `ConvLlavaVisionConfig`."""
    language: dict[str, Any] = field(default_factory=dict)
    """Settings of a fresh causal language model; `model_type` names its family (default llama)."""
    pixels: dict[str, Any] = field(default_factory=dict)
    """Settings of a fresh image processor: mode, min_pixels, max_pixels, side."""
    row_separator: bool | None = None
    """Whether a learned token ends each row of visual tokens; None: in fresh models, not beside pretrained parts."""
    coordinate_embedding: bool | None = None
    """Whether visual tokens are told where they stand; None: as above."""

    def __post_init__(self) -> None:
        settings = self.vision or self.language
        given = [
            f.name
            for f in dataclasses.fields(self)
            if f.name != "checkpoint" and getattr(self, f.name) not in (None, {})
        ]
        if self.checkpoint is not None and given:
            raise InputError(f"model: checkpoint stands alone; leave out {', '.join(given)}")
        if (self.vision_from is None) != (self.language_from is None):
            raise InputError("model: vision_from and language_from come together")
        if self.vision_from is not None and settings:
            raise InputError("model: vision and language describe fresh parts; leave them out beside vision_from")
        if self.preset is not None and (self.vision_from is None or self.pixels):
            raise InputError("model: preset needs vision_from and language_from, and has pixels of its own")

    @property
    def knows_places(self) -> tuple[bool, bool]:
        """Row separators and coordinates, as asked for or by default."""
        default = self.vision_from is None
        rows, coordinates = self.row_separator, self.coordinate_embedding
        return default if rows is None else rows, default if coordinates is None else coordinates


@dataclass(frozen=True)
class Evaluation:
    """The loss on held-out samples, measured while the stage trains."""

    every: int = 200
    """Steps between two evaluations."""
    samples: int = 64
    """Of the generated world's held-out split, or of the sources below."""
    sources: list[Source] = field(default_factory=list)
    """Files that the stage does not train on, where it trains on files."""
    patience: int | None = None
    """Stop after so many evaluations without a smaller loss, and in any case keep the weights that had the smallest."""
    pictures: int = 4
    """Held-out samples that are answered at each evaluation and drawn in TensorBoard."""

    def __post_init__(self) -> None:
        least = min(self.every, self.samples, 1 if self.patience is None else self.patience)
        if least < 1 or self.pictures < 0:
            raise InputError("evaluation: every, samples and patience are 1 or more, pictures 0 or more")


@dataclass(frozen=True)
class Adapter:
    """LoRA in place of the weights of some parts; other parts that train are saved whole with it."""

    rank: int = 16
    """Of the two small matrices beside each linear layer."""
    alpha: float | None = None
    """What they add is scaled by alpha / rank; None: twice the rank."""
    dropout: float = 0.0
    """Of what goes into them, while training."""
    parts: list[str] = field(default_factory=lambda: ["language_model"])
    """Which of the parts that train do so through them: language_model, or stages of the tower."""
    dora: bool = False
    """Learn the length of each weight's rows apart from their direction (arXiv 2402.09353)."""
    four_bit: bool = False
    """Keep the language model in four bits (QLoRA, arXiv 2305.14314), for which bitsandbytes must have a device."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1 or (self.alpha is not None and self.alpha <= 0):
            raise InputError("adapter: rank is 1 or more, alpha above 0, dropout a share of 0 or more and below 1")
        if not self.parts:
            raise InputError("adapter: parts names at least one part, such as language_model")


@dataclass(frozen=True)
class Budget:
    """Passes filled by what samples cost, in place of a fixed number of samples; of data that come from files."""

    tokens: int | None = None
    """Positions that the language model computes in a pass, padding included, at most."""
    pixels: int | None = None
    """Pixels of all images of a pass, as resized, at most."""
    passes: int = 1
    """Per optimiser step, shared by the processes."""

    def __post_init__(self) -> None:
        if self.tokens is None and self.pixels is None:
            raise InputError("budget: give tokens, pixels or both")
        if min(1 if self.tokens is None else self.tokens, 1 if self.pixels is None else self.pixels, self.passes) < 1:
            raise InputError("budget: tokens, pixels and passes are 1 or more")


@dataclass(frozen=True)
class Stage:
    """One stage of training."""

    name: str
    """Names the folder of the stage's checkpoint."""
    steps: int | None = None
    """Optimiser steps."""
    trains: dict[str, float] = field(default_factory=dict)
    """Part -> peak learning rate. Parts: stem, stage1, stage2 ..., projector, language_model, and
    head, of the objectives dense and align and with marks. Others are frozen."""
    data: Data = field(default_factory=Data)
    """What the stage sees."""
    objective: Objective = "chat"
    """`chat` supervises the assistant's text; `dense` trains the first four stages on what stands where; `align`
    trains visual tokens to name what they show."""
    epochs: float | None = None
    """In place of steps, where the data are files: how often every sample comes."""
    pixels: dict[str, Any] = field(default_factory=dict)
    """Settings of the image processor that change with this stage and stay changed: min_pixels, side ..."""
    batch_size: int = 8
    """Samples per optimiser step; with a budget, at most so many."""
    budget: Budget | None = None
    """Fill passes up to so many tokens and pixels, with samples of similar cost."""
    packing: bool = False
    """Lay the samples of a pass end to end in one row, none seeing another, in place of padding them."""
    accumulate: int = 1
    """Forward passes per optimiser step: each takes batch_size / accumulate samples."""
    schedule: Literal["cosine", "linear", "constant", "stable"] = "cosine"
    """Of the learning rate, after the warm-up. stable: constant, and linear to 0 in the last fifth of the steps; a run
    can then be made longer from where that begins (arXiv 2404.06395, section 4)."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonal steps for the matrices that mix channels, AdamW for the rest; at the same learning rate."""
    weight_decay: float = 0.0
    """On matrices only."""
    weight_decays: dict[str, float] = field(default_factory=dict)
    """Part -> its weight decay, where it is another."""
    layer_decays: dict[str, float] = field(default_factory=dict)
    """Part -> by how much the learning rate of each of its layers is smaller than that of the next, for language_model
    and the tower's stages: 0.9 halves it in seven layers."""
    ema: float = 0.0
    """Evaluate and leave a running average of the weights, of which each step keeps this share; 0: the last weights."""
    adam_beta2: float = 0.999
    """AdamW's memory of squared gradients."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; .inf leaves them as they are."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: products under autocast, Muon's steps and the tower's frozen stages; weights stay in float32."""
    calibrate: bool = False
    """Shift and scale the last stage and the projector on a few pages before the first step, where they are new."""
    balance: float = 0.0
    """0: every supervised token counts alike; 1: every answer does, however long; between: in between."""
    guidance: float = 0.0
    """Weight of the loss that asks the language model's attention to look where an answer stands and at what a question
    names."""
    marks: float = 0.0
    """Weight of the loss that asks, through heads that are no part of it, the language model's lower layers at each
    visual token which line, word, bar ... stands there, and its box; `trains` then has the part `head`."""
    letters: float = 0.0
    """Weight, in a stage with marks, of the loss that asks each visual token, before the language model, for the
    characters in it."""
    questions: float = 0.0
    """Weight of the loss of all text that is no answer: a language model from nothing learns to read from what
    questions name of the page, too."""
    gradient_checkpointing: bool = False
    """Trade time for memory, in the tower too."""
    feature_cache_gb: float = 0.0
    """Keep so many GB of what the tower's frozen stages make of the images of files, beside the output folder."""
    evaluation: Evaluation | None = None
    """Measure the loss on held-out samples meanwhile."""
    adapter: Adapter | None = None
    """Train some parts by LoRA; the stage's folder then holds an adapter (see `convllava merge`)."""

    def __post_init__(self) -> None:
        self._check_finite(f"stage {self.name}")
        self._check_shares(f"stage {self.name}")
        self._check_length(f"stage {self.name}")
        for is_bad, told in self._rules():
            if is_bad:
                raise InputError(f"stage {self.name}: {told}")
        self._check_decays(f"stage {self.name}")

    def _rules(self) -> typing.Iterator[tuple[bool, str]]:
        """What must not be, and what is said then."""
        chat, pointed = self.objective == "chat", self.guidance != 0 or self.calibrate
        yield (
            not re.fullmatch(r"[\w-]+", self.name),
            "a name has letters, digits, - and _ only, since it names a folder",
        )
        yield (
            self.batch_size % self.accumulate != 0,
            (f"batch_size {self.batch_size} is no multiple of accumulate {self.accumulate}"),
        )
        yield (
            not self.trains or min(self.trains.values()) < 0,
            "trains needs at least one part, and no learning rate below 0",
        )
        yield not 0 <= self.warmup <= 1, f"warmup is a share of the steps, 0 to 1; got {self.warmup}"
        yield not 0 <= self.adam_beta2 < 1, f"adam_beta2 is 0 or more and below 1; got {self.adam_beta2}"
        yield self.weight_decay < 0 or self.max_grad_norm <= 0, "weight_decay is 0 or more, max_grad_norm above 0"
        yield (
            not 0 <= self.balance <= 1,
            (f"balance lies between 0, tokens alike, and 1, answers alike; got {self.balance}"),
        )
        yield not 0 <= self.ema < 1, f"ema is a share of 0 or more and below 1, such as 0.999; got {self.ema}"
        yield self.objective == "dense" and self.calibrate, "calibrate is for the objectives align and chat"
        yield self.calibrate and not self.data.images, "calibrate needs images, but data.images is false"
        yield self.gradient_checkpointing and not chat, "gradient_checkpointing is for the objective chat"
        yield self.balance != 0 and not chat, "balance is for the objective chat"
        yield (
            self.questions < 0 or (self.questions > 0 and not chat),
            "questions is a weight of 0 or more, for the objective chat",
        )
        yield (
            self.guidance < 0 or (self.guidance > 0 and (not chat or not self.data.images)),
            "guidance is a weight of 0 or more, for the objective chat with images",
        )
        yield (
            self.adapter is not None and (not chat or pointed),
            "adapter is for the objective chat, without guidance and calibrate",
        )
        yield (
            self.marks < 0 or (self.marks > 0 and self.guidance <= 0),
            "marks is a weight of 0 or more, for stages with guidance",
        )
        yield (
            self.marks > 0 and "head" not in self.trains,
            "marks are learnt by a head, which trains needs with its learning rate, such as head: 1.0e-3",
        )
        yield (
            chat and self.marks == 0 and "head" in self.trains,
            "of the objective chat only a stage with marks has a head; take it out of trains",
        )
        yield (
            self.letters < 0 or (self.letters > 0 and (self.marks <= 0 or not self._trains_pixels())),
            "letters is a weight of 0 or more, for stages with marks that train the projector or the tower",
        )
        yield self.packing and (not chat or self.guidance > 0), "packing is for the objective chat without guidance"
        yield (
            bool(self.data.sources) and (not chat or pointed),
            "files have conversations only, which suit no dense, align, guidance or calibrate",
        )
        yield (
            self.evaluation is not None and bool(self.evaluation.sources) != bool(self.data.sources),
            "evaluation.sources are files if data.sources are, and only then",
        )
        yield from self._cache_rules()
        yield from self._budget_rules()

    def _trains_pixels(self) -> bool:
        return bool(set(self.trains) - {"language_model", "head"})

    def _cache_rules(self) -> typing.Iterator[tuple[bool, str]]:
        yield self.feature_cache_gb < 0, "feature_cache_gb is 0 or more"
        if self.feature_cache_gb == 0:
            return
        yield (
            not self.data.sources,
            "feature_cache_gb is for files (data.sources), whose images come again; no generated page does",
        )
        for part in {"stem", "stage1"} & set(self.trains):
            yield True, f"feature_cache_gb keeps what comes before the first stage that trains, and {part} trains"

    def _budget_rules(self) -> typing.Iterator[tuple[bool, str]]:
        if (budget := self.budget) is None:
            return
        yield (
            not self.data.sources,
            "budget is for files (data.sources): what a generated page costs is not known before it is drawn",
        )
        yield self.accumulate != 1, "budget.passes stands in place of accumulate"
        yield (
            self.balance != 0 or self.questions != 0,
            "balance and questions are means within one pass, which a budget makes unequal; leave them or it out",
        )
        yield (
            self.batch_size % budget.passes != 0,
            f"batch_size {self.batch_size} is no multiple of budget.passes {budget.passes}",
        )

    @property
    def all_sources(self) -> list[Source]:
        """Files that it trains on or is evaluated on."""
        return [*self.data.sources, *(self.evaluation.sources if self.evaluation else [])]

    def _check_decays(self, where: str) -> None:
        for part in self.layer_decays:
            if not re.fullmatch(r"language_model|stage\d+", part):
                raise InputError(
                    f"{where}: layer_decays: {part} has no layers; language_model and the tower's stages have"
                )
        for name, decays in (("weight_decays", self.weight_decays), ("layer_decays", self.layer_decays)):
            for part, decay in decays.items():
                if part not in self.trains:
                    raise InputError(f"{where}: {name} names {part}, which trains does not")
                if not 0 <= decay <= 1:
                    raise InputError(f"{where}: {name}: {part} must be 0 to 1; got {decay}")

    def _check_finite(self, where: str) -> None:
        for key, value in _flat(dataclasses.asdict(self)).items():
            boundless = key == "max_grad_norm" and value == math.inf
            if isinstance(value, float) and not math.isfinite(value) and not boundless:
                raise InputError(f"{where}: {key} is a finite number; got {value}")

    def _check_shares(self, where: str) -> None:
        for key in ("grounding", "captions", "casual", "sheets", "max_skipped"):
            if not 0 <= (share := getattr(self.data, key)) <= 1:
                raise InputError(f"{where}: data.{key} is a share from 0 to 1; got {share:g}")

    def _check_length(self, where: str) -> None:
        if min(1 if self.steps is None else self.steps, self.batch_size, self.accumulate) < 1:
            raise InputError(f"{where}: steps, batch_size and accumulate must be 1 or more")
        if self.data.max_tokens is not None and self.data.max_tokens < 1:
            raise InputError(f"{where}: data.max_tokens is 1 or more; got {self.data.max_tokens}")
        if (self.steps is None) == (self.epochs is None):
            raise InputError(f"{where}: give either steps or epochs")
        if self.epochs is not None and (self.epochs <= 0 or not self.data.sources):
            raise InputError(f"{where}: epochs is a number above 0, of data that come from files (data.sources)")


@dataclass(frozen=True)
class Recipe:
    """A model and the stages that train it."""

    name: str
    stages: list[Stage]
    model: ModelSpec = field(default_factory=ModelSpec)
    data_root: str = "."
    """Folder that paths of data are relative to."""
    seed: int = 0
    """Of weights, data and everything else that draws numbers."""
    workers: int = 1
    """Processes that make samples ahead of the trainer."""
    sharding: Literal["none", "fsdp", "zero2", "zero3"] = "none"
    """How several processes share a model: each has it whole; FSDP2; or DeepSpeed's ZeRO, of which stage 2 shards
    gradients and optimiser, and 3 the weights too."""
    report_to: list[str] = field(default_factory=list)
    """Where else to log beside log.jsonl and TensorBoard, by transformers' names: wandb, trackio, mlflow ..."""
    save_every: int = 500
    """Steps between checkpoints from which a killed run continues."""

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names:
            raise InputError("a recipe needs at least one stage")
        if len(set(names)) != len(names):
            raise InputError(f"the stages' names must differ; got {', '.join(names)}")
        if self.workers < 0 or self.save_every < 1:
            raise InputError("workers is 0 or more, save_every 1 or more")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed is 0 or more and below 2**31; got {self.seed}")


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML, with `key=value` overrides such as `stages.0.steps=10`.

    Raises:
        InputError: no such file, broken YAML, or a key or value that no recipe has; the nearest known key is named.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no recipe at {path}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # a date that is none is a ValueError
        raise InputError(f"{path} is not a readable YAML file: {' '.join(str(error).split())}") from None
    for change in overrides:
        recipe_yaml.override(content, change)
    return typing.cast(Recipe, recipe_yaml.build(Recipe, content, str(path)))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe, every default written out, as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)


_NEVER_LEARNT = re.compile(
    r"workers|save_every|report_to(\.\d+)?|stages\.[^.]+\.(data\.max_skipped|evaluation\.pictures)"
)
"""Settings that change no weight: how fast, how often kept, what is told, and when to give up."""


def differences(before: Recipe, after: Recipe) -> list[str]:
    """Every setting in which what two recipes learn may differ: "stages.instruct.steps: 10 -> 20"."""
    old, new = (_flat(dataclasses.asdict(recipe)) for recipe in (before, after))
    keys = [*old, *(key for key in new if key not in old)]
    absent = "(absent)"
    return [
        f"{key}: {old.get(key, absent)} -> {new.get(key, absent)}"
        for key in keys
        if old.get(key, absent) != new.get(key, absent) and not _NEVER_LEARNT.fullmatch(key)
    ]


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested content by dotted keys; items of a list by their name, if they have one, else by their index."""
    if isinstance(content, dict) and content:
        pairs: typing.Iterable[tuple[Any, Any]] = content.items()
    elif isinstance(content, list) and content:
        pairs = (
            (item.get("name", index) if isinstance(item, dict) else index, item) for index, item in enumerate(content)
        )
    else:
        return {prefix: content}
    return {
        key: value
        for name, item in pairs
        for key, value in _flat(item, f"{prefix}.{name}" if prefix else str(name)).items()
    }
