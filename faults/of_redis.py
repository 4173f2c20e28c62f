"""Faults of Redis: it freezes, dies, loses data, fails over, is full, is slow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar

from faults.fault import REDIS_BACK_SECONDS, Addresses, Fault, Shared
from faults.proxy import Proxy
from faults.rig import Mark, Rig
from pipeline.services import HOST, Redis


class OwnRedis(Fault):
    """A fault of a Redis that no other fault uses."""

    ready_within = REDIS_BACK_SECONDS
    appendonly: ClassVar[bool] = True
    redis: Redis

    @asynccontextmanager
    async def services(self, shared: Shared) -> AsyncIterator[Addresses]:
        """The shared broker and a Redis of its own."""
        with Redis(appendonly=self.appendonly) as self.redis:
            yield {"kafka_bootstrap": shared.kafka.bootstrap, "redis_url": self.redis.url}

    async def restart(self, rig: Rig, *, loses_data: bool = False) -> None:
        """SIGKILL, and a new start after some seconds; wait until the system has recovered."""
        before = await rig.watch.applied()
        await asyncio.to_thread(self.redis.kill)
        await rig.go_on(1.0, 4.0)
        await asyncio.to_thread(self.redis.start)
        mark = await rig.mark()
        if loses_data:
            _require_loss(rig, before, mark)
        await rig.recover(mark)
        if loses_data:
            _tell_replay(rig)

    def ask(self, *command: str | int) -> object:
        """One command's reply."""
        with self.redis.client() as client:
            return client.execute_command(*command)


class RedisFrozen(OwnRedis):
    """Longer than a call may take, so that nobody knows whether the last one was carried out."""

    name = "redis-frozen"
    what = "Redis stopped (SIGSTOP) for 8 s, 3 times"

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        stops = rig.times(3)
        for stop in stops:
            rig.fraction = stop / len(stops)
            await rig.go_on(1.0, 3.0)
            self.redis.pause()
            await rig.go_on(8.0)
            self.redis.resume()
            await rig.recover(await rig.mark())


class RedisKilled(OwnRedis):
    """Its append-only file has all that it answered."""

    name = "redis-killed"
    what = "Redis killed and restarted with its data, 3 times"

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        deaths = rig.times(3)
        for death in deaths:
            rig.fraction = death / len(deaths)
            await rig.go_on(1.0, 3.0)
            await self.restart(rig)


class RedisSnapshot(OwnRedis):
    """States and watermarks go back together, and what followed is replayed."""

    name = "redis-snapshot"
    what = "Redis killed and restarted with a snapshot that is 30 s old"
    appendonly = False

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        await rig.go_on(2.0, 4.0)
        await asyncio.to_thread(self.ask, "SAVE")
        await rig.go_on(rig.seconds(30, least=4))
        rig.fraction = 0.5
        await self.restart(rig, loses_data=True)


class RedisEmpty(OwnRedis):
    """Everything is computed again from the log; scores stay as they were published."""

    name = "redis-empty"
    what = "Redis killed and restarted empty, after 300,000 transactions"
    appendonly = False
    history = 300_000

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        await rig.go_on(rig.seconds(10, least=2))
        await self.restart(rig, loses_data=True)


def _require_loss(rig: Rig, before: dict[int, int], mark: Mark) -> None:
    rig.require(sum(mark.applied.values()) < sum(before.values()), "Redis lost nothing")


def _tell_replay(rig: Rig) -> None:
    recovery = rig.recoveries[-1]
    rate = recovery.applied / recovery.lag_gone
    rig.notes.append(
        f"{recovery.applied:,} records applied again and anew in {recovery.lag_gone:.1f} s:"
        f" {rate:,.0f}/s"
    )


class RedisFailover(Fault):
    """A replica that has not all takes over under the same address."""

    name = "redis-failover"
    what = "the master dies and a replica that lags by 5 s takes over, twice"
    ready_within = REDIS_BACK_SECONDS

    @asynccontextmanager
    async def services(self, shared: Shared) -> AsyncIterator[Addresses]:
        """The shared broker, and the address behind which master and replicas change."""
        with Redis() as self._master:
            async with Proxy(self._master.port) as self._address:
                yield {
                    "kafka_bootstrap": shared.kafka.bootstrap,
                    "redis_url": f"redis://{HOST}:{self._address.port}/0",
                }
                self._master.close()

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        failovers = rig.times(2)
        for failover in failovers:
            rig.fraction = failover / len(failovers)
            async with Proxy(self._master.port) as link:
                replica = Redis(options={"replicaof": f"{HOST} {link.port}"})
                await asyncio.to_thread(replica.start)
                await asyncio.to_thread(_until_linked, replica)
                await rig.go_on(1.0, 3.0)
                link.hold()
                await rig.go_on(rig.seconds(5, least=2))
                before = await rig.watch.applied()
                await asyncio.to_thread(self._master.close)
            with replica.client() as client:
                client.execute_command("REPLICAOF", "NO", "ONE")
            self._master = replica
            await self._address.lead_to(replica.port)
            mark = await rig.mark()
            _require_loss(rig, before, mark)
            await rig.recover(mark)
            _tell_replay(rig)


def _until_linked(replica: Redis) -> None:
    with replica.client() as client:
        while client.info("replication")["master_link_status"] != "up":
            time.sleep(0.05)


class RedisFull(OwnRedis):
    """Reads go on, and every write is refused."""

    name = "redis-full"
    what = "Redis out of memory (maxmemory with noeviction) for 10 s, 3 times"

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        fills = rig.times(3)
        for fill in fills:
            rig.fraction = fill / len(fills)
            await rig.go_on(1.0, 3.0)
            await asyncio.to_thread(self.ask, "CONFIG", "SET", "maxmemory", "1mb")
            await rig.go_on(rig.seconds(10, least=4))
            before = await rig.watch.applied()
            await rig.go_on(1.0)
            rig.require(await rig.watch.applied() == before, "Redis saved while it was full")
            await asyncio.to_thread(self.ask, "CONFIG", "SET", "maxmemory", "0")
            await rig.recover(await rig.mark())


class RedisSlow(Fault):
    """A micro-batch waits twice for Redis; larger ones make up for it."""

    name = "redis-slow"
    what = "each answer of Redis takes 20 to 400 ms longer, for a minute"
    ready_within = REDIS_BACK_SECONDS

    @asynccontextmanager
    async def services(self, shared: Shared) -> AsyncIterator[Addresses]:
        """The shared broker and Redis, this one by a proxy."""
        async with Proxy(shared.redis.port) as self._way:
            yield {
                "kafka_bootstrap": shared.kafka.bootstrap,
                "redis_url": f"redis://{HOST}:{self._way.port}/0",
            }

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        delays = rig.times(12, least=3)
        for delay in delays:
            rig.fraction = delay / len(delays)
            self._way.delay_seconds = rig.random.uniform(0.01, 0.2)
            await rig.go_on(5.0)
        self._way.delay_seconds = 0.0
        await rig.recover(await rig.mark())
