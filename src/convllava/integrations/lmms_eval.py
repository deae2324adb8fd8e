"""Our models in lmms-eval: `lmms-eval --model convllava --model_args pretrained=MODEL --tasks ...` (docs/harnesses.md).

lmms-eval has two kinds of model. A chat model gets the messages of a task; a simple model gets a text and images.
Only simple models can score given answers (`loglikelihood`): use `--force_simple`.
"""

import json
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.progress import make_progress

from convllava.errors import ConfigError, DataError, InputError
from convllava.inference import EncodedImage, Message, load
from convllava.inference.likelihood import log_likelihoods
from convllava.inference.prompts import padded_inputs

Result = TypeVar("Result")
Conversation = tuple[list[Message], list[EncodedImage]]
_SEARCH = ("num_beams", "repetition_penalty")
_SAMPLING = ("temperature", "top_p", "top_k")

_GREEDY = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""Overrides the model's generation_config.json, which the engine does not read either."""


class _ConvLlava(lmms):
    """Common base of both kinds of model.

    Args:
        pretrained: `tiny`, a folder or a hub id.
        batch_size: Requests that are answered together.
        device: Device of the model; None takes this process's accelerator, or the CPU.
        max_batch_size: Ignored; lmms-eval passes it for automatic batch sizes, which are not supported.
        pixels: Settings of the image processor instead of the checkpoint's, such as mode=short_side,side=1536.

    Raises:
        InputError: if nothing with that name can be loaded, or a setting is wrong.
    """

    def __init__(
        self,
        pretrained: str = "tiny",
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **pixels: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise ConfigError(f"`batch_size` is {batch_size}; give the number of requests that are answered together")
        self.batch_size = int(batch_size)
        self.assistant = load(pretrained, device=device or str(PartialState().device), pixels=pixels)
        self._encoded: tuple[Any, list[EncodedImage]] = (None, [])

    @property
    def device(self) -> Any:
        """The device on which lmms-eval gathers the results of several processes."""
        return self.assistant.model.device

    @abstractmethod
    def _conversation(self, request: Instance) -> Conversation:
        """Return messages and encoded images."""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the answers, up to the first of the texts that a task lists in `until`."""
        settings = [request.args[1 if self.is_simple else 2] for request in requests]
        return self._in_batches(requests, settings, self._generate)

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        """Return the loss of each given answer, and whether it is the model's own greedy answer.

        The loss is minus the sum of its tokens' log probabilities; lmms-eval's tasks choose the smallest.
        """

        def score(batch: list[Instance], settings: dict[str, Any]) -> list[Any]:
            items = []
            for request in batch:
                messages, images = self._text_and_images(request)
                target = request.args[1]
                items.append((images, messages, target(self._doc(request)) if callable(target) else target))
            # lmms-eval turns any tuple into a string unless it is a GenerationResult.
            return [
                GenerationResult((-found.total, found.is_greedy)) for found in log_likelihoods(self.assistant, items)
            ]

        return self._in_batches(requests, [{}] * len(requests), score)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raise ConfigError: tasks of several rounds are not supported."""
        raise ConfigError("tasks of several rounds (generate_until_multi_round) are not supported")

    def _in_batches(
        self,
        requests: Sequence[Instance],
        settings: Sequence[dict[str, Any]],
        work: Callable[[list[Instance], dict[str, Any]], list[Result]],
    ) -> list[Result]:
        """Return results in the order of the requests; all requests of a batch have the same settings."""
        results: dict[int, Result] = {}
        with make_progress(len(requests), "answering", disable=self.rank != 0) as bar:
            for shared, batch in _batches(settings, self.batch_size):
                results |= zip(batch, work([requests[index] for index in batch], shared), strict=True)
                bar.update(len(batch))
        return [results[index] for index in range(len(requests))]

    def _generate(self, requests: list[Instance], settings: dict[str, Any]) -> list[str]:
        conversations = [self._conversation(request) for request in requests]
        until, options = settings.get("until"), _generation(settings)
        longest = options.pop("max_new_tokens")
        if not options["do_sample"] and all(options.get(name, 1) == 1 for name in _SEARCH):
            answers = self.assistant.chat_many(conversations, max_new_tokens=longest)
            for answer in answers:
                if isinstance(answer, InputError):
                    raise answer
            return [_cut(str(answer), until) for answer in answers]
        # The engine has no beams, penalties or top_k, and lmms-eval seeds the random generator that `generate` uses.
        model, processor = self.assistant.model, self.assistant.processor
        inputs = padded_inputs(model, processor, conversations, [longest] * len(conversations))
        with torch.inference_mode():
            settings = {**_GREEDY, **options, "max_new_tokens": longest}
            output: Any = model.generate(**inputs, **settings)  # type: ignore[misc]  # its self is a protocol
        texts = processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [_cut(text, until) for text in texts]

    def _doc(self, request: Instance) -> Any:
        doc_id, task, split = request.args[3:6]
        return self.task_dict[task][split][doc_id]

    def _text_and_images(self, request: Instance) -> Conversation:
        """Read a request of the simple form: text, settings, doc_to_visual, doc_id, task, split."""
        if len(request.args) < 6:
            raise DataError(f"{request.task_name}: answers without their question (acc_mutual_info) are not scored")
        text, _, doc_to_visual, *place = request.args
        images = self._encode(place, lambda: doc_to_visual(self._doc(request)) if doc_to_visual else [])
        parts = _interleave(text, self.assistant.processor.image_token, len(images))
        return [Message(role="user", content=parts)], images

    def _encode(self, place: Sequence[Any], images: Callable[[], Sequence[Any] | None]) -> list[EncodedImage]:
        """Encode the images of a document once for all successive requests about it."""
        if self._encoded[0] != place:
            self._encoded = (place, [self.assistant.encode(image) for image in images() or ()])
        return self._encoded[1]


class ConvLlavaSimple(_ConvLlava):
    """Model for a text and images. The images take the places of the `<image>` marks in the text if their numbers are
    equal; otherwise they precede the text."""

    is_simple = True

    def _conversation(self, request: Instance) -> Conversation:
        return self._text_and_images(request)


class ConvLlavaChat(_ConvLlava):
    """Model for messages whose parts are texts and images."""

    is_simple = False

    def _conversation(self, request: Instance) -> Conversation:
        asked = request.args[1](self._doc(request))
        turns = [(message["role"], _parts(message["content"])) for message in asked]
        images = [part["image"] for _, parts in turns for part in parts if part["type"] == "image"]
        messages = [Message(role=role, content=parts) for role, parts in turns]
        return messages, self._encode(request.args[3:6], lambda: images)


def _batches(settings: Sequence[dict[str, Any]], size: int) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Yield settings, and the indices of at most `size` requests that share them."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, own in enumerate(settings):
        groups[json.dumps(own, sort_keys=True)].append(index)
    for indices in groups.values():
        for start in range(0, len(indices), size):
            yield settings[indices[0]], indices[start : start + size]


def _generation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate lmms-eval's settings for `generate`. As with its own models, a temperature above 0 means sampling."""
    samples = settings.get("do_sample") is not False and float(settings.get("temperature") or 0) > 0
    names = (*_SEARCH, *(_SAMPLING if samples else ()))
    passed = {name: settings[name] for name in names if settings.get(name) is not None}
    return {**passed, "do_sample": samples, "max_new_tokens": int(settings.get("max_new_tokens") or 256)}


def _cut(answer: str, until: str | Sequence[str] | None) -> str:
    """Return the text before the first of the texts that end an answer."""
    for end in [until] if isinstance(until, str) else until or ():
        answer = answer.partition(end)[0] if end else answer
    return answer


def _parts(content: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Translate the parts of a message from lmms-eval's form to that of transformers.

    Raises:
        DataError: if a part is neither text nor an image.
    """
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts: list[dict[str, Any]] = []
    for part in content:
        if part["type"] not in ("text", "image"):
            raise DataError(f"the task asks about {part['type']}; the model takes text and images")
        if part["type"] == "image":
            parts.append({"type": "image", "image": part["url"]})
        elif part["text"].strip():
            parts.append({"type": "text", "text": part["text"]})
    return parts


def _interleave(text: str, mark: str, images: int) -> list[dict[str, Any]]:
    """Split a text at its image marks and put images there; if their numbers differ, put all images before the text."""
    pieces = text.split(mark)
    if len(pieces) - 1 != images:
        pieces = [""] * images + [text]
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece.strip() else []
    return parts
