"""Samples keep the names of the /metrics page, and quantiles come from its histograms."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from pipeline.local.worker_metrics import buckets, parse_samples, quantile


def test_samples_have_the_names_and_values_of_the_page() -> None:
    registry = CollectorRegistry()
    labels = Counter("labels", "labels", ["label", "decision"], registry=registry)
    labels.labels(decision="review", label="fraud").inc(3)
    latency = Histogram("latency", "latency", buckets=(0.001, 0.002), registry=registry)
    for seconds in (0.0005, 0.0015, 0.0016, 9.0):
        latency.observe(seconds)
    page = generate_latest(registry).decode()

    samples = parse_samples(page)

    printed = [line.rpartition(" ") for line in page.splitlines() if not line.startswith("#")]
    assert samples == {name: float(value) for name, _, value in printed}
    assert 'labels_total{decision="review",label="fraud"}' in samples
    counts = buckets(samples, "latency")
    assert counts == {0.001: 1.0, 0.002: 3.0, float("inf"): 4.0}
    assert quantile(counts, 0.5) == pytest.approx(0.0015)
    assert quantile(counts, 1.0) == 0.002
    assert quantile({float("inf"): 0.0}, 0.5) is None
