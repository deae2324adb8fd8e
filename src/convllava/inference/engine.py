"""Continuous batching: answers join and leave a running batch between any two tokens.

    engine = Engine(model, processor)
    engine.start()
    engine.submit(build_prompt(...), Sampling(), print)

A step is one pass of the language model. It processes one token of each answer that is being written, and a limited
number of prompt tokens. So the long prompt of one user delays the others by at most one step.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch

from convllava.errors import ConfigError, InputError
from convllava.inference.prompts import Key, Prompt, check_context
from convllava.inference.ragged_attention import Span
from convllava.inference.ragged_model import RaggedModel, store_by_columns
from convllava.inference.sampling import Answer, Event, Sampling
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


@dataclass
class Slot:
    """One row of the cache: the tokens that it holds, and the answer that uses it.

    Attributes:
        held: Tokens whose keys and values are in the cache. They stay when the answer is finished.
        used: Number of the step that used it last.
    """

    index: int
    held: list[Key] = field(default_factory=list)
    answer: Answer | None = None
    used: int = 0

    @property
    def unread(self) -> int:
        """Tokens of the prompt that the cache does not hold yet."""
        return 0 if self.answer is None else max(0, len(self.answer.prompt.keys) - len(self.held))


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
        self.slots = [Slot(index) for index in range(slots)]
        self.stats = EngineStats()
        self._step_tokens = step_tokens
        self._waiting: deque[Answer] = deque()
        self._tokenizer, self._ends = processor.tokenizer, end_tokens(model, processor)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def waiting(self) -> int:
        """Number of answers without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of answers with a slot."""
        return sum(slot.answer is not None for slot in self.slots)

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
            self._waiting.append(answer)
            self._changed.notify()
        return answer

    def cancel(self, answer: Answer) -> None:
        """Cancel an answer: the next step frees its slot, and there are no events after the current step."""
        with self._changed:
            answer.is_cancelled = True
            self._changed.notify()

    def forget(self) -> None:
        """Drop the keys and values of finished answers, and free their memory if no answer is being written."""
        self._release_cancelled()
        self.slots = [slot if slot.answer is not None else Slot(slot.index) for slot in self.slots]
        if not self.running:
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
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self.waiting or self.running)
            if self._is_closed:
                return
            try:
                self.step()
            except Exception:
                _log.exception("a step failed, and all unfinished answers with it; new answers start normally")
                self._fail_all()

    def _fail_all(self) -> None:
        with self._changed:
            answers = [*self._waiting, *(slot.answer for slot in self.slots if slot.answer)]
            self._waiting.clear()
        self.slots = [Slot(slot.index) for slot in self.slots]
        for answer in answers:
            answer.finish = "error"
            answer.deliver(Event("", finish="error"))

    def _release_cancelled(self) -> None:
        for slot in self.slots:
            if slot.answer is not None and slot.answer.is_cancelled:
                slot.answer = None
        with self._changed:
            self._waiting = deque(answer for answer in self._waiting if not answer.is_cancelled)

    def _admit(self) -> None:
        """Give slots to waiting answers, in order, and reuse the longest prefix of each prompt that any slot holds.

        An answer waits while a slot still reads the same prompt.
        """
        with self._changed:
            waiting = list(self._waiting)
        for answer in waiting:
            free = [slot for slot in self.slots if slot.answer is None]
            if not free:
                return
            keys = answer.prompt.keys
            if any(slot.answer.prompt.keys == keys for slot in self.slots if slot.answer and slot.unread):
                continue
            with self._changed:
                self._waiting.remove(answer)
            pairs = (zip(slot.held, keys, strict=False) for slot in self.slots)
            shared = [sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both)) for both in pairs]
            donor = max(self.slots, key=lambda slot: shared[slot.index])
            count = min(shared[donor.index], len(keys) - 1)  # the last token is read again, to predict the next one
            # A slot that would lose most of its tokens keeps them: its own conversation may continue.
            continues = donor.answer is None and 2 * count >= len(donor.held)
            target = donor if continues else min(free, key=lambda slot: slot.used)
            if count and target is not donor:
                self.model.cache.copy(donor.index, target.index, count)
            target.held, target.answer, answer.cached = list(keys[:count]), answer, count
            self.stats.answers += 1
            self.stats.prompt_tokens += len(keys)
            self.stats.cached_tokens += count

    @torch.inference_mode()
    def step(self) -> bool:
        """Run one pass: admit waiting answers, read prompts, and write one token of each answer with a read prompt.

        Returns:
            False if there was nothing to do.
        """
        self._release_cancelled()
        self._admit()
        busy = [(slot, slot.answer) for slot in self.slots if slot.answer is not None]
        if not busy:
            return False
        # First one token for each answer that is being written: the one that was picked last. Then unread prompts share
        # the remaining tokens equally.
        plan = [(slot, answer, 1) for slot, answer in busy if not slot.unread]
        picked = torch.tensor([answer.last for _, answer, _ in plan], dtype=torch.long)
        inputs = [self.model.embed(picked.to(self.model.device))]
        reading = sorted((pair for pair in busy if pair[0].unread), key=lambda pair: pair[0].unread)
        room = self._step_tokens - len(plan)
        for place, (slot, answer) in enumerate(reading):
            count = min(slot.unread, room // (len(reading) - place))
            room -= count
            plan.append((slot, answer, count))
            inputs.append(answer.prompt.embeddings[len(slot.held) : len(slot.held) + count])
        spans = [Span(slot.index, len(slot.held), count) for slot, _, count in plan]
        logits = self.model.forward(spans, torch.cat(inputs))
        self.stats.steps += 1
        for (slot, answer, count), row, likeliest in zip(plan, logits, logits.argmax(-1).tolist(), strict=True):
            held = len(slot.held)
            slot.held += answer.prompt.keys[held : held + count] if slot.unread else (answer.last,)
            slot.used = self.stats.steps
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
