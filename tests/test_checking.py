"""Checks of data before training report every problem with its row; previews show what the model will see."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import fresh, picture
from killing import killed_after_findings
from PIL import Image
from training_runs import SMALLEST
from transformers import ConvNextConfig, ConvNextForImageClassification, LlamaConfig, LlamaForCausalLM

from convllava import cli
from convllava.checkpoints import SHIPPED
from convllava.data import validation
from convllava.data.collate import IGNORE, encode
from convllava.data.contact_sheet import _SUPERVISED, draw_sheet, picture_of, sheet_sample
from convllava.data.dataset import FileDataset
from convllava.data.mixture import Mixture
from convllava.data.records import PROBLEMS, with_images
from convllava.data.validation import SourceCheck, without_pixels
from convllava.errors import InputError
from convllava.geometry import Size
from convllava.model.image_processing import mean_colour, render
from convllava.model.processing import ConvLlavaProcessor
from convllava.model.tokenizer import build_tokenizer
from convllava.training import check_data
from convllava.training.check_data import check, verdict
from convllava.training.datasets import mixture_sources
from convllava.training.initialise import initial_model, initial_processor
from convllava.training.preview import preview
from convllava.training.recipe import Data, Evaluation, ModelSpec, Recipe, Source, Stage

SIZES = {"a.png": (70, 130), "b.png": (64, 64)}


def turns(*texts: str) -> list[dict[str, str]]:
    speakers = ("human", "gpt") * len(texts)
    return [{"from": speaker, "value": text} for speaker, text in zip(speakers, texts, strict=False)]


RECORDS: list[tuple[str | None, Any]] = [
    (None, {"image": "a.png", "conversations": turns("<image>\nwhat is it?", "red")}),
    (None, {"image": ["a.png", "b.png"], "conversations": turns("<image><image>which?", "the top", "and?", "left")}),
    ("no conversation", {"conversations": []}),
    ("malformed turn", {"conversations": [{"from": "bot", "value": "hi"}]}),
    ("empty answer", {"conversations": turns("hi", " ")}),
    ("unbalanced roles", {"conversations": turns("hi", "ho", "hi")}),
    ("marks and images differ", {"image": "a.png", "conversations": turns("<image> <image>?", "red")}),
    ("missing image", {"image": "gone.png", "conversations": turns("<image>?", "red")}),
    ("undecodable image", {"image": "broken.png", "conversations": turns("<image>?", "red")}),
    ("undecodable image", {"image": "giant.png", "conversations": turns("<image>?", "red")}),
    ("unreadable record", {"image": 5, "conversations": turns("<image>?", "red")}),
    ("unwritable text", {"conversations": turns("hi", "<|end|>")}),
    ("too long", {"conversations": turns("hello " * 40, "red")}),
    ("cut", {"conversations": turns("hi", "red " * 90)}),
    (None, {"conversations": turns("what is the total?", "red")}),
]
"""Records, each with its problem."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, size in SIZES.items():
        picture(*size).save(tmp_path / "images" / name)
    content = (tmp_path / "images" / "a.png").read_bytes()
    (tmp_path / "images" / "broken.png").write_bytes(content[: len(content) // 2])
    Image.new("1", (20000, 10000)).save(tmp_path / "images" / "giant.png")
    write(tmp_path, [record for _, record in RECORDS])
    return tmp_path


def write(folder: Path, records: list[dict[str, Any]], name: str = "data.json") -> None:
    named = [{"id": f"s{number}"} | record for number, record in enumerate(records)]
    (folder / name).write_text(json.dumps(named), encoding="utf-8")


def recipe(folder: Path, *sources: Source, **settings: Any) -> Recipe:
    data = Data(sources=list(sources or [Source("data.json", "images")]), max_tokens=60, max_skipped=0.9)
    stage = Stage("files", None, {"projector": 1e-3}, data, epochs=1, batch_size=2)
    return Recipe("files", [dataclasses.replace(stage, **settings)], SMALLEST, data_root=str(folder), workers=0)


def report(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "report.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_problem_is_reported_with_its_row(folder):
    summary = check(recipe(folder), folder / "out", workers=0)
    expected = [(n, f"s{n}", problem) for n, (problem, _) in enumerate(RECORDS) if problem is not None]
    found = report(folder / "out")
    assert [(line["index"], line["id"], line["problem"]) for line in found] == expected
    assert {problem for *_, problem in expected} == set(PROBLEMS)
    assert {(line["source"], *line["stages"]) for line in found} == {("data.json", "files")}
    details = {line["problem"]: line["detail"] for line in found}
    assert "broken.png" in next(line["detail"] for line in found if line["id"] == "s8")
    assert "200.0 megapixels" in details["undecodable image"]
    assert details["marks and images differ"] == "2 <image> marks for 1 images"
    assert "tokens, and the answer begins after 60" in details["too long"]
    assert "tokens; the last" in details["cut"]
    (source,) = summary["sources"]
    assert source["problems"]["undecodable image"] == 2
    assert sum(source["problems"].values()) == len(expected)
    assert summary["stages"] == [{"stage": "files", "samples": len(RECORDS), "bad": len(expected) - 1, "allowed": 0.9}]
    assert json.loads((folder / "out" / "summary.json").read_text()) == summary
    assert Image.open(folder / "out" / "sizes.png").width > 500
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["report.jsonl", "sizes.png", "summary.json"]


def test_check_and_training_skip_and_count_the_same(folder):
    plan = recipe(folder)
    processor = fresh()[1]
    (source,) = mixture_sources(plan, plan.stages[0].data.sources)
    examination = SourceCheck(source, processor, 60, True)
    training = FileDataset(Mixture([source]), processor, len(RECORDS), max_tokens=60)
    for number in range(len(RECORDS)):
        finding = examination[number]
        if finding.problem in (None, "cut"):
            assert finding.tokens - finding.lost == len(training.item(training.sample(0, number))["input_ids"])
            continue
        with pytest.raises(InputError) as rejection:
            training.item(training.sample(0, number))
        assert str(rejection.value) == f"sample {finding.id}: {finding.detail}"
        assert finding.lost == finding.tokens
    assert examination[1].images == [SIZES["a.png"], SIZES["b.png"]]


@pytest.mark.parametrize(
    "mode", [{"mode": "native"}, {"mode": "square", "side": 128}, {"mode": "short_side", "side": 64}]
)
def test_processor_without_pixels_writes_the_same_text(folder, mode):
    plan, processor = recipe(folder), fresh()[1]
    processor.image_processor.change(**mode)
    samples = FileDataset(Mixture(mixture_sources(plan, plan.stages[0].data.sources)), processor, 1)
    messages = with_images(samples.sample(0, 1))
    real, light = encode(processor, messages), encode(without_pixels(processor), messages)
    for key in ("input_ids", "labels", "image_sizes"):
        assert torch.equal(real[key], light[key])
    assert light["pixel_values"].shape[-1] == 1
    assert real["pixel_values"].shape[-1] > 1


def test_two_workers_report_the_same_as_one_process(folder, monkeypatch):
    monkeypatch.setattr(validation, "_CHUNK", 2)
    alone, two = (check(recipe(folder), folder / f"out{workers}", workers) for workers in (0, 2))
    assert alone == two
    assert report(folder / "out0") == report(folder / "out2")


def test_killed_check_continues(folder, monkeypatch):
    monkeypatch.setattr(validation, "_CHUNK", 2)
    whole = check(recipe(folder), folder / "whole", 0)
    with killed_after_findings(5):
        check(recipe(folder), folder / "parts", 0)
    assert not (folder / "parts" / "report.jsonl").exists()
    add, checked = check_data.FindingsLog.add, []
    monkeypatch.setattr(check_data.FindingsLog, "add", lambda *all: checked.extend(all[2]) or add(*all))
    assert check(recipe(folder), folder / "parts", 0) == whole
    assert [finding.index for finding in checked] == list(range(5, len(RECORDS)))
    assert report(folder / "parts") == report(folder / "whole")


def test_data_repaired_after_a_kill_are_checked_again(folder, monkeypatch):
    monkeypatch.setattr(validation, "_CHUNK", 2)
    with killed_after_findings(5):
        check(recipe(folder), folder / "out", 0)
    write(folder, [RECORDS[0][1]] * len(RECORDS))
    check(recipe(folder), folder / "out", 0)
    assert report(folder / "out") == []


def test_findings_of_another_recipe_are_not_used(folder):
    (folder / "out").mkdir()
    notes = '0123\n[0, 0, "s0", 0, 0, [], "cut", "never"]\n'
    (folder / "out" / ".checked.jsonl").write_text(notes)
    check(recipe(folder), folder / "out", 0)
    assert "never" not in (folder / "out" / "report.jsonl").read_text()


def test_stages_with_the_same_settings_share_a_check(folder):
    first = recipe(folder).stages[0]
    stages = [
        first,
        dataclasses.replace(first, name="again", data=dataclasses.replace(first.data, max_skipped=0.1)),
        dataclasses.replace(first, name="finer", pixels={"min_pixels": 192 * 192, "max_pixels": 256 * 256}),
        dataclasses.replace(first, name="pages", data=Data(), steps=1, epochs=None),
    ]
    summary = check(dataclasses.replace(recipe(folder), stages=stages), folder / "out", 0)
    assert [source["stages"] for source in summary["sources"]] == [["files", "again"], ["finer"]]
    assert summary["sources"][0]["tokens"] < summary["sources"][1]["tokens"]
    assert [stage["stage"] for stage in summary["stages"]] == ["files", "again", "finer"]
    reason = verdict(summary)
    assert reason is not None
    assert "stage again: 11 of 15 samples are bad, more than data.max_skipped 0.1 allows" in reason


def test_files_of_an_evaluation_are_checked_too(folder):
    write(folder, [RECORDS[0][1], RECORDS[4][1]], "held_out.json")
    sources = [Source("held_out.json", "images"), Source("data.json", "images")]
    plan = recipe(folder, evaluation=Evaluation(sources=sources))
    summary = check(plan, folder / "out", 0)
    assert [(source["source"], source["stages"]) for source in summary["sources"]] == [
        ("data.json", ["files", "files (evaluation)"]),
        ("held_out.json", ["files (evaluation)"]),
    ]
    assert summary["sources"][1]["problems"] == {"empty answer": 1}
    assert [stage["samples"] for stage in summary["stages"]] == [len(RECORDS)]


def run(capsys, monkeypatch, *arguments: object) -> tuple[int, str, str]:
    """Run a command in this process; return exit code, stdout, and stderr without the progress bar."""
    monkeypatch.setattr(sys, "argv", ["convllava", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err.rpartition("convllava: ")[2]


def test_command_fails_only_if_too_many_samples_are_bad(folder, capsys, monkeypatch):
    path = folder / "recipe.yaml"
    path.write_text(recipe(folder).dump())
    options = ("--workers", 0, "--output", folder / "out")
    code, out, _ = run(capsys, monkeypatch, "data", "check", path, *options, "--json")
    assert code == 0
    assert json.loads(out)["stages"][0]["bad"] == 11
    strict = ("--set", "stages.files.data.max_skipped=0.5")
    code, out, err = run(capsys, monkeypatch, "data", "check", path, *options, *strict)
    assert code == 2
    assert "undecodable image" in out
    assert err.startswith("stage files: 11 of 15 samples are bad")
    write(folder, [RECORDS[2][1]])
    code, _, err = run(capsys, monkeypatch, "data", "check", path, *options)
    assert code == 2
    assert err == "stage files: none of its 1 samples can be used; report.jsonl lists the reasons\n"


@pytest.mark.parametrize("command", ["check", "preview"])
def test_missing_data_are_named_with_the_folder_and_the_option(folder, command, capsys, monkeypatch):
    monkeypatch.chdir(folder / "images")
    code, _, err = run(capsys, monkeypatch, "data", command, Path(__file__).parent.parent / "recipes" / "lora.yaml")
    assert code == 2
    assert "missing data: train.jsonl" in err
    assert f"relative to data_root, now {folder / 'images'}; change it in the recipe or with --set data_root=" in err


def test_damaged_source_is_rejected_before_anything_is_written(folder):
    (folder / "data.tar").write_bytes(b"no tar")
    with pytest.raises(InputError, match=r"data\.tar is not a complete, uncompressed tar file"):
        check(recipe(folder, Source("data.tar")), folder / "out", 0)
    assert not (folder / "out").exists()
    pages = dataclasses.replace(recipe(folder), stages=[Stage("pages", 1, {"projector": 1e-3})])
    with pytest.raises(InputError, match="files trains on generated pages only; there is no file to check"):
        check(pages, folder / "out", 0)


def test_damaged_member_of_a_tar_is_reported_by_its_key(folder):
    with tarfile.open(folder / "data.tar", "w") as archive:
        for name, content in (("0.json", b"{"), ("1.json", json.dumps(RECORDS[-1][1]).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    check(recipe(folder, Source("data.tar")), folder / "out", 0)
    (line,) = report(folder / "out")
    assert (line["index"], line["problem"]) == (0, "unreadable record")
    assert "0.json is not json" in line["detail"]


def test_initial_processor_equals_the_one_of_initial_model(folder):
    for model in (recipe(folder).model, ModelSpec(checkpoint=str(SHIPPED / "tiny")), assembled(folder)):
        plan = dataclasses.replace(recipe(folder), model=model)
        one, other = (
            supervised_item(processor, "red") for processor in (initial_processor(plan), initial_model(plan)[1])
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def assembled(folder: Path) -> ModelSpec:
    """Write small random parts in the format of pretrained ones."""
    tower = ConvNextConfig(depths=[1] * 4, hidden_sizes=[8] * 4)
    ConvNextForImageClassification(tower).save_pretrained(folder / "vision")
    tokenizer = build_tokenizer(["what"])
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    return ModelSpec(vision_from=str(folder / "vision"), language_from=str(folder / "language"))


def test_picture_of_pixels_equals_the_resized_image(parts):
    processor = parts[1].image_processor
    image = picture(70, 130)
    placement = processor.placement(Size(70, 130))
    expected = render(image, placement, processor.resample, mean_colour(processor.image_mean))
    pixels = processor(image, return_tensors="pt")["pixel_values"][0]
    assert np.array_equal(np.asarray(picture_of(pixels, processor)), np.asarray(expected))


def supervised_item(processor: ConvLlavaProcessor, answer: str) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture(70, 130)}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return encode(processor, messages)


def test_sheet_marks_supervised_text(parts):
    item = supervised_item(parts[1], "red")
    sample = sheet_sample(item, parts[1], 64, 3)
    supervised, visual = (
        int((item["labels"] != IGNORE).sum()),
        int((item["input_ids"] == parts[1].image_token_id).sum()),
    )
    assert sample.title == f"sample 3: {len(item['input_ids'])} tokens, {visual} visual, {supervised} supervised"
    assert "".join(text for text, marked in sample.text if marked) == "red<|end|>"
    assert f"[{visual} visual tokens]" in [text for text, _ in sample.text]
    assert has_colour(draw_sheet([sample]), _SUPERVISED)
    item["labels"] = torch.full_like(item["labels"], IGNORE)
    assert not has_colour(draw_sheet([sheet_sample(item, parts[1], 64, 3)]), _SUPERVISED)


def has_colour(image: Image.Image, colour: tuple[int, int, int]) -> bool:
    return bool((np.asarray(image) == colour).all(axis=-1).any())


def test_long_text_is_shortened_and_long_words_are_split(parts):
    short, long = (
        draw_sheet([sheet_sample(supervised_item(parts[1], text), parts[1], 64, 0)]) for text in ("a", "a" * 3000)
    )
    assert long.width == short.width
    assert long.height < short.height + 20 * 30


@pytest.mark.parametrize("pages", [False, True])
def test_preview_draws_files_and_generated_pages(folder, pages, capsys, monkeypatch):
    plan = recipe(folder, data=Data(size=128, simple=True), steps=1, epochs=None) if pages else recipe(folder)
    (folder / "recipe.yaml").write_text(plan.dump())
    output = folder / "preview.png"
    arguments = ("data", "preview", folder / "recipe.yaml", "--samples", 3, "--output", output)
    assert run(capsys, monkeypatch, *arguments) == (0, f"{output}\n", "")
    sheet = Image.open(output)
    assert has_colour(sheet, _SUPERVISED)
    preview(plan, "files", 3, output)
    assert np.array_equal(np.asarray(Image.open(output)), np.asarray(sheet))


@pytest.mark.parametrize("objective", ["dense", "align"])
def test_preview_draws_pages_with_dense_labels(folder, objective):
    stage = {"data": Data(size=128, simple=True), "steps": 1, "epochs": None, "objective": objective}
    preview(recipe(folder, **stage), None, 2, folder / "preview.png")
    assert Image.open(folder / "preview.png").width > 460


def test_impossible_previews_are_rejected_in_one_line(folder):
    plan = recipe(folder)
    with pytest.raises(InputError, match="files has no `stage` 'instruct'; choose one of files"):
        preview(plan, "instruct", 1, folder / "a.png")
    for name in ("a.txt", "a.psd"):
        with pytest.raises(InputError, match="give the name of a picture"):
            preview(plan, None, 1, folder / name)
    with pytest.raises(InputError, match=r"a\.h5 cannot be written: .*HDF5"):
        preview(plan, None, 1, folder / "a.h5")
    with pytest.raises(InputError, match=r"a\.png cannot be written"):
        preview(plan, None, 1, folder / "none" / "a.png")


def test_good_data_have_no_verdict(folder):
    write(folder, [RECORDS[0][1]])
    summary = check(recipe(folder), folder / "out", 0)
    assert verdict(summary) is None
    assert report(folder / "out") == []
