"""Counters and times of the server in the text format of Prometheus."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from convllava.inference.engine import Engine
from convllava.inference.image_queue import ImageEncoder
from convllava.serving.api_error import ApiError
from convllava.serving.limits import Admission

_SECONDS = (0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics(Collector):
    """Counts of requests and errors, times of requests, and the counts of engine and image encoder."""

    def __init__(self, engine: Engine, encoder: ImageEncoder, admission: Admission) -> None:
        self._engine, self._encoder, self._admission = engine, encoder, admission
        self._registry = CollectorRegistry()
        count = partial(Counter, registry=self._registry)
        times = partial(Histogram, buckets=_SECONDS, registry=self._registry)
        self.requests = count("convllava_requests", "Chat completions by their status.", ["status"])
        self.errors = count("convllava_errors", "Errors by code.", ["code"])
        self.first_token = times(
            "convllava_time_to_first_token_seconds", "Seconds from the arrival of a request to its first token."
        )
        self.duration = times(
            "convllava_request_seconds", "Seconds from the arrival of a request to the end of its answer."
        )
        self._registry.register(self)

    @contextmanager
    def count_errors(self) -> Iterator[None]:
        """Count a request that ends in an error inside the block."""
        try:
            yield
        except ApiError as error:
            self.requests.labels(error.status).inc()
            self.errors.labels(error.code).inc()
            raise
        except Exception:
            self.requests.labels(500).inc()
            raise

    def text(self) -> bytes:
        """Return all metrics as `/metrics` shows them."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the state of engine and encoder when `/metrics` is called, so that no step updates a metric."""
        stats, images = self._engine.stats, self._encoder.stats
        gauges = {
            "requests_active": (self._admission.active, "Requests between their arrival and the end of their answer."),
            "queue_length": (self._engine.waiting, "Answers that wait for a slot."),
            "batch_size": (self._engine.running, "Answers whose prompt is being read or that are being written."),
            "image_cache_bytes": (self._encoder.cache.bytes, "Bytes of cached image features."),
        }
        counters = {
            "engine_steps": (stats.steps, "Passes of the language model; written tokens per step are the mean batch."),
            "answers": (stats.answers, "Answers that got a slot."),
            "prompt_tokens": (stats.prompt_tokens, "Tokens of prompts, visual tokens included."),
            "cached_prompt_tokens": (stats.cached_tokens, "Tokens of prompts that were reused from a slot."),
            "written_tokens": (stats.written_tokens, "Tokens of answers; their rate is the throughput."),
            "tower_passes": (images.passes, "Passes of the vision tower."),
            "images": (images.images, "Images that the vision tower encoded."),
            "image_cache_hits": (images.hits, "Images that were found in the cache."),
        }
        for name, (value, meaning) in gauges.items():
            yield GaugeMetricFamily(f"convllava_{name}", meaning, value)
        for name, (value, meaning) in counters.items():
            yield CounterMetricFamily(f"convllava_{name}", meaning, value)
