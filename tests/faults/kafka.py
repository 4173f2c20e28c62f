"""Faults of the broker: the only one dies, or one of three."""

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
from tests.faults.harness import Rig, require
from tests.faults.monitor import until_true

IN_SYNC_LIMIT_SECONDS = 120.0
TOPIC_LIMIT_SECONDS = 60.0


class BrokerKilled(Fault):
    """Producers, consumers and the group's coordinator go with it, for some seconds."""

    name = "broker-killed"
    what = "the only broker killed and restarted, 3 times"

    @asynccontextmanager
    async def services(self, shared: Shared) -> AsyncIterator[Addresses]:
        """A broker of its own."""
        with Kafka() as self._broker:
            yield {"kafka_bootstrap_servers": self._broker.bootstrap, "redis_url": shared.redis.url}

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        deaths = rig.times(3)
        for death in deaths:
            rig.fraction = death / len(deaths)
            await rig.go_on(1.0, 4.0)
            await asyncio.to_thread(self._broker.kill)
            await rig.go_on(1.0, 4.0)
            await asyncio.to_thread(self._broker.start)
            await rig.recover(await rig.mark())


class OneOfThreeBrokers(Fault):
    """The other two have all that was acknowledged, and go on."""

    name = "broker-of-three"
    what = "three brokers (replication 3, min.insync 2), one killed at a time, 6 times"
    settings: ClassVar[Mapping[str, Any]] = {"kafka_replication_factor": 3}

    @asynccontextmanager
    async def services(self, shared: Shared) -> AsyncIterator[Addresses]:
        """A cluster of its own."""
        with KafkaCluster() as self._cluster:
            yield {
                "kafka_bootstrap_servers": self._cluster.bootstrap,
                "redis_url": shared.redis.url,
            }

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        deaths = rig.times(6)
        for death in deaths:
            rig.fraction = death / len(deaths)
            await rig.go_on(1.0, 4.0)
            node = self._cluster.nodes[death % len(self._cluster.nodes)]
            await asyncio.to_thread(node.kill)
            await rig.recover(await rig.mark())
            await asyncio.to_thread(node.start)
            await until_in_sync(rig.settings, len(self._cluster.nodes))


class TopicMadeAgain(Fault):
    """The offsets of the new log are small, and mean other transactions."""

    name = "topic-made-again"
    what = "the transactions topic deleted and made again under running workers, 3 times"
    settings: ClassVar[Mapping[str, Any]] = {"on_new_log": "begin"}

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        times = rig.times(3)
        for time in times:
            rig.fraction = time / len(times)
            await rig.go_on(2.0, 6.0)
            await rig.settle()  # what a topic takes with it unread is lost, and nobody's fault
            await make_again(rig.settings)
            rig.load.states_begin()
            await self.when_made_again(rig)
            mark = await rig.mark()
            await rig.load.start(self.rate)
            await rig.recover(mark)

    async def when_made_again(self, rig: Rig) -> None:
        """Done before the first record comes."""


async def make_again(settings: Settings) -> None:
    """Delete the transactions topic and make it again, with as many partitions.

    Raises:
        StuckError: the broker does not do it.
        NoEffectError: it is the same topic.
    """
    topic = settings.topic("transactions")
    before = (await topic_ids(settings))[topic]
    async with admin_client(settings) as admin:
        await admin.delete_topics([topic])
        await until_true(
            lambda: _is_there(settings, topic, False), "the topic to go", TOPIC_LIMIT_SECONDS
        )
        await admin.create_topics(
            [NewTopic(topic, settings.topic_partitions, settings.kafka_replication_factor)]
        )
    await until_true(
        lambda: _is_there(settings, topic, True), "the topic to be there", TOPIC_LIMIT_SECONDS
    )
    require((await topic_ids(settings))[topic] != before, "the topic is the same")


async def _is_there(settings: Settings, topic: str, wanted: bool) -> bool:
    return (topic in await topic_ids(settings)) == wanted


async def until_in_sync(settings: Settings, replicas: int) -> None:
    """Return once every partition has all its replicas in sync.

    Raises:
        StuckError: that takes too long.
    """
    topics = [settings.topic(role) for role in ROLES]

    async def are_in_sync() -> bool:
        return await _replicas_in_sync(settings, topics) == replicas

    await until_true(are_in_sync, "all replicas to be in sync", IN_SYNC_LIMIT_SECONDS)


async def _replicas_in_sync(settings: Settings, topics: list[str]) -> int:
    """Of the partition that has the fewest; 0 where no broker tells."""
    admin = AIOKafkaAdminClient(**settings.kafka_client_options())
    try:
        await admin.start()
        described = await admin.describe_topics(topics)
    except (KafkaError, OSError):
        return 0
    finally:
        await admin.close()
    return min(len(part["isr"]) for topic in described for part in topic["partitions"])
