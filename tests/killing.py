"""Simulate a kill during a training or during a check of its data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from convllava.training import train as engine
from convllava.training.check_data import FindingsLog


class KilledError(Exception):
    """Raised at the point of the simulated kill."""


def die(*_: Any, **__: Any) -> None:
    raise KilledError


@contextmanager
def killed_in(owner: object, name: str, dying: Callable[..., Any] = die) -> Iterator[None]:
    """Replace a function of a module or class by one that raises KilledError, and expect this error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(KilledError):
            yield


def killed_after(steps: int) -> AbstractContextManager[None]:
    """Kill a training during the step after a number of steps."""
    original = engine.StageTrainer.training_step

    def dying(self: engine.StageTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == steps:
            raise KilledError
        return original(self, *args, **kwargs)

    return killed_in(engine.StageTrainer, "training_step", dying)


def killed_after_findings(findings: int) -> AbstractContextManager[None]:
    """Kill a check of data while it writes the line after a number of findings."""
    add, left = FindingsLog.add, findings

    def dying(self: FindingsLog, job: int, found: list[Any]) -> None:
        nonlocal left
        add(self, job, found[:left])
        if len(found) > left:
            with self.path.open("a") as file:
                file.write(f'[{job}, {findings}, "s')
            raise KilledError
        left -= len(found)

    return killed_in(FindingsLog, "add", dying)
