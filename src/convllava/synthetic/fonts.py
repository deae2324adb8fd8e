"""Fonts of the generated world: the families of each split, and the ink and advance of every character.

The families come from PyPI packages (`pip install "convllava[synthetic]"`), which are found without importing them.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from convllava.errors import ConfigError
from convllava.synthetic.sample import CHARACTERS
from convllava.synthetic.splits import split_of


class Typeface(NamedTuple):
    """Paths of the regular and bold font files of a page."""

    family: str
    regular: str
    bold: str


FAMILIES: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "Roboto": (
        "font_roboto",
        (
            ("Roboto-Regular.ttf", "Roboto-Bold.ttf"),
            ("Roboto-Medium.ttf", "Roboto-Black.ttf"),
            ("Roboto-Italic.ttf", "Roboto-BoldItalic.ttf"),
        ),
    ),
    "Source Sans Pro": (
        "font_source_sans_pro",
        (
            ("SourceSansPro-Regular.ttf", "SourceSansPro-Bold.ttf"),
            ("SourceSansPro-Semibold.ttf", "SourceSansPro-Black.ttf"),
        ),
    ),
    "Source Serif Pro": (
        "font_source_serif_pro",
        (
            ("SourceSerifPro-Regular.ttf", "SourceSerifPro-Bold.ttf"),
            ("SourceSerifPro-Semibold.ttf", "SourceSerifPro-Black.ttf"),
            ("SourceSerifPro-It.ttf", "SourceSerifPro-BoldIt.ttf"),
        ),
    ),
    "Manrope": ("font_manrope", (("Manrope-Medium.ttf", "Manrope-Bold.ttf"),)),
    "Hanken Grotesk": ("font_hanken_grotesk", (("HankenGrotesk-Medium.otf", "HankenGrotesk-Bold.otf"),)),
    "Fjalla One": ("font_fjallaone", (("FjallaOne-Regular.ttf", "FjallaOne-Regular.ttf"),)),
    "Fredoka One": ("font_fredoka_one", (("FredokaOne-Regular.ttf", "FredokaOne-Regular.ttf"),)),
    "Intuitive": ("font_intuitive", (("Intuitive.ttf", "Intuitive.ttf"),)),
    "Lato": ("font_lato", (("Lato-Regular.ttf", "Lato-Bold.ttf"), ("Lato-Bold.ttf", "Lato-Black.ttf"))),
    "Caladea": ("font_caladea", (("Caladea-Regular.ttf", "Caladea-Bold.ttf"),)),
    "Red Hat Display": ("font_rhd", (("RedHatDisplay-Medium.ttf", "RedHatDisplay-Bold.ttf"),)),
}
"""For each family its Python package, and pairs of a regular and a bold file in it."""
HELDOUT_FAMILIES = ("Lato", "Caladea", "Red Hat Display")
CLEAN_FAMILIES = ("Roboto", "Source Sans Pro", "Lato")
SYSTEM_FOLDERS = ("/usr/share/fonts", "~/Library/Fonts", "/Library/Fonts", "C:\\Windows\\Fonts")


@lru_cache
def typefaces(split: str, clean: bool = False, system: bool = False) -> tuple[Typeface, ...]:
    """Return the typefaces of a split: one or two plain ones if `clean`; also those of this machine if `system`.

    Raises:
        ConfigError: if a font package is missing.
    """
    names = [name for name in FAMILIES if (name in HELDOUT_FAMILIES) == (split == "heldout")]
    if clean:
        return tuple(_packaged(name)[0] for name in names if name in CLEAN_FAMILIES)
    found = [typeface for name in names for typeface in _packaged(name)]
    if system:
        found += [typeface for typeface in _system() if split_of("font", typeface.family) == split]
    return tuple(found)


def _packaged(family: str) -> tuple[Typeface, ...]:
    package, pairs = FAMILIES[family]
    spec = importlib.util.find_spec(package)
    folders = [Path(folder) / "files" for folder in (spec.submodule_search_locations or () if spec else ())]
    paths = [[folder / name for name in pair] for folder in folders[:1] for pair in pairs]
    if not paths or not all(path.exists() for pair in paths for path in pair):
        raise ConfigError(f'synthetic world: font {family} is not installed; run pip install "convllava[synthetic]"')
    return tuple(Typeface(family, str(regular), str(bold)) for regular, bold in paths)


@lru_cache
def _system() -> tuple[Typeface, ...]:
    folders = [Path(folder).expanduser() for folder in SYSTEM_FOLDERS]
    paths = sorted(path for folder in folders if folder.is_dir() for path in folder.rglob("*.[to]tf"))
    found = [Typeface(family, str(path), str(path)) for path in paths if (family := _legible_family(path))]
    # A family of the packages keeps its split, even if this machine has copies of it.
    return tuple(typeface for typeface in found if not typeface.family.startswith(tuple(FAMILIES)))


def _legible_family(path: Path) -> str:
    """Return the family of a font file, or "" if the font has no glyph for one of `CHARACTERS`."""

    def picture(char: str) -> bytes:
        image = Image.new("L", (48, 48))
        ImageDraw.Draw(image).text((4, 36), char, 255, face, anchor="ls")
        return image.tobytes()

    try:
        face = ImageFont.truetype(str(path), 24, layout_engine=ImageFont.Layout.BASIC)
        pictures = [picture(char) for char in CHARACTERS]
        is_complete = picture("\U000f0000") not in pictures and all(map(any, pictures))  # the glyph for missing ones
    except OSError:
        return ""
    return str(face.getname()[0]) if is_complete else ""


class Font:
    """One face at one size. It caches the ink and the advance of each character.

    Attributes:
        size: Nominal size in pixels.
        capital: Height of a capital letter in pixels.
    """

    def __init__(self, path: str, size: int) -> None:
        self.size = size
        self.face = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
        self.capital = -int(self.face.getbbox("H", anchor="ls")[1])
        self._masks: dict[str, tuple[Image.Image, tuple[int, int]]] = {}
        self._steps: dict[tuple[str, str], float] = {}

    def mask(self, char: str) -> tuple[Image.Image, tuple[int, int]]:
        """Return the ink of `char` (mode "L") and the offset of its top left corner from the origin."""
        if char not in self._masks:
            margin = self.size
            image = Image.new("L", (3 * margin, 3 * margin))
            ImageDraw.Draw(image).text((margin, 2 * margin), char, 255, self.face, anchor="ls")
            ink = image.getbbox() or (margin, 2 * margin, margin + 1, 2 * margin + 1)
            self._masks[char] = image.crop(ink), (ink[0] - margin, ink[1] - 2 * margin)
        return self._masks[char]

    def step(self, char: str, following: str) -> float:
        """Return the advance from `char` to `following` in pixels, with kerning."""
        pair = (char, following)
        if pair not in self._steps:
            self._steps[pair] = self.face.getlength(char + following) - self.face.getlength(following)
        return self._steps[pair]

    def origins(self, text: str) -> list[float]:
        """Return the start of each character and the end of the text, in pixels from its start."""
        places = [0.0]
        for char, following in zip(text, text[1:] + " ", strict=True):
            places.append(places[-1] + self.step(char, following))
        return places

    def width(self, text: str) -> float:
        """Return the width of `text` in pixels."""
        return self.origins(text)[-1]


@lru_cache(maxsize=512)
def font(path: str, size: int) -> Font:
    """Return the face of a font file at `size` pixels. It is cached: opening a font costs more than drawing with it."""
    return Font(path, size)


def font_size(pixels: float) -> int:
    """Round a size to one of few steps, so that few faces are open. The smallest is 15."""
    size = max(15, round(pixels))
    step = 1 if size < 20 else 2 if size < 40 else 4 if size < 80 else 8
    return size // step * step
