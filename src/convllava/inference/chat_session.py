"""A conversation that remembers: messages, images that go through the tower once, and an answer that can be ended."""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue

from convllava.errors import InputError
from convllava.inference.answer import Event
from convllava.inference.assistant import Assistant, EncodedImage, Message
from convllava.inference.engine import Engine
from convllava.inference.prompts import Prompt, build_prompt
from convllava.inference.sampling import Sampling
from convllava.model.images import ImageSource


class Conversation:
    """One person's conversation; what the model has read once it does not read again.

    Args:
        assistant: The model.
        engine: Of that model, started.
        max_new_tokens: Longest answer; it is shorter where the model's context ends.
    """

    def __init__(self, assistant: Assistant, engine: Engine, max_new_tokens: int = 256) -> None:
        self._assistant, self._engine, self._max_new_tokens = assistant, engine, max_new_tokens
        self._messages: list[Message] = []
        self._images: list[EncodedImage] = []
        self._waiting: list[EncodedImage] = []
        self._digests: dict[int, str] = {}
        self._added = 0

    def add_image(self, source: ImageSource) -> EncodedImage:
        """Encode an image, which stands before the next message's text.

        Raises:
            InputError: it cannot be read.
        """
        image = self._assistant.encode(source)
        self._waiting.append(image)
        self._added += 1
        self._digests[id(image)] = f"image {self._added}"
        return image

    def reset(self) -> None:
        """Forget all messages and images."""
        self._messages, self._images, self._waiting, self._digests = [], [], [], {}

    def say(self, text: str) -> Iterator[str]:
        """The answer in pieces.

        An iterator that is closed, or interrupted, ends the answer: what has been said of it stays in the conversation,
        and where nothing has, the question is forgotten and its images wait for the next.

        Raises:
            InputError: the conversation is too long for the model, or the text has a special token; it is not kept.
        """
        messages = [*self._messages, self._question(text)]
        images = [*self._images, *self._waiting]
        digests = [self._digests[id(image)] for image in images]
        said: list[str] = []
        try:
            for piece in self._answer(build_prompt(self._assistant, messages, images, digests)):
                said.append(piece)
                yield piece
        finally:
            if said:
                self._messages = [*messages, {"role": "assistant", "content": "".join(said)}]
                self._images, self._waiting = images, []

    def _question(self, text: str) -> Message:
        return {
            "role": "user",
            "content": [*({"type": "image"} for _ in self._waiting), {"type": "text", "text": text}],
        }

    def _answer(self, prompt: Prompt) -> Iterator[str]:
        room = self._engine.context - len(prompt.keys)
        if room < 1:
            raise InputError(f"the conversation fills the {self._engine.context} tokens of the context; begin anew")
        events: SimpleQueue[Event] = SimpleQueue()
        sampling = Sampling(max_new_tokens=min(self._max_new_tokens, room))
        answer = self._engine.submit(prompt, sampling, events.put)
        try:
            finish = None
            while finish is None:
                event = events.get()
                finish = event.finish
                if event.text:
                    yield event.text
        finally:
            self._engine.cancel(answer)
        if finish == "error":
            raise RuntimeError("the model failed; the log says why")
