"""Continuous batching: every answer equals `generate`, whatever other answers are written at the same time."""

from __future__ import annotations

import copy
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import WORDS, picture, varied_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModel

from convllava import InputError, load
from convllava.inference import Assistant, ragged_attention
from convllava.inference import assistant as assistant_module
from convllava.inference.assistant import engine_size
from convllava.inference.engine import Engine, SequentialEngine
from convllava.inference.ragged_model import RaggedModel
from convllava.inference.sampling import Event, Sampler, Sampling, TextStream
from convllava.model.builder import build_fresh

QUESTIONS = ("what is red?", "describe the image", "what?", "what is the total at the top left of the image?")


@pytest.fixture(scope="module")
def assistant(parts):
    return Assistant(*parts)


class Writer:
    """An engine without a thread. The test runs each step."""

    def __init__(self, assistant, **options):
        self.assistant, self.engine = (
            assistant,
            Engine(assistant.model, assistant.processor, by_columns=False, **options),
        )

    def ask(self, question, image=None, **sampling):
        """Submit a question, optionally about a picture given by number. Events are added to the returned list."""
        images = [] if image is None else [self.assistant.encode(numbered(image))]
        messages = [{"role": "user", "content": question}]
        events: list[Event] = []
        prompt = self.assistant.prompt(messages, images)
        answer = self.engine.submit(prompt, Sampling(**({"max_new_tokens": 8} | sampling)), events.append)
        return answer, events

    def finish(self):
        while self.engine.step():
            pass


def numbered(image):
    return picture(64, 64 * (1 + image % 3), image)


def text_of(events):
    return "".join(event.text for event in events)


def offline(assistant, question, image, count=8):
    """Return the greedy answer of `generate` to one prompt."""
    images = [] if image is None else [numbered(image)]
    content = [*({"type": "image", "image": one} for one in images), {"type": "text", "text": question}]
    return generated(assistant, [{"role": "user", "content": content}], count)


def generated(assistant, messages, count):
    inputs = assistant.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    with torch.inference_mode():
        output = assistant.model.generate(**inputs, do_sample=False, max_new_tokens=count)
    return assistant.processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_answers_differ_between_questions_and_images(assistant):
    """Comparisons of answers could not fail if all answers were equal."""
    answers = {offline(assistant, question, image, 12) for question in QUESTIONS for image in (None, 0, 1, 2)}
    assert len(answers) > 8
    assert sum(len(set(answer)) for answer in answers) > 4 * len(answers)


@pytest.mark.parametrize("mix", range(6))
def test_batched_greedy_answers_equal_generate(assistant, mix):
    dice = random.Random(mix)
    writer = Writer(assistant, slots=dice.randint(1, 4), step_tokens=dice.choice([5, 16, 128]))
    asked = []
    for _ in range(10):
        question, image, count = dice.choice(QUESTIONS), dice.choice([None, 0, 1, 2]), dice.randint(1, 10)
        _, events = writer.ask(question, image, max_new_tokens=count)
        asked.append((question, image, count, events))
        for _ in range(dice.randint(0, 3)):
            writer.engine.step()
    writer.finish()
    for question, image, count, events in asked:
        assert text_of(events) == offline(assistant, question, image, count)
    assert writer.engine.running == writer.engine.waiting == 0


def test_batched_answers_of_the_shipped_weights_equal_generate():
    assistant = load("tiny")
    writer = Writer(assistant, slots=3, step_tokens=32)
    asked = [(question, image) for question in QUESTIONS[:3] for image in (0, 1)]
    events = [writer.ask(*one)[1] for one in asked]
    writer.finish()
    assert [text_of(found) for found in events] == [offline(assistant, *one) for one in asked]


def test_weights_by_columns_give_equal_answers():
    assistant = Assistant(*varied_model())
    expected = [offline(assistant, question, 1) for question in QUESTIONS]
    writer = Writer(assistant)
    writer.engine = Engine(assistant.model, assistant.processor)
    events = [writer.ask(question, 1)[1] for question in QUESTIONS]
    writer.finish()
    assert [text_of(found) for found in events] == expected


def test_long_prompt_does_not_stall_other_answers(assistant):
    writer = Writer(assistant, slots=3, step_tokens=12)
    _, short = writer.ask("what?", max_new_tokens=30)
    writer.engine.step()
    writer.engine.step()
    _, long = writer.ask("describe the image " * 30, max_new_tokens=2)
    _, late = writer.ask("what is red?", max_new_tokens=2)
    for _ in range(4):
        before = len(short)
        writer.engine.step()
        assert len(short) == before + 1
    assert late
    assert not long


def test_second_turn_reuses_cached_keys_and_values(assistant):
    writer = Writer(assistant, slots=2)
    _, events = writer.ask("what is red?", 1)
    writer.finish()
    history = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is red?"}]},
        {"role": "assistant", "content": text_of(events)},
    ]
    expected = assistant.chat([*history, {"role": "user", "content": "what?"}], [numbered(1)], max_new_tokens=8)
    prompt = assistant.prompt([*history, {"role": "user", "content": "what?"}], [numbered(1)])
    found: list[Event] = []
    answer = writer.engine.submit(prompt, Sampling(max_new_tokens=8), found.append)
    writer.finish()
    assert answer.cached > 5
    assert text_of(found) == expected
    other = writer.ask("what is red?", 4)[0]  # as wide, but another image
    writer.finish()
    assert other.cached <= 2


def test_equal_prompts_are_read_once(assistant):
    writer = Writer(assistant, slots=4, step_tokens=16)
    asked = [writer.ask(QUESTIONS[3], 1) for _ in range(3)]
    writer.finish()
    assert [answer.cached for answer, _ in asked] == [0] + [len(asked[0][0].prompt.keys) - 1] * 2
    assert len({text_of(events) for _, events in asked}) == 1


def test_conversation_keeps_its_slot_while_another_is_free(assistant):
    writer = Writer(assistant, slots=2)
    first, _ = writer.ask("describe the image " * 10, 1)
    writer.finish()
    writer.ask("what?")
    writer.finish()
    again, _ = writer.ask("describe the image " * 10, 1)
    writer.finish()
    assert again.cached == len(first.prompt.keys) - 1


def test_sampled_answer_depends_on_its_seed_only(assistant):
    writer = Writer(assistant, slots=4)
    drawn = {"temperature": 1.0, "seed": 7, "max_new_tokens": 12}
    _, alone = writer.ask("what?", **drawn)
    writer.finish()
    asked = [writer.ask(QUESTIONS[place % 4], place % 3, temperature=1.0, seed=place)[1] for place in range(3)]
    _, together = writer.ask("what?", **drawn)
    _, other = writer.ask("what?", **(drawn | {"seed": 8}))
    writer.finish()
    assert text_of(together) == text_of(alone) != text_of(other)
    assert all(events[-1].finish for events in asked)


def test_top_p_sampling_matches_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.75, seed=0))
    drawn = torch.tensor([sampler.pick(logits) for _ in range(2000)]).bincount(minlength=4) / 2000
    torch.testing.assert_close(drawn, torch.tensor([0.625, 0.375, 0, 0]), atol=0.04, rtol=0)
    assert Sampler(Sampling(temperature=5.0, top_p=0.01, seed=0)).pick(logits) == 0


def test_logprobs_equal_the_model(assistant):
    writer = Writer(assistant)
    answer, events = writer.ask("what is red?", logprobs=3, max_new_tokens=4)
    writer.finish()
    tokens = [token for event in events for token in event.tokens]
    ids = torch.tensor([*answer.prompt.keys, *(token.token for token in tokens)])
    with torch.inference_mode():
        logprobs = assistant.model(ids[None]).logits[0].log_softmax(-1)
    for place, token in enumerate(tokens, start=len(answer.prompt.keys) - 1):
        assert token.logprob == pytest.approx(float(logprobs[place, token.token]), abs=1e-4)
        assert [found for found, _ in token.top] == logprobs[place].topk(3).indices.tolist()


def test_cancelled_answer_frees_its_slot(assistant):
    writer = Writer(assistant, slots=1)
    running, events = writer.ask("what?", max_new_tokens=200)
    queued, _ = writer.ask("what is red?")
    _, last = writer.ask("describe the image")
    writer.engine.step()
    writer.engine.cancel(running)
    writer.engine.cancel(queued)
    seen = len(events)
    writer.finish()
    assert len(events) == seen
    assert text_of(last) == offline(assistant, "describe the image", None)


def test_failed_step_fails_only_current_answers(assistant, monkeypatch):
    writer = Writer(assistant)
    monkeypatch.setattr(writer.engine.model, "forward", lambda *_: 1 / 0)
    writer.engine.start()

    def finished_events():
        _, events = writer.ask("what?")
        deadline = time.monotonic() + 30
        while not (events and events[-1].finish) and time.monotonic() < deadline:
            time.sleep(0.01)
        return events

    assert [event.finish for event in finished_events()] == ["error"]
    monkeypatch.undo()
    assert text_of(finished_events()) == offline(assistant, "what?", None)
    writer.engine.close()


def test_engine_thread_finishes_or_fails_answers_on_close(assistant):
    writer = Writer(assistant)
    writer.engine.start()
    _, events = writer.ask("what?", max_new_tokens=400)
    writer.engine.close()
    assert events[-1].finish in ("error", "length", "stop")
    with pytest.raises(InputError, match="closed"):
        writer.ask("what?")


def test_prompts_and_settings_out_of_range_are_rejected(assistant):
    with pytest.raises(InputError, match=r"the context is 512; shorten"):
        Writer(assistant).ask("what?", max_new_tokens=510)
    with pytest.raises(InputError, match="`step_tokens` is 8, too few for 8 slots"):
        Engine(assistant.model, assistant.processor, step_tokens=8)
    with pytest.raises(InputError, match="`context` is 1000; give a number between 2 and the model's 512"):
        Engine(assistant.model, assistant.processor, context=1000)


def test_generation_config_does_not_change_answers(parts):
    model = copy.deepcopy(parts[0])
    model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, temperature=0.7, do_sample=True)
    plain, other = Assistant(*parts), Assistant(model, parts[1])
    image = numbered(1)
    expected = plain.ask(image, "what?", max_new_tokens=12)
    assert other.ask(image, "what?", max_new_tokens=12) == expected
    assert "".join(other.stream(image, "what?", max_new_tokens=12)) == expected
    assert next(other.answer_many([(image, "what?")], max_new_tokens=12)) == [expected]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_length_dependent_rope_is_rejected_beyond_its_length(kind):
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16, **factors}
    decoder = AutoModel.from_config(small(rope_parameters=rope)).eval()
    head = torch.nn.Linear(32, 50)
    RaggedModel(decoder, head, 2, 16)
    with pytest.raises(InputError, match=rf"rope_type {kind} changes .* a `context` of at most 16 tokens, not 17"):
        RaggedModel(decoder, head, 2, 17)


def test_sliding_window_in_the_mask_is_rejected_beyond_its_size(monkeypatch):
    config = small("mistral", sliding_window=16)
    decoder, head = AutoModel.from_config(config).eval(), torch.nn.Linear(32, 50)
    RaggedModel(decoder, head, 2, 32)  # passes it to attention
    original = ragged_attention.attend

    def without_window(*arguments, **kwargs):
        return original(*arguments, **{**kwargs, "sliding_window": None})

    monkeypatch.setattr(ragged_attention, "attend", without_window)
    RaggedModel(decoder, head, 2, 16)
    with pytest.raises(InputError, match="does not pass its sliding window to attention"):
        RaggedModel(decoder, head, 2, 32)
    monkeypatch.undo()
    ragged_attention.register()


def small(family="llama", **settings):
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64}
    return CONFIG_MAPPING[family](**shape, **settings)


@settings(max_examples=60)
@given(
    text=st.text(st.sampled_from("abc ré日"), max_size=30),
    stop=st.lists(st.text("abc é", min_size=1, max_size=4), max_size=3),
)
def test_streamed_text_equals_decoded_text_up_to_the_first_stop(parts, text, stop):
    tokenizer = parts[1].tokenizer
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream, pieces, shown = TextStream(tokenizer, stop), [], 0
    for token in tokens:
        stream.push(token)
        pieces.append(stream.take())
        if stream.is_stopped:
            break
        shown += len(pieces[-1])
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    # Every token is a character here, and the stop that is complete first decides.
    seen = next((whole[:end] for end in range(len(whole) + 1) if any(one in whole[:end] for one in stop)), whole)
    cut = min([place for one in stop if (place := seen.find(one)) >= 0], default=len(whole))
    assert "".join(pieces) + stream.finish() == whole[:cut]
    assert shown <= cut
    assert stream.is_stopped == (cut < len(whole))


@settings(max_examples=60)
@given(
    tokens=st.lists(st.integers(0, 400), max_size=20), stop=st.lists(st.text("ab,", min_size=1, max_size=2), max_size=2)
)
def test_random_tokens_give_the_decoded_text(parts, tokens, stop):
    tokenizer = parts[1].tokenizer
    stream = TextStream(tokenizer, stop)
    for token in tokens:
        stream.push(token)
        stream.take()
        if stream.is_stopped:
            return
    stream.finish()
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert whole.startswith(stream.text)
    assert stream.is_stopped or stream.text == whole


def test_special_tokens_do_not_remove_spaces(parts):
    tokenizer = parts[1].tokenizer
    text, special = tokenizer("a b", add_special_tokens=False)["input_ids"], tokenizer.all_special_ids[0]
    for place in range(len(text)):
        stream, pieces = TextStream(tokenizer), []
        for token in (*text[:place], special, special, *text[place:]):
            stream.push(token)
            pieces.append(stream.take())
        assert "".join(pieces) == stream.text == tokenizer.decode(text)


def many_answers(assistant, asked):
    return [answer for batch in assistant.answer_many(asked, batch_size=5, max_new_tokens=8) for answer in batch]


ASKED = [(numbered(image), question) for image in range(3) for question in QUESTIONS]


def test_answer_many_equals_generate_and_reads_an_image_once(parts, monkeypatch):
    monkeypatch.setattr(assistant_module, "SLOTS", 2)
    assistant = Assistant(*parts)
    assert many_answers(assistant, ASKED) == [
        offline(assistant, question, image) for image in range(3) for question in QUESTIONS
    ]
    again = sum(len(assistant.encode(numbered(image)).tokens) for image in range(3)) * (len(QUESTIONS) - 1)
    assert assistant._engine.stats.cached_tokens >= again / 2


def test_answers_of_all_methods_equal_generate(parts):
    """Many prompts on one assistant, with and without images, with shared prefixes."""
    assistant, dice = Assistant(*parts), random.Random(0)
    image, first = numbered(1), "what is red?"
    history = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": first}]}]
    for _ in range(12):
        question, number, count = dice.choice(QUESTIONS), dice.choice([None, 0, 1, 2]), dice.randint(1, 12)
        expected = offline(assistant, question, number, count)
        messages, images = [{"role": "user", "content": question}], [] if number is None else [numbered(number)]
        assert assistant.chat(messages, images, max_new_tokens=count) == expected
        assert assistant.chat_many([(messages, images)] * 3, max_new_tokens=count) == [expected] * 3
        if images:
            assert assistant.ask(images[0], question, max_new_tokens=count) == expected
            assert assistant.report(images[0], question, max_new_tokens=count)["answer"] == expected
        longer = [*history, {"role": "assistant", "content": "the total"}, {"role": "user", "content": question}]
        assert assistant.chat(longer, [image], max_new_tokens=count) == generated(assistant, longer, count)


def test_streams_of_one_assistant_do_not_disturb_each_other(parts):
    assistant = Assistant(*parts)
    streams = [assistant.stream(numbered(number), QUESTIONS[number], max_new_tokens=8) for number in range(3)]
    pieces = [[next(stream)] for stream in streams]
    assert assistant.ask(numbered(0), "what?", max_new_tokens=8) == offline(assistant, "what?", 0)
    for stream, found in zip(streams, pieces, strict=True):
        found += stream
    assert ["".join(found) for found in pieces] == [offline(assistant, QUESTIONS[n], n) for n in range(3)]


def test_threads_may_share_an_assistant(parts):
    assistant = Assistant(*parts)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda asked: assistant.ask(*asked, max_new_tokens=8), ASKED))
    assert answers == many_answers(assistant, ASKED)


def test_changed_weights_change_the_answers(parts):
    model = copy.deepcopy(parts[0])
    assistant = Assistant(model, parts[1])
    before = assistant.ask(numbered(1), "what?", max_new_tokens=8)
    with torch.no_grad():
        for weight in model.model.language_model.parameters():
            weight.copy_(weight.flip(0))
    found = assistant.ask(numbered(1), "what?", max_new_tokens=8)
    assert found == offline(assistant, "what?", 1) != before


def test_keys_and_values_are_freed_after_a_call(parts):
    assistant = Assistant(*parts)
    batches = assistant.answer_many(ASKED, batch_size=6, max_new_tokens=4)
    next(batches)
    cache = assistant._engine.model.cache
    assert cache._layers
    assert len(list(batches)) == 1
    assert not cache._layers
    stream = assistant.stream(*ASKED[0], max_new_tokens=100)
    next(stream)
    assistant.ask(*ASKED[1], max_new_tokens=4)
    assert cache._layers
    stream.close()
    assert not cache._layers


def test_gpu_engine_is_as_small_as_the_calls_allow(parts, monkeypatch):
    gpu = torch.device("cuda")
    assert engine_size(gpu, 1, 300, 4096) == (1, 512)
    assert engine_size(gpu, 40, 3000, 3500) == (16, 3500)
    assert engine_size(torch.device("cpu"), 1, 300, 4096) == (16, 4096)
    made = []
    monkeypatch.setattr(assistant_module, "engine_size", lambda _, *rest: engine_size(gpu, *rest))
    monkeypatch.setattr(
        assistant_module, "Engine", lambda *args, **options: made.append(args[2:]) or Engine(*args, **options)
    )
    assistant = Assistant(*parts)
    single = [assistant.ask(*asked, max_new_tokens=8) for asked in ASKED]
    assert (
        many_answers(assistant, ASKED)
        == single
        == [offline(assistant, question, n) for n in range(3) for question in QUESTIONS]
    )
    assert made == [(1, 16), (1, 32), (5, 32)]


def test_model_without_engine_support_answers_one_by_one(assistant, monkeypatch):
    def reject(*args, **options):
        raise InputError("keeps more than keys and values")

    expected = many_answers(assistant, ASKED)
    monkeypatch.setattr(assistant_module, "Engine", reject)
    other = Assistant(assistant.model, assistant.processor)
    assert many_answers(other, ASKED) == expected
    streams = [other.stream(*asked, max_new_tokens=8) for asked in ASKED[:2]]
    assert next(streams[0])
    assert ["".join(streams[1])] == expected[1:2]  # the second waits until the first is finished
    streams[0].close()
    assert other.ask(*ASKED[2], max_new_tokens=8) == expected[2]


def test_answers_with_softcapped_attention_equal_generate():
    language = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    language |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.6}
    vision = {"depths": [1] * 5, "hidden_sizes": [8] * 5, "layer_scale_init_value": 0.5}
    pixels = {"min_pixels": 64 * 64, "max_pixels": 256 * 256}
    model, processor = build_fresh(
        vision=vision, language={"model_type": "gemma2", **language}, pixels=pixels, words=WORDS
    )
    assistant = Assistant(model.eval(), processor)
    asked = ASKED[:4]
    assert many_answers(assistant, asked) == [offline(assistant, question, 0) for _, question in asked]
    assert isinstance(assistant._engine, SequentialEngine)
