"""The demo, the bundled weights, and the examples in the README."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import fresh
from PIL import Image

import convllava
from convllava import InputError
from convllava.checkpoints import SHIPPED, write
from convllava.evaluation import evaluate
from convllava.evaluation.demo import DEMO_SEED, PAGE_SIZE, PAGES, run_demo
from convllava.synthetic import World

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_WEIGHTS = 16_000_000
"""Limit in bytes for the weights in the package."""


def test_demo_equals_the_generated_benchmark_and_draws_a_picture(tmp_path, capsys):
    write(*fresh(), tmp_path / "model")
    run_demo(str(tmp_path / "model"), tmp_path / "out", samples=3)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    again = evaluate(tmp_path / "model", samples=3, seed=DEMO_SEED, size=PAGE_SIZE, batch_size=64, timed=0)
    times = ("seconds", "versions")
    assert {key: report[key] for key in report if key not in times} == {
        key: again[key] for key in again if key not in times
    }
    printed = capsys.readouterr().out
    assert f"{report['overall']['accuracy']:.1%}" in printed
    assert all(task in printed for task in report["tasks"])
    picture = Image.open(tmp_path / "out" / "answers.png")
    pages = [Image.open(page) for page in PAGES.glob("*.png")]
    assert len(pages) == 2
    assert picture.width > sum(page.width for page in pages)
    assert picture.height > max(page.height for page in pages)


def test_invalid_output_is_rejected_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("convllava.evaluation.demo.load", lambda model: None)
    monkeypatch.setattr("convllava.evaluation.demo.evaluate", None)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file cannot be a folder"):
        run_demo("tiny", tmp_path / "file", samples=3)


def test_every_example_page_has_three_questions():
    for page in PAGES.glob("*.png"):
        assert len(json.loads(page.with_suffix(".json").read_text())) == 3


def test_shipped_weights_are_small_half_precision_safetensors():
    weights = SHIPPED / "tiny" / "model.safetensors"
    assert weights.stat().st_size <= MAX_WEIGHTS
    assert json.loads((SHIPPED / "tiny" / "config.json").read_text())["dtype"] in ("bfloat16", "float16")


def test_shipped_weights_use_the_image():
    """On held-out scenes, accuracy is above blind accuracy by four standard errors."""
    world = World("heldout", seed=11, size=448, kinds={"scene": 1})
    result = evaluate("tiny", world=world, samples=50, batch_size=64, timed=0)
    seen, blind, count = (result["overall"][key] for key in ("accuracy", "blind", "n"))
    spread = ((seen * (1 - seen) + blind * (1 - blind)) / count) ** 0.5
    assert seen - blind > 4 * spread, result


def test_readme_python_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) <= 7
    exec(compile(code, "README.md", "exec"), {})
    printed, model = capsys.readouterr().out, convllava.load("tiny")
    questions = re.findall(r'\("(\S+\.png)", "([^"]+)"\)', code)
    assert questions
    for image, question in questions:
        assert model.ask(image, question) in printed


def test_readme_commands_are_makefile_targets():
    (commands,) = re.findall(r"```\n(make .*?)```", README, re.DOTALL)
    for line in commands.strip().splitlines():
        command = shlex.split(line.split("#")[0])
        planned = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert planned.stdout
