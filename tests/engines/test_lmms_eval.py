"""lmms-eval runs tasks of generated pages: its recorded answers and scores equal those of the assistant.

Not part of `make test`: `make test-harness` installs lmms-eval and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from convllava import InputError, load
from convllava.inference.likelihood import log_likelihoods
from convllava.integrations import lmms_eval
from convllava.synthetic import COLOURS, World

PAGES = 7
UTILS = """\
def images(doc):
    return list(doc["images"])

def messages(doc, lmms_eval_specific_kwargs=None):
    pictures = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": doc["question"]}]}]
"""
TASK = """\
task: {name}
dataset_path: {data}
dataset_kwargs:
  load_from_disk: true
test_split: test
output_type: {output}
doc_to_visual: !function utils.images
doc_to_text: "{{{{question}}}}"
{more}
"""
GENERATE = """\
doc_to_messages: !function utils.messages
doc_to_target: "{{answer}}"
generation_kwargs: {max_new_tokens: 24, temperature: 0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """\
doc_to_choice: "{{choices}}"
doc_to_target: "{{choices.index(answer)}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def documents():
    """Return questions about pages of different shapes; the last question is about two pages."""
    world = World("heldout", seed=5, size=256)
    pages = [world.sample(index) for index in range(PAGES)]
    docs = [
        {"images": [page.image], "question": page.turns[0].question, "answer": page.turns[0].answer} for page in pages
    ]
    docs.append({**docs[0], "images": [pages[0].image, pages[1].image]})
    return [{**doc, "choices": sorted({doc["answer"], *COLOURS[:3]})} for doc in docs]


@pytest.fixture(scope="module")
def docs():
    return documents()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, docs) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    text = Value("string")
    features = Features({"images": List(Image()), "question": text, "answer": text, "choices": List(text)})
    DatasetDict({"test": Dataset.from_list(docs, features=features)}).save_to_disk(folder / "data")
    (folder / "utils.py").write_text(UTILS)
    for name, output, more in (("pages", "generate_until", GENERATE), ("choices", "multiple_choice", CHOOSE)):
        text = TASK.format(name=name, data=folder / "data", output=output, more=more)
        (folder / f"{name}.yaml").write_text(text)
    return folder


def run(tasks: Path, task: str, output: Path, *options: str, launcher: str = "lmms-eval"):
    """Run lmms-eval and return its results and recorded samples. It exits with 0 even if it fails."""
    command = f"{Path(sys.executable).parent}/{launcher} --model convllava --model_args pretrained=tiny --tasks {task}"
    command = f"{command} --include_path {tasks} --output_path {output} --log_samples"
    setting = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tasks / "cache"), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command.split(), *options], env=os.environ | setting, capture_output=True, text=True)
    results = list(output.rglob("*_results.json"))
    assert results, done.stdout + done.stderr
    samples = next(output.rglob(f"*_samples_{task}.jsonl")).read_text().splitlines()
    return json.loads(results[0].read_text())["results"][task], [json.loads(line) for line in samples]


def response(sample):
    return sample["filtered_resps"]


@pytest.fixture(scope="module")
def assistant():
    return load("tiny", device="cpu")


@pytest.fixture(scope="module")
def answers(assistant, docs):
    return [
        assistant.chat([{"role": "user", "content": doc["question"]}], doc["images"], max_new_tokens=24) for doc in docs
    ]


@pytest.mark.parametrize("options", [["--batch_size", "3"], ["--force_simple"]], ids=["chat", "simple"])
def test_lmms_eval_answers_equal_the_assistant(tasks, docs, answers, tmp_path, options):
    results, samples = run(tasks, "pages", tmp_path, *options)
    assert [response(sample) for sample in sorted(samples, key=lambda sample: sample["doc_id"])] == answers
    hits = [answer == doc["answer"] for answer, doc in zip(answers, docs, strict=True)]
    assert results["exact_match,none"] == pytest.approx(sum(hits) / len(hits))
    assert sum(hits) > 0


def test_answers_of_two_processes_equal_one(tasks, answers, tmp_path):
    torchrun = "torchrun --standalone --nproc-per-node 2 -m lmms_eval"
    _, samples = run(tasks, "pages", tmp_path, launcher=torchrun)
    assert [response(sample) for sample in sorted(samples, key=lambda sample: sample["doc_id"])] == answers


def test_lmms_eval_choices_equal_log_likelihoods(tasks, docs, assistant, tmp_path):
    results, samples = run(tasks, "choices", tmp_path, "--force_simple", "--batch_size", "5")
    hits = []
    for sample, doc in zip(samples, docs, strict=True):
        question = [{"role": "user", "content": doc["question"]}]
        scores = log_likelihoods(assistant, [(doc["images"], question, choice) for choice in doc["choices"]])
        losses = [float(loss) for loss, _ in sample["filtered_resps"]]
        assert losses == pytest.approx([-score.total for score in scores], abs=1e-3)
        assert [greedy for _, greedy in sample["filtered_resps"]] == [str(score.is_greedy) for score in scores]
        hits.append(doc["choices"][losses.index(min(losses))] == doc["answer"])
    assert results["acc,none"] == pytest.approx(sum(hits) / len(hits))


def test_images_replace_their_marks_in_the_text():
    image, first, second = {"type": "image"}, {"type": "text", "text": "of "}, {"type": "text", "text": " or"}
    assert lmms_eval._interleave("of <image> or<image>", "<image>", 2) == [first, image, second, image]
    assert lmms_eval._interleave(" or", "<image>", 2) == [image, image, second]
    assert lmms_eval._interleave(" or", "<image>", 0) == [second]


def test_answer_ends_before_the_first_stop_text():
    assert lmms_eval._cut("a\nb.c", ["\n", "."]) == lmms_eval._cut("a.b\nc", ["\n", "."]) == "a"
    assert lmms_eval._cut("a\nb", "\n") == "a"
    assert lmms_eval._cut("a\nb", None) == lmms_eval._cut("a\nb", [""]) == "a\nb"


def test_temperature_above_zero_means_sampling():
    greedy = {"do_sample": False, "max_new_tokens": 256}
    assert (
        lmms_eval._generation({"temperature": 0, "top_p": 1.0, "until": ["x"], "image_aspect_ratio": "pad"}) == greedy
    )
    assert lmms_eval._generation({"temperature": 0.5, "do_sample": False}) == greedy
    warm = {"do_sample": True, "max_new_tokens": 8, "temperature": 0.5, "top_p": 0.9, "num_beams": 1}
    assert lmms_eval._generation({**warm, "do_sample": True, "top_k": None}) == warm


@pytest.mark.parametrize("setting", [{"num_beams": 3}, {"repetition_penalty": 1.3}, {}], ids=str)
def test_answers_with_search_settings_equal_generate(assistant, docs, monkeypatch, setting):
    model, processor, doc = lmms_eval.ConvLlavaChat(device="cpu"), assistant.processor, docs[0]
    conversation = [{"role": "user", "content": doc["question"]}], [assistant.encode(doc["images"][0])]
    monkeypatch.setattr(model, "_conversation", lambda request: conversation)
    parts = [{"type": "image", "image": doc["images"][0]}, {"type": "text", "text": doc["question"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    output = assistant.model.generate(**inputs, do_sample=False, max_new_tokens=12, **setting)
    expected = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert model._generate([None], {"max_new_tokens": 12, **setting}) == [expected]


def test_batches_share_settings_and_contain_all_requests():
    settings = [{"a": 1}, {"a": 2}, {"a": 1}, {"a": 1}]
    assert list(lmms_eval._batches(settings, 2)) == [({"a": 1}, [0, 2]), ({"a": 1}, [3]), ({"a": 2}, [1])]


def test_unsupported_requests_are_rejected():
    with pytest.raises(InputError, match="`batch_size` is auto; give the number"):
        lmms_eval.ConvLlavaSimple(batch_size="auto")
    with pytest.raises(InputError, match="no setting 'max_frames'; it has mode"):
        lmms_eval.ConvLlavaChat(max_frames=8)
    with pytest.raises(InputError, match="the task asks about video"):
        lmms_eval._parts([{"type": "video", "url": "a.mp4"}])
    with pytest.raises(InputError, match="several rounds"):
        lmms_eval.ConvLlavaSimple().generate_until_multi_round([])
