"""Topics that take smaller batches than usual, or do so all of a sudden: all goes through."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from pipeline.errors import RecurError, StartupError
from pipeline.kafka import message_limits
from pipeline.kafka.message_limits import LARGEST_OUTPUT_BYTES, MessageLimits
from pipeline.kafka.producer import AppendResult, KafkaProducer, Outgoing, PartOutput
from pipeline.kafka.topics import TopicRole, admin_client, batch_limits, ensure_topics
from pipeline.kafka.transactional_producer import TransactionalProducer
from pipeline.local.services import Kafka, Redis
from pipeline.replay.producer import Feed
from pipeline.settings import Settings, load_settings
from tests.fakes.running_pipeline import PipelineUnderTest, assert_scored_once, transactions, until

KIB = 1024


@pytest.fixture
def settings(kafka: Kafka) -> Settings:
    name = uuid.uuid4().hex[:12]
    return load_settings(
        kafka_bootstrap_servers=kafka.bootstrap,
        topic_partitions=2,
        topic_prefix=f"{name}-",
        kafka_group_id=f"group-{name}",
    )


async def limit(settings: Settings, bytes_: int, *roles: TopicRole) -> None:
    """Have topics take batches of so many bytes at most."""
    async with admin_client(settings) as admin:
        for role in roles:
            wanted = {"max.message.bytes": str(bytes_)}
            resource = ConfigResource(ConfigResourceType.TOPIC, settings.topic(role), wanted)
            (reply,) = await admin.alter_configs([resource])
            assert [error for error, *_ in reply.resources] == [0]

    async def is_known() -> bool:
        return set((await batch_limits(settings, roles)).values()) == {bytes_}

    await until(is_known, "the broker to know its topics' new limit")


def outgoing(count: int, bytes_: int = KIB) -> list[Outgoing]:
    return [Outgoing(b"A%d" % i, b"%d:" % i + b"x" * bytes_) for i in range(count)]


async def values(settings: Settings, directory: Path, role: TopicRole) -> list[bytes]:
    pipeline = PipelineUnderTest(
        settings.kafka_bootstrap_servers,
        settings.redis_url,
        directory,
        topic_prefix=settings.topic_prefix,
        kafka_group_id=settings.kafka_group_id,
        partitions=settings.topic_partitions,
    )
    return [record.value for record in await pipeline.records(role)]


def test_what_is_published_keeps_to_the_limit_that_is_there_and_to_one_that_comes(
    settings: Settings, tmp_path: Path
) -> None:
    async def run() -> None:
        await ensure_topics(settings)
        await limit(settings, 256 * KIB, "scores", "alerts", "dead_letter")
        publisher = KafkaProducer(settings)
        await publisher.start()
        try:
            scores, more = outgoing(900), outgoing(1_000)
            alerts, letters = outgoing(1_800), outgoing(300)
            appended = await publisher.publish({0: scores, 1: scores}, alerts, letters)
            assert appended == {0: AppendResult(0, 900), 1: AppendResult(0, 900)}

            await limit(settings, 64 * KIB, "scores", "alerts", "dead_letter")
            appended = await publisher.publish({0: more, 1: more[:5]}, alerts, letters)
            assert appended == {0: AppendResult(900, 1_900), 1: AppendResult(900, 905)}

            appended = await publisher.publish({0: more, 1: more}, [], letters)
            assert appended == {0: AppendResult(1_900, 2_900), 1: AppendResult(905, 1_905)}
        finally:
            await publisher.stop()
        said = [r.value for r in scores + more + more + scores + more[:5] + more]
        assert await values(settings, tmp_path, "scores") == said
        assert sorted(await values(settings, tmp_path, "alerts")) == sorted(
            r.value or b"" for r in alerts + alerts
        )
        assert sorted(await values(settings, tmp_path, "dead_letter")) == sorted(
            r.value or b"" for r in letters + letters + letters
        )

    asyncio.run(run())


def test_a_limit_that_the_broker_does_not_tell_is_found_out(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a user who may not describe the topics' configuration."""

    async def untold(*_: object) -> dict[TopicRole, int]:
        return {}

    async def run() -> None:
        await ensure_topics(settings)
        await limit(settings, 50 * KIB, "scores", "dead_letter")
        monkeypatch.setattr(message_limits, "batch_limits", untold)
        publisher = KafkaProducer(settings)
        await publisher.start()
        try:
            scores, letters = outgoing(400), [Outgoing(b"A", b"v" * 900_000)]
            appended = await publisher.publish({0: scores}, [], letters)
            assert appended == {0: AppendResult(0, 400)}
        finally:
            await publisher.stop()
        assert await values(settings, tmp_path, "scores") == [r.value for r in scores]
        (letter,) = await values(settings, tmp_path, "dead_letter")
        assert 10 * KIB < len(letter) < 50 * KIB

    asyncio.run(run())


def test_a_score_that_no_topic_takes_ends_the_publishing(settings: Settings) -> None:
    async def run() -> None:
        await ensure_topics(settings)
        await limit(settings, LARGEST_OUTPUT_BYTES, "scores")
        publisher = KafkaProducer(settings)
        await publisher.start()
        try:
            with pytest.raises(RecurError, match=r"max\.message\.bytes"):
                await publisher.publish({0: outgoing(1, 40 * KIB)}, [], [])
        finally:
            await publisher.stop()

    asyncio.run(run())


def test_a_dead_letter_larger_than_its_topic_takes_is_cut_to_fit(
    settings: Settings, tmp_path: Path
) -> None:
    headers = (("reason", b"not_json"), ("error", b"e" * 300))

    async def run() -> None:
        await ensure_topics(settings)
        await limit(settings, LARGEST_OUTPUT_BYTES, "dead_letter")
        publisher = KafkaProducer(settings)
        await publisher.start()
        try:
            await publisher.publish(
                {},
                [],
                [
                    Outgoing(b"k" * 60_000, b"v" * 60_000, headers),
                    Outgoing(b"k", b"v" * 60_000, (*headers, ("truncated", b"900000"))),
                    Outgoing(b"fits", b"v" * 1_000, headers),
                ],
            )
        finally:
            await publisher.stop()
        pipeline = PipelineUnderTest(
            settings.kafka_bootstrap_servers, "redis://127.0.0.1:1", tmp_path, topic_partitions=2
        )
        pipeline.settings = settings
        found = {r.key[:4]: r for r in await pipeline.records("dead_letter")}
        assert dict(found[b"kkkk"].headers)["truncated"] == b"60000"
        assert len(found[b"kkkk"].value) + len(found[b"kkkk"].key) > LARGEST_OUTPUT_BYTES / 2
        assert dict(found[b"k"].headers)["truncated"] == b"900000"
        assert (found[b"fits"].value, found[b"fits"].headers) == (b"v" * 1_000, headers)

    asyncio.run(run())


def test_a_transaction_that_is_too_large_is_aborted_and_goes_through_once_taken_again(
    settings: Settings, tmp_path: Path
) -> None:
    async def run() -> None:
        await ensure_topics(settings)
        publisher = TransactionalProducer(settings)
        try:
            tenure = await publisher.take(0)
            scores = outgoing(400)
            await limit(settings, 64 * KIB, "scores")
            said = PartOutput(scores, outgoing(3), [], 400, tenure)
            assert await publisher.commit({0: said}) == {}

            tenure = await publisher.take(0)
            said = said._replace(producer_epoch=tenure)
            committed = await publisher.commit({0: said})
            assert committed[0] is not None
        finally:
            await publisher.stop()
        assert await values(settings, tmp_path, "scores") == [r.value for r in scores]
        assert len(await values(settings, tmp_path, "alerts")) == 3

    asyncio.run(run())


@pytest.mark.parametrize("role", ["transactions", "labels"])
def test_what_is_fed_keeps_to_the_limit_and_a_record_over_it_is_named(
    settings: Settings, tmp_path: Path, role: TopicRole
) -> None:
    async def run() -> None:
        await ensure_topics(settings)
        await limit(settings, 64 * KIB, role)
        sent = outgoing(500)
        keys, contents = [r.key or b"" for r in sent], [r.value or b"" for r in sent]
        async with Feed(settings, role) as feed:
            await feed.send(keys, contents)
        assert feed.count.acked == 500
        assert sorted(await values(settings, tmp_path, role)) == sorted(contents)
        with pytest.raises(RecurError, match=r"max\.message\.bytes"):
            async with Feed(settings, role) as feed:
                await feed.send([b"A"], [b"x" * 65 * KIB])

    asyncio.run(run())


def test_a_topic_that_takes_less_than_a_score_may_need_is_refused_at_the_start(
    settings: Settings,
) -> None:
    async def run() -> None:
        await ensure_topics(settings)
        await limit(settings, LARGEST_OUTPUT_BYTES - 1, "alerts")
        with pytest.raises(StartupError, match=r"alerts takes 16383 bytes .*max\.message\.bytes"):
            await MessageLimits(settings).read()

    asyncio.run(run())


@pytest.mark.parametrize("transactional", [False, True])
def test_a_limit_lowered_while_a_worker_runs_ends_nothing_and_loses_nothing(
    kafka: Kafka, redis_server: Redis, tmp_path: Path, transactional: bool
) -> None:
    options: dict[str, Any] = {
        "processing_guarantee": "exactly_once" if transactional else "at_least_once",
        "topic_partitions": 1,
    }
    pipeline = PipelineUnderTest(kafka.bootstrap, redis_server.url, tmp_path, **options)
    sent = transactions(3_000, accounts=100)

    async def run() -> None:
        async with pipeline.running(workers=1):
            await pipeline.send(sent[:100])
            await pipeline.until_applied()
            await limit(pipeline.settings, LARGEST_OUTPUT_BYTES, "scores", "alerts", "dead_letter")
            await pipeline.send(sent[100:])
            await pipeline.until_applied()
            assert pipeline.workers[0].death is None
            assert "smaller batches" in pipeline.workers[0].log_path.read_text()
            assert_scored_once(await pipeline.scores(), sent)
            await pipeline.assert_states_are_the_log()

    asyncio.run(run())
