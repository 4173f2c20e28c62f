"""The consumer between Faust and aiokafka, at a rebalance and at a stop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faust.types import TP
from mode import Service

from pipeline.kafka.polls import Chunk, Poll
from pipeline.settings import load_settings
from pipeline.worker import faust_transport
from pipeline.worker.app import faust_app
from pipeline.worker.faust_transport import (
    POLLS_IN_FLIGHT_MAX,
    PREFETCH_BACKOFF_SECONDS,
    PREFETCH_BACKOFF_SEEKING_SECONDS,
    Consumer,
    Delivery,
)

PAYMENTS, LABELS = TP("payments", 3), TP("labels", 3)
COMMITTED = 7
LABELS_BEGIN = 5
LOG_END = 10


class FakeFetcher(Service):  # type: ignore[misc]
    """Stands for Faust's consumer thread and aiokafka's fetcher, over a log of ten records.

    Attributes:
        calls: name of each call, with the prefetch backoff at that time.
        before_seek, during_seek: awaited before and while the committed offsets are requested.
        release: set once a fetch may return; a fetch waits for it.
        fetch_size: most records of a fetch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []
        self.before_seek: Callable[[], Awaitable[None]] | None = None
        self.during_seek: Callable[[], Awaitable[None]] | None = None
        self.fetch_size = LOG_END
        self.release = asyncio.Event()
        self.release.set()
        self.position = 0
        self._fetcher = SimpleNamespace(_prefetch_backoff=None)
        self._max_poll_records = LOG_END

    @property
    def backoff(self) -> Any:
        return self._fetcher._prefetch_backoff

    def note(self, name: str) -> None:
        self.calls.append((name, self.backoff))

    def _ensure_consumer(self) -> FakeFetcher:
        return self

    def assignment(self) -> set[TP]:
        return {PAYMENTS, LABELS}

    async def seek_to_committed(self) -> dict[TP, int | None]:
        self.note("seek to committed")
        self.position = COMMITTED
        if self.during_seek is not None:
            await self.during_seek()
        return {PAYMENTS: COMMITTED}

    async def earliest_offsets(self, *places: TP) -> dict[TP, int]:
        self.note(f"begin of {', '.join(place.topic for place in places)}")
        return dict.fromkeys(places, LABELS_BEGIN)

    def seek(self, place: TP, offset: int) -> None:
        self.note(f"seek {place.topic} to {offset}")
        if place == PAYMENTS:
            self.position = offset

    async def _fetch_records(self, *_: Any, **__: Any) -> Mapping[TP, list[Any]]:
        first = self.position
        end = self.position = min(first + self.fetch_size, LOG_END)
        await self.release.wait()
        await asyncio.sleep(0)
        await until(lambda: not first == end == self.position)  # at the end it waits for a seek
        records = [SimpleNamespace(offset=n) for n in range(first, end)]
        return {PAYMENTS: records} if records else {}


class ConsumerUnderTest(Consumer):
    """The real consumer, over the fake fetcher."""

    _thread: FakeFetcher

    def _new_consumer_thread(self) -> Any:
        return FakeFetcher()

    def __init__(self, polls: list[Delivery], *args: Any) -> None:
        super().__init__(*args)
        self._polls = polls

    def _send(self, polls: Mapping[str, Poll]) -> None:
        super()._send(polls)
        self._polls += [self._waiting[topic][-1] for topic in polls]


def consumer_in(directory: Path, polls: list[Delivery]) -> ConsumerUnderTest:
    """Make a consumer of a real Faust app; it appends what it sends to ``polls``."""
    app = faust_app(load_settings(), directory)

    async def unused(message: Any) -> None:
        raise AssertionError("the consumer hands polls to the agents itself")

    async def on_revoked(revoked: set[TP]) -> None:
        raise AssertionError("no partition is revoked here")

    async def on_assigned(assigned: set[TP], generation: int) -> None:
        consumer._thread.note("assigned")
        if consumer._thread.before_seek is not None:
            await consumer._thread.before_seek()
        await consumer.perform_seek()  # Faust does it in another task

    consumer = ConsumerUnderTest(polls, app.transport, unused, on_revoked, on_assigned)
    consumer.from_begin = {LABELS.topic}
    return consumer


def test_aiokafka_checks_for_work_often_during_a_seek(tmp_path: Path) -> None:
    """A seek to a partition's begin would wait for the longer backoff until it fails."""

    async def run() -> None:
        consumer = consumer_in(tmp_path, [])
        fetcher = consumer._thread
        steps = ["assigned", "seek to committed", "seek payments to 7"]
        steps += ["begin of labels", "seek labels to 5"]
        for _ in range(2):  # at the first assignment, and at a later one
            await consumer.on_partitions_assigned({PAYMENTS, LABELS})
            assert fetcher.calls == [(step, PREFETCH_BACKOFF_SEEKING_SECONDS) for step in steps]
            assert fetcher.backoff == PREFETCH_BACKOFF_SECONDS
            fetcher.calls.clear()

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - any condition of the consumer
            await asyncio.sleep(0)


def chunks(polls: list[Delivery]) -> list[tuple[int, int]]:
    found = [delivery.poll.chunks[PAYMENTS.partition] for delivery in polls]
    return [(chunk.begin, chunk.end) for chunk in found]


def drain(consumer: Consumer) -> asyncio.Task[None]:
    """Fetch and send polls, as a task of Faust's fetcher does."""
    consumer.resume_flow()
    return asyncio.create_task(consumer._drain_messages(SimpleNamespace(should_stop=False)))


async def cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(60):
            await task


def test_records_that_come_during_a_seek_are_read_again(tmp_path: Path) -> None:
    """Otherwise the next chunk begins behind them, and they count as read: they are lost."""

    async def run() -> None:
        polls: list[Delivery] = []
        consumer = consumer_in(tmp_path, polls)
        fetcher = consumer._thread
        tasks: list[asyncio.Task[None]] = []

        async def fetch() -> None:
            tasks.append(drain(consumer))
            await until(lambda: bool(polls))

        fetcher.during_seek = fetch

        await consumer.on_partitions_assigned({PAYMENTS, LABELS})
        await until(lambda: len(polls) == 2)

        assert chunks(polls) == [(COMMITTED, LOG_END)] * 2
        await cancel(tasks[0])

    asyncio.run(run())


def test_a_fetch_from_before_a_seek_is_discarded(tmp_path: Path) -> None:
    """It continues from an earlier position than the committed one."""

    async def run() -> None:
        polls: list[Delivery] = []
        consumer = consumer_in(tmp_path, polls)
        fetcher = consumer._thread
        tasks: list[asyncio.Task[None]] = []

        async def start_fetch() -> None:
            tasks.append(drain(consumer))
            await until(lambda: fetcher.position == LOG_END)

        fetcher.before_seek = start_fetch
        fetcher.release.clear()

        await consumer.on_partitions_assigned({PAYMENTS, LABELS})
        fetcher.release.set()
        await until(lambda: bool(polls))

        assert chunks(polls) == [(COMMITTED, LOG_END)]
        await cancel(tasks[0])

    asyncio.run(run())


@pytest.mark.parametrize("ticks", range(4))
def test_a_stop_while_a_poll_makes_room_is_not_lost(tmp_path: Path, ticks: int) -> None:
    """A worker whose cancellation was lost waited for ever, until it was killed."""

    async def run() -> None:
        polls: list[Delivery] = []
        consumer = consumer_in(tmp_path, polls)
        await consumer.on_partitions_assigned({PAYMENTS, LABELS})
        consumer._thread.fetch_size = 1
        draining = drain(consumer)
        await until(lambda: len(polls) == POLLS_IN_FLIGHT_MAX)
        await asyncio.sleep(0.01)  # now it waits for room

        consumer.abandon(polls[0])
        for _ in range(ticks):
            await asyncio.sleep(0)

        await cancel(draining)

    asyncio.run(run())


def test_a_consumer_that_waits_for_room_notices_its_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faust_transport, "FETCH_TIMEOUT_SECONDS", 0.01)

    async def run() -> None:
        polls: list[Delivery] = []
        consumer = consumer_in(tmp_path, polls)
        await consumer.on_partitions_assigned({PAYMENTS, LABELS})
        consumer._thread.fetch_size = 1
        consumer.resume_flow()
        fetcher = SimpleNamespace(should_stop=False)
        draining = asyncio.create_task(consumer._drain_messages(fetcher))
        await until(lambda: len(polls) == POLLS_IN_FLIGHT_MAX)
        await asyncio.sleep(0.05)
        assert len(polls) == POLLS_IN_FLIGHT_MAX
        fetcher.should_stop = True
        async with asyncio.timeout(60):
            await draining
        assert len(polls) == POLLS_IN_FLIGHT_MAX

    asyncio.run(run())


def test_there_is_room_until_one_topic_has_its_most_polls_in_flight(tmp_path: Path) -> None:
    async def run() -> None:
        polls: list[Delivery] = []
        consumer = consumer_in(tmp_path, polls)
        labels = {LABELS.topic: Poll({LABELS.partition: Chunk(0, 1, ())})}
        for offset in range(POLLS_IN_FLIGHT_MAX):
            assert consumer._has_room()
            consumer._send(payments(offset))
            if not offset:
                consumer._send(labels)
        assert not consumer._has_room()
        consumer.abandon(polls[0])
        assert consumer._has_room()

    asyncio.run(run())


def delivered(consumer: Consumer, polls: list[Delivery]) -> asyncio.Task[None]:
    """Collect what the agent of the payments gets."""

    async def agent() -> None:
        async for delivery in consumer.deliveries(PAYMENTS.topic):
            polls.append(delivery)

    return asyncio.create_task(agent())


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def payments(offset: int) -> dict[str, Poll]:
    return {PAYMENTS.topic: Poll({PAYMENTS.partition: Chunk(offset, offset + 1, ())})}


def test_an_agent_gets_no_poll_from_the_begin_of_a_rebalance_to_the_end_of_its_seeks(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        got: list[Delivery] = []
        consumer = consumer_in(tmp_path, [])
        agent = delivered(consumer, got)
        consumer._send(payments(0))
        await turns()
        assert not got
        consumer.resume_flow()
        await turns()
        assert chunks(got) == [(0, 1)]
        assert got[0].at_work

        consumer.stop_flow()
        consumer._send(payments(1))
        await turns()
        assert len(got) == 1
        waiting = asyncio.create_task(consumer.wait_empty())
        await turns()
        assert not waiting.done(), "the poll at work is waited for"
        assert consumer.ack(got[0])
        await waiting

        consumer._reset()
        consumer.resume_flow()
        await turns()
        assert len(got) == 1, "the poll from before the rebalance is dropped"
        consumer._send(payments(2))
        await turns()
        assert chunks(got)[1:] == [(2, 3)]
        await cancel(agent)

    asyncio.run(run())


def test_a_late_ack_of_a_poll_from_before_a_rebalance_has_no_effect(tmp_path: Path) -> None:
    async def run() -> None:
        got: list[Delivery] = []
        consumer = consumer_in(tmp_path, [])
        consumer.resume_flow()
        agent = delivered(consumer, got)
        consumer._send(payments(0))
        await turns()
        consumer._reset()
        got[0].poll.applied[PAYMENTS.partition] = 1
        assert not consumer.ack(got[0])
        assert not list(consumer._filter_tps_with_pending_acks())
        await cancel(agent)

    asyncio.run(run())
