"""How likely a model finds given answers: what multiple choice by likelihood is scored with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from convllava.errors import InputError
from convllava.inference.assistant import Assistant, EncodedImage, Message
from convllava.model.images import ImageSource


class LogLikelihood(NamedTuple):
    """Of one answer.

    Attributes:
        total: Sum of the natural logarithms of the probabilities of its tokens, among them the one that ends the turn.
        is_greedy: Whether each of them is the likeliest: whether the model, asked, would say just this.
    """

    total: float
    is_greedy: bool


Request = tuple[Sequence[ImageSource | EncodedImage], Sequence[Message], str]
"""Images, the conversation up to the answer (see `Assistant.chat`), and the answer."""


@torch.inference_mode()
def log_likelihoods(assistant: Assistant, requests: Sequence[Request]) -> list[LogLikelihood]:
    """Score answers in one batch; it gives what each would give alone.

    The answer counts as a whole turn, its end included: without the end "1" would profit from every "15", and the
    probabilities of all answers would not add up to one.

    Args:
        requests: Give an image that several ask about as one `EncodedImage`, and tower and projector see it once.

    Raises:
        InputError: as `Assistant.chat`; or the chat template does not continue its own prompt with an answer.
    """
    if not requests:
        return []
    answers = [_answer_ids(assistant, answer) for _, _, answer in requests]
    conversations = [(messages, [assistant.encode(image) for image in images]) for images, messages, _ in requests]
    inputs = assistant.prompts(conversations, [len(answer) for answer in answers])
    # Prompts are padded on the left, so that all answers begin in the same column.
    targets = pad_sequence(answers, batch_first=True, padding_value=_NOTHING).to(assistant.model.device)
    logits = _logits(assistant, inputs, targets)
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=_NOTHING, reduction="none")
    hits = (logits.argmax(-1) == targets) | (targets == _NOTHING)
    totals = (-losses.double().sum(-1)).tolist()
    return [LogLikelihood(total, greedy) for total, greedy in zip(totals, hits.all(-1).tolist(), strict=True)]


_NOTHING = -100
"""In place of a token where an answer is shorter than the longest."""


def _logits(assistant: Assistant, inputs: dict[str, Any], targets: Tensor) -> Tensor:
    """(batch, answer, vocabulary) in float32: what the model expects at each place of an answer."""
    exists = targets != _NOTHING
    mask = torch.cat([inputs["attention_mask"], exists.to(inputs["attention_mask"])], dim=1)
    output = assistant.model(
        input_ids=torch.cat([inputs["input_ids"], targets.masked_fill(~exists, 0)], dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        mm_encoder_outputs=inputs.get("mm_encoder_outputs"),
        logits_to_keep=targets.shape[1] + 1,
        use_cache=False,
    )
    return output.logits[:, :-1].float()


def _answer_ids(assistant: Assistant, answer: str) -> Tensor:
    """The tokens with which the chat template writes an answer and ends the turn.

    Seen where they follow a prompt, for there are tokenizers that begin every text of its own with a space.
    """
    question: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    turn: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    template, tokenizer = assistant.processor.apply_chat_template, assistant.processor.tokenizer
    texts = (
        template([question], add_generation_prompt=True, tokenize=False),
        template([question, turn], tokenize=False),
    )
    prompt, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    if whole[: len(prompt)] != prompt:
        raise InputError("the chat template does not continue its prompt with an answer; answers cannot be scored")
    return torch.tensor(whole[len(prompt) :])
