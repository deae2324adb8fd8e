"""Samples of a stage as the model will see them, drawn.

convllava data preview recipes/tiny.yaml --stage instruct --output preview.png
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from PIL import Image

from convllava.data.contact_sheet import SheetSample, draw_sheet, sheet_sample
from convllava.errors import InputError
from convllava.io import replacing
from convllava.training.datasets import make_dataset
from convllava.training.initialise import check_pixels, processor_of
from convllava.training.recipe import Recipe


def preview(recipe: Recipe, stage: str | None, samples: int, output: Path) -> None:
    """Draw the first samples that a stage sees, as a picture whose kind its name tells.

    Args:
        recipe: Whose data.
        stage: By its name; None: the first.
        samples: How many.
        output: The picture's path.

    Raises:
        InputError: there is no such stage, its data cannot be read, or the picture not be written.
    """
    kind = Image.registered_extensions().get(output.suffix.lower())
    if kind not in Image.SAVE:  # some are read only
        raise InputError(f"--output {output}: give the name of a picture, such as preview.png")
    index = _index(recipe, stage)
    sheet = draw_sheet(list(_shown(recipe, index, samples)))
    with replacing(output) as partial:
        sheet.save(partial, kind)


def _index(recipe: Recipe, stage: str | None) -> int:
    names = [stage.name for stage in recipe.stages]
    if stage is not None and stage not in names:
        raise InputError(f"{recipe.name} has no stage {stage!r}; choose one of {', '.join(names)}")
    return 0 if stage is None else names.index(stage)


def _shown(recipe: Recipe, index: int, samples: int) -> list[SheetSample]:
    processor = processor_of(recipe)
    check_pixels(recipe, processor.image_processor)
    for earlier in recipe.stages[: index + 1]:
        processor.image_processor.change(**earlier.pixels)
    # Steps enough for the samples; of a file they then need not be counted.
    stage = recipe.stages[index]
    shorter = dataclasses.replace(stage, steps=math.ceil(samples / stage.batch_size), epochs=None)
    stages = [*recipe.stages[:index], shorter, *recipe.stages[index + 1 :]]
    dataset: Any = make_dataset(dataclasses.replace(recipe, stages=stages), index, processor)
    stride = getattr(dataset, "stride", processor.image_processor.stride)
    return [sheet_sample(dataset[number], processor, stride, number) for number in range(samples)]
