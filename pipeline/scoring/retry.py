"""Retries of calls to a Redis or broker that does not answer: back off, lose nothing."""

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
"""Pauses between two calls; the last one repeats."""

T = TypeVar("T")


class Retrier:
    """Repetition of calls until they are answered; failures are counted and reported to the health.

    The watchdog is the limit: it ends the process if records wait and none is processed.
    """

    def __init__(self, metrics: Metrics, health: Health) -> None:
        self._health = health
        self._errors = {"redis": metrics.redis_errors, "kafka": metrics.kafka_errors}

    async def retry_redis(self, call: Callable[[], Awaitable[T]]) -> T:
        """Return the answer of Redis, however long it takes."""
        return await self._retry("redis", call)

    async def retry_kafka(self, call: Callable[[], Awaitable[T]]) -> T:
        """Return the answer of the broker, however long it takes."""
        return await self._retry("kafka", call)

    async def _retry(self, service: str, call: Callable[[], Awaitable[T]]) -> T:
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
