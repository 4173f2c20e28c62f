"""A Faust transport that hands the agent one message for each poll, not for each record.

Faust's own driver makes an event of each record, which costs more than scoring it. This one
is the aiokafka driver with another way from fetch to agent: everything that one fetch
returned of a topic travels as one message whose value is a
:class:`pipeline.kafka.polls.Poll`. At most :data:`POLLS_IN_FLIGHT_MAX` polls of a topic are
between fetch and ack; the next fetch waits for room, so that nothing is ever paused, and aiokafka
fetches while the agent waits for broker and Redis.

Records of a fetch are given up only together with a seek to where they began. Registered
with Faust for URLs that begin with ``poll://``.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from time import monotonic
from typing import Any, ClassVar, cast

from aiokafka.errors import KafkaError
from aiokafka.structs import OffsetAndMetadata
from faust import Schema
from faust.transport import drivers
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage, Message
from mode import Service
from mode.threads import ServiceThread

from pipeline.kafka.decompression_limit import one_poll
from pipeline.kafka.polls import Chunk, LogUnavailableError, Poll
from pipeline.topic_id import LogOffset, commit_metadata, committed_offset

log = logging.getLogger(__name__)

URL_SCHEME = "poll"
POLLS_IN_FLIGHT_MAX = 3
"""One is fetched, one is computed, one is published and saved."""
FETCH_TIMEOUT_SECONDS = 1.0

PREFETCH_BACKOFF_SECONDS = 60.0
"""What was fetched is taken up before more is asked for. aiokafka waits 0.1 s for that and then
asks for the partitions that are empty here; where they are empty at the broker, too, as labels
often are, it holds that request for 1.5 s, and no other one is sent meanwhile."""

PREFETCH_BACKOFF_SEEKING_SECONDS = 0.1
"""Between an assignment and the flow that follows the seek to where it begins nobody takes up what
was fetched. aiokafka's fetcher, which may miss the end of a request, then looks only after the
backoff again what there is to do, such as to find a partition's begin, and the seek waits for it:
with the longer one until it fails."""


class ConsumerTask:
    """Runs a service of mode's that would run in a thread as a task of this loop."""

    def __init__(self, service: ServiceThread) -> None:
        self._service = service
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; the service reports its own failure."""
        self._task = asyncio.create_task(self._service._serve())
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    def stop(self) -> None:
        """The service has stopped by now."""


class ConsumerThread(driver.AIOKafkaConsumerThread):  # type: ignore[misc]
    """aiokafka's consumer in the loop of everything else; it reads what is committed.

    In a thread, as Faust has it, each poll waits for two wake-ups and for the interpreter's
    lock, and the worker takes a fifth more of the processor's time at live rates. A computation
    that would hold the loop up is in a thread itself.
    """

    Worker = ConsumerTask

    def __init__(self, *args: Any, loop: asyncio.AbstractEventLoop, **kwargs: Any) -> None:
        super().__init__(*args, loop=loop, thread_loop=loop, **kwargs)

    def _create_worker_consumer(self, transport: driver.Transport) -> Any:
        consumer = super()._create_worker_consumer(transport)
        consumer._isolation_level = "read_committed"  # Faust's is that of exactly_once alone
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

    async def committed(self, tp: TP) -> LogOffset | None:
        """The group's committed offset, with the log that it tells; aiokafka leaves that out."""
        coordinator = self._ensure_consumer()._coordinator
        found = (await coordinator.fetch_committed_offsets([tp])).get(tp)
        return None if found is None else committed_offset(found.offset, found.metadata)

    async def _gather_remaining_tasks(self) -> None:
        """The loop's other tasks are not the consumer's: leave them."""


class PollSchema(Schema):  # type: ignore[misc]
    """The value of a message is a poll already: nothing to decode."""

    def loads_key(self, app: Any, message: Message, **_: Any) -> None:
        """No key."""

    def loads_value(self, app: Any, message: Message, **_: Any) -> Any:
        """The poll."""
        return message.value


class Consumer(driver.Consumer):  # type: ignore[misc]
    """Consumer whose messages are polls."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._topic: str = ""
        # Where the next chunk of each partition begins.
        self._begin: dict[TP, int] = {}
        # Where the assignment's partitions were sought back to.
        self._sought: dict[TP, int] = {}
        # Polls between fetch and ack: their topic, and whether the agent works on them.
        self._in_flight: dict[int, tuple[str, bool]] = {}
        self._changed = asyncio.Event()
        # What may be committed.
        self._positions: dict[TP, int] = {}
        # Counts the moments from which on records fetched before are not wanted.
        self._resets = 0
        # How often each partition was sought back: polls name it of their time.
        self._epochs: Counter[TP] = Counter()
        self.on_assigned: Callable[[set[TP]], None] = lambda partitions: None
        self.on_revoked: Callable[[set[TP]], None] = lambda partitions: None
        # Topics that a group without offsets reads from their begin, whatever its policy.
        self.from_begin: set[str] = set()
        # Topics whose partitions come in an empty poll at once, before any record does.
        self.take_at_once: set[str] = set()
        # Partitions that are to come so, and where they begin.
        self._to_take: dict[TP, int] = {}
        # A worker that stops waits so long at most for the poll at work.
        self.stop_seconds = float(self.app.conf.broker_session_timeout)

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    # from fetch to agent -----------------------------------------------------------------

    async def _drain_messages(self, fetcher: Service) -> None:
        """Faust's fetcher runs this until it is stopped."""
        try:
            while not (self.should_stop or fetcher.should_stop):
                if not await self._room() or fetcher.should_stop:
                    continue
                if self.flow_active:
                    await self._take()
                resets = self._resets
                records, _ = await self._wait_next_records(FETCH_TIMEOUT_SECONDS)
                if not records:
                    continue
                if self.should_stop or not self.flow_active or resets != self._resets:
                    self._give_up(records)
                    continue
                await self._hand_over(self._messages_of(records))
        except (*self.consumer_stopped_errors, asyncio.CancelledError):
            if not self.transport.app.should_stop:
                raise

    async def _hand_over(self, messages: list[ConsumerMessage]) -> None:
        """Give messages to the agents."""
        for message in messages:  # all before the first wait: a reset forgets them all
            self._in_flight[id(message)] = message.topic, False
        for message in messages:
            await self.wait_first(self.callback(message), self.suspend_flow.wait())

    async def _take(self) -> None:
        """Have the agents take partitions that no record has come of."""
        messages: dict[str, ConsumerMessage] = {}
        for tp, offset in self._to_take.items():
            if tp.topic not in messages:
                messages[tp.topic] = self._empty_message(tp, offset)
            messages[tp.topic].value.chunks[tp.partition] = Chunk(
                offset, offset, (), self._epochs[tp]
            )
        self._to_take.clear()
        await self._hand_over(list(messages.values()))

    def _empty_message(self, tp: TP, offset: int) -> ConsumerMessage:
        """A poll without chunks."""
        return ConsumerMessage(
            topic=tp.topic,
            partition=tp.partition,
            offset=offset,
            timestamp=0.0,
            timestamp_type=0,
            headers=[],
            key=None,
            value=Poll({}),
            checksum=None,
            serialized_key_size=0,
            serialized_value_size=0,
            tp=tp,
            generation_id=self.app.consumer_generation_id,
        )

    async def _room(self) -> bool:
        """Whether another poll may be fetched; waits a while for it."""
        if self._has_room():
            return True
        self._changed.clear()
        try:
            # Not wait_for(), which before Python 3.12 loses a cancellation that comes together
            # with what it waits for: a worker told to stop then waited for ever.
            async with asyncio.timeout(FETCH_TIMEOUT_SECONDS):
                await self._changed.wait()
        except TimeoutError:
            return False
        return self._has_room()

    def _has_room(self) -> bool:
        """Whether a poll of any topic may come: a fetch may return records of each."""
        if len(self._in_flight) < POLLS_IN_FLIGHT_MAX:
            return True
        by_topic = Counter(topic for topic, _ in self._in_flight.values())
        return max(by_topic.values()) < POLLS_IN_FLIGHT_MAX

    def _messages_of(self, records: Mapping[TP, list[Any]]) -> list[ConsumerMessage]:
        """One message with one poll for each topic that a fetch returned records of."""
        messages: dict[str, ConsumerMessage] = {}
        for tp, fetched in records.items():
            first, end = fetched[0].offset, fetched[-1].offset + 1
            begin = min(self._begin.get(tp, first), first)
            self._begin[tp] = end
            if tp.topic not in messages:
                message = messages[tp.topic] = self._to_message(tp, fetched[0])
                message.value = Poll({})
            messages[tp.topic].value.chunks[tp.partition] = Chunk(
                begin, end, fetched, self._epochs[tp]
            )
        return list(messages.values())

    def _give_up(self, records: Mapping[TP, list[Any]]) -> None:
        """Forget fetched records: they will be fetched again."""
        for tp, fetched in records.items():
            self._seek_if_assigned(tp, self._begin.get(tp, fetched[0].offset))

    async def _getmany(
        self,
        active_partitions: set[TP] | None,
        timeout: float,  # noqa: ASYNC109 - as Faust calls it
    ) -> Any:
        """What one fetch returned: straight from aiokafka, not by Faust's queue."""
        consumer = self._thread._ensure_consumer()
        with one_poll():
            return await self._thread._fetch_records(
                consumer,
                active_partitions,
                timeout=timeout,
                max_records=consumer._max_poll_records,
            )

    # acks --------------------------------------------------------------------------------

    def start_work(self, message: Message) -> bool:
        """The agent takes a poll up. False: a rebalance came between; leave it."""
        if id(message) not in self._in_flight:
            return False
        self._in_flight[id(message)] = message.topic, True
        return True

    def ack(self, message: Message) -> bool:
        """Faust calls this when the agent acked: what was applied may be committed."""
        if self._in_flight.pop(id(message), None) is None:
            return False  # of a time before a rebalance: the partitions are another's now
        message.acked = True
        for partition, offset in cast(Poll, message.value).applied.items():
            self._positions[TP(message.topic, partition)] = offset
        self._changed.set()
        return True

    def abandon(self, message: Message) -> None:
        """The agent failed on a poll: nothing waits for it any more."""
        self._in_flight.pop(id(message), None)
        self._changed.set()

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterable[TP]:
        return [tp for tp in self._positions if topics is None or tp in topics]

    def _new_offset(self, tp: TP) -> int | None:
        return self._positions.get(tp)

    async def wait_empty(self) -> None:
        """Before partitions go: let the poll at work finish, drop the others, commit."""
        for key in [key for key, (_, at_work) in self._in_flight.items() if not at_work]:
            del self._in_flight[key]
        patience = float(self.app.conf.broker_session_timeout)
        if self.app.should_stop:
            patience = min(patience, self.stop_seconds)
        until = monotonic() + patience
        while self._in_flight and monotonic() < until:
            self._changed.clear()
            try:
                async with asyncio.timeout(until - monotonic()):
                    await self._changed.wait()
            except TimeoutError:
                log.warning("the micro-batch at work did not finish in time; it is left unacked")
        await self.commit_and_end_transactions()

    # rebalances and seeks ----------------------------------------------------------------

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """The group takes partitions away."""
        await super().on_partitions_revoked(revoked)
        self._reset()
        self.on_revoked(set(revoked))

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        """The group gives partitions."""
        self._set_prefetch_backoff(PREFETCH_BACKOFF_SEEKING_SECONDS)
        self._reset()
        self.on_assigned(set(assigned))
        await super().on_partitions_assigned(assigned, generation_id)

    def _reset(self) -> None:
        """Forget all that belongs to the assignment before: a late ack changes nothing."""
        self._resets += 1
        self._in_flight.clear()
        self._positions.clear()
        self._begin.clear()
        self._to_take.clear()
        self._sought.clear()
        self._changed.set()

    async def perform_seek(self) -> None:
        """Faust seeks to the committed offsets after a rebalance."""
        # It takes for committed what a commit said that was refused, until it is told better.
        self._committed_offset.clear()
        await super().perform_seek()
        # Records may have come while it waited; the partitions have moved past them.
        self._begin.clear()
        for tp, offset in self._committed_offset.items():
            if offset is not None:
                self._go_to(tp, offset)
                if tp.topic in self.take_at_once and tp in self.assignment():
                    self._to_take[tp] = offset
        self._resets += 1  # a fetch that began before goes on from where the group was then
        # Where the group has committed nothing this has to be said, too: a fetch of the time
        # before may yet return, and is sought back to where it began, if nobody knows better.
        is_earliest = self.app.conf.consumer_auto_offset_reset == "earliest"
        new = [
            tp
            for tp in sorted(self.assignment())
            if (is_earliest or tp.topic in self.from_begin)
            and self._committed_offset.get(tp) is None
        ]
        if new:
            for tp, offset in (await self._thread.earliest_offsets(*new)).items():
                self._go_to(TP(tp.topic, tp.partition), offset)
        # A poll that outlived its assignment may have looked at the states before Faust sought:
        # who asked for that does not ask again before it is done.
        for tp, offset in self._sought.items():
            self._go_to(tp, offset)
        self._resets += 1  # the same of what was sought meanwhile
        self._set_prefetch_backoff(PREFETCH_BACKOFF_SECONDS)

    def _set_prefetch_backoff(self, seconds: float) -> None:
        """Of what is fetched from now on."""
        self._thread._ensure_consumer()._fetcher._prefetch_backoff = seconds

    def seek_back(self, tp: TP, offset: int) -> int:
        """Read a partition from ``offset`` on; what was fetched of it before is given up.

        Returns:
            the epoch of polls that are fetched from now on.
        """
        self._epochs[tp] += 1
        self._sought[tp] = offset
        self._resets += 1
        self._go_to(tp, offset)
        return self._epochs[tp]

    def look_again(self, topic: str) -> None:
        """Have the agent look at each partition's watermark, though no record may come."""
        for tp in self.assignment():
            if tp.topic == topic and tp in self._begin:
                self._to_take[tp] = self._begin[tp]

    def _go_to(self, tp: TP, offset: int) -> None:
        """The next chunk begins there, and so does the next fetch."""
        self._begin[tp] = offset
        self._seek_if_assigned(tp, offset)

    def _seek_if_assigned(self, tp: TP, offset: int) -> None:
        if tp in self.assignment():
            self._thread.seek(tp, offset)

    async def committed(self, tp: TP) -> LogOffset | None:
        """The group's committed offset, which tells its log.

        Raises:
            LogUnavailableError: the broker does not answer.
        """
        try:
            return cast("LogOffset | None", await self._thread.committed(tp))
        except KafkaError as error:
            raise LogUnavailableError(f"{type(error).__name__}: {error}") from error

    def group_error(self) -> BaseException | None:
        """Why the group refused us since the last look, if it did.

        Looking has aiokafka try again; it waits for that, in silence.
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
        """Up to where a partition is read and done with; None where nobody can say.

        Unlike what is applied this is past the markers of transactions and past what was taken
        back, which are no records.
        """
        if any(topic == tp.topic for topic, _ in self._in_flight.values()):
            return None
        subscription = self._thread._ensure_consumer()._subscription.subscription
        assignment = subscription.assignment if subscription is not None else None
        state = assignment.state_value(tp) if assignment is not None else None
        return state.position if state is not None and state.has_valid_position else None

    def look_at_topics(self) -> None:
        """Topics were made again, of which the client would hear in minutes."""
        self._thread._ensure_consumer()._client.force_metadata_update()
        self.rejoin()

    def rejoin(self) -> None:
        """Ask the group anew for partitions: what this member knows of them is out of date."""
        self._thread._ensure_consumer()._coordinator.request_rejoin()

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Faust's stall detector counts events; the watchdog sees polls."""

    @property
    def polls_in_flight(self) -> int:
        """Polls between fetch and ack."""
        return len(self._in_flight)


class PartitionLog:
    """A topic, as the processor moves in it.

    Args:
        consumer: called for Faust's consumer, which does not exist before the app starts.
        topic: full name.
    """

    def __init__(self, consumer: Callable[[], Consumer], topic: str) -> None:
        self._consumer = consumer
        self._topic = topic

    async def committed(self, partition: int) -> int | None:
        """See :class:`pipeline.scoring.consumer.PartitionConsumer`."""
        return await self._consumer().committed(TP(self._topic, partition))

    async def seek(self, partition: int, offset: int) -> int:
        """See :class:`pipeline.scoring.consumer.PartitionConsumer`."""
        return self._consumer().seek_back(TP(self._topic, partition), offset)


class Transport(driver.Transport):  # type: ignore[misc]
    """The aiokafka transport with poll-wise consumers."""

    Consumer: ClassVar[type[driver.Consumer]] = Consumer


def register() -> None:
    """Make Faust know the ``poll://`` scheme."""
    drivers.TRANSPORTS.aliases[URL_SCHEME] = f"{__name__}:Transport"
