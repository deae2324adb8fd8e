"""Every question of the world, in several wordings, and the closed vocabulary of questions and labels."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from convllava.synthetic.canvas import Canvas, Region
from convllava.synthetic.sample import COLOURS, POSITIONS, SHAPES, Turn, box_text
from convllava.synthetic.words import DAYS, MONTHS, QUARTERS, sections

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
FIELDS = ("Name", "Date", "City", "Phone", "Code", "Amount", "Age", "Order", "Room", "Score", "Status")
COLUMNS = ("Item", "Price", "Qty", "Stock", "Year", "Score", "Code", "Age", "Size", "City", "Name", "Room")
SIZES = ("S", "M", "L", "XL")
STATUSES = ("open", "closed", "paid", "new", "done", "late")
TOTALS = ("Total", "TOTAL", "Amount due", "Sum", "Total due", "SUM", "AMOUNT DUE", "Grand total")
RECEIPT_LABELS = ("Date", "No.", "Receipt", "Cash", "Card", "Tax", "VAT")
FORM_TITLES = ("Form", "Application", "Registration", "Order form", "Request", "Record", "Booking", "Report")
CHART_TITLES = (
    "Sales", "Visitors", "Results", "Votes", "Points", "Rainfall", "Orders", "Units sold", "Members", "Profit"
)  # fmt: skip
SIMPLE_ITEMS = ("tea", "milk", "cake", "rice", "fish", "soup", "eggs", "bread", "juice", "apple", "nuts", "ham")
TABLE_TITLES = ("Stock list", "Price list", "Results", "Overview", "Summary", "Schedule", "Inventory")

TEMPLATES: dict[str, tuple[str, ...]] = {key: tuple(lines) for key, lines in sections("questions.txt").items()}

_GLUE = """a an the at of and object objects sign paragraph title receipt date total form table bar line chart
    ticket no last"""


@dataclass(frozen=True)
class Draft:
    """A question about a page that is not finished.

    The answer can be a region. Its box and the boxes of the evidence are known only after the page is rotated.
    """

    task: str
    question: str
    answer: str | Region
    evidence: tuple[Region, ...] = ()

    def read_from(self, *regions: Region) -> Draft:
        """Return the same question with the regions that show its answer."""
        return replace(self, evidence=regions)

    def turn(self, canvas: Canvas) -> Turn:
        """Return the turn on the finished page. If the answer is a region, it becomes the text of its box."""
        answer = self.answer
        if not isinstance(answer, str):
            answer = box_text(canvas.box_of(answer), canvas.width, canvas.height)
        evidence = (canvas.glyphs[r.start] if r.thing is None else canvas.things[r.thing] for r in self.evidence)
        return Turn(self.task, self.question, answer, tuple(shown.box for shown in evidence))


def ask(rng: random.Random, key: str, answer: str | Region, **names: str) -> Draft:
    """Choose a wording of the question `key` (a key of `TEMPLATES`) and fill its placeholders with `names`."""
    return Draft(key.split(".")[0], rng.choice(TEMPLATES[key]).format(**names), answer)


def count(rng: random.Random, key: str, regions: Iterable[Region], **names: str) -> Draft:
    """Ask with `ask` for the number of regions."""
    counted = tuple(regions)
    return ask(rng, key, str(len(counted)), **names).read_from(*counted)


def plural(shape: str) -> str:
    """Return the plural of a shape's name."""
    return shape + ("es" if shape == "cross" else "s")


@lru_cache
def closed_words() -> frozenset[str]:
    """Return the words of `closed_vocabulary` as a set."""
    wordings = [re.sub(r"{\w+}", " ", template) for templates in TEMPLATES.values() for template in templates]
    labels = [*ORDINALS, *FIELDS, *COLUMNS, *SIZES, *STATUSES, *TOTALS, *RECEIPT_LABELS, *SIMPLE_ITEMS]
    titles = [*FORM_TITLES, *CHART_TITLES, *TABLE_TITLES]
    names = [*COLOURS, *SHAPES, *map(plural, SHAPES), *POSITIONS, *MONTHS, *DAYS, *QUARTERS]
    return frozenset(re.findall(r"[a-z]+", " ".join([*wordings, *labels, *titles, *names, _GLUE]).lower()))


def closed_vocabulary() -> tuple[str, ...]:
    """Return the sorted lower-case words of questions, captions, labels, colours, shapes, positions and dates.

    None of them is an open word (a name, an item or an invented word). Open words only occur as text to read.
    """
    return tuple(sorted(closed_words()))
