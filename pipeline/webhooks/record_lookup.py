"""Read single records by their coordinates: alerts to retry, and transactions of alerts."""

from __future__ import annotations

import asyncio
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError, OffsetOutOfRangeError

from pipeline.errors import RecurError
from pipeline.settings import Settings

LOOKUP_SECONDS = 10.0
"""Longest wait for a record."""

FETCH_BYTES = 64 * 1024


class LookupFailedError(RecurError):
    """The broker did not answer; the record may be read later."""


class RecordLookup:
    """Reader of single records, without a consumer group.

    Args:
        settings: name the broker.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = asyncio.Lock()
        self._consumer: AIOKafkaConsumer | None = None

    async def start(self) -> None:
        """Connect.

        Raises:
            KafkaError: the broker does not answer.
        """
        self._consumer = AIOKafkaConsumer(
            **self._settings.kafka_client_options(),
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            max_partition_fetch_bytes=FETCH_BYTES,
        )
        await self._consumer.start()

    async def stop(self) -> None:
        """Disconnect."""
        if self._consumer is not None:
            await self._consumer.stop()

    async def read(self, topic: str, partition: int, offset: int) -> Any | None:
        """Return the record at an offset; None if the log no longer has it.

        Raises:
            LookupFailedError: the broker does not answer.
        """
        assert self._consumer is not None
        place = TopicPartition(topic, partition)
        async with self._lock:
            try:
                async with asyncio.timeout(LOOKUP_SECONDS):
                    ends = await self._consumer.end_offsets([place])
                    if offset >= ends[place]:
                        return None  # of a topic that was made again; others must not wait
                    self._consumer.assign([place])
                    self._consumer.seek(place, offset)
                    record = await self._consumer.getone(place)
            except OffsetOutOfRangeError:
                return None
            except (KafkaError, OSError, TimeoutError) as error:
                raise LookupFailedError(
                    f"cannot read {topic}-{partition} at offset {offset} ({type(error).__name__}):"
                    " see that the broker is up"
                ) from error
        return record if record.offset == offset else None

    async def check(self, topic: str) -> None:
        """Ask the broker for the end of a topic's first partition.

        Raises:
            LookupFailedError: it does not answer.
        """
        assert self._consumer is not None
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                await self._consumer.end_offsets([TopicPartition(topic, 0)])
        except (KafkaError, OSError, TimeoutError) as error:
            raise LookupFailedError(
                f"the broker does not answer: {type(error).__name__}"
            ) from error
