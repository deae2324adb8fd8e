"""The command line in a separate process, as a user runs it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from conftest import picture
from PIL import Image

from convllava.checkpoints import write

COMMAND = Path(sys.executable).parent / "convllava"
QUICK = str(Path(__file__).parent.parent / "recipes" / "tiny-quick.yaml")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(COMMAND), *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def model(parts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    write(*parts, folder)
    return folder


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['convllava', '--help']\n"
        "from convllava.cli import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    for command in ("ask", "demo", "train", "eval"):
        assert command in finished.stdout


def test_import_is_light_and_registers_the_auto_classes():
    light = "import sys, convllava; assert not {'torch', 'transformers'} & set(sys.modules)"
    registered = (
        "import convllava; convllava.ConvLlavaProcessor\n"
        "from transformers import AutoConfig; assert AutoConfig.for_model('convllava').model_type == 'convllava'"
    )
    for code in (
        light,
        registered,
        registered.replace("convllava; convllava.ConvLlavaProcessor", "convllava.model.auto"),
    ):
        subprocess.run([sys.executable, "-c", code], check=True)
    trace = [sys.executable, "-X", "importtime", "-m", "convllava", "--version"]
    assert "transformers" not in subprocess.run(trace, capture_output=True, text=True, check=True).stderr


def test_ask_prints_the_same_answer_as_json(model, tmp_path):
    picture(64, 128).save(tmp_path / "a.png")
    plain = run("ask", tmp_path / "a.png", "what?", "--model", model, "--max-new-tokens", 5)
    assert plain.returncode == 0, plain.stderr
    report = json.loads(run("ask", tmp_path / "a.png", "what?", "-m", model, "--max-new-tokens", 5, "--json").stdout)
    assert plain.stdout == report["answer"] + "\n"
    assert report["image_size"] == [128, 64]


def test_ask_answers_a_file_and_counts_errors(model, tmp_path):
    picture(64, 128).save(tmp_path / "a.png")
    lines = [json.dumps({"image": name, "question": "what?"}) for name in ("a.png", "b.png")]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    summary = json.loads(run("ask", *files, "--model", model, "--max-new-tokens", 5, "--json").stdout)
    assert (summary["answered"], summary["errors"]) == (1, 1)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert_rejected(run("ask", tmp_path / "a.png", *files), "IMAGE and QUESTION")


def test_bad_images_give_one_line_and_exit_code_two(model, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (30000, 1)).save(tmp_path / "thin.png")
    Image.new("1", (20000, 10000)).save(tmp_path / "huge.png")
    picture(64, 64).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    for name in ("missing.png", "text.png", "thin.png", "huge.png", "cut.png"):
        assert_rejected(run("ask", tmp_path / name, "what?", "--model", model), name)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("ask", "a.png", "what?", "--model", "tinny"), "tinny"),
        (("train", "nowhere.yaml", "--output", "OUT"), "nowhere.yaml"),
        (("train", QUICK, "--output", "OUT", "--set", "stages.dense.stepps=3"), "steps"),
        (("train", QUICK, "--dry-run", "--max-steps", "3"), "--max-steps have no effect with --dry-run"),
        (("demo", "--model", "tinny", "--output", "OUT"), "tinny"),
    ],
)
def test_bad_arguments_give_one_line_and_exit_code_two(arguments, word, tmp_path):
    assert_rejected(run(*(str(tmp_path / "out") if argument == "OUT" else argument for argument in arguments)), word)
    assert not (tmp_path / "out").exists()


def test_unknown_option_gives_exit_code_two():
    assert run("ask", "--frobnicate").returncode == 2


def assert_rejected(finished: subprocess.CompletedProcess[str], word: str) -> None:
    assert finished.returncode == 2, finished.stderr
    assert finished.stdout == ""
    assert finished.stderr.startswith("convllava: ")
    assert finished.stderr.count("\n") == 1, finished.stderr
    assert word in finished.stderr


def test_eval_prints_a_table_or_the_same_report_as_json(model):
    arguments = ("eval", "--model", str(model), "--samples", "2", "--simple", "--size", "192")
    report = json.loads(run(*arguments, "--json").stdout)
    assert report["samples"] == 2
    assert sum(score["n"] for score in report["tasks"].values()) == report["overall"]["n"] > 0
    printed = run(*arguments).stdout
    assert all(task in printed for task in report["tasks"])
    assert f"{report['overall']['accuracy']:.1%}" in printed


def test_short_side_mode_keeps_the_aspect_ratio(model, tmp_path):
    picture(64, 190).save(tmp_path / "a.png")
    options = ("--model", model, "--max-new-tokens", 2, "--json", "--image-mode", "short_side", "--short-side", 128)
    report = json.loads(run("ask", tmp_path / "a.png", "what?", *options).stdout)
    assert report["resized_to"] == [384, 128]
    assert_rejected(run("ask", tmp_path / "a.png", "what?", "--short-side", "128"), "--image-mode short_side")


@pytest.mark.parametrize("side", [768, 1024, 1536])
def test_dry_run_counts_the_trained_parameters_of_the_paper(side):
    recipe = Path(__file__).parent.parent / "recipes" / "paper" / f"{side}.yaml"
    finished = run("train", recipe, "--dry-run", "--json")
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["image"] == {"side": side, "visual_tokens": (side // 64) ** 2}
    stage5 = 6 * 3072 * (49 + 1 + 2 + 4 * 3072 * 2 + 4 + 1 + 1) + 2 * 1536 + (4 * 1536 + 1) * 3072
    projector = (3072 + 1) * 4096 + (4096 + 1) * 4096
    language = 6_738_415_616  # Llama 7B
    stages = report["stages"]
    assert [stage["trained"] for stage in stages][::2] == [stage5 + projector, projector + language]
    assert set(stages[1]["learning_rates"]) == {"stage3", "stage4", "stage5", "projector", "language_model"}
    assert [(stage["batch_size"], stage["epochs"]) for stage in stages] == [(256, 1), (256, 1), (128, 1)]
    assert "data/llava/llava_v1_5_mix665k.json" in report["missing"]
    assert "missing: data/vflan/annotation_191-task_1k.json" in run("train", recipe, "--dry-run").stdout


def test_train_rejects_a_missing_output_and_dry_run_options():
    assert_rejected(run("train", QUICK), "--output is missing")
    assert_rejected(run("train", QUICK, "--output", "out", "--json"), "--json needs --dry-run")
    assert_rejected(run("train", QUICK, "--output", "out", "--processes", "4"), "--processes needs --dry-run")


def ask_until_rejected(client: openai.OpenAI, asked: dict) -> None:
    while True:
        client.chat.completions.create(**asked, max_tokens=1)


def test_server_finishes_running_answers_after_sigterm(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "convllava", "serve", "--port", "0"], stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None
        line = next(line for line in server.stderr if line.startswith("serving"))
        client = openai.OpenAI(base_url=line.split()[-1], api_key="any", max_retries=0)
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "what?"}]}
        pieces = client.chat.completions.create(**asked, stream=True, n=8, temperature=2, max_tokens=60, seed=1)
        next(pieces)
        server.send_signal(signal.SIGTERM)
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            ask_until_rejected(client, asked)
        ends = [choice.finish_reason for piece in pieces for choice in piece.choices if choice.finish_reason]
        assert len(ends) == 8
        assert server.wait(20) == 0
