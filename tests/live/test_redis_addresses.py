"""Redis addresses: errors that say what to do, and clients that follow a Sentinel's primary."""

from __future__ import annotations

import asyncio
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import redis.exceptions

from pipeline.errors import RecurError
from pipeline.local.kafka import Kafka
from pipeline.local.ports import HOST
from pipeline.local.redis import Redis, RedisCluster
from pipeline.settings import Settings, load_settings
from pipeline.storage.client import RedisClient, StoreUnavailableError, redis_client
from pipeline.storage.state_store import Load, RedisStateStore, Save
from pipeline.worker import preflight as startup
from tests.fakes.redis_sentinel import Sentinel, under_sentinel, until_failed_over
from tests.fakes.running_pipeline import PipelineUnderTest, assert_scored_once, transactions

MODEL = "0f3a5b7c9d1e"
NOBODY = "127.0.0.2"
"""An address without a listener."""

PASSWORD = "of-the-sentinels"


def settings_of(url: str, **others: Any) -> Settings:
    prefix = f"test-{uuid.uuid4().hex[:12]}"
    limits: dict[str, Any] = {"redis_timeout_seconds": 1.0, "startup_timeout_seconds": 1.0}
    return load_settings(**(limits | {"redis_url": url, "redis_key_prefix": prefix} | others))


def refusal(settings: Settings) -> str:
    """Return the error of a worker that does not start with these settings."""

    async def check() -> None:
        store = RedisStateStore.from_settings(settings, MODEL)
        try:
            await startup.check_redis(settings, store.servers)
        finally:
            await store.close()

    with pytest.raises(RecurError) as caught:
        asyncio.run(check())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def command_error(settings: Settings, *commands: tuple[str, ...]) -> str:
    """Return the error of a command of recur that does not check Redis first."""

    async def ask() -> None:
        calls = RedisClient(redis_client(settings))
        try:
            await calls.execute(commands)
        finally:
            await calls.close()

    with pytest.raises(RecurError) as caught:
        asyncio.run(ask())
    return str(caught.value)


def test_a_cluster_behind_settings_without_one_is_named(redis_cluster: RedisCluster) -> None:
    settings = settings_of(redis_cluster.url)

    assert "set RECUR_REDIS_CLUSTER to true" in refusal(settings)
    keys = tuple("abcdefgh")  # in slots of all three nodes
    assert "RECUR_REDIS_CLUSTER" in command_error(settings, ("MGET", *keys))
    assert "RECUR_REDIS_CLUSTER" in command_error(settings, *(("GET", key) for key in keys))


def test_a_single_redis_behind_settings_with_a_cluster_is_named(redis_server: Redis) -> None:
    settings = settings_of(redis_server.url, redis_cluster=True)

    assert "set RECUR_REDIS_CLUSTER to false" in refusal(settings)
    assert "RECUR_REDIS_CLUSTER" in command_error(settings, ("GET", "a"))


@pytest.mark.live
def test_announced_cluster_nodes_that_do_not_answer_are_named() -> None:
    with RedisCluster() as cluster:
        for node in cluster.nodes:
            with node.client() as client:
                client.config_set("cluster-announce-ip", NOBODY)
        with cluster.nodes[0].client() as client:
            while NOBODY not in str(client.execute_command("CLUSTER SLOTS")):
                time.sleep(0.05)

        message = refusal(settings_of(cluster.url, redis_cluster=True))

        assert f"announces {NOBODY}:" in message
        assert "cluster-announce-ip" in message


def test_a_missing_database_and_an_unknown_option_are_named(
    redis_server: Redis,
) -> None:
    beyond = settings_of(redis_server.url.replace("/0", "/99"))
    assert "RECUR_REDIS_URL" in refusal(beyond)
    assert "database" in command_error(beyond, ("GET", "a"))
    for is_cluster in (False, True):
        unknown = settings_of(redis_server.url + "?retries=3", redis_cluster=is_cluster)
        assert "question mark" in command_error(unknown, ("GET", "a"))


@pytest.mark.live
def test_a_replica_or_an_evicting_policy_stops_the_start() -> None:
    with (
        Redis(options={"maxmemory-policy": "volatile-lru"}) as server,
        Redis(options={"replicaof": f"{HOST} {server.port}"}) as replica,
    ):
        assert "maxmemory-policy volatile-lru" in refusal(settings_of(server.url))
        message = refusal(settings_of(replica.url))
        assert "is a replica" in message
        assert "redis+sentinel://" in message


@pytest.mark.live
def test_sentinels_without_the_primary_and_servers_that_are_no_sentinel_are_named() -> None:
    with under_sentinel(PASSWORD) as (sentinel, primary, _):
        known = settings_of(sentinel.url, redis_sentinel_password=PASSWORD)
        other = sentinel.url.replace("mymaster", "another")
        for settings in (
            settings_of(other, redis_sentinel_password=PASSWORD),
            settings_of(sentinel.url),
            settings_of(f"redis+sentinel://{HOST}:1/mymaster"),
        ):
            message = refusal(settings)
            assert "Sentinel" in message
            assert "RECUR_REDIS_URL" in message
            assert PASSWORD not in message

        message = refusal(settings_of(f"redis://:{PASSWORD}@{HOST}:{sentinel.port}/0"))
        assert "a Sentinel answers" in message
        assert "redis+sentinel://" in message
        message = refusal(settings_of(f"redis+sentinel://{HOST}:{primary.port}/mymaster"))
        assert "a Redis answers at" in message

        async def check() -> None:
            store = RedisStateStore.from_settings(known, MODEL)
            await startup.check_redis(known, store.servers)
            await store.close()

        asyncio.run(check())


def fail_over(sentinel: Sentinel) -> None:
    """Make the Sentinel elect another primary, once it knows a replica to promote."""
    for _ in range(600):
        try:
            with sentinel.client() as client:
                client.execute_command("SENTINEL FAILOVER", "mymaster")
        except redis.exceptions.ResponseError as error:
            if "NOGOODSLAVE" not in str(error):
                raise
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the Sentinel knows no replica to promote")


@pytest.mark.live
def test_a_store_follows_the_primary_that_sentinel_elects() -> None:
    """The Sentinel elects another primary while the first one lives."""

    async def answers(store: RedisStateStore, save: Save) -> None:
        for _ in range(600):
            try:
                assert await store.save([save]) == [True]
            except StoreUnavailableError:
                await asyncio.sleep(0.1)
            else:
                return
        raise AssertionError("the store does not find the new primary")

    async def run(sentinel: Sentinel, primary: Redis, replica: Redis) -> None:
        store = RedisStateStore.from_settings(settings_of(sentinel.url), MODEL)
        try:
            await answers(store, Save(0, None, b"w1", ["A"], [b"a1"]))
            await asyncio.to_thread(fail_over, sentinel)
            await asyncio.to_thread(until_failed_over, sentinel, replica)
            await answers(store, Save(0, b"w1", b"w2", ["A"], [b"a2"]))
            with replica.client() as client:
                assert client.dbsize() == 2  # the new primary has the data
            (loaded,) = await store.load([Load(0, ["A"])])
            assert (loaded.watermark, loaded.states) == (b"w2", [b"a2"])
        finally:
            await store.close()

    with under_sentinel() as servers:
        asyncio.run(run(*servers))


def test_a_worker_goes_on_after_a_failover_that_sentinel_makes(
    kafka: Kafka, tmp_path: Path
) -> None:
    """The worker reads data that the new primary lacks back from the log."""
    sent = transactions(3_000, accounts=200)

    async def run(sentinel: Sentinel, primary: Redis, replica: Redis) -> None:
        system = PipelineUnderTest(kafka.bootstrap, sentinel.url, tmp_path)
        async with system.running(workers=1):
            await system.send(sent[:1_500])
            await system.until_applied()
            await asyncio.to_thread(primary.kill)
            await system.send(sent[1_500:])
            await asyncio.to_thread(until_failed_over, sentinel, replica)
            await system.until_applied(120)
            assert_scored_once(await system.scores(), sent)
            await system.assert_states_are_the_log()

    with under_sentinel() as servers:
        asyncio.run(run(*servers))
