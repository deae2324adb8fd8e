"""Published checkpoints: every layout converts, and what is converted answers as the original did."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

from convllava import InputError, official
from convllava.checkpoints import convert, read
from convllava.configuration import ConvLlavaVisionConfig
from convllava.data.conversation import IGNORE, encode
from convllava.data.samples import conversation_of
from convllava.files import in_pieces, tensors_in
from convllava.official.prompt import FORMATS
from convllava.vision import ConvLlavaVisionModel

DATA = Path(__file__).parent / "data" / "official"
CASES = json.loads((DATA / "golden.json").read_text())
SQUARE = CASES["cases"]["square"]
GOLDEN = load_file(DATA / "golden.safetensors")
IMAGE_TOKEN = 1000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "official"
    shutil.copytree(DATA / "checkpoint", folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(DATA / "checkpoint", folder, "float32")
    model, processor = read(folder)
    return model.eval(), processor


def prompt(processor, image: str | None, question: str, **more: object):
    content = [{"type": "text", "text": question}]
    if image is not None:
        content.insert(0, {"type": "image", "image": Image.open(DATA / "images" / image)})
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt",
        add_generation_prompt=True, **more,
    )  # fmt: skip


def as_original(ids: Tensor) -> list[int]:
    """One -200 in place of each image's run of placeholders."""
    found: list[int] = []
    for token in ids.tolist():
        if token != IMAGE_TOKEN:
            found.append(token)
        elif not found or found[-1] != -200:
            found.append(-200)
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in read(folder)[0].state_dict().items()}


def test_prompt_pixels_features_logits_and_answer_are_the_originals(parts):
    model, processor = parts
    inputs = prompt(processor, "square.png", SQUARE["question"])
    assert as_original(inputs["input_ids"][0]) == SQUARE["input_ids"]
    assert inputs["pixel_values"].equal(GOLDEN["square/pixel_values"])
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        logits = model(**inputs).logits
        answer = model.generate(**inputs, max_new_tokens=SQUARE["n_new"], do_sample=False)
    torch.testing.assert_close(features.last_hidden_state, GOLDEN["square/vision_features"][0], atol=1e-4, rtol=0)
    torch.testing.assert_close(features.pooler_output[0], GOLDEN["square/projected"][0], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, GOLDEN["square/logits"], atol=1e-3, rtol=0)
    assert answer[0, inputs["input_ids"].shape[1] :].tolist() == SQUARE["generated_ids"]


def test_training_labels_and_loss_are_the_originals(parts):
    model, processor = parts
    image = Image.open(DATA / "images" / "wide.png")
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, text("What colour is the square?")]},
        {"role": "assistant", "content": [text("The square is green.")]},
        {"role": "user", "content": [text("And the circle?")]},
        {"role": "assistant", "content": [text("It is red.")]},
    ]
    item = encode(processor, messages)
    expected = CASES["train"]
    assert as_original(item["input_ids"]) == expected["samples"]["A"]["input_ids"]
    assert item["labels"].tolist() == expected["A"]["expanded_labels"][0]
    assert (item["labels"] != IGNORE).sum() == len(expected["samples"]["A"]["supervised_tokens"])
    with torch.no_grad():
        loss = model(
            input_ids=item["input_ids"][None], labels=item["labels"][None], pixel_values=item["pixel_values"]
        ).loss
    assert loss.item() == pytest.approx(expected["A"]["loss"], abs=1e-5)


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def test_both_kinds_of_tokenizer_file_give_the_same_ids(parts, source):
    for path in (DATA / "extras" / "tokenizer_fast").iterdir():
        shutil.copy(path, source / path.name)
    (source / "tokenizer.model").unlink()
    _, other = read(source)
    _, processor = parts
    for question in ("Describe the image.", "  spaces\tand\nlines ", "Größe? 北京", "a</b> <s"):
        for image in ("wide.png", None):
            ids = [prompt(one, image, question)["input_ids"].tolist() for one in (processor, other)]
            assert ids[0] == ids[1], question


def test_a_prompt_without_an_image_has_no_image_tokens(parts):
    inputs = prompt(parts[1], None, "Hi there.")
    assert "pixel_values" not in inputs
    assert IMAGE_TOKEN not in inputs["input_ids"]


def test_every_layout_gives_the_same_model(source, tmp_path):
    expected = tensors_of(source)
    weights = load_file(source / "model.safetensors")
    tower = torch.load(source / "vision_tower" / "pytorch_model.bin", weights_only=True)

    by_reference = tmp_path / "by_reference"
    shutil.copytree(source, by_reference)
    (by_reference / "vision_tower").rename(tmp_path / "tower")
    settings = json.loads((source / "config.json").read_text()) | {"mm_vision_tower": str(tmp_path / "tower")}
    (by_reference / "config.json").write_text(json.dumps(settings))

    as_bin = tmp_path / "as_bin"
    shutil.copytree(source, as_bin)
    (as_bin / "model.safetensors").unlink()
    torch.save(weights, as_bin / "pytorch_model.bin")
    (as_bin / "vision_tower" / "pytorch_model.bin").unlink()
    save_file(tower, as_bin / "vision_tower" / "model.safetensors")

    inside = tmp_path / "inside"
    shutil.copytree(source, inside)
    (inside / "vision_tower" / "pytorch_model.bin").unlink()
    (inside / "model.safetensors").unlink()
    everything = weights | {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in tower.items()}
    names = sorted(everything)
    index = {}
    for number, chosen in enumerate((names[::2], names[1::2])):
        shard = f"model-{number}.safetensors"
        save_file({name: everything[name] for name in chosen}, inside / shard)
        index |= dict.fromkeys(chosen, shard)
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    for folder in (by_reference, as_bin, inside):
        convert(folder, tmp_path / f"{folder.name}_converted", "float32")
        for found in (tensors_of(folder), tensors_of(tmp_path / f"{folder.name}_converted")):
            assert set(found) == set(expected)
            assert all(found[name].equal(tensor) for name, tensor in expected.items()), folder.name


def test_of_two_towers_the_checkpoints_own_counts_and_that_is_said(source, tmp_path):
    shutil.copytree(source / "vision_tower", tmp_path / "older")
    tower = torch.load(source / "vision_tower" / "pytorch_model.bin", weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in tower.items()}, tmp_path / "older" / "pytorch_model.bin")
    settings = json.loads((source / "config.json").read_text()) | {"mm_vision_tower": str(tmp_path / "older")}
    (source / "config.json").write_text(json.dumps(settings))
    note = convert(source, tmp_path / "model", "float32")
    assert str(source / "vision_tower") in note
    assert str(tmp_path / "older") in note


def test_lora_is_merged_and_its_projector_kept(source, tmp_path):
    base, lora = tmp_path / "base", tmp_path / "lora"
    weights = load_file(source / "model.safetensors")
    shutil.copytree(source, lora)
    (lora / "model.safetensors").unlink()
    base.mkdir()
    shutil.copy(source / "config.json", base)
    save_file(
        {name: tensor for name, tensor in weights.items() if "mm_projector" not in name}, base / "model.safetensors"
    )
    target, generator = "model.layers.1.self_attn.q_proj.weight", torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator)
    stem = "base_model.model." + target.removesuffix(".weight")
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, lora / "adapter_model.safetensors")
    trained = {f"base_model.model.{name}": 2 * tensor for name, tensor in weights.items() if "mm_projector" in name}
    torch.save(trained, lora / "non_lora_trainables.bin")
    adapter = {"r": 4, "lora_alpha": 8, "base_model_name_or_path": "/no/where"}
    (lora / "adapter_config.json").write_text(json.dumps(adapter))

    with pytest.raises(InputError, match="a LoRA on '/no/where', which is not here; convert it with --base FOLDER"):
        convert(lora, tmp_path / "model", "float32")
    convert(lora, tmp_path / "model", "float32", base=base)
    merged, plain = tensors_of(tmp_path / "model"), tensors_of(source)
    (lora / "non_lora_trainables.bin").unlink()
    save_file(weights, base / "model.safetensors")
    assert "the projector is that of its base" in convert(lora, tmp_path / "plain_projector", "float32", base=base)
    ours = "model.language_model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(merged[ours], plain[ours] + 2.0 * up @ down)
    for name in plain.keys() - {ours}:
        factor = 2 if "multi_modal_projector" in name else 1
        assert merged[name].equal(factor * plain[name]), name


def test_there_and_back_again(source, tmp_path):
    convert(source, tmp_path / "ours", "float32")
    convert(tmp_path / "ours", tmp_path / "theirs", "float32", to="official")
    written = load_file(tmp_path / "theirs" / "model.safetensors")
    original = load_file(source / "model.safetensors")
    assert set(written) == set(original)
    assert all(written[name].equal(tensor.float()) for name, tensor in original.items())
    tower = torch.load(tmp_path / "theirs" / "vision_tower" / "pytorch_model.bin", weights_only=True)
    for name, tensor in torch.load(source / "vision_tower" / "pytorch_model.bin", weights_only=True).items():
        assert name.startswith("layernorm.") or tower[name].equal(tensor.float()), name
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text())
    for key, value in json.loads((source / "config.json").read_text()).items():
        if key.startswith(("mm_vision", "mm_hidden", "mm_projector_type", "num_", "hidden", "rope", "image_aspect")):
            assert settings[key] == value, key
    assert (tmp_path / "theirs" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    plain = AutoTokenizer.from_pretrained(tmp_path / "theirs", config=LlamaConfig())
    assert len(plain) == settings["vocab_size"]
    again, first = tensors_of(tmp_path / "theirs"), tensors_of(source)
    assert all(again[name].equal(tensor) for name, tensor in first.items())


def test_a_four_stage_tower_gives_the_originals_features():
    folder = DATA / "inputs" / "original_convnext"
    settings = json.loads((folder / "config.json").read_text())
    config = ConvLlavaVisionConfig(depths=settings["depths"], hidden_sizes=settings["hidden_sizes"])
    tower = ConvLlavaVisionModel(config).eval()
    tensors = tensors_in(folder / "pytorch_model.bin")
    named = {official.rename_tower(name): tensor for name, tensor in tensors.items()}
    prefix = "model.vision_tower."
    tower.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in named.items() if name is not None})
    with torch.no_grad():
        features = tower(GOLDEN["square/pixel_values"]).last_hidden_state
    expected = GOLDEN["original4_select-1/square/vision_features"][0]
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=0)


def four_stages(source: Path, select_layer: int) -> Path:
    """The checkpoint with the original four-stage tower and a projector of its width."""
    shutil.rmtree(source / "vision_tower")
    shutil.copytree(DATA / "inputs" / "original_convnext", source / "vision_tower")
    change(source / "config.json", mm_vision_select_layer=select_layer)
    weights = load_file(source / "model.safetensors")
    weights["model.mm_projector.0.weight"] = weights["model.mm_projector.0.weight"][:, :128].contiguous()
    save_file(weights, source / "model.safetensors")
    return source


def change(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_select_layer_drops_the_last_block_of_four_stages(source, tmp_path):
    original = json.loads((DATA / "inputs" / "original_convnext" / "config.json").read_text())["depths"]
    four_stages(source, -1)
    last, _ = read(source)
    assert list(last.config.vision_config.depths) == original
    pixels = GOLDEN["square/pixel_values"]
    with torch.no_grad():
        features = last.model.vision_tower(pixels).last_hidden_state
    expected = GOLDEN["original4_select-1/square/vision_features"][0]
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=0)

    change(source / "config.json", mm_vision_select_layer=-2)
    convert(source, tmp_path / "model", "float32")
    shorter, _ = read(tmp_path / "model")
    assert list(shorter.config.vision_config.depths) == [*original[:-1], original[-1] - 1]
    tower = last.model.vision_tower
    tower.encoder.stages[3].layers = tower.encoder.stages[3].layers[:-1]
    with torch.no_grad():
        assert shorter.model.vision_tower(pixels).last_hidden_state.equal(tower(pixels).last_hidden_state)


def test_a_tower_that_its_config_counts_too_long_is_taken_as_it_is(source):
    settings = json.loads((source / "vision_tower" / "config.json").read_text())
    longer = [*settings["depths"][:3], settings["depths"][3] + 1, settings["depths"][4]]
    change(source / "vision_tower" / "config.json", depths=longer)
    change(source / "config.json", mm_vision_select_layer=-2)
    assert list(read(source)[0].config.vision_config.depths) == settings["depths"]


def test_the_checkpoints_own_tower_counts_before_one_in_the_shards(source, tmp_path):
    expected = tensors_of(source)
    weights = load_file(source / "model.safetensors")
    tower = torch.load(source / "vision_tower" / "pytorch_model.bin", weights_only=True)
    weights |= {f"model.vision_tower.vision_tower.{name}": tensor + 1 for name, tensor in tower.items()}
    save_file(weights, source / "model.safetensors")
    assert "there is another among" in convert(source, tmp_path / "model", "float32")
    found = tensors_of(tmp_path / "model")
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_rope_scaling_is_kept_both_ways(source, tmp_path):
    change(source / "config.json", rope_scaling={"type": "linear", "factor": 4.0}, rope_theta=20000.0)
    convert(source, tmp_path / "ours", "float32")
    rope = read(tmp_path / "ours")[0].config.text_config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 4.0, 20000.0)
    convert(tmp_path / "ours", tmp_path / "theirs", "float32", to="official")
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert settings["rope_scaling"] == {"type": "linear", "factor": 4.0}
    assert settings["rope_theta"] == 20000.0


def test_text_without_an_image_is_not_trimmed_and_both_forms_agree(parts):
    _, processor = parts
    messages = [{"role": "user", "content": " Hi. "}, {"role": "assistant", "content": " yes\n"}]
    as_parts = [{**message, "content": [text(message["content"])]} for message in messages]
    texts = [processor.apply_chat_template(one) for one in (messages, as_parts)]
    assert texts[0] == texts[1]
    assert texts[0].endswith("USER:  Hi.  ASSISTANT:  yes\n</s>")


class Code:
    def __reduce__(self):
        return (print, ("ran",))


def damage_tower(folder: Path) -> None:
    shutil.rmtree(folder / "vision_tower")


def damage_shard(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def damage_pickle(folder: Path) -> None:
    (folder / "vision_tower" / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Code()}))


def damage_vocabulary(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text()) | {"vocab_size": 999}
    (folder / "config.json").write_text(json.dumps(settings))


def damage_shape(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.mm_projector.0.weight"] = torch.zeros(64, 128)
    save_file(weights, path)


def damage_emptied(folder: Path) -> None:
    (folder / "vision_tower" / "pytorch_model.bin").write_bytes(b"")


def damage_projector(folder: Path) -> None:
    change(folder / "config.json", mm_projector_type="linear")


def damage_pixels(folder: Path) -> None:
    (folder / "vision_tower" / "preprocessor_config.json").write_text("{}")


def damage_completeness(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.mm_projector.2.bias"]
    save_file(weights, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_tower, "has no vision tower"),
        (damage_shard, r"model\.safetensors is not a readable file of tensors"),
        (damage_pickle, r"pytorch_model\.bin is damaged, or holds code"),
        (damage_vocabulary, "has 1000 tokens, but config.json says vocab_size 999"),
        (damage_shape, r"^[^:]*model\.safetensors: model\.mm_projector\.0\.weight has the shape \[64, 128\]"),
        (damage_emptied, r"pytorch_model\.bin is not a readable file of tensors"),
        (damage_pixels, r"preprocessor_config\.json lacks 'size'"),
        (damage_projector, "sets mm_projector_type to .linear.; only mlp2x_gelu is known"),
        (damage_completeness, r"lacks the tensor model\.multi_modal_projector\.linear_2\.bias"),
    ],
)
def test_damage_is_one_line_and_nothing_is_written(source, tmp_path, capsys, damage, message):
    damage(source)
    with pytest.raises(InputError, match=message) as caught:
        convert(source, tmp_path / "model", "float32")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["official"]
    assert "ran" not in capsys.readouterr().out


CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
]


@pytest.mark.parametrize(
    ("config", "opening", "end"),
    [
        ({}, "<s> A chat between a curious user and", "questions. USER: <image> \nWhat is it? ASSISTANT: A cat.</s>"),
        ({"conv_mode": "llava_v1"}, "<s> A chat between a curious human and", " ASSISTANT: A cat.</s>"),
        (
            {"version": "llava_llama_2"},
            "<s> [INST] <<SYS>>\nYou are a helpful language and vision assistant.",
            "language.\n<</SYS>>\n\n<image> \nWhat is it? [/INST] A cat. </s>",
        ),
        ({"conv_version": "plain"}, "<s><image> A cat.\n", ""),
    ],
)
def test_the_prompt_format_is_the_one_that_the_configuration_names(source, config, opening, end):
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | config))
    (source.parent / "vicuna").mkdir()
    moved = source.rename(source.parent / "vicuna" / "llava-llama-2-plain")  # a name that must not count
    _, processor = read(moved)
    found = processor.apply_chat_template(CHAT, tokenize=False)
    assert found.startswith(opening)
    assert found.endswith(end)
    twice = processor.apply_chat_template([*CHAT, *CHAT], tokenize=False)
    if "INST" in opening:
        assert "A cat. </s><s>[INST] <image> \nWhat is it? [/INST]" in twice


@pytest.mark.parametrize("human", ["<image>\nhi", "hi <image>", "hi <image> there\n", " <image>", "no mark \n", "\nno"])
@pytest.mark.parametrize("answer", ["A cat.", " A cat.\n"])
def test_files_become_the_originals_sequences(parts, human, answer):
    """Of one turn, by the steps of the original's preprocessing: the mark goes to the front of the trimmed message, and
    what stands before and after it is tokenised alone."""
    _, processor = parts
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
    images = {"image": "wide.png"} if "<image>" in human else {}
    sample = conversation_of({"conversations": turns, **images}, 0, str(DATA / "images"))
    item = encode(processor, sample.messages)
    message = ("<image>\n" + human.replace("<image>", "").strip()).strip() if images else human
    system = FORMATS["v1"][1]
    pieces = f"{system} USER: {message} ASSISTANT: {answer}</s>".split("<image>")
    plain = AutoTokenizer.from_pretrained(DATA / "checkpoint", config=LlamaConfig())
    encoded = [plain(piece).input_ids for piece in pieces]
    expected = encoded[0] + [token for ids in encoded[1:] for token in [-200, *ids[1:]]]
    assert as_original(item["input_ids"]) == expected
    supervised = item["input_ids"][item["labels"] != IGNORE]
    assert supervised.tolist() == plain(f"ASSISTANT: {answer}</s>").input_ids[-len(supervised) :]


def test_a_checkpoint_that_lost_its_towers_file_does_not_take_another(source, tmp_path):
    shutil.copytree(source / "vision_tower", tmp_path / "earlier")
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"mm_vision_tower": str(tmp_path / "earlier")}))
    assert convert(source, tmp_path / "whole", "float32") == ""  # the same tower twice is nothing to tell
    (source / "vision_tower" / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"vision_tower has a config\.json but neither model\.safetensors nor"):
        read(source)


def test_a_runs_checkpoint_beside_the_tower_that_it_began_with(source, tmp_path):
    """Stage 5 is in the shards, and in no config.json: `mm_vision_tower` names the four stages given to stage 1."""
    whole = tensors_of(source)
    tower = torch.load(source / "vision_tower" / "pytorch_model.bin", weights_only=True)
    shutil.rmtree(source / "vision_tower")
    shutil.copytree(DATA / "inputs" / "original_convnext", tmp_path / "four")
    shutil.copy(DATA / "checkpoint" / "vision_tower" / "preprocessor_config.json", tmp_path / "four")
    tensors = load_file(source / "model.safetensors")
    tensors |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in tower.items()}
    save_file(tensors, source / "model.safetensors")
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"mm_vision_tower": str(tmp_path / "four")}))
    found = tensors_of(source)
    assert found.keys() == whole.keys()
    assert all(found[name].equal(tensor) for name, tensor in whole.items())


def test_an_unknown_prompt_format_is_named(source):
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"version": "v7"}))
    with pytest.raises(InputError, match="names the prompt format 'v7'; known are v1"):
        read(source)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 60))
def test_pieces_hold_every_tensor_once_and_no_more_bytes_than_asked(sizes, limit):
    tensors = {f"t{number}": torch.zeros(size, dtype=torch.uint8) for number, size in enumerate(sizes)}
    pieces = list(in_pieces(tensors.items(), limit))
    assert [name for piece in pieces for name in piece] == list(tensors)
    for piece in pieces:
        assert len(piece) == 1 or sum(tensor.nbytes for tensor in piece.values()) <= limit


def test_a_model_of_several_pieces_is_sharded_and_reads_back_the_same(source, tmp_path, monkeypatch):
    monkeypatch.setattr(in_pieces, "__defaults__", (100_000,))
    convert(source, tmp_path / "ours", "float32")
    convert(tmp_path / "ours", tmp_path / "theirs", "float32", to="official")
    monkeypatch.undo()
    for folder in ("ours", "theirs"):
        index = json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 3
        again, first = tensors_of(tmp_path / folder), tensors_of(source)
        assert all(again[name].equal(tensor) for name, tensor in first.items())
