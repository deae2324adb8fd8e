"""What one sees of a training: the table of what trains, the progress bar, one JSON line a step, TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from psutil import NoSuchProcess, Process
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from convllava.data.collate import GUIDES
from convllava.data.dense_labels import ACCURACIES
from convllava.data.position_labels import MARK_CLASSES
from convllava.errors import InputError
from convllava.io import replacing
from convllava.model.part_names import parts_of
from convllava.training.distributed import process_number
from convllava.training.objectives.losses import ANSWER_LOSS
from convllava.training.recipe import Stage

NOTES = (ANSWER_LOSS, *ACCURACIES, *MARK_CLASSES, *(f"{kind}_guidance" for kind in GUIDES))
"""What a step may report beside its loss."""
_QUIET_SECONDS = 30
"""Where there is no terminal, one line this often stands in for the bar."""


def print_parts(title: str, model: nn.Module, trains: Mapping[str, float]) -> None:
    """A table of parts: parameters, how many of them train, and the learning rate."""
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    for column in ("parameters", "train", "learning rate"):
        table.add_column(column, justify="right")
    for part, parameters in parts_of(model).items():
        count = sum(parameter.numel() for _, parameter in parameters)
        trained = sum(parameter.numel() for _, parameter in parameters if parameter.requires_grad)
        rate = f"{trains[part]:g}" if part in trains else "frozen"
        table.add_row(part, f"{count:,}", f"{trained:,}" if trained else "", rate)
    Console().print(table)


class StepLog(TrainerCallback):
    """Appends to `log.jsonl`: stage, step, loss, learning rates, samples, images, tokens, positions, padded, waited,
    seconds.

    Positions are those that the language model computes, padded those it would compute if each batch were padded to
    its longest sample; waited are the first process's seconds without samples, processor its seconds on a processor,
    those of its workers included, which other work on the machine hardly changes. All of them and seconds count from
    the beginning of the stage, over all its resumed parts.
    """

    def __init__(self, output: Path, stage: Stage, index: int, counts: Mapping[str, float]) -> None:
        self.path = output / "log.jsonl"
        self.stage, self.index, self.counts = stage, index, counts
        self.before: dict[str, float] = {**dict.fromkeys(counts, 0), "processor": 0.0, "seconds": 0.0}
        self.started = self.processor = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started, self.processor = time.monotonic(), processor_seconds()
        self.before |= self._forget_after(state.global_step)

    def _forget_after(self, step: int) -> dict[str, float]:
        """Drop lines of this stage beyond the checkpoint that the run resumes from; return the last one kept."""
        if not self.path.exists():
            return {}
        # A kill can tear the last line; what has no end was never logged.
        whole = self.path.read_text(encoding="utf-8").rpartition("\n")[0]
        lines = [json.loads(line) for line in whole.splitlines()]
        kept = [line for line in lines if (line["index"], line["step"]) <= (self.index, step)]
        with replacing(self.path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        own = [line for line in kept if line["index"] == self.index and "loss" in line]
        return {key: own[-1].get(key, 0) for key in self.before} if own else {}

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        if "loss" in (logs or {}):
            groups = kwargs["optimizer"].param_groups
            rates: dict[str, float] = {}
            for group in groups:  # of a part's layers, the highest
                rates[group["part"]] = max(group["lr"], rates.get(group["part"], 0.0))
            notes = {name: round(logs[name], 4) for name in NOTES if name in logs}
            counts = {name: round(self.before[name] + count, 3) for name, count in self.counts.items()}
            self._write(state.global_step, {"loss": logs["loss"], **notes, "learning_rates": rates, **counts})
        elif "eval_loss" in (logs or {}):
            self._write(state.global_step, {"eval_loss": logs["eval_loss"]})

    def _write(self, step: int, found: Mapping[str, Any]) -> None:
        spent = {
            "processor": round(self.before["processor"] + processor_seconds() - self.processor, 3),
            "seconds": round(self.before["seconds"] + time.monotonic() - self.started, 3),
        }
        line = {"stage": self.stage.name, "index": self.index, "step": step, **found, **spent}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def processor_seconds() -> float:
    """Seconds that this process and its children, which live, have spent on processors."""
    own = Process()
    return sum(map(_seconds_of, (own, *own.children(recursive=True))))


def _seconds_of(process: Process) -> float:
    try:
        spent = process.cpu_times()
    except NoSuchProcess:  # it ended after it was listed
        return 0.0
    return spent.user + spent.system


class ProgressBar(TrainerCallback):
    """Steps, loss, samples a second and the time left; plain lines where there is no terminal.

    Args:
        title: Of the stage.
        counts: As of `StageTrainer`, since the run was started.
    """

    def __init__(self, title: str, counts: Mapping[str, float]) -> None:
        self.console = Console()
        self.title, self.counts = title, counts
        self.loss: float | None = None
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
        if "loss" not in (logs or {}):
            return
        self.loss = logs["loss"] if self.loss is None else 0.98 * self.loss + 0.02 * logs["loss"]
        now = time.monotonic()
        done = state.global_step - self.first
        rate = self.counts["samples"] / max(now - self.started, 1e-9)
        self.bar.update(self.task, completed=state.global_step, loss=f"{self.loss:.3f}", rate=f"{rate:.1f}")
        if not self.console.is_terminal and now - self.spoke > _QUIET_SECONDS:
            self.spoke = now
            left = (state.max_steps - state.global_step) * (now - self.started) / max(done, 1)
            print(
                f"{self.title} {state.global_step}/{state.max_steps} loss {self.loss:.3f} "
                f"{rate:.1f} samples/s, {left / 60:.0f} min left",
                flush=True,
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back, also where training failed."""
        self.bar.stop()


class Skips:
    """Samples that could not be used: one line each in `skipped.jsonl`, and an end to a run that has too many among
    those that it trains on.

    Args:
        path: Of `skipped.jsonl`; every process appends to it.
        stage: Whose samples they are.
        samples: How many different ones this process will see.
    """

    def __init__(self, path: Path, stage: Stage, samples: float) -> None:
        self.path, self.stage, self.limit = path, stage, stage.data.max_skipped * samples
        self.process = process_number()
        self.known = set(self._told())

    def _told(self) -> Iterator[tuple[str, str, bool]]:
        """What this process wrote down before the run was interrupted."""
        text = self.path.read_text(encoding="utf-8").rpartition("\n")[0] if self.path.exists() else ""
        # Not by splitlines, which also splits at marks that may lie in a file's name.
        for line in map(json.loads, filter(None, text.split("\n"))):
            if (line["stage"], line["process"]) == (self.stage.name, self.process):
                yield line["file"], line["reason"], line.get("held_out", False)

    def note(self, found: Iterable[tuple[str, str]], step: int, *, held_out: bool = False) -> None:
        """Write down what is new.

        Args:
            found: (data file, what was wrong with one of its samples).
            step: At which optimiser step.
            held_out: Whether they are of an evaluation; these do not count.

        Raises:
            InputError: too many; the last ones are told.
        """
        skipped = dict.fromkeys((name, reason, held_out) for name, reason in found)
        new = [one for one in skipped if one not in self.known]
        if not new:
            return
        self.known |= set(new)
        with self.path.open("a", encoding="utf-8") as file:
            for name, reason, _ in new:
                line = {"stage": self.stage.name, "step": step, "process": self.process, "file": name, "reason": reason}
                file.write(json.dumps(line | {"held_out": held_out}) + "\n")
        count = sum(not is_held_out for *_, is_held_out in self.known)
        if count > self.limit and not held_out:
            raise InputError(
                f"stage {self.stage.name}: {count} bad samples are more than data.max_skipped "
                f"{self.stage.data.max_skipped:g} allows; {self.path} lists them, the last: {', '.join(new[-1][:2])}"
            )
