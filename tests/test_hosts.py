"""The Host header: a server answers only to its own names, against DNS rebinding."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from convllava.inference import Assistant
from convllava.serving import server
from convllava.serving.hosts import HostCheck, is_loopback, parse_host


def answer(host: str, names: tuple[str, ...] = ()):
    app = Starlette(routes=[Route("/", lambda _: PlainTextResponse("in"))])
    return TestClient(HostCheck(app, names)).get("/", headers={"host": host})


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8000",
        "127.0.0.1:8000",
        "[::1]:8000",
        "[::1]",
        "127.0.0.2",
        "[::ffff:7f00:1]:8000",
        "ai.example.org",
    ],
)
def test_own_names_are_accepted_with_any_port(host):
    assert answer(host, ("AI.example.org",)).text == "in"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example:80",
        "",
        "[::2]",
        "[::1]evil.example",
        "[::1",
        "localhost:x",
    ],
)
def test_other_names_are_rejected_with_the_fix(host):
    rejected = answer(host)
    error = rejected.json()["error"]
    assert (rejected.status_code, error["code"]) == (403, "unknown_host")
    assert "`allow_hosts`" in error["message"]


@pytest.mark.parametrize(
    ("given", "requested"),
    [
        ("AI.example.org:8000", "ai.example.org"),
        ("ai.example.org.", "ai.example.org:8000"),
        ("ai.example.org.:8000", "ai.example.org."),
        ("[FD00::1]:8000", "[fd00::1]"),
        ("fd00::1", "[fd00::1]:8000"),
    ],
)
def test_allowed_name_may_be_written_in_any_form(given, requested):
    assert answer(requested, (given,)).text == "in"
    assert answer("fd00", (given,)).status_code == 403


def test_empty_allowed_name_allows_nothing():
    assert answer("", (":8000", ".", "[]")).status_code == 403


@pytest.mark.parametrize(("host", "status"), [("0.0.0.0", 200), ("127.0.0.1", 403)])
def test_server_on_the_network_accepts_any_name(parts, monkeypatch, host, status):
    made = []
    monkeypatch.setattr(server, "load", lambda *_, **__: Assistant(copy.deepcopy(parts[0]), parts[1]))
    monkeypatch.setattr(server.DrainingServer, "run", lambda self, sockets: made.append((self, *sockets)))
    server.serve(host=host, port=0, threads=torch.get_num_threads(), slots=1)
    ((own, place),) = made
    place.close()
    response = TestClient(own.config.app).get("/health", headers={"host": "192.168.1.5:8000"})
    assert response.status_code == status


@given(st.from_regex(r"[a-z0-9.-]{1,30}", fullmatch=True), st.integers(0, 65535))
def test_port_does_not_change_the_name(name, port):
    assert parse_host(f"{name}:{port}") == parse_host(name)


def test_loopback_is_recognised_in_every_form():
    inside = ("127.0.0.1", "::1", "localhost", "LOCALHOST", "127.1", "127.0.0.2", "2130706433", "::ffff:127.0.0.1")
    assert [is_loopback(host) for host in inside] == [True] * len(inside)
    outside = ("0.0.0.0", "::", "", "10.0.0.1", "::ffff:10.0.0.1", "x" * 300)
    assert [is_loopback(host) for host in outside] == [False] * len(outside)
