"""What stands in for a kill in the middle of a training or of an examination of its data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from convllava.training import train as engine
from convllava.training.check_data_report import Notes


class KilledError(Exception):
    """Raised where a kill would hit."""


def die(*_: Any, **__: Any) -> None:
    raise KilledError


@contextmanager
def killed_in(owner: object, name: str, dying: Callable[..., Any] = die) -> Iterator[None]:
    """Within, whoever calls this function of a module or class dies there, which a test waits for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(KilledError):
            yield


def killed_after(steps: int) -> AbstractContextManager[None]:
    """Within, a training dies in the middle of the step that comes after so many."""
    original = engine.StageTrainer.training_step

    def dying(self: engine.StageTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == steps:
            raise KilledError
        return original(self, *args, **kwargs)

    return killed_in(engine.StageTrainer, "training_step", dying)


def killed_noting(findings: int) -> AbstractContextManager[None]:
    """Within, an examination dies in the middle of the line that it writes after so many."""
    append, left = Notes.append, findings

    def dying(self: Notes, job: int, found: list[Any]) -> None:
        nonlocal left
        append(self, job, found[:left])
        if len(found) > left:
            with self.path.open("a") as file:
                file.write(f'[{job}, {findings}, "s')
            raise KilledError
        left -= len(found)

    return killed_in(Notes, "append", dying)
