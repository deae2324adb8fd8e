"""The progress bar: the loss that it shows, and the held-out loss that it prints."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from convllava.training.logging import ProgressBar


def printed_lines(monkeypatch, capsys, logs: list[dict[str, float]]) -> list[str]:
    """Return the lines that a bar without a terminal prints if every step comes a minute after the previous one."""
    clock = iter(range(0, 60 * len(logs) + 60, 60))
    monkeypatch.setattr("convllava.training.logging.time", SimpleNamespace(monotonic=lambda: next(clock)))
    bar = ProgressBar("0-chat", {"samples": 8})
    bar.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=len(logs)), None)
    for step, log in enumerate(logs, start=1):
        bar.on_log(None, SimpleNamespace(global_step=step, max_steps=len(logs)), None, log)
    bar.stop()
    return [line for line in capsys.readouterr().out.splitlines() if line]


def test_shown_loss_is_a_moving_average_without_bias(monkeypatch, capsys):
    losses = [10.0, *[1.0] * 30]
    lines = printed_lines(monkeypatch, capsys, [{"loss": loss} for loss in losses])
    shown = [float(line.split("loss ")[1].split()[0]) for line in lines]
    sums = [sum(0.98 ** (step - i) * 0.02 * loss for i, loss in enumerate(losses[: step + 1])) for step in range(31)]
    expected = [total / (1 - 0.98 ** (step + 1)) for step, total in enumerate(sums)]
    assert shown == pytest.approx(expected, abs=5e-4)
    assert shown[0] == 10.0
    assert shown[-1] < 1.5


def test_held_out_loss_is_printed_when_it_is_measured(monkeypatch, capsys):
    lines = printed_lines(monkeypatch, capsys, [{"loss": 2.0}, {"eval_loss": 1.2345}, {"loss": 1.0}])
    assert lines[1] == "0-chat step 2: eval_loss 1.234"
    assert len(lines) == 3
