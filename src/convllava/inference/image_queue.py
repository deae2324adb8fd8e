"""Images on their way to tokens: encoded together where they wait together, and not again where they are known."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256

from transformers import BatchFeature

from convllava.errors import InputError
from convllava.inference.assistant import Assistant, EncodedImage


def digest_of(data: bytes) -> str:
    """What tells one image file from another."""
    return sha256(data).hexdigest()


class FeatureCache:
    """The most recently used encoded images, at most so many bytes of them."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._images: OrderedDict[str, EncodedImage] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: str) -> EncodedImage | None:
        with self._lock:
            if digest in self._images:
                self._images.move_to_end(digest)
            return self._images.get(digest)

    def put(self, digest: str, image: EncodedImage) -> None:
        with self._lock:
            if digest in self._images:
                return
            self._images[digest] = image
            self.bytes += image.tokens.nbytes
            while self.bytes > self.max_bytes:
                _, oldest = self._images.popitem(last=False)
                self.bytes -= oldest.tokens.nbytes


@dataclass(eq=False)
class _Job:
    """One image that waits, and who waits for it."""

    digest: str
    pixels: BatchFeature
    waiting: list[Future[EncodedImage]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return int(self.pixels["image_sizes"].prod())

    def is_given_up(self) -> bool:
        return all(future.cancelled() for future in self.waiting)

    def settle(self, settle: Callable[[Future[EncodedImage]], None]) -> None:
        for future in self.waiting:
            if future.set_running_or_notify_cancel():
                settle(future)


@dataclass
class EncoderStats:
    """Counts since the start."""

    hits: int = 0
    images: int = 0
    passes: int = 0


ON_CPU = {"batch_pixels": 400_000, "workers": 2}
"""Larger images fill a core one by one; together, the first would wait for the last, and the engine for them all."""


class ImageEncoder:
    """Runs tower and projector in threads of its own, so that answers which are being written go on meanwhile.

    Args:
        assistant: Whose tower.
        cache_bytes: Of encoded images that are kept.
        batch_pixels: Images that wait are encoded together up to so many pixels.
        workers: Passes at a time.
    """

    def __init__(
        self, assistant: Assistant, cache_bytes: int = 256 * 2**20, batch_pixels: int = 4_000_000, workers: int = 1
    ) -> None:
        self.cache, self.stats = FeatureCache(cache_bytes), EncoderStats()
        self._assistant, self._batch_pixels = assistant, batch_pixels
        self._jobs: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._threads = [threading.Thread(target=self._run, name="tower", daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def known(self, digest: str) -> EncodedImage | None:
        """An image that needs no encoding."""
        found = self.cache.get(digest)
        self.stats.hits += found is not None
        return found

    def submit(self, digest: str, pixels: BatchFeature) -> Future[EncodedImage]:
        """Encode an image; an image whose futures are all cancelled before its turn is left out.

        Args:
            digest: What tells it from others (`digest_of`).
            pixels: What the image processor made of it alone.
        """
        future: Future[EncodedImage] = Future()
        with self._changed:
            if self._is_closed:
                raise InputError("the encoder is closed")
            if found := self.cache.get(digest):
                future.set_result(found)
                return future
            job = next((job for job in [*self._running, *self._jobs] if job.digest == digest), None)
            if job is None:
                job = _Job(digest, pixels)
                self._jobs.append(job)
                self._changed.notify()
            job.waiting.append(future)
        return future

    def close(self) -> None:
        """Stop after the passes that run; what waits is cancelled."""
        with self._changed:
            self._is_closed = True
            for job in self._jobs:
                for future in job.waiting:
                    future.cancel()
            self._jobs.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while batch := self._take_batch():
            try:
                images = self._assistant.encode_pixels([job.pixels for job in batch])
            except Exception as error:  # whatever it is, those who wait must hear of it
                self._end_batch(batch, [partial(_fail, error=error)] * len(batch))
            else:
                for job, image in zip(batch, images, strict=True):
                    self.cache.put(job.digest, image)
                self._end_batch(batch, [partial(_give, image=image) for image in images])

    def _end_batch(self, batch: list[_Job], settlements: list[Callable[[Future[EncodedImage]], None]]) -> None:
        with self._changed:
            for job, settle in zip(batch, settlements, strict=True):
                job.settle(settle)
                self._running.remove(job)

    def _take_batch(self) -> list[_Job]:
        """Wait for images and take those of the next pass; none is the end."""
        batch: list[_Job] = []
        with self._changed:
            while not batch and not self._is_closed:
                self._changed.wait_for(lambda: self._jobs or self._is_closed)
                room = self._batch_pixels
                while self._jobs and (not batch or self._jobs[0].size <= room):
                    job = self._jobs.popleft()
                    if not job.is_given_up():
                        batch.append(job)
                        room -= job.size
            self._running += batch
            self.stats.passes += bool(batch)
            self.stats.images += len(batch)
        return batch


def _give(future: Future[EncodedImage], image: EncodedImage) -> None:
    future.set_result(image)


def _fail(future: Future[EncodedImage], error: Exception) -> None:
    future.set_exception(error)
