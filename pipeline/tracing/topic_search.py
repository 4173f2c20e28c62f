"""Search of topics for single records: from the end backwards, or from a time onwards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from pipeline.errors import RecurError
from pipeline.kafka.topics import partition_count
from pipeline.settings import Settings

STALL_SECONDS = 15.0
"""Longest time without progress."""

FETCH_WAIT_MS = 200

FETCH_BYTES = 2 * 1024 * 1024
"""Bytes of a partition in one fetch."""

FIRST_WINDOW_MS = 60_000
"""Time before now that is searched first; each further window is four times as long."""

WINDOW_GROWTH = 4

FOUND_MAX = 100
"""Most records that one search returns."""

Matches = Callable[[Any], bool]
"""Test of a record."""

Report = Callable[[str, int, float], None]
"""Receiver of progress: topic, number of records read, fraction of those to read at most."""


class TopicSearch:
    """A consumer that looks for records in whole topics; an async context manager.

    Args:
        settings: names the broker.
        report: gets the progress.
    """

    def __init__(self, settings: Settings, report: Report = lambda *_: None) -> None:
        self._settings = settings
        self._report = report
        self._consumer: AIOKafkaConsumer | None = None
        self._counts: dict[str, int] = {}

    async def __aenter__(self) -> TopicSearch:
        self._consumer = AIOKafkaConsumer(
            **self._settings.kafka_client_options(),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            max_partition_fetch_bytes=FETCH_BYTES,
        )
        try:
            with self._errors_of("the topics"):
                await self._consumer.start()
        except BaseException:
            await self._consumer.stop()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._consumer is not None
        await self._consumer.stop()

    async def partitions(self, topic: str) -> int:
        """Count the partitions of a topic; 0 if it does not exist.

        Raises:
            RecurError: the broker does not answer.
        """
        if topic not in self._counts:
            self._counts[topic] = await partition_count(self._settings, topic) or 0
        return self._counts[topic]

    async def newest(
        self,
        topic: str,
        matches: Matches,
        *,
        since_ms: int,
        now_ms: int,
        partitions: Collection[int] | None = None,
    ) -> list[Any]:
        """Search backwards, in windows of time that grow.

        Args:
            topic: its full name.
            matches: tells the wanted records.
            since_ms: records before this time are not searched, epoch milliseconds.
            now_ms: the time now.
            partitions: where to search; None for all.

        Returns:
            the records of the newest window that has any, oldest first.

        Raises:
            RecurError: the broker does not answer.
        """
        assert self._consumer is not None
        places = await self._places(topic, partitions)
        if not places:
            return []
        with self._errors_of(topic):
            ends = dict(await self._consumer.end_offsets(places))
            first = await self._first_at(ends, since_ms)
            total = sum(ends[place] - first[place] for place in places)
            done, span_ms, start_ms = 0, FIRST_WINDOW_MS, now_ms
            while any(first[place] < ends[place] for place in places):
                start_ms -= span_ms
                span_ms *= WINDOW_GROWTH
                starts = first if start_ms <= since_ms else await self._first_at(ends, start_ms)
                ranges = {
                    place: (max(starts[place], first[place]), ends[place]) for place in places
                }
                found = await self._scan(topic, ranges, matches, done, total)
                if found:
                    return sorted(found, key=lambda record: int(record.timestamp))
                done += sum(end - start for start, end in ranges.values())
                ends = {place: start for place, (start, _) in ranges.items()}
        return []

    async def since(
        self, topic: str, matches: Matches, *, since_ms: int, first_only: bool = True
    ) -> list[Any]:
        """Search onwards from a time to the present end of a topic.

        Args:
            topic: its full name.
            matches: tells the wanted records.
            since_ms: time of the first record to search, epoch milliseconds.
            first_only: stop as soon as one is found.

        Raises:
            RecurError: the broker does not answer.
        """
        assert self._consumer is not None
        places = await self._places(topic, None)
        if not places:
            return []
        with self._errors_of(topic):
            ends = dict(await self._consumer.end_offsets(places))
            starts = await self._first_at(ends, since_ms)
            ranges = {place: (starts[place], ends[place]) for place in places}
            total = sum(end - start for start, end in ranges.values())
            found = await self._scan(topic, ranges, matches, 0, total, first_only=first_only)
        return sorted(found, key=lambda record: int(record.timestamp))

    async def at(self, topic: str, partition: int, offset: int) -> Any | None:
        """Read the record at an offset; None if the topic does not have it any more.

        Raises:
            RecurError: the broker does not answer.
        """
        assert self._consumer is not None
        if partition >= await self.partitions(topic):
            return None
        place = TopicPartition(topic, partition)
        with self._errors_of(topic):
            begin = (await self._consumer.beginning_offsets([place]))[place]
            end = (await self._consumer.end_offsets([place]))[place]
            if not begin <= offset < end:
                return None
            ranges = {place: (offset, offset + 1)}
            found = await self._scan(topic, ranges, lambda record: True, 0, 1)
        return found[0] if found else None

    async def _places(self, topic: str, partitions: Collection[int] | None) -> list[TopicPartition]:
        count = await self.partitions(topic)
        return [
            TopicPartition(topic, number)
            for number in range(count)
            if partitions is None or number in partitions
        ]

    async def _first_at(
        self, ends: dict[TopicPartition, int], time_ms: int
    ) -> dict[TopicPartition, int]:
        """Return the first offset at this time or later of each partition, at most its end."""
        assert self._consumer is not None
        times = dict.fromkeys(ends, max(0, time_ms))
        found = await self._consumer.offsets_for_times(times)
        return {
            place: end if found.get(place) is None else min(end, int(found[place].offset))
            for place, end in ends.items()
        }

    async def _scan(
        self,
        topic: str,
        ranges: dict[TopicPartition, tuple[int, int]],
        matches: Matches,
        done: int,
        total: int,
        *,
        first_only: bool = False,
    ) -> list[Any]:
        """Read the offsets [start, end) of each partition; return :data:`FOUND_MAX` at most."""
        consumer = self._consumer
        assert consumer is not None
        left = {place: range_ for place, range_ in ranges.items() if range_[0] < range_[1]}
        if not left:
            return []
        found: list[Any] = []
        reached = {place: start for place, (start, _) in left.items()}
        before = sum(reached.values())
        until = monotonic() + STALL_SECONDS
        consumer.assign(list(left))
        try:
            for place, (start, _) in left.items():
                consumer.seek(place, start)
            while left and len(found) < FOUND_MAX and not (first_only and found):
                fetched = await consumer.getmany(*left, timeout_ms=FETCH_WAIT_MS)
                for place, records in fetched.items():
                    end = left[place][1]
                    found += [r for r in records if r.offset < end and matches(r)]
                progressed = False
                for place in list(left):
                    # position() also passes transaction markers and aborted records.
                    position = await consumer.position(place)
                    progressed |= position > reached[place]
                    reached[place] = position
                    if position >= left[place][1]:
                        del left[place]
                        consumer.pause(place)
                read = done + sum(reached.values()) - before
                self._report(topic, read, min(1.0, read / max(1, total)))
                if progressed:
                    until = monotonic() + STALL_SECONDS
                elif monotonic() > until:
                    raise self._away(topic, f"nothing within {STALL_SECONDS:g} s")
        finally:
            consumer.unsubscribe()
        return found[:FOUND_MAX]

    @contextmanager
    def _errors_of(self, topic: str) -> Iterator[None]:
        """Turn the client's errors into one that says what to do."""
        try:
            yield
        except (KafkaError, OSError) as error:
            raise self._away(topic, f"{type(error).__name__}: {error}") from error

    def _away(self, topic: str, why: str) -> RecurError:
        return RecurError(
            f"cannot read {topic} at {self._settings.kafka_bootstrap_servers} ({why}): see that the"
            " broker is up and that this user may read the topic"
        )
