"""A conversation with memory: the tower encodes each image once, and an answer can be ended early."""

from collections.abc import Iterator

from convllava.errors import ConfigError
from convllava.inference.assistant import Assistant
from convllava.inference.sampling import Sampling
from convllava.inference.types import EncodedImage, Message
from convllava.model.images import ImageSource


class ChatSession:
    """One conversation. The language model does not read earlier turns again.

    Args:
        assistant: The model. Its weights must not change during the session.
        max_new_tokens: Longest answer; shorter if the model's context ends before.
    """

    def __init__(self, assistant: Assistant, max_new_tokens: int = 256) -> None:
        self._assistant, self._max_new_tokens = assistant, max_new_tokens
        self.reset()

    def add_image(self, source: ImageSource) -> EncodedImage:
        """Encode an image; it precedes the text of the next message.

        Raises:
            InputError: if it cannot be read.
        """
        image = self._assistant.encode(source)
        self._waiting.append(image)
        return image

    def reset(self) -> None:
        """Forget all messages and images."""
        self._messages: list[Message] = []
        self._images: list[EncodedImage] = []
        self._waiting: list[EncodedImage] = []

    def say(self, text: str) -> Iterator[str]:
        """Answer a message, in pieces of text.

        Closing or interrupting the iterator ends the answer. The conversation then keeps the pieces so far. If there
        are none, it forgets the message, and the new images wait for the next message.

        Raises:
            InputError: if the conversation is too long for the model, or the text contains a special token; the message
                is not kept.
        """
        parts = [*({"type": "image"} for _ in self._waiting), {"type": "text", "text": text}]
        messages: list[Message] = [*self._messages, {"role": "user", "content": parts}]
        images = [*self._images, *self._waiting]
        prompt = self._assistant.prompt(messages, images)
        context = self._assistant.model.config.text_config.max_position_embeddings
        room = context - len(prompt.keys)
        if room < 1:
            raise ConfigError(f"the conversation fills the {context} tokens of the context; start a new one")
        said: list[str] = []
        try:
            for event in self._assistant.write(prompt, Sampling(min(self._max_new_tokens, room)), keep_cache=True):
                if event.text:
                    said.append(event.text)
                    yield event.text
        finally:
            if said:
                self._messages = [*messages, {"role": "assistant", "content": "".join(said)}]
                self._images, self._waiting = images, []
