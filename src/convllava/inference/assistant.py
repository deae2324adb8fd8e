"""`convllava.load(name)` returns an `Assistant`: ask about one image, chat about several, or answer many questions.

Every answer is written by the engine (`engine.py`), which decodes greedily or draws. For beam search, penalties and
other settings call `generate` on `assistant.model` with the inputs that `assistant.processor` makes.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Unpack

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import BatchFeature
from transformers.utils import logging

from convllava import checkpoints
from convllava.errors import InputError
from convllava.geometry import Size, parse_boxes
from convllava.inference.engine import Engine, SequentialEngine
from convllava.inference.prompts import Prompt, build_prompt, check_context
from convllava.inference.sampling import Answer, Event, Sampling, SamplingOptions
from convllava.inference.types import EncodedImage, Message, Report
from convllava.model.images import ImageSource, load_image
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.processing import ConvLlavaProcessor

SLOTS, STEP_TOKENS = 16, 512
"""With more slots, fewer prompts find a prefix that is in the cache. With fewer slots or shorter steps, the processor
idles."""


def load(
    name_or_path: str | os.PathLike[str] = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: Any = None,
    pixels: Mapping[str, Any] | None = None,
) -> Assistant:
    """Load a model that is ready to answer.

    Args:
        name_or_path: `tiny` (in the package), a folder, or a hub id.
        device: Device of the model; None takes cuda, then mps, then cpu.
        dtype: Type of the weights; None takes float32 on the CPU and bfloat16 elsewhere.
        pixels: Settings of the image processor instead of the checkpoint's, such as `{"mode": "short_side", "side":
            1536}`, with which the paper tests any aspect ratio.

    Raises:
        InputError: if nothing with that name can be loaded, or a setting is wrong.
    """
    path = checkpoints.find(str(name_or_path))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    # Hide the "Loading weights" bar of transformers, but not the bars of downloads, which the same call disables.
    loading, downloads = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()
    try:
        model, processor = checkpoints.read(path, dtype)
    finally:
        if loading:
            logging.enable_progress_bar()
            if not downloads:
                disable_progress_bars()
    processor.image_processor.change(**(pixels or {}))
    model.to(device)  # type: ignore[arg-type]  # a decorated method loses its self
    return Assistant(model.eval(), processor)


class Assistant:
    """A model and its processor. Several threads may use it; their answers are written together.

    Answers are greedy by default. Keyword arguments of `ask`, `stream`, `chat`, `stream_chat` and `chat_many` are
    `max_new_tokens` (default 256), `temperature`, `top_p`, `seed` and `stop`; see `Sampling`.
    """

    def __init__(self, model: ConvLlavaForConditionalGeneration, processor: ConvLlavaProcessor) -> None:
        self.model, self.processor = model, processor
        self._engine: Engine | SequentialEngine | None = None
        self._place: tuple[torch.device, torch.dtype] | None = None
        self._size = (0, 0)
        self._lock = threading.Lock()

    def ask(self, image: ImageSource | EncodedImage, question: str, **sampling: Unpack[SamplingOptions]) -> str:
        """Answer one question about one image.

        Args:
            image: A path, PIL image, numpy array, bytes, or the result of `encode`.
            question: Plain text.
            sampling: See `Sampling`.

        Raises:
            InputError: if the image cannot be read, the question contains an image mark, or the prompt is too long.
        """
        return self.chat([Message(role="user", content=question)], [image], **sampling)

    def stream(
        self, image: ImageSource | EncodedImage, question: str, **sampling: Unpack[SamplingOptions]
    ) -> Iterator[str]:
        """Answer like `ask`, in pieces of text. Closing the iterator ends the answer.

        Raises:
            InputError: as `ask`; the call itself raises it, before the first piece.
        """
        return self.stream_chat([Message(role="user", content=question)], [image], **sampling)

    def chat(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageSource | EncodedImage] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> str:
        """Return the assistant's next message.

        Args:
            messages: The conversation so far. Its `{"type": "image"}` parts mark the places of the images; if there are
                none, all images precede the text of the first user message.
            images: One for each image part.
            sampling: See `Sampling`.

        Raises:
            InputError: as `ask`, or if the numbers of image parts and images differ.
        """
        return self._answer_all([self.prompt(messages, images)], Sampling(**sampling))[0]

    def stream_chat(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageSource | EncodedImage] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Answer like `chat`, in pieces of text. Closing the iterator ends the answer.

        Raises:
            InputError: as `chat`; the call itself raises it, before the first piece.
        """
        events = self.write(self.prompt(messages, images), Sampling(**sampling))

        def pieces() -> Iterator[str]:
            with closing(events):
                yield from (event.text for event in events if event.text)

        return pieces()

    def answer_many(
        self,
        questions: Sequence[tuple[ImageSource | EncodedImage, str]],
        *,
        batch_size: int = 32,
        max_new_tokens: int = 64,
    ) -> Iterator[list[str]]:
        """Answer (image, question) pairs greedily, one list of answers per batch.

        For successive questions about one image, the tower and the language model process the image only once.
        """
        sampling = Sampling(max_new_tokens)
        encoded: dict[int, EncodedImage] = {}
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            images = {id(image): image for image, _ in batch}
            encoded = {key: encoded.get(key) or self.encode(image) for key, image in images.items()}
            prompts = [self.prompt([Message(role="user", content=text)], [encoded[id(image)]]) for image, text in batch]
            is_last = start + batch_size >= len(questions)
            yield self._answer_all(prompts, sampling, reuse_cache=start > 0, keep_cache=not is_last)

    def chat_many(
        self,
        conversations: Sequence[tuple[Sequence[Message], Sequence[ImageSource | EncodedImage]]],
        **sampling: Unpack[SamplingOptions],
    ) -> list[str | InputError]:
        """Answer several conversations, (messages, images) each, together.

        Returns:
            The answer to each conversation, or the error that `chat` would raise for it.
        """
        settings = Sampling(**sampling)
        prompts: list[Prompt | InputError] = []
        for messages, images in conversations:
            try:
                prompt = self.prompt(messages, images)
                check_context(len(prompt.keys), settings.max_new_tokens, self._context)
                prompts.append(prompt)
            except InputError as error:
                prompts.append(error)
        answers = iter(self._answer_all([prompt for prompt in prompts if isinstance(prompt, Prompt)], settings))
        return [found if isinstance(found, InputError) else next(answers) for found in prompts]

    def report(self, image: ImageSource, question: str, *, max_new_tokens: int = 256) -> Report:
        """Answer like `ask`, and measure: sizes, tokens, seconds, and boxes in pixels of the image.

        The times of the first answer include a short check of the language model (`RaggedModel`).
        """
        started = time.perf_counter()
        picture = load_image(image)
        encoded = self.encode(picture)
        prompt = self.prompt([Message(role="user", content=question)], [encoded])
        first, pieces = None, []
        for event in self.write(prompt, Sampling(max_new_tokens)):
            first = first or time.perf_counter() - started
            pieces.append(event.text)
        answer, seconds = "".join(pieces), time.perf_counter() - started
        placement = self.processor.image_processor.placement(Size(picture.height, picture.width))
        return {
            "answer": answer,
            "boxes": [placement.box_from_normalised(box) for box in parse_boxes(answer)],
            "image_size": [picture.width, picture.height],
            "resized_to": [encoded.size[1], encoded.size[0]],
            "visual_tokens": len(encoded.tokens),
            "prompt_tokens": len(prompt.keys),
            "seconds_to_first_token": round(first or seconds, 4),
            "seconds": round(seconds, 4),
        }

    def encode(self, image: ImageSource | EncodedImage) -> EncodedImage:
        """Run tower and projector on one image; an encoded image is returned as it is.

        Raises:
            InputError: if the image cannot be read.
        """
        if isinstance(image, EncodedImage):
            return image
        return self.encode_pixels([self.processor.image_processor(load_image(image), return_tensors="pt")])[0]

    @torch.inference_mode()
    def encode_pixels(self, images: Sequence[BatchFeature]) -> list[EncodedImage]:
        """Run tower and projector on images of any shapes together, each as the image processor returned it alone."""
        pixels = [image["pixel_values"][0].to(self.model.device, self.model.dtype) for image in images]
        features = self.model.get_image_features(pixels, return_dict=True)
        sizes = [tuple(image["image_sizes"][0].tolist()) for image in images]
        placeholders = [self.processor.replace_image_token(image.data, 0) for image in images]
        tokens = [tokens.clone() for tokens in features.pooler_output]  # a view would keep all of them in memory
        return [EncodedImage(*fields) for fields in zip(placeholders, tokens, sizes, strict=True)]

    def prompt(self, messages: Sequence[Message], images: Sequence[ImageSource | EncodedImage] = ()) -> Prompt:
        """Turn a conversation into a prompt for `write` or for an engine.

        Raises:
            InputError: as `chat`, except that the prompt may have any length.
        """
        return build_prompt(self.model, self.processor, messages, [self.encode(image) for image in images])

    def write(self, prompt: Prompt, sampling: Sampling, *, keep_cache: bool = False) -> Generator[Event, None, None]:
        """Write an answer, one event per token. Closing the iterator ends the answer.

        Args:
            keep_cache: Reuse the keys and values of earlier answers if the prompts begin with the same tokens, and
                keep those of this one. The weights must not change between these calls.

        Raises:
            InputError: if prompt and answer do not fit into the context; the call itself raises it.
        """
        engine = self._engine_for([prompt], sampling, keep_cache)

        def events() -> Generator[Event, None, None]:
            delivered: deque[Event] = deque()
            answer = engine.submit(prompt, sampling, delivered.append)
            try:
                while True:
                    while not delivered:
                        with self._lock:
                            engine.step()
                    event = delivered.popleft()
                    yield event
                    if event.finish:
                        return
            finally:
                self._end(engine, [answer], keep_cache)

        return events()

    def _answer_all(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, reuse_cache: bool = False, keep_cache: bool = False
    ) -> list[str]:
        if not prompts:
            return []
        engine = self._engine_for(prompts, sampling, reuse_cache)
        answers: list[Answer] = []
        try:
            answers += [engine.submit(prompt, sampling) for prompt in prompts]
            while any(answer.finish is None for answer in answers):
                with self._lock:
                    engine.step()
        finally:
            self._end(engine, answers, keep_cache)
        return [answer.text for answer in answers]

    def _end(self, engine: Engine | SequentialEngine, answers: Sequence[Answer], keep_cache: bool) -> None:
        for answer in answers:
            engine.cancel(answer)
        if not keep_cache:
            with self._lock:
                engine.forget()

    @property
    def _context(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    def _engine_for(
        self, prompts: Sequence[Prompt], sampling: Sampling, reuse_cache: bool
    ) -> Engine | SequentialEngine:
        """Return an engine with room for these prompts: the last one, or a larger one.

        Raises:
            ConfigError: if a prompt with its answer does not fit into the context.
        """
        longest = max(len(prompt.keys) for prompt in prompts)
        check_context(longest, sampling.max_new_tokens, self._context)
        place = (self.model.device, self.model.dtype)
        slots, context = engine_size(self.model.device, len(prompts), longest + sampling.max_new_tokens, self._context)
        with self._lock:
            if self._engine is None or self._place != place or slots > self._size[0] or context > self._size[1]:
                self._engine = None  # free its memory first
                try:
                    self._engine = Engine(
                        self.model, self.processor, slots, context, step_tokens=STEP_TOKENS, by_columns=False
                    )
                except InputError:
                    self._engine = SequentialEngine(self.model, self.processor)
                self._place, self._size = place, (slots, context)
            elif not reuse_cache:
                self._engine.forget()
            return self._engine


def engine_size(device: torch.device, prompts: int, longest: int, context: int) -> tuple[int, int]:
    """Return the slots of an engine and the tokens of each.

    On a CPU, memory is used only when it is written (`ragged_attention.KeyValues`): one engine serves all calls.
    On other devices the engine is as small as the call allows.

    Args:
        prompts: Number of prompts.
        longest: Most tokens of one of them with its answer.
        context: The model's context in tokens.
    """
    if device.type == "cpu":
        return SLOTS, context
    return min(prompts, SLOTS), min(context, 1 << (longest - 1).bit_length())  # powers of two: a chat grows
