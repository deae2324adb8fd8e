"""The image queue: waiting images are encoded together, and cached images are not encoded again."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import picture

from convllava.inference import Assistant, EncodedImage
from convllava.inference.image_queue import FeatureCache, ImageEncoder, digest_of


class Paused:
    """An assistant with a tower that waits for the test. The test thus decides which images are encoded together."""

    def __init__(self, assistant):
        self.assistant, self.passes = assistant, []
        self.entered, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def encode_pixels(self, pixels):
        self.passes.append(len(pixels))
        self.entered.release()
        self.go.acquire(timeout=20)
        return self.assistant.encode_pixels(pixels)


@pytest.fixture
def assistant(parts):
    return Assistant(*parts)


@pytest.fixture
def paused(assistant):
    return Paused(assistant)


@pytest.fixture
def encoder(paused):
    encoder = ImageEncoder(paused.encode_pixels, batch_pixels=64 * 64 * 6)
    yield encoder
    paused.go.release(100)
    encoder.close()


def submit(encoder, assistant, number):
    image = picture(64, 64 * (1 + number % 3), number)
    return encoder.submit(str(number), assistant.processor.image_processor(image, return_tensors="pt"))


def test_batched_images_equal_single(encoder, paused, assistant):
    first = submit(encoder, assistant, 0)
    paused.entered.acquire(timeout=20)
    futures = [submit(encoder, assistant, number) for number in (1, 2, 3, 4)]
    paused.go.release(10)
    for number, future in enumerate([first, *futures]):
        expected = assistant.encode(picture(64, 64 * (1 + number % 3), number))
        torch.testing.assert_close(future.result(20).tokens, expected.tokens, rtol=1e-4, atol=1e-5)
    assert paused.passes == [1, 3, 1]  # 2 + 3 + 1 parts of 64 x 64 pixels, and no room for two more


def test_image_submitted_twice_is_encoded_once(encoder, paused, assistant):
    first = submit(encoder, assistant, 0)
    paused.entered.acquire(timeout=20)
    again, twice = submit(encoder, assistant, 0), [submit(encoder, assistant, 1) for _ in range(2)]
    paused.go.release(10)
    assert first.result(20) is again.result(20) is encoder.known("0")
    assert twice[0].result(20) is twice[1].result(20) is submit(encoder, assistant, 1).result(20)
    assert (encoder.stats.images, encoder.stats.passes, encoder.stats.hits) == (2, 2, 1)


def test_parallel_workers_equal_one_worker(paused, assistant):
    encoder = ImageEncoder(paused.encode_pixels, batch_pixels=1, workers=2)
    futures = [submit(encoder, assistant, number) for number in (0, 1, 2, 1)]
    assert all(paused.entered.acquire(timeout=20) for _ in range(2))
    assert paused.passes == [1, 1]
    paused.go.release(10)
    for number, future in zip((0, 1, 2, 1), futures, strict=True):
        expected = assistant.encode(picture(64, 64 * (1 + number % 3), number))
        torch.testing.assert_close(future.result(20).tokens, expected.tokens, rtol=1e-4, atol=1e-5)
    assert encoder.stats.images == 3
    encoder.close()


def test_image_with_cancelled_futures_is_skipped(encoder, paused, assistant):
    first = submit(encoder, assistant, 0)
    paused.entered.acquire(timeout=20)
    given_up, wanted = submit(encoder, assistant, 1), submit(encoder, assistant, 2)
    assert first.cancel()
    assert given_up.cancel()
    paused.go.release(10)
    wanted.result(20)
    assert encoder.known("1") is None


def test_encoding_error_affects_only_its_own_image(encoder, paused, assistant):
    bad = encoder.submit("bad", {"image_sizes": torch.tensor([[64, 64]])})
    paused.go.release(10)
    with pytest.raises(KeyError):
        bad.result(20)
    assert submit(encoder, assistant, 0).result(20).tokens.shape[1] == 32


def test_cache_drops_the_least_recently_used_images():
    cache = FeatureCache(max_bytes=3 * 40)
    images = {name: EncodedImage("", torch.zeros(10), (64, 64)) for name in "abcde"}
    for name in "abc":
        cache.put(name, images[name])
    cache.get("a")
    for name in "dd":
        cache.put(name, images[name])
    assert [cache.get(name) for name in "abcd"] == [images["a"], None, images["c"], images["d"]]
    cache.put("large", EncodedImage("", torch.zeros(100), (64, 64)))
    assert cache.bytes == 0


def test_digests_differ_between_files():
    assert digest_of(b"a") == digest_of(b"a") != digest_of(b"b")
