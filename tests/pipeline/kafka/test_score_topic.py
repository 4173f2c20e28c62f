"""One contract of publisher and score log, tested on the memory broker and on a real one."""

from __future__ import annotations

import asyncio
import gc
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, Protocol

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import MessageSizeTooLargeError
from aiokafka.partitioner import murmur2

from pipeline.kafka.committed_offsets import committed_offsets
from pipeline.kafka.message_limits import PRODUCE_BATCH_BYTES
from pipeline.kafka.polls import Bounds, Record
from pipeline.kafka.producer import (
    AppendResult,
    KafkaProducer,
    Outgoing,
    PartOutput,
    Publisher,
    PublishError,
    Transactions,
    _all_of,
)
from pipeline.kafka.score_log import KafkaScoreLog, LoggedScore, ScoreLog
from pipeline.kafka.topics import ROLES, TopicRole, ensure_topics
from pipeline.kafka.transactional_producer import (
    PartitionProducer,
    TransactionalProducer,
)
from pipeline.local.kafka import Kafka
from pipeline.scoring.recovery import ALL_SOURCES
from pipeline.settings import Settings, load_settings
from tests.fakes.memory import (
    MemoryKafka,
    MemoryProducer,
    MemoryScoreLog,
    MemoryTransactions,
    no_interrupt,
)
from tests.fakes.running_pipeline import until

PARTITIONS = 3


class Broker(Protocol):
    """A broker with the clients under test, and direct access that bypasses them.

    Attributes:
        settings: name topics that only this test uses.
        publisher, score_log: the clients under test.
    """

    settings: Settings
    publisher: Publisher
    score_log: ScoreLog

    async def append(self, partition: int, key: bytes | None, value: bytes | None) -> int:
        """Append to the scores topic as another worker would; return the offset."""

    async def transactions(self) -> Transactions:
        """Make the transactions of another worker."""

    async def committed(self) -> dict[int, int]:
        """Return the group's committed offsets."""

    async def leave_open(self, partition: int, value: bytes) -> None:
        """Write a score and an alert as a worker that dies before its commit."""

    async def records(self, topic: str, partition: int) -> Sequence[Record]:
        """Return all committed records of a partition."""

    async def delete_records(self, topic: str, partition: int, before: int) -> None:
        """Delete records as retention does."""


Opened = Callable[[], AbstractAsyncContextManager[Broker]]


class MemoryBroker:
    """The broker in memory."""

    def __init__(self) -> None:
        self.settings = load_settings(topic_partitions=PARTITIONS)
        topics = {self.settings.topic(role): PARTITIONS for role in ROLES}
        self._kafka = MemoryKafka(topics, clock_ms=lambda: 0)
        self.publisher: Publisher = MemoryProducer(self._kafka, self.settings)
        self.score_log: ScoreLog = MemoryScoreLog(self._kafka, self.settings)

    async def append(self, partition: int, key: bytes | None, value: bytes | None) -> int:
        return self._kafka.produce(self.settings.topic("scores"), key, value, partition=partition)

    async def transactions(self) -> Transactions:
        return MemoryTransactions(self._kafka, self.settings)

    async def committed(self) -> dict[int, int]:
        topic = self.settings.topic("transactions")
        found = {p: self._kafka.committed("recur", topic, p) for p in range(PARTITIONS)}
        return {p: offset for p, offset in found.items() if offset is not None}

    async def leave_open(self, partition: int, value: bytes) -> None:
        def die(step: str) -> None:
            if step == "before commit transaction":
                raise InterruptedError

        transactions = await self.transactions()
        epoch = await transactions.take(partition)
        self._kafka.interrupt = die
        output = PartOutput([Outgoing(b"A", value)], [Outgoing(b"A", value)], [], 1, epoch)
        with pytest.raises(InterruptedError):
            await transactions.commit({partition: output})
        self._kafka.interrupt = no_interrupt

    async def records(self, topic: str, partition: int) -> Sequence[Record]:
        return self._kafka.records(topic, partition)

    async def delete_records(self, topic: str, partition: int, before: int) -> None:
        self._kafka.delete_records(topic, partition, before)


class RealBroker:
    """The real clients, on topics that only this test uses."""

    def __init__(self, bootstrap: str) -> None:
        self.settings = load_settings(
            kafka_bootstrap_servers=bootstrap,
            topic_partitions=PARTITIONS,
            topic_prefix=f"{uuid.uuid4().hex[:12]}-",
            # The tests send dead letters with values of the largest size.
            dead_letter_value_max_bytes=900_000,
            kafka_group_id=f"group-{uuid.uuid4().hex[:12]}",
        )
        self._transactional: list[TransactionalProducer] = []
        self._publisher = KafkaProducer(self.settings)
        self._score_log = KafkaScoreLog(self.settings)
        self._producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all")
        self.publisher: Publisher = self._publisher
        self.score_log: ScoreLog = self._score_log

    async def start(self) -> None:
        await ensure_topics(self.settings)
        for client in (self._publisher, self._score_log, self._producer):
            await client.start()

    async def stop(self) -> None:
        for client in (self._publisher, self._score_log, self._producer, *self._transactional):
            await client.stop()

    async def transactions(self) -> Transactions:
        self._transactional.append(TransactionalProducer(self.settings))
        return self._transactional[-1]

    async def committed(self) -> dict[int, int]:
        return await committed_offsets(self.settings)

    async def leave_open(self, partition: int, value: bytes) -> None:
        publisher = PartitionProducer(self.settings, partition)
        await publisher.start()
        assert publisher._producer is not None
        await publisher._producer.begin_transaction()
        await publisher.publish({partition: [Outgoing(b"A", value)]}, [Outgoing(b"A", value)], [])
        await publisher.stop()

    async def append(self, partition: int, key: bytes | None, value: bytes | None) -> int:
        sent = await self._producer.send_and_wait(
            self.settings.topic("scores"), value, key, partition=partition
        )
        offset: int = sent.offset
        return offset

    async def records(self, topic: str, partition: int) -> Sequence[Record]:
        place = TopicPartition(topic, partition)
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.settings.kafka_bootstrap_servers,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
        )
        consumer.assign([place])
        async with consumer:
            end = (await consumer.end_offsets([place]))[place]
            found: list[Any] = []
            while await consumer.position(place) < end:
                found += (await consumer.getmany(place, timeout_ms=1000)).get(place, [])
            return found

    async def delete_records(self, topic: str, partition: int, before: int) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.settings.kafka_bootstrap_servers)
        await admin.start()
        try:
            place = TopicPartition(topic, partition)
            await admin.delete_records({place: RecordsToDelete(before_offset=before)})
        finally:
            await admin.close()


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.live)])
def opened(request: pytest.FixtureRequest) -> Opened:
    """Give an opener of a broker with empty topics."""
    if request.param == "memory":
        return open_memory
    return open_real(request.getfixturevalue("kafka"))


@asynccontextmanager
async def open_memory() -> AsyncIterator[Broker]:
    yield MemoryBroker()


def open_real(kafka: Kafka) -> Opened:
    @asynccontextmanager
    async def open_it() -> AsyncIterator[Broker]:
        broker = RealBroker(kafka.bootstrap)
        try:
            await broker.start()
            yield broker
        finally:
            await broker.stop()

    return open_it


def run(opened: Opened, test: Callable[[Broker], Awaitable[None]]) -> None:
    async def go() -> None:
        async with opened() as broker:
            await test(broker)

    asyncio.run(go())


def score(
    settings: Settings, partition: int, offset: int, *, padding: int = 0, number: float = 0.5
) -> bytes:
    """Make a score of the transaction at an offset, with ``padding`` more bytes."""
    source = f"{settings.topic('transactions')}:{partition}:{offset}"
    return b'{"source":"%b","score":%b,"decision":"review","x":"%b"}' % (
        source.encode(),
        repr(number).encode(),
        b"x" * padding,
    )


def scores(
    broker: Broker, partition: int, offsets: Sequence[int], padding: int = 0
) -> list[Outgoing]:
    return [
        Outgoing(b"A%d" % offset, score(broker.settings, partition, offset, padding=padding))
        for offset in offsets
    ]


async def read(
    broker: Broker, partition: int, start: int, end: int, until_source: int = ALL_SOURCES
) -> tuple[dict[int, LoggedScore], int]:
    return await broker.score_log.read(partition, start, end, until_source)


# publish ---------------------------------------------------------------------------------


def test_scores_go_to_their_partition_in_order_and_their_offsets_are_returned(
    opened: Opened,
) -> None:
    async def test(broker: Broker) -> None:
        appended = await broker.publisher.publish(
            {2: scores(broker, 2, [7, 8, 9]), 0: scores(broker, 0, [1, 2])}, [], []
        )
        assert appended == {2: AppendResult(0, 3), 0: AppendResult(0, 2)}

        appended = await broker.publisher.publish({2: scores(broker, 2, [10])}, [], [])
        assert appended == {2: AppendResult(3, 4)}

        topic = broker.settings.topic("scores")
        found = await broker.records(topic, 2)
        assert [record.offset for record in found] == [0, 1, 2, 3]
        expected = scores(broker, 2, [7, 8, 9, 10])
        assert [(r.key, r.value) for r in found] == [(o.key, o.value) for o in expected]
        assert len(await broker.records(topic, 0)) == 2
        assert len(await broker.records(topic, 1)) == 0

    run(opened, test)


def test_the_base_offset_shows_that_another_worker_wrote_in_between(opened: Opened) -> None:
    async def test(broker: Broker) -> None:
        await broker.publisher.publish({1: scores(broker, 1, [0, 1])}, [], [])
        assert await broker.append(1, b"A2", b"of a zombie") == 2

        appended = await broker.publisher.publish({1: scores(broker, 1, [2])}, [], [])

        assert appended == {1: AppendResult(3, 4)}

    run(opened, test)


def test_more_than_one_batch_of_scores_stays_in_order_and_together(opened: Opened) -> None:
    padding = 2_000
    count = 3 * PRODUCE_BATCH_BYTES // padding

    async def test(broker: Broker) -> None:
        appended = await broker.publisher.publish(
            {0: scores(broker, 0, range(count), padding)}, [], []
        )

        assert appended == {0: AppendResult(0, count)}
        found, position = await read(broker, 0, 0, count)
        assert list(found) == list(range(count))
        assert position == count

    run(opened, test)


def test_a_score_larger_than_a_batch_is_published_alone(opened: Opened) -> None:
    async def test(broker: Broker) -> None:
        long = scores(broker, 0, [1], PRODUCE_BATCH_BYTES + 1000)

        appended = await broker.publisher.publish(
            {0: [*scores(broker, 0, [0]), *long, *scores(broker, 0, [2])]}, [], []
        )

        assert appended == {0: AppendResult(0, 3)}
        assert list((await read(broker, 0, 0, 3))[0]) == [0, 1, 2]

    run(opened, test)


@pytest.mark.parametrize("role", ["alerts", "dead_letter"])
def test_alerts_and_rejected_records_arrive_with_key_value_and_headers(
    opened: Opened, role: str
) -> None:
    headers = (("reason", b"not_json"), ("offset", b"12"), ("empty", b""), ("twice", b"1"))
    sent = [
        Outgoing(b"A1", b"value", headers),
        Outgoing(b"A2", b""),
        Outgoing(b"A2", None, headers),
        Outgoing(b"\xff\x00", b"\xff\x00", (("twice", b"1"), ("twice", b"2"))),
        Outgoing(None, b"no key"),
        Outgoing(b"A3", b"x" * 900_000, headers),
    ]

    async def test(broker: Broker) -> None:
        alerts = sent if role == "alerts" else []
        rejected = sent if role == "dead_letter" else []

        assert await broker.publisher.publish({}, alerts, rejected) == {}

        topic = broker.settings.topic(role)  # type: ignore[arg-type]
        found = [
            (partition, record)
            for partition in range(PARTITIONS)
            for record in await broker.records(topic, partition)
        ]
        assert sorted(
            (record.key or b"", record.value or b"", tuple(record.headers)) for _, record in found
        ) == sorted((out.key or b"", out.value or b"", out.headers) for out in sent)
        for partition, record in found:
            if record.key is not None:
                assert partition == (murmur2(record.key) & 0x7FFFFFFF) % PARTITIONS
        nulls = [record.value for _, record in found if not record.value]
        assert sorted(nulls, key=repr) == [None, b""], "null and empty stay apart"

    run(opened, test)


def test_publishing_nothing_is_answered_with_nothing(opened: Opened) -> None:
    async def test(broker: Broker) -> None:
        assert await broker.publisher.publish({}, [], []) == {}
        bounds = await broker.score_log.bounds(broker.settings.topic("scores"), 0)
        assert bounds == Bounds(0, 0)

    run(opened, test)


# commit ----------------------------------------------------------------------------------


def output_of(
    broker: Broker, partition: int, offsets: Sequence[int], epoch: int, *, alerts: int = 0
) -> PartOutput:
    """Make the output of transactions; the first ``alerts`` raise alerts, and one is rejected."""
    sent = scores(broker, partition, offsets)
    rejected = [Outgoing(b"A", b"junk", (("reason", b"not_json"),))] if alerts else []
    return PartOutput(sent, sent[:alerts], rejected, offsets[-1] + 1 if offsets else 7, epoch)


async def everything(broker: Broker, role: TopicRole, least: int = 0) -> list[bytes | None]:
    """Wait for at least ``least`` committed records of a topic, and return their values.

    A broker shows committed records a moment after it confirms the commit.
    """
    topic = broker.settings.topic(role)
    values: list[bytes | None] = []

    async def are_visible() -> bool:
        found = [await broker.records(topic, partition) for partition in range(PARTITIONS)]
        values[:] = [record.value for records in found for record in records]
        return len(values) >= least

    await until(are_visible, "committed records to be visible")
    return values


def test_output_of_partitions_is_committed_with_their_offsets(opened: Opened) -> None:
    """The next offset is behind the marker, so the next commit finds no gap."""

    async def test(broker: Broker) -> None:
        transactions = await broker.transactions()
        epochs = [await transactions.take(partition) for partition in range(2)]
        first = await transactions.commit(
            {p: output_of(broker, p, range(5), epochs[p], alerts=2) for p in range(2)}
        )
        second = await transactions.commit({1: output_of(broker, 1, range(5, 9), epochs[1])})

        assert first == {0: AppendResult(0, 6), 1: AppendResult(0, 6)}
        assert second == {1: AppendResult(6, 11)}
        await until_committed(broker, {0: 5, 1: 9})
        bounds = await broker.score_log.bounds(broker.settings.topic("scores"), 1)
        assert bounds == Bounds(0, 11)
        found, position = await read(broker, 1, 0, 11)
        assert (list(found), position) == (list(range(9)), 11)
        assert len(await everything(broker, "alerts", 4)) == 4
        assert await everything(broker, "dead_letter", 2) == [b"junk"] * 2

    run(opened, test)


def test_an_offset_without_records_is_committed(opened: Opened) -> None:
    """Duplicates publish nothing, and the group's offset still advances."""

    async def test(broker: Broker) -> None:
        transactions = await broker.transactions()
        epoch = await transactions.take(2)

        assert await transactions.commit({2: output_of(broker, 2, [], epoch)}) == {2: None}
        await until_committed(broker, {2: 7})

    run(opened, test)


async def until_committed(broker: Broker, offsets: dict[int, int]) -> None:
    """Wait until the group has these offsets: the broker shows them a moment after the commit."""
    async with asyncio.timeout(60):
        while True:
            if await broker.committed() == offsets:
                return
            await asyncio.sleep(0.02)


def test_the_new_owner_of_a_partition_fences_the_old_one(opened: Opened) -> None:
    """The zombie commits no output and no offset there, but still does in its own partition."""

    async def test(broker: Broker) -> None:
        zombie, owner = await broker.transactions(), await broker.transactions()
        epochs = [await zombie.take(partition) for partition in range(2)]
        await zombie.commit({0: output_of(broker, 0, range(3), epochs[0])})
        epoch = await owner.take(0)
        before = await broker.committed()

        late = {p: output_of(broker, p, range(3, 6), epochs[p], alerts=1) for p in range(2)}
        committed = await zombie.commit(late)

        assert list(committed) == [1]
        await until_committed(broker, before | {1: 6})
        assert len(await everything(broker, "scores", 6)) == 3 + 3
        assert len(await everything(broker, "alerts", 1)) == 1
        assert await zombie.commit({0: output_of(broker, 0, range(3, 6), epochs[0])}) == {}

        assert list(await owner.commit({0: output_of(broker, 0, range(3, 5), epoch)})) == [0]
        await until_committed(broker, before | {0: 5, 1: 6})
        bounds = await broker.score_log.bounds(broker.settings.topic("scores"), 0)
        found, _ = await read(broker, 0, 0, bounds.end)
        assert list(found) == [0, 1, 2, 3, 4]

    run(opened, test)


def test_a_worker_that_takes_a_partition_again_commits_no_earlier_output(
    opened: Opened,
) -> None:
    """The earlier output came from states that the worker has dropped."""

    async def test(broker: Broker) -> None:
        transactions = await broker.transactions()
        before = await transactions.take(0)
        epoch = await transactions.take(0)

        assert await transactions.commit({0: output_of(broker, 0, range(3), before)}) == {}
        assert list(await transactions.commit({0: output_of(broker, 0, range(3), epoch)})) == [0]
        assert len(await everything(broker, "scores", 3)) == 3

    run(opened, test)


def test_the_next_owner_aborts_the_open_transaction_of_a_dead_worker(opened: Opened) -> None:
    """Its records keep their offsets, but no reader sees them."""

    async def test(broker: Broker) -> None:
        await broker.leave_open(0, score(broker.settings, 0, 0, number=0.9))
        transactions = await broker.transactions()
        epoch = await transactions.take(0)

        topic = broker.settings.topic("scores")
        bounds = await broker.score_log.bounds(topic, 0)
        assert bounds == Bounds(0, 2)
        assert await asyncio.wait_for(read(broker, 0, 0, 2), 60) == ({}, 2)
        committed = await transactions.commit({0: output_of(broker, 0, [0], epoch, alerts=1)})
        assert committed == {0: AppendResult(2, 4)}
        found, position = await read(broker, 0, 0, 4)
        assert (found[0].score.score, position) == (0.5, 4)
        assert len(await everything(broker, "scores", 1)) == 1
        assert len(await everything(broker, "alerts", 1)) == 1

    run(opened, test)


def test_refused_output_is_not_committed_in_part(kafka: Kafka) -> None:
    async def test(broker: Broker) -> None:
        transactions = await broker.transactions()
        epoch = await transactions.take(0)
        large = Outgoing(b"A1", b"x" * 2_000_000)
        with pytest.raises(PublishError, match="MessageSizeTooLarge"):
            await transactions.commit(
                {0: output_of(broker, 0, range(3), epoch)._replace(alerts=[large])}
            )

        await transactions.take(0)
        assert await everything(broker, "scores") == []
        assert await broker.committed() == {}

    run(open_real(kafka), test)


# refusals --------------------------------------------------------------------------------


def test_a_refused_alert_ends_the_publishing(kafka: Kafka) -> None:
    async def test(broker: Broker) -> None:
        with pytest.raises(PublishError, match="MessageSizeTooLarge"):
            await broker.publisher.publish({}, [Outgoing(b"A1", b"x" * 2_000_000)], [])

    run(open_real(kafka), test)


PROBE = b"p" * 5_000
"""A value that a topic refuses once its limit is low."""


def letter(key: bytes, size: int = 10) -> Outgoing:
    """Make a dead letter of a record at offset 7."""
    place = {"topic": b"transactions", "partition": b"0", "offset": b"7"}
    return Outgoing(key, b"x" * size, tuple(place.items()))


async def all_records(broker: Broker, role: TopicRole) -> list[Record]:
    topic = broker.settings.topic(role)
    return [r for p in range(PARTITIONS) for r in await broker.records(topic, p)]


async def limit_dead_letters(broker: Broker) -> None:
    """Let the dead-letter topic accept small records only."""
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.settings.kafka_bootstrap_servers)
    await admin.start()
    try:
        configs = {"max.message.bytes": "1000"}
        name = broker.settings.topic("dead_letter")
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name, configs)])
    finally:
        await admin.close()
    # The broker applies the new limit a moment later, in each partition.
    producer = AIOKafkaProducer(bootstrap_servers=broker.settings.kafka_bootstrap_servers)
    await producer.start()
    try:
        for partition in range(PARTITIONS):
            await until(partial(is_refused, producer, name, partition), "the new limit")
    finally:
        await producer.stop()


async def is_refused(producer: AIOKafkaProducer, topic: str, partition: int) -> bool:
    try:
        await producer.send_and_wait(topic, PROBE, partition=partition)
    except MessageSizeTooLargeError:
        return True
    return False


@pytest.mark.parametrize("transactional", [False, True])
def test_a_dead_letter_that_is_refused_stops_nothing_and_is_counted(
    kafka: Kafka, caplog: pytest.LogCaptureFixture, transactional: bool
) -> None:
    """Other records are published although a refusal breaks aiokafka's sequence."""
    sent = [letter(b"A"), letter(b"A", 5_000), letter(b"B"), letter(b"A", 5_000)]
    later = [letter(b"A", 20), letter(b"B", 20)]

    async def test(broker: Broker) -> None:
        lost: list[int] = []
        if transactional:
            transactions = TransactionalProducer(broker.settings, on_lost_dead_letters=lost.append)
            try:
                await limit_dead_letters(broker)
                epoch = await transactions.take(0)
                output = PartOutput(scores(broker, 0, [0]), [], sent, 1, epoch)
                assert not await transactions.commit({0: output})  # take the partition again
                epoch = await transactions.take(0)
                for i, letters in enumerate((sent, later)):
                    output = PartOutput(scores(broker, 0, [i]), [], letters, i + 1, epoch)
                    assert await transactions.commit({0: output})
            finally:
                await transactions.stop()
            await until_committed(broker, {0: 2})
        else:
            publisher = KafkaProducer(broker.settings, on_lost_dead_letters=lost.append)
            await publisher.start()
            try:
                await limit_dead_letters(broker)
                for i, letters in enumerate((sent, later)):
                    await publisher.publish({0: scores(broker, 0, [i])}, [], letters)
            finally:
                await publisher.stop()
        assert len(await all_records(broker, "scores")) == 2
        found = [
            (r.key, len(r.value or b""))
            for r in await all_records(broker, "dead_letter")
            if r.value != PROBE
        ]
        wanted = [(one.key, len(one.value or b"")) for one in (sent[0], sent[2], *later)]
        assert sorted(set(found)) == sorted(wanted)  # one may be published twice
        assert sum(lost) == 2

    run(open_real(kafka), test)
    (line,) = [r for r in caplog.records if "refused a dead letter" in r.message]
    assert line.why == "MessageSizeTooLargeError"  # type: ignore[attr-defined]
    assert (line.partition, line.offset) == ("0", "7")  # type: ignore[attr-defined]


async def seconds_of_publish(broker: Broker, linger_ms: int, alerts: Sequence[Outgoing]) -> float:
    """Publish a score, and alerts, with that linger."""
    settings = broker.settings.model_copy(update={"kafka_linger_ms": linger_ms})
    publisher = KafkaProducer(settings)
    await publisher.start()
    clock = asyncio.get_running_loop().time
    before = clock()
    try:
        async with asyncio.timeout(60):
            await publisher.publish({0: scores(broker, 0, [0])}, alerts, [])
            return clock() - before
    finally:
        await publisher.stop()


def test_alerts_linger_as_long_as_the_setting_says_and_scores_never_do(kafka: Kafka) -> None:
    async def test(broker: Broker) -> None:
        assert await seconds_of_publish(broker, 400, [Outgoing(b"A", b"alert")]) > 0.39
        assert await seconds_of_publish(broker, 600_000, []) < 60
        assert len(await all_records(broker, "alerts")) == 1
        assert len(await all_records(broker, "scores")) == 2

    run(open_real(kafka), test)


def test_interleaved_batches_have_unknown_offsets(kafka: Kafka) -> None:
    padding = 2_000
    count = 6 * PRODUCE_BATCH_BYTES // padding

    async def test(broker: Broker) -> None:
        published = asyncio.Event()

        async def write_between() -> None:
            while not published.is_set():
                await broker.append(0, b"Z", b"of a zombie")

        writing = asyncio.create_task(write_between())
        sent = scores(broker, 0, range(count), padding)
        appended = (await broker.publisher.publish({0: sent}, [], []))[0]
        published.set()
        await writing

        found = [
            r.offset
            for r in await broker.records(broker.settings.topic("scores"), 0)
            if r.value != b"of a zombie"
        ]
        together = found == list(range(found[0], found[0] + count))
        assert appended == (
            AppendResult(found[0], found[-1] + 1) if together else AppendResult(None, None)
        )

    run(open_real(kafka), test)


def test_publishes_at_the_same_time_keep_their_order_within_a_partition(kafka: Kafka) -> None:
    async def test(broker: Broker) -> None:
        appended = await asyncio.gather(
            *(broker.publisher.publish({0: scores(broker, 0, [n])}, [], []) for n in range(5))
        )

        assert appended == [{0: AppendResult(n, n + 1)} for n in range(5)]
        found = await broker.records(broker.settings.topic("scores"), 0)
        assert [r.value for r in found] == [o.value for o in scores(broker, 0, range(5))]

    run(open_real(kafka), test)


def test_a_cancelled_publish_takes_nothing_back_and_the_next_one_follows_it(kafka: Kafka) -> None:
    async def test(broker: Broker) -> None:
        await broker.publisher.publish({0: scores(broker, 0, [0])}, [], [])
        sent: dict[int, Sequence[Outgoing]] = {p: scores(broker, p, [1, 2]) for p in range(2)}
        publishing = asyncio.create_task(broker.publisher.publish(sent, [], []))
        await asyncio.sleep(0)  # its batches are queued now
        publishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await publishing

        appended = await broker.publisher.publish({0: scores(broker, 0, [3])}, [], [])

        assert appended == {0: AppendResult(3, 4)}
        assert len(await all_records(broker, "scores")) == 6

    run(open_real(kafka), test)


def test_a_publisher_that_has_stopped_refuses_scores(kafka: Kafka) -> None:
    async def test(broker: Broker) -> None:
        assert isinstance(broker.publisher, KafkaProducer)
        await broker.publisher.publish({0: scores(broker, 0, [0])}, [], [])
        await broker.publisher.stop()
        with pytest.raises(PublishError):
            await broker.publisher.publish({0: scores(broker, 0, [1])}, [], [])

    run(open_real(kafka), test)


@pytest.mark.filterwarnings("error")
def test_an_error_after_a_cancelled_wait_is_no_lost_one() -> None:
    problems: list[Any] = []

    async def test() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: problems.append(context))
        deliveries = [loop.create_future() for _ in range(2)]
        waiting = asyncio.create_task(_all_of(deliveries))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not any(delivery.done() for delivery in deliveries)
        for delivery in deliveries:
            delivery.set_exception(MessageSizeTooLargeError())
        await asyncio.sleep(0)

    asyncio.run(test())
    gc.collect()
    assert not problems


# read ------------------------------------------------------------------------------------


def test_published_scores_are_read_by_source_with_their_bytes(opened: Opened) -> None:
    async def test(broker: Broker) -> None:
        sent = scores(broker, 1, [5, 6, 9])
        await broker.publisher.publish({0: scores(broker, 0, [5]), 1: sent}, [], [])

        found, position = await read(broker, 1, 0, 3)

        assert list(found) == [5, 6, 9]
        assert position == 3
        assert [k.value for k in found.values()] == [out.value for out in sent]
        assert {k.score.decision for k in found.values()} == {"review"}
        assert (await read(broker, 1, 1, 3))[0].keys() == {6, 9}

    run(opened, test)


def test_reading_an_empty_range_returns_at_once(opened: Opened) -> None:
    async def test(broker: Broker) -> None:
        await broker.publisher.publish({0: scores(broker, 0, [0])}, [], [])

        assert await read(broker, 0, 1, 1) == ({}, 1)
        assert await read(broker, 0, 0, 0) == ({}, 0)
        assert (await read(broker, 2, 0, 0))[0] == {}

    run(opened, test)


def test_scores_behind_the_end_are_not_read(opened: Opened) -> None:
    """The reader itself has published those scores since."""

    async def test(broker: Broker) -> None:
        await broker.publisher.publish({0: scores(broker, 0, range(50))}, [], [])

        found, position = await read(broker, 0, 10, 20)

        assert list(found) == list(range(10, 20))
        assert position == 20

    run(opened, test)


def test_reading_stops_at_a_source_and_continues_from_there(opened: Opened) -> None:
    padding, count = 2_000, 1_500  # several fetches of 1 MiB

    async def test(broker: Broker) -> None:
        await broker.publisher.publish({0: scores(broker, 0, range(count), padding)}, [], [])

        first, position = await read(broker, 0, 0, count, until_source=10)
        assert 10 < position < count, "not all of it"
        assert list(first) == list(range(position))

        second, end = await read(broker, 0, position, count)
        assert list(second) == list(range(position, count))
        assert end == count

    run(opened, test)


@pytest.mark.parametrize(
    "junk",
    [
        [None, b"", b"junk", b"[]", b"{}", b"\xff", b"[" * 5_000],
        [
            b'{"source":"%b","score":0.5,"decision":"review"}' % source
            for source in (
                b"",
                b"transactions",
                b"elsewhere:0:1",
                b"{t}:1:1",
                b"{t}:0:",
                b"{t}:0:x",
                b"{t}:0:-1",
                b"{t}:0:1.0",
                b"{t}:0:1_0",
                b"{t}:0: 1",
                b"{t}:0:\xd9\xa1",
                b"{t}:0:1:2",
                b"{t}:0:" + b"9" * 5_000,
            )
        ],
        [
            b'{"source":"{t}:0:1","score":"0.5","decision":"review"}',
            b'{"source":"{t}:0:1","score":0.5,"decision":"perhaps"}',
            b'{"source":"{t}:0:1","score":0.5}',
        ],
    ],
    ids=["no JSON", "other sources", "other fields"],
)
def test_records_that_no_worker_wrote_are_skipped(
    opened: Opened, junk: Sequence[bytes | None]
) -> None:
    async def test(broker: Broker) -> None:
        topic = broker.settings.topic("transactions").encode()
        await broker.publisher.publish({0: scores(broker, 0, [0])}, [], [])
        for value in junk:
            await broker.append(0, b"A", value and value.replace(b"{t}", topic))
        await broker.publisher.publish({0: scores(broker, 0, [2])}, [], [])
        end = len(junk) + 2

        found, position = await read(broker, 0, 0, end)

        assert list(found) == [0, 2]
        assert position == end
        assert await read(broker, 0, 1, end - 1) == ({}, end - 1)

    run(opened, test)


def test_the_first_of_two_scores_of_a_source_counts(opened: Opened) -> None:
    async def test(broker: Broker) -> None:
        for number in (0.25, 0.75):
            value = score(broker.settings, 0, 3, number=number)
            await broker.publisher.publish({0: [Outgoing(b"A", value)]}, [], [])

        found, _ = await read(broker, 0, 0, 2)

        assert found[3].score.score == 0.25

    run(opened, test)


def test_reading_begins_where_retention_left_the_log(opened: Opened) -> None:
    async def test(broker: Broker) -> None:
        topic = broker.settings.topic("scores")
        await broker.publisher.publish({0: scores(broker, 0, range(10))}, [], [])
        await broker.delete_records(topic, 0, 4)

        assert await broker.score_log.bounds(topic, 0) == Bounds(4, 10)
        found, position = await read(broker, 0, 0, 10)
        assert list(found) == [4, 5, 6, 7, 8, 9]
        assert position == 10

    run(opened, test)


def test_several_partitions_can_be_read_at_the_same_time(opened: Opened) -> None:
    async def test(broker: Broker) -> None:
        everything: dict[int, Sequence[Outgoing]] = {
            p: scores(broker, p, range(p * 10, p * 10 + 5)) for p in range(PARTITIONS)
        }
        await broker.publisher.publish(everything, [], [])

        found = await asyncio.gather(*(read(broker, p, 0, 5) for p in range(PARTITIONS)))

        for p, (logged, _) in enumerate(found):
            assert list(logged) == list(range(p * 10, p * 10 + 5))

    run(opened, test)


def test_transaction_markers_do_not_delay_a_reader(kafka: Kafka) -> None:
    """A marker takes an offset and is no record, also at the end of the range."""

    async def test(broker: Broker) -> None:
        topic = broker.settings.topic("scores")
        async with AIOKafkaProducer(
            bootstrap_servers=kafka.bootstrap, transactional_id=uuid.uuid4().hex
        ) as producer:
            for offset in (0, 1):
                async with producer.transaction():
                    value = score(broker.settings, 0, offset)
                    await producer.send_and_wait(topic, value, b"A", partition=0)
        bounds = await broker.score_log.bounds(topic, 0)
        assert bounds.end == 4

        found, position = await asyncio.wait_for(read(broker, 0, 0, bounds.end), 60)
        assert list(found) == [0, 1]
        assert position == 4
        assert await asyncio.wait_for(read(broker, 0, 3, bounds.end), 60) == ({}, 4)

    run(open_real(kafka), test)
