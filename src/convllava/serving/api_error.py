"""Errors that the server answers with: an HTTP status and OpenAI's error object."""

from http import HTTPStatus
from typing import Any

RETRY_SECONDS = 2
"""Seconds that a client should wait after 429 or 503, sent as `Retry-After`."""


class ApiError(Exception):
    """A request that the server answers with an error.

    Args:
        status: 400 malformed, 401 missing or wrong key, 403 unknown Host, 404 unknown model or path, 408 body too
            slow, 413 body too large, 422 unusable image, 429 too many requests, 499 the client disconnected, 500 an
            error of the server, 503 shutting down or out of time.
        message: One line: what is wrong, where, and how to fix it.
        code: A short name of the error, for programs.
        param: The field of the request that is wrong.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            kind = "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        if self.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            return {"Retry-After": str(RETRY_SECONDS)}
        return {"WWW-Authenticate": "Bearer"} if self.status == HTTPStatus.UNAUTHORIZED else {}


def out_of_time(seconds: float) -> ApiError:
    """Return the error of a request whose answer takes longer than `Limits.seconds`."""
    return ApiError(503, f"the answer took more than {seconds:g} s; ask for less", "too_late")


def client_gone() -> ApiError:
    """Return the error of a request whose client disconnected; it is counted, but nobody reads it."""
    return ApiError(499, "the client disconnected", "client_gone")
