"""What stands in for a kill in the middle of a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from convllava.training import engine


class KilledError(Exception):
    """Raised where a kill would hit."""


@contextmanager
def killed_after(steps: int) -> Iterator[None]:
    """Within, a training dies in the middle of the step that comes after so many, which a test waits for."""
    original = engine.StageTrainer.training_step

    def dying(self, *args, **kwargs):
        if self.state.global_step == steps:
            raise KilledError
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.StageTrainer, "training_step", dying)
        with pytest.raises(KilledError):
            yield
