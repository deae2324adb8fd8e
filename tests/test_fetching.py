"""Images behind URLs: only from allowed hosts and public addresses, also with hostile DNS, redirects and servers."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convllava import InputError
from convllava.serving import fetching
from convllava.serving.fetching import Fetcher, is_public


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("::ffff:93.184.215.14", True),
        ("127.0.0.1", False),
        ("127.9.9.9", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("::127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_only_internet_addresses_are_public(address, public):
    assert is_public(address) is public


@given(st.ip_addresses(v=4))
def test_ipv4_address_is_as_public_inside_ipv6(address):
    assert is_public(f"::ffff:{address}") == is_public(str(address))
    assert not is_public(f"64:ff9b::{address}")


class _Pages(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.path, self.headers["Host"]))
        status, body, headers = self.server.pages[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    """Start a web server on this machine."""
    server = HTTPServer(("127.0.0.1", 0), _Pages)
    server.requests, server.pages = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetcher(site, monkeypatch):
    """Return a fetcher for the hosts `good.example` and `moved.example`, which both resolve to the site."""
    port = site.server_address[1]
    monkeypatch.setattr(fetching, "_PORTS", {"http": port, "https": port})
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
    resolve(monkeypatch, {"good.example": ["127.0.0.1"], "moved.example": ["127.0.0.1"]})
    return Fetcher(["good.example", "moved.example", "bad.example", "mixed.example"], max_bytes=1000, seconds=1)


def resolve(monkeypatch, names):
    def getaddrinfo(host, port, *_, **__):
        if host not in names and host != "127.0.0.1":
            raise OSError("no such name")
        return [(2, 1, 6, "", (address, port)) for address in names.get(host, [host])]

    monkeypatch.setattr(fetching.socket, "getaddrinfo", getaddrinfo)


@pytest.fixture
def connected(monkeypatch):
    """Return the list of connected targets. They must be addresses: a name could resolve differently a second time."""
    original, places = fetching.socket.create_connection, []

    def create_connection(address, *rest):
        places.append(address[0])
        return original(address, *rest)

    monkeypatch.setattr(fetching.socket, "create_connection", create_connection)
    return places


def test_request_goes_to_the_checked_address_with_host_name(fetcher, site, connected):
    site.pages["/a.png?b=c"] = (200, b"image", {})
    assert fetcher.fetch("http://good.example/a.png?b=c") == b"image"
    assert connected == ["127.0.0.1"]
    assert site.requests[0][1].partition(":")[0] == "good.example"


def test_redirects_are_followed_to_allowed_hosts_only(fetcher, site, connected):
    site.pages["/"] = (200, b"image", {})
    site.pages["/moved"] = (302, b"", {"Location": "http://moved.example/"})
    site.pages["/local"] = (302, b"", {"Location": "http://127.0.0.1/"})
    site.pages["/file"] = (302, b"", {"Location": "file:///etc/passwd"})
    site.pages["/again"] = (302, b"", {"Location": "/again"})
    assert fetcher.fetch("http://good.example/moved") == b"image"
    with pytest.raises(InputError, match=r"fetches no images from 127\.0\.0\.1"):
        fetcher.fetch("http://good.example/local")
    with pytest.raises(InputError, match="an image must be a data: URI"):
        fetcher.fetch("http://good.example/file")
    with pytest.raises(InputError, match="redirects too often"):
        fetcher.fetch("http://good.example/again")
    assert set(connected) == {"127.0.0.1"}


def test_host_with_any_non_public_address_is_rejected(fetcher, site, monkeypatch):
    resolve(monkeypatch, {"bad.example": ["10.0.0.1"], "mixed.example": ["127.0.0.1", "::1"]})
    for host in ("bad.example", "mixed.example"):
        with pytest.raises(InputError, match="its address is not public"):
            fetcher.fetch(f"http://{host}/")
    with pytest.raises(InputError, match="did not send the image"):
        fetcher.fetch("http://good.example/")
    assert not site.requests


def test_bad_answers_are_errors(fetcher, site):
    site.pages["/large"] = (200, b"x" * 1001, {})
    site.pages["/absent"] = (404, b"", {})
    site.pages["/short"] = (200, b"x", {"Content-Length": "50"})
    for path, message in (("large", "more than"), ("absent", "answered with status 404"), ("short", "only a part")):
        with pytest.raises(InputError, match=message):
            fetcher.fetch(f"http://good.example/{path}")


def test_without_allowed_hosts_nothing_is_fetched():
    with pytest.raises(InputError, match="send the image as data:"):
        Fetcher([], 1000, 1).fetch("https://example.org/a.png")
    with pytest.raises(InputError, match="malformed"):
        Fetcher([], 1000, 1).fetch("http://[::1/")


@pytest.fixture
def slow(fetcher, monkeypatch):
    """Return a list for the first bytes of a slow server, which then sends single bytes for three seconds."""
    beginnings: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    monkeypatch.setattr(fetching, "_PORTS", {"http": port, "https": port})
    fetcher.seconds = 0.5

    def answer() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                time.sleep(0.2)
                with client, suppress(OSError):
                    client.sendall(beginnings[0])
                    for _ in range(60):
                        time.sleep(0.05)
                        client.sendall(b"x")

    threading.Thread(target=answer, daemon=True).start()
    yield beginnings
    listener.close()


_OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("scheme", "beginning"),
    [
        ("http", b"HTTP/1.1 200 "),
        ("http", _OK + b"X-Header: "),
        ("http", _OK + b"Content-Length: 900\r\n\r\n"),
        ("http", _OK + b"\r\n"),
        ("http", _OK + b"Transfer-Encoding: chunked\r\n\r\n384\r\n"),
        ("https", b"\x16\x03\x03\x40\x00"),
    ],
    ids=["status", "header", "body", "body without a length", "chunk", "handshake"],
)
def test_slow_bytes_do_not_extend_the_time(fetcher, slow, scheme, beginning):
    slow.append(beginning)
    assert_late(fetcher, f"{scheme}://good.example/")


def test_redirects_share_one_deadline(fetcher, slow):
    slow.append(b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n")
    assert_late(fetcher, "http://good.example/")


def test_slow_name_resolution_is_abandoned(fetcher, monkeypatch):
    fetcher.seconds, late = 0.2, threading.Event()
    monkeypatch.setattr(fetching.socket, "getaddrinfo", lambda *_, **__: late.wait(3) and [])
    assert_late(fetcher, "http://good.example/")
    late.set()


def assert_late(fetcher, url):
    started = time.monotonic()
    with pytest.raises(InputError, match=f"good.example did not send the image within {fetcher.seconds} s"):
        fetcher.fetch(url)
    assert time.monotonic() - started < fetcher.seconds + 1
