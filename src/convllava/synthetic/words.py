"""The words of the generated world: everyday words by role, invented words, codes, dates and prices."""

import random
from functools import lru_cache
from importlib import resources

from convllava.synthetic.splits import split_of

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
QUARTERS = ("Q1", "Q2", "Q3", "Q4")


def sections(name: str) -> dict[str, list[str]]:
    """Return the lines under each [heading] of a text file of this package, without empty lines and # comments."""
    text = resources.files("convllava.synthetic").joinpath(name).read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("["):
            found[line.strip("[]")] = []
        elif line and not line.startswith("#"):
            found[next(reversed(found))].append(line)
    return found


ROLES: dict[str, tuple[str, ...]] = {
    role: tuple(" ".join(lines).split()) for role, lines in sections("words.txt").items()
}

_CLUSTERS = ("br", "ch", "cl", "cr", "dr", "fl", "gr", "kr", "pl", "sh", "sk", "sl", "st", "th", "tr")
_ONSETS: tuple[str, ...] = (*"bcdfghjklmnprstvwz", *_CLUSTERS)
_NUCLEI: tuple[str, ...] = (*"aeiouaeiou", "ai", "ea", "ee", "oo", "ou")
_CODAS: tuple[str, ...] = ("", "", "", "", *"bdgklmnprstx", "nd", "nt", "rk", "st")


def is_open(word: str, split: str, closed: frozenset[str]) -> bool:
    """Return whether `split` may print `word` as an open word: the split owns it, and no question or label uses it."""
    return word.lower() not in closed and split_of("word", word.lower()) == split


@lru_cache
def pool(role: str, split: str, closed: frozenset[str], longest: int) -> tuple[str, ...]:
    """Return the everyday words of a role (a key of `ROLES`) that `split` owns, with at most `longest` letters."""
    return tuple(word for word in ROLES[role] if len(word) <= longest and is_open(word, split, closed))


def pseudo_word(rng: random.Random, split: str, closed: frozenset[str], longest: int = 9) -> str:
    """Return an invented, pronounceable word of 2 to `longest` letters that `split` owns, in lower case."""
    while True:
        syllables = rng.choice((1, 2, 2, 2, 3))
        parts = [rng.choice(_ONSETS) + rng.choice(_NUCLEI) for _ in range(syllables)]
        word = "".join(parts) + rng.choice(_CODAS)
        if len(word) <= longest and is_open(word, split, closed):
            return word


def code(rng: random.Random) -> str:
    """Return a random code, such as "B7-421"."""
    forms = ("@#-###", "@@###", "###-@@", "@-##", "#@#@", "@@-####", "#####", "@#@-#@", "##/###")
    letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
    fill: dict[str, str] = {"@": letters, "#": "0123456789"}
    return "".join(rng.choice(fill.get(char, char)) for char in rng.choice(forms))


def date(rng: random.Random) -> str:
    """Return a date of 1990 to 2029 in one of several formats, such as "12/03/2021"."""
    year, month, day = rng.randint(1990, 2029), rng.randint(1, 12), rng.randint(1, 28)
    name = MONTHS[month - 1]
    forms = (
        f"{day:02}/{month:02}/{year}",
        f"{year}-{month:02}-{day:02}",
        f"{day:02}.{month:02}.{year}",
        f"{day} {name} {year}",
        f"{name} {day}, {year}",
        f"{day:02}-{month:02}-{year % 100:02}",
    )
    return rng.choice(forms)


def cents(rng: random.Random, most: int = 2500) -> int:
    """Return a price in cents from 100 up to `most`, often a multiple of 5."""
    price = rng.randint(100, most)
    return price if rng.random() < 0.6 else max(100, price // 5 * 5)


def money(amount: int) -> str:
    """Return cents as they are printed: 350 -> "3.50"."""
    return f"{amount // 100}.{amount % 100:02}"
