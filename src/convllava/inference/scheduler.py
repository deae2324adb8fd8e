"""Who is written next: slots, the queue before them, and how the tokens of a step are shared out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from convllava.inference.answer import Answer
from convllava.inference.prompts import Key

Copy = Callable[[int, int, int], None]


@dataclass
class Slot:
    """A row of the cache: the tokens it holds, and who uses it.

    Attributes:
        held: Tokens whose keys and values it holds; they stay when its answer is finished.
        used: The step in which it was used last.
    """

    index: int
    held: list[Key] = field(default_factory=list)
    answer: Answer | None = None
    used: int = 0

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are not held yet."""
        return 0 if self.answer is None else max(0, len(self.answer.prompt.keys) - len(self.held))

    def is_reading(self, keys: Sequence[Key]) -> bool:
        return self.answer is not None and self.unread > 0 and self.answer.prompt.keys == keys

    def advance(self, count: int, step: int) -> None:
        """Hold so many tokens more: of the prompt, or the one that was picked last."""
        assert self.answer is not None
        held = len(self.held)
        self.held += self.answer.prompt.keys[held : held + count] if self.unread else (self.answer.last,)
        self.used = step


class Scheduler:
    """Slots and their queue. `submit` and `cancel` may come from any thread, all else from the one that runs steps.

    Args:
        slots: How many answers are written at once.
        step_tokens: Most tokens of a step, more than there are slots.
        copy: Gives one slot (by its number) the first tokens of another: called with source, target and count.
    """

    def __init__(self, slots: int, step_tokens: int, copy: Copy) -> None:
        self.slots = [Slot(index) for index in range(slots)]
        self._step_tokens, self._copy = step_tokens, copy
        self._waiting: deque[Answer] = deque()
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Answers that have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that have one."""
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

    def clear(self) -> list[Answer]:
        """Forget everything and return the answers that were not finished."""
        with self._lock:
            answers = [*self._waiting, *(slot.answer for slot in self.slots if slot.answer)]
            self._waiting.clear()
        self.slots = [Slot(slot.index) for slot in self.slots]
        return answers

    def admit(self) -> list[Answer]:
        """Give slots to those who wait, in their order; the same prompt twice waits until it has been read once."""
        admitted: list[Answer] = []
        with self._lock:
            for answer in list(self._waiting):
                free = [slot for slot in self.slots if slot.answer is None]
                if not free:
                    break
                if not any(slot.is_reading(answer.prompt.keys) for slot in self.slots):
                    self._waiting.remove(answer)
                    self._seat(answer, free)
                    admitted.append(answer)
        return admitted

    def _seat(self, answer: Answer, free: Sequence[Slot]) -> None:
        """Choose a slot and reuse the longest beginning of the prompt that any slot holds."""
        keys = answer.prompt.keys
        shared = [_common(slot.held, keys) for slot in self.slots]
        donor = max(self.slots, key=lambda slot: shared[slot.index])
        count = min(shared[donor.index], len(keys) - 1)  # the last token is read again, to predict what follows
        # A slot that would lose most of what it holds keeps it, for its own conversation may go on.
        goes_on = donor.answer is None and 2 * count >= len(donor.held)
        target = donor if goes_on else min(free, key=lambda slot: slot.used)
        if count and target is not donor:
            self._copy(donor.index, target.index, count)
        target.held, target.answer, answer.cached = list(keys[:count]), answer, count

    def plan(self) -> list[tuple[Slot, int]]:
        """Slots and how many tokens each adds: one of each answer, then equal shares of the rest for each prompt."""
        busy = [slot for slot in self.slots if slot.answer is not None]
        plan = [(slot, 1) for slot in busy if not slot.unread]
        reading = sorted((slot for slot in busy if slot.unread), key=lambda slot: slot.unread)
        room = self._step_tokens - len(plan)
        for place, slot in enumerate(reading):
            count = min(slot.unread, room // (len(reading) - place))
            plan.append((slot, count))
            room -= count
        return plan


def _common(held: Sequence[Key], keys: Sequence[Key]) -> int:
    """How many tokens two sequences have in common from the beginning."""
    limit = min(len(held), len(keys))
    return next((place for place in range(limit) if held[place] != keys[place]), limit)
