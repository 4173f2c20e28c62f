"""A producer of scores, alerts and dead letters that acknowledges each micro-batch as a whole.

A score goes to the partition with its source's number, in batches that are built at once. The
acknowledged base offset tells whether another worker wrote to the scores partition meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import BrokerResponseError, KafkaError, OutOfOrderSequenceNumber

import pipeline.kafka.produce_request  # noqa: F401 - packs the requests of aiokafka's producers
from pipeline.errors import RecurError
from pipeline.kafka.message_limits import TOO_LARGE, MessageLimits
from pipeline.settings import Settings

KEY_SHARE = 4
"""The key of a dead letter that must be cut keeps this part of the bytes: a quarter."""

OVERHEAD_BYTES = 128
"""Upper bound of what a batch of one record adds to key, value and headers, and of each header."""

CUT_HEADER = "truncated"
"""Header of a dead letter that was cut: the original length of its value."""

LOG_INTERVAL_SECONDS = 60.0
"""Time between two log lines about refused dead letters."""

log = logging.getLogger(__name__)


class PublishError(RecurError):
    """The broker does not accept a record that must be published. The process has to end."""


class Outgoing(NamedTuple):
    """A record to publish. ``key`` chooses the partition unless the caller names one."""

    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()


class AppendResult(msgspec.Struct, frozen=True):
    """The offsets of a partition's scores, without gaps; both None if they are not known."""

    first: int | None
    next: int | None


class PartOutput(NamedTuple):
    """The output of a partition's part of a micro-batch.

    Attributes:
        scores, alerts, rejected: records to publish.
        next_offset: the group's offset once they are published.
        producer_epoch: the epoch that :meth:`Transactions.take` returned.
    """

    scores: Sequence[Outgoing]
    alerts: Sequence[Outgoing]
    rejected: Sequence[Outgoing]
    next_offset: int
    producer_epoch: int


class Publisher(Protocol):
    """The interface of a producer that the processor needs."""

    async def publish(
        self,
        scores: dict[int, Sequence[Outgoing]],
        alerts: Sequence[Outgoing],
        rejected: Sequence[Outgoing],
    ) -> dict[int, AppendResult]:
        """Publish all records, and return once all replicas have them (acks=all).

        Args:
            scores: scores in order, by partition of the scores topic.
            alerts: alerts to publish.
            rejected: dead letters to publish.

        Returns:
            the offsets of each partition's scores.

        Raises:
            PublishError: the broker does not accept them.
        """


class Transactions(Protocol):
    """The interface of producers that commit output and offsets together.

    Taking a partition aborts all transactions that older producers have open there. From then on
    an older epoch commits nothing; earlier commits stay.
    """

    async def take(self, partition: int) -> int:
        """Become the only producer that may commit output of the partition.

        Returns:
            the epoch to commit under.

        Raises:
            LogUnavailableError: the broker does not answer.
            PublishError: the broker refuses the producer.
        """

    async def commit(self, outputs: Mapping[int, PartOutput]) -> dict[int, AppendResult | None]:
        """Commit each partition's output and offset, or nothing of it.

        Returns:
            the offsets of each partition's scores, None for one without scores. Another worker
            has taken each partition that is missing: nothing of it was committed.

        Raises:
            PublishError: the broker does not accept the output.
        """


class KafkaProducer:
    """A publisher with one idempotent producer.

    Args:
        settings: names the topics and the broker.
        limits: limits on batches, read already; None to read them at the start.
        on_lost_dead_letters: called with the number of dead letters that the broker refuses.
        options: more arguments of aiokafka's producer.

    Attributes:
        batch_bytes: the largest batch that it sends.
    """

    def __init__(
        self,
        settings: Settings,
        limits: MessageLimits | None = None,
        *,
        on_lost_dead_letters: Callable[[int], None] = lambda count: None,
        **options: Any,
    ) -> None:
        self._limits = limits or MessageLimits(settings)
        self._limits_are_read = limits is not None
        self.batch_bytes = self._limits.batch_bytes
        self._shrinking = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()
        self._scores_topic = settings.topic("scores")
        self._alerts_topic = settings.topic("alerts")
        self._dead_letter_topic = settings.topic("dead_letter")
        compression = settings.kafka_compression
        self._options: dict[str, Any] = (
            settings.kafka_client_options()
            | {
                "acks": "all",
                "enable_idempotence": True,
                "compression_type": None if compression == "none" else compression,
                "linger_ms": settings.kafka_linger_ms,
            }
            | options
        )
        self._producer: AIOKafkaProducer | None = None
        self._on_lost_dead_letters = on_lost_dead_letters
        # Set once the broker has refused a dead letter. aiokafka's idempotent producer counts it
        # nevertheless, so the broker would refuse its next records to that partition.
        self._dead_letter_producer: AIOKafkaProducer | None = None
        self._logged_at = -LOG_INTERVAL_SECONDS

    async def start(self) -> None:
        """Connect."""
        if not self._limits_are_read:
            await self._limits.read()
            self._limits_are_read = True
        self.batch_bytes = self._limits.batch_bytes
        self._producer = AIOKafkaProducer(**self._options, max_batch_size=self.batch_bytes)
        await self._producer.start()

    async def stop(self) -> None:
        """Flush and disconnect."""
        if self._producer is not None:
            await self._producer.stop()
        if self._dead_letter_producer is not None:
            await self._dead_letter_producer.stop()
        if self._closing:
            await asyncio.wait(self._closing)

    async def _shrink(self, refused: AIOKafkaProducer, refused_bytes: int) -> None:
        """Replace a producer whose batch was too large by one of smaller batches.

        The refused batch left a gap in a partition's sequence. The broker would refuse all later
        batches of the same producer.
        """
        async with self._shrinking:
            if id(self._producer) != id(refused):
                return  # replaced already: the broker refused several batches at once
            await self._limits.learn(refused_bytes)
            await self.start()
        task = asyncio.create_task(refused.stop())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def publish(
        self,
        scores: dict[int, Sequence[Outgoing]],
        alerts: Sequence[Outgoing],
        rejected: Sequence[Outgoing],
    ) -> dict[int, AppendResult]:
        """See :class:`Publisher`."""
        try:
            if not (alerts or rejected):  # almost always, so save the tasks
                return await self._append(scores)
            appended, *_ = await asyncio.gather(
                self._append(scores),
                self._send(self._alerts_topic, alerts),
                self._send_dead_letters(rejected),
            )
            return appended
        except KafkaError as error:
            raise PublishError(
                f"cannot publish ({type(error).__name__}); see the broker's log and the limits "
                "on message size and rights of its topics"
            ) from error

    async def _append(self, scores: dict[int, Sequence[Outgoing]]) -> dict[int, AppendResult]:
        """Append scores to several partitions concurrently, in order within each."""
        places: dict[int, list[tuple[int, int]]] = {partition: [] for partition in scores}
        rest = scores
        while rest:
            sender = self._sender()
            sent = [await self._send_batch(partition, rest[partition]) for partition in rest]
            acknowledged = await _all_of([delivery for _, delivery in sent])
            left = {}
            for partition, (size, _), metadata in zip(rest, sent, acknowledged, strict=True):
                if metadata is None:
                    size = 0
                else:
                    places[partition].append((metadata.offset, size))
                if size < len(rest[partition]):
                    left[partition] = rest[partition][size:]
            rest = left
            if None in acknowledged:
                await self._too_large(*sender)
        return {partition: _appended(found) for partition, found in places.items()}

    async def _send_batch(
        self, partition: int, records: Sequence[Outgoing]
    ) -> tuple[int, asyncio.Future[Any]]:
        """Send a batch of the first records; return their number and their delivery."""
        assert self._producer is not None
        now_ms = time.time_ns() // 1_000_000
        batch = self._producer.create_batch()
        # The batch's own append() costs as much again as its builder's.
        append = batch._builder.append
        size = 0
        for key, value, headers in records:
            if append(size, now_ms, key, value, [*headers]) is None:
                break
            size += 1
        batch._relative_offset = size
        batch.close()
        return size, await _queue(self._producer, batch, self._scores_topic, partition)

    async def _send(self, topic: str, records: Sequence[Outgoing]) -> None:
        """Send records one by one; the key chooses the partition."""
        rest = list(records)
        while rest:
            sender = self._sender()
            acknowledged = await _all_of([await self._send_one(topic, record) for record in rest])
            rest = [r for r, done in zip(rest, acknowledged, strict=True) if done is None]
            if rest:
                await self._too_large(*sender)

    def _sender(self) -> tuple[AIOKafkaProducer, int]:
        """Return the current producer and its batch size."""
        assert self._producer is not None
        return self._producer, self.batch_bytes

    async def _too_large(self, refused: AIOKafkaProducer, refused_bytes: int) -> None:
        """Handle records refused as too large; the caller may send them again afterwards."""
        await self._shrink(refused, refused_bytes)

    async def _send_dead_letters(self, dead_letters: Sequence[Outgoing]) -> None:
        """Send dead letters; a refused one does not stop the others.

        Raises:
            KafkaError: the broker is away.
        """
        rest = list(dead_letters)
        while rest and self._dead_letter_producer is None:
            sender = self._sender()
            outcomes = await asyncio.gather(
                *(self._deliver(self._dead_letter_topic, dead_letter) for dead_letter in rest),
                return_exceptions=True,
            )
            errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
            for error in errors:
                if not is_refusal(error):
                    raise error
            rest = [r for r, outcome in zip(rest, outcomes, strict=True) if outcome is not None]
            if not any(isinstance(error, TOO_LARGE) for error in errors):
                break
            try:
                await self._too_large(*sender)  # the next try cuts them to the new limit
            except RecurError:  # the topic accepts less than we require; some dead letters may fit
                break
        if rest:
            await self.send_dead_letters_separately(rest)

    async def _deliver(self, topic: str, record: Outgoing) -> None:
        await (await self._send_one(topic, record))

    async def send_dead_letters_separately(self, dead_letters: Sequence[Outgoing]) -> None:
        """Send dead letters one by one, so that the broker accepts or refuses each alone.

        A dead letter may be published twice after a failure.

        Raises:
            KafkaError: the broker is away.
        """
        if self._dead_letter_producer is None:
            options = self._options | {"enable_idempotence": False, "transactional_id": None}
            producer = AIOKafkaProducer(**options)
            try:
                await producer.start()
            except BaseException:
                await producer.stop()
                raise
            self._dead_letter_producer = producer
        refused = 0
        for dead_letter in dead_letters:
            try:
                cut = _cut(dead_letter, self._limits.record_bytes)
                await self._dead_letter_producer.send_and_wait(
                    self._dead_letter_topic,
                    value=cut.value,
                    key=cut.key,
                    headers=list(cut.headers),
                )
            except KafkaError as error:
                if not is_refusal(error):
                    raise
                refused += 1
                self._log_refused(dead_letter, error)
        if refused:
            self._on_lost_dead_letters(refused)

    def _log_refused(self, dead_letter: Outgoing, error: KafkaError) -> None:
        now = time.monotonic()
        if now - self._logged_at < LOG_INTERVAL_SECONDS:
            return
        self._logged_at = now
        headers = {name: value.decode() for name, value in dead_letter.headers}
        log.error(
            "the broker refused a dead letter, which is lost: see the limits, policies and rights"
            " of the dead-letter topic; recur_dead_letters_lost_total counts lost dead letters",
            extra={
                "dead_letter_topic": self._dead_letter_topic,
                "why": type(error).__name__,
                **{name: headers.get(name, "") for name in ("topic", "partition", "offset")},
            },
        )

    async def _send_one(self, topic: str, record: Outgoing) -> asyncio.Future[Any]:
        assert self._producer is not None
        if topic == self._dead_letter_topic:
            record = _cut(record, self._limits.record_bytes)
        headers = list(record.headers)
        if record.key is None and record.value is None:  # Kafka allows this, send() does not
            batch = self._producer.create_batch()
            batch.append(timestamp=None, key=None, value=None, headers=headers)
            batch.close()
            delivery: asyncio.Future[Any] = await self._producer.send_batch(
                batch, topic, partition=0
            )
            return delivery
        delivery = await self._producer.send(
            topic, value=record.value, key=record.key, headers=headers
        )
        return delivery


async def _queue(
    producer: AIOKafkaProducer, batch: Any, topic: str, partition: int
) -> asyncio.Future[Any]:
    """Queue a batch; return its delivery.

    While nothing is unusual this skips aiokafka's send_batch(), which reads the metadata twice and
    shields the delivery. With :func:`_settled` it saves 7 of 27 µs a batch.
    """
    queue = producer._message_accumulator
    transactions = producer._txn_manager
    place = TopicPartition(topic, partition)
    if (
        queue._closed
        or queue._exception is not None
        or place in queue._batches  # the batch before it waits
        or producer.client.cluster.leader_for_partition(place) is None
        or not (transactions.transactional_id is None or transactions.is_in_transaction())
    ):
        delivery: asyncio.Future[Any] = await producer.send_batch(batch, topic, partition=partition)
    else:
        delivery = queue._append_batch(batch, place).future
    return delivery


async def _all_of(deliveries: Sequence[asyncio.Future[Any]]) -> list[Any]:
    """Wait for deliveries; the result is None for a batch refused as too large.

    The broker also refuses all later batches of the same producer.

    Raises:
        KafkaError: the broker refused a batch for another reason.
    """
    await _settled(deliveries)
    errors = [delivery.exception() for delivery in deliveries]
    if not any(errors):
        return [delivery.result() for delivery in deliveries]
    again: tuple[type[BaseException], ...] = TOO_LARGE
    if any(isinstance(error, TOO_LARGE) for error in errors):
        again += (OutOfOrderSequenceNumber,)
    for error in errors:
        if error is not None and not isinstance(error, again):
            raise error
    return [
        None if error else delivery.result()
        for delivery, error in zip(deliveries, errors, strict=True)
    ]


async def _settled(deliveries: Sequence[asyncio.Future[Any]]) -> None:
    """Wait until each delivery has its result or error.

    Unlike asyncio.gather(), it makes no future of each, and a cancellation cancels none of them.
    """
    left = len(deliveries)
    settled = asyncio.get_running_loop().create_future()

    def settle(delivery: asyncio.Future[Any]) -> None:
        nonlocal left
        left -= 1
        if not delivery.cancelled():
            delivery.exception()  # mark it as seen, even if nobody waits any more
        if not left and not settled.done():
            settled.set_result(None)

    for delivery in deliveries:
        delivery.add_done_callback(settle)
    if deliveries:
        await settled


def _cut(dead_letter: Outgoing, limit: int) -> Outgoing:
    """Cut key and value of a dead letter so that a batch of ``limit`` bytes holds it."""
    key, value = dead_letter.key or b"", dead_letter.value or b""
    room = limit - OVERHEAD_BYTES
    room -= sum(len(name) + len(text) + OVERHEAD_BYTES for name, text in dead_letter.headers)
    if len(key) + len(value) <= room:
        return dead_letter
    room = max(0, room - len(CUT_HEADER) - OVERHEAD_BYTES)
    headers = dead_letter.headers
    if CUT_HEADER not in dict(headers):
        headers = (*headers, (CUT_HEADER, str(len(value)).encode()))
    key = key[: max(room // KEY_SHARE, room - len(value))]
    value = value[: max(0, room - len(key))]
    return Outgoing(dead_letter.key and key, dead_letter.value and value, headers)


def is_refusal(error: BaseException) -> bool:
    """Tell whether the broker refuses a record for good: sending it again does not help."""
    return isinstance(error, BrokerResponseError) and not error.retriable


def _appended(places: Sequence[tuple[int, int]]) -> AppendResult:
    """Combine batches, given the base offset and size of each.

    The offset is -1 if the broker had a retried batch already and does not tell where.
    """
    first = expected = places[0][0]
    for offset, size in places:
        if offset < 0 or offset != expected:  # another worker wrote between them
            return AppendResult(None, None)
        expected = offset + size
    return AppendResult(first, expected)
