"""Check the Host header of requests, against DNS rebinding.

A web page of any site can make its own name point to 127.0.0.1 after a browser has loaded it. The browser then treats
our server as that site. The page cannot change the name in the Host header, so the server checks that name.

Starlette's TrustedHostMiddleware is not used: it answers in plain text without saying how to allow a name, and it knows
neither addresses (127.0.0.2, ::ffff:127.0.0.1) nor names with a trailing dot.
"""

import re
import socket
from collections.abc import Collection
from ipaddress import IPv6Address, ip_address

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from convllava.serving.api_error import ApiError
from convllava.serving.connection import discard_body

_HOST = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[^\[\]:]*?)\.?)(?::\d*)?")
_BARE_IPV6 = re.compile(r"[0-9a-f:.]*:[0-9a-f:.]*:[0-9a-f:.]*")


class HostCheck:
    """ASGI middleware that rejects requests with an unknown name in the Host header; the port does not matter.

    `localhost` and loopback addresses are always accepted, because no other site can have them. The status is 403
    and not 421, because after 421 a client would try again on a new connection.

    Args:
        app: The application behind the check.
        names: Further names or addresses to accept.
    """

    def __init__(self, app: ASGIApp, names: Collection[str] = ()) -> None:
        # A configured name that is empty after parsing, such as ":8000", must not accept requests without a Host.
        self.app, self._names = app, {"localhost", *map(parse_host, names)} - {""}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "")
            name = parse_host(host)
            if name not in self._names and not _is_loopback_address(name):
                message = (
                    f"this server does not answer to the name {host[:100]!r}; its owner can add it to `allow_hosts`"
                )
                error = ApiError(403, message, "unknown_host")
                await discard_body(Request(scope, receive))
                await JSONResponse(error.body, error.status)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def parse_host(host: str) -> str:
    """Return the name or address of a Host header in lower case, without port, brackets and trailing dot.

    Also accepts an IPv6 address without brackets. Returns "" if the header is malformed.
    """
    host = host.lower()
    if _BARE_IPV6.fullmatch(host):
        return host
    found = _HOST.fullmatch(host)
    return (found["address"] or found["name"] or "") if found else ""


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens at this name or address."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        return False
    return all(_is_loopback_address(str(entry[4][0])) for entry in found)


def _is_loopback_address(address: str) -> bool:
    try:
        found = ip_address(address)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return (mapped or found).is_loopback
