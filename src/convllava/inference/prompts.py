"""Conversations as input of the language model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convllava.errors import ConfigError
from convllava.inference.types import EncodedImage, Message
from convllava.model.modeling import ConvLlavaForConditionalGeneration, ConvLlavaImageFeatures
from convllava.model.processing import ConvLlavaProcessor, check_messages

Key = int | str
"""Identifies one token of a prompt: its id in the vocabulary, or the digest of the image to which it belongs."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of the engine.

    Attributes:
        keys: One per token. Prompts with equal first keys have equal attention keys and values at those positions.
        embeddings: (tokens, width).
        image_tokens: Number of visual tokens among them.
    """

    keys: tuple[Key, ...]
    embeddings: Tensor
    image_tokens: int


@torch.inference_mode()
def build_prompt(
    model: ConvLlavaForConditionalGeneration,
    processor: ConvLlavaProcessor,
    messages: Sequence[Message],
    images: Sequence[EncodedImage],
) -> Prompt:
    """Turn messages with encoded images into a prompt of any length.

    Raises:
        InputError: if the numbers of image parts and images differ, a message is malformed, or a text contains a
            special token.
    """
    text = render(processor, messages, images)
    ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0].to(model.device)
    visual = ids == model.config.image_token_id
    embeddings = model.get_input_embeddings()(ids.masked_fill(visual, 0))
    keys: list[Key] = ids.tolist()
    if images:
        embeddings[visual] = torch.cat([image.tokens for image in images]).to(embeddings)
        digests = [image.digest for image in images for _ in image.tokens]
        for position, digest in zip(visual.nonzero().flatten().tolist(), digests, strict=True):
            keys[position] = digest
    return Prompt(tuple(keys), embeddings, int(visual.sum()))


def padded_inputs(
    model: ConvLlavaForConditionalGeneration,
    processor: ConvLlavaProcessor,
    conversations: Sequence[tuple[Sequence[Message], Sequence[EncodedImage]]],
    max_new_tokens: Sequence[int],
) -> dict[str, Any]:
    """Turn conversations into one left-padded batch for `model.forward` or `model.generate`.

    Args:
        conversations: Messages and encoded images of each.
        max_new_tokens: Longest answer of each.

    Returns:
        input_ids and attention_mask, (batch, tokens) each, and mm_encoder_outputs if there are images.

    Raises:
        InputError: as `build_prompt`, or if a prompt leaves no room for its answer.
    """
    texts = [render(processor, messages, images) for messages, images in conversations]
    found = processor.tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    inputs: dict[str, Any] = {key: found[key].to(model.device) for key in ("input_ids", "attention_mask")}
    for prompt, answer in zip(inputs["attention_mask"].sum(1).tolist(), max_new_tokens, strict=True):
        check_context(prompt, answer, model.config.text_config.max_position_embeddings)
    if tokens := [image.tokens for _, images in conversations for image in images]:
        inputs["mm_encoder_outputs"] = {"image": ConvLlavaImageFeatures(pooler_output=tokens)}
    return inputs


def render(processor: ConvLlavaProcessor, messages: Sequence[Message], images: Sequence[EncodedImage]) -> str:
    """Return the text of a prompt, with the placeholders of its images.

    If no message has an image part, all images precede the text of the first user message.

    Raises:
        InputError: as `build_prompt`.
    """
    check_messages(messages)
    placed: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        placed.append({"role": message["role"], "content": parts})
    first = next((message for message in placed if message["role"] == "user"), None)
    if first and not any(part["type"] == "image" for message in placed for part in message["content"]):
        first["content"] = [{"type": "image"}] * len(images) + first["content"]
    text = processor.apply_chat_template(placed, add_generation_prompt=True, tokenize=False)
    processor.validate_inputs(images=[list(images)], text=[text])
    return processor.get_text_with_replacements([text], [image.placeholders for image in images])[0][0]


def check_context(prompt_tokens: int, max_new_tokens: int, context: int) -> None:
    """Raise ConfigError unless prompt and answer fit into the context."""
    if prompt_tokens + max_new_tokens > context:
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens and the answer may have {max_new_tokens}, but the context is "
            f"{context}; shorten the prompt, use a smaller image or lower `max_new_tokens`"
        )
