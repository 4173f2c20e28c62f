"""The worker's fetcher on a real broker: it reads on through all that aiokafka reads on through."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete

from pipeline.kafka import steady_fetcher
from pipeline.kafka.fetch_session import FetchAnswer, FetchSession
from pipeline.kafka.steady_fetcher import SteadyFetcher, fetch_steadily
from pipeline.local.kafka import Kafka

PARTITIONS = 6
READ_SECONDS = 60.0


class Log:
    """A topic of this test, its producer, and a consumer with the fetcher under test."""

    def __init__(self, kafka: Kafka) -> None:
        self.bootstrap = kafka.bootstrap
        self.topic = uuid.uuid4().hex
        self.places = [TopicPartition(self.topic, p) for p in range(PARTITIONS)]
        self.consumer: Any = None
        self.producer: Any = None

    async def write(self, *values: bytes, partition: int = 0) -> None:
        for value in values:
            await self.producer.send_and_wait(self.topic, value, partition=partition)

    async def read(self, count: int, most: int = 1_000) -> list[tuple[int, int, bytes]]:
        """Read records as (partition, offset, value)."""
        found: list[tuple[int, int, bytes]] = []
        async with asyncio.timeout(READ_SECONDS):
            while len(found) < count:
                fetched = await self.consumer.getmany(timeout_ms=1_000, max_records=most)
                assert sum(map(len, fetched.values())) <= most
                found += [
                    (tp.partition, record.offset, record.value)
                    for tp, records in fetched.items()
                    for record in records
                ]
        return found

    @property
    def fetcher(self) -> SteadyFetcher:
        fetcher = self.consumer._fetcher
        assert isinstance(fetcher, SteadyFetcher)
        return fetcher


@asynccontextmanager
async def opened(kafka: Kafka, **options: Any) -> AsyncIterator[Log]:
    log = Log(kafka)
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(log.topic, PARTITIONS, 1)])
    finally:
        await admin.close()
    log.consumer = AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        fetch_max_wait_ms=300,
        **options,
    )
    log.producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap, acks="all")
    await log.consumer.start()
    await log.producer.start()
    try:
        await fetch_steadily(log.consumer)
        log.consumer.assign(log.places)
        yield log
    finally:
        await log.consumer.stop()
        await log.producer.stop()


def run(kafka: Kafka, test: Callable[[Log], Awaitable[None]], **options: Any) -> None:
    async def go() -> None:
        async with opened(kafka, **options) as log:
            await test(log)

    asyncio.run(go())


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[FetchSession]:
    """Collect the sessions that fetchers begin."""
    begun: list[FetchSession] = []

    class Noted(FetchSession):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            begun.append(self)

    monkeypatch.setattr(steady_fetcher, "FetchSession", Noted)
    return begun


@pytest.fixture
def fetch_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetch small answers ahead too, as those of a full log."""
    monkeypatch.setattr(steady_fetcher, "PREFETCH_BYTES", 0)


def test_records_of_all_partitions_are_read_in_order_and_once(
    kafka: Kafka, sessions: list[FetchSession]
) -> None:
    async def test(log: Log) -> None:
        for number in range(20):
            await log.write(b"%d" % number, b"x", partition=number % PARTITIONS)
            found = await log.read(2)
            offset = 2 * (number // PARTITIONS)
            part = number % PARTITIONS
            assert found == [(part, offset, b"%d" % number), (part, offset + 1, b"x")]
        assert len(sessions) == 1
        assert sessions[0]._id != 0

    run(kafka, test)


def test_what_comes_while_nobody_reads_is_fetched_at_once(kafka: Kafka) -> None:
    async def test(log: Log) -> None:
        await log.write(b"0")
        assert len(await log.read(1)) == 1
        for partition in range(PARTITIONS):
            await log.write(b"1", partition=partition)
        assert not log.fetcher._records
        async with asyncio.timeout(READ_SECONDS):
            (*fetched,) = (await log.consumer.getmany(timeout_ms=10_000)).values()
        assert [len(records) for records in fetched] == [1] * PARTITIONS

    run(kafka, test)


def test_a_reader_that_waits_is_served_once_another_has_read_the_rest(kafka: Kafka) -> None:
    async def test(log: Log) -> None:
        await log.write(b"0")
        assert len(await log.read(1)) == 1
        waiting = asyncio.create_task(
            log.consumer.getmany(log.places[0], timeout_ms=2_000 * READ_SECONDS)
        )
        await log.write(b"other", partition=1)
        async with asyncio.timeout(READ_SECONDS):
            while not log.fetcher._records:  # noqa: ASYNC110 - until it is fetched
                await asyncio.sleep(0.01)
            assert list(await log.consumer.getmany(log.places[1])) == [log.places[1]]
            await log.write(b"1")
            assert list(await waiting) == [log.places[0]]

    run(kafka, test)


def test_more_records_than_a_poll_holds_are_read_in_several(kafka: Kafka) -> None:
    async def test(log: Log) -> None:
        for partition in range(PARTITIONS):
            await log.write(*(b"%d" % n for n in range(7)), partition=partition)
        found = await log.read(7 * PARTITIONS, most=3)
        assert sorted(found) == [
            (p, n, b"%d" % n) for p in range(PARTITIONS) for n in range(7)
        ]  # fmt: skip
        for p in range(PARTITIONS):
            assert [offset for part, offset, _ in found if part == p] == list(range(7))

    run(kafka, test)


@pytest.mark.usefixtures("fetch_ahead")
def test_a_seek_takes_effect_with_records_unread_and_while_the_broker_waits(kafka: Kafka) -> None:
    async def test(log: Log) -> None:
        await log.write(b"0", b"1", b"2")
        assert len(await log.read(3)) == 3
        await asyncio.sleep(0.1)  # the broker waits for more
        log.consumer.seek(log.places[0], 1)
        assert await log.read(2) == [(0, 1, b"1"), (0, 2, b"2")]

        await log.write(b"3")
        async with asyncio.timeout(READ_SECONDS):
            while not log.fetcher._records:  # noqa: ASYNC110 - until it is fetched
                await asyncio.sleep(0.01)
        log.consumer.seek(log.places[0], 0)
        assert [offset for _, offset, _ in await log.read(4)] == [0, 1, 2, 3]

    run(kafka, test)


@pytest.mark.usefixtures("fetch_ahead")
def test_a_reset_to_the_begin_works_while_records_of_other_partitions_are_unread(
    kafka: Kafka,
) -> None:
    async def test(log: Log) -> None:
        await log.write(b"0", b"1", partition=1)
        assert len(await log.read(2)) == 2
        await log.write(b"unread", partition=2)
        async with asyncio.timeout(READ_SECONDS):
            while not log.fetcher._records:  # noqa: ASYNC110 - until it is fetched
                await asyncio.sleep(0.01)
            await log.consumer.seek_to_beginning(log.places[1])
        assert sorted(await log.read(3)) == [(1, 0, b"0"), (1, 1, b"1"), (2, 0, b"unread")]

    run(kafka, test)


@pytest.mark.usefixtures("fetch_ahead")
def test_a_seek_of_one_partition_does_not_wait_for_the_backoff_of_the_unread_ones(
    kafka: Kafka,
) -> None:
    """The worker reads several partitions back one by one, with a backoff of a minute."""

    async def test(log: Log) -> None:
        log.fetcher._prefetch_backoff = 10 * READ_SECONDS
        await log.write(b"0", partition=0)
        assert len(await log.read(1)) == 1
        for number in range(3):
            await log.write(b"%d" % number, partition=1)
            async with asyncio.timeout(READ_SECONDS):
                while not log.fetcher._records:  # noqa: ASYNC110 - until it is fetched
                    await asyncio.sleep(0.01)
            log.consumer.seek(log.places[0], 0)
            await asyncio.sleep(0.1)  # the loop ends before the records are read
            assert sorted(await log.read(2)) == [(0, 0, b"0"), (1, number, b"%d" % number)]

    run(kafka, test)


def test_an_offset_that_retention_deleted_is_reset_as_the_policy_says(kafka: Kafka) -> None:
    async def test(log: Log) -> None:
        await log.write(b"0", b"1", b"2")
        await log.write(b"other", partition=3)
        assert len(await log.read(4)) == 4
        admin = AIOKafkaAdminClient(bootstrap_servers=log.bootstrap)
        await admin.start()
        try:
            await admin.delete_records({log.places[0]: RecordsToDelete(before_offset=2)})
        finally:
            await admin.close()
        log.consumer.seek(log.places[0], 0)
        await log.write(b"more", partition=3)
        assert sorted(await log.read(2)) == [(0, 2, b"2"), (3, 1, b"more")]

    run(kafka, test)


@pytest.mark.usefixtures("fetch_ahead")
@pytest.mark.parametrize("what", ["id", "epoch"])
def test_a_session_that_the_broker_dropped_is_begun_again(
    kafka: Kafka, sessions: list[FetchSession], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    async def test(log: Log) -> None:
        await log.write(b"0")
        assert len(await log.read(1)) == 1
        accept = sessions[-1].accept

        def accept_wrongly(answer: FetchAnswer) -> None:
            accept(answer)
            if what == "id":
                sessions[0]._id += 1
            else:
                sessions[0]._epoch += 7

        monkeypatch.setattr(sessions[0], "accept", accept_wrongly)
        for number in range(3):
            await log.write(b"1", partition=number)
        assert sorted(await log.read(3)) == [(0, 1, b"1"), (1, 0, b"1"), (2, 0, b"1")]
        assert len(sessions) > 1

    run(kafka, test)


def test_a_broken_connection_is_made_again(kafka: Kafka) -> None:
    async def test(log: Log) -> None:
        await log.write(b"0")
        assert len(await log.read(1)) == 1
        for connection in list(log.consumer._client._conns.values()):
            connection._writer.transport.abort()
        await log.write(b"1")
        assert await log.read(1) == [(0, 1, b"1")]

    run(kafka, test)


def test_a_new_assignment_ends_the_loops_of_the_old_one(kafka: Kafka) -> None:
    async def test(log: Log) -> None:
        await log.write(b"0", partition=0)
        await log.write(b"0", partition=1)
        assert len(await log.read(2)) == 2
        log.consumer.unsubscribe()
        log.consumer.assign([log.places[1]])
        log.consumer.seek(log.places[1], 0)
        await log.write(b"1", partition=0)
        await log.write(b"1", partition=1)
        assert await log.read(2) == [(1, 0, b"0"), (1, 1, b"1")]

    run(kafka, test)


def test_aborted_transactions_are_passed_over(kafka: Kafka) -> None:
    async def test(log: Log) -> None:
        async with AIOKafkaProducer(
            bootstrap_servers=log.bootstrap, transactional_id=log.topic
        ) as producer:
            for value, commits in ((b"a", True), (b"b", False), (b"c", True)):
                await producer.begin_transaction()
                await producer.send_and_wait(log.topic, value, partition=0)
                await (producer.commit_transaction() if commits else producer.abort_transaction())
        assert [value for *_, value in await log.read(2)] == [b"a", b"c"]
        assert await log.consumer.position(log.places[0]) >= 5

    run(kafka, test)


def test_a_broker_without_sessions_is_read_by_aiokafka(
    kafka: Kafka, monkeypatch: pytest.MonkeyPatch, sessions: list[FetchSession]
) -> None:
    monkeypatch.setattr(steady_fetcher, "has_sessions", lambda versions: False)

    async def test(log: Log) -> None:
        for number in range(3):
            await log.write(b"x", partition=number)
        assert sorted(await log.read(3)) == [(n, 0, b"x") for n in range(3)]
        assert not sessions

    run(kafka, test)
