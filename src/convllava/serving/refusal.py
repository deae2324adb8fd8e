"""Everything that is answered with an error: an HTTP status and OpenAI's error object."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

RETRY_SECONDS = 2
"""What a client that is turned away should wait."""


class RefusalError(Exception):
    """A request that is not served.

    Args:
        status: 400 malformed, 401 no key, 404 no such model or place, 408 too slow, 413 too large, 422 an image that
            cannot be taken, 429 too many at once, 499 nobody listens any more, 500 our fault, 503 going down or too
            late.
        message: What is wrong, where, and how to mend it.
        code: For programs.
        parameter: The field of the request that is at fault.
    """

    def __init__(self, status: int, message: str, code: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.parameter = status, message, code, parameter

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else _TYPES.get(self.status, _INVALID)
        return {"error": {"message": self.message, "type": kind, "param": self.parameter, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        if self.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            return {"Retry-After": str(RETRY_SECONDS)}
        return {"WWW-Authenticate": "Bearer"} if self.status == HTTPStatus.UNAUTHORIZED else {}


def too_late(seconds: float) -> RefusalError:
    """Of a request that is not answered in time."""
    return RefusalError(503, f"the answer took more than {seconds:g} s; ask for less", "too_late")


_INVALID = "invalid_request_error"
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
