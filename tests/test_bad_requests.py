"""Hostile requests: each gets OpenAI's error object, and good requests still work."""

from __future__ import annotations

import copy
import json

import openai
import pytest
from hostile import BAD
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import PATH, question, request, serving, until

from convllava.inference import Assistant
from convllava.serving.api_error import ApiError
from convllava.serving.limits import Limits
from convllava.serving.schema import ChatRequest, parse

LIMITS = Limits(
    body_bytes=300_000,
    body_seconds=0.5,
    images=2,
    image_pixels=200_000,
    prompt_characters=3000,
    new_tokens=450,
    choices=3,
    queue=1,
    seconds=30,
)


@pytest.fixture(scope="module")
def server(parts):
    model, processor = parts
    own = Assistant(copy.deepcopy(model), processor)
    with serving(own, slots=2, step_tokens=16, limits=LIMITS, allow_urls=["pictures.example"]) as running:
        yield running


@pytest.mark.parametrize("name", BAD)
def test_bad_request_gets_its_status_code_and_parameter(server, name):
    content, status, code, parameter = BAD[name]
    found, body, _ = server.post(content)
    assert (found, body["error"]["code"], body["error"]["param"]) == (status, code, parameter)
    assert body["error"]["type"] == "invalid_request_error"
    assert 5 < len(body["error"]["message"]) < 400
    assert "\n" not in body["error"]["message"]
    assert server.service.admission.active == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown detail", "detail: Input should be 'auto', 'low' or 'high'"),
        ("image_url as a string", "image_url: Input should be an object"),
        ("text part without text", "text: Field required"),
        ("sound", '"image_url": {"url": ...}}'),
        ("part without a type", '"image_url": {"url": ...}}'),
        ("many stops", "stop: List should have at most 4 items"),
        ("stop of another type", "stop: Input should be a string or a list"),
        ("no content", "messages.0.content: Input should be a string or a list"),
        ("image mark", "leave it out of the text; images are separate parts of a message"),
    ],
)
def test_error_names_the_problem_and_the_fix(server, name, message):
    assert message in server.post(BAD[name][0])[1]["error"]["message"]


def test_errors_contain_no_paths_of_the_machine(server):
    for name in ("local file", "path", "no image", "cut image"):
        message = server.post(BAD[name][0])[1]["error"]["message"]
        assert "/" not in message.replace("data:image/png", "").replace("http(s)://", "")


def test_openai_client_raises_its_own_errors(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    with pytest.raises(openai.UnprocessableEntityError, match="image 1"):
        client.chat.completions.create(model="test", messages=question("what?", b"hello"))
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="test", messages=question("what?"), n=4)
    assert caught.value.param == "n"


@pytest.mark.parametrize("declared", [True, False])
def test_error_for_a_large_body_can_be_read(server, declared):
    body = b"x" * (LIMITS.body_bytes + 1_000_000)
    connection = server.connect()
    headers = {"Content-Type": "application/json"}
    connection.request("POST", PATH, body if declared else iter([body]), headers, encode_chunked=not declared)
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["error"]["code"]) == (413, "body_too_large")


def test_slow_body_is_an_error(server):
    connection = server.connect()
    connection.putrequest("POST", PATH)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"{")
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["error"]["code"]) == (408, "body_too_slow")


def test_other_content_types_are_rejected(server):
    found = server.send("POST", PATH, json.dumps(request()).encode(), **{"Content-Type": "text/plain"})
    assert (found[0], found[1]["error"]["code"]) == (400, "invalid_content_type")


def test_unknown_paths_are_api_errors(server):
    assert server.send("GET", "/v1/files")[0] == 404
    status, body, _ = server.send("GET", PATH)
    assert (status, body["error"]["code"]) == (405, "unknown_url")


def test_too_many_requests_get_retry_after(server):
    streams = []
    for number in range(3):
        connection = server.connect()
        body = json.dumps(request("what " * number + "?", max_tokens=450, stream=True, stop=["never said"]))
        connection.request("POST", PATH, body, {"Content-Type": "application/json"})
        streams.append(connection)
    until(lambda: server.service.admission.active == 3)
    status, body, headers = server.post(request())
    assert (status, body["error"]["code"], body["error"]["type"]) == (429, "queue_full", "rate_limit_error")
    assert int(headers["retry-after"]) > 0
    for connection in streams:
        connection.close()
    until(lambda: server.service.admission.active == 0)
    assert server.post(request())[0] == 200


def test_answer_beyond_the_deadline_is_cancelled(parts):
    own = Assistant(copy.deepcopy(parts[0]), parts[1])
    with serving(own, slots=1, step_tokens=4, limits=Limits(seconds=0.05)) as running:
        slow = request("describe the image " * 60, max_tokens=300, stop=["never said"])
        status, body, headers = running.post(slow)
        assert (status, body["error"]["code"], "retry-after" in headers) == (503, "too_late", True)
        connection = running.connect()
        streamed = request("the total " * 60, max_tokens=300, stream=True, stop=["never said"])
        connection.request("POST", PATH, json.dumps(streamed), {"Content-Type": "application/json"})
        text = connection.getresponse().read().decode()
        assert json.loads(text.strip().splitlines()[-1].removeprefix("data: "))["error"]["code"] == "too_late"
        counted = running.service.metrics.text().decode()
        assert 'convllava_errors_total{code="too_late"} 2.0' in counted
        assert 'convllava_requests_total{status="200"} 1.0' in counted
        until(lambda: running.service.engine.running == 0)


def test_requests_need_the_key(parts):
    own = Assistant(copy.deepcopy(parts[0]), parts[1])
    with serving(own, slots=1, api_key="sécret") as running:
        for header in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Basic sécret"}):
            status, body, headers = running.post(request(), **header)
            assert (status, body["error"]["type"]) == (401, "authentication_error")
            assert headers["www-authenticate"] == "Bearer"
        right = {"Authorization": "Bearer sécret".encode().decode("latin-1")}
        assert running.post(request(), **right)[0] == 200
        assert running.send("GET", "/v1/models")[0] == 401


def test_failed_step_gives_one_server_error(server, monkeypatch):
    monkeypatch.setattr(server.service.engine.model, "forward", lambda *_: 1 / 0)
    status, body, _ = server.post(request())
    assert (status, body["error"]["type"]) == (500, "server_error")
    assert 'convllava_requests_total{status="500"}' in server.service.metrics.text().decode()
    monkeypatch.undo()
    assert server.post(request())[0] == 200


def test_bad_requests_do_not_change_a_running_answer(server, parts):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    text, length = "describe the image", 200
    pieces = client.chat.completions.create(**request(text, max_tokens=length, stream=True))
    first = next(pieces).choices[0].delta.content or ""
    statuses = [server.post(content)[0] for content, *_ in BAD.values()]
    assert statuses == [status for _, status, *_ in BAD.values()]
    served = first + "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert served == Assistant(*parts).chat([{"role": "user", "content": text}], max_new_tokens=length)


def test_error_of_the_chat_template_is_a_client_error(server, monkeypatch):
    raising = "{{ raise_exception('a system message must be first') }}"
    monkeypatch.setattr(server.service.assistant.processor, "chat_template", raising)
    status, body, _ = server.post(request())
    assert (status, body["error"]["code"]) == (400, "invalid_prompt")
    assert "must be first" in body["error"]["message"]


_FIELDS = [*ChatRequest.model_fields, "role", "content", "type", "text", "image_url", "url", "other"]
_VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)


@settings(max_examples=200)
@given(
    st.recursive(_VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_FIELDS), inner))
)
def test_parser_survives_any_json(content):
    valid = {"model": "test", "messages": question("what?")}
    for body in (content, valid | content if isinstance(content, dict) else content):
        assert outcome(body) in (200, 400)


def outcome(content: object) -> int:
    try:
        parse(json.dumps(content).encode())
    except ApiError as error:
        return error.status if "\n" not in error.message else 0
    return 200
