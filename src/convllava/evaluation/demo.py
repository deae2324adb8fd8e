"""The main job in one go: measure a model on fresh pages, answer questions about two pages, draw what it said.

convllava demo --output runs/demo
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.markup import escape

from convllava.display import AnsweredImage, draw_answers
from convllava.evaluation.synthetic_report import measure, table_of
from convllava.inference import Assistant, load
from convllava.io import make_output, replacing, write_json
from convllava.synthetic import World

PAGES = Path(__file__).parents[1] / "examples"
PAGE_SIZE = 448
"""Square root of the area of the pages that the shipped weights were trained on, in pixels."""
DEMO_SEED = 2026


def run_demo(model: str, output: Path, samples: int) -> None:
    """Print the table and the answers; write `report.json` and `answers.png` into `output`.

    Raises:
        InputError: there is no such model, or `output` cannot be a folder or be written to.
    """
    started = time.monotonic()
    console = Console()
    assistant = load(model)
    make_output(output)
    report = measure(assistant, World("heldout", seed=DEMO_SEED, size=PAGE_SIZE), samples)
    console.print(table_of(report, f"{model}: {samples} held-out pages; blind is the same with another page's image"))
    pages = [answer_page(assistant, path) for path in sorted(PAGES.glob("*.json"))]
    for page in pages:
        for question, answer in page.turns:
            console.print(f"[bold]{escape(question)}[/bold]  {escape(answer)}", highlight=False)
    with replacing(output / "answers.png") as partial:
        draw_answers(pages).save(partial, "PNG")
    report["seconds"] = round(time.monotonic() - started, 1)
    write_json(output / "report.json", report)
    console.print(f"{output}/report.json and {output}/answers.png, {report['seconds']} s", highlight=False)


def answer_page(assistant: Assistant, path: Path) -> AnsweredImage:
    """Ask the questions of a page: NAME.json lists them, NAME.png is the page."""
    image = Image.open(path.with_suffix(".png")).convert("RGB")
    turns, boxes = [], []
    for question in json.loads(path.read_text(encoding="utf-8")):
        report = assistant.report(image, question)
        turns.append((question, report["answer"]))
        boxes += report["boxes"]
    return AnsweredImage(image, turns, boxes)
