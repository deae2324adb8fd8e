"""Recipes: which model is built, and the ordered list of stages that train it. Plain dataclasses, read from YAML.

recipe = Recipe.load("recipes/tiny-quick.yaml", {"stages.instruct.steps": 10})
print(recipe.dump())
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from convllava.data import Format
from convllava.errors import ConfigError
from convllava.training.recipe_yaml import flattened, read_yaml

Objective = Literal["dense", "align", "chat"]


@dataclass(frozen=True)
class Source:
    """Files of conversations; docs/data.md shows every format."""

    path: str | list[str]
    """A file, a pattern of files with `*`, or a list of both: paths relative to the recipe's `data_root`, or addresses
    that fsspec opens. With the format `datasets` also a name for `datasets.load_dataset`."""
    images: str = ""
    """Folder that the images' paths are relative to; itself relative to `data_root`."""
    format: Format | None = None
    """None: found from the file's name."""
    subset: str | None = None
    """Configuration name for `datasets.load_dataset`."""
    split: str = "train"
    """Split for `datasets.load_dataset`."""
    limit: int | None = None
    """Use only the first samples, up to this number."""
    repeat: float = 1.0
    """How often an epoch uses each sample; 1.5 uses the first half twice."""
    weight: float | None = None
    """Share of an epoch, relative to the weights of the stage's other sources; replaces `repeat`. Either all sources of
    a stage have one or none. An epoch is as long as all sources together; samples that do not fit into it are used in
    the next epoch."""

    def __post_init__(self) -> None:
        if self.repeat <= 0 or (self.limit is not None and self.limit < 1):
            raise ConfigError(f"source {self.name}: repeat must be above 0 and limit 1 or more")
        if self.weight is not None and (self.weight <= 0 or self.repeat != 1.0):
            raise ConfigError(f"source {self.name}: weight must be above 0, and cannot be combined with repeat")
        if not self.paths:
            raise ConfigError("a source needs a path")

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def name(self) -> str:
        """Name of the source in reports and messages."""
        return ", ".join([*self.paths[:2], "..."][: len(self.paths)]) + (f" ({self.subset})" if self.subset else "")


@dataclass(frozen=True)
class Data:
    """Samples of a stage: from files if `sources` are given, else from the generated world. In the generated world one
    page gives one sequence: questions with their answers, and its caption."""

    OLD_KEYS: ClassVar = {"darkest": "min_brightness", "casual": "casual_questions", "sheets": "glyph_sheets"}

    sources: list[Source] = field(default_factory=list)
    """Files of conversations; the settings of the generated world are then ignored."""
    max_tokens: int | None = None
    """Longest sequence of a sample from files, visual tokens included; None: the language model's context."""
    overlong: Literal["truncate", "skip"] = "truncate"
    """Treatment of longer samples. A sample is skipped if the cut would go through an image."""
    max_skipped: float = 0.05
    """Bad samples of files are skipped and listed in `skipped.jsonl`; a larger share than this stops the run."""
    size: int = 384
    """Square root of the pages' area in pixels."""
    kinds: dict[str, float] | None = None
    """Weights of the kinds of page; None: the world's default mix."""
    simple: bool = False
    """Use the simpler world of shapes, tickets and bar charts."""
    turns: int = 6
    """Question-answer turns per image."""
    grounding: float = 0.12
    """Share of the turns that ask for a box."""
    min_brightness: float = 1.0
    """Brightness of the darkest page as a share of full light; below 1, some pages are darkened."""
    captions: float = 1.0
    """Share of samples with the caption before or, mostly, after the turns."""
    casual_questions: float = 0.0
    """Share of the questions without capitals and final mark, or after other words such as "One question:"."""
    images: bool = True
    """False: the same conversations without the image, for a language model that has never seen text."""
    glyph_sheets: float = 0.0
    """Share of glyph sheets, pages full of single characters (objectives dense and align only)."""

    def __post_init__(self) -> None:
        weighted = [source for source in self.sources if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            raise ConfigError(f"source {weighted[0].name}: give all sources of a stage a weight, or none")


@dataclass(frozen=True)
class ModelSpec:
    """The model before the first stage: a saved model, or a new one built from pretrained parts or configurations."""

    checkpoint: str | None = None
    """Folder or hub id of a model to start from; excludes all other keys."""
    vision_from: str | None = None
    """Folder of a pretrained four-stage ConvNeXt, to which a fifth stage is added; needs `language_from`."""
    language_from: str | None = None
    """Folder or hub id of a pretrained causal language model with its tokenizer; needs `vision_from`."""
    preset: str | None = None
    """A published architecture (see `convllava info`) that both parts must match; it also sets `pixels`."""
    vision: dict[str, Any] = field(default_factory=dict)
    """Settings of a new `ConvLlavaVisionConfig`."""
    language: dict[str, Any] = field(default_factory=dict)
    """Settings of a new causal language model; `model_type` names its family (default llama)."""
    pixels: dict[str, Any] = field(default_factory=dict)
    """Settings of a new image processor: mode, min_pixels, max_pixels, side."""
    row_separator: bool | None = None
    """If True, a learned token ends each row of visual tokens. None: only if the parts are not pretrained."""
    coordinate_embedding: bool | None = None
    """If True, a learned projection of their coordinates is added to visual tokens. None: as `row_separator`."""

    def __post_init__(self) -> None:
        settings = self.vision or self.language
        given = [
            f.name
            for f in dataclasses.fields(self)
            if f.name != "checkpoint" and getattr(self, f.name) not in (None, {})
        ]
        if self.checkpoint is not None and given:
            raise ConfigError(f"model: checkpoint is a whole model; leave out {', '.join(given)}")
        if (self.vision_from is None) != (self.language_from is None):
            raise ConfigError("model: give vision_from and language_from together")
        if self.vision_from is not None and settings:
            raise ConfigError("model: vision and language configure new parts; leave them out if vision_from is given")
        if self.preset is not None and (self.vision_from is None or self.pixels):
            raise ConfigError("model: preset needs vision_from and language_from, and sets pixels itself")

    @property
    def has_row_separator(self) -> bool:
        """`row_separator`, or its default."""
        return self.vision_from is None if self.row_separator is None else self.row_separator

    @property
    def has_coordinate_embedding(self) -> bool:
        """`coordinate_embedding`, or its default."""
        return self.vision_from is None if self.coordinate_embedding is None else self.coordinate_embedding


@dataclass(frozen=True)
class Evaluation:
    """The loss on held-out samples, measured while the stage trains."""

    every: int = 200
    """Steps between two evaluations."""
    samples: int = 64
    """Number of samples: from the generated world's held-out split, or from the sources below."""
    sources: list[Source] = field(default_factory=list)
    """Files that the stage does not train on; needed if it trains on files."""
    patience: int | None = None
    """Stop after this many evaluations without a smaller loss, and keep the weights with the smallest loss."""
    pictures: int = 4
    """Held-out samples that are answered at each evaluation and drawn in TensorBoard."""

    def __post_init__(self) -> None:
        least = min(self.every, self.samples, 1 if self.patience is None else self.patience)
        if least < 1 or self.pictures < 0:
            raise ConfigError("evaluation: every, samples and patience must be 1 or more, pictures 0 or more")


@dataclass(frozen=True)
class Adapter:
    """LoRA on some parts; other parts that train are saved whole with the adapter."""

    rank: int = 16
    """Rank of the update of each linear layer."""
    alpha: float | None = None
    """The update is scaled by alpha / rank; None: twice the rank."""
    dropout: float = 0.0
    """Dropout on the adapter's inputs while training."""
    parts: list[str] = field(default_factory=lambda: ["language_model"])
    """Parts that are adapted, all of which need a learning rate: language_model, or stages of the tower."""
    dora: bool = False
    """Learn magnitude and direction of the weights separately (DoRA, arXiv 2402.09353)."""
    four_bit: bool = False
    """Keep the language model in four bits (QLoRA, arXiv 2305.14314); needs bitsandbytes and a device it supports."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1 or (self.alpha is not None and self.alpha <= 0):
            raise ConfigError("adapter: rank must be 1 or more, alpha above 0, dropout 0 or more and below 1")
        if not self.parts:
            raise ConfigError("adapter: parts needs at least one part, such as language_model")


@dataclass(frozen=True)
class Budget:
    """Micro-batches limited by tokens and pixels instead of by a fixed number of samples; only for data from files."""

    OLD_KEYS: ClassVar = {"passes": "micro_batches"}

    tokens: int | None = None
    """Most positions that the language model computes in a micro-batch, padding included."""
    pixels: int | None = None
    """Most pixels of all images of a micro-batch, as resized."""
    micro_batches: int = 1
    """Micro-batches per optimiser step, shared by the processes."""

    def __post_init__(self) -> None:
        given = [value for value in (self.tokens, self.pixels) if value is not None]
        if not given:
            raise ConfigError("budget: give tokens, pixels or both")
        if min(*given, self.micro_batches) < 1:
            raise ConfigError("budget: tokens, pixels and micro_batches must be 1 or more")


@dataclass(frozen=True)
class Stage:
    """One stage of training."""

    OLD_KEYS: ClassVar = {
        "trains": "learning_rates",
        "accumulate": "gradient_accumulation_steps",
        "balance": "answer_length_weighting",
        "guidance": "attention_supervision",
        "marks": "position_label_weight",
        "letters": "character_label_weight",
        "questions": "prompt_loss_weight",
    }
    """Keys of earlier recipes -> their names now."""

    name: str
    """Name of the stage and, after its number, of the folder of its checkpoint."""
    steps: int | None = None
    """Optimiser steps."""
    learning_rates: dict[str, float] = field(default_factory=dict)
    """Part -> peak learning rate. Parts: stem, stage1, stage2 ..., projector, language_model, and head (the auxiliary
    heads of the objectives dense and align, and of position labels). Other parts are frozen."""
    data: Data = field(default_factory=Data)
    """Samples to train on."""
    objective: Objective = "chat"
    """`chat` supervises the assistant's text; `dense` trains the first four stages of the tower to predict what each
    cell shows; `align` trains visual tokens to name what they show."""
    epochs: float | None = None
    """Replaces `steps` for data from files: how often every sample is used."""
    pixels: dict[str, Any] = field(default_factory=dict)
    """Settings of the image processor to change for this stage and all later ones: min_pixels, side ..."""
    batch_size: int = 8
    """Samples per optimiser step; with a budget, the most samples."""
    budget: Budget | None = None
    """Fill micro-batches up to a number of tokens and pixels, with samples of similar cost."""
    packing: bool = False
    """Concatenate the samples of a micro-batch in one row instead of padding them; attention stays within samples."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimiser step, each of batch_size / gradient_accumulation_steps samples."""
    schedule: Literal["cosine", "linear", "constant", "stable"] = "cosine"
    """Learning rate after the warm-up. stable: constant, then linear to 0 in the last fifth of the steps; such a run
    can be made longer from the step at which the decay begins (arXiv 2404.06395, section 4)."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonal steps for the matrices that mix channels, AdamW for the rest, at the same learning rate."""
    weight_decay: float = 0.0
    """Decay of matrices; vectors are not decayed."""
    weight_decays: dict[str, float] = field(default_factory=dict)
    """Part -> its weight decay, if different from `weight_decay`."""
    layer_decays: dict[str, float] = field(default_factory=dict)
    """Part -> factor of the learning rate from each layer to the layer before it, for language_model and the tower's
    stages: with 0.9 the rate halves in seven layers."""
    ema: float = 0.0
    """Decay of a running average of the weights, which is evaluated and saved; 0: use the weights of the last step."""
    adam_beta2: float = 0.999
    """Decay of AdamW's average of squared gradients."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; .inf turns clipping off."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast, Muon's steps and the tower's frozen stages; weights stay in float32."""
    calibrate: bool = False
    """Shift and scale the tower's last stage and the projector on a few pages before the first step, if new."""
    answer_length_weighting: float = 0.0
    """0: every supervised token has the same weight; 1: every answer has, however long; values between interpolate."""
    attention_supervision: float = 0.0
    """Weight of a loss that moves the language model's attention to the answer and to the things that a question names.
    Only for the generated world."""
    position_label_weight: float = 0.0
    """Weight of a loss on auxiliary heads, which are not part of the model: each visual token predicts, in the lower
    layers of the language model, its line, word, bar ... and box. `learning_rates` then needs the part `head`."""
    character_label_weight: float = 0.0
    """Weight, in a stage with position labels, of a loss that asks each visual token, before the language model, for
    the characters in it."""
    prompt_loss_weight: float = 0.0
    """Weight of the loss of all text that is not an answer. A language model that was never trained also learns to read
    from the parts of a page that questions name."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, also in the tower: less memory, more time."""
    feature_cache_gb: float = 0.0
    """Size in GB of a cache on disk of the outputs of the tower's frozen stages, next to the output folder; only for
    data from files."""
    evaluation: Evaluation | None = None
    """Measure the loss on held-out samples while training."""
    adapter: Adapter | None = None
    """Train some parts by LoRA; the stage's folder then holds an adapter (see `convllava merge`)."""

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ConfigError(f"stage {self.name}: {problem}")

    @property
    def all_sources(self) -> list[Source]:
        """Files that the stage trains on or is evaluated on."""
        return [*self.data.sources, *(self.evaluation.sources if self.evaluation else [])]

    def _problems(self) -> Iterator[str]:
        """Yield a message for each wrong setting."""
        for key, value in flattened(dataclasses.asdict(self)).items():
            if isinstance(value, float) and not math.isfinite(value) and (key, value) != ("max_grad_norm", math.inf):
                yield f"{key} must be a finite number; got {value}"
        for key in ("grounding", "captions", "casual_questions", "glyph_sheets", "max_skipped"):
            if not 0 <= (share := getattr(self.data, key)) <= 1:
                yield f"data.{key} must be between 0 and 1; got {share:g}"
        if min(1 if self.steps is None else self.steps, self.batch_size, self.gradient_accumulation_steps) < 1:
            yield "steps, batch_size and gradient_accumulation_steps must be 1 or more"
        if self.data.max_tokens is not None and self.data.max_tokens < 1:
            yield f"data.max_tokens must be 1 or more; got {self.data.max_tokens}"
        if (self.steps is None) == (self.epochs is None):
            yield "give either steps or epochs"
        if self.epochs is not None and (self.epochs <= 0 or not self.data.sources):
            yield "epochs must be above 0, and needs data from files (data.sources)"
        if not re.fullmatch(r"[\w-]+", self.name):
            yield "a name has only letters, digits, - and _, since it names a folder"
        if self.batch_size % self.gradient_accumulation_steps:
            yield (
                f"batch_size {self.batch_size} is not a multiple of gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}"
            )
        if not self.learning_rates or min(self.learning_rates.values()) < 0:
            yield "learning_rates needs at least one part, and no learning rate below 0"
        if not 0 <= self.warmup <= 1:
            yield f"warmup is a share of the steps, 0 to 1; got {self.warmup}"
        if not 0 <= self.adam_beta2 < 1:
            yield f"adam_beta2 must be 0 or more and below 1; got {self.adam_beta2}"
        if self.weight_decay < 0 or self.max_grad_norm <= 0:
            yield "weight_decay must be 0 or more, max_grad_norm above 0"
        if not 0 <= self.answer_length_weighting <= 1:
            yield f"answer_length_weighting must be between 0 and 1; got {self.answer_length_weighting}"
        if not 0 <= self.ema < 1:
            yield f"ema must be 0 or more and below 1, such as 0.999; got {self.ema}"
        yield from self._problems_of_objective()
        yield from self._problems_of_memory()
        for part in self.layer_decays:
            if not re.fullmatch(r"language_model|stage\d+", part):
                yield f"layer_decays: {part} has no layers; only language_model and the tower's stages have"
        for name, decays in (("weight_decays", self.weight_decays), ("layer_decays", self.layer_decays)):
            for part, decay in decays.items():
                if part not in self.learning_rates:
                    yield f"{name}: {part} has no learning rate in learning_rates"
                if not 0 <= decay <= 1:
                    yield f"{name}: {part} must be between 0 and 1; got {decay}"

    def _problems_of_objective(self) -> Iterator[str]:
        """Yield a message for each setting that does not fit the objective or the data."""
        is_chat, needs_pages = self.objective == "chat", self.attention_supervision != 0 or self.calibrate
        for key in ("prompt_loss_weight", "attention_supervision", "position_label_weight", "character_label_weight"):
            if getattr(self, key) < 0:
                yield f"{key} must be 0 or more"
        for key in (
            "gradient_checkpointing",
            "answer_length_weighting",
            "prompt_loss_weight",
            "attention_supervision",
            "packing",
            "adapter",
        ):
            if getattr(self, key) and not is_chat:
                yield f"{key} needs the objective chat"
        if self.objective == "dense" and self.calibrate:
            yield "calibrate needs the objective align or chat"
        if self.calibrate and not self.data.images:
            yield "calibrate needs images, but data.images is false"
        if self.attention_supervision and not self.data.images:
            yield "attention_supervision needs images, but data.images is false"
        if self.adapter is not None and needs_pages:
            yield "adapter cannot be combined with attention_supervision or calibrate"
        if self.position_label_weight and not self.attention_supervision:
            yield "position_label_weight needs attention_supervision"
        if self.position_label_weight and "head" not in self.learning_rates:
            yield "position_label_weight trains a head, which needs a learning rate, such as head: 1.0e-3"
        if is_chat and not self.position_label_weight and "head" in self.learning_rates:
            yield "with the objective chat only position_label_weight has a head; take head out of learning_rates"
        if self.character_label_weight and not self.position_label_weight:
            yield "character_label_weight needs position_label_weight"
        if self.character_label_weight and not set(self.learning_rates) - {"language_model", "head"}:
            yield "character_label_weight needs a learning rate of the projector or of a part of the tower"
        if self.packing and self.attention_supervision:
            yield "packing cannot be combined with attention_supervision"
        if self.data.sources and (not is_chat or needs_pages):
            yield "files hold conversations, which do not fit dense, align, attention_supervision or calibrate"
        if self.evaluation is not None and bool(self.evaluation.sources) != bool(self.data.sources):
            yield "give evaluation.sources if the stage has data.sources, and only then"

    def _problems_of_memory(self) -> Iterator[str]:
        """Yield a message for each setting of the feature cache or the budget that does not fit the other settings."""
        if self.feature_cache_gb < 0:
            yield "feature_cache_gb must be 0 or more"
        if self.feature_cache_gb > 0:
            if not self.data.sources:
                yield "feature_cache_gb needs data from files (data.sources); generated pages never repeat"
            for part in {"stem", "stage1"} & set(self.learning_rates):
                yield f"feature_cache_gb caches the frozen stages before the first one that trains, but {part} trains"
        if (budget := self.budget) is None:
            return
        if not self.data.sources:
            yield "budget needs data from files (data.sources): the cost of a generated page is not known in advance"
        if self.gradient_accumulation_steps != 1:
            yield "budget.micro_batches replaces gradient_accumulation_steps"
        if self.answer_length_weighting or self.prompt_loss_weight:
            yield (
                "answer_length_weighting and prompt_loss_weight are means within one micro-batch, whose sizes differ "
                "with a budget; leave out either them or the budget"
            )
        if self.batch_size % budget.micro_batches:
            yield f"batch_size {self.batch_size} is not a multiple of budget.micro_batches {budget.micro_batches}"


@dataclass(frozen=True)
class Recipe:
    """A model and the stages that train it."""

    name: str
    stages: list[Stage]
    model: ModelSpec = field(default_factory=ModelSpec)
    data_root: str = "."
    """Folder that paths of data are relative to."""
    seed: int = 0
    """Seed of weights, data and everything else that is random."""
    workers: int = 1
    """Processes that prepare samples for the trainer."""
    sharding: Literal["none", "fsdp", "zero2", "zero3"] = "none"
    """How several processes share a model. none: each has a copy; fsdp: FSDP2; zero2 and zero3: DeepSpeed's ZeRO, whose
    stage 2 shards gradients and optimiser state, and stage 3 also the weights."""
    report_to: list[str] = field(default_factory=list)
    """Loggers in addition to log.jsonl and TensorBoard, by transformers' names: wandb, trackio, mlflow ..."""
    save_every: int = 500
    """Steps between the checkpoints from which a killed run continues."""

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names:
            raise ConfigError("a recipe needs at least one stage")
        if len(set(names)) != len(names):
            raise ConfigError(f"the stages' names must differ; got {', '.join(names)}")
        if self.workers < 0 or self.save_every < 1:
            raise ConfigError("workers must be 0 or more, save_every 1 or more")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed must be 0 or more and below 2**31; got {self.seed}")

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Recipe:
        """Read a recipe from a YAML file.

        Args:
            path: The file.
            overrides: Settings to replace, by dotted keys; stages by their name or number. Either a mapping,
                `{"data_root": "photos", "stages.0.steps": 10}`, or texts with YAML values, `["stages.0.steps=10"]`.

        Raises:
            ConfigError: if there is no such file, it is not YAML, or it has an unknown key or a bad value; the message
                names the nearest known key.
        """
        recipe: Recipe = read_yaml(cls, Path(path), overrides)
        return recipe

    def dump(self) -> str:
        """Return the recipe as YAML with every default written out; `load` reads it back to an equal recipe."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)

    def differences(self, other: Recipe) -> list[str]:
        """Return each setting that could make the weights differ: "stages.instruct.steps: 10 -> 20"."""
        old, new = (flattened(dataclasses.asdict(recipe)) for recipe in (self, other))
        absent = "(absent)"
        return [
            f"{key}: {old.get(key, absent)} -> {new.get(key, absent)}"
            for key in [*old, *(key for key in new if key not in old)]
            if old.get(key, absent) != new.get(key, absent) and not _WITHOUT_EFFECT_ON_WEIGHTS.fullmatch(key)
        ]


_WITHOUT_EFFECT_ON_WEIGHTS = re.compile(
    r"workers|save_every|report_to(\.\d+)?|stages\.[^.]+\.(data\.max_skipped|evaluation\.pictures)"
)
"""Settings that may change when a run is resumed."""
