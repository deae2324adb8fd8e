"""The engine: what trains, labels, logs, and a killed run that continues as if nothing had happened."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import fresh
from killing import KilledError, killed_after
from PIL import Image

import convllava
from convllava.checkpoints import read
from convllava.data.cells import GLYPH_CELL, DenseDataset, boxes, label_maps, spelling, word_tokens, words
from convllava.data.conversation import IGNORE, collate, encode, lengths_of, pack
from convllava.data.synthetic import ChatDataset
from convllava.errors import InputError
from convllava.geometry import Size, native, unchanged
from convllava.synthetic import CHARACTERS, Glyph, Sample, Thing, World
from convllava.training import engine
from convllava.training.alignment import Alignment, vocabulary_of
from convllava.training.calibration import calibrate
from convllava.training.losses import answer_loss, answer_weights
from convllava.training.parts import freeze_all_but, parameter_groups, part_of, parts_of
from convllava.training.recipe import Data, Evaluation, ModelSpec, Recipe, Stage, dump_recipe, load_recipe
from convllava.training.reporting import processor_seconds

ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
"""Settings of a process that shares the machine with other tests."""
DATA = Data(size=128, simple=True, turns=2)
SCENES = dataclasses.replace(DATA, kinds={"scene": 1})
DENSE = Stage("dense", 3, {"stem": 1e-3, "stage1": 1e-3, "stage4": 1e-3, "head": 1e-3}, DATA, "dense", batch_size=2)
ALIGN = Stage(
    "align", 4, {"stage5": 1e-3, "projector": 1e-3, "head": 1e-3}, SCENES, "align", batch_size=2, calibrate=True
)
CHAT = Stage("chat", 4, {"stage5": 1e-3, "projector": 2e-3, "language_model": 1e-3}, DATA, batch_size=2)
GUIDED = dataclasses.replace(CHAT, name="guided", guidance=0.5)


def recipe(*stages: Stage, **settings: object) -> Recipe:
    model = ModelSpec(
        vision={"depths": [1] * 5, "hidden_sizes": [8, 8, 16, 16, 32], "layer_scale_init_value": 0.5},
        language={
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "tie_word_embeddings": True,
        },
        pixels={"min_pixels": 64 * 64, "max_pixels": 256 * 256},
    )
    return Recipe("test", list(stages), model, workers=0, **settings)  # type: ignore[arg-type]


def log(folder):
    """The whole lines that have been logged."""
    path = folder / "log.jsonl"
    lines = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def weights(folder):
    return dict(read(folder)[0].named_parameters())


def test_only_the_named_parts_change_and_every_stage_loads(tmp_path):
    last = engine.train(recipe(DENSE, CHAT), tmp_path)
    assert last == tmp_path / "1-chat"
    assert isinstance(convllava.load(last).ask(torch.zeros(64, 64).numpy(), "what?", max_new_tokens=3), str)
    begun = dict(engine.start(recipe(DENSE))[0].named_parameters())
    for before, after, trained in (
        (begun, weights(tmp_path / "0-dense"), set(DENSE.trains)),
        (weights(tmp_path / "0-dense"), weights(tmp_path / "1-chat"), set(CHAT.trains)),
    ):
        changed = {part_of(name) for name in before if not before[name].equal(after[name])}
        assert changed == trained - {"head"}


def test_the_log_has_one_line_a_step(tmp_path):
    engine.train(recipe(DENSE, CHAT), tmp_path)
    lines = log(tmp_path)
    assert [(line["stage"], line["step"]) for line in lines] == [("dense", 1), ("dense", 2), ("dense", 3)] + [
        ("chat", step) for step in (1, 2, 3, 4)
    ]
    assert lines[-1]["images"] == 8
    assert lines[-1]["tokens"] > 8 * 20
    assert set(lines[-1]["learning_rates"]) == set(CHAT.trains)
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert 0 <= lines[2]["colour"] <= 1
    for folder in (tmp_path, tmp_path / "0-dense", tmp_path / "1-chat"):
        assert load_recipe(folder / "recipe.yaml") == recipe(DENSE, CHAT)
    assert list((tmp_path / "tensorboard").rglob("events*"))


@pytest.mark.parametrize("stage", [DENSE, ALIGN, CHAT, GUIDED], ids=lambda stage: stage.name)
def test_resumed_equals_uninterrupted(tmp_path, stage):
    plan = recipe(stage, save_every=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    engine.train(plan, whole)
    with killed_after(2):
        engine.train(plan, parts)
    assert not (parts / f"0-{stage.name}").exists()
    engine.train(plan, parts, resume=True)
    assert [line["loss"] for line in log(parts)] == [line["loss"] for line in log(whole)]
    spent = [line["processor"] for line in log(parts)]
    assert spent[0] > 0
    assert spent == sorted(spent), "time on the processor adds up over resumed parts"
    for name, parameter in weights(whole / f"0-{stage.name}").items():
        assert parameter.equal(weights(parts / f"0-{stage.name}")[name]), name


def test_a_checkpoint_that_was_being_written_is_never_taken(tmp_path, monkeypatch):
    plan = recipe(CHAT, save_every=2)

    def dying(self, output_dir):
        raise KilledError

    monkeypatch.setattr(engine.StageTrainer, "_save_rng_state", dying)
    with pytest.raises(KilledError):
        engine.train(plan, tmp_path)
    progress = tmp_path / ".0-chat.progress"
    assert list(progress.glob("checkpoint-*")) == []
    monkeypatch.undo()
    engine.train(plan, tmp_path, resume=True)
    assert (tmp_path / "0-chat").exists()
    assert not progress.exists()


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    plan, out = tmp_path / "recipe.yaml", tmp_path / "out"
    plan.write_text(dump_recipe(recipe(dataclasses.replace(CHAT, steps=6), save_every=2)))
    command = [sys.executable, "-m", "convllava", "train", str(plan), "--output", str(out), "--resume"]
    full = subprocess.run(command, capture_output=True, text=True, preexec_fn=no_file_larger(200_000), env=ALONE)
    assert full.returncode == 2
    assert "the checkpoint of step 2 cannot be written" in full.stderr
    assert "there is none before it" in full.stderr
    assert "Traceback" not in full.stderr
    assert list((out / ".0-chat.progress").iterdir()) == []
    subprocess.run(command, check=True, env=ALONE)
    assert [line["step"] for line in log(out)] == [1, 2, 3, 4, 5, 6]


def no_file_larger(size):
    """For a new process: a write beyond so many bytes fails, as on a full disk."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_again_and_again_equals_an_uninterrupted_one(tmp_path, processes):
    stage = dataclasses.replace(CHAT, steps=8)
    plan, whole, killed = tmp_path / "recipe.yaml", tmp_path / "whole", tmp_path / "killed"
    plan.write_text(dump_recipe(recipe(stage, save_every=1)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
    command = [sys.executable, *launcher, "-m", "convllava", "train", str(plan), "--resume", "--output"]
    subprocess.run([*command, str(whole)], check=True, env=ALONE)
    kill_when(lambda: len(log(killed)) >= 3, [*command, str(killed)])
    kill_when(lambda: any(killed.glob(".0-chat.progress/partial/*")), [*command, str(killed)])
    subprocess.run([*command, str(killed)], check=True, env=ALONE)
    assert [line["loss"] for line in log(killed)] == [line["loss"] for line in log(whole)]
    for name, parameter in weights(whole / "0-chat").items():
        assert parameter.equal(weights(killed / "0-chat")[name]), name


def kill_when(ready, command):
    """Start a command, and kill it with all its processes as soon as `ready`, or when it has ended."""
    process = subprocess.Popen(command, env=ALONE, start_new_session=True)
    while process.poll() is None and not ready():
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_folder_with_a_run_is_not_overwritten_and_a_changed_recipe_not_resumed(tmp_path):
    engine.prepare_output(recipe(CHAT), tmp_path, resume=False)
    with pytest.raises(InputError, match="already holds a run; continue it with --resume"):
        engine.prepare_output(recipe(CHAT), tmp_path, resume=False)
    with pytest.raises(InputError, match=r"another recipe \(seed: 0 -> 5\); resume with the same recipe"):
        engine.prepare_output(recipe(CHAT, seed=5), tmp_path, resume=True)
    engine.prepare_output(recipe(CHAT), tmp_path, resume=True)


def test_an_unknown_part_is_named():
    model, _ = engine.start(recipe(CHAT))
    with pytest.raises(InputError, match=r"no part 'projecter'; did you mean projector\?"):
        freeze_all_but(model, ["projecter"])


def test_every_parameter_belongs_to_one_part_and_one_group():
    model, _ = engine.start(recipe(CHAT))
    parts = parts_of(model)
    assert list(parts) == ["stem", "stage1", "stage2", "stage3", "stage4", "stage5", "projector", "language_model"]
    assert sum(len(parameters) for parameters in parts.values()) == len(list(model.parameters()))
    freeze_all_but(model, CHAT.trains)
    for decay, muon in itertools.product((0.0, 0.1), (False, True)):
        groups = parameter_groups(
            model, dataclasses.replace(CHAT, weight_decay=decay, optimizer="muon" if muon else "adamw")
        )
        assert any(group["muon"] for group in groups) == muon
        grouped = [id(p) for group in groups for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
        assert {group["part"]: group["lr"] for group in groups} == CHAT.trains
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for group in groups for p in group["params"] if decay)


def test_labels_are_exactly_the_answers_and_their_ends():
    _, processor = engine.start(recipe(CHAT))
    world = World(size=128, simple=True, turns=3)
    dataset = ChatDataset(world, processor, 4, captions=1.0)
    messages = dataset.messages(world.sample(0), dataset.turns(world.sample(0)))
    item = dataset[0]
    text = processor.tokenizer.decode(item["input_ids"][item["labels"] != IGNORE])
    answers = [message["content"][0]["text"] for message in messages if message["role"] == "assistant"]
    assert world.sample(0).caption in answers
    assert text.replace("<|end|> ", "<|end|>") == "".join(f"{answer}<|end|>" for answer in answers)
    assert item["labels"][item["labels"] != IGNORE].equal(item["input_ids"][item["labels"] != IGNORE])


def test_a_template_that_marks_no_answer_is_refused():
    _, processor = engine.start(recipe(CHAT))
    processor.chat_template = "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}"
    with pytest.raises(InputError, match="marks no assistant text"):
        encode(processor, [{"role": "user", "content": [{"type": "text", "text": "a"}]}])


def test_batched_loss_equals_the_mean_over_all_supervised_tokens():
    model, processor = engine.start(recipe(CHAT))
    dataset = ChatDataset(World(size=128, simple=True), processor, 3, captions=0.5)
    items = [dataset[index] for index in range(3)]
    batch = model(**collate(items, processor.tokenizer.pad_token_id)).loss
    totals = [(model(**collate([item], 0)).loss, int((item["labels"][1:] != IGNORE).sum())) for item in items]
    expected = sum(loss * count for loss, count in totals) / sum(count for _, count in totals)
    torch.testing.assert_close(batch, expected, atol=1e-5, rtol=1e-5)


def mixed_items(processor):
    """Two pages, one of them long, and text alone."""
    pages = ChatDataset(World(size=128, simple=True, turns=4), processor, 2)
    return [pages[0], ChatDataset(World(size=128, simple=True, turns=1), processor, 2, images=False)[1], pages[1]]


def test_packed_equals_separate():
    model, processor = fresh()
    items = mixed_items(processor)
    with torch.no_grad():
        alone = [model(**collate([item], 0)) for item in items]
        packed = model(**pack(items))
    torch.testing.assert_close(packed.logits[0], torch.cat([out.logits[0] for out in alone]), atol=1e-5, rtol=0)
    counts = torch.tensor([(item["labels"][1:] != IGNORE).sum() for item in items])
    mean = (torch.stack([out.loss for out in alone]) * counts).sum() / counts.sum()
    torch.testing.assert_close(packed.loss, mean, atol=1e-5, rtol=0)


def test_a_family_whose_samples_would_see_each_other_in_a_row_is_refused(tmp_path):
    plan = recipe(dataclasses.replace(CHAT, packing=True))
    layers = {"model_type": "lfm2", "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    language = {**plan.model.language, **layers, "num_key_value_heads": 2}
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, language=language))
    with pytest.raises(InputError, match="samples in one row of a lfm2 see each other; leave out packing"):
        engine.train(plan, tmp_path / "run")


def test_packing_wastes_nothing_and_padding_is_counted_beside_it(parts):
    items = mixed_items(parts[1])
    lengths = [len(item["input_ids"]) for item in items]
    assert lengths_of(pack(items)) == lengths_of(collate(items, 0)) == lengths
    assert pack(items)["input_ids"].shape == (1, sum(lengths))


def test_a_packed_run_has_the_losses_of_a_padded_one(tmp_path):
    data = dataclasses.replace(DATA, turns=6)
    stage = dataclasses.replace(CHAT, data=data, batch_size=4)
    engine.train(recipe(stage), tmp_path / "padded")
    engine.train(recipe(dataclasses.replace(stage, packing=True)), tmp_path / "packed")
    padded, packed = log(tmp_path / "padded"), log(tmp_path / "packed")
    for one, other in zip(padded, packed, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
    assert padded[-1]["positions"] == padded[-1]["padded"] == packed[-1]["padded"]
    assert packed[-1]["tokens"] == packed[-1]["positions"] == padded[-1]["tokens"] < 0.95 * packed[-1]["padded"]


def test_label_maps_lie_where_things_lie():
    glyphs = (Glyph("A", (0, 0, 16, 16)), Glyph("i", (33, 40, 36, 56)))
    things = (Thing("star", "red", (64, 0, 128, 32)),)
    sample = Sample(0, "sheet", World(size=128, simple=True).sample(0).image.resize((128, 64)), "", (), glyphs, things)
    labels = label_maps(sample, native(Size(64, 128), min_pixels=64 * 64, max_pixels=512 * 512), 32)
    expected = torch.zeros(64 // GLYPH_CELL, 128 // GLYPH_CELL, dtype=torch.long)
    expected[0:2, 0:2] = 1 + CHARACTERS.index("A")
    expected[6, 4] = 1 + CHARACTERS.index("i")
    assert labels["glyph"].equal(expected)
    assert (labels["shape"] > 0).tolist() == [[False, False, True, True], [False] * 4]
    assert labels["colour"].unique().tolist() == [0, 1]


def labelled_page() -> Sample:
    """64 x 64 pixels: "ab" and "c" on a line, below them "d"."""
    boxes = {"a": (2, 2, 10, 12), "b": (11, 2, 20, 12), "c": (40, 2, 50, 12), "d": (2, 40, 10, 52)}
    glyphs = tuple(Glyph(char, box) for char, box in boxes.items())
    return Sample(0, "sign", Image.new("RGB", (64, 64)), "", (), glyphs, ())


def test_spelling_tells_what_each_character_follows_and_where_words_end():
    printed = words(labelled_page())
    assert ["".join(glyph.char for glyph in word) for word in printed] == ["ab", "c", "d"]
    found = spelling(printed, unchanged(Size(64, 64), stride=32), 32)
    a, b, c, d = (CHARACTERS.index(char) + 1 for char in "abcd")
    assert found.tolist() == [
        *([0, 0, 0, a], [0, 0, a, b], [0, a, b, 0]),
        *([1, 0, 0, c], [1, 0, c, 0]),
        *([2, 0, 0, d], [2, 0, d, 0]),
    ]


def test_cells_are_named_by_the_words_that_the_tokenizer_knows():
    _, processor = engine.start(recipe(ALIGN))
    glyphs = tuple(Glyph(char, (2 + 9 * i, 2, 10 + 9 * i, 12)) for i, char in enumerate("Total:"))
    printed = words(Sample(0, "sign", Image.new("RGB", (64, 64)), "", (), glyphs, ()))
    found = word_tokens(printed, unchanged(Size(64, 64), stride=32), 32, processor.tokenizer)
    ids = [processor.tokenizer(text).input_ids[0] for text in (" Total", " total")]
    assert sorted(found.tolist()) == sorted([cell, name] for cell in (0, 1) for name in ids)
    assert not len(word_tokens(words(labelled_page()), unchanged(Size(64, 64), stride=32), 32, processor.tokenizer))


def test_boxes_are_told_from_the_centre_of_each_cell():
    found = boxes([(8, 0, 40, 32), (48, 48, 64, 64)], unchanged(Size(64, 64), stride=32), 32)
    expected = [[0, -0.25, -0.5, 0.75, 0.5], [3, 0.0, 0.0, 0.5, 0.5]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_dense_items_fit_the_grids():
    _, processor = engine.start(recipe(DENSE))
    for index in range(3):
        item = DenseDataset(World(size=128, simple=True), processor, 3, sheets=0.5)[index]
        height, width = item["pixel_values"].shape[1:]
        assert item["glyph"].shape == (height // 8, width // 8)
        assert item["shape"].shape == item["colour"].shape == (height // 32, width // 32)


def test_visual_tokens_are_asked_for_all_words_of_their_cell_alike():
    model, processor = engine.start(recipe(ALIGN))
    alignment = Alignment(model, vocabulary_of(processor.tokenizer))
    circle, red, x, total = (processor.tokenizer(text).input_ids[0] for text in (" circle", " red", "x", " total"))
    embeddings = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach(), dim=-1)
    model.get_input_embeddings().weight.data = embeddings
    printed = torch.zeros(3 * alignment.side**2, dtype=torch.long)
    printed[alignment.side**2] = CHARACTERS.index("x") + 1
    drawn = [torch.tensor([[1, 0, 0]])]
    bags = alignment._bags(printed, drawn, drawn, torch.tensor([[1, total]]))
    assert [row.nonzero().flatten().tolist() for row in bags] == [sorted([circle, red]), sorted([x, total]), []]
    tokens = 1000 * torch.stack([embeddings[circle], embeddings[x], embeddings[5]])
    log_shares = [torch.log_softmax(token @ embeddings.T, dim=-1) for token in tokens]
    halves = -(log_shares[0][[circle, red]].mean() + log_shares[1][[x, total]].mean())
    # The third cell is empty and says nothing.
    torch.testing.assert_close(alignment._naming_loss(tokens, bags), halves / 2)
    assert alignment._naming_loss(tokens, 0 * bags) == 0


def test_a_guided_run_logs_where_attention_looks(tmp_path):
    engine.train(recipe(GUIDED), tmp_path)
    assert all(line["answer_guidance"] > 0 for line in log(tmp_path))


def test_balance_weighs_answers_by_their_length():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 6, 5), torch.full((2, 6), IGNORE)
    labels[0, 1:3], labels[0, 4], labels[1, 2:] = torch.tensor([1, 2]), 3, torch.tensor([0, 1, 2, 3])
    each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    answers = [each[0, 0:2].mean(), each[0, 3], each[1, 1:].mean()]
    torch.testing.assert_close(answer_loss(logits, labels, answer_weights(labels, 1.0)), torch.stack(answers).mean())
    torch.testing.assert_close(answer_loss(logits, labels, answer_weights(labels, 0.0)), each.sum() / 7)


def test_two_processes_have_the_loss_of_one_and_go_through_every_stage(tmp_path):
    plan = tmp_path / "recipe.yaml"
    held_out = Evaluation(every=3, samples=5, pictures=0)  # of which the second process has none in its last batch
    plan.write_text(dump_recipe(recipe(dataclasses.replace(CHAT, steps=3, batch_size=4, evaluation=held_out), GUIDED)))
    command = ["-m", "convllava", "train", str(plan), "--output"]
    subprocess.run([sys.executable, *command, str(tmp_path / "one")], check=True, env=ALONE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, *command, str(tmp_path / "two")], check=True, env=ALONE)
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [line["step"] for line in two] == [line["step"] for line in one] == [1, 2, 3, 3, 1, 2, 3, 4]
    for a, b in zip(one[:4], two[:4], strict=True):
        key = "eval_loss" if "eval_loss" in a else "loss"
        assert a[key] == pytest.approx(b[key], abs=1e-4)


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="batch_size 2 does not divide among 3 processes"):
        engine.train(recipe(CHAT), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_max_steps_caps_every_stage(tmp_path):
    engine.train(recipe(DENSE, CHAT), tmp_path, max_steps=1)
    assert [line["step"] for line in log(tmp_path)] == [1, 1]


def test_calibration_gives_tokens_mean_zero_and_one_size():
    model, processor = engine.start(recipe(CHAT))
    world = World(size=128, simple=True)
    dataset = ChatDataset(world, processor, 4)
    images = [dataset[index]["pixel_values"][0] for index in range(4)]
    calibrate(model, images)
    projector = model.model.multi_modal_projector
    features = model.model.vision_tower(images).last_hidden_state
    tokens = projector.linear_2(projector.act(projector.linear_1(features)))
    torch.testing.assert_close(tokens.mean(0), torch.zeros(tokens.shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens.square().mean().sqrt(), torch.tensor(1.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vision": {"hiden_sizes": [8] * 5}},
            r"model.vision: .*did you mean hidden_sizes\?",
        ),
        ({"language": {"hiden_size": 8}}, r"model.language: .*did you mean hidden_size\?"),
        ({"pixels": {"max_pixel": 8}}, r"model.pixels: .*did you mean max_pixels\?"),
        (
            {"language": {"model_type": "gpt2", "n_embd": 32, "n_head": 2}},
            "gpt2 keeps its embeddings elsewhere than in embed_tokens",
        ),
        ({"language": {"model_type": "lama"}}, "transformers knows no model_type 'lama'"),
        ({"checkpoint": "/no/where"}, "there is no model"),
    ],
)
def test_bad_models_are_refused_before_anything_is_written(tmp_path, change, message):
    plan = dataclasses.replace(recipe(CHAT), model=ModelSpec(**change))
    with pytest.raises(InputError, match=message):
        engine.train(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_logger_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="report_to: wandbb: "):
        engine.train(recipe(CHAT, report_to=["wandbb"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bad_last_stage_is_refused_before_anything_is_written(tmp_path):
    for bad in (
        dataclasses.replace(CHAT, name="bad", trains={"stage9": 1e-3}),
        dataclasses.replace(CHAT, name="bad", data=dataclasses.replace(DATA, kinds={"novel": 1.0})),
    ):
        with pytest.raises(InputError):
            engine.train(recipe(DENSE, bad), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_worker_that_ends_while_its_seconds_are_asked_for_stops_no_run(monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    worker = psutil.Process(ended.pid)
    ended.wait()
    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [worker])
    assert processor_seconds() > 0


def test_a_torn_last_line_of_the_log_is_dropped(tmp_path):
    engine.train(recipe(DENSE), tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"stage": "chat", "in')
    (tmp_path / "recipe.yaml").unlink()
    engine.train(recipe(DENSE, CHAT), tmp_path)
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 1, 2, 3, 4]
