"""Log probabilities of given answers, for multiple choice by likelihood."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from convllava.errors import CheckpointError
from convllava.inference.assistant import Assistant
from convllava.inference.prompts import padded_inputs
from convllava.inference.types import EncodedImage, Message
from convllava.model.images import ImageSource

_PADDING = -100
"""Target after the end of an answer that is shorter than the longest."""


class LogLikelihood(NamedTuple):
    """Score of one answer.

    Attributes:
        total: Sum of the natural log probabilities of its tokens, including the token that ends the turn.
        is_greedy: True if each token is the likeliest, so that the model itself would give exactly this answer.
    """

    total: float
    is_greedy: bool


Request = tuple[Sequence[ImageSource | EncodedImage], Sequence[Message], str]
"""Images, the conversation before the answer (see `Assistant.chat`), and the answer."""


@torch.inference_mode()
def log_likelihoods(assistant: Assistant, requests: Sequence[Request]) -> list[LogLikelihood]:
    """Score answers in one batch. Each score equals that of the answer alone.

    The score includes the end of the turn. Otherwise "1" would also get the probability of every "15", and the
    probabilities of all answers would not add up to one.

    Args:
        requests: If several requests share an image, give it as one `EncodedImage`: the tower then runs once.

    Raises:
        InputError: as `Assistant.chat`, or if the chat template does not continue its own prompt with an answer.
    """
    if not requests:
        return []
    # The tokens of an answer and of the end of its turn are taken after a prompt, because some tokenizers put a space
    # before every text that stands alone.
    template, tokenizer = assistant.processor.apply_chat_template, assistant.processor.tokenizer
    question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    prompt = template([question], add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answers = []
    for _, _, answer in requests:
        turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        ids = tokenizer(template([question, turn], tokenize=False), add_special_tokens=False)["input_ids"]
        if ids[: len(prompt_ids)] != prompt_ids:
            raise CheckpointError(
                "the chat template does not continue its prompt with an answer; answers cannot be scored"
            )
        answers.append(torch.tensor(ids[len(prompt_ids) :]))
    conversations = [(messages, [assistant.encode(image) for image in images]) for images, messages, _ in requests]
    inputs = padded_inputs(assistant.model, assistant.processor, conversations, [len(answer) for answer in answers])
    # Prompts are padded on the left, so that all answers begin in the same column.
    targets = pad_sequence(answers, batch_first=True, padding_value=_PADDING).to(assistant.model.device)
    exists = targets != _PADDING
    mask = torch.cat([inputs["attention_mask"], exists.to(inputs["attention_mask"])], dim=1)
    output = assistant.model(
        input_ids=torch.cat([inputs["input_ids"], targets.masked_fill(~exists, 0)], dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        mm_encoder_outputs=inputs.get("mm_encoder_outputs"),
        logits_to_keep=targets.shape[1] + 1,
        use_cache=False,
    )
    logits = output.logits[:, :-1].float()  # (batch, answer, vocabulary)
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=_PADDING, reduction="none")
    hits = (logits.argmax(-1) == targets) | ~exists
    totals = (-losses.double().sum(-1)).tolist()
    return [LogLikelihood(total, greedy) for total, greedy in zip(totals, hits.all(-1).tolist(), strict=True)]
