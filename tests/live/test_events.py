"""Scores and alerts as CloudEvents on a real broker, read by the CloudEvents project's library."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_kafka_event

from pipeline.audit.verifier import VerifyOptions, verify
from pipeline.checkpoint import load_checkpoint
from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.messages.scores import Score, decode_alert, decode_score
from pipeline.storage.client import redis_client
from tests.fakes.memory_verify import NoBar
from tests.fakes.running_pipeline import PipelineUnderTest, assert_scored_once, transactions

COUNT = 300
PLAIN, KEPT = 100, 200
"""Scores without headers, and scores before the loss of data."""


@pytest.mark.parametrize("guarantee", ["at_least_once", "exactly_once"])
def test_readers_of_events_and_readers_of_json_both_read_everything(
    kafka: Kafka, redis_server: Redis, tmp_path: Path, guarantee: str
) -> None:
    """Some scores are events; then the store loses its data, and a worker recovers."""
    system = PipelineUnderTest(
        kafka.bootstrap,
        redis_server.url,
        tmp_path,
        processing_guarantee=guarantee,
        review_threshold=0.0,
    )
    sent = transactions(COUNT, accounts=20)

    async def run() -> None:
        async with system.running(workers=1):
            await system.send(sent[:PLAIN])
            await system.until_applied()
            assert not any(record.headers for record in await system.records("scores"))
            await system.workers[0].stop()
            system.use(cloudevents_scores=True)
            await system.start_workers(1)
            await system.send(sent[PLAIN:KEPT])
            await system.until_applied()
            first = await published(system)
            await lose_states(system)
            await system.send(sent[KEPT:])  # the worker notices at its next poll
            await system.until_applied()
            await system.assert_states_are_the_log()
            await check(system, first)

    async def check(system: PipelineUnderTest, first: set[Any]) -> None:
        scores = await system.records("scores")
        assert {one(record) for record in scores} >= first, "a published score stays"
        events = [record for record in scores if record.headers]
        assert len(events) == COUNT - PLAIN
        assert_scored_once([decode_score(record.value) for record in scores], sent)
        alerts = await system.records("alerts")
        assert {decode_alert(record.value).transaction_id for record in alerts} == {
            transaction.transaction_id for transaction in sent
        }
        assert_are_events(events, "score", system)
        assert_are_events(alerts, "alert", system)
        settings = system.settings
        found = await verify(settings, load_checkpoint(settings), VerifyOptions(), NoBar())
        assert found.is_right, found
        assert found.scores == COUNT

    asyncio.run(run())


def one(record: Any) -> tuple[Any, ...]:
    return record.partition, record.offset, record.key, record.value, tuple(record.headers)


async def published(system: PipelineUnderTest) -> set[Any]:
    return {one(record) for record in await system.records("scores")}


async def lose_states(system: PipelineUnderTest) -> None:
    """Delete all of the system's keys in Redis."""
    client = redis_client(system.settings)
    try:
        keys = [key async for key in client.scan_iter(f"{system.settings.redis_key_prefix}:*")]
        assert keys
        await client.delete(*keys)
    finally:
        await client.aclose()


def assert_are_events(records: list[Any], kind: str, system: PipelineUnderTest) -> None:
    """Check each record as the library reads it; a repeated event must be the same one."""
    seen: dict[tuple[str, str], Any] = {}
    output = system.settings.topic(f"{kind}s")  # type: ignore[arg-type]
    for record in records:
        headers = dict(record.headers)
        assert len(headers) == len(record.headers)
        event = from_kafka_event(KafkaMessage(headers, record.key, record.value))
        score: Score = (decode_alert if kind == "alert" else decode_score)(record.value)
        assert event.get_type() == f"recur.{kind}.v1"
        assert event.get_source().endswith(f"/{output}")
        assert event.get_id() == score.source
        assert event.get_subject() == score.transaction_id
        created = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=score.timestamp)
        assert event.get_time() == created
        data = event.get_data()
        assert isinstance(data, dict)
        assert data["score"] == score.score
        assert event.get_attributes()["partitionkey"] == score.account_id
        assert seen.setdefault((event.get_source(), event.get_id()), headers) == headers
