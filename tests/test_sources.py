"""Files of conversations: their content, the order of the samples, and the treatment of bad samples."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import fresh, picture
from training_runs import ONE, SMALLEST, TWO, logged, train

from convllava.data.collate import IGNORE, SKIPPED
from convllava.data.dataset import FileDataset, steps_of
from convllava.data.formats import Records, open_records
from convllava.data.mixture import Mixture, MixtureSource
from convllava.data.records import conversation_of
from convllava.errors import InputError
from convllava.training import train as engine
from convllava.training.logging import SkippedSamples
from convllava.training.plan import plan
from convllava.training.recipe import Data, Evaluation, ModelSpec, Recipe, Source, Stage


def record(number: int, image: object = "a.png", human: str = "<image>\nwhat is it?", gpt: str = "red") -> dict:
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    return {"id": f"s{number}", "conversations": turns} | ({} if image is None else {"image": image})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, size in (("a.png", (70, 130)), ("b.png", (64, 64))):
        picture(*size).save(tmp_path / "images" / name)
    return tmp_path


def write(folder: Path, records: list, name: str = "data.json") -> Path:
    path = folder / name
    lines = "\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records)
    path.write_text(lines, encoding="utf-8")
    return path


def dataset(folder: Path, records: list, length: int = 8, **settings: object) -> FileDataset:
    mixture = Mixture([MixtureSource(open_file(write(folder, records)), str(folder / "images"))])
    return FileDataset(mixture, fresh()[1], length, **settings)  # type: ignore[arg-type]


def open_file(path: Path, limit: int | None = None) -> Records:
    return open_records(path.name, [str(path)], limit=limit)


def test_json_and_jsonl_hold_the_same_records(folder):
    records = [record(0), record(1, ["a.png", "b.png"], "<image> and <image>: Größe?"), record(2, None, "hello")]
    for name in ("data.json", "data.jsonl"):
        found = open_file(write(folder, records, name))
        assert [found[index] for index in range(len(found))] == records
        assert len(open_file(folder / name, limit=2)) == 2


def test_images_are_at_their_marks_and_come_first_without_marks():
    images = "images"
    marked = conversation_of(record(0, ["a.png", "b.png"], "this <image> or that <image>?"), 0, images)
    assert marked.messages[0]["content"] == [
        {"type": "text", "text": "this "},
        {"type": "image", "image": "images/a.png"},
        {"type": "text", "text": " or that "},
        {"type": "image", "image": "images/b.png"},
        {"type": "text", "text": "?"},
    ]
    bare = conversation_of(record(0, "a.png", "what?"), 0, images)
    assert [part["type"] for part in bare.messages[0]["content"]] == ["image", "text"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"id": "x"}, "sample x: no conversations"),
        ({"conversations": [{"from": "human", "value": "hi"}]}, "sample 7: turns must alternate"),
        (record(1, gpt=" "), "sample s1: an empty answer"),
        (record(1, ["a.png", "b.png"]), "sample s1: 1 <image> marks for 2 images"),
        (record(1, None), "sample s1: 1 <image> marks for 0 images"),
        ({"conversations": [{"from": "bot", "value": "hi"}]}, "a turn needs from, one of human"),
        ({"conversations": [{"from": ["human"], "value": "hi"}]}, "a turn needs from, one of human"),
        (record(1, 5), "image must be a path or a list"),
        (record(1, [None]), "image must be a path or a list"),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "system", "value": "hi"}]},
            "turns must alternate",
        ),
    ],
)
def test_bad_records_are_named(bad, message):
    with pytest.raises(InputError, match=message):
        conversation_of(bad, 7, "")


@pytest.mark.parametrize("folder", ["images", "/data/images", "memory://images"])
@pytest.mark.parametrize("image", ["/etc/a.png", "../a.png", "b/../../a.png", "/data/images/../a.png"])
def test_images_outside_their_folder_are_not_opened(folder, image):
    with pytest.raises(InputError, match=f"{image} leads out of {folder}; give a path below it without '..', or"):
        conversation_of(record(1, image), 0, folder)


def test_links_in_the_folder_and_absolute_paths_below_it_are_opened(folder):
    (folder / "images" / "link.png").symlink_to(folder / "images" / "a.png")
    (folder / "elsewhere").symlink_to(folder / "images", target_is_directory=True)
    for name in ("link.png", str(folder / "images" / "a.png")):
        dataset(folder, [record(1, name)])[0]
    found = conversation_of(record(1, "elsewhere/a.png"), 0, str(folder))
    assert found.messages[0]["content"][0]["image"] == str(folder / "elsewhere" / "a.png")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", '{"id": 1}\n{"id": \n', "line 2 of .*data.jsonl is not JSON"),
        ("data.json", "{}", "must hold a list of one or more records"),
        ("data.json", "[]", "must hold a list of one or more records"),
        ("data.json", "[1]", "must hold a list of one or more records"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        open_file(tmp_path / name)


def test_every_epoch_has_every_sample_in_another_order(folder):
    records = [record(number, None, f"question {number}", f"answer {number}") for number in range(6)]
    items = dataset(folder, records, length=12)
    ids = [tuple(items[index]["input_ids"].tolist()) for index in range(12)]
    assert sorted(ids[:6]) == sorted(ids[6:])
    assert len(set(ids)) == 6
    assert ids[:6] != ids[6:]
    assert ids == [tuple(items[index]["input_ids"].tolist()) for index in range(12)]
    assert steps_of(6, 2, 4) == 3
    assert steps_of(6, 1, 4) == 2


def test_a_bad_sample_is_replaced_and_reported(folder):
    (folder / "images" / "broken.png").write_bytes((folder / "images" / "a.png").read_bytes()[:200])
    items = dataset(folder, [record(0), record(1, "broken.png"), record(2, "b.png")], length=3)
    found = [items[index] for index in range(3)]
    reported = [skipped for item in found for skipped in item.get(SKIPPED, ())]
    assert {name for name, _ in reported} == {"data.json"}
    (reason,) = {reason for _, reason in reported}
    assert "sample s1" in reason
    assert "broken.png" in reason


def test_a_dataset_without_usable_samples_is_rejected(folder):
    with pytest.raises(InputError, match=r"100 samples in a row cannot be used; the last: data\.json: sample s1"):
        dataset(folder, [record(1, "gone.png")])[0]


def test_long_samples_are_cut_in_their_text_only(folder):
    long = record(0, None, "what?", "red " * 50)
    whole = dataset(folder, [long])[0]
    cut = dataset(folder, [long], max_tokens=20)[0]
    assert cut["input_ids"].tolist() == whole["input_ids"][:20].tolist()
    assert (cut["labels"] != IGNORE).any()
    for records, settings, reason in (
        ([long], {"truncate": False}, "more than 20"),
        ([record(0, "a.png", "hello " * 20 + "<image>", "red")], {}, "would go through an image"),
        ([record(0, None, "hello " * 50)], {}, "the answer begins after 20"),
    ):
        with pytest.raises(InputError, match=reason):
            dataset(folder, records, max_tokens=20, **settings)[0]


def recipe(folder: Path, **data: object) -> Recipe:
    found = Data(sources=[Source("data.json", "images")], **data)  # type: ignore[arg-type]
    stage = Stage("files", None, {"projector": 1e-3}, found, epochs=2, batch_size=2)
    return Recipe("files", [stage], SMALLEST, data_root=str(folder), workers=0)


def test_training_on_files_with_and_without_images_counts_what_it_skips(folder):
    records = [
        record(0),
        record(1, None, "hi"),
        record(2, "gone.png"),
        record(3, ["a.png", "b.png"], "<image><image>?"),
    ]
    write(folder, records)
    output = folder / "run"
    engine.train(recipe(folder, max_skipped=0.5), output)
    assert logged(output, "step") == [1, 2, 3, 4]
    skipped = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["file"]) for line in skipped] == [("files", "data.json")]
    assert "sample s2" in skipped[0]["reason"]
    with pytest.raises(InputError, match=r"1 bad samples are more than data\.max_skipped 0\.05 allows"):
        engine.train(recipe(folder), folder / "strict")


def test_a_process_without_images_does_not_stop_the_others(folder):
    """With one image in 4 samples in random order, each of two processes gets batches without an image."""
    write(folder, [record(0), *(record(number, None, f"question {number}") for number in (1, 2, 3))])
    train(recipe(folder), folder / "one", ONE)
    train(recipe(folder), folder / "two", TWO)
    one, two = (logged(folder / name) for name in ("one", "two"))
    assert len(one) == 4
    assert two == pytest.approx(one, abs=1e-4)


def test_a_plan_counts_steps_or_names_missing_files(folder):
    assert plan(recipe(folder))["missing"] == [str(folder / "data.json")]
    write(folder, [record(0)] * 5)
    found = plan(recipe(folder))
    assert found["missing"] == []
    assert found["stages"][0]["steps"] == 5
    assert found["stages"][0]["trained"] == found["stages"][0]["parameters"]["projector"]


def test_samples_without_images_have_no_pixels(folder):
    item = dataset(folder, [record(0, None, "hi")])[0]
    assert "pixel_values" not in item
    assert isinstance(item["input_ids"], torch.Tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": Data(sources=[Source("gone.json")])}, "missing data: .*gone.json"),
        ({"pixels": {"mode": "square", "side": 100}}, "stage later: pixels: "),
        ({"pixels": {"rescale": 3}}, "stage later: pixels: the image processor has no setting 'rescale'"),
    ],
)
def test_errors_of_a_later_stage_are_reported_before_the_first(folder, change, message):
    write(folder, [record(0)])
    first = recipe(folder).stages[0]
    later = dataclasses.replace(first, name="later", steps=1, epochs=None, **change)
    with pytest.raises(InputError, match=message):
        engine.train(dataclasses.replace(recipe(folder), stages=[first, later]), folder / "run")
    assert not (folder / "run").exists()


def test_a_plan_names_missing_image_folders(folder):
    write(folder, [record(0), record(1, "coco/train2017/1.jpg")])
    assert plan(recipe(folder))["missing"] == [str(folder / "images" / "coco" / "train2017")]


@pytest.mark.parametrize("image", [5, [5], {"a": 1}, [None]])
def test_a_plan_ignores_images_that_are_not_paths(folder, image):
    write(folder, [record(0), record(1) | {"image": image}])
    assert plan(recipe(folder))["missing"] == []


def test_skips_are_remembered_by_a_resumed_run(tmp_path):
    stage = dataclasses.replace(recipe(tmp_path).stages[0], data=Data(sources=[Source("x")], max_skipped=0.02))
    first = SkippedSamples(tmp_path / "skipped.jsonl", stage, 100)
    first.note([("a.json", "sample 1"), ("a.json", "sample 2")], 3)
    resumed = SkippedSamples(tmp_path / "skipped.jsonl", stage, 100)
    resumed.note([("a.json", "sample 1")], 4)
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 2
    with pytest.raises(InputError, match="3 bad samples are more than"):
        resumed.note([("a.json", "sample 3")], 5)


def test_skipped_names_with_surrogates_are_written_and_read_back(tmp_path):
    stage = dataclasses.replace(recipe(tmp_path).stages[0], data=Data(sources=[Source("x")], max_skipped=1.0))
    for _ in range(2):
        SkippedSamples(tmp_path / "skipped.jsonl", stage, 100).note([("a.json", "sample a\ud800: no conversations")], 1)
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 1


def test_bad_held_out_samples_are_reported_and_not_counted(folder):
    write(folder, [record(number, None, f"question {number}") for number in range(4)])
    write(folder, [record(0), *(record(number, "gone.png") for number in (1, 2, 3))], "test.json")
    held_out = Evaluation(every=2, samples=4, sources=[Source("test.json", "images")], pictures=0)
    plan = recipe(folder, max_skipped=0.3)
    plan = dataclasses.replace(plan, stages=[dataclasses.replace(plan.stages[0], evaluation=held_out)])
    engine.train(plan, folder / "run")
    lines = [json.loads(line) for line in (folder / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["file"], line["held_out"]) for line in lines] == [("test.json", True)] * 3
    resumed = SkippedSamples(folder / "run" / "skipped.jsonl", plan.stages[0], 4)
    resumed.note([("test.json", "sample s1")], 5)  # also a training sample
    with pytest.raises(InputError, match="2 bad samples are more than"):
        resumed.note([("data.json", "sample 0")], 5)


def test_a_plan_uses_the_settings_of_a_published_checkpoint(folder):
    write(folder, [record(0)])
    checkpoint = Path(__file__).parent / "data" / "official" / "checkpoint"
    found = plan(dataclasses.replace(recipe(folder), model=ModelSpec(checkpoint=str(checkpoint))))
    assert found["image"]["visual_tokens"] == (found["image"]["side"] // 64) ** 2
    assert found["stages"][0]["trained"] == 256 * 64 + 64 + 64 * 64 + 64


def test_a_plan_of_an_unknown_architecture_lists_the_known_ones(folder):
    spec = ModelSpec(vision_from="a", language_from="b", preset="convllava-1536-8b")
    with pytest.raises(
        InputError, match="there is no architecture 'convllava-1536-8b'; choose one of convllava-768-7b"
    ):
        plan(dataclasses.replace(recipe(folder), model=spec))


def test_settings_next_to_a_checkpoint_are_rejected_even_if_false():
    with pytest.raises(InputError, match="checkpoint is a whole model; leave out row_separator"):
        ModelSpec(checkpoint="tiny", row_separator=False)
