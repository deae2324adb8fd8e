"""Fetch images behind URLs: only from allowed hosts, and only from public addresses.

A name is resolved once, all its addresses are checked, and the connection goes to a checked address. So a DNS answer
that changes between check and connection has no effect. A redirect is a new URL with the same checks. One deadline
covers name resolution, connections, redirects and bodies, also if the data trickles in slowly.
"""

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

from convllava.errors import ImageError, InputError

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 3
_EMBEDDED_IPV4 = [ip_network(block) for block in ("::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16")]
"""IPv6 blocks whose addresses embed an IPv4 address (RFC 4291, 6052, 8215, 4380, 3056)."""


def is_public(address: str) -> bool:
    """Return whether an address belongs to the public internet: not loopback, private, link-local, multicast or
    reserved, nor an IPv4 address embedded in IPv6."""
    found = ip_address(address.partition("%")[0])
    if isinstance(found, IPv6Address):
        if found.ipv4_mapped:
            return is_public(str(found.ipv4_mapped))
        if any(found in block for block in _EMBEDDED_IPV4):
            return False
    return found.is_global and not found.is_multicast


class Fetcher:
    """Fetches the bytes behind URLs of allowed hosts.

    Args:
        hosts: Allowed host names.
        max_bytes: Most bytes of one answer.
        seconds: Most time of one fetch, redirects included.
    """

    def __init__(self, hosts: Collection[str], max_bytes: int, seconds: float) -> None:
        self.hosts = frozenset(host.lower() for host in hosts)
        self.max_bytes, self.seconds = max_bytes, seconds

    def fetch(self, url: str) -> bytes:
        """Return the bytes behind a URL.

        Raises:
            ImageError: if the host is not allowed or has an address that is not public, if it does not answer with 200
                in time, or if the answer is too large.
        """
        deadline = time.monotonic() + self.seconds
        for _ in range(_MOST_REDIRECTS + 1):
            try:
                parts = urlsplit(url)
                port = parts.port
            except ValueError:
                raise ImageError("the URL is malformed") from None
            if parts.scheme not in _PORTS or not parts.hostname or parts.username is not None:
                raise ImageError("an image must be a data: URI or an http(s):// URL without a user name")
            if parts.hostname not in self.hosts:
                raise ImageError(
                    f"this server fetches no images from {parts.hostname[:100]}; send the image as "
                    "data:image/png;base64,... (or its owner can add the host to `allow_urls`)"
                )
            if port not in (None, _PORTS[parts.scheme]):
                raise ImageError(
                    f"this server fetches no images from port {port}; use the default port of {parts.scheme}"
                )
            try:
                found = self._get(parts, _resolve(parts, deadline), deadline)
                _seconds_left(deadline)  # an answer that was cut off at the deadline may look complete
            except (OSError, http.client.HTTPException, ValueError) as error:
                if time.monotonic() >= deadline:
                    raise ImageError(f"{parts.hostname} did not send the image within {self.seconds:g} s") from error
                if isinstance(error, InputError):
                    raise
                raise ImageError(f"{parts.hostname} did not send the image: {type(error).__name__}") from error
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise ImageError("the URL redirects too often; give the URL of the image itself")

    def _get(self, parts: SplitResult, address: str, deadline: float) -> bytes | str:
        """Return the body, or the location that the answer redirects to."""
        with closing(_Connection(parts, address, deadline)) as connection:
            watch = threading.Timer(_seconds_left(deadline), connection.abort)
            watch.start()
            try:
                connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
                response = connection.getresponse()
                if response.status in _REDIRECTS:
                    return response.headers["Location"] or ""
                if response.status != http.HTTPStatus.OK:
                    raise ImageError(f"{parts.hostname} answered with status {response.status}")
                body = response.read(self.max_bytes + 1)
            finally:
                watch.cancel()
        if len(body) > self.max_bytes:
            raise ImageError(f"the image has more than {self.max_bytes / 2**20:g} MiB")
        if response.length:  # bytes that were announced and did not arrive
            raise ImageError(f"{parts.hostname} sent only a part of the image")
        return body


def _seconds_left(deadline: float) -> float:
    """Return the seconds until a deadline.

    Raises:
        TimeoutError: if it has passed.
    """
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _resolve(parts: SplitResult, deadline: float) -> str:
    """Return one address of a host after checking that all its addresses are public.

    The resolver cannot be interrupted, so it runs in a thread that is abandoned if it is late.
    """
    host, port = parts.hostname, _PORTS[parts.scheme]
    answer: Future[list[str]] = Future()

    def resolve() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answer.set_result([str(entry[4][0]) for entry in found])
        except (OSError, ValueError) as error:
            answer.set_exception(error)

    threading.Thread(target=resolve, daemon=True).start()
    addresses = answer.result(_seconds_left(deadline))
    if not addresses or not all(is_public(address) for address in addresses):
        raise ImageError(f"this server fetches no images from {host}: its address is not public")
    return addresses[0]


class _Connection(http.client.HTTPConnection):
    """A connection to a checked address with the host's name in TLS and the Host header; it uses no proxy."""

    def __init__(self, parts: SplitResult, address: str, deadline: float) -> None:
        assert parts.hostname is not None
        super().__init__(parts.hostname, _PORTS[parts.scheme])
        self._address, self._deadline = address, deadline
        self._context = ssl.create_default_context() if parts.scheme == "https" else None
        self._opened: socket.socket | None = None

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), _seconds_left(self._deadline))
        if self._context is not None:  # the handshake comes later, on a socket that `abort` can shut down
            self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
        self._opened = self.sock
        self.sock.settimeout(_seconds_left(self._deadline))  # `abort` may have been called before
        if isinstance(self.sock, ssl.SSLSocket):
            self.sock.do_handshake()

    def abort(self) -> None:
        """End a read that waits. `sock` may already be None, because a response without a length takes the socket
        over."""
        if self._opened is not None:
            with suppress(OSError):  # closed already, by either side
                socket.socket.shutdown(self._opened, socket.SHUT_RDWR)
