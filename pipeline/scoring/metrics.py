"""All metrics of a worker, in one class over one registry.

Metrics use base units, ``_total`` for counters, and bounded labels; no label is an account
number. The values of a micro-batch are added at once: :class:`BatchHistogram` takes an array.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from time import perf_counter

import numpy as np
from numpy.typing import ArrayLike, NDArray
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from model.units import DAY_SECONDS, HOUR_SECONDS, MINUTE_SECONDS
from pipeline.messages.decision import DECISIONS
from pipeline.messages.decoding import REASONS
from pipeline.messages.labels import LABELS
from pipeline.storage.transaction_note import UNKNOWN

LATENCY_BUCKETS_SECONDS = (
    0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
    0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
STAGE_BUCKETS_SECONDS = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0,
)  # fmt: skip
BATCH_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 4000, 8000, 16_000, 65_536)
SCORE_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0)

DELAY_BUCKETS_SECONDS = (
    MINUTE_SECONDS, HOUR_SECONDS, 6 * HOUR_SECONDS,
    *(DAY_SECONDS * days for days in (1, 2, 3, 5, 7, 10, 14, 21, 30, 45, 60, 90)),
)  # fmt: skip

STAGES = ("decode", "load", "compute", "publish", "save", "ack", "record")
PROFILE_RESULTS = ("cached", "loaded", "missing", "invalid")
SKEWS = ("ahead", "behind")
STATE_RESULTS = ("cached", "loaded", "missing", "invalid", "expired")


PENDING_MAX = 64
"""Arrays that a histogram counts together; each has the values of a micro-batch or less."""

disable_created_metrics()  # type: ignore[no-untyped-call]


class BatchHistogram(Collector):
    """Histogram that observes a whole array at once.

    The histogram of prometheus_client takes a lock and a Python loop for each value. At 50,000
    values a second this costs a tenth of a core. Values are counted together when
    :data:`PENDING_MAX` arrays wait, or at a scrape: counting a poll's few alone took 20 µs.

    Args:
        label: the name of its label, and all values; None without a label.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        buckets: Sequence[float],
        registry: CollectorRegistry,
        label: tuple[str, Sequence[str]] | None = None,
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._labelnames = [] if label is None else [label[0]]
        self._bounds = np.asarray(buckets, np.float64)
        names = ("",) if label is None else label[1]
        self._series = {name: _Series(self._bounds) for name in names}
        self.observe = self._series[names[0]].observe
        registry.register(self)

    def labels(self, value: str) -> _Series:
        """Return what observes the values of a label."""
        return self._series[value]

    def collect(self) -> Iterator[Metric]:
        """Yield cumulative counts by upper bound, for the registry."""
        texts = [*(_text(bound) for bound in self._bounds), "+Inf"]
        family = HistogramMetricFamily(
            self._name, self._documentation, labels=self._labelnames or None
        )
        for value, series in self._series.items():
            cumulative, total = series.totals()
            family.add_metric(
                [value] * len(self._labelnames),
                [(le, float(n)) for le, n in zip(texts, cumulative, strict=True)],
                total,
            )
        yield family

    def describe(self) -> Iterator[Metric]:
        """Yield the name without samples, for the registry."""
        yield HistogramMetricFamily(
            self._name, self._documentation, labels=self._labelnames or None
        )


class _Series:
    """The counts of one label value; any thread reads them.

    Args:
        bounds: float64[buckets], the upper bounds.
    """

    def __init__(self, bounds: NDArray[np.float64]) -> None:
        self._bounds = bounds
        self._counts = np.zeros(len(bounds) + 1, np.int64)
        self._sum = 0.0
        self._pending: list[ArrayLike] = []
        self._lock = threading.Lock()

    def observe(self, values: ArrayLike) -> None:
        """Count the values, given in the metric's unit; they may not change afterwards."""
        with self._lock:
            self._pending.append(values)
            if len(self._pending) >= PENDING_MAX:
                self._count_pending()

    def totals(self) -> tuple[list[int], float]:
        """Return the cumulative counts, and the sum of the values."""
        with self._lock:
            self._count_pending()
            return np.cumsum(self._counts).tolist(), self._sum

    def _count_pending(self) -> None:
        if self._pending:
            values = np.concatenate(self._pending, dtype=np.float64)
            places = np.searchsorted(self._bounds, values, side="left")
            self._counts += np.bincount(places, minlength=len(self._counts))
            self._sum += float(values.sum())
            self._pending.clear()


class _Timer:
    """A context that observes its duration, seconds."""

    __slots__ = ("_series", "_start")

    def __init__(self, series: _Series) -> None:
        self._series = series

    def __enter__(self) -> None:
        self._start = perf_counter()

    def __exit__(self, *error: object) -> None:
        self._series.observe((perf_counter() - self._start,))


def _text(bound: float) -> str:
    """Write a bucket's bound as Prometheus's own client does."""
    return str(floatToGoString(bound))  # type: ignore[no-untyped-call]


class Metrics:
    """The metrics of one worker.

    Args:
        registry: registry of the metrics; each test uses a new one.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        ProcessCollector(registry=registry)
        self.transactions = Counter(
            "recur_transactions", "Transactions whose score is published and state saved",
            registry=registry,
        )  # fmt: skip
        self.alerts = Counter("recur_alerts", "Alerts published", ["decision"], registry=registry)
        self.threshold = Gauge(
            "recur_threshold", "Lowest score that gets the decision", ["decision"],
            registry=registry,
        )  # fmt: skip
        self.rejected = Counter(
            "recur_rejected", "Records sent to the dead-letter topic", ["reason"],
            registry=registry,
        )  # fmt: skip
        self.dead_letters_lost = Counter(
            "recur_dead_letters_lost",
            "Rejected records that the broker rejected as dead letters, too",
            registry=registry,
        )  # fmt: skip
        self.duplicate_transactions = Counter(
            "recur_duplicate_transactions", "Transactions dropped because their id was seen before",
            registry=registry,
        )  # fmt: skip
        self.id_conflicts = Counter(
            "recur_id_conflicts",
            "Transactions whose account already has their id with another content",
            registry=registry,
        )
        self.event_time_skew = Counter(
            "recur_event_time_skew",
            "Transactions whose timestamp is off their record's by more than the tolerance",
            ["direction"], registry=registry,
        )  # fmt: skip
        self.clock_skew = Counter(
            "recur_record_clock_skew",
            "Transactions whose record is stamped ahead of the worker's clock",
            registry=registry,
        )
        self.forgotten = Counter(
            "recur_accounts_forgotten", "Control records to forget an account that were applied",
            registry=registry,
        )  # fmt: skip
        self.records_skipped = Counter(
            "recur_records_skipped", "Records not scored, and why", ["reason"], registry=registry,
        )  # fmt: skip
        self.scores_recovered = Counter(
            "recur_scores_recovered", "Scores found in the scores topic and kept",
            registry=registry,
        )  # fmt: skip
        self.states = Counter(
            "recur_states", "Account states needed, by where they came from", ["result"],
            registry=registry,
        )  # fmt: skip
        self.profiles = Counter(
            "recur_merchant_profiles",
            "Merchant profiles needed for a transaction, by where they came from",
            ["result"], registry=registry,
        )  # fmt: skip
        self.labels = Counter(
            "recur_labels", "Labels recorded, by label and by the decision on the transaction",
            ["label", "decision"], registry=registry,
        )  # fmt: skip
        self.duplicate_labels = Counter(
            "recur_duplicate_labels", "Labels dropped because they were recorded before",
            registry=registry,
        )  # fmt: skip
        self.labels_stale = Counter(
            "recur_labels_stale", "Labels that came after a newer one of their transaction",
            registry=registry,
        )  # fmt: skip
        self.label_delay = BatchHistogram(
            "recur_label_delay_seconds", "From a transaction to its label, event time",
            DELAY_BUCKETS_SECONDS, registry,
        )  # fmt: skip
        self.labels_lag = Gauge(
            "recur_labels_lag_records", "Records in the labels topic that are not recorded yet",
            registry=registry,
        )  # fmt: skip
        self.micro_batch = BatchHistogram(
            "recur_micro_batch_transactions", "Transactions in a micro-batch", BATCH_BUCKETS,
            registry,
        )  # fmt: skip
        self.stage = BatchHistogram(
            "recur_stage_duration_seconds", "Time of a micro-batch in a stage",
            STAGE_BUCKETS_SECONDS, registry, ("stage", STAGES),
        )  # fmt: skip
        self._timers = {stage: _Timer(self.stage.labels(stage)) for stage in STAGES}
        self.latency = BatchHistogram(
            "recur_score_latency_seconds",
            "From the record's CreateTime to the acknowledged score; at most a day old",
            LATENCY_BUCKETS_SECONDS,
            registry,
        )
        self.score = BatchHistogram(
            "recur_fraud_score", "Scores, as probability of fraud", SCORE_BUCKETS, registry
        )
        self.out_of_range = Counter(
            "recur_inputs_out_of_range",
            "Raw inputs of scored transactions beyond the training data; they saturate",
            ["feature"], registry=registry,
        )  # fmt: skip
        self.event_age = Gauge(
            "recur_event_age_seconds", "Wall clock minus the newest event time seen",
            registry=registry,
        )  # fmt: skip
        self.lag = Gauge(
            "recur_consumer_lag_records", "Records in the log that are not applied yet",
            ["partition"], registry=registry,
        )  # fmt: skip
        self.held = Gauge(
            "recur_held_records", "Records that a producer's open transaction holds back",
            ["partition"], registry=registry,
        )  # fmt: skip
        self.redis_errors = Counter(
            "recur_redis_errors", "Failed calls to Redis", registry=registry
        )
        self.evicted_keys = Counter(
            "recur_redis_evicted_keys",
            "Keys that Redis evicted, account states perhaps among them",
            registry=registry,
        )
        self.may_evict = Gauge(
            "recur_redis_may_evict", "1 while Redis has a maxmemory-policy that may evict states",
            registry=registry,
        )  # fmt: skip
        self.kafka_errors = Counter(
            "recur_kafka_errors", "Failed calls to Kafka", registry=registry
        )
        self.watermark_conflicts = Counter(
            "recur_watermark_conflicts",
            "Loads and saves that found another watermark than expected; nothing was written",
            registry=registry,
        )
        self.replies_lost = Counter(
            "recur_replies_lost",
            "Replies to gateways that Redis did not take; the answer keys have them",
            registry=registry,
        )
        self.zombie_scores = Counter(
            "recur_zombie_scores",
            "Records in a scores partition that this worker, its owner, did not write",
            registry=registry,
        )
        self.fenced = Counter(
            "recur_fenced",
            "Kafka transactions given up because another worker took the partition",
            registry=registry,
        )
        self.records_lost = Counter(
            "recur_records_lost", "Records that retention deleted before they were applied",
            registry=registry,
        )  # fmt: skip
        self.partitions = Gauge(
            "recur_partitions_assigned", "Partitions that the group assigned to this worker",
            registry=registry,
        )  # fmt: skip
        self.polls_in_flight = Gauge(
            "recur_polls_in_flight", "Polls fetched and not acked yet", registry=registry
        )
        self.ready = Gauge(
            "recur_ready",
            "1 when Redis and Kafka answer and partitions are assigned",
            registry=registry,
        )
        self.model = Info("recur_model", "The checkpoint in use", registry=registry)
        for decision in DECISIONS[1:]:
            self.alerts.labels(decision)
        for reason in REASONS:
            self.rejected.labels(reason)
        self.skews = {direction: self.event_time_skew.labels(direction) for direction in SKEWS}
        for label in LABELS:
            for decision in (*DECISIONS, UNKNOWN):
                self.labels.labels(label, decision)
        self.profile_results = {result: self.profiles.labels(result) for result in PROFILE_RESULTS}
        self.state_results = {result: self.states.labels(result) for result in STATE_RESULTS}

    def timed(self, stage: str) -> AbstractContextManager[None]:
        """Observe the duration of a stage, one of :data:`STAGES`, for one poll at a time."""
        return self._timers[stage]


def add(counter: Counter, amount: int) -> None:
    """Add an amount that is mostly 0 to a counter, without a lock in that case."""
    if amount:
        counter.inc(amount)
