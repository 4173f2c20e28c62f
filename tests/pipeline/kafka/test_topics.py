"""Missing topics are created as the settings say; whatever is wrong with them is one line."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from pipeline.errors import StartupError
from pipeline.kafka.topics import LOGS, ROLES, TopicRole, check_retention, ensure_topics
from pipeline.local.services import Kafka
from pipeline.settings import Settings, load_settings


def settings_for(kafka: Kafka, **changes: Any) -> Settings:
    prefix = f"{uuid.uuid4().hex[:8]}-"
    return load_settings(kafka_bootstrap_servers=kafka.bootstrap, topic_prefix=prefix, **changes)


async def create(settings: Settings, name: str, partitions: int, **configs: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap_servers)
    await admin.start()
    named = {key.replace("_", "."): value for key, value in configs.items()}
    try:
        await admin.create_topics([NewTopic(name, partitions, 1, topic_configs=named)])
    finally:
        await admin.close()


async def topic_settings(settings: Settings, name: str) -> dict[str, str]:
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap_servers)
    await admin.start()
    try:
        resource = ConfigResource(ConfigResourceType.TOPIC, name)
        (reply,) = await admin.describe_configs([resource])
    finally:
        await admin.close()
    entries = reply.resources[0][4]
    return {entry[0]: entry[1] for entry in entries}


def test_missing_topics_are_created_once_by_workers_that_start_together(kafka: Kafka) -> None:
    settings = settings_for(kafka, topic_partitions=3, log_retention_days=2)

    async def run() -> tuple[list[dict[Any, int]], dict[str, str]]:
        counts = await asyncio.gather(*(ensure_topics(settings) for _ in range(4)))
        counts.append(await ensure_topics(settings))
        return counts, await topic_settings(settings, settings.topic("scores"))

    counts, configured = asyncio.run(run())

    assert counts == [dict.fromkeys(ROLES, 3)] * 5
    assert configured["retention.ms"] == str(2 * 86_400_000)
    assert configured["cleanup.policy"] == "delete"


def test_new_scores_get_as_many_partitions_as_the_transactions_have(kafka: Kafka) -> None:
    settings = settings_for(kafka, topic_partitions=2)

    async def run() -> dict[Any, int]:
        await create(settings, settings.topic("transactions"), 5)
        return dict(await ensure_topics(settings))

    counts = asyncio.run(run())

    assert counts["transactions"] == counts["scores"] == 5
    assert counts["alerts"] == 2


def test_scores_with_another_partition_count_stop_the_start(kafka: Kafka) -> None:
    settings = settings_for(kafka, topic_partitions=4)

    async def run() -> None:
        await create(settings, settings.topic("scores"), 2)
        await ensure_topics(settings)

    with pytest.raises(StartupError, match=r"has 2 partitions and .* has 4; .* --partitions 4"):
        asyncio.run(run())


def test_a_replication_factor_that_the_brokers_cannot_give_is_named(kafka: Kafka) -> None:
    with pytest.raises(StartupError, match="RECUR_KAFKA_REPLICATION_FACTOR") as error:
        asyncio.run(ensure_topics(settings_for(kafka, kafka_replication_factor=3)))
    assert "\n" not in str(error.value)


def test_no_broker_is_one_line_after_the_configured_time() -> None:
    settings = load_settings(kafka_bootstrap_servers="127.0.0.1:9", startup_timeout_seconds=1)
    started = time.monotonic()

    with pytest.raises(StartupError, match=r"no Kafka broker answers at 127\.0\.0\.1:9") as error:
        asyncio.run(ensure_topics(settings))

    assert time.monotonic() - started > 0.5  # how soon after: `make bench`
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("role", LOGS)
@pytest.mark.parametrize("policy", ["compact", "compact,delete"])
def test_a_log_that_is_compacted_is_refused_and_named(
    kafka: Kafka, role: TopicRole, policy: str
) -> None:
    """Compaction keeps the last record of a key: all else that states are computed from goes."""
    settings = settings_for(kafka)
    topic = settings.topic(role)

    async def run() -> None:
        await create(settings, topic, settings.topic_partitions, cleanup_policy=policy)
        await ensure_topics(settings)
        await check_retention(settings)

    with pytest.raises(StartupError) as refused:
        asyncio.run(run())
    said = str(refused.value)
    assert f"topic {topic} has cleanup.policy" in said
    assert f"--entity-name {topic} --add-config cleanup.policy=delete" in said


def test_what_cannot_be_rebuilt_is_told_where_a_log_is_kept_for_less_than_states_live(
    kafka: Kafka, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_for(kafka, state_ttl_days=30.0)

    async def run(settings: Settings) -> list[tuple[str, float]]:
        caplog.clear()
        await check_retention(settings)
        return [(r.topic, r.retention_days) for r in caplog.records]  # type: ignore[attr-defined]

    async def make() -> None:
        week = str(7 * 86_400_000)
        await create(settings, settings.topic("transactions"), 8, retention_ms=week)
        await create(settings, settings.topic("labels"), 8, retention_ms=week)
        await ensure_topics(settings)

    asyncio.run(make())
    assert asyncio.run(run(settings)) == [(settings.topic("transactions"), 7.0)]
    assert "older history is gone" in caplog.text
    assert asyncio.run(run(settings.model_copy(update={"state_ttl_days": 7.0}))) == []
