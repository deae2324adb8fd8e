"""The generated world: reproducible samples, separate splits, and errors for impossible settings."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import convllava
from convllava.errors import InputError
from convllava.synthetic import Sample, World, closed_vocabulary
from convllava.synthetic.fonts import _system, typefaces
from convllava.synthetic.splits import OPTIONS, SPLITS, layouts, split_of
from convllava.synthetic.words import ROLES

CLOSED = frozenset(closed_vocabulary())


def content(sample: Sample) -> tuple[Any, ...]:
    return sample.index, sample.image.tobytes(), sample.caption, sample.turns, sample.glyphs


def test_a_sample_depends_only_on_its_index() -> None:
    forwards, backwards = World(size=256), World(size=256)
    first = [content(forwards.sample(index)) for index in range(12)]
    second = [content(backwards.sample(index)) for index in reversed(range(12))]
    assert first == second[::-1]


def test_iteration_yields_all_samples_in_order() -> None:
    world = convllava.World(size=256, seed=3)
    for _ in range(2):  # each iteration starts again
        found = [content(sample) for sample in itertools.islice(world, 4)]
        assert found == [content(world.sample(index)) for index in range(4)]


def test_a_sample_is_the_same_in_another_process() -> None:
    # If the program is called convllava, the package does not import transformers, which saves seconds.
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
def test_both_splits_have_layouts_and_train_has_every_choice(kind: str) -> None:
    seen = [set(itertools.chain(*layouts(kind, "train"))), set(itertools.chain(*layouts(kind, "heldout")))]
    assert seen[0] == set(itertools.chain(*OPTIONS[kind].values()))
    assert len(layouts(kind, "heldout")) >= 2


def test_the_closed_vocabulary_has_no_open_word() -> None:
    assert sorted(CLOSED) == list(closed_vocabulary())
    everyday = {word.lower() for words in ROLES.values() for word in words}
    drawn = {split_of("word", word) for word in everyday - CLOSED}
    assert drawn == set(SPLITS)
    assert len(everyday & CLOSED) < 0.03 * len(everyday)
    assert not {"coffee", "emma", "london", "river"} & CLOSED


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"split": "test"}, "`split` is 'test'"),
        ({"size": 100}, "too small"),
        ({"kinds": {"poem": 1}}, "'poem'; choose from scene"),
        ({"kinds": {"reciept": 1}}, "did you mean receipt"),
        ({"kinds": {"table": 1}, "simple": True}, "'table'"),
        ({"kinds": {}}, "shares"),
        ({"kinds": {"sign": -1}}, "shares"),
        ({"turns": -1}, "`turns` is -1"),
        ({"min_brightness": 0.0}, "`min_brightness` is 0.0"),
    ],
)
def test_impossible_settings_are_rejected_by_name(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        World(**settings)


def test_missing_fonts_name_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    typefaces.cache_clear()
    with pytest.raises(InputError, match=r"convllava\[synthetic\]"):
        World().sample(0)
    typefaces.cache_clear()


def test_system_copies_of_packaged_fonts_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(typefaces("heldout")[0].regular).parent
    monkeypatch.setattr("convllava.synthetic.fonts.SYSTEM_FOLDERS", (str(folder),))
    _system.cache_clear()
    assert _system() == ()
    _system.cache_clear()
