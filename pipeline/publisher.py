"""Publishing scores, alerts and rejected records; each micro-batch is acknowledged whole.

A score goes to its source's partition number, in batches that are built at once. The
acknowledged base offset tells whether anybody else wrote to the scores partition meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from pipeline.errors import RecurError
from pipeline.settings import Settings

PRODUCE_BATCH_BYTES = 512 * 1024
"""Largest batch of records; under the broker's default limit of 1 MiB."""


class PublishError(RecurError):
    """The broker does not take what must be published; the process has to end."""


class Outgoing(NamedTuple):
    """A record to publish. ``key`` decides the partition where none is named."""

    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True)
class Appended:
    """Where a partition's scores went, without gaps; both are None where that is not known."""

    first: int | None
    next: int | None


class Publisher(Protocol):
    """What the processor needs of a producer."""

    async def publish(
        self,
        scores: dict[int, Sequence[Outgoing]],
        alerts: Sequence[Outgoing],
        rejected: Sequence[Outgoing],
    ) -> dict[int, Appended]:
        """Publish all and return once all replicas have them (acks=all).

        Args:
            scores: by partition of the scores topic, in order.

        Returns:
            where each partition's scores went.

        Raises:
            PublishError: it cannot be done.
        """


class KafkaPublisher:
    """Publishes with one idempotent producer.

    Args:
        settings: names the topics and the broker.
    """

    def __init__(self, settings: Settings) -> None:
        self._scores_topic = settings.topic("scores")
        self._alerts_topic = settings.topic("alerts")
        self._dead_letter_topic = settings.topic("dead_letter")
        compression = settings.kafka_compression
        self._options: dict[str, Any] = settings.kafka_client_options() | {
            "acks": "all",
            "enable_idempotence": True,
            "max_batch_size": PRODUCE_BATCH_BYTES,
            "compression_type": None if compression == "none" else compression,
        }
        self._producer: AIOKafkaProducer | None = None

    async def start(self) -> None:
        """Connect."""
        self._producer = AIOKafkaProducer(**self._options)
        await self._producer.start()

    async def stop(self) -> None:
        """Flush and disconnect."""
        if self._producer is not None:
            await self._producer.stop()

    async def publish(
        self,
        scores: dict[int, Sequence[Outgoing]],
        alerts: Sequence[Outgoing],
        rejected: Sequence[Outgoing],
    ) -> dict[int, Appended]:
        """See :class:`Publisher`."""
        try:
            if not (alerts or rejected):  # almost always: no tasks are made
                return await self._append(scores)
            appended, *_ = await asyncio.gather(
                self._append(scores),
                self._send(self._alerts_topic, alerts),
                self._send(self._dead_letter_topic, rejected),
            )
            return appended
        except KafkaError as error:
            raise PublishError(
                f"cannot publish ({type(error).__name__}); see the broker's log and the limits "
                "on message size and rights of its topics"
            ) from error

    async def _append(self, scores: dict[int, Sequence[Outgoing]]) -> dict[int, Appended]:
        """Append to scores partitions, in order in each of them, side by side."""
        places: dict[int, list[tuple[int | None, int]]] = {partition: [] for partition in scores}
        rest = scores
        while rest:
            sent = [await self._send_batch(partition, rest[partition]) for partition in rest]
            acknowledged = await asyncio.gather(*(delivery for _, delivery in sent))
            for partition, (size, _), metadata in zip(rest, sent, acknowledged, strict=True):
                places[partition].append((_known(metadata.offset), size))
            rest = {
                partition: rest[partition][size:]
                for partition, (size, _) in zip(rest, sent, strict=True)
                if size < len(rest[partition])
            }
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
        sent = [await self._send_one(topic, record) for record in records]
        if sent:
            await asyncio.gather(*sent)

    async def _send_one(self, topic: str, record: Outgoing) -> asyncio.Future[Any]:
        assert self._producer is not None
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


def _appended(places: Sequence[tuple[int | None, int]]) -> Appended:
    """Where batches went, given base offset and size of each."""
    (first, _), *_ = places
    expected = first
    for offset, size in places:
        if offset is None or offset != expected:  # another wrote between them
            return Appended(None, None)
        expected = offset + size
    return Appended(first, expected)


def _known(offset: int) -> int | None:
    """None for the -1 of a retried batch that the broker had already."""
    return offset if offset >= 0 else None
