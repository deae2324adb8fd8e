"""What a measurement is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convllava.checkpoints.inspection import language_models, towers
from convllava.errors import InputError


@dataclass(frozen=True)
class Settings:
    """What to measure and how; a suite looks at what means something to it.

    Attributes:
        towers: Names of the family.
        sides: Of square images, in pixels, multiples of 64.
        language: Shape of the language model behind the tower.
        peers: Measure what others do, too.
        vllm: The python of an environment with vLLM, to measure its server too.
        tokens: Lengths of answers.
        repeats: Measurements of each; the median counts.
        threads: Of one operation.
    """

    towers: Sequence[str] = ("T",)
    sides: Sequence[int] = (768,)
    language: str = "135m"
    peers: bool = False
    vllm: Path | None = None
    tokens: Sequence[int] = (32,)
    repeats: int = 3
    threads: int = 1

    def as_json(self) -> dict[str, Any]:
        """The settings as a file keeps them."""
        return asdict(self) | {"vllm": self.vllm and str(self.vllm)}

    def check(self) -> None:
        """Raises InputError where there is no such tower or language model."""
        for name in self.towers:
            if name not in towers():
                raise InputError(f"there is no tower {name!r}; choose of {', '.join(towers())}")
        if self.language not in language_models():
            known = ", ".join(language_models())
            raise InputError(f"there is no language model {self.language!r}; choose one of {known}")
