"""Continuous batching: answers join and leave a running batch between any two tokens.

    engine = Engine(assistant)
    engine.start()
    engine.submit(build_prompt(...), Sampling(), print)

Every step is one pass of the language model over one token of each answer that is being written and a bounded number
of tokens of prompts that are being read: nobody waits for more than one step because somebody else's prompt is long.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convllava.errors import InputError
from convllava.inference.answer import Answer, Event
from convllava.inference.assistant import Assistant
from convllava.inference.prompts import Prompt
from convllava.inference.ragged_attention import Span
from convllava.inference.ragged_model import RaggedModel, store_by_columns
from convllava.inference.sampling import Sampling
from convllava.inference.scheduler import Scheduler, Slot
from convllava.inference.text_stream import TextStream

_log = logging.getLogger(__name__)


@dataclass
class EngineStats:
    """Counts since the start."""

    steps: int = 0
    answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0


class Engine:
    """Writes the answers to many prompts at once.

    Args:
        assistant: Whose language model; nothing else may use it while a step runs.
        slots: Answers that are written at once. A slot keeps its keys and values, for a prompt that goes on from there.
        context: Most tokens of prompt and answer; None takes the model's.
        step_tokens: Most tokens of one pass.
        by_columns: Lay the weights out for decoding (`ragged.store_by_columns`); the model should not train afterwards.

    Raises:
        InputError: the language model cannot be run this way, or a number is too small or too large.
    """

    def __init__(
        self,
        assistant: Assistant,
        slots: int = 8,
        context: int | None = None,
        step_tokens: int = 128,
        by_columns: bool = True,
    ) -> None:
        model = assistant.model
        most = model.config.text_config.max_position_embeddings
        self.context = context or most
        _check(slots, step_tokens, self.context, most)
        if by_columns:
            store_by_columns(model.model.language_model, model.lm_head)
        self.model = RaggedModel(model.model.language_model, model.lm_head, slots, self.context)
        self.scheduler = Scheduler(slots, step_tokens, self.model.cache.copy)
        self.stats = EngineStats()
        self._tokenizer, self._ends = assistant.processor.tokenizer, end_tokens(assistant)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def submit(self, prompt: Prompt, sampling: Sampling, deliver: Callable[[Event], None]) -> Answer:
        """Queue an answer.

        Args:
            deliver: Called with every event, the last of which has a `finish`, from the engine's thread: it must
                return at once and not raise.

        Raises:
            InputError: prompt and answer do not fit into the context, or the engine is closed.
        """
        tokens = len(prompt.keys)
        if tokens + sampling.max_new_tokens > self.context:
            raise InputError(
                f"the prompt has {tokens} tokens and the answer may have {sampling.max_new_tokens}, but the context is "
                f"{self.context}; shorten the prompt, use a smaller image or ask for fewer tokens"
            )
        answer = Answer(prompt, sampling, TextStream(self._tokenizer, sampling.stop), deliver)
        with self._changed:
            if self._is_closed:
                raise InputError("the engine is closed")
            self.scheduler.submit(answer)
            self._changed.notify()
        return answer

    def cancel(self, answer: Answer) -> None:
        """Give an answer up: its slot is free from the next step on, and no event follows the step that runs."""
        with self._changed:
            answer.is_cancelled = True
            self._changed.notify()

    def start(self) -> None:
        """Run steps in a thread for as long as there is something to write."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop after the step that runs; answers that are not finished fail."""
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
                _log.exception("a step failed, and all answers with it; the next ones begin anew")
                self._fail_all()

    def _wait(self) -> bool:
        """Until there is something to do; False is the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self.scheduler.waiting or self.scheduler.running)
        return not self._is_closed

    def _fail_all(self) -> None:
        for answer in self.scheduler.clear():
            answer.deliver(Event("", finish="error"))

    @torch.inference_mode()
    def step(self) -> bool:
        """One pass: admit who waits, read prompts, write one token of every answer whose prompt is read.

        Returns:
            Whether there was anything to do.
        """
        self.scheduler.release_cancelled()
        for answer in self.scheduler.admit():
            self._count(answer)
        plan = self.scheduler.plan()
        if not plan:
            return False
        spans = [Span(slot.index, len(slot.held), count) for slot, count in plan]
        logits = self.model.forward(spans, self._embeddings(plan))
        self.stats.steps += 1
        for (slot, count), row, likeliest in zip(plan, logits, logits.argmax(-1).tolist(), strict=True):
            slot.advance(count, self.stats.steps)
            if not slot.unread:
                self._write(slot, row, likeliest)
        return True

    def _embeddings(self, plan: Sequence[tuple[Slot, int]]) -> Tensor:
        """(tokens of all slots, width): those that were picked last, which a plan has first, and those of prompts."""
        busy = [(slot, slot.answer, count) for slot, count in plan if slot.answer is not None]
        picked = torch.tensor([answer.last for slot, answer, _ in busy if not slot.unread], dtype=torch.long)
        read = [
            answer.prompt.embeddings[len(slot.held) : len(slot.held) + count]
            for slot, answer, count in busy
            if slot.unread
        ]
        return torch.cat([self.model.embed(picked.to(self.model.device)), *read])

    def _write(self, slot: Slot, logits: Tensor, likeliest: int) -> None:
        answer = slot.answer
        assert answer is not None
        event = answer.write(logits, likeliest, self._ends)
        self.stats.written_tokens += 1
        if event.finish:
            slot.answer = None
        answer.deliver(event)

    def _count(self, answer: Answer) -> None:
        self.stats.answers += 1
        self.stats.prompt_tokens += len(answer.prompt.keys)
        self.stats.cached_tokens += answer.cached


def end_tokens(assistant: Assistant) -> frozenset[int]:
    """The tokens that end an answer, as `generate` takes them."""
    configured = assistant.model.generation_config.eos_token_id
    if configured is None:
        configured = assistant.processor.tokenizer.eos_token_id
    return frozenset(configured if isinstance(configured, list) else [configured])


def _check(slots: int, step_tokens: int, context: int, most: int) -> None:
    if slots < 1 or step_tokens <= slots:
        raise InputError(f"{step_tokens} tokens a step are too few for {slots} slots; give at least one more")
    if not 2 <= context <= most:
        raise InputError(f"a context of {context} tokens is not between 2 and the model's {most}")
