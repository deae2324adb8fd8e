"""Choices by likelihood: which option's letter a model finds likeliest as its answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from convllava.inference.assistant import Assistant, EncodedImage, Message


@torch.inference_mode()
def log_likelihoods(
    assistant: Assistant, messages: Sequence[Message], images: Sequence[EncodedImage], answers: Sequence[str]
) -> list[float]:
    """Of each of some answers, with its end, the log-probability (natural) of being the assistant's next message.

    All are one batch: the prompt, left-padded to nothing since it is the same, and the answers right-padded.

    Raises:
        InputError: as for `Assistant.prompts`.
    """
    tokens = [_answer_tokens(assistant, messages, answer) for answer in answers]
    longest = max(len(item) for item in tokens)
    inputs = assistant.prompts([(messages, images)] * len(answers), longest)
    prompt, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    padded = pad_sequence(tokens, batch_first=True, padding_value=-1).to(prompt.device)
    written = padded >= 0
    logits = assistant.model(
        input_ids=torch.cat([prompt, padded.clamp(min=0)], dim=1),
        attention_mask=torch.cat([mask, written.to(mask.dtype)], dim=1),
        logits_to_keep=longest + 1,
        **inputs,
    ).logits[:, :-1]
    found = logits.float().log_softmax(dim=-1).gather(-1, padded.clamp(min=0)[..., None])[..., 0]
    return (found * written).sum(dim=1).tolist()


def _answer_tokens(assistant: Assistant, messages: Sequence[Message], answer: str) -> torch.Tensor:
    """(tokens,): what the chat template writes for an answer after the prompt, its end included."""
    processor = assistant.processor
    said: list[Message] = [*messages, {"role": "assistant", "content": answer}]
    prompt = processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    whole = processor.apply_chat_template(said, tokenize=False)
    ids = processor.tokenizer(whole.removeprefix(prompt), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids)


def likeliest_letter(
    assistant: Assistant, messages: Sequence[Message], images: Sequence[EncodedImage], letters: str
) -> str:
    """The letter with the highest likelihood; of equal ones the first."""
    scores = log_likelihoods(assistant, messages, images, list(letters))
    return letters[max(range(len(letters)), key=scores.__getitem__)]
