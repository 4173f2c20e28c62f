"""Redis evicts while workers run, or while none does: noticed, said, and computed again."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from model.transaction import Transaction
from pipeline.services import Kafka, Redis, RedisCluster
from pipeline.worker_processes import WorkerProcess
from tests.pipeline_under_test import (
    PipelineUnderTest,
    assert_scored_once,
    transactions,
    until,
)

ACCOUNTS = 1_500
EVICTED_BYTES = 400_000


def missing(worker: WorkerProcess) -> dict[str, str]:
    """What /ready says is missing."""
    try:
        with urllib.request.urlopen(f"http://{worker.host}:{worker.port}/ready", timeout=5):
            return {}
    except urllib.error.HTTPError as error:
        return dict(json.loads(error.read())["missing"])


async def metric(worker: WorkerProcess, name: str) -> float:
    await worker.refresh()
    return worker.samples[name]


def evict(server: Redis, policy: str) -> int:
    """Let a server evict some of its keys; how many. It may evict from then on."""
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


@pytest.mark.parametrize("policy", ["volatile-lru", "allkeys-random"])
def test_what_is_evicted_while_workers_run_is_computed_again(
    policy: str, kafka: Kafka, tmp_path: Path
) -> None:
    """No account is scored as new for it, though transactions go on."""
    sent = transactions(6_000, ACCOUNTS)

    async def run(server: Redis) -> None:
        settings: dict[str, Any] = {"cached_states_max": 0, "micro_batch_max": 100}
        system = PipelineUnderTest(kafka.bootstrap, server.url, tmp_path, **settings)
        async with system.running(workers=2):
            await system.send(sent[:3_000])
            await system.until_applied()
            evicted = await asyncio.to_thread(evict, server, policy)
            feeding = asyncio.create_task(system.send(sent[3_000:]))
            for worker in system.workers:
                await until_missing(worker, "evictions", True)
                said = await asyncio.to_thread(missing, worker)
                assert policy in said["redis_policy"]
                assert "noeviction" in said["redis_policy"]
                assert "evicted" in said["evictions"]
            await feeding
            await asyncio.to_thread(set_policy, server, "noeviction")
            for worker in system.workers:
                await until_missing(worker, "evictions", False)
            await assert_all_is_right(system, sent)
            for worker in system.workers:
                assert await asyncio.to_thread(missing, worker) == {}
                assert await metric(worker, "recur_redis_evicted_keys_total") >= evicted
                assert await metric(worker, "recur_redis_may_evict") == 0
                assert len(lines(worker, "Redis evicted keys")) == 1
                assert len(lines(worker, "so it may evict")) == 1
            repaired = [len(lines(w, "what Redis evicted is")) for w in system.workers]
            assert repaired == [1, 1]

    with Redis() as server:
        asyncio.run(run(server))


def test_what_was_evicted_while_no_worker_ran_is_computed_again_at_the_start(
    kafka: Kafka, tmp_path: Path
) -> None:
    """Also where no further transaction comes."""
    sent = transactions(3_000, ACCOUNTS)

    async def run(server: Redis) -> None:
        system = PipelineUnderTest(kafka.bootstrap, server.url, tmp_path)
        async with system.running(workers=1):
            await system.send(sent)
            await system.until_applied()
            await system.workers.pop().stop()
            await asyncio.to_thread(evict, server, "volatile-random")
            await asyncio.to_thread(set_policy, server, "noeviction")
            (worker,) = await system.start_workers(1)

            async def is_repaired() -> bool:
                return bool(lines(worker, "what Redis evicted is computed again"))

            await until(is_repaired, "the worker to find what was evicted")
            await assert_all_is_right(system, sent)
            # Once is enough: what is repaired is remembered.
            await worker.stop()
            system.workers.remove(worker)
            marks = await system.watermarks()
            (worker,) = await system.start_workers(1)
            assert await system.watermarks() == marks
            assert not lines(worker, "evicted")

    with Redis() as server:
        asyncio.run(run(server))


def test_a_server_that_may_evict_and_has_not_is_told_and_scored_on(
    kafka: Kafka, tmp_path: Path
) -> None:
    sent = transactions(600, 100)

    async def run(server: Redis) -> None:
        system = PipelineUnderTest(kafka.bootstrap, server.url, tmp_path)
        async with system.running(workers=1):
            (worker,) = system.workers
            await system.send(sent[:300])
            await asyncio.to_thread(set_policy, server, "volatile-ttl")
            await until_missing(worker, "redis_policy", True)
            assert await metric(worker, "recur_redis_may_evict") == 1
            await system.send(sent[300:])
            await system.until_applied()
            await asyncio.to_thread(set_policy, server, "noeviction")
            await until_missing(worker, "redis_policy", False)
            await assert_all_is_right(system, sent)
            assert await metric(worker, "recur_redis_evicted_keys_total") == 0

    with Redis() as server:
        asyncio.run(run(server))


def test_one_primary_of_a_cluster_that_evicts_is_found(kafka: Kafka, tmp_path: Path) -> None:
    sent = transactions(6_000, ACCOUNTS)

    async def run(cluster: RedisCluster) -> None:
        system = PipelineUnderTest(kafka.bootstrap, cluster.url, tmp_path, redis_cluster=True)
        async with system.running(workers=1):
            (worker,) = system.workers
            await system.send(sent[:3_000])
            await system.until_applied()
            fullest = max(cluster.nodes, key=_used_bytes)
            await asyncio.to_thread(evict, fullest, "allkeys-random")
            await until_missing(worker, "evictions", True)
            said = await asyncio.to_thread(missing, worker)
            assert str(fullest.port) in said["redis_policy"]
            await asyncio.to_thread(set_policy, fullest, "noeviction")
            await until_missing(worker, "evictions", False)
            await system.send(sent[3_000:])
            await assert_all_is_right(system, sent)

    with RedisCluster() as cluster:
        asyncio.run(run(cluster))


def _used_bytes(server: Redis) -> int:
    with server.client() as client:
        return int(client.info("memory")["used_memory"])
