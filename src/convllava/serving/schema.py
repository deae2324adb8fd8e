"""The fields of a chat request. Unknown fields are rejected, because ignoring them could change the answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from convllava.inference.sampling import Sampling
from convllava.inference.types import Message
from convllava.serving.api_error import ApiError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """An image as a data: URI or a URL. `detail` has no effect; `mm_processor_kwargs` sets the pixel budget."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @model_validator(mode="after")
    def _check_images(self) -> ChatMessage:
        if self.role != "user" and self.image_urls():
            raise ValueError("only user messages may have images")
        return self

    def parts(self) -> list[Part]:
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    def image_urls(self) -> list[str]:
        return [part.image_url.url for part in self.parts() if isinstance(part, ImagePart)]

    def as_message(self) -> Message:
        """Return the message as `Assistant.chat` takes it; image parts lose their URL."""
        role = "system" if self.role == "developer" else self.role
        parts = self.parts()
        content = [{"type": "text", "text": p.text} if isinstance(p, TextPart) else {"type": "image"} for p in parts]
        return {"role": role, "content": content}


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class PixelBudget(_Strict):
    """Most pixels of each image that the vision tower sees; lowers the server's own budget. The name is vLLM's."""

    max_pixels: Annotated[int, Field(ge=1)]


class ChatRequest(_Strict):
    """Fields of OpenAI's API: those that the server uses, those with one allowed value, and those without effect."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    n: Annotated[int, Field(ge=1)] = 1
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    mm_processor_kwargs: PixelBudget | None = None

    # Features that the server does not have; only the neutral value is accepted.
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    modalities: list[Literal["text"]] | None = None

    # Accepted without effect, because clients send them.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None
    dataset: str | None = None  # from VLMEvalKit

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        if "" in self.stops():
            raise ValueError("stop contains an empty string")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream")
        return self

    @property
    def max_answer_tokens(self) -> int | None:
        """Most tokens of an answer, if the request limits them."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def max_pixels(self) -> int | None:
        """Pixel budget of each image, if the request has one."""
        return self.mm_processor_kwargs.max_pixels if self.mm_processor_kwargs else None

    def image_urls(self) -> list[str]:
        return [url for message in self.messages for url in message.image_urls()]

    def characters(self) -> int:
        return sum(
            len(part.text) for message in self.messages for part in message.parts() if isinstance(part, TextPart)
        )

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, choice: int, max_new_tokens: int, temperature: float, top_p: float) -> Sampling:
        """Return the sampling settings of one answer; `temperature` and `top_p` are the defaults."""
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature if self.temperature is None else self.temperature,
            top_p=top_p if self.top_p is None else self.top_p,
            seed=None if self.seed is None else (self.seed + choice) % 2**63,
            stop=self.stops(),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


def parse(body: bytes) -> ChatRequest:
    """Parse the body of a request.

    Raises:
        ApiError: if it is not JSON, lacks a field, or has an unknown field or a bad value.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
    # If a string or a list is allowed, the error about the list says more than "not a string".
    worst = next((error for error in errors if error["loc"][-1:] != ("str",)), errors[0])
    match worst["loc"]:  # the path of a field in the request has no names of union members
        case ("messages", number, "content", _, part, _, *rest):
            path = ("messages", number, "content", part, *rest)
        case ("messages", number, "content", _, *rest):
            path = ("messages", number, "content", *rest)
        case ("stop", _, *rest):
            path = ("stop", *rest)
        case path:
            pass
    message = _MESSAGES.get(worst["type"], worst["msg"].removeprefix("Value error, "))
    if worst["type"] == "list_type" and path != worst["loc"]:
        message = "Input should be a string or a list"
    where = ".".join(map(str, path))
    raise ApiError(400, f"{where}: {message}" if where else message, "invalid_request", where or None)


_PART = 'a part is {"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": ...}}'
_MESSAGES = {
    "extra_forbidden": "this server does not support the parameter; leave it out",
    "union_tag_invalid": _PART,
    "union_tag_not_found": _PART,
}
