"""Metrics: the batch histogram counts as the ordinary one does, and labels are bounded."""

from __future__ import annotations

import re
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.messages.decoding import REASONS
from pipeline.scoring.metrics import (
    BATCH_BUCKETS,
    DELAY_BUCKETS_SECONDS,
    LATENCY_BUCKETS_SECONDS,
    PENDING_MAX,
    SCORE_BUCKETS,
    SKEWS,
    STAGE_BUCKETS_SECONDS,
    STAGES,
    STATE_RESULTS,
    BatchHistogram,
    Metrics,
)

ALL_BUCKETS = [
    BATCH_BUCKETS,
    DELAY_BUCKETS_SECONDS,
    LATENCY_BUCKETS_SECONDS,
    SCORE_BUCKETS,
    STAGE_BUCKETS_SECONDS,
]


def samples(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return every sample of a scrape, by name and labels."""
    text = generate_latest(registry).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@given(
    st.sampled_from(ALL_BUCKETS),
    st.lists(st.lists(st.floats(-1, 1e7, width=32), max_size=20), max_size=5),
    st.data(),
)
def test_the_batch_histogram_counts_as_prometheus_own_histogram(
    buckets: tuple[float, ...], batches: list[list[float]], data: st.DataObject
) -> None:
    edges = data.draw(st.lists(st.sampled_from(buckets), max_size=5))
    quick_registry, own_registry = CollectorRegistry(), CollectorRegistry()
    quick = BatchHistogram("name", "Text.", buckets, quick_registry)
    own = Histogram("name", "Text.", buckets=buckets, registry=own_registry)

    for batch in [*batches, edges]:
        quick.observe(np.array(batch))
        for value in batch:
            own.observe(value)

    expected, found = samples(own_registry), samples(quick_registry)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name


def test_an_infinite_value_is_counted_in_the_last_bucket() -> None:
    registry = CollectorRegistry()
    BatchHistogram("name", "Text.", [1.0, 2.0], registry).observe([1.0, float("inf")])

    assert samples(registry)["name_bucket", (("le", "2.0"),)] == 1
    assert samples(registry)["name_bucket", (("le", "+Inf"),)] == 2


def test_a_scrape_while_values_are_counted_sees_whole_counts() -> None:
    registry = CollectorRegistry()
    histogram = BatchHistogram("name", "Text.", [1.0, 2.0], registry)
    done = threading.Event()

    def count() -> None:
        for _ in range(2000):
            histogram.observe([0.5, 1.5, 2.5])
        done.set()

    thread = threading.Thread(target=count)
    thread.start()
    while not done.is_set():
        found = samples(registry)
        total = found["name_count", ()]
        assert total == found["name_bucket", (("le", "+Inf"),)]
        assert total % 3 == 0
    thread.join()
    assert samples(registry)["name_count", ()] == 6000


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def families(metrics: Metrics) -> list[Any]:
    return list(text_string_to_metric_families(generate_latest(metrics.registry).decode()))


def test_every_metric_of_the_dashboards_exists(metrics: Metrics) -> None:
    names = {family.name for family in families(metrics)}

    assert names >= {
        "recur_transactions",
        "recur_alerts",
        "recur_rejected",
        "recur_duplicate_transactions",
        "recur_records_skipped",
        "recur_id_conflicts",
        "recur_event_time_skew",
        "recur_record_clock_skew",
        "recur_scores_recovered",
        "recur_states",
        "recur_micro_batch_transactions",
        "recur_stage_duration_seconds",
        "recur_score_latency_seconds",
        "recur_event_age_seconds",
        "recur_consumer_lag_records",
        "recur_redis_errors",
        "recur_kafka_errors",
        "recur_watermark_conflicts",
        "recur_zombie_scores",
        "recur_fenced",
        "recur_records_lost",
        "recur_fraud_score",
        "recur_partitions_assigned",
        "recur_ready",
        "recur_polls_in_flight",
        "recur_labels",
        "recur_duplicate_labels",
        "recur_labels_stale",
        "recur_label_delay_seconds",
        "recur_labels_lag_records",
        "recur_merchant_profiles",
    }


def test_every_label_has_a_closed_set_of_values_and_none_names_an_account(
    metrics: Metrics,
) -> None:
    closed = {
        "decision": {"approve", "review", "decline", "unknown"},
        "direction": set(SKEWS),
        "label": {"fraud", "legitimate"},
        "reason": set(REASONS),
        "result": set(STATE_RESULTS),
        "stage": set(STAGES),
    }
    seen: dict[str, set[str]] = {}
    for family in families(metrics):
        for sample in family.samples:
            for label, value in sample.labels.items():
                seen.setdefault(label, set()).add(value)

    assert seen.keys() - {"le"} == closed.keys()
    for label, values in closed.items():
        assert seen[label] == values, f"each value of {label} is there from the start"


def test_counters_start_at_zero_so_that_the_first_increase_shows(metrics: Metrics) -> None:
    found = samples(metrics.registry)

    for reason in REASONS:
        assert found["recur_rejected_total", (("reason", reason),)] == 0
    for decision in ("review", "decline"):
        assert found["recur_alerts_total", (("decision", decision),)] == 0


def test_names_end_in_their_unit_or_total_and_all_have_a_help_text(metrics: Metrics) -> None:
    for family in families(metrics):
        assert family.documentation, family.name
        assert re.fullmatch(r"(recur|process)_[a-z_]+", family.name)
        assert not re.search(r"_(ms|millis|minutes|percent|kb|mb)(_|$)", family.name)
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)


def test_a_stage_is_timed_even_when_it_fails(metrics: Metrics) -> None:
    def fail() -> None:
        with metrics.timed("publish"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    count = samples(metrics.registry)["recur_stage_duration_seconds_count", (("stage", "publish"),)]
    assert count == 1


def test_a_scrape_shows_every_value_observed_before_it() -> None:
    registry = CollectorRegistry()
    histogram = BatchHistogram("name", "Text.", [1.0, 2.0], registry)

    for observed in range(1, 3 * PENDING_MAX):
        histogram.observe((0.5,))
        if observed % 50 == 0:
            assert samples(registry)["name_count", ()] == observed
    assert samples(registry)["name_count", ()] == 3 * PENDING_MAX - 1


def test_each_value_of_a_label_has_its_own_counts() -> None:
    registry = CollectorRegistry()
    histogram = BatchHistogram("name", "Text.", [1.0], registry, ("stage", ["load", "save"]))

    histogram.labels("save").observe([0.5, 7.0])

    found = samples(registry)
    assert found["name_count", (("stage", "load"),)] == 0
    assert found["name_bucket", (("le", "1.0"), ("stage", "save"))] == 1
    assert found["name_sum", (("stage", "save"),)] == 7.5
