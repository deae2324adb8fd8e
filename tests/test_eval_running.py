"""A model on a benchmark: the same answers twice, after a kill, in any company; and what cannot be asked."""

from __future__ import annotations

import base64
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
import torch
from benchmark_files import base64_png, circular_rows, parquet_image, png, write_parquet, write_tsv
from conftest import fresh, picture
from typer.testing import CliRunner

from convllava import InputError
from convllava.checkpoints import write
from convllava.cli import app
from convllava.data.collate import encode
from convllava.evaluation.answering import Asking, answer_all, likeliest_letter
from convllava.evaluation.benchmarks import BENCHMARKS
from convllava.evaluation.llm_judge import ChatJudge, score_in
from convllava.evaluation.prompts import check_template, conversation, prompt, templates_of
from convllava.evaluation.readers.sources import load_questions
from convllava.evaluation.results import score
from convllava.evaluation.runner import Options, run
from convllava.evaluation.synthetic import SYNTHETIC, as_report, text_height, world_questions
from convllava.evaluation.synthetic_report import evaluate
from convllava.inference import Assistant, EncodedImage
from convllava.inference.likelihood import log_likelihoods
from convllava.io import ResumableJsonl, write_json
from convllava.synthetic import Turn, World

PLAIN = {"open": "{question}", "choice": "{question} {options}"}


@pytest.fixture(scope="module")
def assistant(parts):
    return Assistant(*parts)


def rows(count: int) -> list[dict]:
    return [
        {
            "index": n,
            "question": f"what is {n}",
            "A": "red",
            "B": "top",
            "answer": "AB"[n % 2],
            "image": base64_png(n // 2),
        }
        for n in range(count)
    ]


def seedbench(tmp_path, count=7):
    return write_tsv(tmp_path / "SEEDBench_IMG.tsv", rows(count))


def run_on(assistant, data, output=None, **options):
    settings = {"batch_size": 2, "max_new_tokens": 4, "timed": 0, "prompt": "{question} {options}"} | options
    return run(BENCHMARKS["seedbench"], "tiny", lambda: assistant, data, Options(**settings), output)


def test_a_run_killed_at_any_byte_continues_to_the_same_result(assistant, tmp_path):
    data = seedbench(tmp_path)
    whole = run_on(assistant, data, tmp_path / "whole")
    answers = (tmp_path / "whole" / "answers.jsonl").read_bytes()
    assert answers.count(b"\n") == 7
    for cut in (0, 1, len(answers) // 2, len(answers) - 1):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / "answers.jsonl").write_bytes(answers[:cut])
        (folder / "settings.json").write_bytes((tmp_path / "whole" / "settings.json").read_bytes())
        again = run_on(assistant, data, folder)
        assert (folder / "answers.jsonl").read_bytes() == answers
        assert again | {"seconds": 0} == whole | {"seconds": 0}


def test_a_finished_run_asks_nothing_again(assistant, tmp_path, monkeypatch):
    data = seedbench(tmp_path)
    run_on(assistant, data, tmp_path / "out")
    monkeypatch.setattr(Assistant, "chat_many", None)
    assert run_on(assistant, data, tmp_path / "out")["questions"] == 7


def test_changed_settings_are_refused_with_the_difference(assistant, tmp_path):
    data = seedbench(tmp_path)
    run_on(assistant, data, tmp_path / "out")
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    with pytest.raises(InputError, match="max_new_tokens was 4 and is 5; choose another `output`"):
        run_on(assistant, data, tmp_path / "out", max_new_tokens=5)
    with pytest.raises(InputError, match="questions was "):
        run_on(assistant, write_tsv(data, rows(6)), tmp_path / "out")
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before


def test_answers_of_other_weights_by_the_same_name_are_refused(assistant, tmp_path):
    data, settings = seedbench(tmp_path), tmp_path / "out" / "settings.json"
    run_on(assistant, data, tmp_path / "out")
    kept = json.loads(settings.read_text())
    with pytest.raises(InputError, match=r"other settings: weights was 'float32 \w+' and is 'float32 \w+'; choose"):
        run_on(Assistant(*fresh()), data, tmp_path / "out")
    settings.write_text(json.dumps({key: value for key, value in kept.items() if key != "weights"}))
    run_on(assistant, data, tmp_path / "out")  # a run that was begun before weights were told apart
    assert json.loads(settings.read_text()) == kept


def test_what_cannot_be_asked_counts_as_wrong_and_is_listed(assistant, tmp_path):
    content = rows(5)
    content[1]["image"] = base64.b64encode(png(3)[:300]).decode()
    content[2]["question"] = "what is <image>"
    content[3]["question"] = "what " * 600
    found = run_on(assistant, write_tsv(tmp_path / "s.tsv", content), tmp_path / "out", batch_size=5)
    reasons = {item["id"]: item["reason"] for item in found["broken"]}
    assert set(reasons) == {"1", "2", "3"}
    assert "row 2 of s.tsv: the image is damaged" in reasons["1"]
    assert "<image>" in reasons["2"]
    assert "context" in reasons["3"]
    assert found["questions"] == 5
    assert [unit["score"] for unit in found["units"]][1:4] == [0, 0, 0]
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0", "1", "2", "3", "4"]
    assert "answer" in lines[4]


def test_each_image_is_encoded_once_while_its_questions_follow_each_other(assistant, tmp_path, monkeypatch):
    questions = load_questions(BENCHMARKS["mmbench"], write_tsv(tmp_path / "m.tsv", circular_rows()[::2]))
    encoded = []
    encode_one = Assistant.encode

    def counting(self, image):
        if not isinstance(image, EncodedImage):
            encoded.append(image)
        return encode_one(self, image)

    monkeypatch.setattr(Assistant, "encode", counting)
    answer_all(assistant, questions, Asking(PLAIN, 2, batch_size=1), ResumableJsonl(None, {}))
    assert len(questions) == 2
    assert len(encoded) == 1


def test_choices_by_likelihood_are_those_of_teacher_forcing(assistant):
    image = picture(64, 128)
    messages = [{"role": "user", "content": "what is red"}]
    requests = [([assistant.encode(image)], messages, answer) for answer in ("A", "B", "the total")]
    found = [likelihood.total for likelihood in log_likelihoods(assistant, requests)]
    for (_, _, answer), likelihood in zip(requests, found, strict=True):
        content = [{"type": "image", "image": image}, {"type": "text", "text": "what is red"}]
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        item = encode(assistant.processor, [{"role": "user", "content": content}, said])
        labels = item.pop("labels")[None]
        inputs = {key: value[None] if key == "input_ids" else value for key, value in item.items()}
        with torch.no_grad():
            loss = assistant.model(**inputs, labels=labels).loss
        assert likelihood == pytest.approx(-loss.item() * (labels != -100).sum().item(), abs=1e-3)
    letters = likeliest_letter(assistant, messages, [assistant.encode(image)], "AB")
    assert letters == "AB"[found[1] > found[0]]


def test_likelihood_leaves_no_choice_unread(assistant, tmp_path):
    found = run_on(assistant, seedbench(tmp_path, 3), choices="likelihood")
    assert found["unparsed"] == found["broken"] == []
    with pytest.raises(InputError, match="--choices is 'random'"):
        run_on(assistant, seedbench(tmp_path, 3), choices="random")


@pytest.mark.parametrize(
    ("choices", "message"), [("bogus", "--choices is 'bogus'; choose one of"), ("likelihood", "have no options")]
)
def test_choices_of_the_generated_world_are_refused(choices, message):
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(app, ["eval", "--model", "nonexistent", "--choices", choices], catch_exceptions=False)


@pytest.mark.parametrize("option", ["--samples 5", "--seed 2", "--size 512", "--simple"])
def test_options_of_the_generated_world_are_refused_for_files(option, tmp_path):
    arguments = ["eval", "--benchmark", "docvqa", "--data", str(tmp_path), *option.split()]
    with pytest.raises(InputError, match="are for the generated world; of a benchmark on files, --limit"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_another_folder_of_images_is_another_run(assistant, tmp_path):
    data = seedbench(tmp_path, 2)
    run_on(assistant, data, tmp_path / "out")
    with pytest.raises(InputError, match=r"images was None and is '.*low'"):
        run_on(assistant, data, tmp_path / "out", images=tmp_path / "low")


def test_prompts_have_options_hints_and_images_where_they_belong(tmp_path):
    questions = load_questions(
        BENCHMARKS["mmbench"], write_tsv(tmp_path / "m.tsv", [circular_rows()[0] | {"hint": "Look."}])
    )
    assert prompt(questions[0], templates_of(BENCHMARKS["mmbench"], None)) == (
        "Look.\nWhat is it?\nA. dog\nB. cat\nAnswer with the option's letter from the given choices directly."
    )
    row = {"id": "validation_Art_1", "question": "Is <image 2> like <image 1>?", "options": "[]", "answer": "no"}
    images = {"image_1": parquet_image(1), "image_2": parquet_image(2)}
    (question,) = load_questions(BENCHMARKS["mmmu"], write_parquet(tmp_path / "m.parquet", [row | images]))
    messages, pictures = conversation(question, {"open": "{question}", "choice": ""})
    assert pictures == [question.pictures[1], question.pictures[0]]
    kinds = [part.get("text", part["type"]) for part in messages[0]["content"]]
    assert kinds == ["Is", "image", "like", "image", "?"]
    for bad in ("no question", "{question} {other}", "{question"):
        with pytest.raises(InputError, match="--prompt"):
            check_template(bad)


def test_questions_about_several_images_are_asked_together(assistant, tmp_path):
    row = {"id": "validation_Art_1", "question": "Is <image 2> like <image 1>?", "options": "[]", "answer": "no"}
    images = {"image_1": parquet_image(1), "image_2": parquet_image(2)}
    data = write_parquet(tmp_path / "m.parquet", [row | images])
    found = run(
        BENCHMARKS["mmmu"], "tiny", lambda: assistant, data, Options(max_new_tokens=3, timed=1, prompt="{question}")
    )
    assert found["broken"] == []
    efficiency = found["efficiency"]
    assert efficiency["visual_tokens"] == 2 * len(assistant.encode(picture(64, 64, 1)).tokens)
    assert efficiency["prompt_tokens"] > efficiency["visual_tokens"]
    assert efficiency["seconds_to_first_token"] > 0
    assert efficiency["peak_memory_mb"] > 0


def test_answers_with_any_separator_are_continued(tmp_path):
    entries = [{"id": str(number), "answer": f"one{chr(number)}two"} for number in (10, 13, 0x1C, 0x85, 0x2028, 0x2029)]
    ResumableJsonl(tmp_path, {}).add(entries)
    assert list(ResumableJsonl(tmp_path, {}).entries.values()) == entries


def test_a_line_that_is_not_utf_8_is_named(tmp_path):
    ResumableJsonl(tmp_path, {}).add([{"id": "1", "answer": "one"}])
    with (tmp_path / "answers.jsonl").open("ab") as file:
        file.write(b'{"id": "\xff"}\n')
    with pytest.raises(InputError, match=r"line 2 of .*answers.jsonl is not UTF-8"):
        ResumableJsonl(tmp_path, {})


def test_what_cannot_be_written_is_one_line(tmp_path):
    journal = ResumableJsonl(tmp_path / "run", {})
    (tmp_path / "run" / "answers.jsonl").mkdir()
    with pytest.raises(InputError, match=r"answers.jsonl cannot be written: Is a directory"):
        journal.add([{"id": "1", "answer": "one"}])
    with pytest.raises(InputError, match=r"a.json cannot be written: No such file"):
        write_json(tmp_path / "nowhere" / "a.json", {})


class Half:
    """Knows the answers to half of the questions about a page, but only while that page is before it."""

    def __init__(self, world: World, count: int) -> None:
        turns = [(page.image.tobytes(), turn) for page in map(world.sample, range(count)) for turn in page.turns]
        self.known = {(image, turn.question): turn.answer for image, turn in turns[::2]}

    def encode(self, image):
        return image

    def _answer(self, image, question):
        return self.known.get((image.tobytes(), question), "none")

    def answer_many(self, questions, batch_size):
        yield [self._answer(image, question) for image, question in questions]

    def chat_many(self, conversations, max_new_tokens):
        return [self._answer(image, messages[0]["content"]) for messages, (image,) in conversations]


def test_the_generated_world_through_a_run_is_that_of_evaluate():
    world = World("heldout", seed=3, size=192, simple=True)
    questions, journal = world_questions(world, 3), ResumableJsonl(None, {})
    assistant: Any = Half(world, 3)
    answer_all(assistant, questions, Asking({"open": "{question}", "choice": ""}, 64, batch_size=3), journal)
    result = score(SYNTHETIC, questions, list(journal.entries.values()))
    report = as_report(result | {"seconds": 0.0}, 3)
    assert report | {"seconds": 0} == evaluate(assistant, world, 3) | {"seconds": 0}
    assert len(result["units"]) == report["overall"]["n"] == len(questions) // 2
    assert report["overall"]["accuracy"] > 0.3 > report["overall"]["blind"]


def test_the_height_of_a_printed_answer_is_that_of_its_tallest_character():
    page = World("heldout", seed=3, size=256, kinds={"sign": 1}).sample(0)
    word = page.glyphs[0].char + page.glyphs[1].char
    tallest = max(glyph.box[3] - glyph.box[1] for glyph in page.glyphs[:2])
    assert text_height(page, Turn("read", "q", word)) == tallest
    assert text_height(page, Turn("read", "q", "§")) is None


class Server(BaseHTTPRequestHandler):
    """Speaks OpenAI's chat protocol; judges by the length of the answer."""

    asked: list[dict] = []
    reply = "0.5"

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        content = json.dumps({"choices": [{"message": {"content": self.reply}}]}).encode()
        self.send_response(200 if self.path == "/v1/chat/completions" else 404)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def address():
    server = HTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_judge_is_asked_over_the_chat_protocol(address):
    judge = ChatJudge(f"{address}/v1/", "grader", pause=0)
    assert judge("How many?", "3 <AND> 4", "three") == 0.5
    request = Server.asked[-1]
    assert request["model"] == "grader"
    assert request["temperature"] == 0
    for part in ("How many?", "3 <AND> 4", "three"):
        assert part in request["messages"][0]["content"]
    with pytest.raises(InputError, match=r"the judge at .*/chat/completions does not answer as expected"):
        ChatJudge(address, "grader", pause=0)("q", "t", "a")
    with pytest.raises(InputError, match="give an http address"):
        ChatJudge("file:///etc/passwd", "grader")


def test_a_judge_is_not_asked_again_about_what_it_has_judged(assistant, tmp_path):
    vet = [{"index": n, "question": f"q{n}", "answer": "a", "category": "ocr", "image": base64_png()} for n in range(3)]
    data, asked = write_tsv(tmp_path / "MMVet.tsv", vet), []

    def judge(question: str, truth: str, answer: str) -> float | None:
        asked.append(question)
        if len(asked) == 3:
            raise InputError("the judge at nowhere does not answer")
        return 0.25

    options = Options(max_new_tokens=2, timed=0, prompt="{question}", judge=judge)
    with pytest.raises(InputError, match="does not answer"):
        run(BENCHMARKS["mmvet"], "tiny", lambda: assistant, data, options, tmp_path / "out")
    assert run(BENCHMARKS["mmvet"], "tiny", lambda: assistant, data, options, tmp_path / "out")["score"] == 0.25
    assert asked == ["q0", "q1", "q2", "q2"]


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("0.7", 0.7),
        (" Score: 1.0\n", 1.0),
        ("1", 1.0),
        ("0", 0.0),
        ("good", None),
        ("7", None),
        ("7/10", None),
        ("", None),
    ],
)
def test_a_judges_reply_is_a_share_or_nothing(reply, score):
    assert score_in(reply) == score


def test_the_command_runs_one_benchmark_or_all_of_a_folder(parts, tmp_path):
    write(*parts, tmp_path / "model", recipe="name: mine\n")
    (tmp_path / "data").mkdir()
    seedbench(tmp_path / "data", 3)
    vet = [{"index": 1, "question": "q", "answer": "a", "category": "ocr", "image": base64_png()}]
    write_tsv(tmp_path / "data" / "MMVet.tsv", vet)
    common = ["eval", "--model", tmp_path / "model", "--max-new-tokens", "2", "--timed", "1", "--prompt", "{question}"]
    arguments = [*common, "--benchmark", "all", "--data", tmp_path / "data", "--output", tmp_path / "out", "--json"]
    finished = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    found = json.loads(finished.stdout)
    assert list(found["benchmarks"]) == ["seedbench"]
    assert "needs a judge" in found["refused"]["mmvet"]
    result = json.loads((tmp_path / "out" / "seedbench" / "result.json").read_text())
    assert result == found["benchmarks"]["seedbench"]
    assert result["model"]["recipe"] == {"name": "mine"}
    assert result["prompts"]["choice"] == "{question}"
    assert set(result["model"]["parameters"]) == {"tower", "projector", "language"}
    printed = CliRunner().invoke(app, list(map(str, arguments[:-1])), catch_exceptions=False).stdout
    assert "mmvet was not run" in printed
    with pytest.raises(InputError, match="--data is missing"):
        CliRunner().invoke(app, ["eval", "--benchmark", "mme"], catch_exceptions=False)
    with pytest.raises(InputError, match="no benchmark 'mne'"):
        CliRunner().invoke(app, ["eval", "--benchmark", "mne"], catch_exceptions=False)
    with pytest.raises(InputError, match="--judge-url and --judge-model go together"):
        CliRunner().invoke(app, ["eval", "--judge-url", "http://x"], catch_exceptions=False)
