"""Measurements: counts that are exact, and reports that programs can read. No test looks at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from conftest import fresh
from serving import serving as serving_here
from serving import until
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, LlamaConfig
from typer.testing import CliRunner

from convllava import ConvLlavaVisionConfig, InputError, load
from convllava.bench import decoding, report, servers, serving, suites
from convllava.bench import reading as data
from convllava.bench.settings import Settings
from convllava.bench.timing import peak_memory, side_by_side
from convllava.cli import app
from convllava.costs import prefill_flops, projector_flops, tower_flops
from convllava.geometry import Size
from convllava.inspection import language_models, towers
from convllava.modeling import ConvLlavaForConditionalGeneration


@pytest.mark.parametrize("name", ["T", "S", "B", "L"])
@pytest.mark.parametrize("size", [Size(64, 64), Size(768, 1024)])
def test_operations_of_towers_are_those_that_torch_counts(name, size):
    from convllava import ConvLlavaVisionModel

    with torch.device("meta"):
        model = ConvLlavaVisionModel(towers()[name])
        pixels = torch.empty(1, 3, *size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixels)
    assert tower_flops(towers()[name], size) == counter.get_total_flops()


def test_operations_of_six_stages_and_of_other_patches():
    config = ConvLlavaVisionConfig(depths=[1, 2, 1, 1, 1, 1], hidden_sizes=[8, 8, 8, 16, 16, 16], patch_size=2)
    from convllava import ConvLlavaVisionModel

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ConvLlavaVisionModel(config)(torch.zeros(1, 3, 128, 64))
    assert tower_flops(config, Size(128, 64)) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["135m", "0.5b", "7b"])
def test_operations_of_language_models_are_those_that_torch_counts(name):
    config = LlamaConfig(**language_models()[name])
    with torch.device("meta"):
        model = AutoModel.from_config(config)
        prompt = torch.empty(1, 40, config.hidden_size)
        mask = torch.empty(1, 1, 40, 40, dtype=torch.bool)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs_embeds=prompt, attention_mask=mask, use_cache=False)
    assert prefill_flops(config, 40) == counter.get_total_flops()


def test_operations_of_the_projector():
    model: ConvLlavaForConditionalGeneration = fresh(row_separator=False, coordinate_embedding=False)[0]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.get_image_features(torch.zeros(1, 3, 128, 128))
    assert counter.get_total_flops() == tower_flops(model.config.vision_config, Size(128, 128)) + projector_flops(
        32, 32, 4
    )


def test_turns_are_taken_and_the_first_call_does_not_count():
    calls = []
    found = side_by_side({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert set(found) == {"a", "b"}


def test_peak_memory_sees_what_is_freed_again():
    def work() -> None:
        torch.ones(50 * 2**20 // 4)

    assert 45 < peak_memory(work) < 60


def test_every_suite_fills_its_rows(monkeypatch, tmp_path):
    small = ConvLlavaVisionConfig(depths=[1] * 5, hidden_sizes=[8] * 5)
    monkeypatch.setattr(suites, "towers", lambda: {"T": small})
    monkeypatch.setattr(suites, "SMALL", small)
    monkeypatch.setattr(report, "SCALE", (Size(64, 64), Size(128, 128), Size(256, 64)))
    tiny = {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    for module in (suites, decoding, serving):
        monkeypatch.setattr(module, "language_models", lambda: {"135m": tiny, "7b": tiny})
    monkeypatch.setattr(decoding, "BATCHES", (1, 3))
    monkeypatch.setattr(serving, "towers", lambda: {"T": small})
    monkeypatch.setattr(serving, "CLIENTS", (1, 2))
    monkeypatch.setattr(serving, "started", started_here)
    monkeypatch.setattr(suites, "_photograph", lambda *_: suites_photograph())
    for name, value in (("RECORDS", 24), ("ROW_GROUP", 8), ("_PAGES", 2), ("_SIDE", 256), ("_FEW", 4)):
        monkeypatch.setattr(data, name, value)
    for suite in report.SUITES:
        found = report.run(suite, Settings(sides=(128,), tokens=(2, 3), repeats=1), tmp_path)
        assert found["rows"]
        assert json.loads((tmp_path / f"{suite}.json").read_text())["rows"] == found["rows"]
        assert report.table_of(found).row_count == len(found["rows"][0])
    assert (tmp_path / "scale.png").stat().st_size > 1000
    assert (tmp_path / "first-token.png").stat().st_size > 1000
    assert json.loads((tmp_path / "tower.json").read_text())["rows"][0]["difference"] < 1e-4
    assert all(row["same_tokens"] for row in json.loads((tmp_path / "decoding.json").read_text())["rows"])
    assert json.loads((tmp_path / "pixels.json").read_text())["rows"][0]["equal"] is True


@contextmanager
def started_here(server):
    """A server of this process in place of one that would have to start."""
    with serving_here(load(server.command[server.command.index("--model") + 1]), name=server.model) as running:
        yield servers.Running(running.url.removeprefix("http://"), server.model, os.getpid())


original_photograph = suites._photograph


def suites_photograph() -> bytes:
    return original_photograph(200, 150)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("speed",), "there is no suite 'speed'"),
        (("tower", "--towers", "X"), "there is no tower 'X'"),
        (("tower", "--sides", "100"), "give multiples of 64"),
        (("first-token", "--language", "9b"), "there is no language model '9b'"),
        (("serving", "--tokens", "32,0"), "--tokens 32,0: give positive numbers"),
        (("serving", "--vllm", "/nowhere/python"), "--vllm /nowhere/python is no program"),
    ],
)
def test_unknown_names_are_one_line(arguments, message):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_the_shape_of_the_weights_in_the_package_is_theirs():
    config = load("tiny").model.config
    assert towers()["tiny"].depths == config.vision_config.depths
    assert towers()["tiny"].hidden_sizes == config.vision_config.hidden_sizes
    shape = language_models()["tiny"]
    assert shape == {name: getattr(config.text_config, name) for name in shape}


def test_processor_time_of_a_server_counts_those_it_has_started():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = sum(range(10**7)); input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        until(lambda: servers.Running("", "", process.pid).cpu_seconds() > servers._cpu_seconds(process.pid) + 0.1)
        process.communicate(b"\n")


def test_a_server_that_does_not_start_says_why():
    command = [sys.executable, "-c", "raise SystemExit('no such port')"]
    with (
        pytest.raises(InputError, match="does not start: no such port"),
        servers.started(servers.Server(command, 1, "")),
    ):
        pass


def test_a_folder_that_cannot_be_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be a folder"):
        report.run("scale", Settings(), tmp_path / "file")
