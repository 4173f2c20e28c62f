"""Reads of single places in topics: one fetch request each, many at once.

A consumer reads partitions in order and holds a position. A gateway reads a score here and some
alerts there, for many callers at once, so each call is one request without a session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka import errors as kafka_errors
from aiokafka.errors import KafkaError

from pipeline.kafka.decompression_limit import BoundedRecords, PartitionRecords
from pipeline.kafka.fetch_session import NO_SESSION, FetchAnswer, FetchSession
from pipeline.kafka.polls import Bounds, LogUnavailableError
from pipeline.settings import Settings

READ_COMMITTED = 1
"""Isolation level: a score of an aborted Kafka transaction was never published."""

FETCH_BYTES = 1 << 20
"""Bytes of a partition in one fetch, unless the caller names fewer."""

RESPONSE_BYTES = 8 << 20
"""Bytes in the answer of one broker."""


@dataclass(frozen=True)
class Fetched:
    """Records of a partition.

    Attributes:
        records: in order, from the wanted offset on.
        next_offset: where to read on.
        end: the partition's stable end: no open transaction lies before it.
        highwater: the partition's end, with records of open transactions.
        is_out_of_range: the log no longer has the wanted offset, or not yet.
    """

    records: Sequence[Any]
    next_offset: int
    end: int
    highwater: int
    is_out_of_range: bool = False


class HeldBackError(LogUnavailableError):
    """An open Kafka transaction holds a record back: it is there soon, or it is aborted."""


class LogReader:
    """Reader of single places of topics; it belongs to no group.

    Args:
        settings: names the broker.
    """

    def __init__(self, settings: Settings) -> None:
        self._options: dict[str, Any] = settings.kafka_client_options() | {
            "isolation_level": "read_committed",
            "enable_auto_commit": False,
            "request_timeout_ms": 5_000,
            "retry_backoff_ms": 50,
        }
        self._consumer: AIOKafkaConsumer | None = None

    async def start(self, topics: Sequence[str]) -> None:
        """Connect, and learn the leaders of the topics' partitions.

        Raises:
            LogUnavailableError: the broker does not answer.
        """
        self._consumer = AIOKafkaConsumer(**self._options)
        try:
            await self._consumer.start()
            await self._client.set_topics(topics)
        except (KafkaError, OSError) as error:
            raise _away(error) from error

    async def stop(self) -> None:
        """Disconnect."""
        if self._consumer is not None:
            await self._consumer.stop()

    @property
    def _client(self) -> Any:
        assert self._consumer is not None
        return self._consumer._client  # noqa: SLF001 - as the rest of this room does

    def partitions(self, topic: str) -> int:
        """Return the number of partitions of a topic that :meth:`start` named."""
        return len(self._client.cluster.partitions_for_topic(topic) or ())

    async def fetch(
        self,
        positions: Mapping[TopicPartition, int],
        partition_bytes: int = FETCH_BYTES,
    ) -> dict[TopicPartition, Fetched]:
        """Read what stands at an offset of each partition now; it waits for no new record.

        Args:
            positions: the offset to read from, by partition.
            partition_bytes: most bytes of a partition; the first batch comes whole in any case.

        Raises:
            LogUnavailableError: a broker does not answer, or a partition has no leader now.
        """
        by_node: dict[int, dict[TopicPartition, int]] = {}
        for place, offset in positions.items():
            by_node.setdefault(self._leader(place), {})[place] = offset
        answers = await asyncio.gather(
            *(self._ask(node, part, partition_bytes) for node, part in by_node.items())
        )
        found: dict[TopicPartition, Fetched] = {}
        for answer in answers:
            for part in answer.partitions:
                found[part.place] = self._read(part, positions[part.place])
        return found

    async def record_at(self, topic: str, partition: int, offset: int) -> Any | None:
        """Return the record at an offset; None if the log does not have it.

        A commit is confirmed before the brokers show what it committed.

        Raises:
            HeldBackError: the record is not committed yet, or not shown yet.
            LogUnavailableError: see :meth:`fetch`.
        """
        place = TopicPartition(topic, partition)
        fetched = (await self.fetch({place: offset}, partition_bytes=1))[place]
        first = next(iter(fetched.records), None)
        if first is not None and first.offset == offset:
            return first
        if fetched.end <= offset < fetched.highwater:
            raise HeldBackError("an open transaction holds the record back")
        return None

    async def bounds(self, topic: str, partitions: Sequence[int]) -> dict[int, Bounds]:
        """Return begin and end of each partition.

        Raises:
            LogUnavailableError: the broker does not answer.
        """
        places = [TopicPartition(topic, partition) for partition in partitions]
        consumer = self._consumer
        assert consumer is not None
        try:
            begin, end = await asyncio.gather(
                consumer.beginning_offsets(places), consumer.end_offsets(places)
            )
        except (KafkaError, OSError) as error:
            raise _away(error) from error
        return {place.partition: Bounds(begin[place], end[place]) for place in places}

    async def offsets_at(
        self, topic: str, partitions: Sequence[int], time_ms: int
    ) -> dict[int, int | None]:
        """Return the first offset of a record at a time or later; None without one.

        Args:
            time_ms: CreateTime, epoch milliseconds.

        Raises:
            LogUnavailableError: the broker does not answer.
        """
        assert self._consumer is not None
        times = {TopicPartition(topic, partition): time_ms for partition in partitions}
        try:
            found = await self._consumer.offsets_for_times(times)
        except (KafkaError, OSError) as error:
            raise _away(error) from error
        return {
            place.partition: None if at is None else int(at.offset) for place, at in found.items()
        }

    def _leader(self, place: TopicPartition) -> int:
        leader = self._client.cluster.leader_for_partition(place)
        if leader is None or leader < 0:
            self._client.force_metadata_update()
            raise LogUnavailableError(f"{place.topic}-{place.partition} has no leader now")
        return int(leader)

    async def _ask(
        self, node: int, positions: Mapping[TopicPartition, int], partition_bytes: int
    ) -> FetchAnswer:
        session = FetchSession(
            wait_ms=0,
            min_bytes=0,
            max_bytes=RESPONSE_BYTES,
            isolation_level=READ_COMMITTED,
            partition_bytes=partition_bytes,
            epoch=NO_SESSION,
        )
        try:
            answer: FetchAnswer = await self._client.send(node, session.request(positions))
            if answer.error:
                raise kafka_errors.for_code(answer.error)()
        except (KafkaError, OSError) as error:
            self._client.force_metadata_update()
            raise _away(error) from error
        return answer

    def _read(self, part: Any, offset: int) -> Fetched:
        if part.error:
            error = kafka_errors.for_code(part.error)
            if error is kafka_errors.OffsetOutOfRangeError:
                return Fetched(
                    (), offset, max(part.stable, 0), part.highwater, is_out_of_range=True
                )
            self._client.force_metadata_update()
            raise _away(error())
        records = PartitionRecords(
            part.place, BoundedRecords(part.data), part.aborted, offset, None, None, True,
            READ_COMMITTED,
        )  # fmt: skip
        found = list(records) if part.data else []
        return Fetched(found, records.next_fetch_offset, part.stable, part.highwater)


def _away(error: BaseException) -> LogUnavailableError:
    return LogUnavailableError(f"{type(error).__name__}: {error}")
