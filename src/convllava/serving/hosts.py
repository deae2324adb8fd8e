"""Which names a server answers to.

A page of any site can have its own name lead to 127.0.0.1 once a browser has loaded it, and the browser then takes our
server for that site (DNS rebinding). What it cannot change is the name that it asks for.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from ipaddress import IPv6Address, ip_address

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from convllava.serving.refusal import RefusalError
from convllava.serving.transport import discard_body


class HostGuard:
    """ASGI middleware that answers only requests to names it knows, whatever their port; to `localhost` and any address
    of loopback always, for no site can be there.

    Other names get 403 and not 421, which invites a client to try again on another connection: there is none on which
    this server would answer otherwise.

    Args:
        app: What it stands before.
        names: Beside those of this machine to itself; as a Host header has them, or addresses as they are.
    """

    def __init__(self, app: ASGIApp, names: Collection[str] = ()) -> None:
        # A request without a name must not be let in by something that has none either, such as ":8000".
        self.app, self._names = app, {"localhost", *map(name_of, names)} - {""}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            asked = Headers(scope=scope).get("host", "")
            if (name := name_of(asked)) not in self._names and not _is_loopback(name):
                message = f"no server of the name {name!r} is here; whoever serves can allow it (--allow-hosts)"
                refusal = RefusalError(403, message, "unknown_host")
                await discard_body(Request(scope, receive))
                await JSONResponse(refusal.body, refusal.status)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def name_of(host: str) -> str:
    """The name or address in a Host header, without port, brackets and a trailing dot, in lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    if host.count(":") > 1:  # an IPv6 address, which has brackets only where a port may follow
        return host.lower()
    return host.partition(":")[0].rstrip(".").lower()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there, however the address is written or named."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        return False
    return all(_is_loopback(str(entry[4][0])) for entry in found)


def _is_loopback(address: str) -> bool:
    try:
        found = ip_address(address)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return (mapped or found).is_loopback
