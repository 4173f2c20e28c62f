"""Everything is told to stop at once, and started again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from tests.faults.fault import Addresses, Fault, Shared
from tests.faults.harness import Rig


class SigtermOfAll(Fault):
    """Workers cannot finish in good order: broker and Redis go at the same time."""

    name = "sigterm-all"
    what = "SIGTERM of producer, workers, broker and Redis at once, and a new start, twice"

    @asynccontextmanager
    async def services(self, shared: Shared) -> AsyncIterator[Addresses]:
        """A broker and a Redis of its own."""
        with Kafka() as self._broker, Redis() as self._redis:
            yield {"kafka_bootstrap_servers": self._broker.bootstrap, "redis_url": self._redis.url}

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        stops = rig.times(2)
        for stop in stops:
            rig.fraction = stop / len(stops)
            await rig.go_on(2.0, 5.0)
            workers = len(rig.crew.members)
            producer_stops = asyncio.create_task(rig.load.stop())  # once the broker took the rest
            statuses, _, _ = await asyncio.gather(
                rig.crew.stop(),
                asyncio.to_thread(self._broker.stop),
                asyncio.to_thread(self._redis.stop),
            )
            rig.notes.append(f"workers ended with status {statuses}")
            await asyncio.gather(
                asyncio.to_thread(self._broker.start), asyncio.to_thread(self._redis.start)
            )
            await producer_stops
            mark = await rig.mark()
            await asyncio.gather(rig.crew.start(workers), rig.load.start(self.rate))
            await rig.recover(mark)
