"""Evictions by Redis, with and without running workers: detected, reported and repaired."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from model.transaction import Transaction
from pipeline.local.kafka import Kafka
from pipeline.local.ports import HOST
from pipeline.local.redis import Redis, RedisCluster
from pipeline.local.workers import WorkerProcess
from pipeline.scoring.evictions import EvictedError, Evictions
from pipeline.scoring.health import Health
from pipeline.scoring.metrics import Metrics
from pipeline.settings import Settings, load_settings
from pipeline.storage.client import StoreUnavailableError
from pipeline.storage.merchant_store import RedisMerchantStore
from pipeline.storage.state_store import Load, RedisStateStore, Save
from pipeline.storage.watermark import Watermark
from tests.fakes.memory import MemoryKafka, MemoryScoreLog
from tests.fakes.running_pipeline import (
    PipelineUnderTest,
    assert_scored_once,
    transactions,
    until,
)

ACCOUNTS = 1_500
EVICTED_BYTES = 400_000
REPAIRED = "evicted states are computed again"


def missing(worker: WorkerProcess) -> dict[str, str]:
    """Return the missing parts that /ready names."""
    try:
        with urllib.request.urlopen(f"http://{worker.host}:{worker.port}/ready", timeout=5):
            return {}
    except urllib.error.HTTPError as error:
        return dict(json.loads(error.read())["missing"])


async def metric(worker: WorkerProcess, name: str) -> float:
    await worker.refresh()
    return worker.samples[name]


def evict(server: Redis, policy: str) -> int:
    """Let a server evict some keys, and leave it able to evict; return how many."""
    with server.client() as client:
        before = client.info("stats")["evicted_keys"]
        client.config_set("maxmemory-policy", policy)
        client.config_set("maxmemory", client.info("memory")["used_memory"] - EVICTED_BYTES)
        deadline = time.monotonic() + 30
        while (evicted := client.info("stats")["evicted_keys"] - before) < 100:
            assert time.monotonic() < deadline, "Redis evicts nothing"
            client.ping()
        client.config_set("maxmemory", 0)
        return int(evicted)


def set_policy(server: Redis, policy: str) -> None:
    with server.client() as client:
        client.config_set("maxmemory-policy", policy)


def lines(worker: WorkerProcess, words: str) -> list[str]:
    return [line for line in worker.log_path.read_text().splitlines() if words in line]


async def until_missing(worker: WorkerProcess, part: str, is_missing: bool) -> None:
    async def is_so() -> bool:
        return (part in await asyncio.to_thread(missing, worker)) is is_missing

    await until(is_so, f"/ready of {worker.name} to name {part}: {is_missing}")


async def assert_all_is_right(system: PipelineUnderTest, sent: list[Transaction]) -> None:
    await system.until_applied()
    assert_scored_once(await system.scores(), sent)
    await system.assert_states_are_the_log()


def test_evicted_states_are_computed_again_and_no_account_counts_as_new(
    kafka: Kafka, tmp_path: Path
) -> None:
    """This holds beside live transactions and without workers; the policy is reported, too."""
    sent = transactions(6_000, ACCOUNTS)

    async def run(server: Redis) -> None:
        settings: dict[str, Any] = {"state_cache_size": 0, "micro_batch_max": 100}
        system = PipelineUnderTest(kafka.bootstrap, server.url, tmp_path, **settings)
        async with system.running(workers=1):
            (worker,) = system.workers
            await asyncio.to_thread(set_policy, server, "volatile-ttl")
            await until_missing(worker, "redis_policy", True)
            assert await metric(worker, "recur_redis_may_evict") == 1
            await system.send(sent[:3_000])
            await system.until_applied()  # scoring continues
            assert await metric(worker, "recur_redis_evicted_keys_total") == 0
            await asyncio.to_thread(set_policy, server, "noeviction")
            await until_missing(worker, "redis_policy", False)

            evicted = await asyncio.to_thread(evict, server, "volatile-lru")
            feeding = asyncio.create_task(system.send(sent[3_000:]))
            await until_missing(worker, "evictions", True)
            said = await asyncio.to_thread(missing, worker)
            assert "volatile-lru" in said["redis_policy"]
            assert "noeviction" in said["redis_policy"]
            await feeding
            await asyncio.to_thread(set_policy, server, "noeviction")
            await until_missing(worker, "evictions", False)
            await assert_all_is_right(system, sent)
            assert await asyncio.to_thread(missing, worker) == {}
            assert await metric(worker, "recur_redis_evicted_keys_total") >= evicted
            assert await metric(worker, "recur_redis_may_evict") == 0
            assert len(lines(worker, "Redis evicted keys")) == 1
            assert len(lines(worker, "so it may evict")) == 2
            assert len(lines(worker, REPAIRED)) == 1

            await worker.stop()
            await asyncio.to_thread(evict, server, "allkeys-random")
            await asyncio.to_thread(set_policy, server, "noeviction")
            system.workers.remove(worker)
            (worker,) = await system.start_workers(1)

            async def is_repaired() -> bool:
                return len(lines(worker, REPAIRED)) == 2

            await until(is_repaired, "the worker to find what was evicted")
            await assert_all_is_right(system, sent)  # without a further transaction

    with Redis() as server:
        asyncio.run(run(server))


# without workers -------------------------------------------------------------------------

MODEL = "0f3a5b7c9d1e"
PARTITIONS = 4
RECORDS = 1_000
SERVERS = [pytest.param(name, marks=pytest.mark.live) for name in ("redis", "cluster")]
FILLER = {f"A{i}": b"x" * 400 for i in range(1_500)}


class Watcher:
    """One worker's watch over evictions, with its stores and its log."""

    def __init__(self, settings: Settings, kafka: MemoryKafka) -> None:
        self.settings = settings
        self.store = RedisStateStore.from_settings(settings, MODEL)
        self.merchants = RedisMerchantStore.from_settings(settings)
        self.metrics = Metrics(CollectorRegistry())
        self.health = Health(60.0)
        self.repairs = 0
        self.evictions = Evictions(
            settings=settings,
            model=MODEL,
            partitions=PARTITIONS,
            store=self.store,
            merchant_store=self.merchants,
            logs=MemoryScoreLog(kafka, settings),
            labels_partitions=self._labels_partitions,
            metrics=self.metrics,
            health=self.health,
            on_repaired=self._on_repaired,
        )
        self.store.loss_check = self.merchants.loss_check = self.evictions

    async def _labels_partitions(self) -> int:
        return PARTITIONS

    def _on_repaired(self) -> None:
        self.repairs += 1

    async def __aenter__(self) -> Watcher:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.store.close()
        await self.merchants.close()
        await self.evictions.close()

    async def fill(self) -> None:
        """Write states in every partition, up to the log's end, and record labels."""
        for partition in range(PARTITIONS):
            (loaded,) = await self.store.load_unchecked([Load(partition, [])])
            mark = Watermark(PARTITIONS, RECORDS, 0, time.monotonic_ns()).to_bytes()
            save = Save(partition, loaded.watermark, mark, list(FILLER), list(FILLER.values()))
            assert await self.store.save([save]) == [True]
            await self.merchants.record_labels(partition, [], 0, 7)

    async def offsets(self) -> list[int]:
        """Return each partition's watermark, and the offsets up to which labels are recorded."""
        marks = await self.store.watermarks(PARTITIONS)
        states = [Watermark.from_bytes(mark).next_offset for mark in marks.values()]
        return states + [await self.merchants.recorded_to(p) for p in range(PARTITIONS)]


INTACT = [RECORDS] * PARTITIONS + [7] * PARTITIONS
TAKEN_BACK = [0] * PARTITIONS + [0] * PARTITIONS


def watched(url: str, **settings: Any) -> Callable[[], Watcher]:
    """Make one worker's watch after the other on the same keys and log."""
    kafka = MemoryKafka(dict.fromkeys(("transactions", "scores"), PARTITIONS), lambda: 0)
    for number in range(PARTITIONS * RECORDS):
        kafka.produce("transactions", b"", b"", partition=number % PARTITIONS)
    loaded = load_settings(
        redis_url=url, redis_key_prefix=f"test-{uuid.uuid4().hex[:12]}", **settings
    )
    return lambda: Watcher(loaded, kafka)


@pytest.fixture(params=SERVERS)
def servers_and_watchers(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[Sequence[Redis], Callable[[], Watcher]]]:
    """Provide a Redis, or the primaries of a cluster."""
    if request.param == "redis":
        with Redis() as server:
            yield [server], watched(server.url)
    else:
        with RedisCluster() as cluster:
            yield cluster.nodes, watched(cluster.url, redis_cluster=True)


def _used_bytes(server: Redis) -> int:
    with server.client() as client:
        return int(client.info("memory")["used_memory"])


def test_a_loss_is_repaired_once_and_only_after_evictions_end(
    servers_and_watchers: tuple[Sequence[Redis], Callable[[], Watcher]],
) -> None:
    servers, watch = servers_and_watchers

    async def run() -> None:
        async with watch() as one, watch() as other:
            await one.fill()
            for watcher in (one, other):
                await watcher.evictions.look()
                assert await watcher.offsets() == INTACT
            server = max(servers, key=_used_bytes)
            evict(server, "volatile-lru")
            # Before any check: a missing key does not count as new.
            with pytest.raises(EvictedError, match="noeviction"):
                await one.store.load([Load(0, ["nobody"])])
            with pytest.raises(EvictedError):
                await one.merchants.load(["nobody"])
            with pytest.raises(EvictedError):  # after a loss, existing keys are not trusted either
                await one.store.load([Load(0, [])])
            for _ in range(3):
                await one.evictions.look()
                assert await one.offsets() == INTACT  # while it may still evict
            assert {"evictions", "redis_policy"} <= one.health.missing().keys()
            set_policy(server, "noeviction")
            await one.evictions.look()
            assert await one.offsets() == TAKEN_BACK
            assert not {"evictions", "redis_policy"} & one.health.missing().keys()
            await one.store.load([Load(0, ["nobody"])])
            await one.fill()
            await other.evictions.look()  # it did not see the loss, and has nothing to repair
            assert (one.repairs, other.repairs) == (1, 1)
            async with watch() as later:
                await later.evictions.look()
            assert await one.offsets() == INTACT

    asyncio.run(run())


@pytest.mark.live
def test_further_cases_of_evictions() -> None:
    """Cases: no states yet, a reset counter, a second loss, another worker's repair."""

    async def run(server: Redis) -> None:
        with server.client() as client:
            client.set("of another application", b"x" * 1_000_000, px=10**9)
            evict_all(server)
            watch = watched(server.url)
            async with watch() as one:
                await one.evictions.look()  # no states yet: nothing is lost
                assert one.health.missing().keys() == {"redis", "kafka", "partitions"}
                await one.fill()
                await one.evictions.look()
                assert await one.offsets() == INTACT

                client.config_resetstat()
                await one.evictions.look()
                assert await one.offsets() == INTACT
                evict(server, "volatile-lru")  # perhaps fewer than before the reset
                set_policy(server, "noeviction")
                lock = one.evictions._keys.evictions_lock()
                client.set(lock, "another worker", px=60_000)
                await one.evictions.look()
                assert await one.offsets() == INTACT
                client.delete(lock)
                await one.evictions.look()
                assert await one.offsets() == TAKEN_BACK
                assert client.get(lock) is None

                await one.fill()
                evict(server, "volatile-lru")
                set_policy(server, "noeviction")
                await one.evictions.look()
                assert await one.offsets() == TAKEN_BACK

                # States of a version without the watch: evictions may concern them.
                await one.fill()
                client.delete(one.evictions._keys.evictions())
                async with watch() as other:
                    await other.evictions.look()
                assert await one.offsets() == TAKEN_BACK

    with Redis() as server:
        asyncio.run(run(server))


@pytest.mark.live
def test_a_restart_of_the_server_does_not_hide_a_loss() -> None:
    """A corrected policy in its file needs a restart, which resets its counter."""

    async def run(server: Redis) -> None:
        watch = watched(server.url)
        async with watch() as one:
            for is_record_evicted in (False, True):
                await one.fill()
                await one.evictions.look()
                evict(server, "volatile-lru")
                await one.evictions.look()
                if is_record_evicted:
                    with server.client() as client:
                        client.delete(one.evictions._keys.evictions())
                server.stop()
                server.start()
                with server.client() as client:
                    assert client.info("stats")["evicted_keys"] == 0
                if not is_record_evicted:  # another worker finds it in the record
                    async with watch() as later:
                        await later.evictions.look()
                        assert await later.offsets() == TAKEN_BACK
                await until_answered(one)
                assert await one.offsets() == TAKEN_BACK

    async def until_answered(watcher: Watcher) -> None:
        for _ in range(100):
            try:
                await watcher.evictions.look()
                await watcher.offsets()
                return
            except StoreUnavailableError:
                await asyncio.sleep(0.05)
        raise AssertionError("Redis is back and does not answer")

    with Redis() as server:
        asyncio.run(run(server))


def evict_all(server: Redis) -> None:
    """Let a server evict its keys."""
    with server.client() as client:
        client.config_set("maxmemory-policy", "allkeys-random")
        client.config_set("maxmemory", 1)
        while client.dbsize():
            client.ping()
        client.config_set("maxmemory", 0)
        client.config_set("maxmemory-policy", "noeviction")


@pytest.mark.live
def test_a_full_server_and_a_replica_are_reported_as_such() -> None:
    async def run(server: Redis, replica: Redis) -> None:
        async with watched(server.url)() as one, watched(replica.url)() as of_replica:
            await one.evictions.look()
            with server.client() as client:
                client.config_set("maxmemory", 1)
                await one.evictions.look()
                assert "raise maxmemory" in one.health.missing()["redis_memory"]
                client.config_set("maxmemory", 0)
            await one.evictions.look()
            assert "redis_memory" not in one.health.missing()
            with pytest.raises(StoreUnavailableError, match="ReadOnly"):
                await of_replica.evictions.look()  # a replica cannot store the record
            assert "RECUR_REDIS_URL" in of_replica.health.missing()["redis_role"]

    with Redis() as server, Redis(options={"replicaof": f"{HOST} {server.port}"}) as replica:
        asyncio.run(run(server, replica))
