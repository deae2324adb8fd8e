"""The command line scores answers of other systems; the expected numbers were computed by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

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
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from convllava import InputError
from convllava.cli import app
from convllava.cli.eval import Name
from convllava.evaluation import aggregate
from convllava.evaluation.aggregate import Graded, groups_of, interval, mean_interval
from convllava.evaluation.benchmarks import BENCHMARKS
from convllava.evaluation.questions import MissingPicture, Question
from convllava.evaluation.results import score_answers
from convllava.evaluation.rules import GradingContext
from convllava.geometry import Size, square


def scored(name: str, data: Path, answers: dict[object, str], *more: object) -> dict:
    path = write_lines(data.parent / "answers.jsonl", [{"id": key, "answer": text} for key, text in answers.items()])
    arguments = ["eval", "score", "--benchmark", name, "--data", data, "--answers", path, "--json", *more]
    finished = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert finished.exit_code == 0, finished.output
    return json.loads(finished.stdout)


def test_mmbench_question_is_right_if_all_its_rotations_are(tmp_path):
    data = write_tsv(tmp_path / "MMBench.tsv", circular_rows())
    found = scored("mmbench", data, {7: "A", 1000007: "B. dog", 8: "B", 1000008: "The answer is B."})
    assert found["primary"] == "circular"
    assert found["score"] == 0.5
    assert found["measures"] == {"circular": 0.5, "vanilla": 1.0, "rotations": 2.0}
    assert found["categories"]["scene"]["circular"] == 0.0
    assert [(unit["id"], unit["score"]) for unit in found["units"]] == [("7", 1.0), ("8", 0.0)]


def test_mme_score_sums_accuracy_and_accuracy_plus_over_subtasks(tmp_path):
    data = write_parquet(tmp_path / "MME.parquet", mme_rows())
    right = {"existence/1.png": "Yes", "existence/1.png#2": "no, it is not", "existence/2.png": "Yes."}
    found = scored("mme", data, right | {"existence/2.png#2": "Yes", "OCR/1.png": "Yes", "OCR/1.png#2": "perhaps"})
    # existence: 3 of 4 questions, 1 of 2 images: 75 + 50; OCR: 1 of 2, 0 of 1: 50 + 0
    assert found["measures"]["perception"] == found["score"] == 175
    assert found["measures"]["cognition"] == 0
    assert found["categories"]["existence"]["accuracy"] == 0.75
    assert found["categories"]["existence"]["accuracy_plus"] == 0.5
    assert found["unparsed"] == ["OCR/1.png#2"]
    assert set(found["absent"]) == {*aggregate.MME_PERCEPTION, *aggregate.MME_COGNITION} - {"existence", "OCR"}


def test_pope_measures_take_yes_as_positive(tmp_path):
    truths = ["yes", "yes", "yes", "no", "no"]
    lines = [
        {"question_id": number, "image": "x.jpg", "text": "q", "label": truth} for number, truth in enumerate(truths)
    ]
    data = write_lines(tmp_path / "coco_pope_random.json", lines)
    answers = {0: "Yes", 1: "Yes, there is.", 2: "No", 3: "yes", 4: "There is not."}
    # "yes" 3 times in the answers, 3 times in the truth, 2 times in both
    assert scored("pope", data, answers)["measures"] == {
        "f1": 0.6667,
        "accuracy": 0.6,
        "precision": 0.6667,
        "recall": 0.6667,
        "yes_ratio": 0.6,
    }
    unread = scored("pope", data, answers | {4: "perhaps"})
    assert unread["measures"]["accuracy"] == 0.4
    assert unread["measures"]["f1"] == 0.6667
    assert unread["unparsed"] == ["4"]


def test_textvqa_docvqa_and_infovqa_score_is_the_mean(tmp_path):
    records = [
        {"question": "q", "image_id": "a", "question_id": 1, "answers": ["stop"] * 2 + ["go"] * 8},
        {"question": "q", "image_id": "a", "question_id": 2, "answers": ["two"] * 10},
    ]
    (tmp_path / "text.json").write_text(json.dumps({"data": records}))
    assert scored("textvqa", tmp_path / "text.json", {1: "Stop", 2: "2"})["score"] == 0.8
    documents = [{"questionId": n, "question": "q", "image": "a.png", "answers": ["ab", "hello"]} for n in (1, 2, 3)]
    (tmp_path / "doc.json").write_text(json.dumps({"data": documents}))
    for name in ("docvqa", "infovqa"):
        found = scored(name, tmp_path / "doc.json", {1: "helo", 2: "ac", 3: "nothing of it"})
        assert found["score"] == round((0.8 + 0.5 + 0.0) / 3, 4)


def test_score_of_other_benchmarks_is_the_share_of_right_answers(tmp_path):
    charts = [{"imgname": "c.png", "query": "q", "label": label} for label in ("100", "Blue", "45%")]
    (tmp_path / "test_human.json").write_text(json.dumps(charts))
    assert scored("chartqa", tmp_path / "test_human.json", {1: "104", 2: "blue", 3: "45"})["score"] == 0.6667
    ocr = [
        {"dataset_name": "HME100k", "type": "formula", "question": "q", "answers": ["a+B"], "image_path": "x"},
        {"dataset_name": "IC13", "type": "regular", "question": "q", "answers": ["Stop"], "image_path": "x"},
    ]
    (tmp_path / "OCRBench.json").write_text(json.dumps(ocr))
    found = scored("ocrbench", tmp_path / "OCRBench.json", {1: "a + b", 2: "It says: STOP!"})
    assert found["measures"] == {"accuracy": 0.5, "points": 1.0}
    assert found["categories"]["formula"]["accuracy"] == 0
    seed = [{"index": n, "question": "q", "A": "x", "B": "y", "answer": "B", "image": base64_png()} for n in (1, 2)]
    data = write_tsv(tmp_path / "SEEDBench_IMG.tsv", seed)
    assert scored("seedbench", data, {1: "(B)", 2: "neither"})["unparsed"] == ["2"]
    mmmu = [
        {"index": "validation_Math_1", "question": "q", "A": "x", "B": "y", "answer": "B", "image": base64_png()},
        {"index": "validation_Math_2", "question": "q", "A": "", "B": "", "answer": "3.14", "image": base64_png()},
    ]
    data = write_tsv(tmp_path / "MMMU_DEV_VAL.tsv", mmmu)
    found = scored("mmmu", data, {"validation_Math_1": "B", "validation_Math_2": "so x = 3.142"})
    assert found["categories"]["Math"] == {"n": 2, "accuracy": 1.0}


def test_realworldqa_reads_letters_with_options_and_else_words(tmp_path):
    rows = [
        {"question": "Which?\nA. Left\nB. Right", "answer": "B", "image": parquet_image()},
        {"question": "How many?", "answer": "Two", "image": parquet_image()},
        {"question": "How many?", "answer": "3", "image": parquet_image()},
    ]
    data = write_parquet(tmp_path / "RealWorldQA.parquet", rows)
    assert scored("realworldqa", data, {1: "right", 2: "two.", 3: "33"})["score"] == 0.6667


def test_refcoco_boxes_are_mapped_from_the_canvas(tmp_path):
    line = {"image": "a.png", "sent": "it", "bbox": [20, 0, 120, 40], "height": 100, "width": 200}
    data = write_lines(tmp_path / "refcoco_val.jsonl", [line, line, line, line])
    answers = {1: "[0.10, 0.00, 0.60, 0.40]", 2: "It is [0.1, 0, 0.35, 0.4].", 3: "[0.1, 0.0, 0.34, 0.4]", 4: "left"}
    found = scored("refcoco", data, answers)
    assert [unit["score"] for unit in found["units"]] == [1, 1, 0, 0]  # IoU 1, exactly one half, below, no box
    assert found["unparsed"] == ["4"]
    size = Size(100, 200)
    box = square(size, side=640).box_to_normalised((20, 0, 120, 40))
    text = "[" + ", ".join(f"{value:.2f}" for value in box) + "]"
    question = Question("1", "it", (), ("",), details={"box": (20, 0, 120, 40), "size": (100, 200)})
    padded = GradingContext(placement=lambda size: square(size, side=640))
    rule = BENCHMARKS["refcoco"].rule
    assert rule(question, text, padded).score == 1
    assert rule(question, text, GradingContext()).score == 0


def test_refcoco_reads_missing_sizes_from_images(tmp_path):
    write_image(tmp_path / "a.png", 0, 100, 200)
    line = {"img_path": "a.png", "expression": "it", "bbox": [20, 0, 120, 40]}
    data = write_lines(tmp_path / "REC_refcoco.jsonl", [line, line | {"img_path": "gone.png"}])
    found = scored("refcoco", data, {1: "[0.10, 0.00, 0.60, 0.40]", 2: "[0.10, 0.00, 0.60, 0.40]"})
    assert found["score"] == 0.5
    assert found["broken"][0]["id"] == "2"
    assert "gone.png" in found["broken"][0]["reason"]


def test_missing_and_unknown_ids_are_listed(tmp_path):
    data = write_tsv(tmp_path / "MMBench.tsv", circular_rows())
    found = scored("mmbench", data, {7: "A", 8: "B", 1000007: "B", "x": "A"})
    assert found["missing"] == ["1000008"]
    assert found["unknown"] == ["x"]
    assert found["score"] == 0.5
    assert found["unparsed"] == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"id": 7, "answer": "A"}, {"id": "7", "answer": "B"}], "line 2 of .*: the id 7 already has an answer"),
        ([{"id": 7}], "line 1 of .*: the answer to 7 must be text"),
        (["A"], 'line 1 of .* must be {"id": index'),
        (
            [{"id": 99, "answer": "A"}],
            "none of the 1 answers belongs to a question of mmbench: the first has the id '99'",
        ),
    ],
)
def test_bad_answers_file_is_a_one_line_error(tmp_path, lines, message):
    data = write_tsv(tmp_path / "MMBench.tsv", circular_rows())
    path = write_lines(tmp_path / "answers.jsonl", lines)
    arguments = ["eval", "score", "--benchmark", "mmbench", "--data", str(data), "--answers", str(path)]
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_unknown_benchmark_lists_the_known_ones(tmp_path):
    arguments = ["eval", "score", "--benchmark", "mmbunch", "--data", "x", "--answers", "y"]
    with pytest.raises(InputError, match=r"no benchmark 'mmbunch'; choose one of generated, mme, mmbench, .*infovqa"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_docs_and_help_name_every_benchmark():
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for text in (page, " ".join(Name.__metadata__[0].help.split())):
        assert all(re.search(rf"(?<!\w){re.escape(name)}(?![\w+])", text) for name in BENCHMARKS)


def test_terminal_output_lists_problems(tmp_path):
    data = write_tsv(tmp_path / "MMBench.tsv", circular_rows())
    path = write_lines(tmp_path / "a.jsonl", [{"id": 7, "answer": "hm"}, {"id": "x", "answer": "A"}])
    arguments = ["eval", "score", "--benchmark", "mmbench", "--data", str(data), "--answers", str(path)]
    printed = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    for part in ("unparsed: 1", "missing: 3", "8, 1000007", "unknown: 1", "perception"):
        assert part in printed


verdicts = st.lists(st.sampled_from(["yes", "no", None]), min_size=1, max_size=12)


@patient
@given(verdicts, st.integers(0, 2**32))
def test_pope_f1_is_between_precision_and_recall(parsed, seed):
    truths = ["yes" if seed >> place & 1 else "no" for place in range(len(parsed))]
    graded = [
        Graded(str(place), (), "", truth, float(truth == found), found)
        for place, (truth, found) in enumerate(zip(truths, parsed, strict=True))
    ]
    found = aggregate.yes_or_no(groups_of(graded))
    assert all(0 <= value <= 1 for value in found.values())
    low, high = sorted((found["precision"], found["recall"]))
    assert low - 1e-9 <= found["f1"] <= high + 1e-9 or found["f1"] == 0


@patient
@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_circular_accuracy_is_at_most_vanilla_accuracy(hits):
    graded = [Graded(f"{place}", (), str(place % 3), "A", float(hit), "A") for place, hit in enumerate(hits)]
    found = aggregate.circular(groups_of(graded))
    assert found["circular"] <= found["vanilla"]


@patient
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_intervals_are_within_the_values_and_repeatable(values):
    low, high = mean_interval(values, resamples=200)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert (low, high) == mean_interval(values, resamples=200)


def test_interval_agrees_with_the_normal_approximation():
    hits = [1.0] * 60 + [0.0] * 40
    low, high = mean_interval(hits)
    spread = 1.96 * (0.6 * 0.4 / 100) ** 0.5
    assert low == pytest.approx(0.6 - spread, abs=0.02)
    assert high == pytest.approx(0.6 + spread, abs=0.02)


def test_every_draw_keeps_the_sizes_of_the_strata():
    values = ["a", "a", "b"]
    seen = set()
    interval(lambda drawn: seen.add(sorted(values[i] for i in drawn)[-1]) or 0.0, values, resamples=50)
    assert seen == {"b"}


def test_llm_judge_grades_free_answers_and_is_required():
    benchmark = BENCHMARKS["mmvet"]
    questions = [Question(str(n), "q", (MissingPicture(""),), ("a<AND>b",), categories=("ocr",)) for n in (1, 2)]
    with pytest.raises(InputError, match="mmvet needs an LLM judge; give `judge_url`"):
        score_answers(benchmark, questions, [{"id": "1", "answer": "a"}])
    scores = {"a": 0.5, "hm": None}
    found = score_answers(
        benchmark,
        questions,
        [{"id": "1", "answer": "a"}, {"id": "2", "answer": "hm"}],
        GradingContext(llm_judge=lambda question, truth, answer: scores[answer]),
    )
    assert found["score"] == 0.25
    assert found["unparsed"] == ["2"]
