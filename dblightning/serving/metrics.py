"""What a service counts, in Prometheus' text format."""

from __future__ import annotations

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server process, in a registry of their own; needs prometheus_client."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter("dblightning_requests", "Requests answered", ["status"], registry=self.registry)
        self._seconds = Histogram(
            "dblightning_request_seconds", "Seconds from request to answer", buckets=SECONDS, registry=self.registry
        )
        self._batches = Histogram(
            "dblightning_batch_images", "Images in the batch of each image", buckets=BATCHES, registry=self.registry
        )
        self._waiting = Gauge("dblightning_waiting_images", "Images waiting or in the works", registry=self.registry)

    def request(self, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def image(self, batch: int) -> None:
        """Count an image that was made in a batch of ``batch``."""
        self._batches.observe(batch)

    def text(self, waiting: int) -> bytes:
        """All of it, as Prometheus reads it."""
        from prometheus_client import generate_latest

        self._waiting.set(waiting)
        return generate_latest(self.registry)
