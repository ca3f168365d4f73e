"""Prometheus metrics, in a registry of the app's own.

Labels come from closed sets only: route templates, known methods, status codes, our classes, our reasons.
Whatever a client invents ends up as `other`, so the number of series does not depend on clients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
STAGES = ("body", "fetch", "queue", "decode", "infer", "explain")
REFUSALS = (
    "queue_full",
    "pushed_out",
    "no_model",
    "too_large",
    "too_slow",
    "memory",
    "media",
    "gone",
    "deadline",
    "key",
    "questions",
)

STALE_SECONDS = 0.1  # writing all series takes some milliseconds, which somebody who asks in a loop would make many

_SECONDS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SHARES = tuple(step / 20 for step in range(1, 20))
_PIXELS = (1e3, 1e4, 5e4, 1e5, 5e5, 1e6, 5e6, 1.2e7, 2.5e7, 5e7)
_BYTES = (1e3, 5e3, 1e4, 5e4, 1e5, 5e5, 1e6, 5e6, 1e7, 2e7)


disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series beside each counter, which nobody reads


class Metrics:
    """All series of one API process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        on = self.registry
        self.requests = Counter(
            "lawnwatch_http_requests", "Requests answered.", ["route", "method", "status"], registry=on
        )
        self.request_seconds = Histogram(
            "lawnwatch_http_request_seconds", "Time to answer.", ["route"], buckets=_SECONDS, registry=on
        )
        self.in_flight = Gauge("lawnwatch_http_requests_in_flight", "Requests under way.", registry=on)
        self.stage_seconds = Histogram(
            "lawnwatch_predict_stage_seconds", "Time in a stage.", ["stage"], buckets=_SECONDS, registry=on
        )
        self.refused = Counter(
            "lawnwatch_predict_refused", "Predictions and questions refused, by reason.", ["reason"], registry=on
        )
        self.failures = Counter("lawnwatch_predict_failures", "Pictures the model had no answer for.", registry=on)
        self.predictions = Counter(
            "lawnwatch_predictions", "Answers, by label and model version.", ["label", "version"], registry=on
        )
        self.confidence = Histogram(
            "lawnwatch_prediction_confidence_ratio", "Confidence.", buckets=_SHARES, registry=on
        )
        self.unknown_score = Histogram(
            "lawnwatch_prediction_unknown_score_ratio",
            "Unknown score over its threshold; 1 and more is unknown.",
            buckets=(0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0),
            registry=on,
        )
        self.brightness = Histogram(
            "lawnwatch_input_brightness_ratio", "Mean brightness of pictures.", buckets=_SHARES, registry=on
        )
        self.input_bytes = Histogram("lawnwatch_input_bytes", "Size of pictures.", buckets=_BYTES, registry=on)
        self.input_pixels = Histogram("lawnwatch_input_pixels", "Pixels of pictures.", buckets=_PIXELS, registry=on)
        self.batch_pictures = Histogram(
            "lawnwatch_predict_batch_pictures", "Pictures of a batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=on
        )
        self.stages = {stage: self.stage_seconds.labels(stage) for stage in STAGES}
        for reason in REFUSALS:
            self.refused.labels(reason)
        self._rendered, self._rendered_at = b"", float("-inf")

    def count_refusal(self, status: int) -> None:
        """Count what the server refused before it was a request of this API."""
        self.requests.labels("other", "other", str(status)).inc()

    def observe(self, families: Callable[[], Iterable[Metric]]) -> None:
        """Add series whose values are asked for at each scrape."""
        self.registry.register(_Asked(families))

    def render(self) -> bytes:
        """The text exposition format, at most STALE_SECONDS old."""
        now = time.monotonic()
        if now - self._rendered_at > STALE_SECONDS:
            self._rendered, self._rendered_at = generate_latest(self.registry), now
        return self._rendered


class _Asked(Collector):
    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families()

    def describe(self) -> Iterable[Metric]:
        return []


def gauge(name: str, text: str, value: float | None = None, labels: dict[str, str] | None = None) -> Metric:
    """A gauge with one value; without a value it has no sample."""
    family = GaugeMetricFamily(name, text, labels=list(labels or {}))
    if value is not None:
        family.add_metric(list((labels or {}).values()), value)
    return family


def counter(name: str, text: str, values: dict[str, float] | float, label: str = "") -> Metric:
    """A counter with one value, or one for each value of a label."""
    family = CounterMetricFamily(name, text, labels=[label] if label else [])
    for key, value in values.items() if isinstance(values, dict) else [("", values)]:
        family.add_metric([key] if label else [], value)
    return family
