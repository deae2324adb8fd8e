"""Captions, questions and answers of the generated world are correct."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convllava.synthetic import (
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
    position_of,
    union,
)
from convllava.synthetic.canvas import PageFullError
from convllava.synthetic.questions import TEMPLATES, Draft, plural
from convllava.synthetic.splits import SPLITS
from convllava.synthetic.style import Context
from convllava.synthetic.world import KINDS

CLOSED = frozenset(closed_vocabulary())


def parsed(turn: Turn) -> tuple[str, dict[str, str]]:
    """Return the key and the placeholders of a question, found by trying every wording of its task."""
    for key, template in ((key, template) for key, all_of in TEMPLATES.items() for template in all_of):
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(template))
        match = re.fullmatch(pattern, turn.question)
        if match and key.split(".")[0] == turn.task and is_sensible(match.groupdict()):
            return key, match.groupdict()
    raise AssertionError(f"no template gives {turn.question!r}")


def is_sensible(blanks: dict[str, str]) -> bool:
    known = {"colour": COLOURS, "shape": SHAPES, "shapes": tuple(map(plural, SHAPES)), "position": POSITIONS}
    # "the word X" has a box too, but it is not a thing.
    word = blanks.get("thing", "").startswith("word ")
    return not word and all(value in known.get(name, (value,)) for name, value in blanks.items())


@pytest.mark.parametrize("simple", [False, True])
def test_scene_answers_agree_with_its_things(simple: bool) -> None:
    world = World(size=256, kinds={"scene": 1}, simple=simple, turns=50)
    tasks: Counter[str] = Counter()
    for sample in map(world.sample, range(60)):
        for turn in sample.turns:
            key, blanks = parsed(turn)
            tasks[key] += 1
            assert turn.answer == scene_answer(sample, key, blanks), turn
    assert len(tasks) == 10


def scene_answer(sample: Sample, key: str, blanks: dict[str, str]) -> str:
    """Compute the answer from the things; AssertionError if there is not exactly one."""
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


def test_scene_caption_names_every_thing(samples: list[Sample]) -> None:
    scenes = [sample for sample in samples if sample.kind == "scene"]
    assert len(scenes) > 20
    for sample in scenes:
        named = re.findall(r"an? (\w+) (\w+) at the ([a-z ]+)[,.]", sample.caption)
        drawn = [(t.colour, t.shape, position_of(t.box, *sample.image.size)) for t in sample.things]
        assert named == drawn
        assert sample.caption.startswith(f"{len(drawn)} object")


def test_read_answers_are_printed_on_the_page(samples: list[Sample]) -> None:
    checked = 0
    for sample in samples:
        printed = "".join(glyph.char for glyph in sample.glyphs)
        for turn in sample.turns:
            if turn.task in ("read", "field", "table"):
                assert turn.answer.replace(" ", "") in printed, (sample.caption, turn)
                checked += 1
    assert checked > 1000


def test_chart_answers_agree_with_the_caption(samples: list[Sample]) -> None:
    asked: Counter[str] = Counter()
    for sample in samples:
        if not sample.kind.endswith("chart"):
            continue
        values = {label: int(value) for label, value in re.findall(r"(\w+) (\d+)[,.]", sample.caption)}
        extremes = {"highest": max(values.values()), "lowest": min(values.values())}
        for turn in sample.turns:
            key, blanks = parsed(turn)
            asked[key] += 1
            if key == "chart.value":
                assert int(turn.answer) == values[blanks["label"]]
            elif key in ("chart.maximum", "chart.minimum"):
                assert int(turn.answer) == extremes["highest" if key == "chart.maximum" else "lowest"]
            elif key.endswith(("_highest", "_lowest")):
                extreme = extremes[key.rsplit("_")[-1]]
                assert [label for label, value in values.items() if value == extreme] == [turn.answer]
            elif key.startswith("count."):
                assert int(turn.answer) == len(values)
            else:
                assert key == "chart.title"
    assert len(asked) == 10
    assert asked.total() > 200


def test_receipts_add_up(samples: list[Sample]) -> None:
    receipts = [sample for sample in samples if sample.kind == "receipt"]
    assert len(receipts) > 20
    for sample in receipts:
        parts = [part.split(" ") for part in sample.caption.rstrip(".").split(". ")]
        start = next(place for place, part in enumerate(parts) if part[0] == "total")
        prices = [float(part[-1]) for part in parts[:start] if re.fullmatch(r"\d+\.\d\d", part[-1])]
        assert round(sum(prices), 2) == float(parts[start][1])


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


@pytest.mark.parametrize(("share", "turns"), [(0.25, 12), (0.5, 6)])
def test_the_share_of_boxes_is_kept_if_a_page_has_more_questions_than_turns(share: float, turns: int) -> None:
    world = World(seed=1, size=320, kinds={"paragraph": 1}, turns=turns, grounding=share)
    counts = Counter(turn.task for index in range(60) for turn in world.sample(index).turns)
    assert abs(counts["ground"] / counts.total() - share) < 0.05


def test_turns_are_limited_and_distinct() -> None:
    for sample in map(World(size=256, turns=3).sample, range(40)):
        assert 1 <= len(sample.turns) <= 3
        assert len({turn.question for turn in sample.turns}) == len(sample.turns)
    assert World(size=256, turns=0).sample(0).turns == ()


def test_questions_use_closed_words_and_printed_words(samples: list[Sample]) -> None:
    for sample in samples:
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


def test_grounded_words_have_the_box_of_their_glyphs(samples: list[Sample]) -> None:
    checked = 0
    for sample in samples:
        printed = "".join(glyph.char for glyph in sample.glyphs)
        for turn in sample.turns:
            if turn.task == "ground" and sample.kind in ("sign", "paragraph"):
                word = parsed(turn)[1]["word"]
                starts = [match.start() for match in re.finditer(re.escape(word), printed)]
                boxes = [glyphs_box(sample, start, start + len(word)) for start in starts]
                assert any(near(turn.answer, box_text(box, *sample.image.size)) for box in boxes)
                checked += 1
    assert checked > 20


def glyphs_box(sample: Sample, start: int, stop: int) -> Box:
    return union(glyph.box for glyph in sample.glyphs[start:stop])


def near(first: str, second: str) -> bool:
    """Return whether two boxes agree, except for a comma or bracket of the printed word."""
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


def test_evidence_marks_counted_things_and_values(samples: list[Sample]) -> None:
    seen = set()
    for sample in samples:
        letters = {glyph.box: glyph.char for glyph in sample.glyphs}
        for turn in sample.turns:
            key, blanks = parsed(turn)
            if turn.task != "count":
                assert bool(turn.evidence) == (key in ("chart.value", "chart.maximum", "chart.minimum"))
                continue
            seen.add(key)
            assert len(set(turn.evidence)) == int(turn.answer)
            if key == "count.words":
                words = sample.caption.removeprefix("sign: ").split()
                assert [letters[box] for box in turn.evidence] == [word[0] for word in words]
            elif key == "count.lines":
                lines = sample.caption.removeprefix("paragraph: ").split(" / ")
                assert [letters[box] for box in turn.evidence] == [line[0] for line in lines]
            elif key == "count.rows":
                assert set(turn.evidence) <= set(letters)
                assert turn.evidence == tuple(sorted(turn.evidence, key=lambda box: box[1]))
            else:
                named = [thing for thing in sample.things if is_counted(thing, blanks)]
                assert {thing.box for thing in named} == set(turn.evidence)
    assert {key for key in TEMPLATES if key.startswith("count.")} == seen


def is_counted(thing: Thing, blanks: dict[str, str]) -> bool:
    return blanks.get("shapes", plural(thing.shape)) == plural(thing.shape) and (
        blanks.get("colour", thing.colour) == thing.colour
    )


def test_box_text_of_the_whole_picture() -> None:
    assert box_text((0, -3, 640, 490), 640, 480) == "[0.00, 0.00, 0.99, 0.99]"
    assert box_text((64, 96, 320, 240), 640, 480) == "[0.10, 0.20, 0.50, 0.50]"
