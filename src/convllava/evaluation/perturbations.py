"""Perturbations of pages and questions, each in four severities."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageEnhance, ImageFilter

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
