"""The partition reader on a real broker, with aborted records and a moving end."""

from __future__ import annotations

import asyncio
import time
import uuid

import pytest
from aiokafka import AIOKafkaProducer

from pipeline.kafka.partition_reader import KafkaPartitionReader, PartitionReaderError
from pipeline.kafka.topics import ensure_topics
from pipeline.local.kafka import Kafka
from pipeline.settings import Settings, load_settings


def settings_of(kafka: Kafka) -> Settings:
    name = uuid.uuid4().hex[:8]
    return load_settings(
        kafka_bootstrap_servers=kafka.bootstrap, topic_prefix=f"{name}-", topic_partitions=1
    )


def test_a_partition_is_read_in_steps_to_a_moving_end(kafka: Kafka) -> None:
    """Transaction markers and aborted records hide no record, and none is read twice."""
    settings = settings_of(kafka)
    topic = settings.topic("scores")
    later_ms = time.time_ns() // 1_000_000 + 60_000  # later than the markers' own times

    async def run() -> None:
        await ensure_topics(settings)
        options = settings.kafka_client_options()
        async with AIOKafkaProducer(**options, transactional_id=topic) as producer:
            for number in range(4):  # offsets 0-2, marker 3, then 4-6, marker 7 ...
                await producer.begin_transaction()
                for i in range(3):
                    value = f"{number}-{i}".encode()
                    await producer.send_and_wait(
                        topic, value, b"k", 0, timestamp_ms=later_ms + number
                    )
                if number == 1:
                    await producer.abort_transaction()
                else:
                    await producer.commit_transaction()
        async with KafkaPartitionReader(settings, topic, 0) as reader:
            assert (await reader.bounds()).end == 16
            assert await reader.first_at(later_ms + 2) == 8
            assert await reader.first_at(later_ms + 4) is None
            first = await reader.read(2, 100)
            second = await reader.read(9, 100)
            none = await reader.read(9, 100)
            third = [r for _ in range(3) for r in await reader.read(16, 2)]
            assert [r.offset for r in first] == [0, 1]
            assert [r.offset for r in second] == [2, 8]
            assert none == []
            assert [r.value for r in third[:4]] == [b"2-1", b"2-2", b"3-0", b"3-1"]
            assert [r.offset for r in third] == [9, 10, 12, 13, 14]
            assert await reader.read(16, 100) == []
            assert reader.position == 16

    asyncio.run(run())


def test_a_reader_names_the_broker_that_does_not_answer() -> None:
    """A command that reads the log ends with this one line."""
    settings = load_settings(kafka_bootstrap_servers="127.0.0.1:1")

    async def run() -> None:
        async with KafkaPartitionReader(settings, "scores", 0):
            raise AssertionError("there is no broker")

    with pytest.raises(PartitionReaderError, match="cannot read scores-0 at 127"):
        asyncio.run(run())
