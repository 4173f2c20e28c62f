"""The scores topic as a write-ahead log of transactions that are not applied yet.

A worker that takes a partition reads its scores from the watermark's offset on, in step with the
transactions. It does not publish those scores again: a redelivered transaction has one score.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Protocol

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from pipeline.kafka.metadata_request import ask_ids
from pipeline.kafka.polls import Bounds, LogUnavailableError
from pipeline.messages.scores import (
    PublishedScore,
    decode_published,
    source_offset,
    source_prefix,
)
from pipeline.settings import Settings

READ_TIMEOUT_SECONDS = 5.0
"""Longest time without progress while scores are read."""

FETCH_WAIT_MS = 200
"""Longest wait of one fetch for records, milliseconds."""


@dataclass(frozen=True)
class LoggedScore:
    """A score in the scores topic: its record's bytes, and the part that recovery needs.

    Attributes:
        offset: its offset in its partition of the scores topic.
        is_recent: published while the reader owned the partition, so it is of the same log.
        others: later scores of the same offset, for transactions of another log.
    """

    value: bytes
    score: PublishedScore
    offset: int
    is_recent: bool = False
    others: tuple[LoggedScore, ...] = ()

    def of(self, transaction_id: str) -> LoggedScore | None:
        """Return the score of this transaction, or None."""
        for logged in (self, *self.others):
            if logged.is_recent or logged.score.transaction_id in (None, transaction_id):
                return logged
        return None

    def and_then(self, later: LoggedScore) -> LoggedScore:
        """Add a score that was published later."""
        found = self
        for other in (later, *later.others):
            if found.of(other.score.transaction_id or "") is None:
                found = replace(found, others=(*found.others, replace(other, others=())))
        return found

    def merchant_raw(self) -> tuple[float, ...] | None:
        """Return the merchant's features of the score, if its record has them all."""
        if self.score.features is None:
            return None
        found = msgspec.structs.astuple(self.score.features)
        return None if None in found else found


class ScoreLog(Protocol):
    """Access to the topics, besides polls, that the processor needs."""

    async def bounds(self, topic: str, partition: int) -> Bounds:
        """Return the current bounds of a partition.

        Raises:
            LogUnavailableError: the broker does not answer.
        """

    async def topic_id(self, topic: str) -> bytes | None:
        """Return a topic's current id, or None if the topic does not exist.

        Raises:
            LogUnavailableError: the broker does not answer.
        """

    async def read(
        self, partition: int, start: int, end: int, until_source: int
    ) -> tuple[dict[int, LoggedScore], int]:
        """Read scores in [start, end) of a scores partition.

        Stops at the end, or once it has read a source at or past ``until_source``.

        Returns:
            the first score of each transaction by its source offset, and the offset to read on
            from.

        Raises:
            LogUnavailableError: the broker does not answer.
        """


class KafkaScoreLog:
    """A score log with a consumer of its own that belongs to no group.

    Args:
        settings: names the topics and the broker.
    """

    def __init__(self, settings: Settings) -> None:
        self._topic = settings.topic("scores")
        self._source_topic = settings.topic("transactions")
        self._options: dict[str, Any] = settings.kafka_client_options() | {
            "isolation_level": "read_committed",  # an aborted score was never published
            "enable_auto_commit": False,
            "auto_offset_reset": "earliest",
        }
        self._consumer: AIOKafkaConsumer | None = None
        self._of_all: AIOKafkaConsumer | None = None
        self._one_at_a_time = asyncio.Lock()

    async def start(self) -> None:
        """Connect."""
        self._consumer = AIOKafkaConsumer(**self._options)
        await self._consumer.start()

    async def stop(self) -> None:
        """Disconnect."""
        if self._consumer is not None:
            await self._consumer.stop()
        if self._of_all is not None:
            await self._of_all.stop()

    async def bounds(self, topic: str, partition: int) -> Bounds:
        """See :class:`ScoreLog`."""
        place = TopicPartition(topic, partition)
        try:
            assert self._consumer is not None
            begin = await self._consumer.beginning_offsets([place])
            end = await self._consumer.end_offsets([place])
        except (KafkaError, OSError) as error:
            raise LogUnavailableError(f"{type(error).__name__}: {error}") from error
        return Bounds(begin[place], end[place])

    async def topic_id(self, topic: str) -> bytes | None:
        """See :class:`ScoreLog`."""
        return (await self.topic_ids([topic])).get(topic)

    async def topic_ids(self, topics: Sequence[str]) -> dict[str, bytes]:
        """Return the ids of the topics that exist.

        Raises:
            LogUnavailableError: the broker does not answer.
        """
        assert self._consumer is not None
        try:
            return await ask_ids(self._consumer._client, topics)
        except (KafkaError, OSError) as error:
            raise LogUnavailableError(f"{type(error).__name__}: {error}") from error

    async def ends(self, topic: str, partitions: list[int]) -> dict[int, int]:
        """Return the next offset of each partition.

        Raises:
            LogUnavailableError: the broker does not answer.
        """
        places = [TopicPartition(topic, partition) for partition in partitions]
        try:
            assert self._consumer is not None
            ends = await self._consumer.end_offsets(places)
        except (KafkaError, OSError) as error:
            raise LogUnavailableError(f"{type(error).__name__}: {error}") from error
        return {place.partition: end for place, end in ends.items()}

    async def high_watermarks(self, topic: str, partitions: list[int]) -> dict[int, int]:
        """Return the end of each partition, including records of open transactions.

        Raises:
            LogUnavailableError: the broker does not answer.
        """
        places = [TopicPartition(topic, partition) for partition in partitions]
        try:
            if self._of_all is None:  # a consumer has one isolation level
                consumer = AIOKafkaConsumer(
                    **self._options | {"isolation_level": "read_uncommitted"}
                )
                try:
                    await consumer.start()
                except BaseException:
                    await consumer.stop()
                    raise
                self._of_all = consumer
            ends = await self._of_all.end_offsets(places)
        except (KafkaError, OSError) as error:
            raise LogUnavailableError(f"{type(error).__name__}: {error}") from error
        return {place.partition: end for place, end in ends.items()}

    async def read(
        self, partition: int, start: int, end: int, until_source: int
    ) -> tuple[dict[int, LoggedScore], int]:
        """See :class:`ScoreLog`."""
        # An empty read would revoke its assignment at once, which ends aiokafka's fetcher.
        if start >= end:
            return {}, start
        async with self._one_at_a_time:  # calls share the consumer's assignment
            return await self._read(partition, start, end, until_source)

    async def last_values(self, topic: str, partition: int, count: int) -> list[bytes | None]:
        """Return the values of the last records of a partition, oldest first.

        Args:
            topic: its full name.
            partition: its number.
            count: most records.

        Raises:
            LogUnavailableError: the broker does not answer.
        """
        bounds = await self.bounds(topic, partition)
        start = max(bounds.begin, bounds.end - count)
        values: list[bytes | None] = []

        def take(records: list[Any]) -> bool:
            values.extend(record.value for record in records)
            return False

        if start < bounds.end:
            async with self._one_at_a_time:
                await self._scan(TopicPartition(topic, partition), start, bounds.end, take)
        return values

    async def _read(
        self, partition: int, start: int, end: int, until_source: int
    ) -> tuple[dict[int, LoggedScore], int]:
        prefix = source_prefix(self._source_topic, partition)
        logged: dict[int, LoggedScore] = {}

        def take(records: list[Any]) -> bool:
            for record in records:
                published = read_score(record.value, prefix, record.offset)
                if published is not None:
                    source, score = published
                    first = logged.setdefault(source, score)
                    if first is not score:
                        logged[source] = first.and_then(score)
            return bool(logged) and max(logged) >= until_source

        position = await self._scan(TopicPartition(self._topic, partition), start, end, take)
        return logged, position

    async def _scan(
        self, place: TopicPartition, start: int, end: int, take: Callable[[list[Any]], bool]
    ) -> int:
        """Pass the records in [start, end) to ``take`` until it returns True.

        Returns:
            the offset to read on from.
        """
        consumer = self._consumer
        assert consumer is not None
        position = start
        until = monotonic() + READ_TIMEOUT_SECONDS
        try:
            consumer.assign([place])
            consumer.seek(place, start)
            while position < end:
                fetched = await consumer.getmany(place, timeout_ms=FETCH_WAIT_MS)
                enough = take([r for r in fetched.get(place, []) if r.offset < end])
                # position() also passes transaction markers, which are no records.
                reached = await consumer.position(place)
                if reached > position:
                    until = monotonic() + READ_TIMEOUT_SECONDS
                elif monotonic() > until:
                    raise LogUnavailableError(
                        f"no answer for records from offset {position} within "
                        f"{READ_TIMEOUT_SECONDS:g} s"
                    )
                position = min(reached, end)
                if enough:
                    break
        except (KafkaError, OSError) as error:
            raise LogUnavailableError(f"{type(error).__name__}: {error}") from error
        finally:
            consumer.unsubscribe()
        return position


def read_score(value: bytes | None, prefix: str, place: int) -> tuple[int, LoggedScore] | None:
    """Decode source offset and score of a record; None if it is no score of this partition.

    Args:
        prefix: see :func:`pipeline.messages.scores.source_prefix`.
        place: the record's own offset.
    """
    score = decode_published(value)
    if value is None or score is None:
        return None
    offset = source_offset(score.source, prefix)
    return None if offset is None else (offset, LoggedScore(value, score, place))
