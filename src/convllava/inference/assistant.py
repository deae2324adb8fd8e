"""`convllava.load(name)` gives an `Assistant`: ask it about one image, chat about several, or answer many at once."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import BatchFeature, StoppingCriteriaList, TextIteratorStreamer

from convllava import checkpoints
from convllava.errors import InputError
from convllava.geometry import Box, Size, parse_boxes
from convllava.model.images import ImageSource, load_image
from convllava.model.modeling import ConvLlavaForConditionalGeneration, ConvLlavaImageFeatures
from convllava.model.processing import ConvLlavaProcessor, check_messages


class Message(TypedDict):
    """One turn: role is system, user or assistant; content is text, or parts as transformers writes them."""

    role: str
    content: str | list[dict[str, Any]]


class Report(TypedDict):
    """One answer and what it took; sizes are width, height in pixels, boxes x0, y0, x1, y1 in pixels of the image."""

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
    """An image after tower and projector: ask as often as you like, the tower runs once.

    Attributes:
        placeholders: What stands for the image in the prompt's text.
        tokens: (visual tokens, LLM width).
        size: Height and width in pixels that the tower saw.
    """

    placeholders: str
    tokens: Tensor
    size: tuple[int, int]


def load(
    name_or_path: str | os.PathLike[str] = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: Any = None,
    pixels: Mapping[str, Any] | None = None,
) -> Assistant:
    """A model ready to answer.

    Args:
        name_or_path: `tiny` (ships with the package), a folder, or a hub id.
        device: Where to run; None takes cuda, then mps, then cpu.
        dtype: Of the weights; None takes float32 on the CPU and bfloat16 elsewhere.
        pixels: Settings of the image processor in place of the checkpoint's, such as `{"mode": "short_side", "side":
            1536}`, which is how the paper tests any aspect ratio.

    Raises:
        InputError: nothing loadable goes by that name, or a setting is bad.
    """
    path = checkpoints.find(str(name_or_path))
    device = torch.device(device or _best_device())
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    model, processor = checkpoints.read(path, dtype)
    processor.image_processor.change(**(pixels or {}))
    model.to(device)  # type: ignore[arg-type]  # a decorated method loses its self
    return Assistant(model.eval(), processor)


_GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""`generate` takes what it is not told from the model's generation_config.json, which the engine does not look at: a
model that has a penalty there would answer the same question in two ways."""


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


class Assistant:
    """A model and its processor behind three calls: `ask`, `chat`, `answer_many`. Decoding is greedy unless told."""

    def __init__(self, model: ConvLlavaForConditionalGeneration, processor: ConvLlavaProcessor) -> None:
        self.model, self.processor = model, processor

    def ask(
        self, image: ImageSource, question: str, *, stream: bool = False, max_new_tokens: int = 256, **generation: Any
    ) -> str | Iterator[str]:
        """Answer one question about one image.

        Args:
            image: A path, PIL image, numpy array or bytes.
            question: Plain text.
            stream: Return an iterator over pieces of text in place of the whole answer.
            max_new_tokens: Longest answer.
            generation: Passed to `generate` (temperature, do_sample, num_beams ...).

        Raises:
            InputError: an image that cannot be read, a question with an image mark in it, or too long a prompt.
        """
        messages: list[Message] = [{"role": "user", "content": question}]
        return self.chat(messages, [image], stream=stream, max_new_tokens=max_new_tokens, **generation)

    def chat(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageSource] = (),
        *,
        stream: bool = False,
        max_new_tokens: int = 256,
        **generation: Any,
    ) -> str | Iterator[str]:
        """The assistant's next message.

        Args:
            messages: The conversation so far. Images stand where its `{"type": "image"}` parts are; where it has none,
                all images stand before the first user message's text.
            images: As many as there are image parts.

        Raises:
            InputError: as for `ask`, and where image parts and images differ in number.
        """
        inputs = self.prompts([(messages, [self.encode(image) for image in images])], max_new_tokens)
        settings = {**_GREEDY, **generation, "max_new_tokens": max_new_tokens}
        if stream:
            return self._stream(inputs, settings)
        return self._generate(inputs, settings)[0]

    def report(self, image: ImageSource, question: str, *, max_new_tokens: int = 256) -> Report:
        """`ask` with what one would measure: sizes, tokens, seconds, and boxes in pixels of the image."""
        started = time.perf_counter()
        picture = load_image(image)
        encoded = self.encode(picture)
        inputs = self.prompts([([Message(role="user", content=question)], [encoded])], max_new_tokens)
        pieces, first = [], None
        for piece in self._stream(inputs, {**_GREEDY, "max_new_tokens": max_new_tokens}):
            first = first or time.perf_counter() - started
            pieces.append(piece)
        answer, seconds = "".join(pieces), time.perf_counter() - started
        size = Size(picture.height, picture.width)
        placement = self.processor.image_processor.placement(size)
        return {
            "answer": answer,
            "boxes": [placement.box_from_normalised(box) for box in parse_boxes(answer)],
            "image_size": [size.width, size.height],
            "resized_to": [encoded.size[1], encoded.size[0]],
            "visual_tokens": len(encoded.tokens),
            "prompt_tokens": inputs["input_ids"].shape[1],
            "seconds_to_first_token": round(first or seconds, 4),
            "seconds": round(seconds, 4),
        }

    def answer_many(
        self,
        questions: Sequence[tuple[ImageSource | EncodedImage, str]],
        *,
        batch_size: int = 32,
        max_new_tokens: int = 64,
    ) -> Iterator[list[str]]:
        """Greedy answers to (image, question) pairs, a batch at a time. Tower and language model see an image once for
        the questions in a row about it (`many`); one that `encode` has been given is not encoded again."""
        from convllava.inference.many import answerer  # which builds on this module

        answer = answerer(self, max_new_tokens)
        encoded: dict[int, EncodedImage] = {}
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            images = {id(image): image for image, _ in batch}
            encoded = {key: encoded.get(key) or self.encode(image) for key, image in images.items()}
            yield answer([(encoded[id(image)], question) for image, question in batch])

    def chat_many(
        self,
        conversations: Sequence[tuple[Sequence[Message], Sequence[ImageSource | EncodedImage]]],
        *,
        max_new_tokens: int = 256,
        **generation: Any,
    ) -> list[str]:
        """`chat` for several conversations, (messages, images) each, which are answered in one batch."""
        encoded = [(messages, [self.encode(image) for image in images]) for messages, images in conversations]
        inputs = self.prompts(encoded, max_new_tokens)
        return self._generate(inputs, {**_GREEDY, **generation, "max_new_tokens": max_new_tokens})

    def chat_each(
        self,
        conversations: Sequence[tuple[Sequence[Message], Sequence[ImageSource | EncodedImage]]],
        *,
        max_new_tokens: int = 256,
    ) -> list[str | InputError]:
        """`chat_many`, or one by one where a conversation among them cannot be had, such as one that is too long: the
        answer to each, or why there is none."""
        try:
            return list(self.chat_many(conversations, max_new_tokens=max_new_tokens))
        except InputError as error:
            if len(conversations) == 1:
                return [error]
        return [self.chat_each([one], max_new_tokens=max_new_tokens)[0] for one in conversations]

    @torch.inference_mode()
    def encode(self, image: ImageSource | EncodedImage) -> EncodedImage:
        """Run tower and projector on one image; one that has been through them is returned."""
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
        return [EncodedImage(*parts) for parts in zip(placeholders, tokens, sizes, strict=True)]

    def prompts(
        self,
        conversations: Sequence[tuple[Sequence[Message], Sequence[EncodedImage]]],
        longest: int | Sequence[int] | None,
    ) -> dict[str, Any]:
        """Conversations with encoded images -> left-padded inputs for `generate`.

        Args:
            conversations: Messages and images of each.
            longest: Tokens of an answer, or of each one's; None leaves the context to the caller.

        Raises:
            InputError: image parts and images differ in number, or a prompt leaves no room for its answer.
        """
        texts, tokens = [], []
        for messages, images in conversations:
            placed = _place_images(messages, len(images))
            text = self.processor.apply_chat_template(placed, add_generation_prompt=True, tokenize=False)
            self.processor.validate_inputs(images=[list(images)], text=[text])
            texts += self.processor.get_text_with_replacements([text], [image.placeholders for image in images])[0]
            tokens += [image.tokens for image in images]
        inputs = dict(self.processor.tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt"))
        inputs = {key: inputs[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
        if longest is not None:
            answers = [longest] * len(texts) if isinstance(longest, int) else longest
            for prompt, answer in zip(inputs["attention_mask"].sum(1).tolist(), answers, strict=True):
                self._check_context(prompt, answer)
        if tokens:
            inputs["mm_encoder_outputs"] = {"image": ConvLlavaImageFeatures(pooler_output=tokens)}
        return inputs

    def _check_context(self, prompt: int, answer: int) -> None:
        context = self.model.config.text_config.max_position_embeddings
        if prompt + answer > context:
            raise InputError(
                f"the prompt has {prompt} tokens and the answer may have {answer}, but the model's context is "
                f"{context}; shorten the prompt, use a smaller image or lower max_new_tokens"
            )

    @torch.inference_mode()
    def _generate(self, inputs: dict[str, Any], settings: dict[str, Any]) -> list[str]:
        output: Any = self.model.generate(**inputs, **settings)  # type: ignore[misc]  # its self is a protocol
        answers = output[:, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)

    def _stream(self, inputs: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
        """Pieces of the answer, which ends with its iterator."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []
        unwanted = Event()

        def is_left(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.full(ids.shape[:1], unwanted.is_set(), device=ids.device)

        criteria = StoppingCriteriaList([*settings.get("stopping_criteria", ()), is_left])
        settings = {**settings, "stopping_criteria": criteria}

        def work() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(**inputs, **settings, streamer=streamer)  # type: ignore[misc]  # as above
            except BaseException as error:
                failure.append(error)
                streamer.end()

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            unwanted.set()
            thread.join()
        if failure:
            raise failure[0]


def _place_images(messages: Sequence[Message], count: int) -> list[dict[str, Any]]:
    """Every content as parts; where no image part is written, the images come first in the first user message.

    Raises:
        InputError: a message is malformed.
    """
    check_messages(messages)
    placed: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        placed.append({"role": message["role"], "content": parts})
    has_marks = any(part["type"] == "image" for message in placed for part in message["content"])
    first = next((message for message in placed if message["role"] == "user"), None)
    if count and not has_marks and first is not None:
        first["content"] = [{"type": "image"}] * count + first["content"]
    return placed
