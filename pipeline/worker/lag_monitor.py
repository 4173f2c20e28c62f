"""Lag of the assigned partitions, measured on a connection that is not the consumer's."""

from __future__ import annotations

import asyncio
from typing import Protocol

from pipeline.kafka.polls import LogUnavailableError
from pipeline.kafka.score_log import KafkaScoreLog
from pipeline.scoring.health import Health
from pipeline.scoring.labels import STREAM, LabelProcessor
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.partitions import PartitionManager
from pipeline.scoring.topic_watcher import OpenTransactions, TopicWatcher

REQUEST_TIMEOUT_SECONDS = 5.0
"""Longest wait for an answer of the broker."""


class ConsumedTopic(Protocol):
    """A topic that the worker's consumer reads."""

    @property
    def topic(self) -> str:
        """Full name."""

    @property
    def is_idle(self) -> bool:
        """Whether no poll is between fetch and ack."""

    async def committed(self, partition: int) -> int | None:
        """Return the group's committed offset."""

    def read_to(self, partition: int) -> int | None:
        """Return the offset up to which a partition is read and applied, or None if unknown."""

    def refresh_topics(self) -> None:
        """Load the topics' metadata again."""


class LagMonitor:
    """Sets the metrics of lag, and reports to the health whether records wait.

    Args:
        transactions, labels: the topics, as the consumer reads them.
        manager: knows the assigned partitions of the transactions topic.
        label_processor: knows the assigned partitions of the labels topic.
        topic_watcher: finds deleted and recreated topics.
        score_log: asks the broker.
    """

    def __init__(
        self,
        *,
        transactions: ConsumedTopic,
        labels: ConsumedTopic,
        manager: PartitionManager,
        label_processor: LabelProcessor,
        topic_watcher: TopicWatcher,
        score_log: KafkaScoreLog,
        metrics: Metrics,
        health: Health,
    ) -> None:
        self._transactions = transactions
        self._labels = labels
        self._manager = manager
        self._label_processor = label_processor
        self._topic_watcher = topic_watcher
        self._score_log = score_log
        self._metrics = metrics
        self._health = health
        self._open_transactions = OpenTransactions(transactions.topic)
        self._open_label_transactions = OpenTransactions(labels.topic)

    async def measure(self) -> None:
        """Measure once.

        Raises:
            StartupError: a topic is deleted or recreated, and the worker must end.
        """
        assigned, labels = self._manager.assigned(), self._label_processor.assigned()
        try:
            existing = await asyncio.wait_for(
                self._topic_watcher.look(), timeout=REQUEST_TIMEOUT_SECONDS
            )
            if self._topic_watcher.changed & {self._transactions.topic, self._labels.topic}:
                self._transactions.refresh_topics()
            ends = await self._ends(self._transactions, assigned, existing)
            label_ends = await self._ends(self._labels, labels, existing)
            self._health.up("kafka")
            await self._set_lag(ends)
            await self._set_labels_lag(label_ends)
        except (TimeoutError, LogUnavailableError) as error:
            self._report_error(error)
            self._health.records_wait(not self._transactions.is_idle)

    async def _set_lag(self, ends: dict[int, int]) -> None:
        """Set lag and held-back records of the transactions topic."""
        positions = await self._positions(self._transactions, ends, self._manager.next_offsets())
        stable = await self._stable_ends(self._transactions, ends, positions)
        held = self._open_transactions.check(ends, stable, positions)
        for partition, end in ends.items():
            lag = max(0, end - positions.get(partition, end))
            self._metrics.lag.labels(str(partition)).set(lag)
            records = held[partition].records if partition in held else 0
            self._metrics.held.labels(str(partition)).set(records)
        # Held-back records move when their transaction ends; a restart would not help.
        self._health.records_wait(any(stable[p] > position for p, position in positions.items()))

    async def _set_labels_lag(self, ends: dict[int, int]) -> None:
        """Set the lag of the labels topic."""
        applied = self._label_processor.next_offsets()
        positions = await self._positions(self._labels, ends, applied)
        stable = await self._stable_ends(self._labels, ends, positions)
        self._open_label_transactions.check(ends, stable, positions)
        self._metrics.labels_lag.set(sum(max(0, ends[p] - at) for p, at in positions.items()))
        waiting = any(stable[p] > position for p, position in positions.items())
        self._health.records_wait(waiting, STREAM)

    async def _ends(
        self, topic: ConsumedTopic, partitions: set[int], existing: set[str]
    ) -> dict[int, int]:
        """Return the ends of partitions; those of a missing topic have none."""
        # aiokafka would repeat a request for a missing topic ten times a second.
        if not partitions or topic.topic not in existing:
            return {}
        return await asyncio.wait_for(
            self._score_log.high_watermarks(topic.topic, sorted(partitions)),
            timeout=REQUEST_TIMEOUT_SECONDS,
        )

    async def _stable_ends(
        self, topic: ConsumedTopic, ends: dict[int, int], positions: dict[int, int]
    ) -> dict[int, int]:
        """Return the offsets up to which a reader of committed records can read."""
        behind = [p for p, position in positions.items() if position < ends[p]]
        if not behind:
            return ends
        found = await asyncio.wait_for(
            self._score_log.ends(topic.topic, sorted(behind)), timeout=REQUEST_TIMEOUT_SECONDS
        )
        return {**ends, **found}

    async def _positions(
        self, topic: ConsumedTopic, ends: dict[int, int], applied: dict[int, int]
    ) -> dict[int, int]:
        """Return the offset up to which each partition is applied, where it is known."""
        positions = {}
        for partition in ends:
            position = applied.get(partition)
            if position is None:
                position = await self._committed(topic, partition)
            read_to = topic.read_to(partition)
            if position is None or (read_to is not None and read_to > position):
                position = read_to
            if position is not None:
                positions[partition] = position
        return positions

    async def _committed(self, topic: ConsumedTopic, partition: int) -> int | None:
        try:
            # A consumer waits for a broker that is away, and the monitor would wait with it.
            return await asyncio.wait_for(
                topic.committed(partition), timeout=REQUEST_TIMEOUT_SECONDS
            )
        except (TimeoutError, LogUnavailableError) as error:
            self._report_error(error)
            return None

    def _report_error(self, error: Exception) -> None:
        self._metrics.kafka_errors.inc()
        self._health.down("kafka", "it does not answer", str(error) or type(error).__name__)
