"""Output of a training: the table of parts, the progress bar, and one JSON line per step."""

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from psutil import NoSuchProcess, Process
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from convllava.data.collate import TARGET_KINDS
from convllava.data.dense_labels import DENSE_METRICS
from convllava.data.position_labels import POSITION_CLASSES
from convllava.errors import DataError
from convllava.io import JsonLines, replacing
from convllava.model.part_names import parts_of
from convllava.training.distributed import process_number
from convllava.training.objectives.losses import ANSWER_LOSS
from convllava.training.recipe import Stage

STEP_METRICS = (ANSWER_LOSS, *DENSE_METRICS, *POSITION_CLASSES, *(f"{kind}_attention" for kind in TARGET_KINDS))
"""Metrics that a step may report next to its loss."""
_QUIET_SECONDS = 30
"""Without a terminal, one line is printed this often instead of the bar."""
_SMOOTHING = 0.98
"""Decay of the moving average of the loss that the bar shows."""


def print_parts(title: str, model: nn.Module, learning_rates: Mapping[str, float]) -> None:
    """Print a table of the model's parts: parameters, how many of them train, and the learning rate."""
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    for column in ("parameters", "train", "learning rate"):
        table.add_column(column, justify="right")
    for part, parameters in parts_of(model).items():
        count = sum(parameter.numel() for _, parameter in parameters)
        trained = sum(parameter.numel() for _, parameter in parameters if parameter.requires_grad)
        rate = f"{learning_rates[part]:g}" if part in learning_rates else "frozen"
        table.add_row(part, f"{count:,}", f"{trained:,}" if trained else "", rate)
    Console().print(table)


class StepLog(TrainerCallback):
    """Appends one line per step to `log.jsonl`.

    A line has stage, step, loss, learning rates, and these counts since the start of the stage (resumed runs continue
    them): `samples`, `images`, `tokens`; `positions` that the language model computes; `padded`, the positions if each
    batch were padded to its longest sample; `waited`, seconds in which the first process waited for samples;
    `processor`, the CPU seconds of this process and its workers, which depend little on other work of the machine;
    `seconds`.
    """

    def __init__(self, output: Path, stage: Stage, index: int, counts: Mapping[str, float]) -> None:
        self.lines = JsonLines(output / "log.jsonl")
        self.stage, self.index, self.counts = stage, index, counts
        self.before: dict[str, float] = {**dict.fromkeys(counts, 0), "processor": 0.0, "seconds": 0.0}
        self.started = self.processor = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started, self.processor = time.monotonic(), processor_seconds()
        # Drop the lines after the checkpoint from which the run resumes, and continue the counts of the last line.
        lines = list(self.lines)
        kept = [line for line in lines if (line["index"], line["step"]) <= (self.index, state.global_step)]
        if len(kept) < len(lines):
            with replacing(self.lines.path) as partial:
                JsonLines(partial).append(kept)
        own = [line for line in kept if line["index"] == self.index and "loss" in line]
        if own:
            self.before = {key: own[-1].get(key, 0) for key in self.before}

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        logs, found = logs or {}, {}
        if "loss" in logs:
            rates: dict[str, float] = {}
            for group in kwargs["optimizer"].param_groups:  # the highest of a part's layers
                rates[group["part"]] = max(group["lr"], rates.get(group["part"], 0.0))
            metrics = {name: round(logs[name], 4) for name in STEP_METRICS if name in logs}
            counts = {name: round(self.before[name] + count, 3) for name, count in self.counts.items()}
            found = {"loss": logs["loss"], **metrics, "learning_rates": rates, **counts}
        elif "eval_loss" in logs:
            found = {"eval_loss": logs["eval_loss"]}
        if not found or not state.is_world_process_zero:
            return
        spent = {
            "processor": round(self.before["processor"] + processor_seconds() - self.processor, 3),
            "seconds": round(self.before["seconds"] + time.monotonic() - self.started, 3),
        }
        where = {"stage": self.stage.name, "index": self.index, "step": state.global_step}
        self.lines.append([{**where, **found, **spent}])


def processor_seconds() -> float:
    """Return the CPU seconds of this process and of its living children."""
    own, total = Process(), 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(NoSuchProcess):  # the process ended after it was listed
            spent = process.cpu_times()
            total += spent.user + spent.system
    return total


class ProgressBar(TrainerCallback):
    """Shows steps, loss, samples per second and the time left; without a terminal it prints plain lines.

    Args:
        title: The title of the stage.
        counts: The counts of `StageTrainer` since the run started.
    """

    def __init__(self, title: str, counts: Mapping[str, float]) -> None:
        self.console = Console()
        self.title, self.counts = title, counts
        self.loss_sum = self.loss_weight = 0.0
        self.first = 0
        self.started = self.spoke = 0.0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} samples/s"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.first, self.started = state.global_step, time.monotonic()
        self.task = self.bar.add_task(
            self.title, total=state.max_steps, completed=state.global_step, loss="-", rate="-"
        )
        self.bar.start()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if "eval_loss" in (logs or {}):
            self.console.print(f"{self.title} step {state.global_step}: eval_loss {logs['eval_loss']:.3f}")
        if "loss" not in (logs or {}):
            return
        # A moving average with bias correction, as in Adam, so that the first steps do not count more than the others.
        self.loss_sum = _SMOOTHING * self.loss_sum + (1 - _SMOOTHING) * logs["loss"]
        self.loss_weight = _SMOOTHING * self.loss_weight + (1 - _SMOOTHING)
        loss = self.loss_sum / self.loss_weight
        now = time.monotonic()
        done = state.global_step - self.first
        rate = self.counts["samples"] / max(now - self.started, 1e-9)
        self.bar.update(self.task, completed=state.global_step, loss=f"{loss:.3f}", rate=f"{rate:.1f}")
        if not self.console.is_terminal and now - self.spoke > _QUIET_SECONDS:
            self.spoke = now
            left = (state.max_steps - state.global_step) * (now - self.started) / max(done, 1)
            print(
                f"{self.title} {state.global_step}/{state.max_steps} loss {loss:.3f} "
                f"{rate:.1f} samples/s, {left / 60:.0f} min left",
                flush=True,
            )

    def stop(self) -> None:
        """Release the terminal, also after a failure."""
        self.bar.stop()


class SkippedSamples:
    """Writes bad samples to `skipped.jsonl`, one line each, and stops a run that has too many of them.

    Args:
        path: The path of `skipped.jsonl`; every process appends to it.
        stage: The stage that trains.
        samples: Number of different samples that this process will see.
    """

    def __init__(self, path: Path, stage: Stage, samples: float) -> None:
        self.lines, self.stage, self.limit = JsonLines(path), stage, stage.data.max_skipped * samples
        self.process = process_number()
        # The samples that this process wrote before the run was interrupted.
        self.known = {
            (line["file"], line["reason"], line.get("held_out", False))
            for line in self.lines
            if (line["stage"], line["process"]) == (stage.name, self.process)
        }

    def note(self, found: Iterable[tuple[str, str]], step: int, *, held_out: bool = False) -> None:
        """Write the bad samples that are new.

        Args:
            found: (data file, problem of one of its samples).
            step: The optimizer step.
            held_out: True for samples of an evaluation, which do not count towards the limit.

        Raises:
            DataError: if there are too many.
        """
        skipped = dict.fromkeys((name, reason, held_out) for name, reason in found)
        new = [one for one in skipped if one not in self.known]
        if not new:
            return
        self.known |= set(new)
        shared = {"stage": self.stage.name, "step": step, "process": self.process}
        self.lines.append(shared | {"file": name, "reason": reason, "held_out": held_out} for name, reason, _ in new)
        count = sum(not is_held_out for *_, is_held_out in self.known)
        if count > self.limit and not held_out:
            raise DataError(
                f"stage {self.stage.name}: {count} bad samples are more than data.max_skipped "
                f"{self.stage.data.max_skipped:g} allows; {self.lines.path} lists them, the last: "
                f"{', '.join(new[-1][:2])}"
            )
