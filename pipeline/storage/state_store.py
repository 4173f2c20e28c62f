"""Where account states live: Redis or Redis Cluster.

One guard per partition: a partition's states and its watermark are read in one command and
written in one script, and written only if the watermark is still the expected one. So at
any moment a partition's states are exactly its log up to its watermark, whoever writes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol

from pipeline.settings import Settings
from pipeline.storage.client import Command, RedisClient, Script
from pipeline.storage.client import StoreUnavailableError as StoreUnavailableError
from pipeline.storage.client import redis_client as redis_client
from pipeline.storage.keys import Keys
from pipeline.storage.servers import Server, servers
from pipeline.units import DAY_MS

# KEYS: watermark, then states. ARGV: expected watermark ("" for none), new watermark,
# time to live in milliseconds, then states ("" deletes). Returns the watermark that stands
# afterwards.
SAVE_SCRIPT = Script(b"""
local current = redis.call('GET', KEYS[1]) or ''
if current ~= ARGV[1] then return current end
for i = 2, #KEYS do
  if ARGV[i + 2] == '' then redis.call('DEL', KEYS[i])
  else redis.call('SET', KEYS[i], ARGV[i + 2], 'PX', ARGV[3]) end
end
redis.call('SET', KEYS[1], ARGV[2])
return ARGV[2]
""")


@dataclass(frozen=True)
class Load:
    """A request for a partition's watermark and states of accounts in it."""

    partition: int
    account_ids: list[str]


@dataclass(frozen=True)
class LoadResult:
    """What was there; None where nothing was."""

    watermark: bytes | None
    states: list[bytes | None]


@dataclass(frozen=True)
class Save:
    """A request to write states and the new watermark, if ``expected`` still stands.

    A state that is None is deleted. An account may stand there again: what comes last counts.
    """

    partition: int
    expected: bytes | None
    watermark: bytes
    account_ids: list[str]
    states: Sequence[bytes | None]


class Intactness(Protocol):
    """Whether what the store does not have was never there."""

    async def require(self, *, absent: bool) -> None:
        """Return if nothing is known to be lost.

        Args:
            absent: something is not there; ask the servers whether they evicted anything.

        Raises:
            StoreUnavailableError: something is lost, and not repaired yet; ask again.
        """


class StateStore(Protocol):
    """What the processor needs of a store."""

    async def load(self, requests: Sequence[Load]) -> list[LoadResult]:
        """Read each request's watermark and states, together.

        Raises:
            StoreUnavailableError: nothing can be said; ask again.
        """

    async def save(self, requests: Sequence[Save]) -> list[bool]:
        """Write each request whole, or nothing of it where the watermark is another.

        Returns:
            for each request, whether what it asked stands now. A repeated request whose
            first answer was lost is true, too.

        Raises:
            StoreUnavailableError: nothing can be said; ask again with the same requests.
        """

    def accounts(self, partition: int | None = None) -> AsyncIterator[list[tuple[int, str]]]:
        """Partition and account id of every state that there is, of one partition or of all.

        Raises:
            StoreUnavailableError: nothing can be said; ask again.
        """

    async def ping(self) -> None:
        """Return if the store answers.

        Raises:
            StoreUnavailableError: it does not.
        """

    async def close(self) -> None:
        """Give connections back."""


class RedisStateStore:
    """States in one Redis or a Redis Cluster.

    Args:
        client: a connected client that returns bytes.
        keys: names the keys.
        expiry_ms: how long Redis keeps an unused state: the state's time to live plus the
            log's retention, so that replay decides the same as the worker did.

    Attributes:
        intactness: asked before a load is believed; None believes all.
    """

    def __init__(self, client: Any, keys: Keys, expiry_ms: int) -> None:
        self.intactness: Intactness | None = None
        self._calls = RedisClient(client, SAVE_SCRIPT)
        self._keys = keys
        self._expiry = str(expiry_ms).encode()

    @classmethod
    def from_settings(cls, settings: Settings, model: str) -> RedisStateStore:
        """A store for the model with this digest; connects at the first call."""
        expiry_ms = int((settings.state_ttl_days + settings.log_retention_days) * DAY_MS)
        keys = Keys(settings.redis_key_prefix, model, settings.topic("transactions"))
        return cls(redis_client(settings), keys, expiry_ms)

    async def load(self, requests: Sequence[Load]) -> list[LoadResult]:
        """See :class:`StateStore`: one MGET, on a cluster one for each partition.

        Where something is absent, :attr:`intactness` is asked whether it was evicted.
        """
        found = await self.load_as_it_is(requests)
        if self.intactness is not None:
            absent = any(one.watermark is None or None in one.states for one in found)
            await self.intactness.require(absent=absent)
        return found

    async def load_as_it_is(self, requests: Sequence[Load]) -> list[LoadResult]:
        """Load without asking whether anything is lost: for the repair itself."""
        keys = self._keys
        wanted = [
            [
                keys.watermark(request.partition),
                *keys.accounts(request.partition, request.account_ids),
            ]
            for request in requests
        ]
        if self._calls.is_cluster and wanted:
            replies = await self._calls.execute([("MGET", *part) for part in wanted])
        elif wanted:
            (values,) = await self._calls.execute([("MGET", *chain.from_iterable(wanted))])
            flat = iter(values)
            replies = [list(islice(flat, len(part))) for part in wanted]
        else:
            replies = []
        return [LoadResult(reply[0], reply[1:]) for reply in replies]

    async def save(self, requests: Sequence[Save]) -> list[bool]:
        """See :class:`StateStore`: one script call for each partition."""
        replies = await self._calls.execute([self._save(request) for request in requests])
        return [
            reply == request.watermark for reply, request in zip(replies, requests, strict=True)
        ]

    def _save(self, request: Save) -> Command:
        keys = self._keys
        return SAVE_SCRIPT.call(
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
        await self._calls.ask("PING")

    async def servers(self) -> list[Server]:
        """The Redis, or each primary of the cluster, as it describes itself.

        Raises:
            StoreUnavailableError: one does not answer.
        """
        return await servers(self._calls)

    async def watermarks(self, partitions: int) -> dict[int, bytes]:
        """Watermarks that there are, by partition.

        Raises:
            StoreUnavailableError: it does not answer.
        """
        requests = [Load(partition, []) for partition in range(partitions)]
        replies = await self.load_as_it_is(requests)
        return {
            partition: reply.watermark
            for partition, reply in enumerate(replies)
            if reply.watermark is not None
        }

    async def accounts(self, partition: int | None = None) -> AsyncIterator[list[tuple[int, str]]]:
        """Partition and account id of every state that there is, some at a time.

        A state that is written meanwhile may be among them or not.

        Raises:
            StoreUnavailableError: it does not answer.
            StoreForbiddenError: Redis does not allow its user to list keys.
        """
        async for keys in self._calls.scan(self._keys.accounts_pattern(partition)):
            yield [place for key in keys if (place := self._keys.account_of(key)) is not None]

    async def close(self) -> None:
        """See :class:`StateStore`."""
        await self._calls.close()
