"""Switches of endpoints in Redis: paused by hand, or disabled because the endpoint answered 410.

They are one small value for each endpoint. A Redis that loses them loses no alert: a paused
endpoint goes on, and one that is gone answers 410 again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pipeline.settings import Settings
from pipeline.storage.client import RedisClient, redis_client
from pipeline.storage.servers import RedisServer, servers

Switch = Literal["paused", "gone"]
_SWITCHES: dict[bytes, Switch] = {b"paused": "paused", b"gone": "gone"}


class Switches:
    """The switches of all endpoints.

    Args:
        client: the Redis.
        prefix: begin of every key.
    """

    def __init__(self, client: RedisClient, prefix: str) -> None:
        self._client = client
        self._prefix = prefix

    @classmethod
    def from_settings(cls, settings: Settings) -> Switches:
        """Connect to the Redis of the settings on first use."""
        return cls(RedisClient(redis_client(settings)), settings.redis_key_prefix)

    def key(self, endpoint: str) -> bytes:
        """Return an endpoint's key. The braces put all of them into one slot of a cluster."""
        return f"{self._prefix}:{{webhooks}}:{endpoint}".encode()

    async def read(self, endpoints: Sequence[str]) -> dict[str, Switch]:
        """Read the switches that are set, by endpoint.

        Raises:
            StoreUnavailableError: Redis does not answer.
            StoreForbiddenError: Redis forbids it.
        """
        if not endpoints:
            return {}
        (values,) = await self._client.execute([("MGET", *map(self.key, endpoints))])
        return {
            name: _SWITCHES[value]
            for name, value in zip(endpoints, values, strict=True)
            if value in _SWITCHES
        }

    async def set(self, endpoint: str, switch: Switch) -> None:
        """Set an endpoint's switch.

        Raises:
            StoreUnavailableError, StoreForbiddenError: see :meth:`read`.
        """
        await self._client.execute([("SET", self.key(endpoint), switch)])

    async def clear(self, endpoint: str) -> None:
        """Remove an endpoint's switch.

        Raises:
            StoreUnavailableError, StoreForbiddenError: see :meth:`read`.
        """
        await self._client.execute([("DEL", self.key(endpoint))])

    async def servers(self) -> list[RedisServer]:
        """Describe the Redis, or each primary of the cluster.

        Raises:
            StoreUnavailableError, StoreForbiddenError: see :meth:`read`.
        """
        return await servers(self._client)

    async def check_access(self) -> None:
        """Run each command once, on the key of no endpoint: nothing is written.

        Raises:
            StoreUnavailableError, StoreForbiddenError: see :meth:`read`.
        """
        key = self.key("")
        for command in (("MGET", key), ("SET", key, "paused", "XX"), ("DEL", key)):
            await self._client.execute([command])

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()
