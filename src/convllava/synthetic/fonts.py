"""Fonts of the generated world: the families of each split, and the ink and advance of every character.

The families come from PyPI packages (`pip install "convllava[synthetic]"`), which are found without importing them.
"""

import importlib.util
from functools import lru_cache
from itertools import accumulate
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


FAMILIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "Roboto": ("font_roboto", "Roboto-{}.ttf", ("Regular Bold", "Medium Black", "Italic BoldItalic")),
    "Source Sans Pro": ("font_source_sans_pro", "SourceSansPro-{}.ttf", ("Regular Bold", "Semibold Black")),
    "Source Serif Pro": (
        "font_source_serif_pro",
        "SourceSerifPro-{}.ttf",
        ("Regular Bold", "Semibold Black", "It BoldIt"),
    ),
    "Manrope": ("font_manrope", "Manrope-{}.ttf", ("Medium Bold",)),
    "Hanken Grotesk": ("font_hanken_grotesk", "HankenGrotesk-{}.otf", ("Medium Bold",)),
    "Fjalla One": ("font_fjallaone", "FjallaOne-{}.ttf", ("Regular Regular",)),
    "Fredoka One": ("font_fredoka_one", "FredokaOne-{}.ttf", ("Regular Regular",)),
    "Intuitive": ("font_intuitive", "{}.ttf", ("Intuitive Intuitive",)),
    "Lato": ("font_lato", "Lato-{}.ttf", ("Regular Bold", "Bold Black")),
    "Caladea": ("font_caladea", "Caladea-{}.ttf", ("Regular Bold",)),
    "Red Hat Display": ("font_rhd", "RedHatDisplay-{}.ttf", ("Medium Bold",)),
}
"""For each family its Python package, the names of its files, and pairs of a regular and a bold style."""
HELDOUT_FAMILIES = ("Lato", "Caladea", "Red Hat Display")
CLEAN_FAMILIES = ("Roboto", "Source Sans Pro", "Lato")
SYSTEM_FOLDERS = ("/usr/share/fonts", "~/Library/Fonts", "/Library/Fonts", "C:\\Windows\\Fonts")


@lru_cache
def typefaces(split: str, clean: bool = False, system: bool = False) -> tuple[Typeface, ...]:
    """Return the typefaces of a split: one or two plain ones if `clean`; also the fonts of this machine if `system`.

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
    package, name, pairs = FAMILIES[family]
    spec = importlib.util.find_spec(package)
    folders = [Path(folder) / "files" for folder in (spec.submodule_search_locations or () if spec else ())]
    paths = [[folder / name.format(style) for style in pair.split()] for folder in folders[:1] for pair in pairs]
    if not paths or not all(path.exists() for pair in paths for path in pair):
        raise ConfigError(f'synthetic world: font {family} is not installed; run pip install "convllava[synthetic]"')
    return tuple(Typeface(family, str(regular), str(bold)) for regular, bold in paths)


@lru_cache
def _system() -> tuple[Typeface, ...]:
    """Return the fonts of this machine that have a glyph for each of `CHARACTERS`."""

    def picture(char: str) -> bytes:
        image = Image.new("L", (48, 48))
        ImageDraw.Draw(image).text((4, 36), char, 255, face, anchor="ls")
        return image.tobytes()

    found: list[Typeface] = []
    for path in sorted(path for folder in SYSTEM_FOLDERS for path in Path(folder).expanduser().rglob("*.[to]tf")):
        try:
            face = ImageFont.truetype(str(path), 24, layout_engine=ImageFont.Layout.BASIC)
            pictures = [picture(char) for char in CHARACTERS]
            is_complete = picture("\U000f0000") not in pictures and all(
                map(any, pictures)
            )  # the glyph for missing ones
        except OSError:
            continue
        family = str(face.getname()[0])
        # A family of the packages keeps its split, even if this machine has copies of it.
        if is_complete and family and not family.startswith(tuple(FAMILIES)):
            found.append(Typeface(family, str(path), str(path)))
    return tuple(found)


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
        pairs = zip(text, text[1:] + " ", strict=True)
        return list(accumulate((self.step(*pair) for pair in pairs), initial=0.0))

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
