"""The main job in one go: measure a model on fresh pages, answer questions about two pages, draw what it said.

convllava demo --output runs/demo
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.markup import escape

from convllava.evaluation.synthetic import measure, table_of
from convllava.geometry import Box
from convllava.inference import Assistant, load
from convllava.synthetic import World

PAGES = Path(__file__).parent / "examples"
PAGE_SIZE = 448
"""Square root of the area of the pages that the shipped weights were trained on, in pixels."""
DEMO_SEED = 2026
_MARGIN, _TEXT, _LINE = 24, 22, 32
_BOX_COLOUR = (220, 40, 40)


@dataclass(frozen=True)
class Answered:
    """A page with questions and what the model said; boxes in pixels of the page."""

    image: Image.Image
    turns: list[tuple[str, str]]
    boxes: list[Box]


def run_demo(model: str, output: Path, samples: int) -> None:
    """Print the table and the answers; write `report.json` and `answers.png` into `output`."""
    started = time.monotonic()
    console = Console()
    assistant = load(model)
    report = measure(assistant, World("heldout", seed=DEMO_SEED, size=PAGE_SIZE), samples)
    console.print(table_of(report, f"{model}: {samples} held-out pages; blind is the same with another page's image"))
    pages = [answer_page(assistant, path) for path in sorted(PAGES.glob("*.json"))]
    for page in pages:
        for question, answer in page.turns:
            console.print(f"[bold]{escape(question)}[/bold]  {escape(answer)}", highlight=False)
    output.mkdir(parents=True, exist_ok=True)
    draw_answers(pages).save(output / "answers.png")
    report["seconds"] = round(time.monotonic() - started, 1)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(f"{output}/report.json and {output}/answers.png, {report['seconds']} s", highlight=False)


def answer_page(assistant: Assistant, path: Path) -> Answered:
    """Ask the questions of a page: NAME.json lists them, NAME.png is the page."""
    image = Image.open(path.with_suffix(".png")).convert("RGB")
    turns, boxes = [], []
    for question in json.loads(path.read_text(encoding="utf-8")):
        report = assistant.report(image, question)
        turns.append((question, report["answer"]))
        boxes += report["boxes"]
    return Answered(image, turns, boxes)


def draw_answers(pages: list[Answered]) -> Image.Image:
    """The pages side by side with boxes, and the questions and answers below each."""
    panels = [_draw_panel(page) for page in pages]
    width = sum(panel.width for panel in panels)
    sheet = Image.new("RGB", (width, max(panel.height for panel in panels)), "white")
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width
    return sheet


def _draw_panel(page: Answered) -> Image.Image:
    font = ImageFont.load_default(_TEXT)
    lines = [line for question, answer in page.turns for line in (question, f"   {answer}")]
    width = max(page.image.width, *(int(font.getlength(line)) for line in lines)) + 2 * _MARGIN
    height = page.image.height + 3 * _MARGIN + _LINE * len(lines)
    panel = Image.new("RGB", (width, height), "white")
    panel.paste(page.image, (_MARGIN, _MARGIN))
    draw = ImageDraw.Draw(panel)
    for x0, y0, x1, y1 in page.boxes:
        draw.rectangle((x0 + _MARGIN, y0 + _MARGIN, x1 + _MARGIN, y1 + _MARGIN), outline=_BOX_COLOUR, width=3)
    top = page.image.height + 2 * _MARGIN
    for index, line in enumerate(lines):
        draw.text((_MARGIN, top + index * _LINE), line, fill="black" if index % 2 == 0 else (20, 80, 170), font=font)
    return panel
