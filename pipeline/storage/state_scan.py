"""Search for states by their keys, for commands that visit all states.

A SCAN visits every key of the Redis in steps, so that Redis serves others in between. It finds
each key that exists from start to end. It may miss a key that is written meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType

from pipeline.settings import Settings
from pipeline.storage.account_state import STATE_FORMAT
from pipeline.storage.client import RedisClient, redis_client
from pipeline.storage.keys import Keys
from pipeline.storage.script import load_script

STATES_PER_CALL = 500
"""Accounts that one step yields."""

_SWEEP_STATES = load_script("sweep_states")


@dataclass(frozen=True)
class StateCopy:
    """A state of an account, found by its key.

    Attributes:
        expires_ms: remaining time to live, milliseconds; None: no expiry.
    """

    model: str
    partition: int
    size_bytes: int
    expires_ms: int | None


class StateScan:
    """Search in the keys of one Redis or Redis Cluster, as an async context manager.

    Args:
        settings: name the Redis, the key prefix and the transactions topic.

    Raises:
        StoreUnavailableError: any call may raise it: Redis does not answer.
    """

    def __init__(self, settings: Settings) -> None:
        self._prefix = settings.redis_key_prefix
        self._topic = settings.topic("transactions")
        self._redis = RedisClient(redis_client(settings))
        head, topic = re.escape(self._prefix), re.escape(self._topic)
        self._state = re.compile(rf"{head}:([0-9a-f]+):\{{{topic}-(\d+)\}}:(.*)", re.DOTALL)

    async def __aenter__(self) -> StateScan:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._redis.close()

    async def copies(self, account_id: str) -> list[StateCopy]:
        """Find the account's states of all models in all partitions."""
        found = []
        async with aclosing(self._matching("*", account_id)) as states:
            async for model, partition, _ in states:
                (key,) = self._keys(model).accounts(partition, [account_id])
                size, expires = await self._redis.execute([("STRLEN", key), ("PTTL", key)])
                if size:
                    left = int(expires) if expires >= 0 else None
                    found.append(StateCopy(model, partition, int(size), left))
        return sorted(found, key=lambda copy: (copy.model, copy.partition))

    async def accounts(
        self, model: str, partition: int | None = None
    ) -> AsyncGenerator[tuple[int, list[str]]]:
        """Yield accounts that have a state of a model, some at a time, with their partition.

        An account may appear twice.
        """
        waiting: dict[int, list[str]] = {}
        async with aclosing(self._matching(model, None, partition)) as states:
            async for _, place, account_id in states:
                accounts = waiting.setdefault(place, [])
                accounts.append(account_id)
                if len(accounts) == STATES_PER_CALL:
                    yield place, waiting.pop(place)
        for place, accounts in waiting.items():
            yield place, accounts

    async def sweep(self, model: str, partition: int, account_ids: Sequence[str]) -> int:
        """Delete those of the accounts' states that lie past the partition's watermark.

        No result changes, because such states count as absent. The watermark must exist.

        Returns:
            how many states it deleted.
        """
        keys = self._keys(model)
        names = [keys.watermark(partition), *keys.accounts(partition, list(account_ids))]
        (swept,) = await self._redis.execute([_SWEEP_STATES.call(names, b"%d" % STATE_FORMAT)])
        return int(swept)

    async def copy(self, model: str, source: int, target: int, states: Mapping[str, bytes]) -> None:
        """Write accounts' states into another partition, with the same expiry."""
        if not states:
            return
        keys, accounts = self._keys(model), list(states)
        left = await self._redis.execute([("PTTL", key) for key in keys.accounts(source, accounts)])
        await self._redis.execute(
            [
                ("SET", key, value, *(("PX", b"%d" % ms) if ms > 0 else ()))
                for key, value, ms in zip(
                    keys.accounts(target, accounts), states.values(), left, strict=True
                )
            ]
        )

    async def delete(self, model: str, partition: int, account_ids: list[str]) -> None:
        """Delete accounts' states in a partition."""
        if account_ids:
            await self._redis.execute(
                [("DEL", *self._keys(model).accounts(partition, account_ids))]
            )

    def _keys(self, model: str) -> Keys:
        return Keys(self._prefix, model, self._topic)

    async def _matching(
        self, model: str, account_id: str | None, partition: int | None = None
    ) -> AsyncGenerator[tuple[str, int, str]]:
        """Yield model, partition and account of each matching key."""
        place = "*" if partition is None else str(partition)
        account = "*" if account_id is None else re.sub(r"([][*?\\^-])", r"\\\1", account_id)
        pattern = f"{self._prefix}:{model}:{{{self._topic}-{place}}}:{account}"
        async for keys in self._redis.scan(pattern):
            for key in keys:
                name = self._state.fullmatch(key.decode(errors="replace"))
                if name is not None and account_id in (None, name[3]):
                    yield name[1], int(name[2]), name[3]
