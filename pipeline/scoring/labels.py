"""Labels, the truths that arrive later: decode → publish what is rejected → book → ack.

The store books each label once, whoever asks and how often, and nothing past a gap. So there is
nothing to guard here: what a rebalance cuts off is done again by the next owner, and what the
store lost is read again from where it is booked.
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
from pipeline.kafka.producer import Outgoing, Publisher
from pipeline.kafka.score_log import Bounds
from pipeline.messages.codec import Label, decode_label, stored_weight
from pipeline.scoring.dead_letter import DeadLetters
from pipeline.scoring.health import Health
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.partitions import Chunk, LogId, Poll, Record, TransactionLog
from pipeline.scoring.retry import Retrier
from pipeline.settings import Settings
from pipeline.storage.merchant_profile import KNOWN_MAX, Fraud, transaction_hash
from pipeline.storage.merchant_store import LabelOutcomes, MerchantLabel, MerchantStore
from pipeline.storage.transaction_note import NOTE_EXPIRY_MS, STALE
from pipeline.timestamps import is_record_time
from pipeline.topic_id import NO_ID, is_other, other_log, shown

log = logging.getLogger(__name__)

STREAM = "labels"
"""What the health calls the labels that wait."""


class Logs(Protocol):
    """Where logs begin and end."""

    async def bounds(self, topic: str, partition: int) -> Bounds:
        """Where a partition's log begins and ends now."""

    async def topic_id(self, topic: str) -> bytes | None:
        """A topic's id now; None where there is no such topic."""


class LabelProcessor:
    """Books polls of the labels topic, one at a time.

    Args:
        settings: limits and names.
        store: merchants' profiles.
        publisher: rejected records out.
        logs, labels_log: where the labels topic begins, and how to move in it.
        patience: waits for services that are away.
        metrics, health: what operations see.
        clock_ms: wall clock, epoch milliseconds.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        store: MerchantStore,
        publisher: Publisher,
        logs: Logs,
        labels_log: TransactionLog,
        patience: Retrier,
        metrics: Metrics,
        health: Health,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._logs = logs
        self._labels_log = labels_log
        self._patience = patience
        self._metrics = metrics
        self._health = health
        self._topic = settings.topic("labels")
        self._future_limit_ms = int(settings.max_timestamp_ahead_seconds * 1000)
        self._dead_letters = DeadLetters(
            self._topic, settings.dead_letter_value_max_bytes, metrics, clock_ms
        )
        self._next_offsets: dict[int, int | None] = {}
        self._on_new_log = settings.on_new_log
        self._log = LogId(self._topic, logs, patience)
        # Of the log that each partition is booked from; of this assignment.
        self._log_ids: dict[int, bytes] = {}

    def assign(self, partitions: Collection[int]) -> None:
        """The group gave these partitions of the labels topic, and no others."""
        self._next_offsets = dict.fromkeys(partitions)
        self._log_ids = {}

    def assigned(self) -> set[int]:
        """The partitions that the group gave."""
        return set(self._next_offsets)

    def next_offsets(self) -> dict[int, int]:
        """The first offset that is not booked, of each partition worked on."""
        return {p: offset for p, offset in self._next_offsets.items() if offset is not None}

    async def process(self, poll: Poll) -> None:
        """Book a poll; when this returns, ``poll.applied`` may be committed.

        Raises:
            PublishError: the broker does not take what must be published.
            StartupError: the topic was deleted and made again.
        """
        tenure = self._next_offsets  # the next assignment has others
        for partition, chunk in poll.chunks.items():
            if self._next_offsets is not tenure:
                break
            if partition not in tenure:
                continue
            expected = tenure[partition]
            if expected is not None and chunk.begin > expected:
                continue  # fetched before the log was read back
            goes_back = expected is not None and chunk.begin < expected
            if not await self._is_booked_log(partition, now=goes_back):
                continue
            behind = await self._book(partition, chunk)
            if self._next_offsets is not tenure:
                break
            if behind is None:
                tenure[partition] = poll.applied[partition] = chunk.end
            else:
                await self._read_back(partition, behind)
        self._health.moved(STREAM)

    async def look(self) -> None:
        """See whether the store still has what was booked; else have the log read back.

        Raises:
            StartupError: the topic was deleted and made again.
        """
        tenure = self._next_offsets
        for partition, booked in list(tenure.items()):
            if not await self._is_booked_log(partition, now=True):
                continue
            if booked is None:  # none came yet; what is committed was booked
                committed = partial(self._labels_log.committed, partition)
                booked = await self._patience.ask_log(committed)
            standing = await self._patience.retry_redis(partial(self._store.recorded_to, partition))
            if booked is not None and standing < booked:
                standing = max(standing, await self._begin(partition))
                if standing < booked and self._next_offsets is tenure:
                    await self._read_back(partition, standing)

    async def _is_booked_log(self, partition: int, *, now: bool) -> bool:
        """Whether the topic is the one that was booked; else it is read from its begin.

        Raises:
            StartupError: it is not, and the settings say to stop then.
        """
        known, tenure = self._log_ids.get(partition), self._next_offsets
        found = await self._log.look(now=now or known is None)
        if known is not None and not is_other(known, found):
            return True
        named = await self._ask_named(partition, found)
        if known is None and not is_other(named, found):
            if self._next_offsets is tenure:
                self._log_ids[partition] = found
            return True
        if is_other(named, found):  # nobody has begun it
            if self._on_new_log == "stop":
                raise other_log(self._topic, named, found, "booked labels")
            begin = partial(self._store.begin_labels_log, partition, found)
            await self._patience.retry_redis(begin)
            log.warning(
                "the topic was deleted and made again: its labels are booked from its begin",
                extra={
                    "topic": self._topic,
                    "partition": partition,
                    "id_then": shown(named),
                    "id_now": shown(found),
                },
            )
        begin_offset = await self._begin(partition)
        if self._next_offsets is tenure and partition in tenure:
            self._log_ids[partition] = found
            tenure[partition] = begin_offset
            await self._labels_log.seek(partition, begin_offset)
        return False

    async def _ask_named(self, partition: int, found: bytes) -> bytes:
        """The id that the store names; it names what is found where it named none."""
        if found == NO_ID:
            return NO_ID
        named = await self._patience.retry_redis(partial(self._store.labels_log, partition, found))
        return found if named is None else named

    async def _begin(self, partition: int) -> int:
        bounds = await self._patience.ask_log(lambda: self._logs.bounds(self._topic, partition))
        return bounds.begin

    async def _read_back(self, partition: int, offset: int) -> None:
        log.error(
            "labels that were booked are not in Redis any more; booking them again",
            extra={"partition": partition, "from_offset": offset},
        )
        self._next_offsets[partition] = offset
        await self._labels_log.seek(partition, offset)

    async def _book(self, partition: int, chunk: Chunk) -> int | None:
        """Book a chunk; where the store lacks what is before it, the offset to go on from."""
        with self._metrics.timed("book"):
            bookings: list[MerchantLabel] = []
            names: list[str] = []
            delays_ms: list[int] = []
            letters: list[Outgoing] = []
            for record in chunk.records:
                try:
                    label, timestamp_ms, labelled_ms = label_of(record, self._future_limit_ms)
                except RejectedError as error:
                    letters.append(
                        self._dead_letters.letter(partition, record, error.reason, str(error))
                    )
                    continue
                bookings.append(booking_of(record.offset, label, timestamp_ms, labelled_ms))
                names.append(label.label)
                delays_ms.append(labelled_ms - timestamp_ms)
            if letters:
                await self._publisher.publish({}, [], letters)
            booked = await self._ask(partition, bookings, chunk.begin, chunk.end)
            behind = booked.behind
            if behind is not None:
                behind = max(behind, await self._begin(partition))
                if behind >= chunk.begin:  # the log has nothing of what is not booked
                    booked = await self._ask(partition, bookings, 0, chunk.end)
                    behind = None
        self._observe(names, delays_ms, booked)
        return behind

    async def _ask(
        self, partition: int, bookings: list[MerchantLabel], begin: int, end: int
    ) -> LabelOutcomes:
        return await self._patience.retry_redis(
            lambda: self._store.record_labels(partition, bookings, begin, end)
        )

    def _observe(self, names: list[str], delays_ms: list[int], booked: LabelOutcomes) -> None:
        """Count labels that are new, and those that came after a newer one."""
        done = [i for i, decision in enumerate(booked.decisions) if decision is not None]
        new = [i for i in done if booked.decisions[i] != STALE]
        self._metrics.labels_stale.inc(len(done) - len(new))
        for i in new:
            self._metrics.labels.labels(names[i], booked.decisions[i]).inc()
        self._metrics.label_delay.observe(np.array([delays_ms[i] for i in new]) / 1000.0)
        if booked.behind is None:
            self._metrics.duplicate_labels.inc(len(names) - len(done))


def label_of(record: Record, future_limit_ms: int) -> tuple[Label, int, int]:
    """A record's label, its transaction's time and its own, epoch milliseconds.

    Raises:
        RejectedError: it cannot be booked.
    """
    refuse_batch(record.value)
    label, timestamp_ms, labelled_ms = decode_label(record.key, record.value)
    has_time = is_record_time(record.timestamp)
    record_ms = record.timestamp if has_time else time.time_ns() // 1_000_000
    if labelled_ms - record_ms > future_limit_ms:
        raise RejectedError(
            "future_timestamp",
            f"labelled_at is over {future_limit_ms // 1000} s past the record's time",
        )
    return label, timestamp_ms, labelled_ms


def booking_of(offset: int, label: Label, timestamp_ms: int, labelled_ms: int) -> MerchantLabel:
    """What the store books of a label."""
    told = label.merchant_weight
    entry = Fraud(
        transaction_hash(label.transaction_id),
        timestamp_ms // BUCKET_MS,
        min(labelled_ms // BUCKET_MS, KNOWN_MAX),
        WEIGHT_MAX if told is None else stored_weight(told),
    )
    return MerchantLabel(
        offset,
        label.merchant_id,
        label.label == "fraud",
        entry,
        labelled_ms,
        has_weight=told is not None,
        is_late=labelled_ms - timestamp_ms > NOTE_EXPIRY_MS,
    )
