"""Benchmarks: exact counts, reports that programs can read, runs that continue. No test depends on a time."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from conftest import fresh
from rich.console import Console
from rich.table import Table
from serving import serving as serving_here
from serving import until
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, LlamaConfig
from typer.testing import CliRunner

from benchmarks import (
    SUITES,
    data,
    decoding,
    encoders,
    fastvithd,
    first_token,
    report,
    servers,
    serving,
    tower,
    training,
)
from benchmarks.__main__ import app
from benchmarks.fastvithd import FastVitHD
from benchmarks.measure import Settings, live_memory, peak_memory, side_by_side
from convllava import ConvLlavaVisionConfig, ConvLlavaVisionModel, InputError, load
from convllava.data.collate import collate
from convllava.geometry import Size
from convllava.io import ResumableJsonl
from convllava.model.costs import prefill_flops, tower_flops
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.presets import language_models, towers
from convllava.synthetic import World


@pytest.mark.parametrize("name", ["T", "S", "B", "L"])
@pytest.mark.parametrize("size", [Size(64, 64), Size(768, 1024)])
def test_tower_flops_equal_torchs_count(name, size):
    with torch.device("meta"):
        model = ConvLlavaVisionModel(towers()[name])
        pixels = torch.empty(1, 3, *size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixels)
    assert tower_flops(towers()[name], size) == counter.get_total_flops()


def test_serving_times_of_a_killed_run_are_reused(tmp_path):
    taken, calls = {(1, 2): serving.Seconds(1.5, 0.5)}, []
    for _ in range(2):
        found = serving.times_of(ResumableJsonl(tmp_path, {}), "generate", lambda: calls.append(1) or taken)
        assert found == taken
    assert len(calls) == 1


def test_missing_packages_are_reported_before_measuring(monkeypatch):
    for module in (report, serving):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    for suite, extra in (("data", "data"), ("serving", "serve")):
        with pytest.raises(InputError, match=rf"pip install 'convllava\[{extra}\]'"):
            report.run(suite, Settings())


def test_tower_flops_of_other_shapes_equal_torchs_count():
    config = ConvLlavaVisionConfig(depths=[1, 2, 1, 1, 1, 1], hidden_sizes=[8, 8, 8, 16, 16, 16], patch_size=2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ConvLlavaVisionModel(config)(torch.zeros(1, 3, 128, 64))
    assert tower_flops(config, Size(128, 64)) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["135m", "0.5b", "7b"])
def test_prefill_flops_equal_torchs_count(name):
    config = LlamaConfig(**language_models()[name])
    with torch.device("meta"):
        model = AutoModel.from_config(config)
        prompt = torch.empty(1, 40, config.hidden_size)
        mask = torch.empty(1, 1, 40, 40, dtype=torch.bool)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs_embeds=prompt, attention_mask=mask, use_cache=False)
    assert prefill_flops(config, 40) == counter.get_total_flops()


def test_flops_of_tower_and_projector_equal_torchs_count():
    model: ConvLlavaForConditionalGeneration = fresh(row_separator=False, coordinate_embedding=False)[0]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.get_image_features(torch.zeros(1, 3, 128, 128))
    projector = 2 * 4 * (32 * 32 + 32 * 32)  # two linear layers on four tokens
    assert counter.get_total_flops() == tower_flops(model.config.vision_config, Size(128, 128)) + projector


@pytest.mark.parametrize(("side", "gflop"), [(768, 266), (1024, 473), (1536, 1064)])
def test_fast_vit_hd_has_its_published_size(side, gflop):
    with torch.device("meta"):
        model, pixels = FastVitHD(), torch.empty(1, 3, side, side)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = model(pixels)
    attention = sum(4 * depth * (side // cell) ** 4 * width for depth, width, cell in ((4, 768, 32), (2, 1536, 64)))
    assert features.shape == (1, 3072, side // 64, side // 64)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == 123
    # timm's reparameterised fastvit_mci3 has the same layers; its published count does not include attention
    assert round((counter.get_total_flops() - attention) / 1e9) == gflop


def test_gflop_of_encoders_include_fused_attention(monkeypatch):
    monkeypatch.setattr(fastvithd, "DEPTHS", (1, 1, 1, 1, 1))
    with torch.device("meta"):
        model = FastVitHD()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 64, 64, device="meta"))
    encoders._fast_vit_hd.cache_clear()
    encoder = encoders.fast_vit_hd(64)
    encoders._fast_vit_hd.cache_clear()
    assert encoder.gflop == counter.get_total_flops() / 1e9
    assert encoder.tokens == 1


def test_workloads_alternate_after_a_warm_up_call():
    calls = []
    found = side_by_side({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert set(found) == {"a", "b"}


def test_times_of_a_killed_run_are_reused(tmp_path):
    calls, shares = [], []

    def killed():
        calls.append("b")
        if calls.count("b") == 2:
            raise KeyboardInterrupt

    works = {"a": lambda: calls.append("a"), "b": killed}
    with pytest.raises(KeyboardInterrupt):
        side_by_side(works, 2, ResumableJsonl(tmp_path, {}))
    assert calls == ["a", "b", "a", "b"]
    calls.clear()
    works["b"] = lambda: calls.append("b")
    side_by_side(works, 2, ResumableJsonl(tmp_path, {}), shares.append)
    assert calls == ["a", "b", "b", "a", "b"]
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_killed_suite_continues_and_finished_suite_starts_again(monkeypatch, tmp_path):
    measured = []

    def measure(name, side, settings):
        measured.append((name, side))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return [{"tower": name, "side": side}]

    monkeypatch.setitem(report.PER_TOWER_AND_SIDE, "tower", measure)
    settings = Settings(towers=("T", "S"), sides=(64, 128), repeats=1)
    with pytest.raises(KeyboardInterrupt):
        report.run("tower", settings, tmp_path)
    with pytest.raises(InputError, match="repeats was 1 and is 2"):
        report.run("tower", replace(settings, repeats=2), tmp_path)
    assert len(report.run("tower", settings, tmp_path)["rows"]) == 4
    assert measured == [("T", 64), ("T", 128), ("T", 128), ("S", 64), ("S", 128)]
    assert [path.name for path in tmp_path.iterdir()] == ["tower.json"]
    report.run("tower", settings, tmp_path)
    assert len(measured) == 9


def test_peak_memory_includes_freed_tensors():
    def work() -> None:
        torch.ones(50 * 2**20 // 4)

    assert 45 < peak_memory(work) < 60


def test_live_memory_is_the_largest_sum_of_simultaneous_tensors():
    megabyte = torch.zeros(250_000)

    def work() -> None:
        one = megabyte.repeat(3)
        del one
        two, three = megabyte.repeat(4), megabyte.repeat(2)
        del two, three

    assert 6 <= live_memory(work) < 6.01


@torch.no_grad()
def test_tower_holds_a_fraction_of_the_stock_towers_activations():
    config = ConvLlavaVisionConfig(depths=[3, 3, 9, 3, 3], hidden_sizes=[32, 64, 128, 256, 512])
    model, image = ConvLlavaVisionModel(config).eval(), torch.zeros(1, 3, 1024, 1024)
    stock = encoders.stock_convnext(config)
    whole = live_memory(lambda: stock.encoder(stock.embeddings(image)))
    assert live_memory(lambda: model(image)) <= 0.3 * whole
    assert live_memory(lambda: model(image, band_rows=64)) <= 0.13 * whole


def test_every_suite_writes_a_report(monkeypatch, tmp_path):
    small = ConvLlavaVisionConfig(depths=[1] * 5, hidden_sizes=[8] * 5)
    monkeypatch.setattr(tower, "SMALL", small)
    monkeypatch.setattr(tower, "SCALE", (Size(64, 64), Size(128, 128), Size(256, 64)))
    tiny = {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    for module in (first_token, decoding, serving, training):
        monkeypatch.setattr(module, "language_models", lambda: {"135m": tiny, "0.5b": tiny, "7b": tiny})
    monkeypatch.setattr(decoding, "BATCHES", (1, 3))
    for module in (encoders, serving, tower, training):
        monkeypatch.setattr(module, "towers", lambda: {"T": small})
    monkeypatch.setattr(training, "PACKED_SAMPLES", 4)
    monkeypatch.setattr(training, "BATCHED_SAMPLES", 16)
    monkeypatch.setattr(serving, "CLIENTS", (1, 2))
    monkeypatch.setattr(serving, "started", started_here)
    for name, value in (
        ("RECORDS", 24),
        ("ROW_GROUP", 8),
        ("PAGES", 2),
        ("PAGE_SIDE", 256),
        ("FEW", 4),
        ("PHOTOGRAPH", (200, 150)),
    ):
        monkeypatch.setattr(data, name, value)
    for suite in SUITES:
        found = report.run(suite, Settings(sides=(128,), tokens=(2, 3), repeats=1), tmp_path)
        assert found["rows"]
        assert json.loads((tmp_path / f"{suite}.json").read_text())["rows"] == found["rows"]
        tables = report.tables_of(found)
        assert {table.row_count for table in tables} == {len(found["rows"][0])}
        assert sum(len(table.columns) - 1 for table in tables) == len(found["rows"])
        assert "…" not in printed(tables)
    assert (tmp_path / "scale.png").stat().st_size > 1000
    assert (tmp_path / "first-token.png").stat().st_size > 1000
    assert json.loads((tmp_path / "tower.json").read_text())["rows"][0]["difference"] < 1e-4
    assert all(row["same_tokens"] for row in json.loads((tmp_path / "decoding.json").read_text())["rows"])
    assert json.loads((tmp_path / "pixels.json").read_text())["rows"][0]["equal"] is True


def printed(tables: list[Table]) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(*tables)
    return console.file.getvalue()


@contextmanager
def started_here(server):
    """Serve from this process instead of starting another one."""
    with serving_here(load(server.command[server.command.index("--model") + 1]), name=server.model) as running:
        yield servers.RunningServer(running.url.removeprefix("http://"), server.model, os.getpid())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("speed",), "there is no suite 'speed'"),
        (("tower", "--towers", "X"), "there is no tower 'X'"),
        (("tower", "--sides", "100"), "give multiples of 64"),
        (("first-token", "--language", "9b"), "there is no language model '9b'"),
        (("serving", "--tokens", "32,0"), "--tokens 32,0: give positive integers"),
        (("tower", "--peers"), "`peers` has no effect on tower, which takes `repeats`, `sides`, `towers`"),
        (("serving", "--towers", "T,S"), "give `towers` one value"),
        (("scale", "--sides", "2048"), "`sides` has no effect on scale, which takes `repeats`"),
        (("serving", "--vllm", "/nowhere/python"), "`vllm` /nowhere/python is not a program"),
    ],
)
def test_bad_options_are_rejected_in_one_line(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_preset_tiny_has_the_shape_of_the_bundled_weights():
    config = load("tiny").model.config
    assert towers()["tiny"].depths == config.vision_config.depths
    assert towers()["tiny"].hidden_sizes == config.vision_config.hidden_sizes
    shape = language_models()["tiny"]
    assert shape == {name: getattr(config.text_config, name) for name in shape}


def test_cpu_seconds_of_a_server_include_child_processes():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = sum(range(10**7)); input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        own = psutil.Process(process.pid)
        until(lambda: servers.RunningServer("", "", own.pid).cpu_seconds() > sum(own.cpu_times()[:2]) + 0.1)
        process.communicate(b"\n")


def test_server_that_ignores_sigterm_is_killed(monkeypatch):
    monkeypatch.setattr(servers, "STOP_SECONDS", 0.1)
    port = servers.free_port()
    ignoring = "import signal, socket; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    listening = f"place = socket.create_server(('127.0.0.1', {port})); signal.pause()"
    with servers.started(servers.Server([sys.executable, "-c", ignoring + listening], port, "")) as running:
        assert Path(f"/proc/{running.pid}").exists()
    assert not Path(f"/proc/{running.pid}").exists()


def test_folder_with_a_space_is_one_argument():
    folder = Path("with a space")
    for server in (servers.convllava_serve(folder), servers.vllm_serve(folder, Path(sys.executable))):
        assert str(folder) in server.command


def test_server_that_does_not_start_reports_its_output():
    command = [sys.executable, "-c", "raise SystemExit('no such port')"]
    with (
        pytest.raises(InputError, match="does not start: no such port"),
        servers.started(servers.Server(command, 1, "")),
    ):
        pass


def test_bad_output_is_rejected_before_measuring(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be a folder"):
        report.run("scale", Settings(), tmp_path / "file")


def test_micro_batches_filled_to_a_budget_waste_less(parts, monkeypatch):
    monkeypatch.setattr(training, "BATCHED_SAMPLES", 40)
    samples = training.mixed_samples(World("train", size=128, simple=True), parts[1])
    fixed = [collate(samples[first : first + 4], 0) for first in range(0, 40, 4)]
    filled = [collate(chosen, 0) for chosen in training.filled_to_budget(samples, fixed)]
    before, after = training.fill_of(fixed), training.fill_of(filled)
    assert after["useful_tokens"] > before["useful_tokens"]
    assert after["fullest"] <= before["fullest"]
    assert sum(len(batch["labels"]) for batch in filled) >= 40
