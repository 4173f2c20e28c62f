"""Publishing scores, alerts and rejected records; each micro-batch is acknowledged whole.

A score goes to its source's partition number, in batches that are built at once. The
acknowledged base offset tells whether anybody else wrote to the scores partition meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from aiokafka import AIOKafkaProducer
from aiokafka.errors import BrokerResponseError, KafkaError, OutOfOrderSequenceNumber

from pipeline.errors import RecurError
from pipeline.kafka.message_limits import TOO_LARGE, MessageLimits
from pipeline.settings import Settings

LETTER_KEY_SHARE = 4
"""Of a dead letter that has to be cut its key keeps such a part of the bytes."""

OVERHEAD_BYTES = 128
"""What a batch of one record has besides key, value and headers, and more; and for each header."""

CUT_HEADER = "truncated"
"""Tells how long the value of a dead letter was that had to be cut."""

TELL_SECONDS = 60.0
"""Between two lines about dead letters that are refused."""

log = logging.getLogger(__name__)


class PublishError(RecurError):
    """The broker does not take what must be published; the process has to end."""


class Outgoing(NamedTuple):
    """A record to publish. ``key`` decides the partition where none is named."""

    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True)
class AppendResult:
    """Where a partition's scores went, without gaps; both are None where that is not known."""

    first: int | None
    next: int | None


class Said(NamedTuple):
    """All that is said of a partition's part of a micro-batch.

    Attributes:
        scores, alerts, rejected: what to publish.
        next_offset: what the group's offset becomes with it.
        tenure: what :meth:`Transactions.take` gave.
    """

    scores: Sequence[Outgoing]
    alerts: Sequence[Outgoing]
    rejected: Sequence[Outgoing]
    next_offset: int
    tenure: int


class Publisher(Protocol):
    """What the processor needs of a producer."""

    async def publish(
        self,
        scores: dict[int, Sequence[Outgoing]],
        alerts: Sequence[Outgoing],
        rejected: Sequence[Outgoing],
    ) -> dict[int, AppendResult]:
        """Publish all and return once all replicas have them (acks=all).

        Args:
            scores: by partition of the scores topic, in order.

        Returns:
            where each partition's scores went.

        Raises:
            PublishError: it cannot be done.
        """


class Transactions(Protocol):
    """What the processor needs of producers whose output and offsets are committed together.

    Whoever takes a partition ends what others, or itself before, have open there: from then on
    nothing is committed under an older tenure, and all that was stands.
    """

    async def take(self, partition: int) -> int:
        """Become the only one who commits anything of the partition; the tenure.

        Raises:
            LogUnavailableError: the broker does not answer.
            PublishError: it refuses.
        """

    async def commit(self, said: Mapping[int, Said]) -> dict[int, AppendResult | None]:
        """Commit all of each partition, offset included, or nothing of it.

        Returns:
            where the scores of each partition went, None for one without scores. A partition
            that somebody has taken since is not in it: nothing of it is committed by us.

        Raises:
            PublishError: it cannot be done.
        """


class KafkaProducer:
    """Publishes with one idempotent producer.

    Args:
        settings: names the topics and the broker.
        limits: of its topics' batches, read already; None to read them at the start.
        on_lost_letters: called with how many dead letters the broker refuses.
        options: more arguments of aiokafka's producer.

    Attributes:
        batch_bytes: the largest batch that it sends.
    """

    def __init__(
        self,
        settings: Settings,
        limits: MessageLimits | None = None,
        *,
        on_lost_letters: Callable[[int], None] = lambda count: None,
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
            }
            | options
        )
        self._producer: AIOKafkaProducer | None = None
        self._on_lost_letters = on_lost_letters
        # Once the broker has refused a letter: aiokafka's idempotent producer counts it all the
        # same, and the broker then refuses whatever it sends to that partition.
        self._letters_producer: AIOKafkaProducer | None = None
        self._told_at = -TELL_SECONDS

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
        if self._letters_producer is not None:
            await self._letters_producer.stop()
        if self._closing:
            await asyncio.wait(self._closing)

    async def _shrink(self, refused: AIOKafkaProducer, refused_bytes: int) -> None:
        """A batch was too large: go on with a producer of smaller ones.

        The one that was refused has left a gap in a partition's sequence, which the broker holds
        against whatever it sends there.
        """
        async with self._shrinking:
            if id(self._producer) != id(refused):
                return  # done already: several batches were refused at once
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
            if not (alerts or rejected):  # almost always: no tasks are made
                return await self._append(scores)
            appended, *_ = await asyncio.gather(
                self._append(scores),
                self._send(self._alerts_topic, alerts),
                self._send_letters(rejected),
            )
            return appended
        except KafkaError as error:
            raise PublishError(
                f"cannot publish ({type(error).__name__}); see the broker's log and the limits "
                "on message size and rights of its topics"
            ) from error

    async def _append(self, scores: dict[int, Sequence[Outgoing]]) -> dict[int, AppendResult]:
        """Append to scores partitions, in order in each of them, side by side."""
        places: dict[int, list[tuple[int | None, int]]] = {partition: [] for partition in scores}
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
                    places[partition].append((_known(metadata.offset), size))
                if size < len(rest[partition]):
                    left[partition] = rest[partition][size:]
            rest = left
            if None in acknowledged:
                await self._too_large(*sender)
        return {partition: _appended(found) for partition, found in places.items()}

    async def _send_batch(
        self, partition: int, records: Sequence[Outgoing]
    ) -> tuple[int, asyncio.Future[Any]]:
        """Send as many of the records as one batch takes: how many, and their delivery."""
        assert self._producer is not None
        now_ms = time.time_ns() // 1_000_000
        batch = self._producer.create_batch()
        size = 0
        for record in records:
            headers = list(record.headers)
            if not batch.append(
                timestamp=now_ms, key=record.key, value=record.value, headers=headers
            ):
                break
            size += 1
        batch.close()
        return size, await self._producer.send_batch(batch, self._scores_topic, partition=partition)

    async def _send(self, topic: str, records: Sequence[Outgoing]) -> None:
        """Send records one by one; the key decides the partition."""
        rest = list(records)
        while rest:
            sender = self._sender()
            acknowledged = await _all_of([await self._send_one(topic, record) for record in rest])
            rest = [r for r, done in zip(rest, acknowledged, strict=True) if done is None]
            if rest:
                await self._too_large(*sender)

    def _sender(self) -> tuple[AIOKafkaProducer, int]:
        """Who sends now, and batches of what size."""
        assert self._producer is not None
        return self._producer, self.batch_bytes

    async def _too_large(self, refused: AIOKafkaProducer, refused_bytes: int) -> None:
        """Some of what was sent is refused as too large; when this returns it may be sent again."""
        await self._shrink(refused, refused_bytes)

    async def _send_letters(self, letters: Sequence[Outgoing]) -> None:
        """Send dead letters; one that the broker refuses stops nothing.

        Raises:
            KafkaError: the broker is away.
        """
        rest = list(letters)
        while rest and self._letters_producer is None:
            sender = self._sender()
            said = await asyncio.gather(
                *(self._deliver(self._dead_letter_topic, letter) for letter in rest),
                return_exceptions=True,
            )
            errors = [outcome for outcome in said if isinstance(outcome, BaseException)]
            for error in errors:
                if not is_refusal(error):
                    raise error
            rest = [r for r, outcome in zip(rest, said, strict=True) if outcome is not None]
            if not any(isinstance(error, TOO_LARGE) for error in errors):
                break
            try:
                await self._too_large(*sender)  # they are cut to what is taken now
            except RecurError:  # the topic takes less than we ask for: some may fit all the same
                break
        if rest:
            await self.send_letters_apart(rest)

    async def _deliver(self, topic: str, record: Outgoing) -> None:
        await (await self._send_one(topic, record))

    async def send_letters_apart(self, letters: Sequence[Outgoing]) -> None:
        """Send dead letters one by one, so that each is taken or refused for itself.

        A letter may be there twice after a failure.

        Raises:
            KafkaError: the broker is away.
        """
        if self._letters_producer is None:
            options = self._options | {"enable_idempotence": False, "transactional_id": None}
            producer = AIOKafkaProducer(**options)
            try:
                await producer.start()
            except BaseException:
                await producer.stop()
                raise
            self._letters_producer = producer
        refused = 0
        for letter in letters:
            try:
                cut = _cut(letter, self._limits.record_bytes)
                await self._letters_producer.send_and_wait(
                    self._dead_letter_topic,
                    value=cut.value,
                    key=cut.key,
                    headers=list(cut.headers),
                )
            except KafkaError as error:
                if not is_refusal(error):
                    raise
                refused += 1
                self._tell_refused(letter, error)
        if refused:
            self._on_lost_letters(refused)

    def _tell_refused(self, letter: Outgoing, error: KafkaError) -> None:
        now = time.monotonic()
        if now - self._told_at < TELL_SECONDS:
            return
        self._told_at = now
        headers = {name: value.decode() for name, value in letter.headers}
        log.error(
            "the broker refuses a dead letter, which is lost: see the limits, policies and rights"
            " of the dead-letter topic; recur_letters_lost_total counts",
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
        if record.key is None and record.value is None:  # send() refuses what Kafka allows
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


async def _all_of(deliveries: Sequence[asyncio.Future[Any]]) -> list[Any]:
    """What the broker said of each; None where it refused a batch as too large.

    So it does with what the same producer sent after that one.

    Raises:
        KafkaError: it refused one for another reason.
    """
    said = await asyncio.gather(*deliveries, return_exceptions=True)
    again: tuple[type[BaseException], ...] = TOO_LARGE
    if any(isinstance(outcome, TOO_LARGE) for outcome in said):
        again += (OutOfOrderSequenceNumber,)
    for outcome in said:
        if isinstance(outcome, BaseException) and not isinstance(outcome, again):
            raise outcome
    return [None if isinstance(outcome, BaseException) else outcome for outcome in said]


def _cut(letter: Outgoing, limit: int) -> Outgoing:
    """A dead letter that a batch of ``limit`` bytes holds; its headers are never cut."""
    key, value = letter.key or b"", letter.value or b""
    room = limit - OVERHEAD_BYTES
    room -= sum(len(name) + len(text) + OVERHEAD_BYTES for name, text in letter.headers)
    if len(key) + len(value) <= room:
        return letter
    room = max(0, room - len(CUT_HEADER) - OVERHEAD_BYTES)
    headers = letter.headers
    if CUT_HEADER not in dict(headers):
        headers = (*headers, (CUT_HEADER, str(len(value)).encode()))
    key = key[: max(room // LETTER_KEY_SHARE, room - len(value))]
    value = value[: max(0, room - len(key))]
    return Outgoing(letter.key and key, letter.value and value, headers)


def is_refusal(error: BaseException) -> bool:
    """Whether the broker refuses a record for what it is: sending it again does not help."""
    return isinstance(error, BrokerResponseError) and not error.retriable


def _appended(places: Sequence[tuple[int | None, int]]) -> AppendResult:
    """Where batches went, given base offset and size of each."""
    (first, _), *_ = places
    expected = first
    for offset, size in places:
        if offset is None or offset != expected:  # another wrote between them
            return AppendResult(None, None)
        expected = offset + size
    return AppendResult(first, expected)


def _known(offset: int) -> int | None:
    """None for the -1 of a retried batch that the broker had already."""
    return offset if offset >= 0 else None
