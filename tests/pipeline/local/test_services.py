"""The embedded services are real, keep what they were told, and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from redis import RedisError
from redis.cluster import RedisCluster as ClusterClient

from pipeline.errors import ServiceError
from pipeline.local import services
from pipeline.local.kafka_jars import JARS, jar_directory
from pipeline.local.services import (
    Kafka,
    KafkaCluster,
    Redis,
    RedisCluster,
    Service,
    embedded,
    free_port,
)
from pipeline.settings import load_settings

REPOSITORY = Path(__file__).parents[3]


def exists(pid: int) -> bool:
    """Whether a process is there and not just waiting to be reaped."""
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.strip()
    return bool(state) and not state.startswith("Z")


def wait_until(condition: Callable[[], bool], what: str, limit_seconds: float = 60.0) -> None:
    deadline = time.monotonic() + limit_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_seconds} s: {what}"
        time.sleep(0.02)


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
    """The value of the first record that the topic's consumer group has not committed yet."""
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


def test_a_record_goes_through_the_shared_broker(kafka: Kafka) -> None:
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
def test_a_broker_keeps_records_offsets_and_address_over_sigkill_and_stop() -> None:
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
def test_redis_with_append_only_file_keeps_its_data_and_address_over_sigkill() -> None:
    with Redis() as server:
        with server.client() as client:
            client.set("account", "state")
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
def test_redis_takes_further_options() -> None:
    options = {"maxmemory": "64mb"}
    with Redis(appendonly=False, options=options) as server, server.client() as client:
        assert client.config_get("maxmemory") == {"maxmemory": str(64 << 20)}
        assert client.config_get("appendonly") == {"appendonly": "no"}


@pytest.mark.live
def test_a_cluster_serves_the_keys_of_one_hash_tag_and_outlives_the_death_of_a_node() -> None:
    keys = [f"recur:{{{tag}}}:{account}" for tag in range(8) for account in range(2)]
    with RedisCluster() as cluster:
        with ClusterClient.from_url(cluster.url) as client:
            assert len(client.get_primaries()) == 3
            for key in keys:
                client.set(key, key)
            for first, second in zip(keys[::2], keys[1::2], strict=True):
                assert client.mget(first, second) == [first.encode(), second.encode()]
        cluster.nodes[1].kill()
        cluster.nodes[1].start()
        cluster.wait_until_whole()
        with ClusterClient.from_url(cluster.url) as client:
            assert [client.get(key) for key in keys] == [key.encode() for key in keys]


@pytest.mark.live
def test_a_kafka_cluster_keeps_what_it_acknowledged_and_goes_on_without_a_node() -> None:
    """Replication 3 and min.insync 2: what `make faults` takes one broker at a time from."""

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
        cluster.wait_until_whole()


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
        # Ctrl-C reaches the foreground group of our session only: the broker is not in it.
        assert all(os.getsid(pid) != os.getsid(0) for pid in pids)
    assert not any(exists(pid) for pid in pids)
    assert not any(service.directory.exists() for service in both)
    with pytest.raises(ServiceError, match="is not running"):
        _ = started.redis.pid


PARENT = """
import os, pathlib, sys, time
from pipeline.local.services import Redis, embedded
with embedded() as started, Redis(directory=pathlib.Path(sys.argv[1])) as keeper:
    heir = os.fork()  # has our end of every pipe, and keeps it
    if heir:
        for service in (started.kafka, started.redis, keeper):
            print(service.pid, service.supervisor_pid, service.directory, flush=True)
        print(heir, flush=True)
    time.sleep(600)
"""


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
            heir = int(parent.stdout.readline())
        finally:
            parent.kill()
    pids = [int(pid) for line in lines for pid in line[:2]]
    kafka, redis, kept = [Path(line[2]) for line in lines]
    try:
        wait_until(lambda: not any(exists(pid) for pid in pids), "services end with their parent")
    finally:
        os.kill(heir, signal.SIGKILL)
    assert not kafka.exists()
    assert not redis.exists()
    assert (kept / "appendonly.aof").exists()  # a directory that was given stays


@pytest.mark.live
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of the death")
def test_a_service_dies_with_its_supervisor() -> None:
    with Redis() as server:
        pid = server.pid
        os.kill(server.supervisor_pid, signal.SIGKILL)
        wait_until(lambda: not exists(pid), "Redis ends with its supervisor")
        assert not server.running


@pytest.mark.parametrize("service", [Kafka, Redis])
def test_a_taken_port_is_named(service: type[Kafka] | type[Redis]) -> None:
    port = free_port()
    with socket.socket() as other:
        other.bind((services.HOST, port))
        other.listen()
        taken = service(port=port)
        with pytest.raises(ServiceError, match=f"port 127.0.0.1:{port} is taken"):
            taken.start()
        taken.close()
    assert not taken.directory.exists()


def test_a_port_that_was_given_is_given_to_no_other_process() -> None:
    """Nothing listens on it yet when another process asks, such as tests side by side do."""
    port = free_port()
    script = (
        "from pipeline import services\n"
        f"services.PORTS = range({port}, {port + 1})\n"
        "try:\n    print(services.free_port())\n"
        "except services.ServiceError as error:\n    print(error)\n"
    )
    asked = [sys.executable, "-c", script]
    found = subprocess.run(asked, capture_output=True, text=True, check=True)

    assert found.stdout.startswith("no port from")


def test_a_missing_java_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"there is no Java at .*/java; install"):
        Kafka(directory=tmp_path, java=tmp_path / "java").start()


@pytest.mark.live
def test_a_java_that_does_not_run_ends_the_start_at_once(tmp_path: Path) -> None:
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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much memory is left")
def test_too_little_memory_is_told_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"Kafka needs 100000300 MB .* \d+ MB are available"):
        Kafka(directory=tmp_path, heap_mb=100_000_000).start()


@pytest.mark.live
def test_a_service_that_dies_at_its_start_shows_the_end_of_its_log() -> None:
    broken = Redis(options={"maxmemory": "plenty"})
    with pytest.raises(ServiceError, match=r"Redis is not running(.|\n)*maxmemory"), broken:
        pass
    assert not broken.directory.exists()


@pytest.mark.live
def test_a_start_takes_no_longer_than_its_limit() -> None:
    slow = Kafka(startup_timeout_seconds=0.1)
    with pytest.raises(ServiceError, match=r"did not answer within 0\.1 s"), slow:
        pass
    assert not slow.running


def test_what_has_an_address_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    broker, store = "broker.example:9092", "redis://redis.example/0"
    with embedded(kafka_bootstrap_servers=broker, redis_url=store) as given:
        assert given.kafka is None
        assert given.redis is None
        for name, address in given.environment().items():
            monkeypatch.setenv(name, address)
        settings = load_settings()
    assert settings.kafka_bootstrap_servers == broker
    assert settings.redis_url == store


@contextmanager
def maven_mirror(tampered: str = "") -> Iterator[tuple[str, list[str]]]:
    """A Maven repository of the cached jars on this machine: its address and the paths asked for.

    Args:
        tampered: a jar that has one byte more here.
    """
    jars = jar_directory()
    asked: list[str] = []

    class Mirror(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            jar = jars / Path(self.path).name
            known = jar.is_file()
            body = jar.read_bytes() if known else b""
            if jar.name == tampered:
                body += b"\0"
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer((services.HOST, 0), Mirror) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://{services.HOST}:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def fetch_environment(tmp_path: Path, mirror: str) -> dict[str, str]:
    """Environment of a run that has an empty cache and fetches from ``mirror``."""
    settings = tmp_path / "jgo.conf"
    settings.write_text(f"[repositories]\ncentral = {mirror}\n")
    cache = tmp_path / "cache"
    return {"JGO_CONFIG_FILE": str(settings), "XDG_CACHE_HOME": str(cache), "NO_PROXY": "*"}


def test_two_runs_fetch_the_jars_once_and_say_how_far_they_are(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from pipeline import kafka_jars as k; k.jar_directory()"]
    with maven_mirror() as (mirror, asked):
        environment = os.environ | fetch_environment(tmp_path, mirror)
        runs = [
            subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]
        outputs = [run.communicate(timeout=60)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    number = sum(len(artifacts.split()) for artifacts in JARS.values())
    assert len([path for path in asked if path.endswith(".jar")]) == number
    assert f"{number} of {number} jars" in outputs[0] + outputs[1]
    assert sorted(path.name for path in (tmp_path / "cache" / "recur").iterdir()) == [
        jar_directory().name,
        f"{jar_directory().name}.lock",
    ]


def test_jars_other_than_the_pinned_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with maven_mirror(tampered="jspecify-1.0.0.jar") as (mirror, _):
        for name, value in fetch_environment(tmp_path, mirror).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ServiceError, match="their SHA-256 is"):
            jar_directory(tmp_path / "fetched")
    assert not list((tmp_path / "fetched").glob("*jars"))


def test_a_repository_out_of_reach_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = f"http://{services.HOST}:{free_port()}"
    for name, value in fetch_environment(tmp_path, nowhere).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ServiceError, match=r"cannot be fetched .* check the network"):
        jar_directory(tmp_path / "fetched")


def test_a_cache_that_lost_a_jar_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = jar_directory()
    incomplete = tmp_path / "fetched" / cached.name
    shutil.copytree(cached, incomplete, ignore=shutil.ignore_patterns("kafka-clients*"))
    with maven_mirror() as (mirror, _):
        for name, value in fetch_environment(tmp_path, mirror).items():
            monkeypatch.setenv(name, value)
        assert jar_directory(tmp_path / "fetched") == incomplete
    assert {jar.name for jar in incomplete.iterdir()} == {jar.name for jar in cached.iterdir()}
