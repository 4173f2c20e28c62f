"""Readiness of a gateway: whether an answer can come, as far as that can be known.

A task asks the services every second. A request reads the last result, so it waits for nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from pipeline.gateway.gateway_metrics import GatewayMetrics
from pipeline.kafka.log_reader import LogReader
from pipeline.kafka.polls import LogUnavailableError
from pipeline.logs import quiet
from pipeline.scoring.outages import Outages
from pipeline.settings import Settings
from pipeline.storage.client import RedisClient, StoreUnavailableError
from pipeline.storage.subscription import Subscription

CHECK_SECONDS = 1.0
"""Time between two checks."""

CHECK_TIMEOUT_SECONDS = 3.0
"""Longest check of one service."""

BROKER, REDIS, REPLIES, WORKERS = "broker", "redis", "replies", "workers"
PARTS = (BROKER, REDIS, REPLIES, WORKERS)

WORKING_STATES = ("Stable", "PreparingRebalance", "CompletingRebalance")
"""States of a consumer group with members."""

_FAILURES = (KafkaError, LogUnavailableError, StoreUnavailableError, OSError, TimeoutError)


class Readiness:
    """State of the services that an answer needs.

    Args:
        settings: names the workers' group.
        reader: asks the broker.
        redis: asks Redis.
        subscription: brings the replies.
        outages: logs outages.
        metrics: monitoring.
    """

    def __init__(
        self,
        settings: Settings,
        reader: LogReader,
        redis: RedisClient,
        subscription: Subscription,
        outages: Outages,
        metrics: GatewayMetrics,
    ) -> None:
        self._settings = settings
        self._topic = settings.topic("transactions")
        self._reader = reader
        self._redis = redis
        self._subscription = subscription
        self._outages = outages
        self._metrics = metrics
        self._admin: AIOKafkaAdminClient | None = None
        self._missing: set[str] = set(PARTS)
        self._task: asyncio.Task[None] | None = None
        self.is_stopping = False

    @property
    def missing(self) -> list[str]:
        """The parts that are missing for an answer."""
        missing = self._missing - {REPLIES}
        if not self._subscription.is_active:
            missing.add(REPLIES)
        return sorted(missing | ({"running"} if self.is_stopping else set()))

    def lacks(self, part: str) -> bool:
        """Tell whether a part was missing at the last check."""
        return part in self._missing

    async def start(self) -> None:
        """Check once, and then in the background."""
        await self._check()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End the checks."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._admin is not None:
            await self._admin.close()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            await self._check()

    async def _check(self) -> None:
        await asyncio.gather(
            self._part(BROKER, "kafka", self._ask_broker),
            self._part(REDIS, "redis", self._ask_redis),
            self._part(WORKERS, None, self._ask_group),
        )
        self._metrics.ready.set(not self.missing)

    async def _part(
        self, part: str, service: str | None, ask: Callable[[], Awaitable[bool]]
    ) -> None:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
                is_there = await ask()
        except _FAILURES as error:
            self._missing.add(part)
            if service is not None:
                self._outages.failed(service, type(error).__name__)
            return
        if service is not None:
            self._outages.answered(service)
        (self._missing.discard if is_there else self._missing.add)(part)

    async def _ask_broker(self) -> bool:
        await self._reader.bounds(self._topic, [0])
        return True

    async def _ask_redis(self) -> bool:
        await self._redis.execute([("PING",)])
        return True

    async def _ask_group(self) -> bool:
        """Ask for the workers' group: it has members, or is exchanging them."""
        if self._admin is None:
            admin = AIOKafkaAdminClient(**self._settings.kafka_client_options())
            try:
                with quiet("aiokafka"):
                    await admin.start()
            except BaseException:
                await admin.close()
                raise
            self._admin = admin
        replies: list[Any] = await self._admin.describe_consumer_groups(
            [self._settings.kafka_group_id]
        )
        groups = [group for reply in replies for group in reply.groups]
        return any(group[2] in WORKING_STATES and group[5] for group in groups)
