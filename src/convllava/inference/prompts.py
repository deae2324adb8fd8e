"""A conversation as the engine takes it: embeddings, and keys by which equal beginnings are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convllava.inference.assistant import Assistant, EncodedImage, Message

Key = int | str
"""What a token of a prompt is: its number in the vocabulary, or the digest of the image that it is part of."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        keys: One per token; prompts whose keys begin alike have the same keys and values there.
        embeddings: (tokens, width).
        image_tokens: How many of the tokens are visual.
    """

    keys: tuple[Key, ...]
    embeddings: Tensor
    image_tokens: int


@torch.inference_mode()
def build_prompt(
    assistant: Assistant, messages: Sequence[Message], images: Sequence[EncodedImage], digests: Sequence[str]
) -> Prompt:
    """Messages with encoded images -> a prompt.

    Args:
        messages: As of `Assistant.chat`.
        images: As many as the messages have image parts.
        digests: What tells the images apart, one each.

    Raises:
        InputError: image parts and images differ in number, or a text has a special token. How long a prompt may be is
            the engine's to say.
    """
    inputs = assistant.prompts([(messages, images)], None)
    ids = inputs["input_ids"][0]
    visual = ids == assistant.model.config.image_token_id
    embeddings = assistant.model.get_input_embeddings()(ids.masked_fill(visual, 0))
    keys: list[Key] = ids.tolist()
    if images:
        embeddings[visual] = torch.cat([image.tokens for image in images]).to(embeddings)
        named = [digest for digest, image in zip(digests, images, strict=True) for _ in image.tokens]
        for place, digest in zip(visual.nonzero().flatten().tolist(), named, strict=True):
            keys[place] = digest
    return Prompt(tuple(keys), embeddings, int(visual.sum()))
