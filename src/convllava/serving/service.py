"""One served model: turns the body of a request into a prompt for the engine."""

import asyncio
import base64
import binascii
from collections.abc import Callable, Collection, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import BatchFeature

from convllava.errors import ImageError, InputError
from convllava.inference.assistant import Assistant
from convllava.inference.engine import Engine
from convllava.inference.image_queue import ImageEncoder, digest_of
from convllava.inference.prompts import Prompt
from convllava.inference.types import EncodedImage
from convllava.model.images import check_header, load_image
from convllava.serving.api_error import ApiError
from convllava.serving.fetching import Fetcher
from convllava.serving.limits import Admission, Limits
from convllava.serving.metrics import Metrics
from convllava.serving.schema import ChatRequest, parse

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP")
"""Accepted image formats, by Pillow's names. Pillow reads more, but each decoder is code that can be attacked."""
_DECODERS, _FETCHERS = 2, 8
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Prepared:
    """A checked request and its prompt. The request's messages, which hold images as text, are dropped."""

    request: ChatRequest
    prompt: Prompt
    max_new_tokens: int


class Service:
    """One model, with the engine and the image encoder that answer requests to it.

    Args:
        assistant: The model.
        name: Name of the model in the API.
        engine, encoder: Engine and image encoder of that model; `close` closes them.
        limits: Limits of a request.
        allow_urls: Hosts from which images behind URLs may be fetched.
    """

    def __init__(
        self,
        assistant: Assistant,
        name: str,
        engine: Engine,
        encoder: ImageEncoder,
        limits: Limits,
        allow_urls: Collection[str] = (),
    ) -> None:
        self.assistant, self.name, self.engine, self.encoder, self.limits = assistant, name, engine, encoder, limits
        self.admission = Admission(limits.queue + len(engine.slots))
        self.metrics = Metrics(engine, encoder, self.admission)
        generation = assistant.model.generation_config
        samples = bool(getattr(generation, "do_sample", False))
        # Defaults of requests that name no temperature or top_p: the model's own; greedy if it does not sample.
        self.temperature = float(getattr(generation, "temperature", None) or 1.0) if samples else 0.0
        self.top_p = float(getattr(generation, "top_p", None) or 1.0) if samples else 1.0
        self._fetcher = Fetcher(allow_urls, limits.fetch_bytes, limits.fetch_seconds)
        # Headers and prompts have a separate thread, so that bad requests are rejected while images are decoded.
        self._checking = ThreadPoolExecutor(1, "check")
        self._decoding = ThreadPoolExecutor(_DECODERS, "decode")
        self._fetching = ThreadPoolExecutor(_FETCHERS, "fetch")

    def close(self) -> None:
        """Stop all threads."""
        for pool in (self._checking, self._decoding, self._fetching):
            pool.shutdown(wait=False, cancel_futures=True)
        self.engine.close()
        self.encoder.close()

    async def prepare(self, body: bytes) -> Prepared:
        """Check a request and make its prompt: parse, fetch and encode the images, apply the chat template.

        Everything that takes time runs in threads, so that the event loop stays free.

        Raises:
            ApiError: if something in the request is malformed, too large or not available.
        """
        request = await _run_in(self._checking, self._parse, body)
        del body  # frees the images in base64; from here on they are kept decoded
        urls = enumerate(request.image_urls(), start=1)
        images = await _gather(self._image(url, number, request.max_pixels) for number, url in urls)
        return await _run_in(self._checking, self._build_prompt, request, images)

    def _parse(self, body: bytes) -> ChatRequest:
        """Parse a body and check it against the limits and the model."""
        request, limits, processor = parse(body), self.limits, self.assistant.processor.image_processor
        if request.model != self.name:
            raise unknown_model(request.model, self.name)
        for param, what, value, most in (
            ("messages", "images", len(request.image_urls()), limits.images),
            ("messages", "characters of text", request.characters(), limits.prompt_characters),
            ("n", "answers", request.n, limits.choices),
            ("max_completion_tokens", "tokens of an answer", request.max_answer_tokens or 0, limits.new_tokens),
            ("mm_processor_kwargs", "pixels of an image", request.max_pixels or 0, processor.budget),
        ):
            if value > most:
                raise ApiError(400, f"{value} {what}; the limit is {most}", "too_many", param)
        try:
            processor.within(request.max_pixels)
        except InputError as error:
            param = "mm_processor_kwargs.max_pixels"
            raise ApiError(400, f"{param}: {error}", "invalid_request", param) from None
        return request

    async def _image(self, url: str, number: int, max_pixels: int | None) -> EncodedImage:
        """Return the features of an image, from the cache if possible."""
        try:
            if url.startswith("data:"):
                data = await _run_in(self._checking, _decode_data_uri, url)
            else:
                data = await _run_in(self._fetching, self._fetcher.fetch, url)
            digest = await _run_in(self._checking, digest_of, data)
            digest += f" within {max_pixels} pixels" if max_pixels else ""
            if cached := self.encoder.known(digest):
                return cached
            await _run_in(self._checking, self._check_header, data)
            pixels = await _run_in(self._decoding, self._decode, data, max_pixels)
        except InputError as error:
            raise ApiError(422, f"image {number}: {error}", "invalid_image", "messages") from None
        return await asyncio.wrap_future(self.encoder.submit(digest, pixels))

    def _check_header(self, data: bytes) -> None:
        kind = check_header(data, max_image_pixels=self.limits.image_pixels)
        if kind not in FORMATS:
            raise ImageError(f"a {kind} file; send one of {', '.join(FORMATS)}")

    def _decode(self, data: bytes, max_pixels: int | None) -> BatchFeature:
        processor = self.assistant.processor.image_processor
        image = load_image(data, max_image_pixels=self.limits.image_pixels)
        return processor(image, return_tensors="pt", **processor.within(max_pixels))

    def _build_prompt(self, request: ChatRequest, images: list[EncodedImage]) -> Prepared:
        messages = [message.as_message() for message in request.messages]
        try:
            prompt = self.assistant.prompt(messages, images)
        except (InputError, TemplateError) as error:  # a template may reject an order of messages
            raise ApiError(400, str(error), "invalid_prompt", "messages") from None
        tokens, context = len(prompt.keys), self.engine.context
        max_new_tokens = request.max_answer_tokens or max(1, min(self.limits.new_tokens, context - tokens))
        if tokens + max_new_tokens > context:
            raise ApiError(
                400,
                f"the prompt has {tokens} tokens and the answer may have {max_new_tokens}, but the context is "
                f"{context}; shorten the prompt, send fewer or smaller images, or lower max_tokens",
                "context_length_exceeded",
                "messages",
            )
        return Prepared(request.model_copy(update={"messages": []}), prompt, max_new_tokens)


def unknown_model(asked: str, name: str) -> ApiError:
    """Return the error of a request for another model."""
    return ApiError(404, f"there is no model {asked[:100]!r}; use {name!r}", "model_not_found", "model")


def _decode_data_uri(uri: str) -> bytes:
    kind, comma, data = uri.partition(",")
    if not comma or not kind.endswith(";base64"):
        raise ImageError("the data: URI is not of the form data:image/png;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the text after base64, is not base64: {error}") from None


async def _gather(coroutines: Iterable[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """Return all results; if one fails, cancel the others. (asyncio.TaskGroup would wrap the error in a group.)"""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _run_in(pool: ThreadPoolExecutor, function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Run a function in a thread of a pool; it is skipped if its caller is cancelled before it starts."""
    return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)
