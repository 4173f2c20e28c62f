"""aiokafka's fetcher, with a loop of its own for each broker while nothing unusual happens.

aiokafka makes several tasks for each fetch, and asks each partition twice what to do with it.
Here one task fetches from a broker, waits until the records are read, and fetches again. Whatever
is unusual ends the loop, and aiokafka's own code handles it: errors, lost connections, partitions
without a position or leader, older brokers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from itertools import islice
from operator import attrgetter
from time import monotonic, time
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.consumer import fetcher
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from pipeline.kafka.decompression_limit import BoundedRecords, PartitionRecords
from pipeline.kafka.fetch_session import FetchedPartition, FetchSession, has_sessions

PREFETCH_BYTES = 64 << 10
"""Least size of an answer after which the next fetch starts before a reader waits for records.

A full log is fetched ahead. At live rates that would make small polls: the broker answers at once
with a few records, and those that come while the worker is busy have to wait for a further poll.
"""


_error_of = attrgetter("error")


class _Records(PartitionRecords):
    """The records of a partition as they are decoded, without a copy of each."""

    def _consumer_record(self, tp: TopicPartition, record: Any) -> Any:
        return record


class _Fetched(fetcher.FetchResult):  # type: ignore[misc]
    """Fetched records of a partition.

    Attributes:
        loop: the loop that fetched them.
        state: the partition's state in the assignment.
    """

    loop: _Loop
    state: Any
    _partition_records: Any

    def getall(self, max_records: int | None = None) -> list[Any]:
        """Return records that are not read yet.

        aiokafka looks the state up twice, and counts the records one by one: 0.1 µs each.
        """
        records, state = self._partition_records, self.state
        if records is None or state.paused or not self._assignment.active:
            return list(super().getall(max_records))
        if state.position != records.next_fetch_offset:
            return list(super().getall(max_records))  # it drops them
        found = list(islice(records._records_iterator, max_records))
        state.consumed_to(records.next_fetch_offset)
        if max_records is None or len(found) < max_records:
            self._partition_records = None
        return found


class _Loop:
    """The loop of a broker, as the rest of the fetcher sees it.

    Attributes:
        has_moved: whether a partition was sent elsewhere, which ends the loop.
        has_ended: whether it has ended; records that it fetched may still be unread.
        is_ahead: whether its last answer is large, so that it does not wait for a reader.
    """

    def __init__(self) -> None:
        self.has_moved = False
        self.has_ended = False
        self.is_ahead = False
        self._woken: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Wake the loop: records were read, a reader waits, or a partition was sent elsewhere."""
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def wait(self) -> None:
        """Wait until it is woken."""
        self._woken = asyncio.get_running_loop().create_future()
        await self._woken


class SteadyFetcher(fetcher.Fetcher):  # type: ignore[misc]
    """See the module. It fetches all assigned partitions; none of them may be paused."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._loops: dict[int, _Loop] = {}  # by broker
        # Brokers whose next fetch is aiokafka's own.
        self._unusual: set[int] = set()
        self._readers = 0  # how many wait for records
        super().__init__(*args, **options)

    async def _proc_fetch_request(self, assignment: Any, node_id: int, request: Any) -> bool:
        """Fetch from a broker as long as nothing is unusual; aiokafka starts this as a task."""
        places = [
            TopicPartition(topic, partition)
            for topic, partitions in request.topics
            for partition, *_ in partitions
        ]
        if node_id in self._unusual or not await self._is_usual(assignment, node_id, places):
            self._unusual.discard(node_id)
            return bool(await super()._proc_fetch_request(assignment, node_id, request))
        loop = self._loops[node_id] = _Loop()
        try:
            await self._fetch_steadily(assignment, node_id, places, loop)
        except KafkaError:
            self._unusual.add(node_id)  # aiokafka meets the error again, logs it, and waits
        except asyncio.CancelledError:
            pass  # as aiokafka does: the assignment is another one now
        finally:
            loop.has_ended = True
            del self._loops[node_id]
        return False

    async def _is_usual(
        self, assignment: Any, node_id: int, places: Collection[TopicPartition]
    ) -> bool:
        """Tell whether the request has all of the broker's partitions, and it knows sessions."""
        led = {
            tp for tp in assignment.tps if self._client.cluster.leader_for_partition(tp) == node_id
        }
        if led != set(places):
            return False
        try:
            connection = await self._client._get_conn(node_id)
        except asyncio.CancelledError:
            return False
        return connection is not None and has_sessions(connection._versions)

    async def _fetch_steadily(
        self, assignment: Any, node_id: int, places: Collection[TopicPartition], loop: _Loop
    ) -> None:
        """Fetch, wait until all is read and more is wanted, and repeat.

        Return when something is unusual.
        """
        session = FetchSession(
            wait_ms=self._fetch_max_wait_ms,
            min_bytes=self._fetch_min_bytes,
            max_bytes=self._fetch_max_bytes,
            isolation_level=self._isolation_level,
            partition_bytes=self._max_partition_fetch_bytes,
        )
        states = {tp: assignment.state_value(tp) for tp in places}
        moved: Collection[TopicPartition] = places
        while True:
            positions = {tp: states[tp].position for tp in moved}
            answer = await self._client.send(node_id, session.request(positions))
            if answer.error or loop.has_moved or not assignment.active:
                return  # the next loop begins with all partitions
            session.accept(answer)
            if any(map(_error_of, answer.partitions)):
                self._unusual.add(node_id)
                return
            now_ms, moved, fetched_bytes = int(time() * 1000), [], 0
            for part in answer.partitions:
                state = states[part.place]
                state.highwater, state.lso, state.timestamp = part.highwater, part.stable, now_ms
                if part.data:
                    fetched = self._keep(assignment, part, session.offsets[part.place])
                    fetched.loop, fetched.state = loop, state
                    moved.append(part.place)
                    fetched_bytes += len(part.data)
            if moved:
                for waiter in self._fetch_waiters:
                    self._notify(waiter)
            loop.is_ahead = fetched_bytes >= PREFETCH_BYTES
            while not self._may_fetch(moved, loop):
                await loop.wait()
                if loop.has_moved:
                    return

    def _may_fetch(self, unread: Collection[TopicPartition], loop: _Loop) -> bool:
        """Tell whether these partitions are read, and a reader waits or fetching ahead pays."""
        return (self._readers > 0 or loop.is_ahead) and self._records.keys().isdisjoint(unread)

    def _keep(self, assignment: Any, part: FetchedPartition, offset: int) -> _Fetched:
        """Keep what was fetched of a partition until it is read."""
        self._records[part.place] = fetched = _Fetched(
            part.place,
            assignment=assignment,
            partition_records=_Records(
                part.place, BoundedRecords(part.data), part.aborted, offset, None, None,
                self._check_crcs, self._isolation_level,
            ),
            backoff=self._prefetch_backoff,
        )  # fmt: skip
        return fetched

    async def fetched_records(
        self,
        partitions: Collection[TopicPartition],
        timeout: float = 0,  # noqa: ASYNC109 - aiokafka's signature
        max_records: int | None = None,
    ) -> dict[TopicPartition, list[Any]]:
        """Return fetched records; wait for some if there are none."""
        until = monotonic() + timeout
        while True:
            if self._subscriptions.reassignment_in_progress:
                await self._subscriptions.wait_for_assignment()
            found = self._read(partitions, max_records)
            left = until - monotonic()
            if found or left <= 0 or self._closed:
                return found
            waiter = self._create_fetch_waiter()
            timer = self._loop.call_later(left, self._notify, waiter)
            self._readers += 1
            for loop in self._loops.values():
                loop.wake()
            try:
                await waiter
            finally:
                self._readers -= 1
                timer.cancel()

    def _read(
        self, partitions: Collection[TopicPartition], max_records: int | None
    ) -> dict[TopicPartition, list[Any]]:
        """Take fetched records of these partitions.

        Raises:
            KafkaError: the broker refused one of them.
        """
        found: dict[TopicPartition, list[Any]] = {}
        room = max_records
        for tp in list(self._records):
            if partitions and tp not in partitions:
                if not self._subscriptions.is_assigned(tp):
                    del self._records[tp]
                continue
            fetched = self._records[tp]
            if not isinstance(fetched, fetcher.FetchResult):
                if found:
                    break  # the next call raises the error
                del self._records[tp]
                self._notify(self._wait_consume_future)
                fetched.check_raise()
            records = fetched.getall(room)
            if not fetched.has_more():
                del self._records[tp]
                self._was_read(fetched)
            if not records:
                continue
            found[tp] = records
            if room is not None:
                room -= len(records)
                if room <= 0:
                    break
        return found

    def _was_read(self, fetched: Any) -> None:
        """Wake what fetches on once records are read: their loop, or aiokafka after its end.

        A loop that waits for a reader too is not woken: the reader wakes it. aiokafka does not
        fetch from a broker while records of it are unread.
        """
        if not isinstance(fetched, _Fetched) or fetched.loop.has_ended:
            self._notify(self._wait_consume_future)
        elif self._readers > 0 or fetched.loop.is_ahead:
            fetched.loop.wake()

    def seek_to(self, tp: TopicPartition, offset: int) -> None:
        """Read a partition from another offset on."""
        super().seek_to(tp, offset)
        self._end_loops()

    def request_offset_reset(self, tps: Collection[TopicPartition], strategy: int) -> Any:
        """Read partitions from their begin or end on."""
        positioned = super().request_offset_reset(tps, strategy)
        self._end_loops()
        return positioned

    def _end_loops(self) -> None:
        for loop in self._loops.values():
            loop.has_moved = True
            loop.wake()


async def fetch_steadily(consumer: AIOKafkaConsumer) -> None:
    """Replace the fetcher of a consumer that has started and has no partitions yet."""
    old = consumer._fetcher
    await old.close()
    consumer._fetcher = SteadyFetcher(
        consumer._client,
        consumer._subscription,
        fetch_min_bytes=old._fetch_min_bytes,
        fetch_max_bytes=old._fetch_max_bytes,
        fetch_max_wait_ms=old._fetch_max_wait_ms,
        max_partition_fetch_bytes=old._max_partition_fetch_bytes,
        check_crcs=old._check_crcs,
        fetcher_timeout=old._fetcher_timeout,
        retry_backoff_ms=old._retry_backoff * 1000,
        auto_offset_reset=consumer._auto_offset_reset,
        isolation_level=consumer._isolation_level,
    )
