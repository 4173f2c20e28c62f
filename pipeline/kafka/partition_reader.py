"""A reader of one partition from an offset on, for recomputing states and scores.

It belongs to no consumer group. It reads committed records alone, so scores of an aborted Kafka
transaction are left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, Protocol

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from pipeline.errors import RecurError
from pipeline.kafka.polls import Bounds
from pipeline.settings import Settings

STALL_SECONDS = 30.0
"""Longest time without progress: enough for a broker that is killed and restarted."""

FETCH_BYTES = 4 * 1024 * 1024
"""Bytes of a partition in one fetch. The client's default, 1 MiB, makes a third more requests."""

FETCH_WAIT_MS = 200


class PartitionReaderError(RecurError):
    """The broker did not answer. The message says what to do."""


class PartitionReader(Protocol):
    """A reader of a partition in order; an async context manager.

    Attributes:
        position: offset of the next record that it may return.
    """

    position: int

    async def __aenter__(self) -> PartitionReader: ...

    async def __aexit__(self, *error: object) -> None: ...

    async def bounds(self) -> Bounds:
        """Return the current bounds of the partition.

        Raises:
            PartitionReaderError: the broker does not answer.
        """

    async def first_at(self, time_ms: int) -> int | None:
        """Return the first offset of a record at this time or later; None without one.

        Args:
            time_ms: CreateTime, epoch milliseconds.

        Raises:
            PartitionReaderError: the broker does not answer.
        """

    def skip_to(self, offset: int) -> None:
        """Set the offset to read from. Call it before the first read."""

    async def read(self, end: int, most: int) -> list[Any]:
        """Return the next records before ``end``; an empty list once all are read.

        Args:
            end: offset of the first record that is not wanted.
            most: most records.

        Raises:
            PartitionReaderError: the broker does not answer.
        """


OpenReader = Callable[[str, int, int], PartitionReader]
"""Constructor of a reader: full name of a topic, partition, first offset."""


class KafkaPartitionReader:
    """A :class:`PartitionReader` with a consumer of its own.

    Args:
        settings: names the broker.
        topic: its full name.
        partition: its number.
        start: the first offset to read. A log that begins later is read from its begin.
    """

    def __init__(self, settings: Settings, topic: str, partition: int, start: int = 0) -> None:
        self.position = self._reached = start
        self._settings = settings
        self._place = TopicPartition(topic, partition)
        self._ahead: deque[Any] = deque()
        self._consumer: AIOKafkaConsumer | None = None

    async def __aenter__(self) -> KafkaPartitionReader:
        self._consumer = AIOKafkaConsumer(
            **self._settings.kafka_client_options(),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            max_partition_fetch_bytes=FETCH_BYTES,
        )
        try:
            await self._consumer.start()
            self._consumer.assign([self._place])
            self._consumer.seek(self._place, self.position)
        except (KafkaError, OSError) as error:
            await self._consumer.stop()
            raise self._away(error) from error
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._consumer is not None
        await self._consumer.stop()

    async def bounds(self) -> Bounds:
        """See :class:`PartitionReader`."""
        assert self._consumer is not None
        try:
            begin = await self._consumer.beginning_offsets([self._place])
            end = await self._consumer.end_offsets([self._place])
        except (KafkaError, OSError) as error:
            raise self._away(error) from error
        return Bounds(begin[self._place], end[self._place])

    async def first_at(self, time_ms: int) -> int | None:
        """See :class:`PartitionReader`."""
        assert self._consumer is not None
        try:
            found = await self._consumer.offsets_for_times({self._place: time_ms})
        except (KafkaError, OSError) as error:
            raise self._away(error) from error
        at = found[self._place]
        return None if at is None else int(at.offset)

    def skip_to(self, offset: int) -> None:
        """See :class:`PartitionReader`."""
        assert self._consumer is not None
        self.position = self._reached = offset
        self._consumer.seek(self._place, offset)

    async def read(self, end: int, most: int) -> list[Any]:
        """See :class:`PartitionReader`."""
        until = monotonic() + STALL_SECONDS
        while not self._ahead and self.position < end:
            assert self._consumer is not None
            try:
                fetched = await self._consumer.getmany(
                    self._place, timeout_ms=FETCH_WAIT_MS, max_records=most
                )
                # position() also passes transaction markers and aborted records.
                reached = await self._consumer.position(self._place)
            except (KafkaError, OSError) as error:
                raise self._away(error) from error
            self._ahead.extend(fetched.get(self._place, ()))
            if not self._ahead:
                if reached > self.position:
                    self.position, until = reached, monotonic() + STALL_SECONDS
                elif monotonic() > until:
                    raise self._away(TimeoutError(f"nothing within {STALL_SECONDS:g} s"))
                continue
            self.position = self._ahead[0].offset
            self._reached = reached
        records: list[Any] = []
        while self._ahead and self._ahead[0].offset < end and len(records) < most:
            records.append(self._ahead.popleft())
        if records:
            self.position = self._ahead[0].offset if self._ahead else self._reached
        return records

    def _away(self, error: BaseException) -> PartitionReaderError:
        topic, partition = self._place
        return PartitionReaderError(
            f"cannot read {topic}-{partition} at {self._settings.kafka_bootstrap_servers}"
            f" ({type(error).__name__}: {error}): see that the broker is up"
        )


def kafka_readers(settings: Settings) -> OpenReader:
    """Make readers of the broker that the settings name."""
    return partial(KafkaPartitionReader, settings)
