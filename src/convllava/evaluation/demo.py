"""`convllava demo`: measure a model on generated pages, ask it about two example pages, and draw its answers."""

import json
import time
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.markup import escape

from convllava.display import AnsweredImage, draw_answers
from convllava.evaluation.results import Result
from convllava.evaluation.runner import evaluate
from convllava.inference import load
from convllava.io import make_output, replacing

PAGES = Path(__file__).parents[1] / "examples"
PAGE_SIZE = 448
"""Square root of the area, in pixels, of the pages that the bundled weights were trained on."""
DEMO_SEED = 2026


def run_demo(model: str, output: Path, samples: int) -> Result:
    """Print the table and the answers; write `report.json` (the result) and `answers.png` into `output`.

    Raises:
        InputError: if there is no such model, or `output` cannot be a folder or cannot be written to.
    """
    started, console = time.monotonic(), Console()
    assistant = load(model)
    make_output(output)
    result = evaluate(assistant, "generated", samples=samples, seed=DEMO_SEED, size=PAGE_SIZE, batch_size=64, timed=0)
    console.print(result.table())

    answered = []
    for path in sorted(PAGES.glob("*.json")):  # NAME.json lists questions about the page NAME.png
        image = Image.open(path.with_suffix(".png")).convert("RGB")
        page = AnsweredImage(image, [], [])
        for question in json.loads(path.read_text(encoding="utf-8")):
            report = assistant.report(image, question)
            page.turns.append((question, report["answer"]))
            page.boxes.extend(report["boxes"])
            console.print(f"[bold]{escape(question)}[/bold]  {escape(report['answer'])}", highlight=False)
        answered.append(page)
    with replacing(output / "answers.png") as partial:
        draw_answers(answered).save(partial, "PNG")

    result.content["seconds"] = round(time.monotonic() - started, 1)
    result.save(output / "report.json")
    console.print(f"{output}/report.json and {output}/answers.png, {result['seconds']} s", highlight=False)
    return result
