"""A stage of a recipe, resolved: its settings, its folders, and the processor with the pixel settings of this stage."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convllava import checkpoints
from convllava.errors import ConfigError, InputError
from convllava.model.image_processing import ConvLlavaImageProcessorPil
from convllava.model.processing import ConvLlavaProcessor
from convllava.training.recipe import Recipe, Stage


@dataclass(frozen=True)
class StageRun:
    """One stage of a recipe with everything that depends on its position.

    Attributes:
        recipe: The whole recipe.
        index: Number of the stage, from 0.
        processor: The processor, with the pixel settings of this stage.
        output: Folder of the run.
    """

    recipe: Recipe
    index: int
    processor: ConvLlavaProcessor
    output: Path = Path()

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self.index]

    @property
    def folder(self) -> Path:
        """Folder of the stage's checkpoint, which exists if the stage is complete."""
        return self.output / f"{self.index}-{self.stage.name}"

    @property
    def progress(self) -> Path:
        """Folder of the checkpoints of a stage that is not complete."""
        return self.output / f".{self.folder.name}.progress"

    @property
    def previous(self) -> Path | None:
        """Folder of the previous stage's checkpoint; None for the first stage."""
        return self.output / f"{self.index - 1}-{self.recipe.stages[self.index - 1].name}" if self.index else None

    @property
    def base(self) -> str | Path:
        """The model that the stage's adapter belongs to: the previous stage, or the model of the recipe."""
        if self.previous is not None:
            return self.previous
        name = self.recipe.model.checkpoint
        if name is None:
            return self.output / "base"
        return Path(name) if checkpoints.find(name) == name and Path(name).is_dir() else name

    @property
    def data_seed(self) -> int:
        """Seed of the stage's samples and of their order."""
        return 1000 * self.recipe.seed + self.index


def pixels_by_stage(recipe: Recipe, first: ConvLlavaImageProcessorPil) -> list[ConvLlavaImageProcessorPil]:
    """Return the image processor of each stage. Each stage changes the settings of the stage before it.

    Args:
        recipe: The recipe.
        first: The image processor of the model that the first stage starts from. It is not changed.

    Raises:
        ConfigError: if a stage has settings that do not exist or do not fit together; the message names the stage.
    """
    found = [first]
    for stage in recipe.stages:
        found.append(copy.deepcopy(found[-1]))
        try:
            found[-1].change(**stage.pixels)
        except (InputError, TypeError) as error:
            raise ConfigError(f"stage {stage.name}: pixels: {error}") from None
    return found[1:]


def resolve_stages(recipe: Recipe, processor: ConvLlavaProcessor, output: Path = Path()) -> Sequence[StageRun]:
    """Resolve every stage of a recipe.

    Args:
        recipe: The recipe.
        processor: The processor of the model that the first stage starts from.
        output: Folder of the run.

    Raises:
        ConfigError: see `pixels_by_stage`.
    """
    runs = []
    for index, pixels in enumerate(pixels_by_stage(recipe, processor.image_processor)):
        own = copy.copy(processor)
        own.image_processor = pixels
        runs.append(StageRun(recipe, index, own, output))
    return runs
