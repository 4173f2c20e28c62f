"""State of the Redis servers, as INFO reports it: eviction, memory, role."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from redis.asyncio.cluster import RedisCluster

from pipeline.settings import Settings
from pipeline.storage.client import RedisClient, StoreUnavailableError, redis_client

_EVICTED_KEYS = re.compile(rb"^evicted_keys:(\d+)", re.MULTILINE)

NO_EVICTION = "noeviction"
"""The only ``maxmemory-policy`` that never deletes states to make room."""


@dataclass(frozen=True)
class RedisServer:
    """A Redis, or a primary of a Redis Cluster, as INFO describes it.

    A managed Redis or a proxy may omit a field: then it is None or its default.

    Attributes:
        name: ``host:port`` of a cluster's primary; empty for a single Redis.
        run_id: id that changes with each start.
        policy: its ``maxmemory-policy``.
        evicted: number of keys evicted since its start.
        is_full: it reached ``maxmemory`` and may not evict, so it rejects writes.
        is_replica: it follows another server and rejects writes.
        is_of_cluster: it is a node of a Redis Cluster.
        is_sentinel: it is a Sentinel, not a Redis with data.
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
        """Whether it deletes states when it needs memory."""
        return self.policy not in (None, NO_EVICTION)


async def servers(client: RedisClient) -> list[RedisServer]:
    """Describe the Redis, or each primary of the cluster.

    Raises:
        StoreUnavailableError: a server does not answer.
        StoreForbiddenError: Redis forbids INFO.
    """
    return [server_of(name, info) for name, info in (await _infos(client)).items()]


async def evicted_keys(client: RedisClient) -> dict[str, int]:
    """Count the keys that each server evicted since its start, by server name.

    Raises:
        StoreUnavailableError, StoreForbiddenError: see :func:`servers`.
    """
    if not client.is_cluster:  # workers ask this often: read one number, not fifty
        (stats,) = await client.execute([("INFO", "stats")])
        found = _EVICTED_KEYS.search(stats)
        return {} if found is None else {"": int(found[1])}
    infos = await _infos(client, "stats")
    return {name: int(info["evicted_keys"]) for name, info in infos.items()
            if "evicted_keys" in info}  # fmt: skip


async def _infos(client: RedisClient, *sections: str) -> dict[str, Mapping[str, Any]]:
    if not client.is_cluster:
        return {"": await client.ask("INFO", *sections)}
    reply = await client.ask("INFO", *sections, target_nodes=RedisCluster.PRIMARIES)
    if any(isinstance(value, Mapping) for value in reply.values()):
        return {str(name): info for name, info in reply.items()}
    return {"": reply}  # a cluster with one primary


def server_of(name: str, info: Mapping[str, Any]) -> RedisServer:
    """Read a reply of INFO.

    >>> server_of("", {"maxmemory_policy": "allkeys-lru", "evicted_keys": 7}).may_evict
    True
    """
    policy = info.get("maxmemory_policy")
    most = int(info.get("maxmemory", 0))
    used = int(info.get("used_memory", 0)) - int(info.get("mem_not_counted_for_evict", 0))
    evicted = info.get("evicted_keys")
    return RedisServer(
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
    """List the announced primaries of a Redis Cluster that do not answer, as ``host:port``.

    The list is empty if all answer, if no node of the cluster answers, or without a cluster.
    """
    if not settings.redis_cluster:
        return []
    client = RedisClient(redis_client(settings.model_copy(update={"redis_cluster": False})))
    try:
        slots = await client.ask("CLUSTER SLOTS")
    except StoreUnavailableError:
        return []
    finally:
        await client.close()
    # Each range of slots is its first and last slot, its primary, and then its replicas.
    primaries = sorted({(_text(slot[2][0]), int(slot[2][1])) for slot in slots})
    # An empty host stands for the node that was asked.
    places = [(host, port) for host, port in primaries if host]
    answer = await asyncio.gather(
        *(_answers(host, port, settings.redis_timeout_seconds) for host, port in places)
    )
    return [f"{host}:{port}" for (host, port), up in zip(places, answer, strict=True) if not up]


def _text(value: str | bytes | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""


async def _answers(host: str, port: int, timeout_seconds: float) -> bool:
    """Return whether a server accepts connections at an address."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), timeout_seconds)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
