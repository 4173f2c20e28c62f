"""Scores and alerts from Kafka, once each by id unless the reader dies; needs the extra ``kafka``.

Example: ``async with alerts("kafka:9092", "ops") as stream: async for alert in stream: ...``
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Collection, Coroutine
from typing import Any, Self, TypeVar

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import CommitFailedError

from recur_client.errors import RecurClientError

WINDOW_RECORDS = 10_000
"""Ids of a partition that are remembered, and records before the group's place read for them."""

COMMIT_SECONDS = 1.0
"""Longest time after which the group's place is saved while the stream is read."""

Result = TypeVar("Result")

_log = logging.getLogger(__name__)


class RecordError(RecurClientError):
    """A record is no score and no alert."""


class Stream(ConsumerRebalanceListener):  # type: ignore[misc]
    """Records of a topic, once each by their ``source``; use it with ``async with``.

    A record counts as done when the next one is asked for, when :meth:`save` is called, or when the
    block ends without an error. If the block ends with an error, the last record comes again.

    The place is saved every second. After the process is killed, or a partition goes to another
    member of the group, what was done since then comes again: no reader can do something elsewhere
    and save its place in one act. Do it so that a repetition of the ``source`` changes nothing, or
    call :meth:`save` after each record: then only the record in work comes again.

    Args:
        topic: name of the topic.
        bootstrap_servers: addresses of brokers, with commas between them.
        group: consumer group whose place is used and saved.
        since_ms: time, in ms since 1970, to begin at where the group has no place yet. Without it
            such a group begins with the first record.
        **options: more of aiokafka's consumer, such as ``security_protocol``.
    """

    def __init__(
        self,
        topic: str,
        bootstrap_servers: str,
        group: str,
        *,
        since_ms: int | None = None,
        **options: Any,
    ) -> None:
        self._topic, self._since_ms = topic, since_ms
        self._options = {
            **options,
            "bootstrap_servers": bootstrap_servers,
            "group_id": group,
            "enable_auto_commit": False,
            "auto_offset_reset": "earliest",
            "isolation_level": "read_committed",
        }
        self._consumer: Any = None
        self._begins: dict[TopicPartition, int] = {}
        self._done: dict[TopicPartition, int] = {}
        self._seen: dict[TopicPartition, dict[str, None]] = {}
        self._current: tuple[TopicPartition, int] | None = None
        self._saved = 0.0

    async def __aenter__(self) -> Self:
        """Join the group."""
        self._consumer = AIOKafkaConsumer(**self._options)
        await self._consumer.start()
        self._consumer.subscribe([self._topic], listener=self)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Save the place, and leave the group."""
        try:
            if kind is None:
                self._confirm()
            await self._save()
        finally:
            await self._consumer.stop()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> dict[str, Any]:
        """Return the next record; wait for it without end.

        Raises:
            RecordError: a record is no score and no alert.
        """
        self._confirm()
        while True:
            if self._done and time.monotonic() - self._saved >= COMMIT_SECONDS:
                await self._save()
            # Nothing is awaited between a record and its return: a call may be cancelled.
            found = await self._consumer.getmany(
                timeout_ms=int(COMMIT_SECONDS * 1000), max_records=1
            )
            for place, records in found.items():
                for record in records:
                    value = self._take(place, record)
                    if value is not None:
                        return value

    def _take(self, place: TopicPartition, record: ConsumerRecord) -> dict[str, Any] | None:
        """Decode a record; return None if it was seen, or is before the group's place."""
        begin = self._begins.get(place)
        if begin is None:  # aiokafka fetches before it is told where to begin
            return None
        try:
            value: dict[str, Any] = json.loads(record.value)
            source = str(value["source"])
        except (TypeError, KeyError, ValueError):
            where = f"{place.topic}:{place.partition}:{record.offset}"
            raise RecordError(f"{where} is no score and no alert") from None
        seen = self._seen.setdefault(place, {})
        is_new = source not in seen
        seen[source] = None
        if len(seen) > WINDOW_RECORDS:
            del seen[next(iter(seen))]
        if record.offset < begin or not is_new:
            return None
        self._current = place, record.offset
        return value

    def _confirm(self) -> None:
        """Count the record that was returned last as done."""
        if self._current is not None:
            place, offset = self._current
            self._done[place] = max(offset + 1, self._begins.get(place, 0))
            self._current = None

    async def save(self) -> None:
        """Count the record that was returned last as done, and save the place now."""
        self._confirm()
        await self._save()

    async def _save(self) -> None:
        """Save the place behind the records that are done."""
        self._saved = time.monotonic()
        mine = self._consumer.assignment()
        done = {place: offset for place, offset in self._done.items() if place in mine}
        self._done.clear()
        if not done:
            return
        try:
            await self._consumer.commit(done)
        except CommitFailedError:
            _log.warning("the group has new members: records of the last second may come again")

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Save the place before others take the partitions."""
        for place in revoked:
            self._begins.pop(place, None)
        await self._save()

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Find where to begin, and go back from there by the ids to remember."""
        if not assigned:
            return
        first = await self._consumer.beginning_offsets(assigned)
        for place in assigned:
            begin = await self._begin(place, first[place])
            self._begins[place] = begin
            self._done.pop(place, None)
            self._consumer.seek(place, max(first[place], begin - WINDOW_RECORDS))

    async def _begin(self, place: TopicPartition, first: int) -> int:
        saved: int | None = await self._consumer.committed(place)
        if saved is not None:
            if saved < first:
                _log.warning("records are deleted that the group has not read: %s", place)
            return max(saved, first)
        if self._since_ms is None:
            return first
        found = (await self._consumer.offsets_for_times({place: self._since_ms}))[place]
        if found is not None:
            return int(found.offset)
        return int((await self._consumer.end_offsets([place]))[place])


class Blocking:
    """A stream for code without coroutines; use it with ``with``.

    Its own thread keeps the place in the group while the caller is busy with a record.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        """Join the group."""
        self._thread.start()
        try:
            self._run(self._stream.__aenter__())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Save the place, and leave the group."""
        try:
            self._run(self._stream.__aexit__(kind))
        finally:
            self._end()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        """Return the next record; wait for it without end."""
        return self._run(self._stream.__anext__())

    def save(self) -> None:
        """Count the record that was returned last as done, and save the place now."""
        self._run(self._stream.save())

    def _run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:  # such as Ctrl+C while it waits
            future.cancel()
            raise

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def scores(
    bootstrap_servers: str,
    group: str,
    *,
    since_ms: int | None = None,
    topic: str = "scores",
    **options: Any,
) -> Stream:
    """Read each score once; the arguments are those of :class:`Stream`."""
    return Stream(topic, bootstrap_servers, group, since_ms=since_ms, **options)


def alerts(
    bootstrap_servers: str,
    group: str,
    *,
    since_ms: int | None = None,
    topic: str = "alerts",
    **options: Any,
) -> Stream:
    """Read each alert once; the arguments are those of :class:`Stream`."""
    return Stream(topic, bootstrap_servers, group, since_ms=since_ms, **options)
