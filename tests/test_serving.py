"""The server with OpenAI's client: served answers equal those of `Assistant`."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from conftest import picture
from serving import Running, part, png, question, request, serving, until

from convllava import InputError
from convllava.inference import Assistant
from convllava.serving.replies import TokenTexts
from convllava.serving.server import make_server, serve

TEXTS = ("what is red?", "describe the image", "what?", "what is the total at the top left of the image?")


@pytest.fixture(scope="module")
def assistant(parts):
    return Assistant(*parts)


@pytest.fixture(scope="module")
def server(parts):
    model, processor = parts
    with serving(Assistant(copy.deepcopy(model), processor), slots=4, step_tokens=16, api_key="key") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0)


def numbered(number):
    return picture(64, 64 * (1 + number % 3), number)


def ask(client, text, *images, **settings):
    return client.chat.completions.create(
        **({"model": "test", "messages": question(text, *map(png, images)), "max_tokens": 8} | settings)
    )


def offline(assistant, text, *images, count=8):
    return assistant.chat([{"role": "user", "content": text}], images, max_new_tokens=count)


def test_served_answers_equal_offline_with_any_number_of_images(client, assistant):
    for images in ([], [numbered(0)], [numbered(1), numbered(2)]):
        found = ask(client, "what is red?", *images)
        assert found.choices[0].message.content == offline(assistant, "what is red?", *images)
        assert found.choices[0].message.role == "assistant"
        assert found.model == "test"


def test_usage_counts_text_and_visual_tokens(client, assistant):
    found = ask(client, "what?", numbered(1))
    encoded = assistant.encode(numbered(1))
    prompt = assistant.prompt([{"role": "user", "content": "what?"}], [encoded])
    assert found.usage.prompt_tokens == len(prompt.keys)
    assert found.usage.prompt_tokens_details.image_tokens == len(encoded.tokens)
    assert found.usage.completion_tokens == 8 or found.choices[0].finish_reason == "stop"
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_streamed_answer_equals_whole(client):
    whole = ask(client, "describe the image", numbered(2), logprobs=True)
    chunks = list(
        ask(
            client,
            "describe the image",
            numbered(2),
            logprobs=True,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    streamed = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert streamed[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in streamed) == whole.choices[0].message.content
    assert [choice.finish_reason for choice in streamed if choice.finish_reason] == [whole.choices[0].finish_reason]
    tokens = [token.token for choice in streamed if choice.logprobs for token in choice.logprobs.content]
    assert tokens == [token.token for token in whole.choices[0].logprobs.content]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_answers_of_eight_parallel_clients_equal_single(client, assistant):
    asked = [(TEXTS[number % 4], number, 3 + number) for number in range(8)]

    def served(text, number, count):
        stream = ask(client, text, numbered(number), max_tokens=count, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: served(*one), asked))
    assert found == [offline(assistant, text, numbered(number), count=count) for text, number, count in asked]


def test_conversation_reuses_its_prompt_and_image(client, server, assistant):
    first = ask(client, "what is red?", numbered(4))
    images, hits = server.service.encoder.stats.images, server.service.encoder.stats.hits
    history = [
        *question("what is red?", png(numbered(4))),
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "what?"},
    ]
    second = ask(client, "", messages=history)
    marked = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is red?"}]},
        *history[1:],
    ]
    assert second.choices[0].message.content == assistant.chat(marked, [numbered(4)], max_new_tokens=8)
    assert second.usage.prompt_tokens_details.cached_tokens > 5
    assert (server.service.encoder.stats.images, server.service.encoder.stats.hits) == (images, hits + 1)


def test_pixel_budget_of_a_request_equals_the_processor_setting(client, parts):
    model, processor = parts
    fewer = copy.deepcopy(processor)
    fewer.image_processor.change(max_pixels=128**2)
    large = picture(256, 256, 3)
    for budget, own, tokens in ((None, processor, 20), (128**2, fewer, 6), (None, processor, 20)):
        body = {"mm_processor_kwargs": {"max_pixels": budget}} if budget else {}
        found = ask(client, "describe the image", large, extra_body=body)
        assert found.choices[0].message.content == offline(Assistant(model, own), "describe the image", large)
        assert found.usage.prompt_tokens_details.image_tokens == tokens


def test_choices_differ_and_repeat_with_the_seed(client):
    drawn = [ask(client, "what?", n=3, seed=5, temperature=1.0, max_tokens=12) for _ in range(2)]
    texts = [[choice.message.content for choice in found.choices] for found in drawn]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3
    greedy = ask(client, "what?", n=2)
    assert greedy.choices[0].message.content == greedy.choices[1].message.content
    assert [choice.index for choice in greedy.choices] == [0, 1]


def test_answer_ends_before_a_stop_text(client, assistant):
    whole = offline(assistant, "what is red?", count=40)
    stop = whole[len(whole) // 2 :][:2]
    found = ask(client, "what is red?", max_tokens=40, stop=[stop, "never said"])
    assert found.choices[0].message.content == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_max_completion_tokens_limits_the_answer(client):
    found = ask(client, "what?", max_completion_tokens=3, max_tokens=openai.omit)
    assert (found.usage.completion_tokens, found.choices[0].finish_reason) == (3, "length")


def test_logprobs_belong_to_the_tokens_of_the_answer(client):
    found = ask(client, "what is red?", logprobs=True, top_logprobs=2)
    choice = found.choices[0]
    assert len(choice.logprobs.content) == found.usage.completion_tokens - (choice.finish_reason == "stop")
    for token in choice.logprobs.content:
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
        assert token.logprob == max(other.logprob for other in token.top_logprobs) <= 0
        assert len(token.top_logprobs) == 2


@pytest.mark.parametrize("text", ["red top", "abc 12.5", "it's [0.12, 0.50]"])
def test_token_texts_add_up_to_the_text(assistant, text):
    tokenizer = assistant.processor.tokenizer
    pieces = map(TokenTexts(tokenizer), tokenizer(f" {text}", add_special_tokens=False)["input_ids"])
    assert "".join(pieces) == f" {text}"


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["test"]
    assert client.models.retrieve("test").owned_by == "convllava"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.models.retrieve("gpt")


def test_health_and_ready_need_no_key_but_metrics_do(server):
    assert server.send("GET", "/health")[:2] == (200, {"status": "alive"})
    assert server.send("GET", "/ready")[:2] == (200, {"status": "ready"})
    assert server.send("GET", "/metrics")[0] == 401


def test_metrics_count_requests_and_tokens(server, client):
    def value(name, *otherwise):
        connection = server.connect()
        connection.request("GET", "/metrics", headers={"Authorization": "Bearer key"})
        lines = connection.getresponse().read().decode().splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name)), *otherwise)

    before = {
        name: value(f"convllava_{name}", 0.0)  # there may be no earlier request
        for name in ("written_tokens_total", 'requests_total{status="200"}', "time_to_first_token_seconds_count")
    }
    found = ask(client, "what?")
    assert value("convllava_written_tokens_total") - before["written_tokens_total"] == found.usage.completion_tokens
    assert value('convllava_requests_total{status="200"}') - before['requests_total{status="200"}'] == 1
    assert value("convllava_time_to_first_token_seconds_count") - before["time_to_first_token_seconds_count"] == 1
    assert value("convllava_requests_active") == 0


@pytest.mark.parametrize("stream", [True, False])
def test_disconnected_client_frees_its_slot(server, stream):
    connection = server.connect()
    body = json.dumps(request("describe the image " * 20, max_tokens=300, stream=stream))
    headers = {"Content-Type": "application/json", "Authorization": "Bearer key"}
    engine = server.service.engine
    written = server.service.engine.stats.written_tokens
    connection.request("POST", "/v1/chat/completions", body, headers)
    until(lambda: engine.running == 1 and engine.stats.written_tokens > written)
    connection.sock.close() if not stream else connection.getresponse().close()
    connection.close()
    until(lambda: engine.running == 0 and server.service.admission.active == 0)
    assert server.service.engine.stats.written_tokens - written < 300


def test_image_in_the_middle_of_a_message_stays_there(client, assistant):
    content = [{"type": "text", "text": "red"}, part(png(numbered(1))), {"type": "text", "text": "what?"}]
    found = ask(client, "", messages=[{"role": "user", "content": content}])
    marked = [content[0], {"type": "image"}, content[2]]
    expected = assistant.chat([{"role": "user", "content": marked}], [numbered(1)], max_new_tokens=8)
    assert found.choices[0].message.content == expected


def test_draining_server_finishes_requests_and_rejects_new_ones(assistant, parts):
    own = Assistant(copy.deepcopy(parts[0]), parts[1])
    with serving(own, slots=1, step_tokens=8) as running, ThreadPoolExecutor(1) as pool:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0)
        slow = pool.submit(ask, client, "describe the image", max_tokens=150)
        until(lambda: running.service.engine.stats.written_tokens)
        running.server.drain()
        assert_rejects(running, client)
        assert slow.result(30).choices[0].message.content == offline(assistant, "describe the image", count=150)


def assert_rejects(running: Running, client) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, "what?")
    assert (caught.value.status_code, caught.value.code) == (503, "draining")
    assert running.send("GET", "/ready")[:2] == (503, {"status": "draining"})


def test_taken_address_is_an_error_before_the_model_is_loaded(server):
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(InputError, match=f"`port` {port}: Address already in use; choose another"):
        serve("no such model", port=port)
    with pytest.raises(InputError, match=r"cannot listen at `host` 192\.0\.2\.1, `port`"):
        serve("no such model", host="192.0.2.1")


def test_empty_key_is_an_error(assistant):
    with pytest.raises(InputError, match="`api_key` is empty"):
        make_server(assistant, "test", api_key=" ")
