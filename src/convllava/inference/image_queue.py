"""A queue of images for the tower: waiting images are encoded together, and recent ones are not encoded again."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from hashlib import sha256

from transformers import BatchFeature

from convllava.errors import InputError
from convllava.inference.types import EncodedImage

ON_CPU = {"batch_pixels": 400_000, "workers": 2}
"""A larger image keeps a core busy alone. If several were encoded together, the first one would wait for the last
one."""


def digest_of(data: bytes) -> str:
    """Return the SHA-256 of an image file."""
    return sha256(data).hexdigest()


class FeatureCache:
    """The most recently used encoded images, up to a number of bytes. Several threads may use it."""

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
    """One image in the queue, and the futures of those who wait for it."""

    digest: str
    pixels: BatchFeature
    waiting: list[Future[EncodedImage]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return int(self.pixels["image_sizes"].prod())


@dataclass
class EncoderStats:
    """Counts since the encoder was made."""

    hits: int = 0
    images: int = 0
    passes: int = 0


class ImageEncoder:
    """Encodes images in its own threads, so that answers continue meanwhile.

    Args:
        encode: `Assistant.encode_pixels`.
        cache_bytes: Most bytes of encoded images in the cache.
        batch_pixels: Most pixels of images that are encoded together; a larger image is encoded alone.
        workers: Passes of the tower at the same time.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[BatchFeature]], list[EncodedImage]],
        cache_bytes: int = 256 * 2**20,
        batch_pixels: int = 4_000_000,
        workers: int = 1,
    ) -> None:
        self.cache, self.stats = FeatureCache(cache_bytes), EncoderStats()
        self._encode, self._batch_pixels = encode, batch_pixels
        self._jobs: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._threads = [threading.Thread(target=self._run, name="tower", daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def known(self, digest: str) -> EncodedImage | None:
        """Return an image from the cache, if it is there."""
        found = self.cache.get(digest)
        self.stats.hits += found is not None
        return found

    def submit(self, digest: str, pixels: BatchFeature) -> Future[EncodedImage]:
        """Encode an image. An image is skipped if all its futures are cancelled before its turn.

        Args:
            digest: Identifies the image (`digest_of`).
            pixels: The result of the image processor for this image alone.
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
        """Stop after the current passes; waiting images are cancelled."""
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
        while True:
            batch: list[_Job] = []
            with self._changed:
                while not batch:
                    self._changed.wait_for(lambda: self._jobs or self._is_closed)
                    if self._is_closed:
                        return
                    room = self._batch_pixels
                    while self._jobs and (not batch or self._jobs[0].size <= room):
                        job = self._jobs.popleft()
                        if not all(future.cancelled() for future in job.waiting):
                            batch.append(job)
                            room -= job.size
                self._running += batch
                self.stats.passes += 1
                self.stats.images += len(batch)
            found: Sequence[EncodedImage | Exception]
            try:
                found = self._encode([job.pixels for job in batch])
                for job, image in zip(batch, found, strict=True):
                    self.cache.put(job.digest, image)
            except Exception as error:  # any error must reach those who wait
                found = [error] * len(batch)
            with self._changed:
                for job, result in zip(batch, found, strict=True):
                    self._running.remove(job)
                    for future in job.waiting:
                        if future.set_running_or_notify_cancel():
                            if isinstance(result, Exception):
                                future.set_exception(result)
                            else:
                                future.set_result(result)
