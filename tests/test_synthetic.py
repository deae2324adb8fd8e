"""The generated world: it repeats itself, keeps its splits apart, and says what it cannot do."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import ImageChops

from convllava.errors import InputError
from convllava.synthetic import Sample, World, closed_vocabulary
from convllava.synthetic.fonts import _system, typefaces
from convllava.synthetic.splits import OPTIONS, SPLITS, layouts, split_of
from convllava.synthetic.words import ROLES

CLOSED = frozenset(closed_vocabulary())


def same(first: Sample, second: Sample) -> bool:
    pictures = ImageChops.difference(first.image, second.image).getbbox() is None
    return pictures and (first.caption, first.turns, first.glyphs) == (
        second.caption,
        second.turns,
        second.glyphs,
    )


def test_sample_depends_on_its_index_alone() -> None:
    forwards, backwards = World(size=256), World(size=256)
    first = [forwards.sample(index) for index in range(12)]
    second = [backwards.sample(index) for index in reversed(range(12))]
    assert all(same(a, b) for a, b in zip(first, reversed(second), strict=True))


def test_sample_is_the_same_in_another_process() -> None:
    # Under the name of the command line the package leaves transformers aside, which saves seconds.
    script = (
        "import sys, zlib; sys.argv[0] = 'convllava'\n"
        "from convllava.synthetic import World\n"
        "for sample in map(World(size=256).sample, (9, 2)):\n"
        "    print(zlib.crc32(sample.image.tobytes()), sample.caption, sample.turns, sep='|')"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1]
    assert len(runs[0].splitlines()) == 2


@pytest.mark.parametrize("other", [{"seed": 1}, {"split": "heldout"}, {"simple": True}])
def test_settings_change_the_samples(other: dict[str, Any]) -> None:
    one, another = World(size=256), World(**{"size": 256, **other})
    assert not any(one.sample(index).caption == another.sample(index).caption for index in range(5))


def test_splits_share_no_open_word(samples_by_split: dict[str, list[Sample]]) -> None:
    for split in SPLITS:
        tokens = {token for sample in samples_by_split[split] for token in sample.caption.split()}
        words = {token.strip(".,:;()").removesuffix("'s").lower() for token in tokens}
        opened = {word for word in words if word.isalpha() and len(word) > 1} - CLOSED
        assert len(opened) > 100
        assert {split_of("word", word) for word in opened} == {split}


@pytest.mark.parametrize("part", ["fonts", "layout"])
def test_splits_share_no_font_and_no_layout(samples_by_split: dict[str, list[Sample]], part: str) -> None:
    train, heldout = (
        {(sample.kind, choice) for sample in samples_by_split[split] for choice in [getattr(sample, part)] if choice}
        for split in SPLITS
    )
    families = ({name for _, names in side for name in names} for side in (train, heldout))
    assert train
    assert heldout
    assert not train & heldout
    assert part == "layout" or not set.intersection(*families)


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_choice_of_layout_can_be_trained_and_tested(kind: str) -> None:
    seen = [set(itertools.chain(*layouts(kind, "train"))), set(itertools.chain(*layouts(kind, "heldout")))]
    assert seen[0] == set(itertools.chain(*OPTIONS[kind].values()))
    assert len(layouts(kind, "heldout")) >= 2


def test_closed_vocabulary_holds_no_open_word() -> None:
    assert sorted(CLOSED) == list(closed_vocabulary())
    everyday = {word.lower() for words in ROLES.values() for word in words}
    drawn = {split_of("word", word) for word in everyday - CLOSED}
    assert drawn == set(SPLITS)
    assert len(everyday & CLOSED) < 0.03 * len(everyday)
    assert not {"coffee", "emma", "london", "river"} & CLOSED


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"split": "test"}, "split is 'test'"),
        ({"size": 100}, "too small"),
        ({"kinds": {"poem": 1}}, "'poem'"),
        ({"kinds": {"table": 1}, "simple": True}, "'table'"),
        ({"kinds": {}}, "shares"),
        ({"kinds": {"sign": -1}}, "shares"),
        ({"turns": -1}, "turns is -1"),
        ({"darkest": 0.0}, "darkest is 0.0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        World(**settings)


def test_missing_fonts_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    typefaces.cache_clear()
    with pytest.raises(InputError, match=r"convllava\[synthetic\]"):
        World().sample(0)
    typefaces.cache_clear()


def test_system_copies_of_packaged_fonts_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(typefaces("heldout")[0].regular).parent
    monkeypatch.setattr("convllava.synthetic.fonts.SYSTEM_FOLDERS", (str(folder),))
    _system.cache_clear()
    assert _system() == ()
    _system.cache_clear()
