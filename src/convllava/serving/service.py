"""What stands behind the server: model, engine and tower, threads for what would hold up the event loop, and counts."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Collection, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from jinja2 import TemplateError
from PIL import Image
from transformers import BatchFeature

from convllava.errors import InputError
from convllava.geometry import Size
from convllava.inference.assistant import Assistant, EncodedImage
from convllava.inference.engine import Engine
from convllava.inference.image_queue import ImageEncoder, digest_of
from convllava.inference.prompts import Prompt, build_prompt
from convllava.model.image_processing import ConvLlavaImageProcessorPil
from convllava.model.images import check_header, load_image
from convllava.serving.fetching import Fetcher
from convllava.serving.gate import Gate
from convllava.serving.limits import Limits
from convllava.serving.metrics import Metrics
from convllava.serving.refusal import RefusalError
from convllava.serving.replies import TokenTexts
from convllava.serving.schema import ChatRequest, parse

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP")
"""Kinds of image files, as Pillow calls them; fewer than Pillow reads, for each is code that meets hostile bytes."""
_DECODERS, _FETCHERS = 2, 8
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Prepared:
    """A request that is ready to be answered; its messages, which hold images as text, are left out."""

    request: ChatRequest
    prompt: Prompt
    max_new_tokens: int


class Service:
    """One model that is served.

    Args:
        assistant: The model.
        name: By which clients ask for it.
        engine, encoder: Of that model; the service starts and closes them.
        limits: Of a request.
        hosts: From which images behind URLs may be fetched.
    """

    def __init__(
        self,
        assistant: Assistant,
        name: str,
        engine: Engine,
        encoder: ImageEncoder,
        limits: Limits,
        hosts: Collection[str] = (),
    ) -> None:
        self.assistant, self.name, self.engine, self.encoder, self.limits = assistant, name, engine, encoder, limits
        self.gate = Gate(limits.queue + len(engine.scheduler.slots))
        self.metrics = Metrics(engine, encoder, self.gate)
        self.token_texts = TokenTexts(assistant.processor.tokenizer)
        self._fetcher = Fetcher(hosts, limits.fetch_bytes, limits.fetch_seconds)
        # Headers and prompts are looked at apart from pixels, so that a bad request hears of it while others decode.
        self._checking = ThreadPoolExecutor(1, "check")
        self._decoding = ThreadPoolExecutor(_DECODERS, "decode")
        self._fetching = ThreadPoolExecutor(_FETCHERS, "fetch")

    @property
    def temperature(self) -> float:
        """Of requests that name none: the model's own, greedy where it says nothing."""
        return self._sampled("temperature") if self._samples else 0.0

    @property
    def top_p(self) -> float:
        """Of requests that name none, likewise."""
        return self._sampled("top_p") if self._samples else 1.0

    @property
    def _samples(self) -> bool:
        return bool(getattr(self.assistant.model.generation_config, "do_sample", False))

    def _sampled(self, name: str) -> float:
        return float(getattr(self.assistant.model.generation_config, name, None) or 1.0)

    @property
    def image_processor(self) -> ConvLlavaImageProcessorPil:
        return self.assistant.processor.image_processor

    def close(self) -> None:
        """Stop the threads."""
        for pool in (self._checking, self._decoding, self._fetching):
            pool.shutdown(wait=False, cancel_futures=True)
        self.engine.close()
        self.encoder.close()

    async def prepare(self, body: bytes) -> Prepared:
        """A request's body -> its prompt.

        Raises:
            RefusalError: something in it is malformed, too large or not there.
        """
        request = await _in(self._checking, self._parsed, body)
        del body  # its images are held decoded from here on
        urls = enumerate(request.image_urls(), start=1)
        found = await _all(self._image(url, place, request.max_pixels) for place, url in urls)
        return await _in(self._checking, self._prepared, request, found)

    async def measure(self, data: bytes) -> Size:
        """Height and width of an image file, upright, after decoding all of it.

        Raises:
            RefusalError: it is damaged, too large or of another kind.
        """
        try:
            await _in(self._checking, self._check_header, data)
            image = await _in(self._decoding, self._decoded, data)
        except InputError as error:
            raise RefusalError(422, str(error).removeprefix("bytes: "), "invalid_image") from None
        return Size(image.height, image.width)

    def _parsed(self, body: bytes) -> ChatRequest:
        request, limits = parse(body), self.limits
        if request.model != self.name:
            raise no_such_model(request.model, self.name)
        bounds = (
            ("messages", "images", len(request.image_urls()), limits.images),
            ("messages", "characters of text", request.characters(), limits.prompt_characters),
            ("n", "answers", request.n, limits.choices),
            ("max_completion_tokens", "tokens of an answer", request.longest or 0, limits.new_tokens),
            ("mm_processor_kwargs", "pixels of an image", request.max_pixels or 0, self.image_processor.budget),
        )
        for parameter, what, value, most in bounds:
            if value > most:
                raise RefusalError(400, f"{value} {what}; at most {most} are served", "too_many", parameter)
        try:
            self.image_processor.within(request.max_pixels)
        except InputError as error:
            parameter = "mm_processor_kwargs.max_pixels"
            raise RefusalError(400, f"{parameter}: {error}", "invalid_request", parameter) from None
        return request

    async def _image(self, url: str, place: int, max_pixels: int | None) -> tuple[str, EncodedImage]:
        """What tells an image from others, and its tokens."""
        try:
            data = await self._bytes(url)
            digest = await _in(self._checking, digest_of, data)
            digest += f" within {max_pixels} pixels" if max_pixels else ""
            if known := self.encoder.known(digest):
                return digest, known
            await _in(self._checking, self._check_header, data)
            pixels = await _in(self._decoding, self._pixels, data, max_pixels)
        except InputError as error:
            raise RefusalError(422, f"image {place}: {error}", "invalid_image", "messages") from None
        return digest, await asyncio.wrap_future(self.encoder.submit(digest, pixels))

    async def _bytes(self, url: str) -> bytes:
        if url.startswith("data:"):
            return await _in(self._checking, _from_data_uri, url)
        return await _in(self._fetching, self._fetcher.fetch, url)

    def _check_header(self, data: bytes) -> None:
        kind = check_header(data, max_image_pixels=self.limits.image_pixels)
        if kind not in FORMATS:
            raise InputError(f"a {kind} file; send one of {', '.join(FORMATS)}")

    def _decoded(self, data: bytes) -> Image.Image:
        return load_image(data, max_image_pixels=self.limits.image_pixels)

    def _pixels(self, data: bytes, max_pixels: int | None) -> BatchFeature:
        return self.image_processor(self._decoded(data), return_tensors="pt", **self.image_processor.within(max_pixels))

    def _prepared(self, request: ChatRequest, found: list[tuple[str, EncodedImage]]) -> Prepared:
        messages = [message.as_message() for message in request.messages]
        digests, images = [digest for digest, _ in found], [image for _, image in found]
        try:
            prompt = build_prompt(self.assistant, messages, images, digests)
        except (InputError, TemplateError) as error:  # a template may refuse an order of messages
            raise RefusalError(400, str(error), "invalid_prompt", "messages") from None
        longest = self._longest(request, len(prompt.keys))
        return Prepared(request.model_copy(update={"messages": []}), prompt, longest)

    def _longest(self, request: ChatRequest, prompt: int) -> int:
        context = self.engine.context
        longest = request.longest or max(1, min(self.limits.new_tokens, context - prompt))
        if prompt + longest > context:
            raise RefusalError(
                400,
                f"the prompt has {prompt} tokens and the answer may have {longest}, but the context is {context}; "
                "shorten the prompt, send fewer or smaller images, or lower max_tokens",
                "context_length_exceeded",
                "messages",
            )
        return longest


def no_such_model(asked: str, name: str) -> RefusalError:
    return RefusalError(404, f"there is no model {asked[:100]!r}; it is {name!r}", "model_not_found", "model")


def _from_data_uri(uri: str) -> bytes:
    kind, comma, data = uri.partition(",")
    if not comma or not kind.endswith(";base64"):
        raise InputError("the data: URI is not of the form data:image/png;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"what follows base64, is not base64: {error}") from None


async def _all(works: Iterable[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """The results of all; when one fails, what is left of the others is given up."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _in(pool: ThreadPoolExecutor, work: Callable[..., _Result], *arguments: Any) -> _Result:
    """Run something in a thread of a pool; it is left out if nobody waits any more when its turn comes."""
    return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)
