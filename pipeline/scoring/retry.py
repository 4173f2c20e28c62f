"""Waiting for a Redis or a broker that is away: back off, read no further, lose nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from typing import TypeVar

from pipeline.kafka.polls import LogUnavailableError
from pipeline.scoring.health import Health
from pipeline.scoring.metrics import Metrics
from pipeline.storage.client import StoreUnavailableError

RETRY_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Waits between two calls; the last one repeats."""

T = TypeVar("T")


class Retrier:
    """Repeats calls until they are answered; counts failures and tells the health.

    The watchdog bounds it: while records wait and nothing moves it ends the process.
    """

    def __init__(self, metrics: Metrics, health: Health) -> None:
        self._health = health
        self._errors = {"redis": metrics.redis_errors, "kafka": metrics.kafka_errors}

    async def retry_redis(self, call: Callable[[], Awaitable[T]]) -> T:
        """The store's answer, however long it is away."""
        return await self._ask("redis", call)

    async def ask_log(self, call: Callable[[], Awaitable[T]]) -> T:
        """The broker's answer, however long it is away."""
        return await self._ask("kafka", call)

    async def _ask(self, service: str, call: Callable[[], Awaitable[T]]) -> T:
        for attempt in count():
            try:
                answer = await call()
            except (StoreUnavailableError, LogUnavailableError) as error:
                self._errors[service].inc()
                self._health.down(service, "it does not answer", str(error))
                await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
            else:
                if attempt:
                    self._health.up(service)
                return answer
        raise AssertionError("count() ends")
