"""Faust transport that passes the agent one message per poll, not one per record.

Faust's own driver makes an event of each record, which costs more than scoring it. This
transport extends the aiokafka driver, and replaces the way from fetch to agent. All records that
one fetch returned of a topic travel as one :class:`Delivery` of a poll. It goes straight to the
topic's agent; Faust's conductor, channel and stream stay empty. At most
:data:`POLLS_IN_FLIGHT_MAX` polls of a topic are between fetch and ack. The next fetch waits for
room, so no partition is ever paused. A full log is prefetched while the agent works.

Fetched records are discarded only together with a seek to their begin. Faust finds the transport
by URLs that begin with ``poll://``.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from time import monotonic
from typing import Any, ClassVar, cast

from aiokafka.errors import KafkaError
from aiokafka.structs import OffsetAndMetadata
from faust.transport import drivers
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from mode import Service
from mode.threads import ServiceThread

from pipeline.kafka.decompression_limit import PollBudget
from pipeline.kafka.polls import Chunk, LogUnavailableError, Poll
from pipeline.kafka.steady_fetcher import fetch_steadily
from pipeline.topic_id import LogOffset, commit_metadata, committed_offset

log = logging.getLogger(__name__)

URL_SCHEME = "poll"
POLLS_IN_FLIGHT_MAX = 2
"""Most polls of a topic in flight: one computed, one published and saved.

A third one, fetched and waiting, made no drain faster. At live rates it made polls smaller."""

FETCH_TIMEOUT_SECONDS = 1.0
"""Longest wait for records, or for room, before the stop of the consumer is checked."""

PREFETCH_BACKOFF_SECONDS = 60.0
"""Longest wait of aiokafka, with fetched records unread, before it fetches empty partitions.

Its default is 0.1 s. The broker holds a request for empty partitions, as of labels, for 1.5 s,
and aiokafka sends no other request meanwhile."""

PREFETCH_BACKOFF_SEEKING_SECONDS = 0.1
"""The same wait from an assignment to the end of its seeks, while nobody reads fetched records.

aiokafka's fetcher may miss the end of a request. It then checks only after the backoff whether to
look up a partition's begin. The seek waits for that, and would fail with the longer backoff."""


class ConsumerTask:
    """Runs a thread service of mode as a task of this event loop."""

    def __init__(self, service: ServiceThread) -> None:
        self._service = service
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the task; the service reports its own failure."""
        self._task = asyncio.create_task(self._service._serve())
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    def stop(self) -> None:
        """Do nothing: the service has stopped by now."""


class ConsumerThread(driver.AIOKafkaConsumerThread):  # type: ignore[misc]
    """aiokafka's consumer in the worker's event loop; it reads committed records only.

    Faust runs it in a thread. There, each poll waits for two wake-ups and for the interpreter's
    lock, and the worker needs a fifth more processor time at live rates. Long computations run in
    a thread of their own, so they do not block the loop.
    """

    Worker = ConsumerTask

    def __init__(self, *args: Any, loop: asyncio.AbstractEventLoop, **kwargs: Any) -> None:
        super().__init__(*args, loop=loop, thread_loop=loop, **kwargs)

    def _create_worker_consumer(self, transport: driver.Transport) -> Any:
        consumer = super()._create_worker_consumer(transport)
        consumer._isolation_level = "read_committed"  # Faust sets it with exactly_once only
        commit = consumer.commit

        async def commit_with_logs(offsets: Mapping[TP, OffsetAndMetadata]) -> None:
            """Faust commits without metadata."""
            told = {
                tp: OffsetAndMetadata(int(at.offset), commit_metadata(at.offset))
                for tp, at in offsets.items()
            }
            await commit(told)

        consumer.commit = commit_with_logs
        return consumer

    async def on_start(self) -> None:
        """Start the consumer."""
        await super().on_start()
        await fetch_steadily(self._ensure_consumer())

    async def committed(self, tp: TP) -> LogOffset | None:
        """The group's committed offset, with the log that it tells; aiokafka leaves that out."""
        coordinator = self._ensure_consumer()._coordinator
        found = (await coordinator.fetch_committed_offsets([tp])).get(tp)
        return None if found is None else committed_offset(found.offset, found.metadata)

    async def _gather_remaining_tasks(self) -> None:
        """Do nothing: the loop's other tasks do not belong to the consumer."""


class Delivery:
    """A poll of a topic on its way through the agent.

    Attributes:
        topic: full name.
        poll: the records.
        at_work: whether the agent works on it.
    """

    __slots__ = ("at_work", "poll", "topic")

    def __init__(self, topic: str, poll: Poll) -> None:
        self.topic = topic
        self.poll = poll
        self.at_work = False


class Consumer(driver.Consumer):  # type: ignore[misc]
    """Consumer whose messages are polls.

    Attributes:
        on_assigned, on_revoked: called with the partitions of a rebalance.
        from_begin: topics that a group without committed offsets reads from their begin,
            whatever the offset policy is.
        take_at_once: topics whose assigned partitions each get an empty poll, before any record.
        stop_seconds: longest wait for the current poll when the worker stops.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Where the next chunk of each partition begins.
        self._begin: dict[TP, int] = {}
        # Offsets from which this assignment's partitions are read again.
        self._seek_targets: dict[TP, int] = {}
        # Polls between fetch and ack.
        self._in_flight: set[Delivery] = set()
        self._changed = asyncio.Event()
        # Polls that their topic's agent has not begun, and what wakes the agent.
        self._waiting: defaultdict[str, deque[Delivery]] = defaultdict(deque)
        self._arrived: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        # Offsets that may be committed.
        self._positions: dict[TP, int] = {}
        # Number of resets; records fetched before the last one are discarded.
        self._resets = 0
        # How often each partition was read again; each poll holds the number of its fetch.
        self._epochs: defaultdict[TP, int] = defaultdict(int)
        self.on_assigned: Callable[[set[TP]], None] = lambda partitions: None
        self.on_revoked: Callable[[set[TP]], None] = lambda partitions: None
        self.from_begin: set[str] = set()
        self.take_at_once: set[str] = set()
        # Partitions that get an empty poll next, and its offset.
        self._empty_polls: dict[TP, int] = {}
        self.stop_seconds = float(self.app.conf.broker_session_timeout)
        self.stop_flow()  # until the seeks of the first assignment are done

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    # from fetch to agent -----------------------------------------------------------------

    async def _drain_messages(self, fetcher: Service) -> None:
        """Fetch and send polls; Faust's fetcher runs this until it is stopped."""
        try:
            while not (self.should_stop or fetcher.should_stop):
                if not self._has_room():
                    await self._wait_for_change()
                    continue
                if self._empty_polls and self.flow_active:
                    self._send_empty_polls()
                resets = self._resets
                records = await self._fetch()
                if not records:
                    continue
                if self.should_stop or not self.flow_active or resets != self._resets:
                    self._give_up(records)
                    continue
                self._send(self._polls_of(records))
        except (*self.consumer_stopped_errors, asyncio.CancelledError):
            if not self.transport.app.should_stop:
                raise

    async def _fetch(self) -> Mapping[TP, list[Any]]:
        """Return the records of one fetch; wait a while for some."""
        if not self.flow_active:
            await self.wait(self.can_resume_flow)
        active = self._active_partitions
        if not active:
            await self.sleep(FETCH_TIMEOUT_SECONDS)
            return {}
        consumer = self._thread._ensure_consumer()
        with PollBudget():
            records: Mapping[TP, list[Any]] = await self._thread._fetch_records(
                consumer,
                active,
                timeout=FETCH_TIMEOUT_SECONDS,
                max_records=consumer._max_poll_records,
            )
        return records

    def _send(self, polls: Mapping[str, Poll]) -> None:
        """Send each topic's poll to its agent."""
        for topic, poll in polls.items():
            delivery = Delivery(topic, poll)
            self._in_flight.add(delivery)
            self._waiting[topic].append(delivery)
            self._arrived[topic].set()

    async def deliveries(self, topic: str) -> AsyncIterator[Delivery]:
        """Yield a topic's polls to its agent, which works on each until it acks or abandons it.

        Nothing is yielded from the begin of a rebalance to the end of its seeks.
        """
        waiting, arrived = self._waiting[topic], self._arrived[topic]
        while True:
            if not (waiting and self.flow_active):
                arrived.clear()
                await arrived.wait()
                continue
            delivery = waiting.popleft()
            if delivery in self._in_flight:  # no rebalance has discarded it
                delivery.at_work = True
                yield delivery

    def resume_flow(self) -> None:
        """Let polls flow again, after a rebalance."""
        super().resume_flow()
        for arrived in self._arrived.values():
            arrived.set()

    def _send_empty_polls(self) -> None:
        """Send agents an empty poll of the partitions that need one."""
        polls: dict[str, Poll] = {}
        for tp, offset in self._empty_polls.items():
            poll = polls.setdefault(tp.topic, Poll({}))
            poll.chunks[tp.partition] = Chunk(offset, offset, (), self._epochs[tp])
        self._empty_polls.clear()
        self._send(polls)

    async def _wait_for_change(self) -> None:
        """Wait until fewer polls are in flight, or a while."""
        self._changed.clear()
        # Before Python 3.12, wait_for() loses a cancellation that comes together with the event: a
        # stopping worker then waited for ever.
        timer = asyncio.get_running_loop().call_later(FETCH_TIMEOUT_SECONDS, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            timer.cancel()

    def _has_room(self) -> bool:
        """Check whether a poll of every topic may come: a fetch may return records of each."""
        if len(self._in_flight) < POLLS_IN_FLIGHT_MAX:
            return True
        topics = [delivery.topic for delivery in self._in_flight]
        return max(map(topics.count, topics)) < POLLS_IN_FLIGHT_MAX

    def _polls_of(self, records: Mapping[TP, list[Any]]) -> dict[str, Poll]:
        """Make one poll for each topic of a fetch."""
        polls: dict[str, Poll] = {}
        for tp, fetched in records.items():
            first, end = fetched[0].offset, fetched[-1].offset + 1
            begin = min(self._begin.get(tp, first), first)
            self._begin[tp] = end
            if tp.topic not in polls:
                polls[tp.topic] = Poll({})
            polls[tp.topic].chunks[tp.partition] = Chunk(begin, end, fetched, self._epochs[tp])
        return polls

    def _give_up(self, records: Mapping[TP, list[Any]]) -> None:
        """Discard fetched records, and seek to where they began."""
        for tp, fetched in records.items():
            self._seek_if_assigned(tp, self._begin.get(tp, fetched[0].offset))

    # acks --------------------------------------------------------------------------------

    def ack(self, delivery: Delivery) -> bool:
        """Release the applied offsets of a poll for a commit."""
        if delivery not in self._in_flight:
            return False  # from before a rebalance: another worker has the partitions now
        self._in_flight.remove(delivery)
        for partition, offset in delivery.poll.applied.items():
            self._positions[TP(delivery.topic, partition)] = offset
        self._changed.set()
        return True

    def abandon(self, delivery: Delivery) -> None:
        """Remove a poll on which the agent failed, so that nothing waits for it."""
        self._in_flight.discard(delivery)
        self._changed.set()

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterable[TP]:
        return [tp for tp in self._positions if topics is None or tp in topics]

    def _new_offset(self, tp: TP) -> int | None:
        return self._positions.get(tp)

    async def wait_empty(self) -> None:
        """Finish the current poll, drop the others, and commit, before partitions are revoked."""
        self._in_flight = {delivery for delivery in self._in_flight if delivery.at_work}
        limit_seconds = float(self.app.conf.broker_session_timeout)
        if self.app.should_stop:
            limit_seconds = min(limit_seconds, self.stop_seconds)
        until = monotonic() + limit_seconds
        while self._in_flight and monotonic() < until:
            self._changed.clear()
            try:
                async with asyncio.timeout(until - monotonic()):
                    await self._changed.wait()
            except TimeoutError:
                log.warning("the current micro-batch did not finish in time; it stays unacked")
        await self.commit_and_end_transactions()

    # rebalances and seeks ----------------------------------------------------------------

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Handle the revocation of partitions."""
        await super().on_partitions_revoked(revoked)
        self._reset()
        self.on_revoked(set(revoked))

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        """Handle the assignment of partitions."""
        self._set_prefetch_backoff(PREFETCH_BACKOFF_SEEKING_SECONDS)
        self._reset()
        self.on_assigned(set(assigned))
        await super().on_partitions_assigned(assigned, generation_id)

    def _reset(self) -> None:
        """Clear all of the previous assignment, so that a late ack has no effect."""
        self._resets += 1
        self._in_flight.clear()
        for waiting in self._waiting.values():
            waiting.clear()
        self._positions.clear()
        self._begin.clear()
        self._empty_polls.clear()
        self._seek_targets.clear()
        self._changed.set()

    async def perform_seek(self) -> None:
        """Seek each partition to its first offset; Faust calls this after a rebalance."""
        # Faust keeps offsets of refused commits here; ask the group again.
        self._committed_offset.clear()
        await super().perform_seek()
        # Records may have come during the wait; the seek has moved past them.
        self._begin.clear()
        for tp, offset in self._committed_offset.items():
            if offset is not None:
                self._start_chunk_at(tp, offset)
                if tp.topic in self.take_at_once and tp in self.assignment():
                    self._empty_polls[tp] = offset
        self._resets += 1  # an older fetch continues from an earlier position
        # Without a committed offset, set the begin explicitly. An older fetch may still return,
        # and its discarding would seek to its own begin.
        is_earliest = self.app.conf.consumer_auto_offset_reset == "earliest"
        new = [
            tp
            for tp in sorted(self.assignment())
            if (is_earliest or tp.topic in self.from_begin)
            and self._committed_offset.get(tp) is None
        ]
        if new:
            for tp, offset in (await self._thread.earliest_offsets(*new)).items():
                self._start_chunk_at(TP(tp.topic, tp.partition), offset)
        # A poll from the previous assignment may already have requested a seek. It will not
        # repeat the request, so apply it here.
        for tp, offset in self._seek_targets.items():
            self._start_chunk_at(tp, offset)
        self._resets += 1  # the same holds after these seeks
        self._set_prefetch_backoff(PREFETCH_BACKOFF_SECONDS)

    def _set_prefetch_backoff(self, seconds: float) -> None:
        """Set the backoff of later fetches."""
        self._thread._ensure_consumer()._fetcher._prefetch_backoff = seconds

    def reread_from(self, tp: TP, offset: int) -> int:
        """Read a partition again from ``offset`` on, and discard what was fetched before.

        Returns:
            epoch of the polls that are fetched from now on.
        """
        self._epochs[tp] += 1
        self._seek_targets[tp] = offset
        self._resets += 1
        self._start_chunk_at(tp, offset)
        return self._epochs[tp]

    def recheck_watermarks(self, topic: str) -> None:
        """Have the agent read each partition's watermark, even if no record comes."""
        for tp in self.assignment():
            if tp.topic == topic and tp in self._begin:
                self._empty_polls[tp] = self._begin[tp]

    def _start_chunk_at(self, tp: TP, offset: int) -> None:
        """Start the next chunk and the next fetch at this offset."""
        self._begin[tp] = offset
        self._seek_if_assigned(tp, offset)

    def _seek_if_assigned(self, tp: TP, offset: int) -> None:
        if tp in self.assignment():
            self._thread.seek(tp, offset)

    async def committed(self, tp: TP) -> LogOffset | None:
        """Return the group's committed offset, which tells its log.

        Raises:
            LogUnavailableError: the broker does not answer.
        """
        try:
            return cast("LogOffset | None", await self._thread.committed(tp))
        except KafkaError as error:
            raise LogUnavailableError(f"{type(error).__name__}: {error}") from error

    def group_error(self) -> BaseException | None:
        """Return the error with which the group refused this member since the last call.

        The call makes aiokafka try again, which it does not do by itself.
        """
        consumer = self._thread._consumer if self._thread is not None else None
        coordinator = consumer._coordinator if consumer is not None else None
        if coordinator is None:
            return None  # not started yet
        try:
            coordinator.check_errors()
        except KafkaError as error:
            return None if error.retriable else error
        return None

    def read_to(self, tp: TP) -> int | None:
        """Return the offset up to which a partition is read and applied; None if unknown.

        It also passes transaction markers and aborted records, which no poll contains.
        """
        if any(delivery.topic == tp.topic for delivery in self._in_flight):
            return None
        subscription = self._thread._ensure_consumer()._subscription.subscription
        assignment = subscription.assignment if subscription is not None else None
        state = assignment.state_value(tp) if assignment is not None else None
        return state.position if state is not None and state.has_valid_position else None

    def refresh_topics(self) -> None:
        """Load metadata of recreated topics now; the client would do it only after minutes."""
        self._thread._ensure_consumer()._client.force_metadata_update()
        self.rejoin()

    def rejoin(self) -> None:
        """Request a new assignment from the group: this member's knowledge is outdated."""
        self._thread._ensure_consumer()._coordinator.request_rejoin()

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Disable Faust's stall detector: it counts events, while the watchdog counts polls."""

    @property
    def polls_in_flight(self) -> int:
        """Number of polls between fetch and ack."""
        return len(self._in_flight)


class PartitionLog:
    """One topic of the consumer, addressed by partition number.

    Args:
        consumer: returns Faust's consumer, which does not exist before the app starts.
        topic: full name.
    """

    def __init__(self, consumer: Callable[[], Consumer], topic: str) -> None:
        self._consumer = consumer
        self.topic = topic

    async def committed(self, partition: int) -> int | None:
        """See :class:`pipeline.scoring.consumer.PartitionConsumer`."""
        return await self._consumer().committed(TP(self.topic, partition))

    async def seek(self, partition: int, offset: int) -> int:
        """See :class:`pipeline.scoring.consumer.PartitionConsumer`."""
        return self._consumer().reread_from(TP(self.topic, partition), offset)

    def read_to(self, partition: int) -> int | None:
        """See :class:`pipeline.worker.lag_monitor.ConsumedTopic`."""
        return self._consumer().read_to(TP(self.topic, partition))

    def refresh_topics(self) -> None:
        """See :class:`pipeline.worker.lag_monitor.ConsumedTopic`."""
        self._consumer().refresh_topics()

    @property
    def is_idle(self) -> bool:
        """See :class:`pipeline.worker.lag_monitor.ConsumedTopic`."""
        return self._consumer().polls_in_flight == 0


class Transport(driver.Transport):  # type: ignore[misc]
    """The aiokafka transport, with consumers that make polls."""

    Consumer: ClassVar[type[driver.Consumer]] = Consumer


def register() -> None:
    """Register the ``poll://`` scheme with Faust."""
    drivers.TRANSPORTS.aliases[URL_SCHEME] = f"{__name__}:Transport"
