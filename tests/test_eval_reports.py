"""Comparisons and plots of results; reading by text height; robustness."""

from __future__ import annotations

import json

import pytest
from conftest import fresh, picture
from PIL import Image
from typer.testing import CliRunner

from convllava import InputError
from convllava.cli import app, with_options
from convllava.evaluation.report import plot_results
from convllava.evaluation.results import Result, compare, read_result
from convllava.evaluation.studies import PERTURBATIONS, SEVERITIES, reworded, robustness, sweep
from convllava.inference import Assistant
from convllava.synthetic import World
from convllava.synthetic.questions import TEMPLATES

MOST_BYTES = 100_000
"""Limit of the size of a picture in docs/."""


def result(folder, scores, **changes):
    """Write a result.json with `scores`; the first half of the questions has one category."""
    units = [
        {"id": str(number), "categories": ["first" if number < len(scores) // 2 else "second"], "score": score}
        for number, score in enumerate(scores)
    ]
    content = {
        "benchmark": "seedbench",
        "primary": "accuracy",
        "score": sum(scores) / len(scores),
        "units": units,
        "model": {"name": "m", "parameters": {"tower": 4_000_000}},
        "efficiency": {"seconds_to_first_token": 0.5, "pixels": 640.0**2},
    }
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(content | changes))
    return folder


def plot(folders, output):
    plot_results({str(folder): read_result(folder) for folder in folders}, output)


def test_result_is_a_mapping_with_the_content_of_its_file(tmp_path):
    read = read_result(result(tmp_path / "a", [0, 1, 1]))
    assert isinstance(read, Result)
    assert read.score == read["score"] == pytest.approx(2 / 3)
    read.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == read.content == dict(read)
    assert dict(read_result(tmp_path / "again.json")) == dict(read)


def test_comparison_pairs_questions_by_category(tmp_path):
    a = result(tmp_path / "a", [0] * 20 + [1] * 20)
    b = result(tmp_path / "b", [1] * 20 + [1] * 19 + [0])
    found = compare(a, b)
    assert found["overall"]["difference"] == pytest.approx(19 / 40)
    assert (found["overall"]["a"], found["overall"]["b"]) == (0.5, 0.975)
    assert found["categories"]["first"] == {"n": 20, "a": 0, "b": 1, "difference": 1, "interval": [1, 1]}
    low, high = found["categories"]["second"]["interval"]
    assert low < 0 <= high
    assert found == compare(a, b)
    swapped = compare(b, a)["overall"]
    assert swapped["difference"] == -found["overall"]["difference"]
    assert swapped["interval"][0] == pytest.approx(-found["overall"]["interval"][1], abs=0.05)


def test_equal_results_have_no_difference(tmp_path):
    a, b = result(tmp_path / "a", [0, 1, 1, 0]), result(tmp_path / "b", [0, 1, 1, 0])
    assert compare(a, b)["overall"]["interval"] == [0, 0]


def test_incomparable_results_are_rejected(tmp_path):
    a = result(tmp_path / "a", [0, 1])
    with pytest.raises(InputError, match="different questions: 1 are in only one of them, such as 2"):
        compare(a, result(tmp_path / "b", [0, 1, 1]))
    with pytest.raises(InputError, match=r"is of seedbench and .* of mme"):
        compare(a, result(tmp_path / "c", [0, 1], benchmark="mme"))
    (tmp_path / "d.json").write_text("{}")
    with pytest.raises(InputError, match=r"d.json lacks 'benchmark'"):
        compare(a, tmp_path / "d.json")
    with pytest.raises(InputError, match="cannot be read"):
        compare(a, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": [{"id": "0"}]}, r"result.json: unit 1 lacks an id, categories or a score"),
        ({"units": {}}, "unit 1 lacks"),
        ({"units": []}, "have no units"),
        ({"score": "high"}, "score must be a number"),
    ],
)
def test_malformed_results_are_rejected(changes, message, tmp_path):
    malformed = result(tmp_path / "a", [0, 1], **changes)
    with pytest.raises(InputError, match=message):
        compare(malformed, malformed)


@pytest.mark.parametrize(
    "changes", [{"model": {"name": "m"}}, {"model": None}, {"efficiency": {"seconds_to_first_token": 1.0}}]
)
def test_plot_rejects_a_result_with_a_missing_value(changes, tmp_path):
    with pytest.raises(InputError, match=r"/a lacks (model|efficiency)\."):
        plot([result(tmp_path / "a", [0, 1], **changes)], tmp_path / "p.png")


@pytest.mark.parametrize("interval", [[0.1], ["low", "high"], 0.5])
def test_plot_rejects_a_malformed_interval(interval, tmp_path):
    efficiency = {"seconds_to_first_token": 1.0, "pixels": 640.0**2}
    with pytest.raises(InputError, match=r"/a has an interval that is not two numbers"):
        plot([result(tmp_path / "a", [0, 1], efficiency=efficiency, interval=interval)], tmp_path / "p.png")


def test_deeply_nested_result_is_rejected(tmp_path):
    (tmp_path / "deep.json").write_text('{"a":' * 100_000)
    with pytest.raises(InputError, match=r"deep.json cannot be read"):
        compare(tmp_path / "deep.json", tmp_path / "deep.json")


def test_results_are_plotted_against_the_time_to_the_first_token(tmp_path):
    folders = [
        result(tmp_path / str(n), [0, 1], efficiency={"seconds_to_first_token": 2.0**n, "pixels": 640.0**2})
        for n in range(3)
    ]
    arguments = ["eval", "plot", *map(str, folders), "--output", str(tmp_path / "p.png")]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    assert Image.open(tmp_path / "p.png").width > 500
    assert (tmp_path / "p.png").stat().st_size < MOST_BYTES
    with pytest.raises(InputError, match="no time to the first token"):
        plot([result(tmp_path / "x", [0, 1], efficiency=None)], tmp_path / "q.png")
    with pytest.raises(InputError, match="plot one benchmark at a time"):
        plot([folders[0], result(tmp_path / "y", [0, 1], benchmark="mme")], tmp_path / "q.png")
    assert not (tmp_path / "q.png").exists()
    with pytest.raises(InputError, match="cannot be written"):
        plot(folders, tmp_path / "nowhere" / "q.png")


@pytest.mark.parametrize("kind", PERTURBATIONS, ids=lambda kind: kind.kind)
def test_every_severity_changes_the_input_differently(kind):
    image, question = picture(96, 128), "What is the colour of the star?"
    seen = {(image.tobytes(), image.size, question)}
    for severity in SEVERITIES:
        changed = kind.page(image, severity)
        assert changed.mode == "RGB"
        seen.add((changed.tobytes(), changed.size, kind.question(question, severity)))
    assert len(seen) == len(SEVERITIES) + 1


def test_aspect_ratio_perturbation_keeps_the_area():
    (aspect,) = (kind for kind in PERTURBATIONS if kind.kind == "aspect ratio")
    changed = aspect.page(picture(200, 200), 4)
    assert changed.width / changed.height == pytest.approx(2, abs=0.05)
    assert changed.width * changed.height == pytest.approx(200 * 200, rel=0.02)


def test_reworded_questions_do_not_occur_in_training():
    asked = {wording for wordings in TEMPLATES.values() for wording in wordings}
    changed = [reworded(wording) for wording in asked]
    assert not asked & {new for new, old in zip(changed, asked, strict=True) if new != old}
    assert sum(new != old for new, old in zip(changed, asked, strict=True)) > len(asked) / 2


class Reader:
    """A model stub with the right answers; `calls` counts the images that it encodes."""

    def __init__(self, parts, world, samples) -> None:
        self.inner = Assistant(*parts)
        self.model, self.processor = self.inner.model, self.inner.processor
        pages = [world.sample(index) for index in range(samples)]
        self.known = {turn.question: turn.answer for page in pages for turn in page.turns}
        self.calls = 0

    def encode(self, image):
        self.calls += 1
        return self.inner.encode(image)

    def answer_many(self, questions, batch_size):
        yield [self.known.get(question, "none") for _, question in questions]


def test_sweep_groups_answers_by_text_height_in_the_tower(parts, tmp_path, monkeypatch):
    monkeypatch.setattr("convllava.evaluation.studies.FEWEST", 1)
    world = World("heldout", seed=3, size=256, kinds={"sign": 1})
    reader = Reader(parts, world, 6)
    report = sweep(reader, world, 6, [128, 256], tmp_path)  # type: ignore[arg-type]
    assert [row["side"] for row in report["resolutions"]] == [128, 256]
    assert all(row["accuracy"] > 0.5 for row in report["resolutions"])
    middles = {
        side: sum(row["n"] * row["height"] for row in report["rows"] if row["side"] == side)
        / sum(row["n"] for row in report["rows"] if row["side"] == side)
        for side in (128, 256)
    }
    assert middles[256] == pytest.approx(2 * middles[128], rel=0.25)
    assert json.loads((tmp_path / "sweep.json").read_text()) == json.loads(json.dumps(report))
    assert (tmp_path / "sweep.png").stat().st_size < MOST_BYTES
    calls = reader.calls
    assert sweep(reader, world, 6, [128, 256], tmp_path)["rows"] == report["rows"]  # type: ignore[arg-type]
    assert reader.calls == calls
    with pytest.raises(InputError, match="weights was "):
        sweep(Reader(fresh(), world, 6), world, 6, [128], tmp_path)  # type: ignore[arg-type]


def test_robustness_uses_the_same_questions_at_every_severity(parts, tmp_path):
    world = World("heldout", seed=3, size=192, simple=True)
    reader = Reader(parts, world, 2)
    report = robustness(reader, world, 2, tmp_path)  # type: ignore[arg-type]
    assert report["clean"]["accuracy"] == 1
    assert len(report["rows"]) == len(PERTURBATIONS) * len(SEVERITIES)
    for row in report["rows"]:
        assert row["n"] == report["clean"]["n"]
        assert row["lost"] == pytest.approx(1 - row["accuracy"])
    assert all(row["accuracy"] == 1 for row in report["rows"] if row["kind"] != "question")
    assert all(row["accuracy"] == 0 for row in report["rows"] if row["kind"] == "question" and row["severity"] == 2)
    assert (tmp_path / "robustness.png").stat().st_size < MOST_BYTES
    calls = reader.calls
    robustness(reader, world, 2, tmp_path)  # type: ignore[arg-type]
    assert reader.calls == calls
    with pytest.raises(InputError, match="weights was "):
        robustness(Reader(fresh(), world, 2), world, 2, tmp_path)  # type: ignore[arg-type]


def test_options_before_a_subcommand_are_rejected():
    finished = CliRunner().invoke(app, ["eval", "--model", "runs/x", "sweep", "--output", "y"])
    assert finished.exit_code == 2
    assert "unexpected extra argument" in finished.output


@pytest.mark.parametrize("words", [["eval"], ["eval", "run"]])
def test_run_is_the_default_subcommand(words):
    with pytest.raises(InputError, match="there is no model 'nonexistent'"):
        CliRunner().invoke(app, [*words, "--model", "nonexistent", "--samples", "2"], catch_exceptions=False)


@pytest.mark.parametrize("words", [["eval"], ["eval", "run"]])
def test_messages_name_the_options_of_the_default_subcommand(words):
    message = "`data` is missing; `samples` and `categories` are given"
    assert with_options(message, app, [*words, "--seed", "1"]) == (
        "--data is missing; --samples and --category are given"
    )


def test_sweep_and_robustness_commands_write_json_and_a_picture(parts, tmp_path, monkeypatch):
    world = World("heldout", seed=3, size=256)
    monkeypatch.setattr("convllava.evaluation.runner.load", lambda model, pixels: Reader(parts, world, 2))
    common = ["--samples", "2", "--seed", "3", "--size", "256"]
    for name, more in (("sweep", ["--sides", "128"]), ("robustness", [])):
        arguments = ["eval", name, *more, "--output", str(tmp_path / name), *common]
        found = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
        assert found == json.loads((tmp_path / name / f"{name}.json").read_text())
        assert (tmp_path / name / f"{name}.png").exists()
    printed = CliRunner().invoke(
        app, ["eval", "sweep", "--sides", "128", "--output", str(tmp_path / "sweep"), *common], catch_exceptions=False
    )
    assert "accuracy" in printed.stdout
    arguments = ["eval", "sweep", "--sides", "100", "--output", str(tmp_path / "t")]
    with pytest.raises(InputError, match="--sides 100"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
