"""Data files in the published layouts become questions; errors in a file are one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from benchmark_files import (
    base64_png,
    circular_rows,
    mme_rows,
    parquet_image,
    patient,
    write_image,
    write_lines,
    write_parquet,
    write_tsv,
)
from conftest import picture
from hypothesis import given
from hypothesis import strategies as st

from convllava import InputError
from convllava.evaluation.benchmarks import BENCHMARKS, find_benchmarks
from convllava.evaluation.columns import load_questions
from convllava.evaluation.questions import MissingPicture
from convllava.evaluation.readers import listed


def load(name, path, **settings):
    return load_questions(BENCHMARKS[name], path, **settings)


def same(question, seed):
    return np.array_equal(np.asarray(question.pictures[0].load()), np.asarray(picture(64, 64, seed)))


def test_tsv_images_are_read_from_the_file_and_by_reference(tmp_path):
    first, second, third, fourth = load("mmbench", write_tsv(tmp_path / "MMBench_DEV_EN.tsv", circular_rows()))
    assert (first.id, first.options, first.letters, first.truths) == ("7", ("dog", "cat"), "AB", ("A",))
    assert first.categories == ("object", "perception")
    assert [question.group for question in (first, second, third, fourth)] == ["7", "8", "7", "8"]
    assert first.pictures == third.pictures != second.pictures
    assert same(first, 1)
    assert same(third, 1)
    assert same(fourth, 2)


def test_cell_above_the_csv_modules_limit_is_read(tmp_path):
    rows = [{"index": 1, "question": "q" * 200_000, "A": "x", "B": "y", "answer": "A", "image": base64_png()}]
    (question,) = load("seedbench", write_tsv(tmp_path / "seed.tsv", rows))
    assert len(question.text) == 200_000
    assert same(question, 0)


def test_tabs_quotes_and_line_breaks_do_not_shift_images(tmp_path):
    rows = [
        {"index": n, "question": 'a\t"b"\nc é', "A": "x", "B": "y", "answer": "A", "image": base64_png(n)}
        for n in (3, 4)
    ]
    questions = load("seedbench", write_tsv(tmp_path / "seed.tsv", rows))
    assert [question.text for question in questions] == ['a\t"b"\nc é'] * 2
    assert same(questions[0], 3)
    assert same(questions[1], 4)


@pytest.mark.parametrize("indices", [("0", "0"), ("", "")])
def test_rows_with_the_same_index_keep_their_own_images(tmp_path, indices):
    rows = [
        {"index": index, "question": "q", "A": "x", "B": "y", "answer": "A", "image": base64_png(number)}
        for number, index in enumerate(indices)
    ]
    rows.append({**rows[0], "image": indices[0]})
    first, second, third = load("seedbench", write_tsv(tmp_path / "seed.tsv", rows))
    assert same(first, 0)
    assert same(second, 1)
    if indices[0]:
        assert same(third, 0)
    else:
        assert third.pictures == (MissingPicture("row 3 of seed.tsv: no image"),)


@pytest.mark.parametrize("answers", [{"answer": None}, {"answers": [""] * 10}, {"answers": ["nan", ""]}])
def test_row_without_an_answer_is_rejected(tmp_path, answers):
    path = write_parquet(tmp_path / "t.parquet", [{"question": "q", "image": parquet_image(), **answers}])
    with pytest.raises(InputError, match=r"row 1 of t.parquet has no answer"):
        load("textvqa", path)


@pytest.mark.parametrize("change", [{"bbox": ["a", 1, 2, 3]}, {"bbox": [None, 1, 2, 3]}, {"height": "tall"}])
def test_boxes_and_sizes_must_be_numbers(tmp_path, change):
    row = {"question": "q", "bbox": [0, 1, 2, 3], "height": 4, "width": 4, "image": "a.png"} | change
    (tmp_path / "val.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=r"val.jsonl: (bbox|height or width) must be numbers; got"):
        load("refcoco", tmp_path / "val.jsonl")


def test_missing_size_is_left_to_the_image(tmp_path):
    row = {"question": "q", "bbox": [0, 1, 2, 3], "height": None, "width": None, "image": "a.png"}
    (tmp_path / "val.jsonl").write_text(json.dumps(row))
    assert load("refcoco", tmp_path / "val.jsonl")[0].details["size"] is None


def test_image_instead_of_its_name_is_a_missing_picture(tmp_path):
    row = {"questionId": 1, "question": "q", "answers": ["a"], "image": "A" * 100_000}
    (tmp_path / "val.json").write_text(json.dumps({"data": [row]}))
    (question,) = load("docvqa", tmp_path / "val.json")
    with pytest.raises(InputError):
        question.pictures[0].load()


def test_list_in_a_cell_is_several_right_answers(tmp_path):
    rows = [{"index": 1, "question": "q", "answer": "['a', \"b's\"]", "image": base64_png()}]
    assert load("docvqa", write_tsv(tmp_path / "d.tsv", rows))[0].truths == ("a", "b's")


@pytest.mark.parametrize(
    ("name", "answer", "truths"),
    [
        ("chartqa", "[8, 3]", ("[8, 3]",)),
        ("realworldqa", "[8, 3]", ("[8, 3]",)),
        ("chartqa", "['14']", ("14",)),
        ("ocrbench", "[77]", ("77",)),
    ],
)
def test_brackets_are_lists_only_in_benchmarks_with_lists(name, answer, truths, tmp_path):
    rows = [{"index": 1, "question": "q", "answer": answer, "image": base64_png()}]
    assert load(name, write_tsv(tmp_path / "d.tsv", rows))[0].truths == truths


@patient
@given(st.lists(st.text(max_size=8), max_size=4), st.text(max_size=12))
def test_written_list_is_read_back_and_other_texts_are_unchanged(items, text):
    assert listed(repr(items)) == items
    assert listed(text) == [text] or text.startswith("[")


def test_mme_pairs_questions_by_image_and_gives_unique_ids(tmp_path):
    questions = load("mme", write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", mme_rows()).parent.parent)
    assert [question.id for question in questions[:3]] == ["existence/1.png", "existence/1.png#2", "existence/2.png"]
    assert questions[0].group == questions[1].group != questions[2].group
    assert questions[0].text == "Is it Yes?"
    assert questions[1].truths == ("no",)
    assert same(questions[4], 2)


def test_seedbench_parquet_has_image_lists_and_numbered_types(tmp_path):
    rows = [
        {
            "question_id": "101",
            "question": "q",
            "choice_a": "one",
            "choice_b": "two",
            "choice_c": "three",
            "choice_d": "four",
            "answer": "C",
            "question_type_id": 5,
            "image": [parquet_image(n) for n in range(3)],
        }
    ]
    (question,) = load("seedbench", write_parquet(tmp_path / "seed.parquet", rows))
    assert question.options == ("one", "two", "three", "four")
    assert question.categories == ("Instances Counting",)
    assert len(question.pictures) == 3
    assert question.pictures[2].load().size == (64, 64)


def test_mmmu_parquet_uses_the_images_named_in_the_question(tmp_path):
    common = {"image_1": parquet_image(1), "image_2": parquet_image(2), "image_3": None}
    rows = [
        {
            "id": "validation_Art_Theory_3",
            "question": "Compare <image 1>.",
            "options": "['<image 2>', 'neither']",
            "answer": "A",
            "question_type": "multiple-choice",
            **common,
        },
        {
            "id": "validation_Math_1",
            "question": "Sum of <image 2>?",
            "options": "[]",
            "answer": "['5', 'five']",
            "question_type": "open",
            **common,
        },
    ]
    choice, sum_of = load("mmmu", write_parquet(tmp_path / "MMMU.parquet", rows))
    assert choice.categories == ("Art_Theory",)
    assert choice.details["marks"] == (1, 2)
    assert len(choice.pictures) == 2
    assert sum_of.options == ()
    assert sum_of.truths == ("5", "five")
    assert same(sum_of, 2)


def test_mmmu_tsv_has_a_list_of_images_in_one_cell(tmp_path):
    images = repr([base64_png(1), base64_png(2)])
    row = {"index": 5, "question": "Is <image 2> red?", "A": "yes", "B": "no", "answer": "A", "image": images}
    (question,) = load("mmmu", write_tsv(tmp_path / "MMMU_DEV_VAL.tsv", [row]))
    assert question.details["marks"] == (2,)
    assert len(question.pictures) == 1
    assert same(question, 2)


def test_limit_keeps_rotations_and_pairs_together(tmp_path):
    choices = write_tsv(tmp_path / "MMBench.tsv", circular_rows())
    assert [question.id for question in load("mmbench", choices, limit=1)] == ["7", "1000007"]
    pairs = write_parquet(tmp_path / "MME.parquet", mme_rows())
    assert len(load("mme", pairs, limit=2)) == 4


def test_textvqa_docvqa_infovqa_and_chartqa_json_is_read(tmp_path):
    for number, name in enumerate(("train_images/abc.jpg", "documents/d.png", "i.jpeg", "png/c.png")):
        write_image(tmp_path / name, number)
    text = {"question": "q", "image_id": "abc", "question_id": 3, "answers": ["a"] * 10}
    document = {"questionId": 9, "question": "q", "image": "documents/d.png", "answers": ["x", "y"]}
    graphic = {"questionId": 10, "question": "q", "image_local_name": "i.jpeg", "answers": ["z"]}
    chart = {"imgname": "c.png", "query": "q", "label": "5"}
    (tmp_path / "text.json").write_text(json.dumps({"data": [text]}))
    (tmp_path / "document.json").write_text(json.dumps({"dataset_name": "docvqa", "data": [document]}))
    (tmp_path / "graphic.json").write_text(json.dumps({"data": [graphic]}))
    (tmp_path / "test_human.json").write_text(json.dumps([chart]))
    (tmp_path / "test_augmented.json").write_text(json.dumps([chart]))
    assert load("textvqa", tmp_path / "text.json")[0].pictures[0].load().size == (64, 64)
    found = load("docvqa", tmp_path / "document.json")[0]
    assert (found.id, found.truths) == ("9", ("x", "y"))
    assert same(found, 1)
    assert load("infovqa", tmp_path / "graphic.json")[0].pictures[0].load()
    charts = load("chartqa", tmp_path, split="test_")
    assert [chart.categories for chart in charts] == [("augmented",), ("human",)]
    assert len({chart.id for chart in charts}) == 2
    assert same(charts[1], 3)


def test_pope_reads_one_file_per_category_and_separate_images(tmp_path):
    (tmp_path / "pope").mkdir()
    write_image(tmp_path / "val2014" / "COCO_1.png", 5)
    record = {"question_id": 1, "image": "COCO_1.png", "text": "Is there a dog?", "label": "no"}
    for kind in ("random", "popular"):
        write_lines(tmp_path / "pope" / f"coco_pope_{kind}.json", [record, record | {"question_id": 2, "label": "yes"}])
    questions = load("pope", tmp_path / "pope", images=tmp_path / "val2014")
    assert [question.id for question in questions] == ["popular/1", "popular/2", "random/1", "random/2"]
    assert questions[0].categories == ("popular",)
    assert questions[1].truths == ("yes",)
    assert same(questions[3], 5)
    assert load("pope", tmp_path / "pope" / "coco_pope_random.json")[0].id == "1"


def test_refcoco_boxes_of_json_lines_and_parquet_are_read(tmp_path):
    line = {"image": "a.png", "sent": "the left one", "bbox": [10, 20, 30, 60], "height": 80, "width": 100}
    (question,) = load("refcoco", write_lines(tmp_path / "refcoco_val.jsonl", [line]))
    assert question.text == "the left one"
    assert question.details["box"] == (10, 20, 30, 60)
    assert question.details["size"] == (80, 100)
    row = {
        "question_id": "4",
        "image": parquet_image(),
        "question": "Describe the region.",
        "answer": ["left", "a dog"],
        "bbox": [10.0, 20.0, 20.0, 40.0],
    }
    left, dog = load("refcocog", write_parquet(tmp_path / "r.parquet", [row]))
    assert (left.text, dog.text) == ("left", "a dog")
    assert (left.id, dog.id) == ("4", "4#2")
    assert left.details["box"] == dog.details["box"] == (10, 20, 30, 60)


def test_fields_of_ocrbench_realworldqa_and_mmvet_are_read(tmp_path):
    ocr = [
        {
            "dataset": "HME100k",
            "question_type": "Handwritten",
            "question": "q",
            "answer": ["x"],
            "image": parquet_image(),
        },
        {"dataset": "IIIT5K", "question_type": "Regular", "question": "q", "answer": ["y"], "image": parquet_image()},
    ]
    formula, regular = load("ocrbench", write_parquet(tmp_path / "OCRBench.parquet", ocr))
    assert formula.details["is_formula"]
    assert not regular.details["is_formula"]
    assert regular.categories == ("Regular",)
    world = [{"question": "Which?\n\nA. Left\nB. Right\n", "answer": "B", "image": parquet_image()}]
    (question,) = load("realworldqa", write_parquet(tmp_path / "w.parquet", world))
    assert question.details["written"] == ("Left", "Right")
    vet = {"v1_0": {"imagename": "v.png", "question": "q", "answer": "x<AND>y", "capability": ["ocr", "math"]}}
    (tmp_path / "mm-vet.json").write_text(json.dumps(vet))
    (question,) = load("mmvet", tmp_path / "mm-vet.json")
    assert (question.id, question.categories) == ("v1_0", ("ocr", "math"))


def test_split_and_limit_choose_questions_and_shards_are_joined(tmp_path):
    for split in ("test", "validation"):
        for shard in (0, 1):
            rows = [{"questionId": f"{split}{shard}", "question": "q", "answers": ["a"], "image": parquet_image()}]
            write_parquet(tmp_path / f"{split}-0000{shard}-of-00002.parquet", rows)
    with pytest.raises(InputError, match=r"holds test, validation; choose one with `split`"):
        load("docvqa", tmp_path)
    found = load("docvqa", tmp_path, split="validation")
    assert [question.id for question in found] == ["validation0", "validation1"]
    assert len(load("docvqa", tmp_path, split="validation", limit=1)) == 1
    with pytest.raises(InputError, match=r"no file with 'train'"):
        load("docvqa", tmp_path, split="train")


def test_benchmarks_in_a_folder_are_found_by_name_prefixes(tmp_path):
    for name in ("MMBench_DEV_EN.tsv", "MME.tsv", "SEED-Bench", "refcoco+_val.jsonl", "InfographicVQA", "notes.txt"):
        (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).touch()
    assert list(find_benchmarks(tmp_path)) == ["mme", "mmbench", "seedbench", "refcoco+", "infovqa"]
    (tmp_path / "mme.parquet").touch()
    with pytest.raises(InputError, match="mme twice"):
        find_benchmarks(tmp_path)


def broken_rows(**changes):
    return [circular_rows()[0], circular_rows()[1] | changes]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"index": 1, "A": "x", "answer": "A"}],
            r"row 1 of m.tsv lacks the column question .*; it has A, answer, index",
        ),
        ([{"index": 1, "question": "q", "A": "x"}], r"row 1 of m.tsv lacks the column answers or answer"),
        ([{"index": 1, "question": "q", "answer": "A"}], r"row 1 of m.tsv has no options"),
        (broken_rows(answer="E"), r"row 2 of m.tsv: the answer is 'E', and the options are AB"),
        (broken_rows(answer=""), r"row 2 of m.tsv"),
    ],
)
def test_error_names_the_row_and_the_problem(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        load("mmbench", write_tsv(tmp_path / "m.tsv", rows))


def test_damaged_file_is_a_one_line_error(tmp_path):
    path = write_tsv(tmp_path / "m.tsv", circular_rows())
    path.write_bytes(path.read_bytes()[:-40].rsplit(b"\t", 1)[0] + b"\n")
    with pytest.raises(InputError, match=r"row 4 of m.tsv has .* is the file cut short"):
        load("mmbench", path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        load("mme", tmp_path / "x.parquet")
    (tmp_path / "x.json").write_text("[1, 2")
    with pytest.raises(InputError, match="is not JSON"):
        load("docvqa", tmp_path / "x.json")
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"b": \n')
    with pytest.raises(InputError, match=r"line 2 of .* is not JSON"):
        load("docvqa", tmp_path / "x.jsonl")
    (tmp_path / "y.tsv").write_bytes(b"index\tquestion\n1\t\xff\n")
    with pytest.raises(InputError, match="not UTF-8"):
        load("mmbench", tmp_path / "y.tsv")
    with pytest.raises(InputError, match="no such file or folder"):
        load("mmbench", tmp_path / "nowhere")
    (tmp_path / "z.csv").touch()
    with pytest.raises(InputError, match=r"z.csv: a benchmark's file ends in .tsv"):
        load("mmbench", tmp_path / "z.csv")


def test_unknown_category_lists_the_known_ones(tmp_path):
    path = write_tsv(tmp_path / "m.tsv", circular_rows())
    with pytest.raises(InputError, match=r"category 'objects'; known: object, perception, scene"):
        load("mmbench", path, categories=("objects",))
    assert {question.group for question in load("mmbench", path, categories=("object",))} == {"7"}
    rows = [row | {"category": "colour"} for row in mme_rows()]
    with pytest.raises(InputError, match=r"row 1 of mme.parquet: the category is 'colour'; MME has existence, .* OCR"):
        load("mme", write_parquet(tmp_path / "mme.parquet", rows))


def test_damaged_image_fails_when_loaded_and_names_its_row(tmp_path):
    rows = broken_rows(image=base64_png(2)[:4000])
    questions = load("mmbench", write_tsv(tmp_path / "m.tsv", [*rows, circular_rows()[0] | {"index": 9, "image": "5"}]))
    assert questions[0].pictures[0].load()
    with pytest.raises(InputError, match=r"row 2 of m.tsv: the image is damaged"):
        questions[1].pictures[0].load()
    with pytest.raises(InputError, match="the image is that of index 5, and no row has it"):
        questions[2].pictures[0].load()
