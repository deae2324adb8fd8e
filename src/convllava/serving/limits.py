"""What one client may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of requests; beyond each of them a request is refused, and at once.

    Attributes:
        body_bytes: Of a request, its images written as base64 included.
        body_seconds: In which a request's body must have arrived.
        images: In one request.
        image_pixels: Of an image before it is decoded.
        prompt_characters: Of all texts together.
        new_tokens: Of an answer; also its length where a request names none.
        choices: Answers to one request (`n`).
        queue: Requests beyond those that are being answered.
        seconds: For a request from its arrival to the end of its answer.
        fetch_bytes, fetch_seconds: Of an image behind a URL, where URLs are allowed.
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
