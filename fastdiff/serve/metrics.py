"""The metrics that Prometheus reads."""

from collections.abc import Callable
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """The counts of one server, in a separate registry."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        shared: Any = {"registry": self._registry, "namespace": "fastdiff"}
        self.requests = Counter(
            "requests",
            "Answered requests; 499: the client had gone",
            ["route", "status"],
            **shared,
        )
        self.seconds = Histogram(
            "request_seconds",
            "From a drawing request's arrival to its last byte, of those that were answered by 200",
            buckets=SECONDS,
            **shared,
        )
        self.pictures = Counter("pictures", "Pictures drawn", **shared)
        self.steps = Counter("steps", "Steps drawn, of all pictures", **shared)
        ProcessCollector(registry=self._registry)

    def watch(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """A gauge whose value is computed when it is read."""
        gauge = Gauge(name, meaning, registry=self._registry, namespace="fastdiff")
        gauge.set_function(value)

    def text(self) -> bytes:
        """The metrics in Prometheus's text format 0.0.4."""
        return generate_latest(self._registry)
