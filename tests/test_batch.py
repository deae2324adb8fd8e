"""Files of questions: batched equals single, resumed equals uninterrupted, and bad lines do not affect others."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import fresh, picture
from hypothesis import given
from hypothesis import strategies as st

from convllava import InputError, load
from convllava.checkpoints import write
from convllava.cli.ask import ask
from convllava.inference import Assistant
from convllava.inference.batch import answer_file, read_lines


@pytest.fixture(scope="module")
def model(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    write(*parts, folder)
    return str(folder)


@pytest.fixture
def questions(tmp_path):
    for number in range(3):
        picture(64, 64 * (1 + number), number).save(tmp_path / f"{number}.png")
    lines = [{"image": f"{number % 3}.png", "question": f"what {'red ' * number}?"} for number in range(7)]
    return write_lines(tmp_path / "questions.jsonl", lines)


def write_lines(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(questions, output, model, **settings):
    return answer_file(questions, output, model, **({"max_new_tokens": 5, "batch_size": 3} | settings))


def test_answers_of_a_file_equal_single_questions(questions, model, tmp_path):
    summary = answer(questions, tmp_path / "answers.jsonl", model)
    assert (summary["answered"], summary["errors"], summary["continued"]) == (7, 0, 0)
    assistant = load(model, device="cpu")
    expected = [
        {"id": line.id, "answer": assistant.ask(line.image, line.question, max_new_tokens=5)}
        for line in read_lines(questions)
    ]
    assert entries(tmp_path / "answers.jsonl") == expected


def test_resumed_run_equals_an_uninterrupted_run(questions, model, tmp_path, monkeypatch):
    output = tmp_path / "answers.jsonl"
    answer(questions, output, model)
    whole = output.read_bytes()
    output.write_bytes(whole[: whole.index(b"line 5") + 3])
    assert answer(questions, output, model)["continued"] == 4
    assert output.read_bytes() == whole
    monkeypatch.setattr(Assistant, "encode", None)  # no question is left
    assert answer(questions, output, model)["continued"] == 7


def test_bad_line_gets_an_error_and_others_get_answers(model, tmp_path):
    picture(64, 64).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no image")
    good = {"image": "good.png", "question": "what?"}
    lines = [good, "{", "3", {"id": 7, "image": "good.png"}, {**good, "image": "bad.png"}]
    lines += [{**good, "question": "<image>"}, {**good, "question": "what " * 600}, {**good, "id": "\udead"}]
    lines += [{**good, "id": "last"}, ""]
    output = tmp_path / "deeper" / "answers.jsonl"
    summary = answer(write_lines(tmp_path / "questions.jsonl", lines), output, model)
    assert (summary["answered"], summary["errors"]) == (2, 7)
    found = entries(output)
    ids = ["line 1", "line 2", "line 3", "7", "line 5", "line 6", "line 7", "line 8", "last"]
    assert [entry["id"] for entry in found] == ids
    assert found[0]["answer"] == found[-1]["answer"]
    words = ("JSON", "object", "question", "bad.png", "<image>", "context", "surrogate")
    for entry, word in zip(found[1:-1], words, strict=True):
        assert word in entry["error"]


def test_other_settings_are_rejected_and_the_output_is_kept(questions, model, tmp_path):
    output = tmp_path / "answers.jsonl"
    answer(questions, output, model)
    whole = output.read_bytes()
    with pytest.raises(InputError, match="max_new_tokens was 5 and is 6"):
        answer(questions, output, model, max_new_tokens=6)
    with pytest.raises(InputError, match="another `output`"):
        answer(questions, questions, model)
    assert output.read_bytes() == whole


def test_other_weights_in_the_same_folder_are_rejected(questions, model, tmp_path):
    folder, output = shutil.copytree(model, tmp_path / "model"), tmp_path / "answers.jsonl"
    answer(questions, output, str(folder))
    write(*fresh(), folder)
    with pytest.raises(InputError, match="weights was "):
        answer(questions, output, str(folder))
    shutil.copytree(model, folder, dirs_exist_ok=True)
    assert answer(questions, output, str(folder))["continued"] == 7


@pytest.mark.parametrize(
    ("content", "word"), [("", "no questions"), ('{"id": 1}\n{"id": "1"}\n', "line 2"), ("\udcff", "UTF-8")]
)
def test_unreadable_question_files_are_rejected(content, word, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=word):
        read_lines(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_lines(tmp_path / "missing.jsonl")


@pytest.mark.parametrize("identity", ["true", "null", "1.5", "[]"])
def test_id_is_a_string_or_an_integer(identity, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(f'{{"id": {identity}, "image": "a.png", "question": "what?"}}')
    (line,) = read_lines(path)
    assert (line.id, line.error) == ("line 1", "line 1: the id must be a string or an integer")


@given(st.text().filter(str.strip))
def test_any_line_gives_a_question_or_an_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(text, encoding="utf-8")
    assert all(bool(line.error) != bool(line.question) for line in read_lines(path))


@pytest.mark.parametrize("given", [("image", "questions"), ("image",), ("questions",), ("output",), ()])
def test_incomplete_arguments_of_ask_are_rejected(given, tmp_path):
    with pytest.raises(InputError, match="give either IMAGE and QUESTION, or --input and --output"):
        ask(**dict.fromkeys(given, tmp_path / "a"))
