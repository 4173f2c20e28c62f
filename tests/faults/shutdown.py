"""Fault of a shutdown: all parts stop at the same time and start again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from tests.faults.fault import Addresses, Fault, Shared
from tests.faults.harness import Harness


class SigtermOfAll(Fault):
    """A shutdown of everything, in which workers cannot finish in good order."""

    name = "sigterm-all"
    what = "SIGTERM to producer, workers, broker and Redis at once, then a restart, twice"

    @asynccontextmanager
    async def services(self, shared: Shared) -> AsyncIterator[Addresses]:
        """Run a separate broker and a separate Redis."""
        with Kafka() as self._broker, Redis() as self._redis:
            yield {"kafka_bootstrap_servers": self._broker.bootstrap, "redis_url": self._redis.url}

    async def disturb(self, harness: Harness) -> None:
        stops = harness.times(2)
        for stop in stops:
            harness.fraction = stop / len(stops)
            await harness.run_for(2.0, 5.0)
            workers = len(harness.pool.members)
            producer_stops = asyncio.create_task(
                harness.workload.stop()
            )  # ends when the broker has the rest
            statuses, _, _ = await asyncio.gather(
                harness.pool.stop(),
                asyncio.to_thread(self._broker.stop),
                asyncio.to_thread(self._redis.stop),
            )
            harness.notes.append(f"workers ended with status {statuses}")
            await asyncio.gather(
                asyncio.to_thread(self._broker.start), asyncio.to_thread(self._redis.start)
            )
            await producer_stops
            mark = await harness.mark()
            await asyncio.gather(harness.pool.start(workers), harness.workload.start(harness.rate))
            await harness.recover(mark)
