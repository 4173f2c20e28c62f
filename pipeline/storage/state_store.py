"""Store of account states in Redis or Redis Cluster.

Every write is conditional. One command reads a partition's states with its watermark. One script
writes them, and only if the watermark is still the expected one. So a partition's states are
exactly its log up to its watermark at any moment, whichever worker writes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol

from model.units import DAY_MS
from pipeline.settings import Settings
from pipeline.storage.client import RedisClient
from pipeline.storage.client import StoreUnavailableError as StoreUnavailableError
from pipeline.storage.client import redis_client as redis_client
from pipeline.storage.keys import Keys
from pipeline.storage.script import Command, load_script
from pipeline.storage.servers import RedisServer, servers

_SAVE_STATES = load_script("save_states")


@dataclass(frozen=True)
class Load:
    """A request for a partition's watermark and states of accounts in it."""

    partition: int
    account_ids: list[str]


@dataclass(frozen=True)
class LoadResult:
    """The loaded values; None for a missing one."""

    watermark: bytes | None
    states: list[bytes | None]


@dataclass(frozen=True)
class Save:
    """A request to write states and the new watermark, if ``expected`` still stands.

    A state of None is deleted. An account may appear twice: the last one counts.
    """

    partition: int
    expected: bytes | None
    watermark: bytes
    account_ids: list[str]
    states: Sequence[bytes | None]


class LossCheck(Protocol):
    """Interface of a check that Redis lost no keys."""

    async def require_no_loss(self, *, absent: bool) -> None:
        """Return if no loss is known.

        Args:
            absent: a key is missing; ask the servers whether they evicted any.

        Raises:
            StoreUnavailableError: keys are lost and not repaired yet; call again.
        """


class StateStore(Protocol):
    """Interface of a store of account states."""

    async def load(self, requests: Sequence[Load]) -> list[LoadResult]:
        """Read each request's watermark and states, together.

        Raises:
            StoreUnavailableError: the store does not answer; call again.
        """

    async def save(self, requests: Sequence[Save]) -> list[bool]:
        """Write each request completely, or nothing of it if its watermark is not the expected one.

        Returns:
            for each request, whether its values stand now. A repeated request whose first
            answer was lost is true, too.

        Raises:
            StoreUnavailableError: the store does not answer; call again with the same requests.
        """

    def accounts(self, partition: int | None = None) -> AsyncIterator[list[tuple[int, str]]]:
        """Yield partition and account id of every state, of one partition or all.

        Raises:
            StoreUnavailableError: the store does not answer; call again.
        """

    async def ping(self) -> None:
        """Return if the store answers.

        Raises:
            StoreUnavailableError: the store does not answer.
        """

    async def close(self) -> None:
        """Close the connections."""


class RedisStateStore:
    """Store of states in one Redis or a Redis Cluster.

    Args:
        client: a connected client that returns bytes.
        keys: names the keys.
        expiry_ms: how long Redis keeps an unused state: the state's time to live plus the
            log's retention, so that a replay decides as the worker did.

    Attributes:
        loss_check: called before the result of a load is trusted; None trusts all.
    """

    def __init__(self, client: Any, keys: Keys, expiry_ms: int) -> None:
        self.loss_check: LossCheck | None = None
        self._redis = RedisClient(client, _SAVE_STATES)
        self._keys = keys
        self._expiry = str(expiry_ms).encode()

    @classmethod
    def from_settings(cls, settings: Settings, model: str) -> RedisStateStore:
        """Make a store for the model with this digest; it connects at the first call."""
        expiry_ms = int((settings.state_ttl_days + settings.log_retention_days) * DAY_MS)
        keys = Keys(settings.redis_key_prefix, model, settings.topic("transactions"))
        return cls(redis_client(settings), keys, expiry_ms)

    async def load(self, requests: Sequence[Load]) -> list[LoadResult]:
        """See :class:`StateStore`: it takes one MGET, on a cluster one for each partition.

        If a key is missing, :attr:`loss_check` finds out whether it was evicted.
        """
        found = await self.load_unchecked(requests)
        if self.loss_check is not None:
            absent = any(one.watermark is None or None in one.states for one in found)
            await self.loss_check.require_no_loss(absent=absent)
        return found

    async def load_unchecked(self, requests: Sequence[Load]) -> list[LoadResult]:
        """Load without the loss check, for the repair itself."""
        keys = self._keys
        wanted = [
            [
                keys.watermark(request.partition),
                *keys.accounts(request.partition, request.account_ids),
            ]
            for request in requests
        ]
        if self._redis.is_cluster and wanted:
            replies = await self._redis.execute([("MGET", *part) for part in wanted])
        elif wanted:
            (values,) = await self._redis.execute([("MGET", *chain.from_iterable(wanted))])
            flat = iter(values)
            replies = [list(islice(flat, len(part))) for part in wanted]
        else:
            replies = []
        return [LoadResult(reply[0], reply[1:]) for reply in replies]

    async def save(self, requests: Sequence[Save]) -> list[bool]:
        """See :class:`StateStore`: it takes one script call for each partition."""
        replies = await self._redis.execute([self._save(request) for request in requests])
        return [
            reply == request.watermark for reply, request in zip(replies, requests, strict=True)
        ]

    def _save(self, request: Save) -> Command:
        keys = self._keys
        return _SAVE_STATES.call(
            [
                keys.watermark(request.partition),
                *keys.accounts(request.partition, request.account_ids),
            ],
            request.expected or b"",
            request.watermark,
            self._expiry,
            *(state or b"" for state in request.states),
        )

    async def ping(self) -> None:
        """See :class:`StateStore`."""
        await self._redis.ask("PING")

    async def servers(self) -> list[RedisServer]:
        """Describe the Redis, or each primary of the cluster.

        Raises:
            StoreUnavailableError: a server does not answer.
        """
        return await servers(self._redis)

    async def watermarks(self, partitions: int) -> dict[int, bytes]:
        """Load the existing watermarks, by partition.

        Raises:
            StoreUnavailableError: Redis does not answer.
        """
        requests = [Load(partition, []) for partition in range(partitions)]
        replies = await self.load_unchecked(requests)
        return {
            partition: reply.watermark
            for partition, reply in enumerate(replies)
            if reply.watermark is not None
        }

    async def accounts(self, partition: int | None = None) -> AsyncIterator[list[tuple[int, str]]]:
        """Yield partition and account id of every state, some at a time.

        It may miss a state that is written meanwhile.

        Raises:
            StoreUnavailableError: Redis does not answer.
            StoreForbiddenError: Redis forbids its user to list keys.
        """
        async for keys in self._redis.scan(self._keys.accounts_pattern(partition)):
            yield [place for key in keys if (place := self._keys.account_of(key)) is not None]

    async def close(self) -> None:
        """See :class:`StateStore`."""
        await self._redis.close()
