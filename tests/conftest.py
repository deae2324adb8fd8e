"""Tiny random models and generated pages that every test file may use."""

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

if find_spec("hypothesis") is not None:  # which the environments of the engines lack
    from hypothesis import settings

    settings.register_profile("shared machine", deadline=None)  # how long an example takes, other work decides
    settings.load_profile("shared machine")

WORDS = ("what", "is", "the", "total", "red", "top", "left", "describe", "image")


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Random pixels, RGB."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def fresh(spread: float = 0.3, **settings: object) -> Parts:
    """A model of five stages and two transformer layers, with weights large enough for images to matter."""
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


def talkative() -> Parts:
    """A fresh model whose answers tell questions and images apart: with larger weights they do not repeat one token,
    and without the bytes that are no text of their own, any of which looks like any other."""
    model, processor = fresh(spread=0.6)
    tokenizer = processor.tokenizer
    halves = [token for token in range(len(tokenizer)) if "\N{REPLACEMENT CHARACTER}" in tokenizer.decode([token])]
    with torch.no_grad():
        model.get_input_embeddings().weight[halves] *= 0.1
    return model, processor


@pytest.fixture(scope="session")
def parts() -> Parts:
    """Model and processor; not to be changed."""
    return talkative()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A checkpoint in the official layout, which may be changed."""
    return shutil.copytree(CHECKPOINT, tmp_path / "official")


@pytest.fixture(scope="session")
def samples_by_split() -> dict[str, list[Sample]]:
    """Some hundred small samples of each split, with every question that the sample can ask."""
    worlds = {split: World(split=split, seed=3, size=256, turns=50) for split in SPLITS}
    return {split: [world.sample(index) for index in range(160)] for split, world in worlds.items()}


@pytest.fixture(scope="session")
def samples(samples_by_split) -> list[Sample]:
    """Those of both splits."""
    return [sample for of_split in samples_by_split.values() for sample in of_split]
