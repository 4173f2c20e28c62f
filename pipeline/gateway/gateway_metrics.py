"""Metrics of a gateway. No label holds an account, a transaction or a key."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
)

LATENCY_BUCKETS_SECONDS = (
    0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2,
    0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
)  # fmt: skip


class GatewayMetrics:
    """All metrics of a gateway over one registry."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Histogram(
            "recur_gateway_request_seconds",
            "time of a request from its head to the end of its answer",
            ["route", "status"],
            buckets=LATENCY_BUCKETS_SECONDS,
            registry=registry,
        )
        self.outcomes = Counter(
            "recur_gateway_transactions_total",
            "transactions of score requests by outcome",
            ["outcome"],
            registry=registry,
        )
        self.problems = Counter(
            "recur_gateway_problems_total",
            "requests that ended with a problem, by its type; refused ones have no route",
            ["problem"],
            registry=registry,
        )
        self.variants = Counter(
            "recur_gateway_what_if_variants_total", "scored what-if variants", registry=registry
        )
        self.labels = Counter(
            "recur_gateway_labels_total", "labels that were produced", registry=registry
        )
        self.replies = Counter(
            "recur_gateway_replies_total", "answers of workers to this gateway", registry=registry
        )
        self.unread_keys = Counter(
            "recur_gateway_unread_keys_total",
            "looks at answer keys that Redis did not answer",
            registry=registry,
        )
        self.claims_left = Counter(
            "recur_gateway_claims_left_total",
            "claims that could not be deleted after a failure; they are taken over later",
            registry=registry,
        )
        self.claims_taken_over = Counter(
            "recur_gateway_claims_taken_over_total",
            "claims of gateways that had not produced their record",
            registry=registry,
        )
        self.waiting = Gauge(
            "recur_gateway_transactions_waiting", "transactions that wait now", registry=registry
        )
        self.ready = Gauge(
            "recur_gateway_ready", "1 if an answer can come, else 0", registry=registry
        )
