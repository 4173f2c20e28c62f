"""Faults of Redis: it freezes, dies, loses data, fails over, is full, is slow."""

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
from tests.faults.harness import Mark, Rig, require
from tests.faults.monitor import until_true
from tests.faults.proxy import Proxy

ELECTION_LIMIT_SECONDS = 60.0


class OwnRedis(Fault):
    """A fault of a Redis that no other fault uses."""

    ready_within = REDIS_BACK_SECONDS
    appendonly: ClassVar[bool] = True
    redis: Redis

    @asynccontextmanager
    async def services(self, shared: Shared) -> AsyncIterator[Addresses]:
        """The shared broker and a Redis of its own."""
        with Redis(appendonly=self.appendonly) as self.redis:
            yield {"kafka_bootstrap_servers": shared.kafka.bootstrap, "redis_url": self.redis.url}

    async def restart(self, rig: Rig, *, loses_data: bool = False) -> None:
        """SIGKILL, and a new start after some seconds; wait until the system has recovered."""
        before = await rig.watch.applied()
        await asyncio.to_thread(self.redis.kill)
        await rig.go_on(1.0, 4.0)
        await asyncio.to_thread(self.redis.start)
        mark = await rig.mark()
        if loses_data:
            require_loss(before, mark)
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


def require_loss(before: dict[int, int], mark: Mark) -> None:
    """A watermark is behind where it was before.

    Raises:
        NoEffectError: none is.
    """
    lost = any(mark.applied.get(partition, 0) < offset for partition, offset in before.items())
    require(lost, "Redis lost nothing")


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
                    "kafka_bootstrap_servers": shared.kafka.bootstrap,
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
            require_loss(before, mark)
            await rig.recover(mark)
            _tell_replay(rig)


def _until_linked(replica: Redis) -> None:
    while replica.replication()["master_link_status"] != "up":
        time.sleep(0.05)


class RedisClusterFailover(Fault):
    """The others elect the replica, which has not all, and clients learn of it from them."""

    name = "cluster-failover"
    what = "Redis Cluster elects a replica that lags by 5 s when its master dies, 3 times"
    ready_within = REDIS_BACK_SECONDS
    settings: ClassVar[Mapping[str, Any]] = {"redis_cluster": True}

    @asynccontextmanager
    async def services(self, shared: Shared) -> AsyncIterator[Addresses]:
        """The shared broker, and a cluster of its own with a replica for each primary."""
        with RedisCluster(replicated=True) as self._cluster:
            yield {
                "kafka_bootstrap_servers": shared.kafka.bootstrap,
                "redis_url": self._cluster.url,
            }

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        failovers = rig.times(3)
        for failover in failovers:
            rig.fraction = failover / len(failovers)
            await rig.go_on(1.0, 3.0)
            primary, replica = await asyncio.to_thread(self._fullest)
            _unlink(replica)
            await rig.go_on(rig.seconds(5, least=2))
            before = await rig.watch.applied()
            await asyncio.to_thread(primary.kill)
            await until_true(partial(_is_elected, replica), "the election", ELECTION_LIMIT_SECONDS)
            mark = await rig.mark()
            require_loss(before, mark)
            await rig.recover(mark)
            _tell_replay(rig)
            await asyncio.to_thread(primary.start)
            await asyncio.to_thread(self._cluster.wait_until_complete)

    def _fullest(self) -> tuple[Redis, Redis]:
        """The primary with the most keys, and its replica."""
        return max(self._cluster.pairs(), key=lambda pair: _size(pair[0]))


def _size(server: Redis) -> int:
    with server.client() as client:
        return int(client.dbsize())


def _unlink(replica: Redis) -> None:
    """Cut its link to its primary and let it have no other, so that it falls behind."""
    with replica.client() as client:
        client.config_set("masteruser", "nobody")  # whom the primary does not let in
        client.config_set("masterauth", "nothing")
        client.execute_command("CLIENT", "KILL", "TYPE", "master")


async def _is_elected(replica: Redis) -> bool:
    with replica.client() as client:
        state = client.execute_command("CLUSTER INFO")["cluster_state"]
        return bool(state == "ok" and client.info("replication")["role"] == "master")


class Eviction(OwnRedis):
    """Without a word to anybody: some accounts have no state any more, and look new."""

    name = "eviction"
    what = "Redis evicts a quarter of what it has, and goes on for 5 s (two policies, twice each)"
    history = 50_000
    policies: ClassVar[tuple[str, ...]] = ("volatile-lru", "allkeys-random")
    # Or workers would have in memory what Redis has lost.
    settings: ClassVar[Mapping[str, Any]] = {"state_cache_size": 0, "micro_batch_max": 300}

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        times = rig.times(4)
        for number in times:
            rig.fraction = number / len(times)
            await rig.go_on(1.0, 3.0)
            policy = self.policies[number % len(self.policies)]
            evicted = await asyncio.to_thread(self.evict, policy)
            require(evicted > 0, "Redis evicted nothing")
            rig.notes.append(f"{evicted:,} keys evicted at once by {policy}")
            await rig.go_on(rig.seconds(5, least=2))
            await asyncio.to_thread(self.stop_evicting)
            await rig.recover(await rig.mark())

    def evict(self, policy: str) -> int:
        """Have Redis make room by a policy; how many keys went at once."""
        with self.redis.client() as client:
            before = client.info("stats")["evicted_keys"]
            client.config_set("maxmemory-policy", policy)
            client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 0.75))
            client.ping()
            return int(client.info("stats")["evicted_keys"] - before)

    def stop_evicting(self) -> None:
        """As an operator does who reads what the workers say."""
        with self.redis.client() as client:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 0)


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
            require(await rig.watch.applied() == before, "Redis saved while it was full")
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
                "kafka_bootstrap_servers": shared.kafka.bootstrap,
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
