"""Faults of Kafka: the only broker dies, one of three dies, a topic is recreated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, ClassVar

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError

from pipeline.kafka.topics import ROLES, admin_client, topic_ids
from pipeline.local.kafka import Kafka, KafkaCluster
from pipeline.settings import Settings
from tests.faults.fault import Addresses, Fault, Shared
from tests.faults.harness import Harness, require_effect
from tests.faults.monitor import until_true

IN_SYNC_LIMIT_SECONDS = 120.0
TOPIC_LIMIT_SECONDS = 60.0


class BrokerKilled(Fault):
    """A dead broker, without which nothing can be produced or consumed for some seconds."""

    name = "broker-killed"
    what = "the only broker killed and restarted, 3 times"

    @asynccontextmanager
    async def services(self, shared: Shared) -> AsyncIterator[Addresses]:
        """Run a separate broker."""
        with Kafka() as self._broker:
            yield {"kafka_bootstrap_servers": self._broker.bootstrap, "redis_url": shared.redis.url}

    async def disturb(self, harness: Harness) -> None:
        deaths = harness.times(3)
        for death in deaths:
            harness.fraction = death / len(deaths)
            await harness.run_for(1.0, 4.0)
            await asyncio.to_thread(self._broker.kill)
            await harness.run_for(1.0, 4.0)
            await asyncio.to_thread(self._broker.start)
            await harness.recover(await harness.mark())


class OneOfThreeBrokers(Fault):
    """A dead broker of three; the other two have all acknowledged records and go on."""

    name = "broker-of-three"
    what = "three brokers (replication 3, min.insync 2), one killed at a time, 6 times"
    settings: ClassVar[Mapping[str, Any]] = {"kafka_replication_factor": 3}

    @asynccontextmanager
    async def services(self, shared: Shared) -> AsyncIterator[Addresses]:
        """Run a separate cluster."""
        with KafkaCluster() as self._cluster:
            yield {
                "kafka_bootstrap_servers": self._cluster.bootstrap,
                "redis_url": shared.redis.url,
            }

    async def disturb(self, harness: Harness) -> None:
        deaths = harness.times(6)
        for death in deaths:
            harness.fraction = death / len(deaths)
            await harness.run_for(1.0, 4.0)
            node = self._cluster.nodes[death % len(self._cluster.nodes)]
            await asyncio.to_thread(node.kill)
            await harness.recover(await harness.mark())
            await asyncio.to_thread(node.start)
            await until_in_sync(harness.settings, len(self._cluster.nodes))


class TopicRecreated(Fault):
    """A recreated topic, whose small offsets belong to other transactions."""

    name = "topic-made-again"
    what = "the transactions topic deleted and created again under running workers, 3 times"
    settings: ClassVar[Mapping[str, Any]] = {"on_new_log": "begin"}

    async def disturb(self, harness: Harness) -> None:
        times = harness.times(3)
        for time in times:
            harness.fraction = time / len(times)
            await harness.run_for(2.0, 6.0)
            await (
                harness.settle()
            )  # unread records go with their topic, which is no fault of the workers
            await recreate_topic(harness.settings)
            harness.workload.restart_states()
            await self.when_recreated(harness)
            mark = await harness.mark()
            await harness.workload.start(harness.rate)
            await harness.recover(mark)

    async def when_recreated(self, harness: Harness) -> None:
        """Act before the first record of the new topic."""


async def recreate_topic(settings: Settings) -> None:
    """Delete the transactions topic and create it again with the same number of partitions.

    Raises:
        StuckError: the broker takes too long.
        NoEffectError: the topic is still the same.
    """
    topic = settings.topic("transactions")
    before = (await topic_ids(settings))[topic]
    async with admin_client(settings) as admin:
        await admin.delete_topics([topic])
        await until_true(
            lambda: _exists(settings, topic, False), "the topic to disappear", TOPIC_LIMIT_SECONDS
        )
        await admin.create_topics(
            [NewTopic(topic, settings.topic_partitions, settings.kafka_replication_factor)]
        )
    await until_true(
        lambda: _exists(settings, topic, True), "the topic to exist", TOPIC_LIMIT_SECONDS
    )
    require_effect((await topic_ids(settings))[topic] != before, "the topic is the same")


async def _exists(settings: Settings, topic: str, expected: bool) -> bool:
    return (topic in await topic_ids(settings)) == expected


async def until_in_sync(settings: Settings, replicas: int) -> None:
    """Wait until every partition has all its replicas in sync.

    Raises:
        StuckError: the replicas take too long.
    """
    topics = [settings.topic(role) for role in ROLES]

    async def are_in_sync() -> bool:
        return await _replicas_in_sync(settings, topics) == replicas

    await until_true(are_in_sync, "all replicas to be in sync", IN_SYNC_LIMIT_SECONDS)


async def _replicas_in_sync(settings: Settings, topics: list[str]) -> int:
    """Find the lowest number of replicas in sync of a partition; 0: no broker answers."""
    admin = AIOKafkaAdminClient(**settings.kafka_client_options())
    try:
        await admin.start()
        described = await admin.describe_topics(topics)
    except (KafkaError, OSError):
        return 0
    finally:
        await admin.close()
    return min(len(part["isr"]) for topic in described for part in topic["partitions"])
