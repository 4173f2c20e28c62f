"""A real Sentinel over a Redis and its replica, for tests of failover."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis as redis_client

from pipeline.local.ports import HOST, free_port
from pipeline.local.redis import REDIS_MB, Redis, redis_server_path
from pipeline.local.service import Service

MASTER = "mymaster"
FAILOVER_LIMIT_SECONDS = 60.0


class Sentinel(Service):
    """A single Sentinel, with a quorum of one.

    Args:
        master: the first primary.
        password: password of its clients, or None.
    """

    name = "Sentinel"

    def __init__(self, master: Redis, password: str | None = None) -> None:
        port = free_port()
        super().__init__(None, (port,), FAILOVER_LIMIT_SECONDS)
        self.port = port
        self._master = master
        self._password = password
        self.url = f"redis+sentinel://{HOST}:{port}/{MASTER}/0"

    def client(self) -> redis_client.Redis:
        """Make a client of this Sentinel; the caller closes it."""
        return redis_client.Redis(
            host=HOST, port=self.port, password=self._password, decode_responses=True
        )

    def master_port(self) -> int:
        """Return the port of the current primary."""
        with self.client() as client:
            _, port = client.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", MASTER)
            return int(port)

    def _memory_mb(self) -> int:
        return REDIS_MB

    def _command(self) -> list[str]:
        conf = Path(self.directory) / "sentinel.conf"
        lines = [
            f"port {self.port}",
            f"bind {HOST}",
            f"sentinel monitor {MASTER} {HOST} {self._master.port} 1",
            f"sentinel down-after-milliseconds {MASTER} 1000",
            f"sentinel failover-timeout {MASTER} 5000",
        ]
        if self._password:
            lines.append(f"requirepass {self._password}")
        conf.write_text("\n".join(lines) + "\n")
        return [redis_server_path(), str(conf), "--sentinel"]

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis_client.RedisError:
            return False


@contextmanager
def under_sentinel(password: str | None = None) -> Iterator[tuple[Sentinel, Redis, Redis]]:
    """Start a primary, its replica and a Sentinel over both."""
    with (
        Redis() as primary,
        Redis(options={"replicaof": f"{HOST} {primary.port}"}) as replica,
        Sentinel(primary, password) as sentinel,
    ):
        _until(lambda: replica.replication()["master_link_status"] == "up")
        _until(lambda: _replicas(sentinel) == 1)
        yield sentinel, primary, replica


def until_failed_over(sentinel: Sentinel, replica: Redis) -> None:
    """Return once the replica is the primary, and Sentinel says so."""
    _until(
        lambda: sentinel.master_port() == replica.port and replica.replication()["role"] == "master"
    )


def _replicas(sentinel: Sentinel) -> int:
    with sentinel.client() as client:
        return len(client.execute_command("SENTINEL REPLICAS", MASTER))


def _until(condition: object) -> None:
    deadline = time.monotonic() + FAILOVER_LIMIT_SECONDS
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "Sentinel does not do what it is to do"
        time.sleep(0.05)
