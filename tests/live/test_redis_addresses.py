"""Another Redis than the settings say is told with what to do; Sentinel's primary is followed."""

from __future__ import annotations

import asyncio
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import redis.exceptions

from pipeline.errors import RecurError
from pipeline.local.services import HOST, Kafka, Redis, RedisCluster
from pipeline.settings import Settings, load_settings
from pipeline.storage.client import RedisClient, redis_client
from pipeline.storage.state_store import Load, RedisStateStore, Save, StoreUnavailableError
from pipeline.worker import preflight as startup
from tests.fakes.redis_sentinel import Sentinel, under_sentinel, until_failed_over
from tests.fakes.running_pipeline import PipelineUnderTest, assert_scored_once, transactions

MODEL = "0f3a5b7c9d1e"
NOBODY = "127.0.0.2"
"""Where nothing listens."""

PASSWORD = "of-the-sentinels"


def settings_of(url: str, **others: Any) -> Settings:
    prefix = f"test-{uuid.uuid4().hex[:12]}"
    limits: dict[str, Any] = {"redis_timeout_seconds": 1.0, "startup_timeout_seconds": 1.0}
    return load_settings(**(limits | {"redis_url": url, "redis_key_prefix": prefix} | others))


def refusal(settings: Settings) -> str:
    """What a worker says that does not start with these settings."""

    async def check() -> None:
        store = RedisStateStore.from_settings(settings, MODEL)
        try:
            await startup._check_redis(settings, store)
        finally:
            await store.close()

    with pytest.raises(RecurError) as caught:
        asyncio.run(check())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def said_by(settings: Settings, *commands: tuple[str, ...]) -> str:
    """What other commands of recur say, which do not check Redis first."""

    async def ask() -> None:
        calls = RedisClient(redis_client(settings))
        try:
            await calls.execute(commands)
        finally:
            await calls.close()

    with pytest.raises(RecurError) as caught:
        asyncio.run(ask())
    return str(caught.value)


def test_a_cluster_that_the_settings_do_not_know_of_is_told(redis_cluster: RedisCluster) -> None:
    settings = settings_of(redis_cluster.url)

    assert "set RECUR_REDIS_CLUSTER to true" in refusal(settings)
    keys = tuple("abcdefgh")  # in slots of all three nodes
    assert "RECUR_REDIS_CLUSTER" in said_by(settings, ("MGET", *keys))
    assert "RECUR_REDIS_CLUSTER" in said_by(settings, *(("GET", key) for key in keys))


def test_a_redis_that_is_no_cluster_is_told(redis_server: Redis) -> None:
    settings = settings_of(redis_server.url, redis_cluster=True)

    assert "set RECUR_REDIS_CLUSTER to false" in refusal(settings)
    assert "RECUR_REDIS_CLUSTER" in said_by(settings, ("GET", "a"))


@pytest.mark.live
def test_nodes_that_a_cluster_announces_and_that_do_not_answer_are_named() -> None:
    with RedisCluster() as cluster:
        for node in cluster.nodes:
            with node.client() as client:
                client.config_set("cluster-announce-ip", NOBODY)
        with cluster.nodes[0].client() as client:
            while NOBODY not in str(client.execute_command("CLUSTER SLOTS")):
                time.sleep(0.05)

        said = refusal(settings_of(cluster.url, redis_cluster=True))

        assert f"announces {NOBODY}:" in said
        assert "cluster-announce-ip" in said


def test_a_database_that_is_not_there_and_an_option_that_is_none_are_told(
    redis_server: Redis,
) -> None:
    beyond = settings_of(redis_server.url.replace("/0", "/99"))
    assert "RECUR_REDIS_URL" in refusal(beyond)
    assert "database" in said_by(beyond, ("GET", "a"))
    for is_cluster in (False, True):
        unknown = settings_of(redis_server.url + "?retries=3", redis_cluster=is_cluster)
        assert "question mark" in said_by(unknown, ("GET", "a"))


@pytest.mark.live
def test_a_replica_and_a_policy_that_evicts_keep_a_worker_from_starting() -> None:
    with (
        Redis(options={"maxmemory-policy": "volatile-lru"}) as server,
        Redis(options={"replicaof": f"{HOST} {server.port}"}) as replica,
    ):
        assert "maxmemory-policy volatile-lru" in refusal(settings_of(server.url))
        said = refusal(settings_of(replica.url))
        assert "is a replica" in said
        assert "redis+sentinel://" in said


@pytest.mark.live
def test_sentinels_that_know_no_such_primary_and_what_is_no_sentinel_are_told() -> None:
    with under_sentinel(PASSWORD) as (sentinel, primary, _):
        known = settings_of(sentinel.url, redis_sentinel_password=PASSWORD)
        other = sentinel.url.replace("mymaster", "another")
        for settings in (
            settings_of(other, redis_sentinel_password=PASSWORD),
            settings_of(sentinel.url),
            settings_of(f"redis+sentinel://{HOST}:1/mymaster"),
        ):
            said = refusal(settings)
            assert "Sentinel" in said
            assert "RECUR_REDIS_URL" in said
            assert PASSWORD not in said

        said = refusal(settings_of(f"redis://:{PASSWORD}@{HOST}:{sentinel.port}/0"))
        assert "a Sentinel answers" in said
        assert "redis+sentinel://" in said
        said = refusal(settings_of(f"redis+sentinel://{HOST}:{primary.port}/mymaster"))
        assert "no Sentinel answers, but a Redis" in said

        async def check() -> None:
            store = RedisStateStore.from_settings(known, MODEL)
            await startup._check_redis(known, store)
            await store.close()

        asyncio.run(check())


def fail_over(sentinel: Sentinel) -> None:
    """Have the Sentinel elect another primary, once it knows of a replica that it may promote."""
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
    raise AssertionError("the Sentinel knows of no replica that it may promote")


@pytest.mark.live
def test_a_store_follows_the_primary_that_sentinel_elects() -> None:
    """When the primary dies, and when it is told to change places while it lives."""

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
                assert client.dbsize() == 2  # it was written there
            (loaded,) = await store.load([Load(0, ["A"])])
            assert (loaded.watermark, loaded.states) == (b"w2", [b"a2"])
        finally:
            await store.close()

    with under_sentinel() as servers:
        asyncio.run(run(*servers))


def test_a_worker_goes_on_after_a_failover_that_sentinel_makes(
    kafka: Kafka, tmp_path: Path
) -> None:
    """What the new primary has not got is read back from the log."""
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
