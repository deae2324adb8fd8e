"""Running benchmarks: interrupted runs, failed questions, generated pages, LLM judges."""

from __future__ import annotations

import base64
import json
import sys
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
from convllava.evaluation import evaluate
from convllava.evaluation.benchmarks import BENCHMARKS
from convllava.evaluation.columns import load_questions
from convllava.evaluation.llm_judge import ChatJudge, parse_score
from convllava.evaluation.questions import check_template, conversation, prompt
from convllava.evaluation.results import read_result
from convllava.evaluation.runner import answer_all, likeliest_letter
from convllava.evaluation.synthetic import text_height
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


def run_on(assistant, data, output=None, benchmark="seedbench", **options):
    settings = {"batch_size": 2, "max_new_tokens": 4, "timed": 0, "prompt": "{question} {options}"} | options
    return evaluate(assistant, benchmark, data, output=output, **settings).content


def test_run_killed_at_any_byte_continues_to_the_same_result(assistant, tmp_path):
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


def test_finished_run_repeats_no_question(assistant, tmp_path, monkeypatch):
    data = seedbench(tmp_path)
    run_on(assistant, data, tmp_path / "out")
    monkeypatch.setattr(Assistant, "chat_many", None)
    assert run_on(assistant, data, tmp_path / "out")["questions"] == 7


def test_changed_settings_are_rejected_with_the_difference(assistant, tmp_path):
    data = seedbench(tmp_path)
    run_on(assistant, data, tmp_path / "out")
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    with pytest.raises(InputError, match="max_new_tokens was 4 and is 5; choose another `output`"):
        run_on(assistant, data, tmp_path / "out", max_new_tokens=5)
    with pytest.raises(InputError, match="questions was "):
        run_on(assistant, write_tsv(data, rows(6)), tmp_path / "out")
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before


def test_run_with_other_weights_is_rejected(assistant, tmp_path):
    data, settings = seedbench(tmp_path), tmp_path / "out" / "settings.json"
    run_on(assistant, data, tmp_path / "out")
    kept = json.loads(settings.read_text())
    with pytest.raises(InputError, match=r"other settings: weights was 'float32 \w+' and is 'float32 \w+'; choose"):
        run_on(Assistant(*fresh()), data, tmp_path / "out")
    settings.write_text(json.dumps({key: value for key, value in kept.items() if key != "weights"}))
    run_on(assistant, data, tmp_path / "out")  # a run of an earlier version, which did not record the weights
    assert json.loads(settings.read_text()) == kept


def test_failed_question_counts_as_wrong_and_is_listed(assistant, tmp_path):
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


def test_image_of_consecutive_questions_is_encoded_once(assistant, tmp_path, monkeypatch):
    questions = load_questions(BENCHMARKS["mmbench"], write_tsv(tmp_path / "m.tsv", circular_rows()[::2]))
    encoded = []
    encode_one = Assistant.encode

    def counting(self, image):
        if not isinstance(image, EncodedImage):
            encoded.append(image)
        return encode_one(self, image)

    monkeypatch.setattr(Assistant, "encode", counting)
    answer_all(assistant, questions, ResumableJsonl(None, {}), PLAIN, 2, batch_size=1)
    assert len(questions) == 2
    assert len(encoded) == 1


def test_choices_by_likelihood_equal_teacher_forcing(assistant):
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


def test_likelihood_leaves_no_choice_unparsed(assistant, tmp_path):
    found = run_on(assistant, seedbench(tmp_path, 3), choices="likelihood")
    assert found["unparsed"] == found["broken"] == []
    with pytest.raises(InputError, match="`choices` is 'random'"):
        run_on(assistant, seedbench(tmp_path, 3), choices="random")


@pytest.mark.parametrize(
    ("choices", "message"), [("bogus", "`choices` is 'bogus'; choose one of"), ("likelihood", "have no options")]
)
def test_choices_are_rejected_for_generated_pages(choices, message):
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(app, ["eval", "--model", "nonexistent", "--choices", choices], catch_exceptions=False)


@pytest.mark.parametrize("option", ["--samples 5", "--seed 2", "--size 512", "--simple"])
def test_options_of_generated_pages_are_rejected_for_files(option, tmp_path):
    arguments = ["eval", "--benchmark", "docvqa", "--data", str(tmp_path), *option.split()]
    with pytest.raises(InputError, match="are for generated pages; for a benchmark on files, `limit`"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("benchmark", "settings", "message"),
    [
        ("generated", {"world": World(), "seed": 2}, "`world` has its own seed"),
        ("generated", {"data": "x"}, "`data`, .* are for benchmarks on files"),
        ("generated", {"pixels": {"mode": "square"}}, "`pixels` has no effect on a model that is already loaded"),
        ("seedbench", {}, "`data` is missing: give the file or folder of seedbench"),
        ("seedbench", {"data": "x", "world": World()}, "are for generated pages"),
    ],
)
def test_arguments_without_effect_are_rejected(assistant, benchmark, settings, message):
    with pytest.raises(InputError, match=message):
        evaluate(assistant, benchmark, **{"samples": 2} | settings if benchmark == "generated" else settings)


@pytest.mark.parametrize(
    ("package", "benchmark", "settings"),
    [
        ("rapidfuzz.distance", "docvqa", {}),
        ("openai", "mmvet", {"judge_url": "http://localhost", "judge_model": "grader"}),
    ],
)
def test_missing_package_is_reported_before_the_run(monkeypatch, package, benchmark, settings):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"needs .*pip install 'convllava\[eval\]'"):
        evaluate("nonexistent", benchmark, "nowhere", **settings)


def test_evaluate_prints_nothing(assistant, tmp_path, capsys):
    run_on(assistant, seedbench(tmp_path, 2), tmp_path / "out")
    assert capsys.readouterr().out == ""


def test_another_image_folder_is_another_run(assistant, tmp_path):
    data = seedbench(tmp_path, 2)
    run_on(assistant, data, tmp_path / "out")
    with pytest.raises(InputError, match=r"images was None and is '.*low'"):
        run_on(assistant, data, tmp_path / "out", images=tmp_path / "low")


def test_prompts_contain_options_hints_and_images_in_place(tmp_path):
    questions = load_questions(
        BENCHMARKS["mmbench"], write_tsv(tmp_path / "m.tsv", [circular_rows()[0] | {"hint": "Look."}])
    )
    assert prompt(questions[0], BENCHMARKS["mmbench"].templates()) == (
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
        with pytest.raises(InputError, match="`prompt`"):
            check_template(bad)


def test_efficiency_of_a_question_counts_all_its_images(assistant, tmp_path):
    row = {"id": "validation_Art_1", "question": "Is <image 2> like <image 1>?", "options": "[]", "answer": "no"}
    images = {"image_1": parquet_image(1), "image_2": parquet_image(2)}
    data = write_parquet(tmp_path / "m.parquet", [row | images])
    found = run_on(assistant, data, benchmark="mmmu", max_new_tokens=3, timed=1, prompt="{question}")
    assert found["broken"] == []
    efficiency = found["efficiency"]
    assert efficiency["visual_tokens"] == 2 * len(assistant.encode(picture(64, 64, 1)).tokens)
    assert efficiency["prompt_tokens"] > efficiency["visual_tokens"]
    assert efficiency["seconds_to_first_token"] > 0
    assert efficiency["peak_memory_mb"] > 0


def test_answers_with_any_line_separator_are_read_back(tmp_path):
    entries = [{"id": str(number), "answer": f"one{chr(number)}two"} for number in (10, 13, 0x1C, 0x85, 0x2028, 0x2029)]
    ResumableJsonl(tmp_path, {}).add(entries)
    assert list(ResumableJsonl(tmp_path, {}).entries.values()) == entries


def test_invalid_utf_8_line_is_named(tmp_path):
    ResumableJsonl(tmp_path, {}).add([{"id": "1", "answer": "one"}])
    with (tmp_path / "answers.jsonl").open("ab") as file:
        file.write(b'{"id": "\xff"}\n')
    with pytest.raises(InputError, match=r"line 2 of .*answers.jsonl is not UTF-8"):
        ResumableJsonl(tmp_path, {})


def test_failed_write_is_a_one_line_error(tmp_path):
    journal = ResumableJsonl(tmp_path / "run", {})
    (tmp_path / "run" / "answers.jsonl").mkdir()
    with pytest.raises(InputError, match=r"answers.jsonl cannot be written: Is a directory"):
        journal.add([{"id": "1", "answer": "one"}])
    with pytest.raises(InputError, match=r"a.json cannot be written: No such file"):
        write_json(tmp_path / "nowhere" / "a.json", {})


class Scripted:
    """A model stub: `answer` computes an answer from the image and the question."""

    def __init__(self, parts, answer) -> None:
        self.model, self.processor = parts
        self.answer = answer

    def encode(self, image):
        return image

    def chat_many(self, conversations, max_new_tokens):
        return [self.answer(image, messages[0]["content"]) for messages, (image,) in conversations]


def oracle(world: World, samples: int, step: int = 1) -> Any:
    """Return a function that answers every question, or every second one, but only about the right page."""
    turns = [(page.image.tobytes(), turn) for page in map(world.sample, range(samples)) for turn in page.turns]
    known = {(image, turn.question): turn.answer for image, turn in turns[::step]}
    return lambda image, question: known.get((image.tobytes(), question), "none")


def test_oracle_scores_1_on_generated_pages_and_0_blind(parts):
    world = World("heldout", seed=3, size=256)
    result = evaluate(Scripted(parts, oracle(world, 12)), world=world, samples=12, timed=0)  # type: ignore[arg-type]
    assert result.score == result["overall"]["accuracy"] == 1.0
    assert result["overall"]["blind"] == 0.0
    assert result["overall"]["n"] == sum(score["n"] for score in result["tasks"].values()) > 30
    assert len(result["units"]) == result["overall"]["n"] == result["questions"] // 2


def test_generated_pages_are_scored_by_task_as_counted_by_hand(parts, tmp_path):
    world = World("heldout", seed=3, size=192, simple=True)
    assistant: Any = Scripted(parts, answer := oracle(world, 3, step=2))
    result = evaluate(assistant, seed=3, size=192, simple=True, samples=3, timed=0, batch_size=3, output=tmp_path)
    pages = [world.sample(index) for index in range(3)]
    hits, blind = {}, {}
    for page, following in zip(pages, [*pages[1:], pages[0]], strict=True):
        for turn in page.turns:
            hits.setdefault(turn.task, []).append(answer(page.image, turn.question) == turn.answer)
            blind.setdefault(turn.task, []).append(answer(following.image, turn.question) == turn.answer)
    assert set(result["tasks"]) == set(hits)
    for task, score in result["tasks"].items():
        count = len(hits[task])
        assert score == {
            "accuracy": round(sum(hits[task]) / count, 4),
            "blind": round(sum(blind[task]) / count, 4),
            "n": count,
        }
    assert result["overall"]["accuracy"] > 0.3 > result["overall"]["blind"]
    assert read_result(tmp_path).content == result.content
    with pytest.raises(InputError, match="`samples` must be 2 or more"):
        evaluate(assistant, samples=1)


def test_synthetic_is_another_name_of_generated(parts, tmp_path):
    world = World("heldout", seed=3, size=192, simple=True)
    assistant: Any = Scripted(parts, oracle(world, 2))
    result = evaluate(assistant, "synthetic", samples=2, world=world, timed=0)
    assert result["benchmark"] == "generated"
    result.content["benchmark"] = "synthetic"  # as older versions wrote it
    result.save(tmp_path / "old.json")
    assert read_result(tmp_path / "old.json")["benchmark"] == "generated"


def test_text_height_is_the_height_of_the_tallest_character():
    page = World("heldout", seed=3, size=256, kinds={"sign": 1}).sample(0)
    word = page.glyphs[0].char + page.glyphs[1].char
    tallest = max(glyph.box[3] - glyph.box[1] for glyph in page.glyphs[:2])
    assert text_height(page, Turn("read", "q", word)) == tallest
    assert text_height(page, Turn("read", "q", "§")) is None


class Server(BaseHTTPRequestHandler):
    """A server with OpenAI's chat protocol. The first requests get the status codes in `busy`."""

    requests: list[dict] = []
    busy: list[int] = []

    def do_POST(self) -> None:
        self.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        content = json.dumps({"choices": [{"message": {"content": "0.5"}}]}).encode()
        status = self.busy.pop() if self.busy else 200
        self.send_response(status if self.path == "/v1/chat/completions" else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("retry-after-ms", "1")
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


def test_llm_judge_gets_requests_in_the_chat_protocol(address):
    judge = ChatJudge(f"{address}/v1/", "grader")
    assert judge("How many?", "3 <AND> 4", "three") == 0.5
    request = Server.requests[-1]
    assert request["model"] == "grader"
    assert request["temperature"] == 0
    for part in ("How many?", "3 <AND> 4", "three"):
        assert part in request["messages"][0]["content"]
    with pytest.raises(InputError, match=r"the LLM judge at .* does not answer as expected"):
        ChatJudge(address, "grader")("q", "t", "a")
    with pytest.raises(InputError, match="give an http address"):
        ChatJudge("file:///etc/passwd", "grader")


def test_requests_to_a_busy_llm_judge_are_repeated(address, monkeypatch):
    monkeypatch.setattr(Server, "busy", [503, 429])
    before = len(Server.requests)
    assert ChatJudge(f"{address}/v1", "grader")("q", "t", "a") == 0.5
    assert len(Server.requests) == before + 3
    monkeypatch.setattr(Server, "busy", [503] * 9)
    with pytest.raises(InputError, match=r"does not answer as expected: .*503"):
        ChatJudge(f"{address}/v1", "grader")("q", "t", "a")


def test_killed_run_repeats_no_finished_judgement(assistant, tmp_path):
    vet = [{"index": n, "question": f"q{n}", "answer": "a", "category": "ocr", "image": base64_png()} for n in range(3)]
    data, asked = write_tsv(tmp_path / "MMVet.tsv", vet), []

    def judge(question: str, truth: str, answer: str) -> float | None:
        asked.append(question)
        if len(asked) == 3:
            raise InputError("the LLM judge does not answer")
        return 0.25

    settings: Any = {
        "max_new_tokens": 2,
        "timed": 0,
        "prompt": "{question}",
        "judge": judge,
        "output": tmp_path / "out",
    }
    with pytest.raises(InputError, match="does not answer"):
        evaluate(assistant, "mmvet", data, **settings)
    assert evaluate(assistant, "mmvet", data, **settings).score == 0.25
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
def test_reply_of_an_llm_judge_is_a_share_or_none(reply, score):
    assert parse_score(reply) == score


def test_eval_command_runs_every_benchmark_of_a_folder(parts, tmp_path):
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
    assert "needs an LLM judge" in found["refused"]["mmvet"]
    result = json.loads((tmp_path / "out" / "seedbench" / "result.json").read_text())
    assert result == found["benchmarks"]["seedbench"]
    assert result["model"]["recipe"] == {"name": "mine"}
    assert result["prompts"]["choice"] == "{question}"
    assert set(result["model"]["parameters"]) == {"tower", "projector", "language"}
    printed = CliRunner().invoke(app, list(map(str, arguments[:-1])), catch_exceptions=False).stdout
    assert "mmvet was not run" in printed
    with pytest.raises(InputError, match="`data` is missing"):
        CliRunner().invoke(app, ["eval", "--benchmark", "mme"], catch_exceptions=False)
    with pytest.raises(InputError, match="no benchmark 'mne'"):
        CliRunner().invoke(app, ["eval", "--benchmark", "mne"], catch_exceptions=False)
    with pytest.raises(InputError, match="`judge_url` and `judge_model` go together"):
        CliRunner().invoke(app, ["eval", "--judge-url", "http://x"], catch_exceptions=False)
