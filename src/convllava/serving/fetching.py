"""Images behind URLs, from named hosts alone, and never from an address that is not public.

A name is resolved once, every address it has is looked at, and the connection goes to one that was looked at: an answer
that changes between looking and connecting changes nothing. A redirect is a new URL, to which all of this applies.
One deadline holds for names, connections, redirects and bodies together, however slowly anything trickles in.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Collection
from concurrent.futures import Future
from contextlib import closing, suppress
from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import SplitResult, urljoin, urlsplit

from convllava.errors import InputError

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 3
_TUNNELS = [ip_network(block) for block in ("::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16")]
"""Addresses of IPv6 that stand for others of IPv4 (RFC 4291, 6052, 8215, 4380, 3056)."""


def is_public(address: str) -> bool:
    """Whether an address belongs to the open internet: not loopback, private, link-local, multicast or reserved, and
    none of those in the clothes of IPv6."""
    found = ip_address(address.partition("%")[0])
    if isinstance(found, IPv6Address):
        if found.ipv4_mapped:
            return is_public(str(found.ipv4_mapped))
        if any(found in block for block in _TUNNELS):
            return False
    return found.is_global and not found.is_multicast


class Fetcher:
    """Gets the bytes behind URLs of the hosts it was told.

    Args:
        hosts: Names as they stand in URLs.
        max_bytes: Of an answer.
        seconds: For everything together.
    """

    def __init__(self, hosts: Collection[str], max_bytes: int, seconds: float) -> None:
        self.hosts = frozenset(host.lower() for host in hosts)
        self.max_bytes, self.seconds = max_bytes, seconds

    def fetch(self, url: str) -> bytes:
        """The bytes behind a URL.

        Raises:
            InputError: its host is not one of those that are allowed or has an address that is not public; it does not
                answer with 200 in time; or the answer is too large.
        """
        deadline = time.monotonic() + self.seconds
        for _ in range(_MOST_REDIRECTS + 1):
            parts = self._allowed(url)
            try:
                found = self._get(parts, _resolve(parts, deadline), deadline)
                _left(deadline)  # what was cut short may look whole
            except (OSError, http.client.HTTPException, ValueError) as error:
                if time.monotonic() >= deadline:
                    raise InputError(f"{parts.hostname} does not give the image within {self.seconds:g} s") from error
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{parts.hostname} does not give the image: {type(error).__name__}") from error
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise InputError("the URL redirects too often; give the image's own")

    def _allowed(self, url: str) -> SplitResult:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise InputError("the URL is malformed") from None
        if parts.scheme not in _PORTS or not parts.hostname or parts.username is not None:
            raise InputError("an image is a data: URI or an http(s):// URL without a user")
        if parts.hostname not in self.hosts:
            raise InputError(
                f"no image is fetched from {parts.hostname[:100]}; send the image as data:image/png;base64,... "
                "(or start the server with --allow-urls)"
            )
        if port not in (None, _PORTS[parts.scheme]):
            raise InputError(f"no image is fetched from port {port}; use that of {parts.scheme}")
        return parts

    def _get(self, parts: SplitResult, address: str, deadline: float) -> bytes | str:
        """The body, or where the answer redirects to."""
        with closing(_Connection(parts, address, deadline)) as connection:
            watch = threading.Timer(_left(deadline), connection.abort)
            watch.start()
            try:
                connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
                return self._read(connection.getresponse())
            finally:
                watch.cancel()

    def _read(self, response: http.client.HTTPResponse) -> bytes | str:
        if response.status in _REDIRECTS:
            return response.headers["Location"] or ""
        if response.status != http.HTTPStatus.OK:
            raise InputError(f"the image's server answers {response.status}")
        body = response.read(self.max_bytes + 1)
        if len(body) > self.max_bytes:
            raise InputError(f"the image has more than {self.max_bytes / 2**20:g} MiB")
        if response.length:  # what is left of the length that was promised
            raise InputError("the image's server broke off")
        return body


def _left(deadline: float) -> float:
    """Seconds until then.

    Raises:
        TimeoutError: there are none.
    """
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _resolve(parts: SplitResult, deadline: float) -> str:
    """One address of a host of which all are public."""
    assert parts.hostname is not None
    addresses = _look_up(parts.hostname, _PORTS[parts.scheme], _left(deadline))
    if not addresses or not all(is_public(address) for address in addresses):
        raise InputError(f"no image is fetched from {parts.hostname}: its address is not public")
    return addresses[0]


def _look_up(host: str, port: int, seconds: float) -> list[str]:
    """All addresses of a name. Nothing can interrupt the resolver, so its thread is left to itself when it is late."""
    answer: Future[list[str]] = Future()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answer.set_result([str(entry[4][0]) for entry in found])
        except (OSError, ValueError) as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return answer.result(seconds)


class _Connection(http.client.HTTPConnection):
    """To an address that was looked at, in the name of its host; proxies are not asked."""

    def __init__(self, parts: SplitResult, address: str, deadline: float) -> None:
        assert parts.hostname is not None
        super().__init__(parts.hostname, _PORTS[parts.scheme])
        self._address, self._deadline = address, deadline
        self._context = ssl.create_default_context() if parts.scheme == "https" else None
        self._opened: socket.socket | None = None

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), _left(self._deadline))
        if self._context is not None:  # the handshake comes later, on a socket that can be shut down
            self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
        self._opened = self.sock
        self.sock.settimeout(_left(self._deadline))  # `abort` may have come too early
        if isinstance(self.sock, ssl.SSLSocket):
            self.sock.do_handshake()

    def abort(self) -> None:
        """Wake who reads: the time is up. An answer without a length takes `sock` over, so that is not asked."""
        if self._opened is not None:
            with suppress(OSError):  # closed meanwhile, by either side
                socket.socket.shutdown(self._opened, socket.SHUT_RDWR)
