"""The embedded services are real, keep their data, and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from redis import RedisError
from redis.cluster import RedisCluster as ClusterClient

from pipeline.errors import ServiceError
from pipeline.local.embedded import embedded
from pipeline.local.kafka import Kafka, KafkaCluster
from pipeline.local.kafka_jars import jar_directory
from pipeline.local.ports import HOST, free_port
from pipeline.local.redis import Redis, RedisCluster
from pipeline.local.service import Service
from pipeline.settings import load_settings

REPOSITORY = Path(__file__).parents[3]


def exists(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], what: str, limit_seconds: float = 60.0) -> None:
    deadline = time.monotonic() + limit_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_seconds} s: {what}"
        time.sleep(0.02)


def wait_until_written(server: Redis) -> None:
    """Wait until all changes are in the append-only file: a slow fsync delays the write."""
    with server.client() as client:
        wait_until(
            lambda: client.info("persistence")["aof_buffer_length"] == 0,
            "the append-only file is written",
        )


async def create_topic(broker: Kafka, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, num_partitions=1, replication_factor=1)])
    finally:
        await admin.close()


async def produce(broker: Kafka, topic: str, value: bytes) -> None:
    async with AIOKafkaProducer(bootstrap_servers=broker.bootstrap, acks="all") as producer:
        await producer.send_and_wait(topic, value)


async def next_value(broker: Kafka, topic: str) -> bytes | None:
    """Value of the first record that the topic's consumer group has not committed."""
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=broker.bootstrap,
        group_id=f"{topic}-readers",
        auto_offset_reset="earliest",
    )
    await consumer.start()
    try:
        record = await asyncio.wait_for(consumer.getone(), 30)
        value: bytes | None = record.value
        return value
    finally:
        await consumer.stop()


def test_the_shared_broker_delivers_a_record(kafka: Kafka) -> None:
    async def go() -> bytes | None:
        await create_topic(kafka, "services-through")
        await produce(kafka, "services-through", b"payment")
        return await next_value(kafka, "services-through")

    assert asyncio.run(go()) == b"payment"


def test_the_shared_redis_answers_and_never_evicts(redis_server: Redis) -> None:
    with redis_server.client() as client:
        assert client.ping()
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


@pytest.mark.live
def test_redis_shortens_its_file_late_and_an_option_overrides_that() -> None:
    with Redis(options={"auto-aof-rewrite-percentage": "50"}) as server, server.client() as client:
        assert client.config_get("auto-aof-rewrite-*") == {
            "auto-aof-rewrite-min-size": str(512 << 20),
            "auto-aof-rewrite-percentage": "50",
        }


@pytest.mark.live
def test_a_broker_keeps_records_offsets_and_address_after_sigkill_and_stop() -> None:
    async def write() -> None:
        await create_topic(broker, "kept")
        await produce(broker, "kept", b"first")
        await produce(broker, "kept", b"second")

    with Kafka() as broker:
        asyncio.run(write())
        first_pid, address = broker.pid, broker.bootstrap
        broker.kill()
        assert not exists(first_pid)
        broker.start()
        assert asyncio.run(next_value(broker, "kept")) == b"first"
        broker.stop()
        broker.start()
        assert asyncio.run(next_value(broker, "kept")) == b"second"
        assert broker.bootstrap == address


@pytest.mark.live
def test_redis_with_append_only_file_keeps_its_data_and_address_after_sigkill() -> None:
    with Redis() as server:
        with server.client() as client:
            client.set("account", "state")
        wait_until_written(server)
        first_pid, address = server.pid, server.url
        server.kill()
        assert not exists(first_pid)
        server.start()
        with server.client() as client:
            assert client.get("account") == b"state"
        assert server.url == address


@pytest.mark.live
def test_a_given_directory_outlives_the_context_and_serves_the_next_one(tmp_path: Path) -> None:
    with Redis(directory=tmp_path / "redis") as server, server.client() as client:
        client.set("account", "state")
    with Redis(directory=tmp_path / "redis") as server, server.client() as client:
        assert client.get("account") == b"state"


@pytest.mark.live
def test_two_services_never_share_a_directory(tmp_path: Path) -> None:
    with Redis(directory=tmp_path) as server:
        with pytest.raises(ServiceError, match=r"redis\.log belongs to a process that still runs"):
            Redis(directory=tmp_path).start()
        with server.client() as client:
            assert client.ping()


@pytest.mark.live
def test_redis_takes_more_options() -> None:
    options = {"maxmemory": "64mb"}
    with Redis(appendonly=False, options=options) as server, server.client() as client:
        assert client.config_get("maxmemory") == {"maxmemory": str(64 << 20)}
        assert client.config_get("appendonly") == {"appendonly": "no"}


@pytest.mark.live
def test_a_redis_cluster_keeps_a_hash_tag_together_and_survives_a_dead_node() -> None:
    keys = [f"recur:{{{tag}}}:{account}" for tag in range(8) for account in range(2)]
    with RedisCluster() as cluster:
        with ClusterClient.from_url(cluster.url) as client:
            assert len(client.get_primaries()) == 3
            for key in keys:
                client.set(key, key)
            for first, second in zip(keys[::2], keys[1::2], strict=True):
                assert client.mget(first, second) == [first.encode(), second.encode()]
        wait_until_written(cluster.nodes[1])
        cluster.nodes[1].kill()
        cluster.nodes[1].start()
        cluster.wait_until_complete()
        with ClusterClient.from_url(cluster.url) as client:
            assert [client.get(key) for key in keys] == [key.encode() for key in keys]


@pytest.mark.live
def test_a_kafka_cluster_keeps_acknowledged_records_and_works_without_a_node() -> None:
    """The faults remove one broker at a time from such a cluster (replication 3, in sync 2)."""

    async def go(cluster: KafkaCluster) -> None:
        first, second, third = cluster.nodes
        admin = AIOKafkaAdminClient(bootstrap_servers=cluster.bootstrap)
        await admin.start()
        await admin.create_topics([NewTopic("kept", num_partitions=1, replication_factor=3)])
        await admin.close()
        await produce(first, "kept", b"before")
        first.kill()
        await produce(second, "kept", b"after")
        consumer = AIOKafkaConsumer(
            "kept", bootstrap_servers=third.bootstrap, auto_offset_reset="earliest"
        )
        await consumer.start()
        try:
            assert (await asyncio.wait_for(consumer.getone(), 30)).value == b"before"
            assert (await asyncio.wait_for(consumer.getone(), 30)).value == b"after"
        finally:
            await consumer.stop()

    with KafkaCluster() as cluster:
        assert [node.known_brokers() for node in cluster.nodes] == [3, 3, 3]
        asyncio.run(go(cluster))
        cluster.nodes[0].start()
        cluster.wait_until_complete()


@pytest.mark.live
def test_a_paused_redis_is_silent_until_it_is_resumed() -> None:
    with Redis() as server, server.client() as client:
        server.pause()
        with pytest.raises(RedisError):
            client.ping()
        server.resume()
        assert client.ping()


@pytest.mark.live
def test_the_end_of_the_context_leaves_no_process_and_no_directory() -> None:
    with embedded() as started:
        assert started.kafka is not None
        assert started.redis is not None
        both: list[Service] = [started.kafka, started.redis]
        pids = [pid for service in both for pid in (service.pid, service.supervisor_pid)]
        assert all(exists(pid) for pid in pids)
        # Ctrl-C reaches only the foreground group of this session: the broker is not in it.
        assert all(os.getsid(pid) != os.getsid(0) for pid in pids)
    assert not any(exists(pid) for pid in pids)
    assert not any(service.directory.exists() for service in both)
    with pytest.raises(ServiceError, match="is not running"):
        _ = started.redis.pid


PARENT = """
import os, pathlib, sys, time
from pipeline.local.embedded import embedded
from pipeline.local.redis import Redis
with embedded() as started, Redis(directory=pathlib.Path(sys.argv[1])) as keeper:
    child = os.fork()  # it inherits the parent's end of every pipe
    if child:
        for service in (started.kafka, started.redis, keeper):
            print(service.pid, service.supervisor_pid, service.directory, flush=True)
        print(child, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_parent_killed_with_sigkill_leaves_no_process_and_no_directory(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, tmp_path],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        try:
            assert parent.stdout is not None
            lines = [parent.stdout.readline().split() for _ in range(3)]
            child = int(parent.stdout.readline())
        finally:
            parent.kill()
    pids = [int(pid) for line in lines for pid in line[:2]]
    kafka, redis, kept = [Path(line[2]) for line in lines]
    try:
        wait_until(lambda: not any(exists(pid) for pid in pids), "services end with their parent")
    finally:
        os.kill(child, signal.SIGKILL)
    assert not kafka.exists()
    assert not redis.exists()
    assert (kept / "appendonly.aof").exists()  # a given directory stays


@pytest.mark.live
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a parent's death")
def test_a_service_dies_with_its_supervisor() -> None:
    with Redis() as server:
        pid = server.pid
        os.kill(server.supervisor_pid, signal.SIGKILL)
        wait_until(lambda: not exists(pid), "Redis ends with its supervisor")
        wait_until(lambda: not server.running, "the supervisor's end is noticed")


@pytest.mark.parametrize("service", [Kafka, Redis])
def test_a_taken_port_is_named(service: type[Kafka] | type[Redis]) -> None:
    port = free_port()
    with socket.socket() as other:
        other.bind((HOST, port))
        other.listen()
        taken = service(port=port)
        with pytest.raises(ServiceError, match=f"port 127.0.0.1:{port} is taken"):
            taken.start()
        taken.close()
    assert not taken.directory.exists()


def test_a_missing_java_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"there is no Java at .*/java; install"):
        Kafka(directory=tmp_path, java=tmp_path / "java").start()


@pytest.mark.live
def test_a_broken_java_ends_the_start_at_once(tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho cannot load libjvm.so >&2\nexit 127\n")
    java.chmod(0o755)
    jar_directory()
    with pytest.raises(ServiceError, match=r"status 127(.|\n)*cannot load libjvm\.so"):
        Kafka(directory=tmp_path / "kafka", java=java).start()


def test_a_missing_redis_server_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ServiceError, match="there is no redis-server; install"):
        Redis(directory=tmp_path).start()


def test_too_little_memory_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"Kafka needs 100000300 MB .* \d+ MB are available"):
        Kafka(directory=tmp_path, heap_mb=100_000_000).start()


@pytest.mark.live
def test_a_service_that_dies_at_its_start_shows_its_log() -> None:
    broken = Redis(options={"maxmemory": "plenty"})
    with pytest.raises(ServiceError, match=r"Redis is not running(.|\n)*maxmemory"), broken:
        pass
    assert not broken.directory.exists()


@pytest.mark.live
def test_a_start_ends_at_its_time_limit() -> None:
    slow = Kafka(startup_timeout_seconds=0.1)
    with pytest.raises(ServiceError, match=r"did not answer within 0\.1 s"), slow:
        pass
    assert not slow.running


def test_a_service_with_a_given_address_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    broker, store = "broker.example:9092", "redis://redis.example/0"
    with embedded(kafka_bootstrap_servers=broker, redis_url=store) as given:
        assert given.kafka is None
        assert given.redis is None
        for name, address in given.environment().items():
            monkeypatch.setenv(name, address)
        settings = load_settings()
    assert settings.kafka_bootstrap_servers == broker
    assert settings.redis_url == store
