"""Text and images together: the chat template, image placeholders, and checks that both sides match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from convllava.errors import InputError
from convllava.geometry import Size, visual_tokens

CHAT_TEMPLATE = """\
{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}{{- ' ' ~ message['content'] | trim -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {{- '<image>' if part['type'] == 'image' else ' ' ~ part['text'] | trim -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<|assistant|>' -}}{%- generation -%}{{- text_of(message) ~ '<|end|>' -}}{%- endgeneration -%}
    {%- elif message['role'] in ['system', 'user'] -%}
        {{- '<|' ~ message['role'] ~ '|>' ~ text_of(message) -}}
    {%- else -%}
        {{- raise_exception('unknown role ' ~ message['role'] ~ '; known: system, user, assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
"""`<|user|><image> QUESTION<|assistant|> ANSWER<|end|>`: the answer and its end are what training supervises. Every
text begins with a space, so that a word is the same token wherever it stands (see `tokenization`)."""


_HALF = re.compile("[\ud800-\udfff]")
"""Halves of surrogate pairs, as which Python reads bytes that are not UTF-8."""
ROLES = ("system", "user", "assistant")


class ConvLlavaProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {  # type: ignore[misc]  # as in transformers
        "text_kwargs": {
            "padding": False,
            "add_special_tokens": False,
            "return_mm_token_type_ids": False,
            "return_text_replacement_offsets": False,
        }
    }


class ConvLlavaProcessor(ProcessorMixin):
    """A tokenizer and `ConvLlavaImageProcessorPil`, and the rule that turns an image into placeholders.

    Args:
        image_token: The mark of an image in a prompt; it is repeated once per visual token.
        row_separator: Whether every row of visual tokens ends in one more (`ConvLlavaConfig.row_separator`).
    """

    valid_processor_kwargs = ConvLlavaProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        row_separator: bool = False,
        **kwargs: Any,
    ) -> None:
        self.image_token = getattr(tokenizer, "image_token", image_token)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.row_separator = row_separator
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """As many placeholders as the image has visual tokens (transformers' hook)."""
        height, width = (int(side) for side in image_inputs["image_sizes"][image_idx])
        return self.image_token * self._count(Size(height, width))

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Visual tokens of original (height, width) sizes (transformers' hook for vLLM)."""
        if image_sizes is None:
            return MultiModalData()
        placements = [self.image_processor.placement(Size(*size), **kwargs) for size in image_sizes]
        return MultiModalData(
            num_image_tokens=[self._count(placement.canvas) for placement in placements],
            num_image_patches=[1] * len(placements),
        )

    def _count(self, canvas: Size) -> int:
        return visual_tokens(canvas, self.image_processor.stride, self.row_separator)

    def validate_inputs(  # type: ignore[override]  # the hook is called by keyword
        self, images: Any = None, text: Any = None, **kwargs: Any
    ) -> None:
        """Raise `InputError` unless every prompt has as many image marks as images (transformers' hook).

        The check of the base class is not called: since transformers 5.23 it counts the images itself, and it does not
        know images that are already encoded.
        """
        if images is None and text is None:
            raise InputError("there is nothing to process; give images, a text or both")
        if text is None:
            return
        if not all(isinstance(prompt, str) for prompt in text):
            raise InputError("the prompt must be a string or a list of strings; tokenised prompts are not taken")
        marks = [prompt.count(self.image_token) for prompt in text]
        nested = isinstance(images, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in images)
        if nested and len(images) == len(text):
            for index, (mark, own) in enumerate(zip(marks, images, strict=True)):
                self._check_marks(f"prompt {index + 1} of {len(text)}", mark, len(own))
        else:
            flat: Any = [] if images is None else make_flat_list_of_images(images)
            self._check_marks("the prompt", sum(marks), len(flat))

    def _check_marks(self, where: str, marks: int, images: int) -> None:
        if marks != images:
            raise InputError(
                f"{where} has {marks} {self.image_token} mark{'s' * (marks != 1)} but {images} "
                f"image{'s' * (images != 1)} came with it; give exactly one mark per image"
            )

    def _check_text(self, text: str, role: str) -> None:
        """No tokenizer takes half a character; a special token in somebody's text would pass for an image, or for the
        end of what they said."""
        if half := _HALF.search(text):
            raise InputError(
                f"the text of a {role} message is not UTF-8 at its character {half.start() + 1}; write it anew"
            )
        for mark in {self.image_token, *self.tokenizer.all_special_tokens}:
            if mark in text:
                raise InputError(
                    f"the text of a {role} message contains the literal mark {mark}; leave it out of the text, "
                    "beside which images are parts of their own"
                )

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; besides, what no template can render is refused.

        Raises:
            InputError: a special token such as the image mark stands in a text part, a text is not UTF-8, or a message
                is malformed.
        """
        for message in _messages(conversation):
            for text in _texts(message):
                self._check_text(text, message["role"])
        return super().apply_chat_template(conversation, *args, **kwargs)


def check_messages(conversation: Any) -> None:
    """Refuse messages that are none, whatever their texts say.

    Raises:
        InputError: no message at all, or one without a known role or content, or with a part that is neither text nor
            image.
    """
    for message in _messages(conversation):
        _texts(message)


def _messages(conversation: Any) -> list[dict[str, Any]]:
    """The messages of one conversation or of a batch of them."""
    nested = [item if isinstance(item, list | tuple) else [item] for item in conversation]
    messages = [message for items in nested for message in items]
    if not messages:
        raise InputError("the conversation is empty; give at least one message")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES or "content" not in message:
            raise InputError(f"a message needs a role, one of {', '.join(ROLES)}, and a content; got {message!r}"[:300])
    return messages


def _texts(message: dict[str, Any]) -> list[str]:
    """The texts of one message; image parts have none."""
    content = message["content"]
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list | tuple):
        raise InputError(f"the content of a message is a text or a list of parts; got {content!r}"[:300])
    for part in content:
        if not _is_part(part):
            raise InputError(f'a part of a message is {{"type": "text", "text": ...}} or an image; got {part!r}'[:300])
    return [part["text"] for part in content if part["type"] == "text"]


def _is_part(part: Any) -> bool:
    """Whether it is a text or an image, as far as the chat template and what loads images look at it."""
    match part:
        case {"type": "text", "text": str()} | {"type": "image"} | {"type": "image_url", "image_url": _}:
            return True
    return False
