"""The two splits of the world. A stable digest of every word and every layout decides which split owns it."""

import hashlib
import itertools
from functools import lru_cache

SPLITS = ("train", "heldout")
HELDOUT_PERCENT = 18


def _choices(**names: str) -> dict[str, tuple[str, ...]]:
    return {name: tuple(choices.split()) for name, choices in names.items()}


OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "scene": _choices(background="plain gradient texture", aspect="tall square wide", spread="small mixed big"),
    "sign": _choices(board="full border round double", align="left centre", tone="light dark vivid", lines="1 2 3"),
    "paragraph": _choices(
        align="left centre right", title="none bold large", aspect="tall square wide", leading="tight loose"
    ),
    "receipt": _choices(
        paper="full sheet",
        header="left centre",
        rule="none dashed solid",
        date="above below",
        total="bold large",
        quantity="none before",
    ),
    "form": _choices(labels="left above boxed", title="none left centre", colon="colon bare", line="none underline"),
    "table": _choices(
        ruling="grid rows striped open", header="bold filled dark", align="left centre right", title="none top"
    ),
    "bar_chart": _choices(
        bars="vertical slim horizontal",
        values="outside inside axis",
        title="none top",
        grid="grid ticks",
        colours="one many",
    ),
    "line_chart": _choices(
        marker="circle square diamond",
        values="above boxed axis",
        title="none top",
        grid="grid ticks",
        frame="open closed",
    ),
    "ticket": _choices(align="left spread", gap="narrow even wide", rule="none solid"),
}
"""The discrete choices of each kind of page. A combination of choices is a layout, which one split owns."""


@lru_cache(maxsize=1 << 16)
def split_of(category: str, text: str) -> str:
    """Return the split that owns `text`, the same on every machine. About 18 % of each category is held out."""
    digest = hashlib.blake2b(f"{category}:{text}".encode(), digest_size=4).digest()
    return "heldout" if int.from_bytes(digest, "big") % 100 < HELDOUT_PERCENT else "train"


@lru_cache
def layouts(kind: str, split: str) -> tuple[tuple[str, ...], ...]:
    """Return every layout of `kind` that `split` owns: tuples of choices in the order of `OPTIONS[kind]`."""
    combinations = itertools.product(*OPTIONS[kind].values())
    return tuple(choice for choice in combinations if split_of(f"layout.{kind}", "/".join(choice)) == split)
