"""Slots, the queue in front of them, and the tokens that each slot adds in the next step."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from convllava.inference.prompts import Key
from convllava.inference.sampling import Answer


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

    def advance(self, count: int, step: int) -> None:
        """Note that the cache holds `count` more tokens: of the prompt, or the token that was picked last."""
        assert self.answer is not None
        held = len(self.held)
        self.held += self.answer.prompt.keys[held : held + count] if self.unread else (self.answer.last,)
        self.used = step


class Scheduler:
    """Assigns answers to slots and tokens to steps.

    `submit` may be called from any thread, everything else only from the thread that runs the steps.

    Args:
        slots: Number of answers that are written at the same time.
        step_tokens: Most tokens of a step; more than `slots`.
        copy: Copies the first tokens of one slot to another; called with source, target and count.
    """

    def __init__(self, slots: int, step_tokens: int, copy: Callable[[int, int, int], None]) -> None:
        self.slots = [Slot(index) for index in range(slots)]
        self._step_tokens, self._copy = step_tokens, copy
        self._waiting: deque[Answer] = deque()
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Number of answers without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of answers with a slot."""
        return sum(slot.answer is not None for slot in self.slots)

    def submit(self, answer: Answer) -> None:
        with self._lock:
            self._waiting.append(answer)

    def release_cancelled(self) -> None:
        for slot in self.slots:
            if slot.answer is not None and slot.answer.is_cancelled:
                slot.answer = None
        with self._lock:
            self._waiting = deque(answer for answer in self._waiting if not answer.is_cancelled)

    def forget(self) -> None:
        """Empty the slots that no answer uses."""
        self.slots = [slot if slot.answer is not None else Slot(slot.index) for slot in self.slots]

    def clear(self) -> list[Answer]:
        """Empty the queue and all slots, and return the answers that were not finished."""
        with self._lock:
            answers = [*self._waiting, *(slot.answer for slot in self.slots if slot.answer)]
            self._waiting.clear()
        self.slots = [Slot(slot.index) for slot in self.slots]
        return answers

    def admit(self) -> list[Answer]:
        """Give slots to waiting answers, in order. An answer waits while a slot still reads the same prompt."""
        admitted: list[Answer] = []
        with self._lock:
            for answer in list(self._waiting):
                free = [slot for slot in self.slots if slot.answer is None]
                if not free:
                    break
                reading = [slot.answer.prompt.keys for slot in self.slots if slot.answer is not None and slot.unread]
                if answer.prompt.keys not in reading:
                    self._waiting.remove(answer)
                    self._assign(answer, free)
                    admitted.append(answer)
        return admitted

    def _assign(self, answer: Answer, free: Sequence[Slot]) -> None:
        """Choose a slot and reuse the longest prefix of the prompt that any slot holds."""
        keys = answer.prompt.keys
        shared = [_common_prefix(slot.held, keys) for slot in self.slots]
        donor = max(self.slots, key=lambda slot: shared[slot.index])
        count = min(shared[donor.index], len(keys) - 1)  # the last token is read again, to predict the first new one
        # A slot that would lose most of its tokens keeps them: its own conversation may continue.
        continues = donor.answer is None and 2 * count >= len(donor.held)
        target = donor if continues else min(free, key=lambda slot: slot.used)
        if count and target is not donor:
            self._copy(donor.index, target.index, count)
        target.held, target.answer, answer.cached = list(keys[:count]), answer, count

    def plan(self) -> list[tuple[Slot, int]]:
        """Return the slots of the next step with their numbers of tokens: first one token for each answer that is being
        written; then unread prompts share the remaining tokens equally."""
        busy = [slot for slot in self.slots if slot.answer is not None]
        plan = [(slot, 1) for slot in busy if not slot.unread]
        reading = sorted((slot for slot in busy if slot.unread), key=lambda slot: slot.unread)
        room = self._step_tokens - len(plan)
        for place, slot in enumerate(reading):
            count = min(slot.unread, room // (len(reading) - place))
            plan.append((slot, count))
            room -= count
        return plan


def _common_prefix(held: Sequence[Key], keys: Sequence[Key]) -> int:
    """Return the number of equal tokens at the beginning of both sequences."""
    limit = min(len(held), len(keys))
    return next((place for place in range(limit) if held[place] != keys[place]), limit)
