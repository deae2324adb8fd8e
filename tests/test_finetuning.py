"""The commands of docs/finetuning.md work, with fewer steps and smaller images."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from convllava.cli import app

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/finetuning.md").read_text(encoding="utf-8")
QUICK = "--set stages.lora.pixels.min_pixels=65536 --max-steps 20 --set stages.lora.evaluation.every=10"


def test_walkthrough_lowers_the_loss_and_writes_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(code, "finetuning.md", "exec"), {})
    (commands,) = re.findall(r"```\n(convllava train.*?)```", TEXT, re.DOTALL)
    train, ask, merge = (shlex.split(line)[1:] for line in commands.strip().splitlines())
    for command in ([*train, *shlex.split(QUICK)], ask, merge):
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    log = [json.loads(line) for line in Path("runs/mine/log.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert losses[-1] < 0.5 * log[0]["loss"]
    assert (tmp_path / "runs/mine/merged/model.safetensors").exists()
    assert not (tmp_path / "runs/mine/0-lora/model.safetensors").exists()
