"""Commands for models on disk: info, convert, merge, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from convllava.cli.options import AsJson, numbers, show


def info(
    name: Annotated[
        str, typer.Argument(help="An architecture such as convllava-1536-7b, a checkpoint, or a tower: T, S, B, L.")
    ],
    sides: Annotated[str | None, typer.Option(help="Sides of square images in pixels, separated by commas.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the parts and the costs of a model, without allocating it."""
    from convllava.checkpoints import SHIPPED
    from convllava.checkpoints.inspection import SIDES, inspect, inspect_tower, model_tables, tower_tables
    from convllava.model.presets import towers

    wanted = None if sides is None else numbers("--sides", sides)
    if name in towers() and not (SHIPPED / name).exists():  # a checkpoint of that name has more to show
        tower = inspect_tower(name, wanted or SIDES)
        show(tower, as_json, lambda: tower_tables(tower))
    else:
        report = inspect(name, wanted)
        show(report, as_json, lambda: model_tables(report))


def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint: a folder, a hub id, or tiny.")],
    destination: Annotated[Path, typer.Argument(help="A new folder.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    to: Annotated[str, typer.Option(help="convllava, or official: the layout of the original code.")] = "convllava",
    base: Annotated[str | None, typer.Option(help="Language model that an original LoRA was trained on.")] = None,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint: from the official layout to ours, back, or to another precision."""
    from convllava import checkpoints

    note = checkpoints.convert(source, destination, dtype, to=to, base=base)
    report = {"checkpoint": str(destination), "layout": to, "dtype": dtype, "note": note}
    show(report, as_json, lambda: [str(destination)])
    if note and not as_json:
        print(note, file=sys.stderr)


def merge(
    adapter: Annotated[str, typer.Argument(help="The folder of a stage that trained an adapter.")],
    destination: Annotated[Path, typer.Argument(help="A new folder.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    base: Annotated[str | None, typer.Option(help="The checkpoint that it was trained on, if that has moved.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter and its base as one plain checkpoint."""
    from convllava import checkpoints

    checkpoints.merge(adapter, destination, dtype, base)
    show({"checkpoint": str(destination), "dtype": dtype}, as_json, lambda: [str(destination)])


def export(
    model: Annotated[str, typer.Argument(help="tiny, a folder, or a hub id.")],
    path: Annotated[Path, typer.Argument(help="A file that ends in .onnx, or in .xml for OpenVINO.")],
    as_json: AsJson = False,
) -> None:
    """Export vision tower and projector for other runtimes, for any height and width, and check them."""
    from convllava.export import export as run
    from convllava.inference import load

    difference = run(load(model, device="cpu").model, path)
    text = f"{path}: differs by at most {difference:.1e} from the model"
    show({"path": str(path), "difference": difference}, as_json, lambda: [text])
