"""Continuous batching: answers join and leave a running batch between any two tokens.

    engine = Engine(model, processor)
    engine.start()
    engine.submit(build_prompt(...), Sampling(), print)

A step is one pass of the language model. It processes one token of each answer that is being written, and a limited
number of prompt tokens. So the long prompt of one user delays the others by at most one step.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from convllava.errors import ConfigError, InputError
from convllava.inference.prompts import Prompt, check_context
from convllava.inference.ragged_attention import Span
from convllava.inference.ragged_model import RaggedModel, store_by_columns
from convllava.inference.sampling import Answer, Event, Sampling
from convllava.inference.scheduler import Scheduler
from convllava.model.modeling import ConvLlavaForConditionalGeneration
from convllava.model.processing import ConvLlavaProcessor

_log = logging.getLogger(__name__)


@dataclass
class EngineStats:
    """Counts since the engine was made."""

    steps: int = 0
    answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0


class Engine:
    """Writes the answers to many prompts at the same time.

    Args:
        model, processor: A model and its processor. Nothing else may use the language model while a step runs.
        slots: Number of answers that are written at the same time. A slot keeps its keys and values after the answer,
            for a prompt that begins with the same tokens.
        context: Most tokens of prompt and answer; None takes the model's context.
        step_tokens: Most tokens of one pass.
        by_columns: Store the weights for decoding (`ragged_model.store_by_columns`); do not train or save the model
            afterwards.

    Raises:
        InputError: if this engine does not support the language model, or a number is out of range.
    """

    def __init__(
        self,
        model: ConvLlavaForConditionalGeneration,
        processor: ConvLlavaProcessor,
        slots: int = 8,
        context: int | None = None,
        step_tokens: int = 128,
        by_columns: bool = True,
    ) -> None:
        longest = model.config.text_config.max_position_embeddings
        self.context = context or longest
        if slots < 1 or step_tokens <= slots:
            raise ConfigError(f"`step_tokens` is {step_tokens}, too few for {slots} slots; give at least {slots + 1}")
        if not 2 <= self.context <= longest:
            raise ConfigError(f"`context` is {self.context}; give a number between 2 and the model's {longest}")
        if by_columns:
            store_by_columns(model.model.language_model, model.lm_head)
        self.model = RaggedModel(model.model.language_model, model.lm_head, slots, self.context)
        self.scheduler = Scheduler(slots, step_tokens, self.model.cache.copy)
        self.stats = EngineStats()
        self._tokenizer, self._ends = processor.tokenizer, end_tokens(model, processor)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def submit(
        self, prompt: Prompt, sampling: Sampling, deliver: Callable[[Event], None] = lambda event: None
    ) -> Answer:
        """Queue an answer.

        Args:
            deliver: Called with every event from the thread that runs the steps; the last event has a `finish`. It
                must return at once and must not raise.

        Raises:
            InputError: if prompt and answer do not fit into the context, or the engine is closed.
        """
        check_context(len(prompt.keys), sampling.max_new_tokens, self.context)
        answer = Answer(prompt, sampling, self._tokenizer, deliver)
        with self._changed:
            if self._is_closed:
                raise InputError("the engine is closed")
            self.scheduler.submit(answer)
            self._changed.notify()
        return answer

    def cancel(self, answer: Answer) -> None:
        """Cancel an answer: the next step frees its slot, and there are no events after the current step."""
        with self._changed:
            answer.is_cancelled = True
            self._changed.notify()

    def forget(self) -> None:
        """Drop the keys and values of finished answers, and free their memory if no answer is being written."""
        self.scheduler.release_cancelled()
        self.scheduler.forget()
        if not self.scheduler.running:
            self.model.cache.clear()

    def start(self) -> None:
        """Run steps in a thread while there is something to write."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop after the current step; unfinished answers fail."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        self._fail_all()

    def _run(self) -> None:
        while self._wait():
            try:
                self.step()
            except Exception:
                _log.exception("a step failed, and all unfinished answers with it; new answers start normally")
                self._fail_all()

    def _wait(self) -> bool:
        """Wait until there is something to do; return False if the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self.scheduler.waiting or self.scheduler.running)
        return not self._is_closed

    def _fail_all(self) -> None:
        for answer in self.scheduler.clear():
            answer.finish = "error"
            answer.deliver(Event("", finish="error"))

    @torch.inference_mode()
    def step(self) -> bool:
        """Run one pass: admit waiting answers, read prompts, and write one token of each answer with a read prompt.

        Returns:
            False if there was nothing to do.
        """
        self.scheduler.release_cancelled()
        for answer in self.scheduler.admit():
            self.stats.answers += 1
            self.stats.prompt_tokens += len(answer.prompt.keys)
            self.stats.cached_tokens += answer.cached
        plan = self.scheduler.plan()
        if not plan:
            return False
        spans = [Span(slot.index, len(slot.held), count) for slot, count in plan]
        # In the plan, answers come before prompts. The input of an answer is the token that was picked last.
        busy = [(slot, slot.answer, count) for slot, count in plan if slot.answer is not None]
        picked = torch.tensor([answer.last for slot, answer, _ in busy if not slot.unread], dtype=torch.long)
        read = [
            answer.prompt.embeddings[len(slot.held) : len(slot.held) + count]
            for slot, answer, count in busy
            if slot.unread
        ]
        logits = self.model.forward(spans, torch.cat([self.model.embed(picked.to(self.model.device)), *read]))
        self.stats.steps += 1
        for (slot, answer, count), row, likeliest in zip(busy, logits, logits.argmax(-1).tolist(), strict=True):
            slot.advance(count, self.stats.steps)
            if not slot.unread:
                event = answer.write(row, likeliest, self._ends)
                self.stats.written_tokens += 1
                if event.finish:
                    slot.answer = None
                answer.deliver(event)
        return True


class SequentialEngine:
    """Writes one answer after another with the model's own forward pass.

    For language models that `Engine` rejects, such as those that cap attention scores. It has the methods of `Engine`
    that an `Assistant` needs. It does not batch, and it reads every prompt from its beginning.
    """

    def __init__(self, model: ConvLlavaForConditionalGeneration, processor: ConvLlavaProcessor) -> None:
        self.context = model.config.text_config.max_position_embeddings
        self._model, self._tokenizer, self._ends = model, processor.tokenizer, end_tokens(model, processor)
        self._waiting: deque[Answer] = deque()
        self._cache: Any = None

    def submit(
        self, prompt: Prompt, sampling: Sampling, deliver: Callable[[Event], None] = lambda event: None
    ) -> Answer:
        """Queue an answer; see `Engine.submit`."""
        check_context(len(prompt.keys), sampling.max_new_tokens, self.context)
        self._waiting.append(Answer(prompt, sampling, self._tokenizer, deliver))
        return self._waiting[-1]

    def cancel(self, answer: Answer) -> None:
        """Cancel an answer."""
        answer.is_cancelled = True

    def forget(self) -> None:
        """Do nothing: keys and values are not kept after an answer."""

    @torch.inference_mode()
    def step(self) -> bool:
        """Write one token of the first answer in the queue.

        Returns:
            False if there was nothing to do.
        """
        while self._waiting and (self._waiting[0].is_cancelled or self._waiting[0].finish):
            self._waiting.popleft()
        if not self._waiting:
            self._cache = None
            return False
        answer = self._waiting[0]
        if answer.written:
            last = torch.tensor([[answer.last]], device=self._model.device)
            embeddings = self._model.get_input_embeddings()(last)
        else:
            self._cache, embeddings = None, answer.prompt.embeddings[None]
        output = self._model(
            inputs_embeds=embeddings, past_key_values=self._cache, use_cache=True, logits_to_keep=1, return_dict=True
        )
        self._cache = output.past_key_values
        logits = output.logits[0, -1].float()
        answer.deliver(answer.write(logits, int(logits.argmax()), self._ends))
        return True


def end_tokens(model: ConvLlavaForConditionalGeneration, processor: ConvLlavaProcessor) -> frozenset[int]:
    """Return the tokens that end an answer, as `generate` does."""
    configured: Any = model.generation_config.eos_token_id
    if configured is None:
        configured = processor.tokenizer.eos_token_id
    return frozenset(configured if isinstance(configured, list) else [configured])
