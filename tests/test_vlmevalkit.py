"""Requests as VLMEvalKit sends them get the same answers as the model gives offline.

Its classes `GPT4V` and `LMDeployAPI`, of 2024 and of ms-vlmeval 0.0.20, make these bodies; docs/harnesses.md has the
configuration.
"""

from __future__ import annotations

import copy
from io import BytesIO

import pytest
from conftest import picture
from serving import data_uri, serving

from convllava.inference import Assistant

TEXT = "what is red?"


@pytest.fixture(scope="module")
def assistant(parts):
    return Assistant(*parts)


@pytest.fixture(scope="module")
def server(parts):
    model, processor = parts
    with serving(Assistant(copy.deepcopy(model), processor), slots=4, step_tokens=16) as running:
        yield running


def jpeg(number: int) -> bytes:
    buffer = BytesIO()
    picture(128, 64 * (1 + number), number).save(buffer, "JPEG")
    return buffer.getvalue()


IMAGES = [jpeg(0), jpeg(1)]


def image(data: bytes, **more: str) -> dict:
    return {"type": "image_url", "image_url": {"url": data_uri(data).replace("image/png", "image/jpeg"), **more}}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def user(*content: dict) -> dict:
    return {"role": "user", "content": list(content)}


SYSTEM = {"role": "system", "content": "describe"}
TURNS = [user(image(IMAGES[0]), text("what?")), {"role": "assistant", "content": [text("red")]}, user(text(TEXT))]
BODIES = {
    "GPT4V": {"messages": [user(image(IMAGES[0], detail="high"), text(TEXT))], "temperature": 0, "max_tokens": 8},
    "GPT4V of 2024": {
        "messages": [SYSTEM, user(text(TEXT), image(IMAGES[0], detail="low"), image(IMAGES[1], detail="low"))],
        "n": 1,
        "temperature": 0,
        "max_tokens": 8,
    },
    "GPT4V under a name with o1": {
        "messages": [user(image(IMAGES[1], detail="low"), text(TEXT))],
        "max_completion_tokens": 8,
    },
    "LMDeployAPI": {"messages": [user(image(IMAGES[1]), text(TEXT))], "n": 1, "max_tokens": 8, "temperature": 0.0},
    "LMDeployAPI of 2024": {
        "messages": [user(text(TEXT), image(IMAGES[0]))],
        "max_tokens": 8,
        "n": 1,
        "temperature": 0.0,
        "dataset": "MME",
    },
    "several turns": {"messages": TURNS, "n": 1, "temperature": 0, "max_tokens": 8},
    "health check": {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 8},
    "question to a judge model": {"messages": [user(text(TEXT))], "n": 1, "temperature": 0, "max_tokens": 8},
    "explicit defaults": {
        "messages": [user(image(IMAGES[0], detail="high"), text(TEXT))],
        "temperature": 0,
        "top_p": 1.0,
        "stop": None,
        "seed": None,
        "max_tokens": 8,
    },
}


def offline(assistant: Assistant, messages: list[dict]) -> str:
    """Return the answer to the same messages with images as Python users give them."""
    turns = [
        {"role": turn["role"], "content": turn["content"]}
        if isinstance(turn["content"], str)
        else {
            "role": turn["role"],
            "content": [part if part["type"] == "text" else {"type": "image"} for part in turn["content"]],
        }
        for turn in messages
    ]
    urls = [part["image_url"]["url"] for turn in messages for part in turn["content"] if "image_url" in part]
    images = [next(data for data in IMAGES if image(data)["image_url"]["url"] == url) for url in urls]
    return assistant.chat(turns, images, max_new_tokens=8)


@pytest.mark.parametrize("name", BODIES)
def test_served_answers_to_vlmevalkit_equal_offline_answers(server, assistant, name):
    status, reply, _ = server.post({"model": "test", **BODIES[name]}, Authorization="Bearer sk-local")
    assert status == 200, reply
    assert reply["choices"][0]["message"]["content"] == offline(assistant, BODIES[name]["messages"])


def test_max_tokens_above_the_limit_is_rejected_with_the_limit(server):
    """VLMEvalKit's default is above it, and it prints the error."""
    status, reply, _ = server.post({"model": "test", **BODIES["GPT4V"], "max_tokens": 2048})
    assert status == 400
    assert "2048 tokens of an answer; the limit is 1024" in reply["error"]["message"]
