"""What the web page is made of, without Gradio: budgets of pixels, conversations, and the door."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import sys
from contextlib import aclosing, contextmanager

import pytest
from conftest import picture
from hypothesis import given
from hypothesis import strategies as st
from serving import png, until

from convllava import InputError
from convllava.geometry import Size
from convllava.inference import Assistant
from convllava.inference.engine import Engine
from convllava.inference.image_queue import ImageEncoder
from convllava.serving import dialogue, guard, server
from convllava.serving.budget import Budget
from convllava.serving.dialogue import Picture, Reply, Talk, reply_to
from convllava.serving.gate import Gate
from convllava.serving.guard import PageGuard
from convllava.serving.limits import Limits
from convllava.serving.refusal import RefusalError
from convllava.serving.service import Service

LIMITS = Limits(body_bytes=300_000, image_pixels=200_000, new_tokens=8, queue=1, seconds=30)


@contextmanager
def service_of(parts, limits=LIMITS):
    model, processor = parts
    own = Assistant(copy.deepcopy(model), processor)
    engine = Engine(own, slots=1, step_tokens=16)
    engine.start()
    found = Service(own, "test", engine, ImageEncoder(own), limits)
    yield found
    found.close()


@pytest.fixture
def service(parts):
    with service_of(parts) as found:
        yield found


@pytest.fixture
def talk(tmp_path):
    file = tmp_path / "page.png"
    file.write_bytes(png(picture(256, 192, 1)))
    return Talk(Picture(file, Size(256, 192)))


def say(service, talk, question, max_pixels=None):
    async def last():
        return [reply async for reply in reply_to(service, talk, question, max_pixels)][-1]

    return asyncio.run(last())


def test_a_conversation_says_what_the_model_says_to_the_whole_history(service, talk, parts):
    assistant = Assistant(*parts)
    messages = []
    for question in ("what is red?", "what?"):
        reply = say(service, talk, question)
        marks = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*marks, {"type": "text", "text": question}]})
        assert reply.text == assistant.chat(messages, [talk.picture.path], max_new_tokens=8)
        assert reply.usage["prompt_tokens_details"]["image_tokens"] == 4 * (3 + 1)
        assert 0 < reply.first <= reply.seconds
        messages.append({"role": "assistant", "content": reply.text})
        talk = talk.answered(question, reply.text)
    assert service.encoder.stats.images == 1
    assert reply.usage["prompt_tokens_details"]["cached_tokens"] > 16
    assert service.metrics.requests.labels(200)._value.get() == 2


def test_the_last_look_is_whole_however_slowly_the_others_are_shown(service, talk, monkeypatch):
    monkeypatch.setattr(dialogue, "_FRAME", 0.001)

    async def last():
        looks = []
        async for reply in reply_to(service, talk, "what is red?"):
            looks.append(reply)
            await asyncio.sleep(0.5)
        return looks[-1]

    assert asyncio.run(last()).usage["completion_tokens"] == 8


@given(height=st.integers(64, 700), width=st.integers(64, 700), side=st.floats(0, 1000))
def test_a_budget_foretells_what_the_tower_sees(parts, height, width, side):
    budget = Budget(Assistant(*parts))
    cost = budget.cost(Size(height, width), budget.pixels(side))
    assert cost.canvas.height * cost.canvas.width <= 256**2
    assert cost.visual_tokens == cost.canvas.height // 64 * (cost.canvas.width // 64 + 1)
    whole = budget.cost(Size(height, width), None)
    assert cost.flops <= whole.flops
    assert f"{cost.visual_tokens} visual tokens" in budget.describe(Size(height, width), budget.pixels(side))


def test_the_budget_that_is_shown_is_the_one_that_is_asked_with(parts, talk):
    model, processor = parts
    processor = copy.deepcopy(processor)
    processor.image_processor.change(min_pixels=64**2, max_pixels=512**2)
    with service_of((model, processor)) as service:
        budget = Budget(service.assistant)
        assert list(budget.sides) == [256, 320, 384, 448, 512]
        assert [budget.pixels(side) for side in (256, 330, 512)] == [256**2, 320**2, None]
        large = Talk(Picture(talk.picture.path, Size(600, 500)))
        large.picture.path.write_bytes(png(picture(400, 500, 1)))
        for pixels in (256**2, None):
            usage = say(service, large, "what?", pixels).usage
            expected = budget.cost(Size(400, 500), pixels).visual_tokens
            assert usage["prompt_tokens_details"]["image_tokens"] == expected
        assert budget.cost(Size(400, 500), 256**2).visual_tokens < budget.cost(Size(400, 500), None).visual_tokens


def test_an_answer_in_a_line_says_what_it_took():
    usage = {"prompt_tokens": 30, "completion_tokens": 7, "prompt_tokens_details": {"image_tokens": 20}}
    found = Reply("a", 0.125, 1.5, usage).describe()
    assert found == "20 visual + 10 text tokens · first token 0.12 s · 7 tokens in 1.50 s"
    assert Reply("a").describe() == ""


def test_who_does_not_listen_any_more_frees_the_slot(parts, talk):
    with service_of(parts, Limits(new_tokens=400, queue=1)) as service:

        async def listen_once():
            async with aclosing(reply_to(service, talk, "what?")) as replies:
                async for reply in replies:
                    if reply.text:
                        return

        asyncio.run(listen_once())
        until(lambda: service.engine.scheduler.running == 0)
        assert service.gate.inside == 0
        assert service.engine.stats.written_tokens < 400


def test_the_page_is_refused_what_a_client_is(service, talk, parts):
    for bad, question, status in (
        (Talk(), "what?", 400),
        (Talk(Picture(talk.picture.path.with_name("gone.png"), Size(1, 1))), "what?", 422),
        (talk, "an <image>", 400),
        (talk, "a" * 100_001, 400),
    ):
        with pytest.raises(RefusalError) as caught:
            say(service, bad, question)
        assert caught.value.status == status
    with service.gate.entered(), service.gate.entered(), pytest.raises(RefusalError, match="being served"):
        say(service, talk, "what?")
    with service_of(parts, Limits(seconds=0.0001)) as slow, pytest.raises(RefusalError, match="took more than"):
        say(slow, talk, "what?")
    assert service.gate.inside == 0


def test_a_picture_is_measured_upright_and_a_bad_one_is_refused_in_a_line(service):
    assert asyncio.run(service.measure(png(picture(40, 60)))) == (40, 60)
    for data in (b"hello", png(picture(100, 100))[:5000], png(picture(500, 500)), b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        with pytest.raises(RefusalError) as caught:
            asyncio.run(service.measure(data))
        assert caught.value.status == 422
        assert "\n" not in caught.value.message


FORM = {"content-type": "multipart/form-data; boundary=x"}
KEY = {"authorization": "Basic " + base64.b64encode(b"anybody:the key:\xc3\xa9").decode()}
JOIN = "/ui/gradio_api/queue/join"


@pytest.fixture
def knock(tmp_path):
    """Send a request to a guard: the status, and the body that the page behind it saw."""

    async def page(scope, receive, send):
        seen.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    seen, headers_out, body_out = [], [], []

    def knock(method, path, body=b"", headers=None, key=None, gate=None):
        door = PageGuard(page, gate or Gate(2), LIMITS, tmp_path, key)
        told = {"host": "here:8000", "content-type": "application/json"} | (headers or {})
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "scheme": "http"}
        scope["headers"] = [(name.encode(), value.encode("latin-1")) for name, value in told.items()]
        sent = []

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message):
            sent.append(message)

        seen.clear()
        asyncio.run(door(scope, receive, send))
        headers_out[:], body_out[:] = sent[0]["headers"], [message["body"] for message in sent[1:]]
        return sent[0]["status"], seen[0] if seen else None

    knock.headers, knock.body = headers_out, body_out
    return knock


@pytest.mark.parametrize("path", ["", "/", "/config", "/assets/a/b.js", "/gradio_api/queue/data", "/theme.css"])
def test_the_places_of_a_page_are_open(knock, path):
    assert knock("GET", "/ui" + path)[0] == 200
    assert any(name == b"content-security-policy" for name, _ in knock.headers)


def test_other_places_are_not_there(knock, tmp_path):
    own = tmp_path / "a.png"
    assert knock("GET", f"/ui/gradio_api/file={own}")[0] == 200
    for path in (
        "/gradio_api/file=/etc/passwd",
        f"/gradio_api/file={tmp_path}/../other",
        f"/gradio_api/file={tmp_path}-beside/a",
        "/gradio_api/file=http://127.0.0.1/a",
        "/gradio_api/proxy=http://127.0.0.1/a",
        "/gradio_api/run/predict",
        "/gradio_api/component_server",
        "/gradio_api/vibe-edit",
        "/monitoring",
        "/login",
    ):
        assert knock("GET", "/ui" + path)[0] == 404
    assert knock("POST", "/v1/chat/completions", b"passes")[1] == b"passes"


def test_only_uploaded_files_can_be_named(knock, tmp_path):
    for path, status in (
        (str(tmp_path / "a" / "b.png"), 200),
        ("/etc/passwd", 400),
        (f"{tmp_path}/../b.png", 400),
        ("http://example.org/b.png", 400),
        ("etc/passwd\0", 400),
        ("\ud800", 400),
        (None, 400),
        (["/etc/passwd"], 400),
    ):
        body = json.dumps({"data": [1, {"x": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}]}).encode()
        assert knock("POST", JOIN, body) == (status, body if status == 200 else None)
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert knock("POST", JOIN, json.dumps({"path": str(tmp_path / "link")}).encode())[0] == 400
    for body in (b"{", b"[" * 100_000, b"\xff"):
        assert knock("POST", JOIN, body)[0] == 400


def test_a_full_server_takes_no_picture_but_hears_who_stops(knock, tmp_path, monkeypatch):
    assert knock("POST", "/ui/gradio_api/upload", b"abc", FORM, gate=Gate(0))[0] == 429
    assert knock("POST", "/ui/gradio_api/cancel", b"{}", gate=Gate(0))[0] == 200
    (tmp_path / "held").write_bytes(b"0" * 10_001)
    monkeypatch.setattr(guard, "_MOST_HELD", 10_000)
    assert knock("POST", "/ui/gradio_api/upload", b"abc", FORM)[0] == 503


def test_an_upload_is_refused_in_words_since_gradio_shows_all_of_the_answer(knock, monkeypatch):
    large, draining = b"0" * (LIMITS.body_bytes + 1), Gate(2)
    draining.drain()
    monkeypatch.setattr(guard, "_MOST_HELD", -1)
    for body, gate, line in (
        (b"abc", Gate(0), b"0 requests are being served; try again later"),
        (b"abc", draining, b"the server is going down; ask another or try again later"),
        (b"abc", Gate(2), b"too many pictures are held; try again later"),
    ):
        knock("POST", "/ui/gradio_api/upload", body, FORM, gate=gate)
        assert knock.body == [line]
    monkeypatch.setattr(guard, "_MOST_HELD", 0)
    knock("POST", "/ui/gradio_api/upload", large, FORM)
    assert knock.body == [b"the body has more than 0.286102 MiB; send fewer or smaller images"]
    knock("POST", JOIN, large)
    assert json.loads(knock.body[0])["error"]["code"] == "body_too_large"


def test_many_empty_files_are_much_and_what_is_old_makes_room(knock, tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "empty").touch()
    monkeypatch.setattr(guard, "_MOST_HELD", 6 * 4096 - 1)
    assert knock("POST", "/ui/gradio_api/upload", b"abc", FORM)[0] == 503
    monkeypatch.setattr(guard, "KEPT_SECONDS", -60)
    assert knock("POST", "/ui/gradio_api/upload", b"abc", FORM)[0] == 200
    assert not list(tmp_path.iterdir())


def test_bodies_have_the_limits_of_the_api(knock):
    large = b"0" * (LIMITS.body_bytes + 1)
    assert knock("POST", "/ui/gradio_api/upload", b"abc", FORM) == (200, b"abc")
    assert knock("POST", "/ui/gradio_api/upload", large, FORM)[0] == 413
    assert knock("POST", JOIN, large)[0] == 413
    assert knock("POST", JOIN, b"{}", {"content-type": "text/plain"})[0] == 400
    assert knock("POST", "/ui/gradio_api/upload", b"abc")[0] == 400


def test_no_page_of_another_site_may_send_anything(knock):
    assert knock("POST", "/ui/gradio_api/upload", b"a", FORM | {"origin": "http://here:8000"})[0] == 200
    for origin in ("https://evil.example", "http://here:8001", "http://[", "null", ""):
        assert knock("POST", "/ui/gradio_api/upload", b"a", FORM | {"origin": origin})[0] == 403


def test_an_open_page_does_not_keep_a_server_that_ends(tmp_path):
    gate = Gate(2)

    async def heartbeat(scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass

    async def nothing():
        await asyncio.Event().wait()

    async def end():
        scope = {"type": "http", "method": "GET", "path": "/ui/gradio_api/heartbeat/a", "headers": []}
        page = asyncio.create_task(PageGuard(heartbeat, gate, LIMITS, tmp_path)(scope, nothing, nothing))
        with gate.entered():
            gate.drain()
            await asyncio.wait({page}, timeout=0.7)
            assert not page.done()
        await asyncio.wait_for(page, 20)

    asyncio.run(end())


def test_with_a_key_nothing_of_the_page_is_open(knock):
    for path in ("/ui", "/ui/", "/ui/config", "/ui/assets/a.js", "/ui/monitoring"):
        assert knock("GET", path, key="the key:é")[0] == 401
        assert (b"www-authenticate", b"Basic") in [(name, value[:5]) for name, value in knock.headers]
    assert knock("GET", "/ui/", headers=KEY, key="the key:é")[0] == 200
    for bad in ("Basic", "Basic %%%", "Basic é", "Bearer the key:é", KEY["authorization"] + "AA"):
        assert knock("GET", "/ui/", headers={"authorization": bad}, key="the key:é")[0] == 401


def test_without_gradio_the_page_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "convllava.serving.page", raising=False)
    with pytest.raises(InputError, match=r"the page needs gradio; pip install 'convllava\[ui\]'"):
        server.serve("there is no such model", port=0, ui=True)
