"""Faults of Redis: it freezes, dies, loses data, fails over, is full, or is slow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, ClassVar

from pipeline.local.ports import HOST
from pipeline.local.redis import Redis, RedisCluster
from tests.faults.fault import REDIS_BACK_SECONDS, Addresses, Fault, Shared
from tests.faults.harness import Harness, Mark, require_effect
from tests.faults.monitor import until_true
from tests.faults.proxy import Proxy

ELECTION_LIMIT_SECONDS = 60.0


class OwnRedis(Fault):
    """A fault with a separate Redis."""

    ready_within = REDIS_BACK_SECONDS
    appendonly: ClassVar[bool] = True
    redis: Redis

    @asynccontextmanager
    async def services(self, shared: Shared) -> AsyncIterator[Addresses]:
        """Run a separate Redis beside the shared broker."""
        with Redis(appendonly=self.appendonly) as self.redis:
            yield {"kafka_bootstrap_servers": shared.kafka.bootstrap, "redis_url": self.redis.url}

    async def restart(self, harness: Harness, *, loses_data: bool = False) -> None:
        """Kill Redis, start it some seconds later, and wait for the recovery."""
        before = await harness.monitor.applied()
        await asyncio.to_thread(self.redis.kill)
        await harness.run_for(1.0, 4.0)
        await asyncio.to_thread(self.redis.start)
        mark = await harness.mark()
        if loses_data:
            require_loss(before, mark)
        await harness.recover(mark)
        if loses_data:
            _note_replay(harness)

    def ask(self, *command: str | int) -> object:
        """Send a command and return the reply."""
        with self.redis.client() as client:
            return client.execute_command(*command)


class RedisFrozen(OwnRedis):
    """A frozen Redis: workers cannot know whether it executed their last call."""

    name = "redis-frozen"
    what = "Redis frozen (SIGSTOP) for 8 s, 3 times"

    async def disturb(self, harness: Harness) -> None:
        stops = harness.times(3)
        for stop in stops:
            harness.fraction = stop / len(stops)
            await harness.run_for(1.0, 3.0)
            self.redis.pause()
            await harness.run_for(8.0)
            self.redis.resume()
            await harness.recover(await harness.mark())


class RedisKilled(OwnRedis):
    """A dead Redis, whose append-only file has all acknowledged writes."""

    name = "redis-killed"
    what = "Redis killed and restarted with its data, 3 times"

    async def disturb(self, harness: Harness) -> None:
        deaths = harness.times(3)
        for death in deaths:
            harness.fraction = death / len(deaths)
            await harness.run_for(1.0, 3.0)
            await self.restart(harness)


class RedisSnapshot(OwnRedis):
    """A Redis with old data: states and watermarks go back together, and workers replay."""

    name = "redis-snapshot"
    what = "Redis killed and restarted with a snapshot that is 30 s old"
    appendonly = False

    async def disturb(self, harness: Harness) -> None:
        await harness.run_for(2.0, 4.0)
        await asyncio.to_thread(self.ask, "SAVE")
        await harness.run_for(harness.seconds(30, least=4))
        harness.fraction = 0.5
        await self.restart(harness, loses_data=True)


class RedisEmpty(OwnRedis):
    """A Redis without data: workers compute all states again and keep published scores."""

    name = "redis-empty"
    what = "Redis killed and restarted empty, after 300,000 transactions"
    appendonly = False
    history = 300_000

    async def disturb(self, harness: Harness) -> None:
        await harness.run_for(harness.seconds(10, least=2))
        await self.restart(harness, loses_data=True)


def require_loss(before: dict[int, int], mark: Mark) -> None:
    """Check that a watermark has gone back.

    Raises:
        NoEffectError: all watermarks are at least where they were.
    """
    lost = any(mark.applied.get(partition, 0) < offset for partition, offset in before.items())
    require_effect(lost, "Redis lost nothing")


def _note_replay(harness: Harness) -> None:
    recovery = harness.recoveries[-1]
    rate = recovery.applied / recovery.lag_gone
    harness.notes.append(
        f"{recovery.applied:,} old and new records applied in {recovery.lag_gone:.1f} s:"
        f" {rate:,.0f}/s"
    )


class RedisFailover(Fault):
    """A failover to a replica with old data behind the same address."""

    name = "redis-failover"
    what = "the primary dies and a replica that lags by 5 s takes over, twice"
    ready_within = REDIS_BACK_SECONDS

    @asynccontextmanager
    async def services(self, shared: Shared) -> AsyncIterator[Addresses]:
        """Run a Redis behind an address that stays the same over failovers."""
        with Redis() as self._primary:
            async with Proxy(self._primary.port) as self._address:
                yield {
                    "kafka_bootstrap_servers": shared.kafka.bootstrap,
                    "redis_url": f"redis://{HOST}:{self._address.port}/0",
                }
                self._primary.close()

    async def disturb(self, harness: Harness) -> None:
        failovers = harness.times(2)
        for failover in failovers:
            harness.fraction = failover / len(failovers)
            async with Proxy(self._primary.port) as link:
                replica = Redis(options={"replicaof": f"{HOST} {link.port}"})
                await asyncio.to_thread(replica.start)
                await asyncio.to_thread(_until_linked, replica)
                await harness.run_for(1.0, 3.0)
                link.hold()
                await harness.run_for(harness.seconds(5, least=2))
                before = await harness.monitor.applied()
                await asyncio.to_thread(self._primary.close)
            with replica.client() as client:
                client.execute_command("REPLICAOF", "NO", "ONE")
            self._primary = replica
            await self._address.redirect(replica.port)
            mark = await harness.mark()
            require_loss(before, mark)
            await harness.recover(mark)
            _note_replay(harness)


def _until_linked(replica: Redis) -> None:
    while replica.replication()["master_link_status"] != "up":
        time.sleep(0.05)


class RedisClusterFailover(Fault):
    """A failover of Redis Cluster to an elected replica with old data."""

    name = "cluster-failover"
    what = "Redis Cluster elects a replica that lags by 5 s when its primary dies, 3 times"
    ready_within = REDIS_BACK_SECONDS
    settings: ClassVar[Mapping[str, Any]] = {"redis_cluster": True}

    @asynccontextmanager
    async def services(self, shared: Shared) -> AsyncIterator[Addresses]:
        """Run a separate cluster with a replica for each primary."""
        with RedisCluster(replicated=True) as self._cluster:
            yield {
                "kafka_bootstrap_servers": shared.kafka.bootstrap,
                "redis_url": self._cluster.url,
            }

    async def disturb(self, harness: Harness) -> None:
        failovers = harness.times(3)
        for failover in failovers:
            harness.fraction = failover / len(failovers)
            await harness.run_for(1.0, 3.0)
            primary, replica = await asyncio.to_thread(self._fullest)
            _unlink(replica)
            await harness.run_for(harness.seconds(5, least=2))
            before = await harness.monitor.applied()
            await asyncio.to_thread(primary.kill)
            await until_true(partial(_is_elected, replica), "the election", ELECTION_LIMIT_SECONDS)
            mark = await harness.mark()
            require_loss(before, mark)
            await harness.recover(mark)
            _note_replay(harness)
            await asyncio.to_thread(primary.start)
            await asyncio.to_thread(self._cluster.wait_until_complete)

    def _fullest(self) -> tuple[Redis, Redis]:
        """Find the primary with the most keys, and its replica."""
        return max(self._cluster.pairs(), key=lambda pair: _size(pair[0]))


def _size(server: Redis) -> int:
    with server.client() as client:
        return int(client.dbsize())


def _unlink(replica: Redis) -> None:
    """Break a replica's link to its primary for good, so that it falls behind."""
    with replica.client() as client:
        client.config_set("masteruser", "nobody")  # an unknown user for the primary
        client.config_set("masterauth", "nothing")
        client.execute_command("CLIENT", "KILL", "TYPE", "master")


async def _is_elected(replica: Redis) -> bool:
    with replica.client() as client:
        state = client.execute_command("CLUSTER INFO")["cluster_state"]
        return bool(state == "ok" and client.info("replication")["role"] == "master")


class Eviction(OwnRedis):
    """Evicted states: without a message, some accounts have no state and look new."""

    name = "eviction"
    what = "Redis evicts a quarter of its data and goes on for 5 s (two policies, twice each)"
    history = 50_000
    policies: ClassVar[tuple[str, ...]] = ("volatile-lru", "allkeys-random")
    # Without these, workers would still have the lost states in memory.
    settings: ClassVar[Mapping[str, Any]] = {"state_cache_size": 0, "micro_batch_max": 300}

    async def disturb(self, harness: Harness) -> None:
        times = harness.times(4)
        for number in times:
            harness.fraction = number / len(times)
            await harness.run_for(1.0, 3.0)
            policy = self.policies[number % len(self.policies)]
            evicted = await asyncio.to_thread(self.evict, policy)
            require_effect(evicted > 0, "Redis evicted nothing")
            harness.notes.append(f"{evicted:,} keys evicted at once by {policy}")
            await harness.run_for(harness.seconds(5, least=2))
            await asyncio.to_thread(self.stop_evicting)
            await harness.recover(await harness.mark())

    def evict(self, policy: str) -> int:
        """Make Redis evict by a policy and return the number of keys evicted at once."""
        with self.redis.client() as client:
            before = client.info("stats")["evicted_keys"]
            client.config_set("maxmemory-policy", policy)
            client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 0.75))
            client.ping()
            return int(client.info("stats")["evicted_keys"] - before)

    def stop_evicting(self) -> None:
        """Stop the eviction, as an operator does after the workers' messages."""
        with self.redis.client() as client:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 0)


class RedisFull(OwnRedis):
    """A full Redis: reads succeed and writes fail."""

    name = "redis-full"
    what = "Redis out of memory (maxmemory with noeviction) for 10 s, 3 times"

    async def disturb(self, harness: Harness) -> None:
        fills = harness.times(3)
        for fill in fills:
            harness.fraction = fill / len(fills)
            await harness.run_for(1.0, 3.0)
            await asyncio.to_thread(self.ask, "CONFIG", "SET", "maxmemory", "1mb")
            await harness.run_for(harness.seconds(10, least=4))
            before = await harness.monitor.applied()
            await harness.run_for(1.0)
            require_effect(
                await harness.monitor.applied() == before, "Redis saved while it was full"
            )
            await asyncio.to_thread(self.ask, "CONFIG", "SET", "maxmemory", "0")
            await harness.recover(await harness.mark())


class RedisSlow(Fault):
    """A slow Redis: a micro-batch waits for it twice, and larger batches compensate."""

    name = "redis-slow"
    what = "each answer of Redis takes 20 to 400 ms longer, for a minute"
    ready_within = REDIS_BACK_SECONDS

    @asynccontextmanager
    async def services(self, shared: Shared) -> AsyncIterator[Addresses]:
        """Put a proxy before the shared Redis."""
        async with Proxy(shared.redis.port) as self._proxy:
            yield {
                "kafka_bootstrap_servers": shared.kafka.bootstrap,
                "redis_url": f"redis://{HOST}:{self._proxy.port}/0",
            }

    async def disturb(self, harness: Harness) -> None:
        delays = harness.times(12, least=3)
        for delay in delays:
            harness.fraction = delay / len(delays)
            self._proxy.delay_seconds = harness.random.uniform(0.01, 0.2)
            await harness.run_for(5.0)
        self._proxy.delay_seconds = 0.0
        await harness.recover(await harness.mark())
