"""Retries of calls to a Redis or broker that does not answer: back off, lose nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from itertools import count
from typing import Any, ParamSpec, TypeVar

from pipeline.kafka.polls import LogUnavailableError
from pipeline.scoring.health import Health
from pipeline.scoring.metrics import Metrics
from pipeline.storage.client import StoreUnavailableError

RETRY_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Pauses between two calls; the last one repeats."""

P = ParamSpec("P")
T = TypeVar("T")


class Retrier:
    """Repetition of calls until they are answered; failures are counted and reported to the health.

    The watchdog is the limit: it ends the process if records wait and none is processed.
    """

    def __init__(self, metrics: Metrics, health: Health) -> None:
        self._health = health
        self._errors = {"redis": metrics.redis_errors, "kafka": metrics.kafka_errors}

    def retry_redis(
        self, call: Callable[P, Awaitable[T]], *arguments: P.args, **options: P.kwargs
    ) -> Coroutine[Any, Any, T]:
        """Return the answer of Redis to ``call(*arguments)``, however long it takes."""
        return self._retry("redis", call, *arguments, **options)

    def retry_kafka(
        self, call: Callable[P, Awaitable[T]], *arguments: P.args, **options: P.kwargs
    ) -> Coroutine[Any, Any, T]:
        """Return the answer of the broker to ``call(*arguments)``, however long it takes."""
        return self._retry("kafka", call, *arguments, **options)

    async def _retry(
        self,
        service: str,
        call: Callable[P, Awaitable[T]],
        *arguments: P.args,
        **options: P.kwargs,
    ) -> T:
        for attempt in count():
            try:
                answer = await call(*arguments, **options)
            except (StoreUnavailableError, LogUnavailableError) as error:
                self._errors[service].inc()
                self._health.down(service, "it does not answer", str(error))
                await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
            else:
                if attempt:
                    self._health.up(service)
                return answer
        raise AssertionError("count() ends")
