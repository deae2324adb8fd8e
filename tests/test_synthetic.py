"""The generated world: it repeats itself, keeps its splits apart, and tells the truth about its pictures."""

from __future__ import annotations

import importlib.util
import itertools
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageStat

from convllava.errors import InputError
from convllava.synthetic import (
    CHARACTERS,
    COLOURS,
    POSITIONS,
    SHAPES,
    TASKS,
    Box,
    Sample,
    Thing,
    Turn,
    World,
    box_text,
    closed_vocabulary,
)
from convllava.synthetic import world as world_module
from convllava.synthetic.canvas import Canvas, PageFullError
from convllava.synthetic.context import Context
from convllava.synthetic.degrade import rotate
from convllava.synthetic.fonts import _system, typefaces
from convllava.synthetic.questions import TEMPLATES, Draft, plural
from convllava.synthetic.sample import position_of, union
from convllava.synthetic.splits import OPTIONS, layouts, split_of
from convllava.synthetic.words import ROLES
from convllava.synthetic.world import KINDS

SPLITS = ("train", "heldout")
CLOSED = frozenset(closed_vocabulary())


@pytest.fixture(scope="module")
def samples() -> dict[str, list[Sample]]:
    """Some hundred small samples of each split, with every question that the sample can ask."""
    worlds = {split: World(split=split, seed=3, size=256, turns=50) for split in SPLITS}
    return {split: [world.sample(index) for index in range(160)] for split, world in worlds.items()}


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages as printed: no rotation, no noise."""
    monkeypatch.setattr(world_module, "degrade", lambda *_: None)


def everything(samples: dict[str, list[Sample]]) -> list[Sample]:
    return [sample for split in SPLITS for sample in samples[split]]


def understood(turn: Turn) -> tuple[str, dict[str, str]]:
    """The key and the blanks of a question, found by trying every wording of its task."""
    for key, template in ((key, template) for key, all_of in TEMPLATES.items() for template in all_of):
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(template))
        match = re.fullmatch(pattern, turn.question)
        if match and key.split(".")[0] == turn.task and is_sensible(match.groupdict()):
            return key, match.groupdict()
    raise AssertionError(f"nobody asks {turn.question!r}")


def is_sensible(blanks: dict[str, str]) -> bool:
    known = {"colour": COLOURS, "shape": SHAPES, "shapes": tuple(map(plural, SHAPES)), "position": POSITIONS}
    # "the word X" is something to ground too, but not a thing.
    word = blanks.get("thing", "").startswith("word ")
    return not word and all(value in known.get(name, (value,)) for name, value in blanks.items())


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


def test_splits_share_no_open_word(samples: dict[str, list[Sample]]) -> None:
    for split in SPLITS:
        tokens = {token for sample in samples[split] for token in sample.caption.split()}
        words = {token.strip(".,:;()").removesuffix("'s").lower() for token in tokens}
        opened = {word for word in words if word.isalpha() and len(word) > 1} - CLOSED
        assert len(opened) > 100
        assert {split_of("word", word) for word in opened} == {split}


@pytest.mark.parametrize("part", ["fonts", "layout"])
def test_splits_share_no_font_and_no_layout(samples: dict[str, list[Sample]], part: str) -> None:
    train, heldout = (
        {(sample.kind, choice) for sample in samples[split] for choice in [getattr(sample, part)] if choice}
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


@pytest.mark.parametrize("simple", [False, True])
def test_scene_answers_agree_with_its_things(simple: bool) -> None:
    world = World(size=256, kinds={"scene": 1}, simple=simple, turns=50)
    tasks: Counter[str] = Counter()
    for sample in map(world.sample, range(60)):
        for turn in sample.turns:
            key, blanks = understood(turn)
            tasks[key] += 1
            assert turn.answer == scene_answer(sample, key, blanks), turn
    assert len(tasks) == 10


def scene_answer(sample: Sample, key: str, blanks: dict[str, str]) -> str:
    """The answer worked out from the things alone; AssertionError when there is not exactly one."""
    width, height = sample.image.size
    if key.startswith("count"):
        wanted = blanks.get("colour"), blanks.get("shapes")
        traits = [(thing.colour, plural(thing.shape)) for thing in sample.things]
        return str(sum(all(a in (None, b) for a, b in zip(wanted, own, strict=True)) for own in traits))
    [thing] = [thing for thing in sample.things if matches(thing, blanks, sample)]
    task = key.split(".")[0]
    if task == "ground":
        return box_text(thing.box, width, height)
    return position_of(thing.box, width, height) if task == "position" else str(getattr(thing, task))


def matches(thing: Thing, blanks: dict[str, str], sample: Sample) -> bool:
    *colour, shape = blanks.get("thing", blanks.get("shape", thing.shape)).split(" ")
    place = position_of(thing.box, *sample.image.size)
    return (
        thing.shape == shape
        and thing.colour in (colour or [blanks.get("colour", thing.colour)])
        and place == blanks.get("position", place)
    )


def test_scene_caption_names_every_thing(samples: dict[str, list[Sample]]) -> None:
    scenes = [sample for sample in everything(samples) if sample.kind == "scene"]
    for sample in scenes:
        told = re.findall(r"an? (\w+) (\w+) at the ([a-z ]+)[,.]", sample.caption)
        drawn = [(t.colour, t.shape, position_of(t.box, *sample.image.size)) for t in sample.things]
        assert told == drawn
        assert sample.caption.startswith(f"{len(drawn)} object")


def test_answers_to_read_are_printed(samples: dict[str, list[Sample]]) -> None:
    checked = 0
    for sample in everything(samples):
        printed = "".join(glyph.char for glyph in sample.glyphs)
        for turn in sample.turns:
            if turn.task in ("read", "field", "table"):
                assert turn.answer.replace(" ", "") in printed, (sample.caption, turn)
                checked += 1
    assert checked > 1000


def test_chart_answers_agree_with_the_caption(samples: dict[str, list[Sample]]) -> None:
    checked = 0
    for sample in everything(samples):
        if not sample.kind.endswith("chart"):
            continue
        values = {label: int(value) for label, value in re.findall(r"(\w+) (\d+)[,.]", sample.caption)}
        extremes = {"highest": max(values.values()), "lowest": min(values.values())}
        for turn in sample.turns:
            key, blanks = understood(turn)
            checked += 1
            if key == "chart.value":
                assert int(turn.answer) == values[blanks["label"]]
            elif key in ("chart.maximum", "chart.minimum"):
                assert int(turn.answer) == extremes["highest" if key == "chart.maximum" else "lowest"]
            elif key.endswith(("_highest", "_lowest")):
                extreme = extremes[key.rsplit("_")[-1]]
                assert [label for label, value in values.items() if value == extreme] == [turn.answer]
    assert checked > 200


def test_bars_are_as_long_as_their_values(untouched: None) -> None:
    world = World(size=384, kinds={"bar_chart": 1}, seed=2)
    for sample in map(world.sample, range(30)):
        values = [int(value) for _, value in re.findall(r"(\w+) (\d+)[,.]", sample.caption)]
        side = 2 if sample.layout[0] == "horizontal" else 3
        lengths = [bar.box[side] - bar.box[side - 2] for bar in sample.things]
        rates = [length / value for length, value in zip(lengths, values, strict=True) if value > 20]
        assert len(lengths) == len(values)
        assert not rates or max(rates) - min(rates) < 0.1 * max(rates)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_no_question_has_two_answers(kind: str, split: str) -> None:
    for seed in range(15):
        answers: dict[str, object] = {}
        for draft in drafts(kind, split, seed):
            assert answers.setdefault(draft.question, draft.answer) == draft.answer


def drafts(kind: str, split: str, seed: int) -> list[Draft]:
    rng = random.Random(seed)
    while True:
        try:
            return KINDS[kind](Context(rng, split, 256)).drafts
        except PageFullError:
            continue


def test_every_task_occurs_in_both_splits() -> None:
    for split in SPLITS:
        world = World(split, seed=1, size=256)
        counts = Counter(turn.task for index in range(120) for turn in world.sample(index).turns)
        assert set(counts) == set(TASKS)
        assert 0.05 < counts["ground"] / counts.total() < 0.15


def test_turns_are_limited_and_differ() -> None:
    for sample in map(World(size=256, turns=3).sample, range(40)):
        assert 1 <= len(sample.turns) <= 3
        assert len({turn.question for turn in sample.turns}) == len(sample.turns)
    assert World(size=256, turns=0).sample(0).turns == ()


def test_boxes_lie_inside_the_picture(samples: dict[str, list[Sample]]) -> None:
    for sample in everything(samples):
        for x0, y0, x1, y1 in [glyph.box for glyph in sample.glyphs] + [thing.box for thing in sample.things]:
            assert 0 <= x0 < x1 <= sample.image.width
            assert 0 <= y0 < y1 <= sample.image.height


def test_pictures_have_many_shapes_and_the_right_area() -> None:
    sizes = {sample.image.size for sample in map(World(size=512).sample, range(60))}
    ratios = [height / width for width, height in sizes]
    assert min(ratios) < 0.7
    assert max(ratios) > 1.8
    assert len(sizes) > 10
    for width, height in sizes:
        assert width % 64 == height % 64 == 0
        assert 0.8 < width * height / 512**2 < 1.25


def test_characters_are_all_printable_and_printed() -> None:
    printed = {glyph.char for index in range(12) for glyph in World().glyph_sheet(index).glyphs}
    assert printed == set(CHARACTERS)


def test_dark_pages_are_the_same_pages_with_less_light() -> None:
    bright, dark = World(seed=5), World(seed=5, darkest=0.3)
    pairs = [(bright.sample(index), dark.sample(index)) for index in range(40)]
    light = [
        ImageStat.Stat(b.image.convert("L")).mean[0] / ImageStat.Stat(a.image.convert("L")).mean[0] for a, b in pairs
    ]
    assert all(a.glyphs == b.glyphs and a.caption == b.caption for a, b in pairs)
    assert 5 <= sum(share < 0.9 for share in light) <= 20
    assert min(light) > 0.25


def test_glyph_boxes_hold_ink(untouched: None) -> None:
    kinds = ("sign", "paragraph", "receipt", "form", "table")
    pages = [World(size=256, kinds={kind: 1}).sample(index) for kind in kinds for index in range(6)]
    pages += [World(size=256).glyph_sheet(index) for index in range(3)]
    for page in pages:
        grey = page.image.convert("L")
        for glyph in page.glyphs:
            x0, y0, x1, y1 = map(int, glyph.box)
            levels = grey.crop((x0 - 1, y0 - 1, x1 + 1, y1 + 1)).tobytes()
            assert max(levels) - min(levels) > 50, (page.kind, glyph)


def test_glyphs_of_a_page_do_not_overlap(untouched: None) -> None:
    for sample in map(World(size=256, seed=8).sample, range(60)):
        for (place, first), (other, second) in itertools.combinations(enumerate(sample.glyphs), 2):
            # Neighbours in a word may, as "fl" does.
            assert other == place + 1 or overlap(first.box, second.box) < 0.1, (sample.kind, first, second)


def overlap(first: Box, second: Box) -> float:
    """The shared area of two boxes as a fraction of the smaller."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return max(width, 0) * max(height, 0) / min(areas)


def test_grounded_words_have_the_box_of_their_glyphs(samples: dict[str, list[Sample]]) -> None:
    checked = 0
    for sample in everything(samples):
        printed = "".join(glyph.char for glyph in sample.glyphs)
        for turn in sample.turns:
            if turn.task == "ground" and sample.kind in ("sign", "paragraph"):
                word = understood(turn)[1]["word"]
                starts = [match.start() for match in re.finditer(re.escape(word), printed)]
                boxes = [glyphs_box(sample, start, start + len(word)) for start in starts]
                assert any(near(turn.answer, box_text(box, *sample.image.size)) for box in boxes)
                checked += 1
    assert checked > 20


def glyphs_box(sample: Sample, start: int, stop: int) -> Box:
    return union(glyph.box for glyph in sample.glyphs[start:stop])


def near(first: str, second: str) -> bool:
    """Whether two boxes agree, but for a comma or bracket that belongs to the printed word."""
    return all(abs(a - b) < 0.04 for a, b in zip(numbers(first), numbers(second), strict=True))


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.strip("[]").split(", ")]


unit = st.floats(0, 1)


@given(unit, unit, unit, unit, st.integers(64, 4096), st.integers(64, 4096))
def test_box_text_round_trips(a: float, b: float, c: float, d: float, width: int, height: int) -> None:
    shares = (min(a, c), min(b, d), max(a, c), max(b, d))
    sides = (width, height, width, height)
    x0, y0, x1, y1 = (share * side for share, side in zip(shares, sides, strict=True))
    text = box_text((x0, y0, x1, y1), width, height)
    assert re.fullmatch(r"\[0\.\d\d, 0\.\d\d, 0\.\d\d, 0\.\d\d\]", text)
    assert all(abs(number - share) <= 0.0101 for number, share in zip(numbers(text), shares, strict=True))


def test_box_text_of_the_whole_picture() -> None:
    assert box_text((0, -3, 640, 490), 640, 480) == "[0.00, 0.00, 0.99, 0.99]"
    assert box_text((64, 96, 320, 240), 640, 480) == "[0.10, 0.20, 0.50, 0.50]"


@pytest.mark.parametrize("degrees", [-3.0, 2.5])
def test_boxes_follow_a_rotation(degrees: float) -> None:
    canvas = Canvas(320, 256, (255, 255, 255))
    canvas.shape("circle", "red", (255, 0, 0), (240, 30, 280, 70))
    rotate(canvas, degrees)
    seen = ImageChops.invert(canvas.image.getchannel("G")).point([0] * 128 + [255] * 128).getbbox()
    assert seen is not None
    assert seen != (240, 30, 280, 70)
    assert all(abs(a - b) < 2 for a, b in zip(seen, canvas.things[0].box, strict=True))


def test_sheets_are_dense_and_varied() -> None:
    for split in SPLITS:
        sheet = World(split=split, size=384).glyph_sheet(4)
        boxes = [glyph.box for glyph in sheet.glyphs] + [thing.box for thing in sheet.things]
        cells = {(int(box[0]) // 64, int(box[1]) // 64) for box in boxes}
        assert len(cells) > 0.8 * sheet.image.width * sheet.image.height / 64**2
        assert len(sheet.fonts) >= 2
        assert sheet.turns == ()
        assert {glyph.char.isupper() for glyph in sheet.glyphs} == {True, False}


def test_closed_vocabulary_holds_no_open_word() -> None:
    assert sorted(CLOSED) == list(closed_vocabulary())
    everyday = {word.lower() for words in ROLES.values() for word in words}
    drawn = {split_of("word", word) for word in everyday - CLOSED}
    assert drawn == set(SPLITS)
    assert len(everyday & CLOSED) < 0.03 * len(everyday)
    assert not {"coffee", "emma", "london", "river"} & CLOSED


def test_questions_use_closed_words_and_what_is_printed(samples: dict[str, list[Sample]]) -> None:
    for sample in everything(samples):
        printed = "".join(glyph.char for glyph in sample.glyphs).lower()
        for turn in sample.turns:
            words = re.findall(r"[a-z']+", turn.question.lower())
            assert all(word in CLOSED or word in printed for word in words), turn


def test_simple_world_has_its_three_kinds_and_tasks() -> None:
    found = [World(size=192, simple=True).sample(index) for index in range(80)]
    assert {sample.kind for sample in found} == {"scene", "receipt", "bar_chart"}
    assert {turn.task for sample in found for turn in sample.turns} == set(TASKS) - {"table"}
    tickets = [sample.caption for sample in found if sample.kind == "receipt"]
    for caption in tickets:
        first, second, total = map(float, re.findall(r"\d\.\d\d", caption))
        assert round(first + second, 2) == total


def test_receipts_add_up(samples: dict[str, list[Sample]]) -> None:
    for sample in everything(samples):
        if sample.kind == "receipt":
            parts = [part.split(" ") for part in sample.caption.rstrip(".").split(". ")]
            start = next(place for place, part in enumerate(parts) if part[0] == "total")
            prices = [float(part[-1]) for part in parts[:start] if re.fullmatch(r"\d+\.\d\d", part[-1])]
            assert round(sum(prices), 2) == float(parts[start][1])


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


def test_picture_is_rgb(samples: dict[str, list[Sample]]) -> None:
    assert all(isinstance(s.image, Image.Image) and s.image.mode == "RGB" for s in everything(samples))
