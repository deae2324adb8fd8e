"""What every sample of a stage's files costs, measured once, and the passes that are planned from it.

    RUNS/.cache/costs/DIGEST.npy    beside the output folder RUNS/NAME: (records, 2) tokens and pixels of one source

The digest is of all that costs depend on: the source's files by their size and time, the tokenizer with its template,
the image processor, the longest sequence. Images that lie in files of their own are not part of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock  # a dependency of torch
from torch.utils.data import Dataset

from convllava.data.batching import UNUSABLE, MicroBatchBudget, MicroBatchDataset, MicroBatchPlan
from convllava.data.dataset import FileDataset
from convllava.data.mixture import Integers
from convllava.data.validation import SourceCheck
from convllava.errors import InputError
from convllava.io import make_output, replacing
from convllava.model.processing import ConvLlavaProcessor
from convllava.training.check_data_report import FindingsLog, examination_of, examine_all, stages_with_files
from convllava.training.datasets import mixture_of, stamps_of, with_steps
from convllava.training.distributed import is_first_process
from convllava.training.recipe import Recipe, Source, Stage

_LOOK_AGAIN = 1.0
"""Seconds between two looks of a process at whether the first one is done."""
_PATIENCE = 300.0
"""Seconds after which the first process must have begun."""


def with_planned_steps(recipe: Recipe, output: Path) -> Recipe:
    """The recipe with steps in place of epochs, for which the samples of stages with a budget are measured.

    Raises:
        InputError: as `with_steps` and `costs_of`; a budget that a single sample exceeds.
    """
    if all(stage.budget is None for stage in recipe.stages):
        return with_steps(recipe)
    stages = list(recipe.stages)
    for index, processor in stages_with_files(recipe):
        if stages[index].budget is not None:
            passes = plan_passes(recipe, index, processor, output)
            stages[index] = with_steps_of(stages[index], passes)
    return with_steps(dataclasses.replace(recipe, stages=stages))


def with_steps_of(stage: Stage, passes: MicroBatchPlan) -> Stage:
    """A stage with the steps that its epochs take."""
    if stage.epochs is None:
        return stage
    steps = passes.steps_of(round(stage.epochs * len(passes.mixture)))
    return dataclasses.replace(stage, steps=steps, epochs=None)


def in_passes(recipe: Recipe, index: int, processor: ConvLlavaProcessor, output: Path, samples: Dataset) -> Dataset:
    """The dataset of a stage as its loader takes it: pass by pass where the stage has a budget, else as it is."""
    stage = recipe.stages[index]
    if stage.budget is None:
        return samples
    assert isinstance(samples, FileDataset)
    assert stage.steps is not None
    return MicroBatchDataset(samples, plan_passes(recipe, index, processor, output).first(stage.steps))


def plan_passes(recipe: Recipe, index: int, processor: ConvLlavaProcessor, output: Path) -> MicroBatchPlan:
    """The plan of a stage with a budget.

    Raises:
        InputError: as `costs_of`; a budget that a single sample exceeds.
    """
    stage = recipe.stages[index]
    mixture = mixture_of(recipe, index)
    folder = output.absolute().parent / ".cache" / "costs"
    costs = [costs_of(recipe, stage, source, processor, folder) for source in stage.data.sources]
    try:
        return MicroBatchPlan(mixture, costs, limits_of(stage))
    except InputError as error:
        raise InputError(f"stage {stage.name}: {error}") from None


def limits_of(stage: Stage) -> MicroBatchBudget:
    """What a pass of the stage holds."""
    assert stage.budget is not None
    samples = stage.batch_size // stage.budget.micro_batches
    return MicroBatchBudget(
        stage.budget.micro_batches, samples, stage.budget.tokens, stage.budget.pixels, stage.packing
    )


def costs_of(recipe: Recipe, stage: Stage, source: Source, processor: ConvLlavaProcessor, folder: Path) -> Integers:
    """Tokens and pixels of every record of a source, (records, 2); `UNUSABLE` tokens where training takes none.

    The first process measures, the others wait until its file is there. Of runs that start together one measures.

    Raises:
        InputError: the source cannot be read, or the file not be written; the first process has other files.
    """
    alone = dataclasses.replace(source, repeat=1.0, weight=None)
    digest = digest_of(recipe, stage, alone, processor)
    path = folder / f"{digest}.npy"
    if not path.exists() and is_first_process():
        make_output(folder)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                measure(examination_of(recipe, stage, alone, processor), path, digest, recipe.workers)
    _wait_for(path, source)
    return np.load(path, allow_pickle=False)


def _wait_for(path: Path, source: Source) -> None:
    """Until the first process has written the file; not at a barrier, which gives up after minutes."""
    latest = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > latest and not path.with_suffix(".lock").exists():
            raise InputError(
                f"source {source.name}: the first process measures other files than this one; give all nodes the same "
                f"folder {path.parent}, and data files of the same size and time (cp -p, rsync -t)"
            )
        time.sleep(_LOOK_AGAIN)


def measure(examination: SourceCheck, path: Path, digest: str, workers: int) -> None:
    """Write what the samples of a source cost; what was measured before a kill is not measured again."""
    log = FindingsLog(path.with_suffix(".jsonl"), digest)
    examine_all([examination], log, workers, "measuring")
    costs = np.zeros((len(examination), 2), dtype=np.int64)
    for _, finding in log:
        costs[finding.index] = (finding.tokens - finding.lost, finding.pixels) if finding.is_usable else (UNUSABLE, 0)
    with replacing(path) as partial, partial.open("wb") as file:
        np.save(file, costs, allow_pickle=False)
    log.path.unlink()


def digest_of(recipe: Recipe, stage: Stage, source: Source, processor: ConvLlavaProcessor) -> str:
    """Of all that the costs of a source's samples depend on, but for images in files of their own."""
    content = {
        "source": dataclasses.asdict(source),
        "files": stamps_of(recipe, source),
        "images": processor.image_processor.to_dict(),
        "row_separator": processor.row_separator,
        "template": processor.chat_template,
        "tokenizer": _rules_of(processor.tokenizer),
        "longest": stage.data.max_tokens or processor.tokenizer.model_max_length,
        "overlong": stage.data.overlong,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _rules_of(tokenizer: Any) -> Any:
    """What a tokenizer makes tokens of; how it pads and cuts is left over from its last call."""
    if not tokenizer.is_fast:
        return tokenizer.get_vocab()
    return json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
