"""How many requests are inside, and whether any more may come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from convllava.serving.refusal import RefusalError


class Gate:
    """Counts requests in and out, in the event loop's thread.

    Args:
        capacity: Most requests at a time.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.inside, self.is_draining = capacity, 0, False

    def drain(self) -> None:
        """Let nobody in from now on."""
        self.is_draining = True

    @contextmanager
    def entered(self) -> Iterator[None]:
        """For as long as a request lasts.

        Raises:
            RefusalError: the server is going down (503) or full (429).
        """
        if self.is_draining:
            raise RefusalError(503, "the server is going down; ask another or try again later", "draining")
        if self.inside >= self.capacity:
            raise RefusalError(429, f"{self.inside} requests are being served; try again later", "queue_full")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
