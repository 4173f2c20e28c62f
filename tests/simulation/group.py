"""A consumer group and its members: the real consumer over a simulated aiokafka thread.

The coordinator rebalances eagerly, like Faust's groups. All members give up their partitions, join
again and get new ones. The coordinator excludes a member that does not join in time, and notifies
it later. Each member follows Faust's sequence with the consumer of
:mod:`pipeline.worker.faust_transport`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from random import Random
from types import SimpleNamespace
from typing import Any, TypeVar

from faust.types import TP

from pipeline.kafka.polls import LogUnavailableError
from pipeline.settings import Settings
from pipeline.worker import faust_transport as poll_transport
from tests.fakes.memory import MemoryKafka, MemoryRecord
from tests.simulation.clock import Host, Loop
from tests.simulation.network import USUAL_SECONDS, Network

T = TypeVar("T")

SESSION_SECONDS = 10.0
"""Time without a heartbeat after which the group excludes a member."""

REBALANCE_SECONDS = 11.0
"""Time that the coordinator waits for members to join again."""

COMMIT_SECONDS = 1.5
"""Time between two commits."""

NOTICE_SECONDS = 12.0
"""Longest time until the coordinator notifies an excluded member."""


Given = tuple[int, list[TP]]
"""A generation and a member's partitions in it."""


class Coordinator:
    """The group's coordinator at the broker.

    Args:
        topics: topics to assign, all with the same number of partitions.
        on_commit: called with the partition, the offset and the previous committed offset.

    Attributes:
        generation: number of assignments so far.
        owners: owner of each topic's partition.
        committed: committed offset of each topic's partition.
    """

    def __init__(
        self,
        loop: Loop,
        rng: Random,
        network: Network,
        topics: list[str],
        partitions: int,
        on_commit: Callable[[TP, int, int | None], None],
    ) -> None:
        self._loop = loop
        self._rng = rng
        self._network = network
        self._places = [TP(topic, p) for topic in topics for p in range(partitions)]
        self._on_commit = on_commit
        self.generation = 0
        self.owners: dict[TP, Member] = {}
        self.members: list[Member] = []
        self.committed: dict[TP, int] = {}
        self._joining: dict[Member, asyncio.Future[Given | None]] = {}
        self._round = 0
        self._is_rebalancing = False

    def join(self, member: Member) -> asyncio.Future[Given | None]:
        """Add a member; return a future of its partitions, or of None if it must join again."""
        future: asyncio.Future[Given | None] = self._loop.create_future()
        if member not in self.members:
            self.members.append(member)
        self._joining[member] = future
        self.rebalance(besides=member)
        self._complete_if_all()
        return future

    def rebalance(self, besides: Member | None = None) -> None:
        """Make all members join again."""
        if self._is_rebalancing:
            return
        self._is_rebalancing = True
        self._round += 1
        for member in self.members:
            if member is not besides and member not in self._joining:
                self._loop.later(self._network.delay(), member.told)
        self._loop.later(REBALANCE_SECONDS, self._time_out, self._round)

    def expel(self, member: Member) -> None:
        """Exclude a silent member, which may still run, and give its partitions to the others."""
        if member in self.members:
            self.members.remove(member)
            self._loop.later(self._rng.uniform(0, NOTICE_SECONDS), member.told)
            future = self._joining.pop(member, None)
            if future is not None:
                self._loop.later(self._network.delay(), _answer, future, None)
            self.rebalance()
            self._complete_if_all()

    leave = expel

    def _time_out(self, number: int) -> None:
        if self._is_rebalancing and number == self._round:
            for member in [m for m in self.members if m not in self._joining]:
                self.members.remove(member)
                self._loop.later(self._rng.uniform(0, NOTICE_SECONDS), member.told)
            self._complete()

    def _complete_if_all(self) -> None:
        if self._is_rebalancing and all(member in self._joining for member in self.members):
            self._complete()

    def _complete(self) -> None:
        self._is_rebalancing = False
        self.generation += 1
        members = list(self.members)
        self._rng.shuffle(members)
        self.owners = {}
        given: dict[Member, list[TP]] = {member: [] for member in members}
        for number, place in enumerate(self._places if members else ()):
            member = members[number % len(members)]
            self.owners[place] = member
            given[member].append(place)
        for member, places in given.items():
            answer = self.generation, places
            self._loop.later(self._network.delay(), _answer, self._joining.pop(member), answer)

    def is_owner(self, member: Member, topic: str, partition: int, generation: int) -> bool:
        """Return whether a member owns a partition and its generation is the current one."""
        return generation == self.generation and self.owners.get(TP(topic, partition)) is member

    def commit(self, member: Member, generation: int, offsets: Mapping[TP, int]) -> bool:
        """Commit offsets unless the member or its generation is outdated; return whether."""
        if member not in self.members or generation != self.generation:
            return False
        for place, offset in offsets.items():
            self._on_commit(place, offset, self.committed.get(place))
            self.committed[place] = offset
        return True


def _answer(future: asyncio.Future[Any], answer: Any) -> None:
    if not future.done():
        future.set_result(answer)


class Thread:
    """Replacement of Faust's thread that runs aiokafka's consumer."""

    beacon = None

    def __init__(self, member: Member, consumer: Any) -> None:
        self.thread_loop = member.loop
        self.consumer = consumer
        self.generation = -1
        self.positions: dict[TP, int | None] = {}
        self._fetcher = SimpleNamespace(_prefetch_backoff=0.0)
        self._max_poll_records = member.settings.micro_batch_max
        self._member = member
        self._kafka = member.kafka
        self._changed: asyncio.Future[None] | None = None
        self._is_reassigning = False

    def _ensure_consumer(self) -> Thread:
        return self

    def begin_reassignment(self) -> None:
        """Stop fetching until the next assignment."""
        self._is_reassigning = True

    def assign(self, generation: int, places: Iterable[TP]) -> None:
        """Assign partitions, whose positions are the committed offsets at the first fetch."""
        self.generation = generation
        self.positions = dict.fromkeys(places)
        self._is_reassigning = False
        self.wake()

    def wake(self) -> None:
        """Wake the fetcher, because there may be new records."""
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    def assignment(self) -> set[TP]:
        """Return the member's partitions."""
        return set(self.positions)

    async def _fetch_records(
        self,
        consumer: Thread,
        active_partitions: set[TP] | None,
        timeout: float,  # noqa: ASYNC109 - Faust's signature
        max_records: int,
    ) -> dict[TP, list[MemoryRecord]]:
        """Fetch like Faust, then delay the result on its way to the main thread."""
        until = self.thread_loop.time() + timeout
        while self.consumer.flow_active:
            # A real fetch returns an arbitrary part of the available records.
            most = self._member.some(max_records)
            found = {} if self._is_reassigning else self._take(active_partitions or (), most)
            left = until - self.thread_loop.time()
            if found or left <= 0:
                await self._member.network.cross(self._member.host)
                return found
            self._changed = self.thread_loop.create_future()
            timer = self.thread_loop.call_later(left, self.wake)
            await self._changed
            timer.cancel()
        return {}

    def _take(self, places: Iterable[TP], most: int) -> dict[TP, list[MemoryRecord]]:
        found: dict[TP, list[MemoryRecord]] = {}
        for place in [place for place in self.positions if place in places]:
            position = self.positions[place]
            if position is None:
                position = self._member.coordinator.committed.get(place, 0)
            bounds = self._kafka.bounds(place.topic, place.partition)
            if position > bounds.end:  # of an earlier log: auto_offset_reset applies
                position = bounds.begin
            records = self._kafka.fetch(place.topic, place.partition, position, most)
            if records:
                most -= len(records)
                found[place] = records
                # The partition that waited longest comes first at the next fetch.
                del self.positions[place]
                self.positions[place] = records[-1].offset + 1
            if not most:
                break
        return found

    def seek(self, place: TP, offset: int) -> None:
        """Set the offset of the next fetch."""
        self.positions[place] = offset
        self.wake()

    async def earliest_offsets(self, *places: TP) -> dict[TP, int]:
        """Return where the logs begin; repeat the request until it is answered, like aiokafka."""
        return {place: await self._told("begin", place, self._begin) for place in places}

    def _begin(self, place: TP) -> int:
        return self._kafka.bounds(place.topic, place.partition).begin

    async def seek_to_committed(self) -> dict[TP, int | None]:
        """Request the committed offsets and seek to them."""
        found = {}
        for place in list(self.positions):
            found[place] = offset = await self.committed(place)
            if offset and place in self.positions:
                self.positions[place] = offset
        return found

    async def committed(self, place: TP) -> int | None:
        """Return the committed offset; repeat the request until it is answered, like aiokafka."""
        return await self._told("committed", place, self._member.coordinator.committed.get)

    async def _told(self, name: str, place: TP, find: Callable[[TP], T]) -> T:
        member, text = self._member, f"{name}? {place.topic} {place.partition}"
        while True:
            try:
                (found,) = await member.network.ask(
                    member.host, text, [lambda: find(place)], LogUnavailableError
                )
            except LogUnavailableError:
                await asyncio.sleep(0.1)
            else:
                return found

    async def commit(self, offsets: Mapping[TP, int]) -> bool:
        """Commit offsets; repeat the request until it is answered, like aiokafka."""
        member, generation = self._member, self.generation
        text = ", ".join(f"{p.topic} {p.partition}: {offset}" for p, offset in offsets.items())
        is_committed = False

        def commit() -> bool:
            return member.coordinator.commit(member, generation, offsets)

        while not member.host.is_dead:
            try:
                (is_committed,) = await member.network.ask(
                    member.host, f"commit {text}", [commit], LogUnavailableError
                )
            except LogUnavailableError:
                await asyncio.sleep(0.1)
            else:
                break
        return is_committed


class Consumer(poll_transport.Consumer):
    """The real consumer over a simulated thread."""

    def _new_consumer_thread(self) -> Any:
        return Thread(self.transport.member, self)


class App(SimpleNamespace):
    """The part of a Faust app that the consumer and the worker use."""

    def __init__(self, member: Member) -> None:
        async def nothing(*_: Any) -> list[Any]:
            return []

        def ignored(*_: Any, **__: Any) -> None:
            """Ignore the call."""

        super().__init__(
            in_transaction=False,
            in_recovery=False,
            client_only=False,
            should_stop=False,
            consumer_generation_id=-1,
            sensors=SimpleNamespace(
                on_message_in=ignored, on_commit_initiated=ignored, on_commit_completed=ignored
            ),
            conf=SimpleNamespace(
                broker_commit_every=None,
                consumer_auto_offset_reset="earliest",
                ConsumerScheduler=lambda: None,
                broker_commit_interval=COMMIT_SECONDS,
                broker_commit_livelock_soft_timeout=60.0,
                broker_session_timeout=SESSION_SECONDS,
            ),
            producer=SimpleNamespace(flush=nothing),
            monitor=SimpleNamespace(on_tp_commit=ignored),
            tables=SimpleNamespace(on_commit=ignored),
            _attachments=SimpleNamespace(publish_for_tp_offset=nothing),
            _start_span_from_rebalancing=lambda name: nullcontext(),
            on_rebalance_return=ignored,
        )
        self._member = member

    @property
    def consumer(self) -> Consumer:
        """The member's consumer."""
        return self._member.consumer

    async def crash(self, error: BaseException) -> None:
        """End the member's process."""
        self._member.crashed(error)


class Member:
    """A worker's membership in the group: its consumer and part in rebalances."""

    def __init__(
        self,
        host: Host,
        loop: Loop,
        rng: Random,
        network: Network,
        coordinator: Coordinator,
        kafka: MemoryKafka,
        settings: Settings,
        consumer: type[Consumer],
        crashed: Callable[[BaseException], None],
    ) -> None:
        self.host = host
        self.loop = loop
        self.network = network
        self.coordinator = coordinator
        self.kafka = kafka
        self.settings = settings
        self.crashed = crashed
        self._rng = rng
        self._told = asyncio.Event()
        self.app = App(self)
        transport = SimpleNamespace(
            app=self.app, member=self, create_transaction_manager=lambda **_: None
        )
        self.consumer = consumer(
            transport, self._unused, self._on_revoked, self._on_assigned, loop=loop
        )
        self.thread: Thread = self.consumer._thread
        self._tasks: list[asyncio.Task[Any]] = []
        self._recovery: asyncio.Task[None] | None = None

    def some(self, most: int) -> int:
        """Draw a number from 1 to ``most``."""
        return self._rng.randint(1, most)

    def told(self) -> None:
        """Accept the coordinator's notice of a rebalance or an exclusion."""
        if not self.host.is_dead:
            self._told.set()

    # the threads -------------------------------------------------------------------------

    def start(self) -> None:
        """Start the tasks that Faust would start."""
        work = [self._membership(), self._fetcher(), self._commits()]
        self._tasks = [self.host.start(self.loop, part) for part in work]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.crashed(error)

    async def _membership(self) -> None:
        while True:
            self._told.clear()
            self.thread.begin_reassignment()
            await self.consumer.on_partitions_revoked(self.thread.assignment())
            await asyncio.sleep(self.network.delay())
            while (given := await self.coordinator.join(self)) is None:
                pass
            self.host.held = 0.0
            generation, places = given
            self.thread.assign(generation, places)
            self.app.consumer_generation_id = generation
            await self.consumer.on_partitions_assigned(set(places), generation)
            await self._told.wait()

    async def _fetcher(self) -> None:
        fetcher: Any = SimpleNamespace(should_stop=False)
        await self.consumer._drain_messages(fetcher)

    async def _commits(self) -> None:
        while True:
            await asyncio.sleep(COMMIT_SECONDS)
            await self.consumer.commit()

    async def leave(self) -> None:
        """Finish and commit the polls in flight and leave the group, as after SIGTERM."""
        self._suspend()
        self._tasks[1].cancel()
        await self.consumer.wait_empty()
        self.coordinator.leave(self)

    # Faust's app -------------------------------------------------------------------------

    def _suspend(self) -> None:
        consumer = self.consumer
        consumer.stop_flow()
        consumer.pause_partitions(consumer.assignment())
        self.thread.wake()

    async def _on_revoked(self, revoked: set[TP]) -> None:
        if self.consumer.assignment():
            self._suspend()
            await self.consumer.wait_empty()

    async def _on_assigned(self, assigned: set[TP], generation: int) -> None:
        await asyncio.sleep(0)
        self.consumer.pause_partitions(assigned)
        if self._recovery is not None:
            self._recovery.cancel()
        self._recovery = self.host.start(self.loop, self._resume())
        self._recovery.add_done_callback(self._ended)

    async def _resume(self) -> None:
        """Resume the flow like Faust's recovery service; a newer assignment cancels it."""
        await asyncio.sleep(USUAL_SECONDS * self._rng.random())
        assignment = self.consumer.assignment()
        if assignment:
            self.consumer.resume_partitions(assignment)
            await self.consumer.perform_seek()
        self.consumer.resume_flow()

    async def _unused(self, message: Any) -> None:
        """Refuse: the consumer hands polls to the agents itself."""
        raise NotImplementedError
