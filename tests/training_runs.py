"""Recipes of small models, trainings in separate processes, and functions that read their logs and weights."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from convllava.checkpoints import read
from convllava.training.recipe import Data, ModelSpec, Recipe, Stage

DATA = Data(size=128, simple=True, turns=2)
SCENES = dataclasses.replace(DATA, kinds={"scene": 1})
DENSE = Stage("dense", 3, {"stem": 1e-3, "stage1": 1e-3, "stage4": 1e-3, "head": 1e-3}, DATA, "dense", batch_size=2)
ALIGN = Stage(
    "align", 4, {"stage5": 1e-3, "projector": 1e-3, "head": 1e-3}, SCENES, "align", batch_size=2, calibrate=True
)
CHAT = Stage("chat", 4, {"stage5": 1e-3, "projector": 2e-3, "language_model": 1e-3}, DATA, batch_size=2)
SUPERVISED = dataclasses.replace(CHAT, name="supervised", attention_supervision=0.5, prompt_loss_weight=0.3)
HEADS = dataclasses.replace(
    SUPERVISED,
    name="heads",
    position_label_weight=0.5,
    character_label_weight=0.5,
    learning_rates={**SUPERVISED.learning_rates, "head": 1e-3},
)
"""The test model has one layer, so the position heads read its embeddings."""
LOW = dataclasses.replace(SUPERVISED, name="low", precision="bfloat16", optimizer="muon")

ONE = ("-m", "convllava")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TWO = (*TORCHRUN, *ONE)
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
"""Environment of a process that shares the machine with other tests."""
SMALLEST = ModelSpec(
    vision={"depths": [1] * 5, "hidden_sizes": [8] * 5},
    language={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    pixels={"min_pixels": 64 * 64, "max_pixels": 128 * 128},
)
"""The smallest model, for tests of data whose results do not depend on learning."""


def recipe(*stages: Stage, **settings: object) -> Recipe:
    model = ModelSpec(
        vision={"depths": [1] * 5, "hidden_sizes": [8, 8, 16, 16, 32], "layer_scale_init_value": 0.5},
        language={
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "tie_word_embeddings": True,
        },
        pixels={"min_pixels": 64 * 64, "max_pixels": 256 * 256},
    )
    return Recipe("test", list(stages), model, workers=0, **settings)  # type: ignore[arg-type]


def command(plan: Recipe, output: Path, program: Sequence[str] = ONE) -> list[str]:
    """Write the recipe next to the run's folder and return the command that starts or continues the run."""
    path = output.with_name(f"{output.name}.yaml")
    path.write_text(plan.dump())
    return [sys.executable, *program, "train", str(path), "--resume", "--output", str(output)]


def train(plan: Recipe, output: Path, program: Sequence[str] = ONE) -> None:
    """Start or continue a run in separate processes."""
    subprocess.run(command(plan, output, program), check=True, env=ALONE, timeout=300)


def log(run: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a run's log."""
    path = run / "log.jsonl"
    lines = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def logged(run: Path, name: str = "loss") -> list[Any]:
    """Return one value of every log line that has it; fail if none has."""
    found = [line[name] for line in log(run) if name in line]
    assert found, f"{run} has logged no {name}"
    return found


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return dict(read(checkpoint)[0].named_parameters())


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """Return the names of weights that are not equal bit for bit."""
    return {name for name in before.keys() | after.keys() if not before[name].equal(after[name])}
