"""Small random models and generated pages for all tests."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from official_files import CHECKPOINT
from PIL import Image

from convllava.model.builder import Parts, build_fresh
from convllava.synthetic import Sample, World
from convllava.synthetic.splits import SPLITS

torch.set_num_threads(1)

# `make test-harness`, `test-vllm` and `test-ui` install these packages and run their tests.
ENGINES = {"lmms_eval": "lmms_eval", "vllm": "vllm", "ui": "selenium"}
collect_ignore = [f"engines/test_{name}.py" for name, package in ENGINES.items() if find_spec(package) is None]

if find_spec("hypothesis") is not None:  # the environments of the engines do not have it
    from hypothesis import settings

    settings.register_profile("shared machine", deadline=None)  # other work on the machine slows examples down
    settings.load_profile("shared machine")

WORDS = ("what", "is", "the", "total", "red", "top", "left", "describe", "image")


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Return an RGB image of random pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def fresh(spread: float = 0.3, **settings: object) -> Parts:
    """Return a model with five stages and two transformer layers. Its weights are so large that images matter."""
    model, processor = build_fresh(
        vision={
            "depths": [1, 1, 2, 1, 1],
            "hidden_sizes": [8, 8, 16, 16, 32],
            "layer_scale_init_value": 0.5,
        },
        language={
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "initializer_range": spread,
            "tie_word_embeddings": True,
        },
        pixels={"min_pixels": 64 * 64, "max_pixels": 256 * 256},
        words=WORDS,
        **settings,  # type: ignore[arg-type]
    )
    return model.eval(), processor


def varied_model() -> Parts:
    """Return a fresh model that answers different questions and images differently.

    Larger weights keep it from repeating one token. Tokens of incomplete characters get small embeddings, because they
    all decode to the same replacement character.
    """
    model, processor = fresh(spread=0.6)
    tokenizer = processor.tokenizer
    incomplete = [token for token in range(len(tokenizer)) if "\N{REPLACEMENT CHARACTER}" in tokenizer.decode([token])]
    with torch.no_grad():
        model.get_input_embeddings().weight[incomplete] *= 0.1
    return model, processor


@pytest.fixture(scope="session")
def parts() -> Parts:
    """Return model and processor. Tests must not change them."""
    return varied_model()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Return a copy of the checkpoint in the official layout. Tests may change it."""
    return shutil.copytree(CHECKPOINT, tmp_path / "official")


@pytest.fixture(scope="session")
def samples_by_split() -> dict[str, list[Sample]]:
    """Return small samples of each split, with every question that a sample can ask."""
    worlds = {split: World(split=split, seed=3, size=256, turns=50) for split in SPLITS}
    return {split: [world.sample(index) for index in range(160)] for split, world in worlds.items()}


@pytest.fixture(scope="session")
def samples(samples_by_split) -> list[Sample]:
    """Return the samples of both splits."""
    return [sample for of_split in samples_by_split.values() for sample in of_split]
