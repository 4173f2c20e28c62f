"""Transactions reach the log once, in order and on time, and never too many wait at once."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from model.transaction import Transaction
from pipeline.errors import RecurError
from pipeline.kafka.topics import ensure_topics
from pipeline.local.services import Kafka
from pipeline.messages.transactions import HISTORY_HEADER, WARM_HEADER, decode_transaction
from pipeline.replay.producer import UNACKED_MAX_RECORDS, Block, Feed, ahead, encode_block
from pipeline.replay.simulated import SimulatedStream
from pipeline.settings import Settings, load_settings

TIMEOUT_SECONDS = 120.0


@pytest.fixture
def settings(kafka: Kafka) -> Settings:
    """Topics of one's own."""
    return settings_for(kafka)


def settings_for(kafka: Kafka) -> Settings:
    return load_settings(
        kafka_bootstrap_servers=kafka.bootstrap,
        topic_prefix=f"{uuid.uuid4().hex[:8]}-",
        topic_partitions=4,
    )


def block(count: int, accounts: int = 50, first: int = 0, **options: Any) -> Block:
    return encode_block(
        [f"t{number}" for number in range(first, first + count)],
        [f"account-{number % accounts}" for number in range(count)],
        ["m"] * count,
        [1.5] * count,
        ["EUR"] * count,
        [1_534_334_400_000] * count,
        **options,
    )


async def blocks(*given: Block) -> AsyncIterator[Block]:
    for one in given:
        yield one


async def read_all(settings: Settings, count: int) -> list[Any]:
    """So many records of the transactions topic, and whatever more there is."""
    topic = settings.topic("transactions")
    consumer = AIOKafkaConsumer(bootstrap_servers=settings.kafka_bootstrap_servers)
    await consumer.start()
    try:
        places = [TopicPartition(topic, number) for number in range(settings.topic_partitions)]
        ends = await consumer.end_offsets(places)
        assert sum(ends.values()) == count
        consumer.assign(places)
        for place in places:
            consumer.seek(place, 0)
        records: list[Any] = []
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while len(records) < count:
                for found in (await consumer.getmany(timeout_ms=500)).values():
                    records += found
        return records
    finally:
        await consumer.stop()


def test_every_transaction_arrives_once_and_in_the_order_of_its_account(settings: Settings) -> None:
    async def run() -> tuple[list[Any], Feed]:
        await ensure_topics(settings)
        async with Feed(settings) as feed:
            await feed.run(blocks(block(20_000), block(5_000, first=20_000)))
        return await read_all(settings, 25_000), feed

    records, feed = asyncio.run(run())

    assert feed.count.sent == feed.count.acked == 25_000
    numbers: dict[bytes, list[int]] = {}
    for record in sorted(records, key=lambda record: (record.partition, record.offset)):
        transaction = decode_transaction(record.key, record.value, "EUR")
        numbers.setdefault(record.key, []).append(int(transaction.transaction_id[1:]))
    assert len(numbers) == 50
    assert all(found == sorted(found) for found in numbers.values())
    for partition, count in feed.count.acked_by_partition.items():
        offsets = sorted(r.offset for r in records if r.partition == partition)
        assert len(offsets) == count
        assert offsets[0] == feed.count.first_offsets[partition]
        assert offsets[-1] == feed.count.last_offsets[partition]


def test_a_key_lies_where_any_kafka_producer_would_put_it(settings: Settings) -> None:
    async def run() -> list[Any]:
        await ensure_topics(settings)
        mine = block(100, accounts=100)
        async with Feed(settings) as feed:
            await feed.send(mine.keys, mine.values)
        producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap_servers)
        async with producer:
            for key, value in zip(mine.keys, mine.values, strict=True):
                await producer.send(settings.topic("transactions"), value, key)
        return await read_all(settings, 200)

    places: dict[bytes, set[int]] = {}
    for record in asyncio.run(run()):
        places.setdefault(record.key, set()).add(record.partition)
    assert len(places) == 100
    assert all(len(found) == 1 for found in places.values())


def test_only_a_warm_feed_marks_its_records(settings: Settings) -> None:
    async def run() -> list[Any]:
        await ensure_topics(settings)
        async with Feed(settings) as feed:
            await feed.run(blocks(block(10)), warm=True)
            await feed.run(blocks(block(10, first=10)))
        return await read_all(settings, 20)

    for record in asyncio.run(run()):
        number = int(decode_transaction(record.key, record.value, "EUR").transaction_id[1:])
        assert [name for name, _ in record.headers] == ([WARM_HEADER] if number < 10 else [])


def test_a_feed_of_history_marks_its_records_at_any_pace(settings: Settings) -> None:
    async def run() -> list[Any]:
        await ensure_topics(settings)
        async with Feed(settings) as feed:
            await feed.run(blocks(block(5)), history=True)
            await feed.run(blocks(block(5, first=5)), history=True, warm=True, rate=1000)
        return await read_all(settings, 10)

    found = [[name for name, _ in record.headers] for record in asyncio.run(run())]
    assert sorted(found) == sorted([[HISTORY_HEADER], [WARM_HEADER, HISTORY_HEADER]] * 5)


def test_a_rate_is_kept_and_records_carry_the_time_they_were_sent(settings: Settings) -> None:
    begun_ms = 0

    async def run() -> list[Any]:
        nonlocal begun_ms
        await ensure_topics(settings)
        async with Feed(settings) as feed:
            begun_ms = int(time.time() * 1000)
            await feed.run(blocks(block(100), block(200, first=100)), rate=200)
        return await read_all(settings, 300)

    stamps = sorted(record.timestamp for record in asyncio.run(run()))

    assert begun_ms <= stamps[0]
    assert stamps[-1] <= time.time() * 1000
    assert stamps[-1] - begun_ms >= 299 / 200 * 1000 - 1  # never quicker
    assert len(set(stamps)) > 2  # not each block at once; how finely spread: `make bench`


def test_a_timetable_is_kept(settings: Settings) -> None:
    begun_ms = 0

    async def run() -> list[Any]:
        nonlocal begun_ms
        await ensure_topics(settings)
        due_seconds = np.array([0.0, 0.3, 0.6])
        async with Feed(settings) as feed:
            begun_ms = int(time.time() * 1000)
            await feed.run(blocks(block(3, accounts=1, due_seconds=due_seconds)))
        return await read_all(settings, 3)

    stamps = sorted(record.timestamp for record in asyncio.run(run()))

    # One is never sent before it is due, though on a busy machine it may be sent late.
    assert stamps[1] - begun_ms >= 299
    assert stamps[2] - begun_ms >= 599


def test_a_stopped_feed_ends_and_knows_what_it_sent(settings: Settings) -> None:
    async def run() -> int:
        await ensure_topics(settings)
        stop = asyncio.Event()
        async with Feed(settings) as feed:
            asyncio.get_running_loop().call_later(0.3, stop.set)
            await feed.run(blocks(block(100_000)), rate=100, stop=stop)
        await read_all(settings, feed.count.acked)
        assert feed.count.sent == feed.count.acked
        return feed.count.acked

    # All of it would take 1,000 s; how soon a feed ends: `make bench`.
    assert 0 < asyncio.run(run()) < 100_000


@pytest.mark.live
def test_a_broker_that_stands_still_holds_the_feed_and_loses_nothing() -> None:
    many = [block(8192, first=8192 * number) for number in range(24)]

    async def run(kafka: Kafka) -> int:
        settings = settings_for(kafka)
        await ensure_topics(settings)
        async with Feed(settings) as feed:
            await feed.run(blocks(many[0]))
            await feed.flush()
            kafka.pause()
            feeding = asyncio.ensure_future(feed.run(blocks(*many[1:])))
            await asyncio.sleep(2)
            assert not feeding.done()
            most = feed.count.sent - feed.count.acked
            kafka.resume()
            await feeding
        await read_all(settings, 24 * 8192)
        return most

    with Kafka() as kafka:
        assert asyncio.run(run(kafka)) <= UNACKED_MAX_RECORDS + 8192


def test_no_broker_is_one_line_that_names_the_address() -> None:
    async def run() -> None:
        settings = load_settings(kafka_bootstrap_servers="127.0.0.1:9", startup_timeout_seconds=1)
        async with Feed(settings):
            raise AssertionError("there is no broker")

    with pytest.raises(
        RecurError, match=r"no Kafka broker answers at 127\.0\.0\.1:9 .*start one, or correct"
    ) as error:
        asyncio.run(run())
    assert "\n" not in str(error.value)


def test_blocks_made_ahead_come_in_order_and_their_errors_come_through() -> None:
    def made() -> Iterator[Block]:
        yield block(1)
        yield block(2)
        raise RecurError("row 3 is wrong")

    sizes: list[int] = []

    async def run() -> None:
        async for one in ahead(made()):
            sizes.append(len(one.keys))

    with pytest.raises(RecurError, match="row 3"):
        asyncio.run(run())
    assert sizes == [1, 2]


def test_what_is_encoded_is_a_transaction_without_fields_that_it_lacks() -> None:
    made = encode_block(
        ["t1"], ["a1"], ["m1"], [0.1], ["EUR"], [5], ["5411"], [None], ["ES"]
    )  # fmt: skip

    assert made.values == [
        b'{"transaction_id":"t1","account_id":"a1","merchant_id":"m1","amount":0.1,'
        b'"currency":"EUR","timestamp":5,"category":"5411","country":"ES"}'
    ]
    assert decode_transaction(made.keys[0], made.values[0], "EUR") == Transaction(
        "t1", "a1", "m1", 0.1, "EUR", 5, "5411", None, "ES"
    )


def test_further_fields_are_encoded_beside_a_transactions_own_and_left_out_where_missing() -> None:
    further: dict[str, Any] = {"age": [31.5, None], "the job": ["nurse", None]}
    made = encode_block(
        ["t1", "t2"], ["a1", "a2"], ["m1"] * 2, [0.1] * 2, ["EUR"] * 2, [5] * 2, ["5411", None],
        further=further,
    )  # fmt: skip

    assert made.values == [
        b'{"transaction_id":"t1","account_id":"a1","merchant_id":"m1","amount":0.1,'
        b'"currency":"EUR","timestamp":5,"category":"5411","age":31.5,"the job":"nurse"}',
        b'{"transaction_id":"t2","account_id":"a2","merchant_id":"m1","amount":0.1,'
        b'"currency":"EUR","timestamp":5}',
    ]


@pytest.mark.parametrize("sizes", [[1, 5, 30_000], [10_000, 0, 10_000, 1], [3] * 10])
def test_a_simulated_stream_has_no_gap_between_its_pieces(sizes: Sequence[int]) -> None:
    stream = SimulatedStream(500, 1000, "2020-01-01", seed=3)
    pieces = [stream.take(size) for size in sizes]
    rest = stream.take_days(2)
    whole = SimulatedStream(500, 1000, "2020-01-01", seed=3).take(sum(sizes) + len(rest))

    assert [piece.first for piece in pieces] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert list(map(len, pieces)) == list(sizes)
    values = [v for piece in [*pieces, rest] for made in piece.blocks() for v in made.values]
    assert values == [v for made in whole.blocks() for v in made.values]
    assert rest.index_of([f"T{rest.first:09d}", "T000000000"]).tolist() == [0, -1]
