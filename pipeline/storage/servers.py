"""State of the Redis servers (INFO): may evict, has evicted, is full, is read-only."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from redis.asyncio.cluster import RedisCluster

from pipeline.settings import Settings
from pipeline.storage.client import RedisClient, StoreUnavailableError, redis_client

NO_EVICTION = "noeviction"
"""The one ``maxmemory-policy`` with which Redis deletes no states to make room."""


@dataclass(frozen=True)
class Server:
    """A Redis, or a primary of a Redis Cluster, as INFO describes it.

    A managed Redis, or a proxy before it, may leave any of this out: None then.

    Attributes:
        name: ``host:port`` of a cluster's primary; empty for a Redis that is alone.
        run_id: another one after each start.
        policy: its ``maxmemory-policy``.
        evicted: keys that it evicted since its start.
        is_full: at its ``maxmemory`` and without a right to evict, so that it refuses writes.
        is_replica: it follows another server, and refuses writes.
        is_of_cluster: it is a node of a Redis Cluster.
        is_sentinel: it is no Redis with data, but a Sentinel.
    """

    name: str = ""
    run_id: str = ""
    policy: str | None = None
    evicted: int | None = None
    is_full: bool = False
    is_replica: bool = False
    is_of_cluster: bool = False
    is_sentinel: bool = False

    @property
    def may_evict(self) -> bool:
        """Whether it deletes states where it needs room."""
        return self.policy not in (None, NO_EVICTION)


async def servers(calls: RedisClient) -> list[Server]:
    """Describe the Redis, or each primary of the cluster, now.

    Raises:
        StoreUnavailableError: one does not answer.
        StoreForbiddenError: Redis does not allow INFO.
    """
    return [server_of(name, info) for name, info in (await _infos(calls)).items()]


async def evicted_keys(calls: RedisClient) -> dict[str, int]:
    """Count the keys that each server evicted since its start, by the server's name.

    Raises:
        StoreUnavailableError, StoreForbiddenError: as :func:`servers`.
    """
    infos = await _infos(calls, "stats")
    return {name: int(info["evicted_keys"]) for name, info in infos.items()
            if "evicted_keys" in info}  # fmt: skip


async def _infos(calls: RedisClient, *sections: str) -> dict[str, Mapping[str, Any]]:
    if not calls.is_cluster:
        return {"": await calls.ask("INFO", *sections)}
    reply = await calls.ask("INFO", *sections, target_nodes=RedisCluster.PRIMARIES)
    if any(isinstance(value, Mapping) for value in reply.values()):
        return {str(name): info for name, info in reply.items()}
    return {"": reply}  # a cluster with one primary


def server_of(name: str, info: Mapping[str, Any]) -> Server:
    """Read a reply of INFO.

    >>> server_of("", {"maxmemory_policy": "allkeys-lru", "evicted_keys": 7}).may_evict
    True
    """
    policy = info.get("maxmemory_policy")
    most = int(info.get("maxmemory", 0))
    used = int(info.get("used_memory", 0)) - int(info.get("mem_not_counted_for_evict", 0))
    evicted = info.get("evicted_keys")
    return Server(
        name=name,
        run_id=str(info.get("run_id", "")),
        policy=None if policy is None else str(policy),
        evicted=None if evicted is None else int(evicted),
        is_full=policy == NO_EVICTION and 0 < most < used,
        is_replica=info.get("role") == "slave",
        is_of_cluster=bool(int(info.get("cluster_enabled", 0))),
        is_sentinel=info.get("redis_mode") == "sentinel",
    )


async def unreachable_nodes(settings: Settings) -> list[str]:
    """List the primaries that a Redis Cluster announces and that do not answer, ``host:port``.

    Empty where all answer, where none of the cluster's nodes does, and where there is no cluster.
    """
    if not settings.redis_cluster:
        return []
    calls = RedisClient(redis_client(settings.model_copy(update={"redis_cluster": False})))
    try:
        slots = await calls.ask("CLUSTER SLOTS")
    except StoreUnavailableError:
        return []
    finally:
        await calls.close()
    # Each range of slots is its first and last slot, its primary, and then its replicas.
    primaries = sorted({(_text(slot[2][0]), int(slot[2][1])) for slot in slots})
    # An empty host stands for the one that was asked.
    places = [(host, port) for host, port in primaries if host]
    answer = await asyncio.gather(
        *(_answers(host, port, settings.redis_timeout_seconds) for host, port in places)
    )
    return [f"{host}:{port}" for (host, port), up in zip(places, answer, strict=True) if not up]


def _text(value: str | bytes | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""


async def _answers(host: str, port: int, timeout_seconds: float) -> bool:
    """Whether something takes a connection there."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), timeout_seconds)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
