"""Figures for Prometheus. No label holds a prompt's name: there may be thousands."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxprompt.serving.batcher import BatchFacts

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64)
TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Read(Collector):
    """Gauges of functions that give figures by name."""

    def __init__(self, figures: Sequence[Callable[[], Mapping[str, float]]]):
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        for read in self._figures:
            for name, value in read().items():
                yield GaugeMetricFamily(f"jaxprompt_{name}", name.replace("_", " "), value)

    def describe(self) -> list[Metric]:
        """Nothing: the figures are not there yet when the collector is registered."""
        return []


class Metrics:
    """The figures of one server, with a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.started = time.time()
        own = {"registry": self.registry, "namespace": "jaxprompt"}
        self.requests = Counter("requests", "Requests by route and status.",
                                ["route", "status"], **own)  # fmt: skip
        self.seconds = Histogram("request_seconds", "From the first byte in to the last out.",
                                 ["route"], buckets=_SECONDS, **own)  # fmt: skip
        self.queued = Histogram("queue_seconds", "The longest wait of a request's rows.",
                                buckets=_SECONDS, **own)  # fmt: skip
        self.device = Histogram("device_seconds", "The computation of a batch, or of a chunk.",
                                ["kind"], buckets=_SECONDS, **own)  # fmt: skip
        self.batch_rows = Histogram("batch_rows", "Rows of a batch.", ["kind"],
                                    buckets=_ROWS, **own)  # fmt: skip
        self.batch_prompts = Histogram("batch_distinct_prompts", "Different prompts of a batch.",
                                       buckets=_ROWS, **own)  # fmt: skip
        self.tokens = Counter("batch_tokens_real", "Tokens of rows, each padded alone.", **own)
        self.padded = Counter("batch_tokens_padded", "Tokens of batches, with all padding.", **own)
        self.rows = Counter("rows", "Rows that were answered.", ["route"], **own)
        self.rejected = Counter("rejected", "Requests that were not admitted.", ["reason"], **own)
        self.cancelled = Counter("cancelled_rows",
                                 "Rows that left the queue because their client had gone.",
                                 **own)  # fmt: skip
        self.routed = Counter("router_decisions", "Inputs without a prompt.", ["abstained"], **own)
        self.changes = Counter("prompt_changes", "Prompts put, removed and refused.",
                               ["what"], **own)  # fmt: skip
        start = Gauge("start_time_seconds", "When the server started.", **own)
        start.set(self.started)

    def note_batch(self, facts: BatchFacts) -> None:
        """Count a batch. Called by the compute thread."""
        self.device.labels(facts.kind).observe(facts.seconds)
        self.batch_rows.labels(facts.kind).observe(facts.rows)
        self.batch_prompts.observe(facts.versions)
        self.tokens.inc(facts.tokens)
        self.padded.inc(facts.padded)

    def watch(self, *figures: Callable[[], Mapping[str, float]]) -> None:
        """Add figures that are read when somebody asks for them."""
        self.registry.register(_Read(figures))

    def text(self) -> bytes:
        """All figures in Prometheus' format."""
        return generate_latest(self.registry)
