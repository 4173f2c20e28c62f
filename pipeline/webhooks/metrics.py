"""Metrics of `recur webhooks`, by the endpoints' configured names."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from pipeline.webhooks.sender import RESULTS

DELIVERY_BUCKETS_SECONDS = (
    0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 15.0, 30.0,
)  # fmt: skip

STATES = ("active", "paused", "gone", "disabled")
"""States of an endpoint: it delivers; `pause`; it answered 410; the file disables it."""

_ENDPOINT = ("endpoint",)


class WebhookMetrics:
    """All metrics of a process.

    Args:
        registry: where they are registered.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        if registry is None:
            ProcessCollector(registry=self.registry)

        def counter(name: str, text: str, labels: Iterable[str] = _ENDPOINT) -> Counter:
            return Counter(f"recur_webhooks_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, labels: Iterable[str] = _ENDPOINT) -> Gauge:
            return Gauge(f"recur_webhooks_{name}", text, labels, registry=self.registry)

        self.ready = Gauge(
            "recur_webhooks_ready", "whether the process delivers", registry=self.registry
        )
        self.attempts = counter(
            "attempts", "attempts to deliver an alert, by result", ("endpoint", "result")
        )
        self.delivered = counter("delivered", "alerts that the endpoint took")
        self.retried = counter("retried", "alerts that got another attempt after a failure")
        self.dead = counter("dead", "alerts that became dead letters after the last attempt")
        self.filtered = counter("filtered", "alerts that the endpoint's filters left out")
        self.invalid = counter("invalid", "records of the alerts topic that are no alerts")
        self.waiting = gauge("waiting", "alerts that wait for a retry, in this process")
        self.lag_records = gauge("lag_records", "records past the endpoint's position")
        self.lag_seconds = gauge(
            "lag_seconds", "age of the oldest record without a first attempt, seconds"
        )
        self.state = gauge("state", "1 for the endpoint's state", ("endpoint", "state"))
        self.file_valid = gauge("file_valid", "whether the file of endpoints is valid", ())
        self.delivery_seconds = Histogram(
            "recur_webhooks_delivery_seconds",
            "duration of an attempt, seconds",
            _ENDPOINT,
            buckets=DELIVERY_BUCKETS_SECONDS,
            registry=self.registry,
        )

    def begin(self, endpoint: str) -> None:
        """Show an endpoint's metrics from the start, at zero."""
        for result in RESULTS:
            self.attempts.labels(endpoint, result)
        for metric in self._of_endpoint():
            metric.labels(endpoint)

    def set_state(self, endpoint: str, state: str) -> None:
        """Show an endpoint's state: one of :data:`STATES`."""
        for each in STATES:
            self.state.labels(endpoint, each).set(each == state)

    def end(self, endpoint: str) -> None:
        """Remove the metrics of an endpoint that the file no longer has."""
        for result in RESULTS:
            self.attempts.remove(endpoint, result)
        for state in STATES:
            self.state.labels(endpoint, state)
            self.state.remove(endpoint, state)
        for metric in self._of_endpoint():
            metric.remove(endpoint)

    def _of_endpoint(self) -> tuple[Counter | Gauge | Histogram, ...]:
        return (
            self.delivered, self.retried, self.dead, self.filtered, self.invalid, self.waiting,
            self.lag_records, self.lag_seconds, self.delivery_seconds,
        )  # fmt: skip
