"""Tokens and pixels of every sample of files, measured once, and the micro-batches that are planned from them.

    RUNS/.cache/costs/DIGEST.npy    next to the output folder RUNS/NAME: (records, 2) tokens and pixels of one source

The digest covers everything that the costs depend on: size and time of the source's files, the tokenizer with its
template, the image processor, the longest sequence. It does not cover images in separate files.
"""

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
from convllava.errors import ConfigError, DataError, InputError
from convllava.io import make_output, replacing
from convllava.training.check_data import FindingsLog, check_all, samples_of, stages_with_files
from convllava.training.datasets import count_steps, mixture_of, stamps_of
from convllava.training.distributed import is_first_process
from convllava.training.recipe import Recipe, Source
from convllava.training.stage import StageRun

_POLL_SECONDS = 1.0
"""A process checks this often, in seconds, whether the first process is done."""
_START_SECONDS = 300.0
"""Seconds after which the first process must have started to measure."""


def plan_steps(recipe: Recipe, output: Path) -> Recipe:
    """Return the recipe with steps instead of epochs; the samples of stages with a budget are measured for it.

    Raises:
        InputError: if a file cannot be read, or a single sample exceeds a budget.
    """
    stages = list(recipe.stages)
    if any(stage.budget is not None for stage in stages):
        for run in stages_with_files(recipe, output):
            if run.stage.budget is None:
                continue
            micro_batches = plan_micro_batches(run)
            if run.stage.epochs is not None:
                steps = micro_batches.steps_of(round(run.stage.epochs * len(micro_batches.mixture)))
                stages[run.index] = dataclasses.replace(run.stage, steps=steps, epochs=None)
    return count_steps(dataclasses.replace(recipe, stages=stages))


def in_micro_batches(run: StageRun, samples: Dataset) -> Dataset:
    """Return a stage's samples as its loader needs them: with a budget one item is a micro-batch, else a sample."""
    if run.stage.budget is None:
        return samples
    assert isinstance(samples, FileDataset)
    assert run.stage.steps is not None
    return MicroBatchDataset(samples, plan_micro_batches(run).first(run.stage.steps))


def plan_micro_batches(run: StageRun) -> MicroBatchPlan:
    """Return the micro-batches of a stage with a budget.

    Raises:
        InputError: if a file cannot be read, or a single sample exceeds the budget.
    """
    budget = run.stage.budget
    assert budget is not None
    samples = run.stage.batch_size // budget.micro_batches
    limits = MicroBatchBudget(budget.micro_batches, samples, budget.tokens, budget.pixels, run.stage.packing)
    mixture = mixture_of(run)
    costs = [costs_of(run, source) for source in run.stage.data.sources]
    try:
        return MicroBatchPlan(mixture, costs, limits)
    except InputError as error:
        raise ConfigError(f"stage {run.stage.name}: {error}") from None


def costs_of(run: StageRun, source: Source) -> Integers:
    """Return tokens and pixels of every record of a source, (records, 2); `UNUSABLE` tokens if training skips it.

    The first process measures, the others wait for its file. If runs start at the same time, one of them measures.

    Raises:
        InputError: if the source cannot be read, the file cannot be written, or the first process has other files.
    """
    folder = run.output.absolute().parent / ".cache" / "costs"
    alone = dataclasses.replace(source, repeat=1.0, weight=None)
    digest = digest_of(run, alone)
    path = folder / f"{digest}.npy"
    if not path.exists() and is_first_process():
        make_output(folder)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                measure(samples_of(run, alone), path, digest, run.recipe.workers)
    latest = time.monotonic() + _START_SECONDS  # not a barrier, which would give up after some minutes
    while not path.exists():
        if time.monotonic() > latest and not path.with_suffix(".lock").exists():
            raise DataError(
                f"source {source.name}: the first process measures other files than this one; give all nodes the same "
                f"folder {path.parent}, and data files of the same size and time (cp -p, rsync -t)"
            )
        time.sleep(_POLL_SECONDS)
    return np.load(path, allow_pickle=False)


def measure(samples: SourceCheck, path: Path, digest: str, workers: int) -> None:
    """Write the costs of a source's samples. A measurement that was killed continues."""
    log = FindingsLog(path.with_suffix(".jsonl"), digest)
    check_all([samples], log, workers, "measuring")
    costs = np.zeros((len(samples), 2), dtype=np.int64)
    for _, finding in log:
        costs[finding.index] = (finding.tokens - finding.lost, finding.pixels) if finding.is_usable else (UNUSABLE, 0)
    with replacing(path) as partial, partial.open("wb") as file:
        np.save(file, costs, allow_pickle=False)
    log.path.unlink()


def digest_of(run: StageRun, source: Source) -> str:
    """Return a digest of everything that the costs of a source's samples depend on, except images in separate files."""
    processor, data = run.processor, run.stage.data
    tokenizer: Any = processor.tokenizer
    if tokenizer.is_fast:  # padding and truncation depend on its last call
        rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    else:
        rules = tokenizer.get_vocab()
    content = {
        "source": dataclasses.asdict(source),
        "files": stamps_of(run.recipe, source),
        "images": processor.image_processor.to_dict(),
        "row_separator": processor.row_separator,
        "template": processor.chat_template,
        "tokenizer": rules,
        "longest": data.max_tokens or tokenizer.model_max_length,
        "overlong": data.overlong,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]
