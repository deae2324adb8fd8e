"""LoRA: parts of a model that train through adapters, next to parts that train as a whole."""

import re
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from convllava.checkpoints.adapters import import_peft
from convllava.errors import ConfigError
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.part_names import module_of
from convllava.training.recipe import Stage

_ADAPTABLE = re.compile(r"language_model|stage\d+")


def add_adapter(model: ConvLlavaForConditionalGeneration, stage: Stage) -> Any:
    """Return the model as a `PeftModel` for the stage.

    Every linear layer of the adapted parts gets LoRA matrices. PEFT copies the parts that train as a whole.

    Raises:
        ConfigError: if a part takes no adapter.
        InputError: if PEFT is not installed.
    """
    assert stage.adapter is not None
    adapter, peft = stage.adapter, import_peft()
    check_adaptable(stage)
    # A pattern for the names of all linear layers of the adapted parts.
    patterns = []
    for part in adapter.parts:
        module = module_of(part)
        layers = model.get_submodule(module).named_modules()
        leaves = sorted({name.rpartition(".")[2] for name, layer in layers if isinstance(layer, nn.Linear)})
        patterns.append(rf"({re.escape(module)}\.(.*\.)?({'|'.join(leaves)}))")
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha or 2 * adapter.rank,
        lora_dropout=adapter.dropout,
        use_dora=adapter.dora,
        target_modules="|".join(patterns),
        modules_to_save=[module_of(part) for part in stage.learning_rates if part not in adapter.parts] or None,
    )
    return peft.get_peft_model(model, config)


def four_bit_config(stage: Stage) -> BitsAndBytesConfig:
    """Return the quantization of QLoRA (arXiv 2305.14314, section 3).

    The linear layers of the language model have 4-bit normal floats with quantized constants. The tower, the projector
    and the head are not quantized.

    Raises:
        ConfigError: if bitsandbytes is not installed.
    """
    if not is_bitsandbytes_available():
        raise ConfigError(
            f"stage {stage.name}: adapter: four_bit needs bitsandbytes; pip install 'convllava[quantize]'"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if stage.precision == "bfloat16" else torch.float32,
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )


def check_adaptable(stage: Stage) -> None:
    """Check that the adapted parts take an adapter, and that they train.

    Raises:
        ConfigError: if they do not, or a package is missing.
    """
    assert stage.adapter is not None
    if stage.adapter.four_bit:
        four_bit_config(stage)
    for part in stage.adapter.parts:
        if not _ADAPTABLE.fullmatch(part):
            raise ConfigError(
                f"stage {stage.name}: adapter: {part} takes no adapter; language_model and stages of the tower do"
            )
        if part not in stage.learning_rates:
            raise ConfigError(f"stage {stage.name}: adapter: give {part} a learning rate in learning_rates")
    if "language_model" in stage.learning_rates and "language_model" not in stage.adapter.parts:
        raise ConfigError(f"stage {stage.name}: adapter: add language_model to parts, or remove it from learning_rates")
