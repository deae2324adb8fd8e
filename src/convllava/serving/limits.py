"""Limits of one request, and of how many requests run at the same time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from convllava.serving.api_error import ApiError


@dataclass(frozen=True)
class Limits:
    """Limits of a request. The server rejects a request beyond any of them as early as it can.

    Attributes:
        body_bytes: Size of the body, including images in base64.
        body_seconds: Time until the body must have arrived.
        images: Images in one request.
        image_pixels: Pixels of an image file; checked before the image is decoded.
        prompt_characters: Characters of all texts together.
        new_tokens: Tokens of an answer; also the default if a request gives no maximum.
        choices: Answers to one request (`n`).
        queue: Requests that may wait, in addition to those that are being answered.
        seconds: Time from the arrival of a request to the end of its answer.
        fetch_bytes, fetch_seconds: Size and time of an image behind a URL, if URLs are allowed.
    """

    body_bytes: int = 20 * 2**20
    body_seconds: float = 30
    images: int = 8
    image_pixels: int = 40_000_000
    prompt_characters: int = 100_000
    new_tokens: int = 1024
    choices: int = 8
    queue: int = 32
    seconds: float = 300
    fetch_bytes: int = 15 * 2**20
    fetch_seconds: float = 10


@dataclass
class Admission:
    """Counts the requests that run and rejects further ones. Used in the event loop's thread only.

    Attributes:
        capacity: Most requests at the same time.
        active: Requests that run now.
        is_draining: True once the server shuts down; it then admits no request, and those that run may finish.
    """

    capacity: int
    active: int = 0
    is_draining: bool = False

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count a request as active during the block.

        Raises:
            ApiError: if the server is shutting down (503) or full (429).
        """
        if self.is_draining:
            raise ApiError(503, "the server is shutting down; use another one or try again later", "draining")
        if self.active >= self.capacity:
            raise ApiError(429, f"the server is busy with {self.active} requests; try again later", "queue_full")
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1
