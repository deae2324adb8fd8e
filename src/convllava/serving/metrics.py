"""Counts and times in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from convllava.inference.engine import Engine
from convllava.inference.image_queue import ImageEncoder
from convllava.serving.gate import Gate
from convllava.serving.refusal import RefusalError

_SECONDS = (0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics:
    """What happened to requests, and what engine and tower count themselves."""

    def __init__(self, engine: Engine, encoder: ImageEncoder, gate: Gate) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "convllava_requests", "Chat completions by their status.", ["status"], registry=self._registry
        )
        self.refusals = Counter("convllava_refusals", "Refused requests by reason.", ["code"], registry=self._registry)
        self.first_token = Histogram(
            "convllava_time_to_first_token_seconds",
            "From a request's arrival to the first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.duration = Histogram(
            "convllava_request_seconds",
            "From a request's arrival to the end of its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_Inside(engine, encoder, gate))

    def refused(self, refusal: RefusalError) -> None:
        """Count a request that is not served."""
        self.requests.labels(refusal.status).inc()
        self.refusals.labels(refusal.code).inc()

    def broke_off(self, refusal: RefusalError) -> None:
        """Count why an answer that had begun, and was counted as served, did not come to its end."""
        self.refusals.labels(refusal.code).inc()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count a request that is refused or fails in the block."""
        try:
            yield
        except RefusalError as refusal:
            self.refused(refusal)
            raise
        except Exception:
            self.requests.labels(500).inc()
            raise

    def text(self) -> bytes:
        """All of them as `/metrics` shows them."""
        return generate_latest(self._registry)


class _Inside(Collector):
    """Read when they are asked for, so that a step does not wait for a counter."""

    def __init__(self, engine: Engine, encoder: ImageEncoder, gate: Gate) -> None:
        self._engine, self._encoder, self._gate = engine, encoder, gate

    def collect(self) -> Iterator[Metric]:
        scheduler, stats, images = self._engine.scheduler, self._engine.stats, self._encoder.stats
        gauges = {
            "requests_inside": (self._gate.inside, "Requests from their arrival to the end of their answers."),
            "queue_length": (scheduler.waiting, "Answers that wait for a slot."),
            "batch_size": (scheduler.running, "Answers that are being read or written."),
            "image_cache_bytes": (self._encoder.cache.bytes, "Of images that are remembered."),
        }
        counters = {
            "engine_steps": (stats.steps, "Passes of the language model; written tokens a step are the mean batch."),
            "answers": (stats.answers, "Answers begun."),
            "prompt_tokens": (stats.prompt_tokens, "Of prompts, images included."),
            "cached_prompt_tokens": (stats.cached_tokens, "Of those, not read again."),
            "written_tokens": (stats.written_tokens, "Of answers; their rate is the tokens per second."),
            "tower_passes": (images.passes, "Passes of the vision tower."),
            "images": (images.images, "Images that went through the tower."),
            "image_cache_hits": (images.hits, "Images that did not have to."),
        }
        for name, (value, meaning) in gauges.items():
            yield GaugeMetricFamily(f"convllava_{name}", meaning, value)
        for name, (value, meaning) in counters.items():
            yield CounterMetricFamily(f"convllava_{name}", meaning, value)
