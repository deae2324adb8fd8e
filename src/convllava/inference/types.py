"""Messages, encoded images and reports: the inputs and outputs of an `Assistant`."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

import torch
from torch import Tensor

from convllava.geometry import Box


class Message(TypedDict):
    """One turn of a conversation: role is system, user or assistant; content is text, or parts as in transformers."""

    role: str
    content: str | list[dict[str, Any]]


class Report(TypedDict):
    """One answer with its sizes, token counts and times.

    Sizes are width, height in pixels; boxes are x0, y0, x1, y1 in pixels of the original image.
    """

    answer: str
    boxes: list[Box]
    image_size: list[int]
    resized_to: list[int]
    visual_tokens: int
    prompt_tokens: int
    seconds_to_first_token: float
    seconds: float


@dataclass(frozen=True)
class EncodedImage:
    """An image after tower and projector. Ask about it as often as you like: the tower does not run again.

    Attributes:
        placeholders: Text that represents the image in the prompt, one image token per visual token.
        tokens: (visual tokens, LLM width).
        size: Height and width in pixels that the tower saw.
    """

    placeholders: str
    tokens: Tensor
    size: tuple[int, int]

    @cached_property
    def digest(self) -> str:
        """A hash of the visual tokens: equal images have equal digests."""
        content = self.tokens.detach().cpu().contiguous().view(torch.uint8).numpy()
        return hashlib.blake2b(content.data, digest_size=20).hexdigest()
