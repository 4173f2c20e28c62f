"""aiokafka's fetcher, with a loop of its own for each broker while nothing unusual happens.

aiokafka makes several tasks for each fetch, and asks each partition twice what to do with it.
Here one task fetches from a broker, waits until the records are read, and fetches again. Whatever
is unusual ends the loop, and aiokafka's own code handles it: errors, lost connections, partitions
without a position or leader, older brokers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
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


class _Records(PartitionRecords):
    """The records of a partition as they are decoded, without a copy of each."""

    def _consumer_record(self, tp: TopicPartition, record: Any) -> Any:
        return record


class _Fetched(fetcher.FetchResult):  # type: ignore[misc]
    """Fetched records of a partition.

    Attributes:
        loop: the loop that fetched them.
    """

    loop: _Loop


class _Loop:
    """The loop of a broker, as the rest of the fetcher sees it.

    Attributes:
        has_moved: whether a partition was sent elsewhere, which ends the loop.
        has_ended: whether it has ended; records that it fetched may still be unread.
    """

    def __init__(self) -> None:
        self.has_moved = False
        self.has_ended = False
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
        moved: Collection[TopicPartition] = places
        while True:
            positions = {tp: assignment.state_value(tp).position for tp in moved}
            answer = await self._client.send(node_id, session.request(positions))
            if answer.error or loop.has_moved or not assignment.active:
                return  # the next loop begins with all partitions
            session.accept(answer)
            if any(part.error for part in answer.partitions):
                self._unusual.add(node_id)
                return
            moved = [part.place for part in answer.partitions if part.data]
            for part in answer.partitions:
                self._keep(assignment, part, session.offsets[part.place], loop)
            fetched_bytes = sum(len(part.data) for part in answer.partitions if part.data)
            while not self._may_fetch(moved, fetched_bytes):
                await loop.wait()
                if loop.has_moved:
                    return

    def _may_fetch(self, unread: Collection[TopicPartition], fetched_bytes: int) -> bool:
        """Tell whether these partitions are read, and a reader waits or fetching ahead pays."""
        if any(tp in self._records for tp in unread):
            return False
        return self._readers > 0 or fetched_bytes >= PREFETCH_BYTES

    def _keep(self, assignment: Any, part: FetchedPartition, offset: int, loop: _Loop) -> None:
        """Keep what was fetched of a partition until it is read."""
        state = assignment.state_value(part.place)
        state.highwater, state.lso = part.highwater, part.stable
        state.timestamp = int(time() * 1000)
        if not part.data:
            return
        self._records[part.place] = fetched = _Fetched(
            part.place,
            assignment=assignment,
            partition_records=_Records(
                part.place, BoundedRecords(part.data), part.aborted, offset, None, None,
                self._check_crcs, self._isolation_level,
            ),
            backoff=self._prefetch_backoff,
        )  # fmt: skip
        fetched.loop = loop
        for waiter in self._fetch_waiters:
            self._notify(waiter)

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

        aiokafka does not fetch from a broker while records of it are unread.
        """
        if isinstance(fetched, _Fetched) and not fetched.loop.has_ended:
            fetched.loop.wake()
        else:
            self._notify(self._wait_consume_future)

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
