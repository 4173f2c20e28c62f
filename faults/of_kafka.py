"""Faults of the broker: the only one dies, or one of three."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, ClassVar

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from faults.fault import Addresses, Fault, Shared
from faults.rig import Rig
from faults.watch import until_true
from pipeline.services import Kafka, KafkaCluster
from pipeline.settings import Settings
from pipeline.topics import ROLES

IN_SYNC_LIMIT_SECONDS = 120.0


class BrokerKilled(Fault):
    """Producers, consumers and the group's coordinator go with it, for some seconds."""

    name = "broker-killed"
    what = "the only broker killed and restarted, 3 times"

    @asynccontextmanager
    async def services(self, shared: Shared) -> AsyncIterator[Addresses]:
        """A broker of its own."""
        with Kafka() as self._broker:
            yield {"kafka_bootstrap": self._broker.bootstrap, "redis_url": shared.redis.url}

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
            yield {"kafka_bootstrap": self._cluster.bootstrap, "redis_url": shared.redis.url}

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
