"""The processor: text and images together, image placeholders, and checks that both sides match."""

import re
from collections.abc import Sequence
from typing import Any

from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from convllava.errors import InputError
from convllava.geometry import Size, visual_tokens
from convllava.model.prompt_templates import CHAT_TEMPLATE

_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair: Python reads bytes that are not UTF-8 as these."""
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
    """A tokenizer and a `ConvLlavaImageProcessorPil`; replaces the mark of each image by its placeholders.

    Args:
        image_token: Mark of an image in a prompt. It is repeated once per visual token.
        row_separator: If True, every row of visual tokens ends with one more token (`ConvLlavaConfig.row_separator`).
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

    def visual_tokens(self, height: int, width: int, **settings: Any) -> int:
        """Return the number of tokens that an image of this size in pixels takes in a prompt.

        Args:
            settings: Settings of the image processor for this call, such as `max_pixels`.

        Raises:
            InputError: if the size or a setting is bad.
        """
        canvas = self.image_processor.placement(Size(height, width), **settings).canvas
        return visual_tokens(canvas, self.image_processor.stride, self.row_separator)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return as many placeholders as the image has visual tokens (transformers calls this)."""
        height, width = (int(side) for side in image_inputs["image_sizes"][image_idx])
        tokens = visual_tokens(Size(height, width), self.image_processor.stride, self.row_separator)
        return self.image_token * tokens

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Return the number of visual tokens of images with these (height, width) (vLLM calls this)."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.visual_tokens(*size, **kwargs) for size in image_sizes],
            num_image_patches=[1] * len(image_sizes),
        )

    def validate_inputs(  # type: ignore[override]  # transformers passes keywords only
        self, images: Any = None, text: Any = None, **kwargs: Any
    ) -> None:
        """Check that every prompt has as many image marks as images (transformers calls this).

        The check of the base class is not called: since transformers 5.23 it counts the images itself, and it does not
        know images that are already encoded.

        Raises:
            InputError: if there is nothing to process, or marks and images differ in number.
        """
        if images is None and text is None:
            raise InputError("there is nothing to process; give images, a text or both")
        if text is None:
            return
        if not all(isinstance(prompt, str) for prompt in text):
            raise InputError("the prompt must be a string or a list of strings, not tokens")
        counts = [prompt.count(self.image_token) for prompt in text]
        nested = isinstance(images, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in images)
        pairs: list[tuple[str, int, int]]
        if nested and len(images) == len(text):
            pairs = [
                (f"prompt {index} of {len(text)}", count, len(own))
                for index, (count, own) in enumerate(zip(counts, images, strict=True), start=1)
            ]
        else:
            flat: Any = [] if images is None else make_flat_list_of_images(images)
            pairs = [("the prompt", sum(counts), len(flat))]
        for where, marks, given in pairs:
            if marks != given:
                raise InputError(
                    f"{where} has {marks} {self.image_token} mark{'s' * (marks != 1)} but {given} "
                    f"image{'s' * (given != 1)}; give exactly one mark per image"
                )

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Render a conversation as in transformers, after a check of its messages.

        Raises:
            InputError: if a text contains a special token such as the image mark or is not UTF-8, or a message is
                malformed.
        """
        for message in _messages(conversation):
            for text in _texts(message):
                self._check_text(text, message["role"])
        return super().apply_chat_template(conversation, *args, **kwargs)

    def _check_text(self, text: str, role: str) -> None:
        # A tokenizer cannot encode half of a surrogate pair.
        if half := _SURROGATE.search(text):
            raise InputError(
                f"the text of a {role} message is not UTF-8 at its character {half.start() + 1}; write it again"
            )
        # A special token in a user's text would be taken for an image, or for the end of the message.
        for mark in {self.image_token, *self.tokenizer.all_special_tokens}:
            if mark in text:
                raise InputError(
                    f"the text of a {role} message contains the literal mark {mark}; leave it out of the text; "
                    "images are separate parts of a message"
                )


def check_messages(conversation: Any) -> None:
    """Check the structure of messages, whatever their texts contain.

    Raises:
        InputError: if there is no message, a message has no known role or no content, or a part is neither text nor
            image.
    """
    for message in _messages(conversation):
        _texts(message)


def _messages(conversation: Any) -> list[dict[str, Any]]:
    """Return the messages of one conversation or of a batch of conversations."""
    nested = [item if isinstance(item, list | tuple) else [item] for item in conversation]
    messages = [message for items in nested for message in items]
    if not messages:
        raise InputError("the conversation is empty; give at least one message")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES or "content" not in message:
            raise InputError(f"a message needs a role, one of {', '.join(ROLES)}, and a content; got {message!r}"[:300])
    return messages


def _texts(message: dict[str, Any]) -> list[str]:
    """Return the texts of one message; image parts have none."""
    content = message["content"]
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list | tuple):
        raise InputError(f"the content of a message is a text or a list of parts; got {content!r}"[:300])
    for part in content:
        match part:
            case {"type": "text", "text": str()} | {"type": "image"} | {"type": "image_url", "image_url": _}:
                pass
            case _:
                raise InputError(
                    f'a part of a message is {{"type": "text", "text": ...}} or an image; got {part!r}'[:300]
                )
    return [part["text"] for part in content if part["type"] == "text"]
