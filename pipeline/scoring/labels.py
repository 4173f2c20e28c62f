"""Processing of labels, which arrive later: decode → publish dead letters → record → ack.

The store records each label once, however often workers repeat it, and records none if earlier
ones are missing. So this needs no conditional writes. After a rebalance the next owner repeats
interrupted work. After a loss of data the log is read back to the store's watermark.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Protocol

import numpy as np

from model.features.merchant import BUCKET_MS, WEIGHT_MAX
from pipeline.errors import RejectedError
from pipeline.kafka.decompression_limit import refuse_batch
from pipeline.kafka.polls import Bounds, Chunk, Poll, Record
from pipeline.kafka.producer import Outgoing, Publisher
from pipeline.messages.labels import Label, decode_label
from pipeline.messages.scores import stored_weight
from pipeline.scoring.consumer import PartitionConsumer
from pipeline.scoring.dead_letter import DeadLetters
from pipeline.scoring.health import Health
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.retry import Retrier
from pipeline.scoring.topic_id_cache import TopicIdCache
from pipeline.settings import Settings
from pipeline.storage.merchant_profile import KNOWN_MAX, Fraud, transaction_hash
from pipeline.storage.merchant_store import LabelOutcomes, MerchantLabel, MerchantStore
from pipeline.storage.transaction_note import NOTE_EXPIRY_MS, STALE
from pipeline.timestamps import is_record_time
from pipeline.topic_id import NO_ID, is_other, other_log, shown

log = logging.getLogger(__name__)

STREAM = "labels"
"""Name of waiting labels in the health."""


class LabelsTopic(Protocol):
    """Interface to bounds and ids of topics."""

    async def bounds(self, topic: str, partition: int) -> Bounds:
        """Return the current bounds of a partition's log."""

    async def topic_id(self, topic: str) -> bytes | None:
        """Return a topic's current id, or None if there is no such topic."""


class LabelProcessor:
    """Processing of the labels topic, one poll at a time.

    Args:
        settings: limits and names.
        store: merchants' profiles.
        publisher: publishes dead letters.
        logs, consumer: bounds and ids of the labels topic, and the consumer's position in it.
        retrier: repeats calls to services that do not answer.
        metrics, health: monitoring.
        clock_ms: wall clock, epoch milliseconds.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        store: MerchantStore,
        publisher: Publisher,
        logs: LabelsTopic,
        consumer: PartitionConsumer,
        retrier: Retrier,
        metrics: Metrics,
        health: Health,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._logs = logs
        self._consumer = consumer
        self._retrier = retrier
        self._metrics = metrics
        self._health = health
        self._topic = settings.topic("labels")
        self._max_ahead_ms = int(settings.max_timestamp_ahead_seconds * 1000)
        self._dead_letters = DeadLetters(
            self._topic, settings.dead_letter_value_max_bytes, metrics, clock_ms
        )
        self._next_offsets: dict[int, int | None] = {}
        self._on_new_log = settings.on_new_log
        self._log_id = TopicIdCache(self._topic, logs, retrier)
        # Topic id of each partition's recorded labels, in this assignment.
        self._log_ids: dict[int, bytes] = {}

    def assign(self, partitions: Collection[int]) -> None:
        """Take exactly these partitions of the labels topic, as the group assigned them."""
        self._next_offsets = dict.fromkeys(partitions)
        self._log_ids = {}

    def assigned(self) -> set[int]:
        """Return the assigned partitions."""
        return set(self._next_offsets)

    def next_offsets(self) -> dict[int, int]:
        """Return the first offset that is not recorded, of each active partition."""
        return {p: offset for p, offset in self._next_offsets.items() if offset is not None}

    async def process(self, poll: Poll) -> None:
        """Record a poll; when this returns, ``poll.applied`` may be committed.

        Raises:
            PublishError: the broker rejects a record that must be published.
            StartupError: the topic was deleted and created again.
        """
        assignment = self._next_offsets  # the next assignment gets a new dict
        for partition, chunk in poll.chunks.items():
            if self._next_offsets is not assignment:
                break
            if partition not in assignment:
                continue
            expected = assignment[partition]
            if expected is not None and chunk.begin > expected:
                continue  # fetched before the seek back
            is_backward = expected is not None and chunk.begin < expected
            if not await self._is_recorded_log(partition, now=is_backward):
                continue
            behind = await self._record(partition, chunk)
            if self._next_offsets is not assignment:
                break
            if behind is None:
                assignment[partition] = poll.applied[partition] = chunk.end
            else:
                await self._read_back(partition, behind)
        self._health.moved(STREAM)

    async def look(self) -> None:
        """Check that the store still has the recorded labels; if not, read the log back.

        Raises:
            StartupError: the topic was deleted and created again.
        """
        assignment = self._next_offsets
        for partition, recorded in list(assignment.items()):
            if not await self._is_recorded_log(partition, now=True):
                continue
            if recorded is None:  # no label came yet; committed ones were recorded
                committed = partial(self._consumer.committed, partition)
                recorded = await self._retrier.retry_kafka(committed)
            standing = await self._retrier.retry_redis(partial(self._store.recorded_to, partition))
            if recorded is not None and standing < recorded:
                standing = max(standing, await self._begin(partition))
                if standing < recorded and self._next_offsets is assignment:
                    await self._read_back(partition, standing)

    async def _is_recorded_log(self, partition: int, *, now: bool) -> bool:
        """Check that the topic is the recorded one; if not, restart the partition from its start.

        Raises:
            StartupError: it is another topic, and the settings say to stop.
        """
        known, assignment = self._log_ids.get(partition), self._next_offsets
        found = await self._log_id.get(now=now or known is None)
        if known is not None and not is_other(known, found):
            return True
        stored = await self._stored_id(partition, found)
        if known is None and not is_other(stored, found):
            if self._next_offsets is assignment:
                self._log_ids[partition] = found
            return True
        if is_other(stored, found):  # no other worker has started it
            if self._on_new_log == "stop":
                raise other_log(self._topic, stored, found, "recorded labels")
            begin = partial(self._store.begin_labels_log, partition, found)
            await self._retrier.retry_redis(begin)
            log.warning(
                "the topic was deleted and created again: its labels are recorded from its start",
                extra={
                    "topic": self._topic,
                    "partition": partition,
                    "id_then": shown(stored),
                    "id_now": shown(found),
                },
            )
        begin_offset = await self._begin(partition)
        if self._next_offsets is assignment and partition in assignment:
            self._log_ids[partition] = found
            assignment[partition] = begin_offset
            await self._consumer.seek(partition, begin_offset)
        return False

    async def _stored_id(self, partition: int, found: bytes) -> bytes:
        """Return the topic id in the store; if there is none, store the current one."""
        if found == NO_ID:
            return NO_ID
        stored = await self._retrier.retry_redis(partial(self._store.labels_log, partition, found))
        return found if stored is None else stored

    async def _begin(self, partition: int) -> int:
        bounds = await self._retrier.retry_kafka(lambda: self._logs.bounds(self._topic, partition))
        return bounds.begin

    async def _read_back(self, partition: int, offset: int) -> None:
        log.error(
            "Redis lost recorded labels; recording them again",
            extra={"partition": partition, "from_offset": offset},
        )
        self._next_offsets[partition] = offset
        await self._consumer.seek(partition, offset)

    async def _record(self, partition: int, chunk: Chunk) -> int | None:
        """Record a chunk; if the store lacks earlier labels, return the offset to read back to."""
        with self._metrics.timed("record"):
            labels: list[MerchantLabel] = []
            names: list[str] = []
            delays_ms: list[int] = []
            dead_letters: list[Outgoing] = []
            for record in chunk.records:
                try:
                    label, timestamp_ms, labelled_ms = label_of(record, self._max_ahead_ms)
                except RejectedError as error:
                    dead_letters.append(
                        self._dead_letters.encode(partition, record, error.reason, str(error))
                    )
                    continue
                labels.append(merchant_label_of(record.offset, label, timestamp_ms, labelled_ms))
                names.append(label.label)
                delays_ms.append(labelled_ms - timestamp_ms)
            if dead_letters:
                await self._publisher.publish({}, [], dead_letters)
            outcomes = await self._record_labels(partition, labels, chunk.begin, chunk.end)
            behind = outcomes.behind
            if behind is not None:
                behind = max(behind, await self._begin(partition))
                if behind >= chunk.begin:  # the log no longer has the missing labels
                    outcomes = await self._record_labels(partition, labels, 0, chunk.end)
                    behind = None
        self._observe(names, delays_ms, outcomes)
        return behind

    async def _record_labels(
        self, partition: int, labels: list[MerchantLabel], begin: int, end: int
    ) -> LabelOutcomes:
        return await self._retrier.retry_redis(
            lambda: self._store.record_labels(partition, labels, begin, end)
        )

    def _observe(self, names: list[str], delays_ms: list[int], outcomes: LabelOutcomes) -> None:
        """Count new, stale and duplicate labels, and the delays of new ones."""
        done = [i for i, decision in enumerate(outcomes.decisions) if decision is not None]
        new = [i for i in done if outcomes.decisions[i] != STALE]
        self._metrics.labels_stale.inc(len(done) - len(new))
        for i in new:
            self._metrics.labels.labels(names[i], outcomes.decisions[i]).inc()
        self._metrics.label_delay.observe(np.array([delays_ms[i] for i in new]) / 1000.0)
        if outcomes.behind is None:
            self._metrics.duplicate_labels.inc(len(names) - len(done))


def label_of(record: Record, max_ahead_ms: int) -> tuple[Label, int, int]:
    """Decode a record: its label, its transaction's time and its own, epoch milliseconds.

    Raises:
        RejectedError: the label is invalid.
    """
    refuse_batch(record.value)
    label, timestamp_ms, labelled_ms = decode_label(record.key, record.value)
    has_time = is_record_time(record.timestamp)
    record_ms = record.timestamp if has_time else time.time_ns() // 1_000_000
    if labelled_ms - record_ms > max_ahead_ms:
        raise RejectedError(
            "future_timestamp",
            f"labelled_at is over {max_ahead_ms // 1000} s past the record's time",
        )
    return label, timestamp_ms, labelled_ms


def merchant_label_of(
    offset: int, label: Label, timestamp_ms: int, labelled_ms: int
) -> MerchantLabel:
    """Convert a label for the merchant store."""
    weight = label.merchant_weight
    entry = Fraud(
        transaction_hash(label.transaction_id),
        timestamp_ms // BUCKET_MS,
        min(labelled_ms // BUCKET_MS, KNOWN_MAX),
        WEIGHT_MAX if weight is None else stored_weight(weight),
    )
    return MerchantLabel(
        offset,
        label.merchant_id,
        label.label == "fraud",
        entry,
        labelled_ms,
        has_weight=weight is not None,
        is_late=labelled_ms - timestamp_ms > NOTE_EXPIRY_MS,
    )
