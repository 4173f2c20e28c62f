"""Counting what came out: a lost, a double and a changed score are all seen."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
from aiokafka import AIOKafkaProducer

from pipeline.errors import RecurError
from pipeline.kafka.committed_offsets import committed_offsets
from pipeline.kafka.topics import ensure_topics
from pipeline.local.services import Kafka
from pipeline.replay.score_counter import ScoreCounter, TopicReader
from pipeline.settings import load_settings


@dataclass
class Record:
    value: bytes
    timestamp: int = 5


def score(name: str, value: float, decision: str = "approve") -> Record:
    fields = {"transaction_id": name, "score": value, "decision": decision, "features": {"a": 1}}
    return Record(msgspec.json.encode(fields))


def index_of(names: Sequence[str]) -> Any:
    return np.array([int(name) if int(name) < 4 else -1 for name in names], np.int64)


def test_lost_double_changed_and_strange_scores_are_all_counted() -> None:
    tally = ScoreCounter(4, index_of)
    first = tally.add([score("0", 0.5, "decline"), score("2", 0.25), score("0", 0.5, "decline")])
    second = tally.add([score("2", 0.75), score("3", 0.125, "review"), score("9", 1.0)])

    assert first.tolist() == [0, 2]
    assert second.tolist() == [3]
    assert tally.times.tolist() == [2, 0, 2, 1]
    assert (tally.scored, tally.missing, tally.repeated) == (3, 1, 2)
    assert (tally.contradictions, tally.strangers) == (1, 1)
    assert tally.scores[[0, 2, 3]].tolist() == [0.5, 0.25, 0.125]
    assert tally.flagged.tolist() == [True, False, False, True]
    assert tally.last_ms == 5
    assert tally.add([]).tolist() == []


def test_a_count_of_scores_does_not_wrap_round() -> None:
    tally = ScoreCounter(4, index_of)
    for _ in range(3):
        tally.add([score("1", 0.5)] * 100)

    assert tally.times[1] == 255
    assert tally.repeated == 1


def test_a_reader_sees_what_is_written_after_its_start_and_nothing_else(kafka: Kafka) -> None:
    settings = load_settings(
        kafka_bootstrap_servers=kafka.bootstrap,
        topic_prefix=f"{uuid.uuid4().hex[:8]}-",
        topic_partitions=3,
    )
    topic = settings.topic("scores")

    async def write(producer: AIOKafkaProducer, *values: bytes) -> None:
        for number, value in enumerate(values):
            await producer.send_and_wait(topic, value, partition=number % 3)

    async def run() -> tuple[int, set[bytes], int, dict[int, int]]:
        counts = await ensure_topics(settings)
        async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap) as producer:
            await write(producer, b"old", b"older", b"oldest", b"old again")
            async with TopicReader(settings, "scores", counts["scores"]) as reader:
                assert await reader.published() == 0
                assert await reader.read() == []
                await write(producer, b"a", b"b", b"c", b"d", b"e")
                published = await reader.published()
                found = {r.value async for records in reader.to_end() for r in records}
                return published, found, reader.read_records, await committed_offsets(settings)

    published, found, read, committed = asyncio.run(run())

    assert published == read == 5
    assert found == {b"a", b"b", b"c", b"d", b"e"}
    assert committed == {}


def test_no_broker_is_one_line_that_names_the_topic() -> None:
    async def run() -> None:
        async with TopicReader(load_settings(kafka_bootstrap_servers="127.0.0.1:9"), "scores", 1):
            raise AssertionError("there is no broker")

    with pytest.raises(RecurError, match=r"cannot read topic scores at 127\.0\.0\.1:9") as error:
        asyncio.run(run())
    assert "\n" not in str(error.value)
