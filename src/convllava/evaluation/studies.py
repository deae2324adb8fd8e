"""Studies on generated pages: reading by the height of the text, and answers about perturbed pages."""

import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image, ImageEnhance, ImageFilter

from convllava.checkpoints.tensors import weights_digest
from convllava.display import check_can_draw, progress_bar
from convllava.errors import ConfigError
from convllava.evaluation.aggregate import accuracy_of, mean_interval, rounded
from convllava.evaluation.report import plot_heights, plot_severities
from convllava.evaluation.runner import describe_model, open_model, versions
from convllava.evaluation.synthetic import describe_world, grade_pages, text_height
from convllava.geometry import Size
from convllava.inference import Assistant
from convllava.io import WEIGHTS, ResumableJsonl, write_json
from convllava.synthetic import World

EDGES = (0, 12, 16, 20, 24, 28, 32, 38, 46, 56, 80, 160)
"""Edges of the bins of heights, in pixels that the tower sees."""
FEWEST = 20
"""Bins with fewer answers are left out."""
READING = ("read", "field", "table")
"""Tasks whose answers are printed on the page."""
_SKIPPED = ("ground", "position")
"""Tasks whose right answers change if the page is rotated or stretched."""


def sweep(
    model: Assistant | str | os.PathLike[str],
    world: World,
    samples: int,
    sides: Sequence[int],
    output: str | os.PathLike[str],
) -> dict[str, Any]:
    """Ask for the texts that are printed on pages, at several resolutions.

    Args:
        model: The model, or its name or folder (see `convllava.load`). The settings of its image processor are changed
            while this runs.
        sides: Square roots of the areas, in pixels, to which pages are resized; their aspect ratio is kept.
        output: Folder for sweep.json and sweep.png. A run that was killed continues there.

    Returns:
        The settings, `resolutions` (the accuracy at each side), and `rows` (the accuracy by side and bin of heights;
        `height` is the mean in the bin).

    Raises:
        InputError: if no page has a printed answer, a side is not possible, the model or the output folder cannot be
            used, or matplotlib is missing.
    """
    folder = Path(output)
    assistant, journal, report = _open_study("sweep", model, world, samples, folder)
    pages = []
    for page in map(world.sample, range(samples)):
        turns = tuple(turn for turn in page.turns if turn.task in READING and text_height(page, turn) is not None)
        pages.append(replace(page, turns=turns))
    if not any(page.turns for page in pages):
        raise ConfigError("none of the pages has an answer that is printed on it; raise `samples`")
    processor = assistant.processor.image_processor
    before = {name: getattr(processor, name) for name in ("mode", "min_pixels", "max_pixels")}
    for side in sides:
        if str(side) in journal.entries:
            continue
        processor.change(mode="native", min_pixels=side**2, max_pixels=side**2)
        try:
            with progress_bar(f"{side} pixels") as progress:
                images = [assistant.encode(page.image) for page in pages]
                hits = grade_pages(assistant, pages, images, progress)
            scales = [processor.placement(Size(page.image.height, page.image.width)).scale_y for page in pages]
        finally:
            processor.change(**before)
        pairs = zip(pages, scales, strict=True)
        heights = [scale * (text_height(page, turn) or 0.0) for page, scale in pairs for turn in page.turns]
        journal.add([{"id": str(side), "answers": list(zip(heights, hits, strict=True))}])

    resolutions, rows = [], []
    for side in sides:
        answers = journal.entries[str(side)]["answers"]
        resolutions.append({"side": side} | accuracy_of([hit for _, hit in answers]))
        for low, high in pairwise(EDGES):
            inside = [answer for answer in answers if low <= answer[0] < high]
            if len(inside) >= FEWEST:
                height = sum(height for height, _ in inside) / len(inside)
                found = accuracy_of([hit for _, hit in inside])
                rows.append({"side": side, "from": low, "to": high, "height": round(height, 1)} | found)
    report |= {"resolutions": resolutions, "rows": rows}
    write_json(folder / "sweep.json", report)
    plot_heights(rows, folder / "sweep.png")
    return report


_REWORDINGS = (
    (r"\bcolour\b", "color"),
    (r"\bpicture\b", "image"),
    (r"^How many (.+?) (?:are there|do you see)\?$", r"Tell me the count of \1."),
    (r"^What (?:is|are) (.+?)\?$", r"Tell me \1."),
    (r"^Which (.+?) (is|has|does) ", r"Say which \1 \2 "),
    (r"^Read (.+?)\.$", r"Please read out \1."),
    (r"^Where is (.+?)\?$", r"In what place is \1?"),
    (r"^What does (.+?) say\?$", r"What do you read on \1?"),
)
"""Replacements; the generated questions never have the forms on the right."""


@dataclass(frozen=True)
class Perturbation:
    """One kind of perturbation.

    Attributes:
        kind: Its name.
        values: The meaning of severities 1 to 4, for people.
        page: Image, severity 1 to 4 -> perturbed image.
        question: Question, severity 1 to 4 -> perturbed question.
    """

    kind: str
    values: tuple[str, ...]
    page: Callable[[Image.Image, int], Image.Image] = lambda image, severity: image
    question: Callable[[str, int], str] = lambda text, severity: text


def rotated(image: Image.Image, severity: int) -> Image.Image:
    """Rotate counter-clockwise about the centre; the new corners are white."""
    return image.rotate((2, 5, 10, 20)[severity - 1], Image.Resampling.BICUBIC, fillcolor="white")


def blurred(image: Image.Image, severity: int) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur((0.5, 1.0, 1.5, 2.5)[severity - 1]))


def compressed(image: Image.Image, severity: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=(50, 30, 15, 5)[severity - 1])
    return Image.open(buffer).convert("RGB")


def darkened(image: Image.Image, severity: int) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance((0.75, 0.5, 0.25, 0.1)[severity - 1])


def shrunk(image: Image.Image, severity: int) -> Image.Image:
    """Reduce the pixels; the image processor enlarges the image to the size that the tower sees."""
    factor = (0.8, 0.6, 0.45, 0.3)[severity - 1]
    return _resized(image, factor, factor)


def stretched(image: Image.Image, severity: int) -> Image.Image:
    """Change the aspect ratio by a factor and keep the area."""
    factor = (1.1, 1.25, 1.5, 2.0)[severity - 1]
    return _resized(image, factor**0.5, factor**-0.5)


def _resized(image: Image.Image, horizontal: float, vertical: float) -> Image.Image:
    size = (max(1, round(image.width * horizontal)), max(1, round(image.height * vertical)))
    return image.resize(size, Image.Resampling.BICUBIC)


def paraphrased(text: str, severity: int) -> str:
    """Write a question carelessly, politely, in other words, or in other words within a longer request."""
    longer = f"Look at the image and answer in a few words. {reworded(text)}"
    return (text.lower().rstrip("?."), f"Please tell me: {text}", reworded(text), longer)[severity - 1]


def reworded(text: str) -> str:
    """Return a question in other words with the same meaning."""
    for form, other in _REWORDINGS:
        text = re.sub(form, other, text)
    return text


PERTURBATIONS = (
    Perturbation("rotation", ("2°", "5°", "10°", "20°"), rotated),
    Perturbation("blur", ("0.5 px", "1 px", "1.5 px", "2.5 px"), blurred),
    Perturbation("JPEG quality", ("50", "30", "15", "5"), compressed),
    Perturbation("brightness", ("75 %", "50 %", "25 %", "10 %"), darkened),
    Perturbation("scale", ("80 %", "60 %", "45 %", "30 %"), shrunk),
    Perturbation("aspect ratio", ("1.1", "1.25", "1.5", "2"), stretched),
    Perturbation("question", ("careless", "polite", "reworded", "both"), question=paraphrased),
)
SEVERITIES = (1, 2, 3, 4)
_CLEAN = Perturbation("none", ("",))


def robustness(
    model: Assistant | str | os.PathLike[str], world: World, samples: int, output: str | os.PathLike[str]
) -> dict[str, Any]:
    """Ask the same questions about the same pages, perturbed in each of seven ways at four severities.

    Args:
        model: The model, or its name or folder (see `convllava.load`).
        world: Where the pages come from. Questions about positions and boxes are left out.
        output: Folder for robustness.json and robustness.png. A run that was killed continues there.

    Returns:
        The settings, `clean` (the accuracy on unchanged pages), and `rows`: kind, severity, value, accuracy and its
        95 % interval, and the accuracy lost against clean pages with the interval of the paired difference.

    Raises:
        InputError: if the model or the output folder cannot be used, or matplotlib is missing.
    """
    folder = Path(output)
    assistant, journal, report = _open_study("robustness", model, world, samples, folder)
    pages = []
    for page in map(world.sample, range(samples)):
        pages.append(replace(page, turns=tuple(turn for turn in page.turns if turn.task not in _SKIPPED)))

    cases = [(_CLEAN, 0), *((kind, severity) for kind in PERTURBATIONS for severity in SEVERITIES)]
    with progress_bar("robustness") as progress:
        for number, (kind, severity) in enumerate(cases, start=1):
            case = f"{kind.kind}/{severity}"
            if case not in journal.entries:
                perturbed = []
                for page in pages:
                    turns = tuple(replace(turn, question=kind.question(turn.question, severity)) for turn in page.turns)
                    perturbed.append(replace(page, image=kind.page(page.image, severity), turns=turns))
                images = [assistant.encode(page.image) for page in perturbed]
                journal.add([{"id": case, "hits": grade_pages(assistant, perturbed, images)}])
            progress(number / len(cases))

    clean, rows = journal.entries["none/0"]["hits"], []
    for kind in PERTURBATIONS:
        for severity, value in zip(SEVERITIES, kind.values, strict=True):
            hits = journal.entries[f"{kind.kind}/{severity}"]["hits"]
            lost = [float(before) - float(after) for before, after in zip(clean, hits, strict=True)]
            low, high = mean_interval(lost)
            rows.append(
                {"kind": kind.kind, "severity": severity, "value": value}
                | accuracy_of(hits)
                | {"lost": rounded(sum(lost) / len(lost)), "lost_low": rounded(low), "lost_high": rounded(high)}
            )
    report |= {"clean": accuracy_of(clean), "rows": rows}
    write_json(folder / "robustness.json", report)
    plot_severities(report["clean"]["accuracy"], rows, folder / "robustness.png")
    return report


def _open_study(
    kind: str, model: Assistant | str | os.PathLike[str], world: World, samples: int, folder: Path
) -> tuple[Assistant, ResumableJsonl, dict[str, Any]]:
    """Return the model, the journal KIND.jsonl, and the beginning of the report of a study on generated pages.

    Raises:
        InputError: if the model or the folder cannot be used, or matplotlib, which will draw the plot, is missing.
    """
    check_can_draw("eval")
    name, assistant = open_model(model)
    settings: dict[str, Any] = {"kind": kind, "model": name, WEIGHTS: weights_digest(assistant.model)}
    settings |= {"samples": samples, "world": describe_world(world)}
    journal = ResumableJsonl(folder, settings, f"{kind}.jsonl")
    return assistant, journal, settings | {"model": describe_model(name, assistant), "versions": versions()}
