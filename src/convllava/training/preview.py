"""Draw samples of a stage as the model will see them.

convllava data preview recipes/tiny.yaml --stage instruct --output preview.png
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from PIL import Image

from convllava.data.contact_sheet import draw_sheet, sheet_sample
from convllava.errors import ConfigError
from convllava.io import replacing
from convllava.training.datasets import check_files, make_dataset
from convllava.training.initialise import initial_processor
from convllava.training.recipe import Recipe
from convllava.training.stage import resolve_stages


def preview(recipe: Recipe, stage: str | None, samples: int, output: Path) -> None:
    """Draw the first samples of a stage.

    Args:
        recipe: The recipe whose data are drawn.
        stage: Name of the stage; None: the first.
        samples: Number of samples.
        output: Path of the picture; its extension selects the format.

    Raises:
        InputError: if there is no such stage, its data cannot be read, or the picture cannot be written.
    """
    kind = Image.registered_extensions().get(output.suffix.lower())
    if kind not in Image.SAVE:  # PIL can read some formats without writing them
        raise ConfigError(f"`output` {output}: give the name of a picture, such as preview.png")
    names = [stage.name for stage in recipe.stages]
    if stage is not None and stage not in names:
        raise ConfigError(f"{recipe.name} has no `stage` {stage!r}; choose one of {', '.join(names)}")
    index = 0 if stage is None else names.index(stage)
    # With a number of steps, a stage with epochs need not count its samples.
    batches = math.ceil(samples / recipe.stages[index].batch_size)
    shorter = [dataclasses.replace(one, steps=batches, epochs=None, evaluation=None) for one in recipe.stages]
    check_files(dataclasses.replace(recipe, stages=[shorter[index]]))
    run = resolve_stages(dataclasses.replace(recipe, stages=shorter), initial_processor(recipe))[index]
    dataset: Any = make_dataset(run)
    stride = getattr(dataset, "stride", run.processor.image_processor.stride)
    sheet = draw_sheet([sheet_sample(dataset[number], run.processor, stride, number) for number in range(samples)])
    with replacing(output) as partial:
        sheet.save(partial, kind)
