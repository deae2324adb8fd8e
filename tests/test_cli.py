"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import picture
from PIL import Image

from convllava.checkpoints import write

COMMAND = Path(sys.executable).parent / "convllava"


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


def test_ask_streams_the_answer_and_json_has_the_same(model, tmp_path):
    picture(64, 128).save(tmp_path / "a.png")
    plain = run("ask", tmp_path / "a.png", "what?", "--model", model, "--max-new-tokens", 5)
    assert plain.returncode == 0, plain.stderr
    report = json.loads(run("ask", tmp_path / "a.png", "what?", "-m", model, "--max-new-tokens", 5, "--json").stdout)
    assert plain.stdout == report["answer"] + "\n"
    assert report["image_size"] == [128, 64]


def test_bad_images_are_one_line_and_exit_code_two(model, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (30000, 1)).save(tmp_path / "thin.png")
    Image.new("1", (20000, 10000)).save(tmp_path / "huge.png")
    picture(64, 64).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    for name in ("missing.png", "text.png", "thin.png", "huge.png", "cut.png"):
        refusal(run("ask", tmp_path / name, "what?", "--model", model), name)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("ask", "a.png", "what?", "--model", "tinny"), "tinny"),
        (("train", "nowhere.yaml", "--output", "out"), "nowhere.yaml"),
        (("train", "recipes/tiny-quick.yaml", "--output", "out", "--set", "stages.dense.stepps=3"), "steps"),
        (("demo", "--model", "tinny", "--output", "out"), "tinny"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_two(arguments, word):
    refusal(run(*arguments), word)
    assert not Path("out").exists()


def test_an_unknown_option_is_exit_code_two():
    assert run("ask", "--frobnicate").returncode == 2


def refusal(finished: subprocess.CompletedProcess[str], word: str) -> None:
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
