"""Finds states by their keys, for commands that look at all of them.

A SCAN walks every key of the Redis, some at a time, and others get their turn between
them. What is written meanwhile may be found or not; what stands all the while is found.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType

from pipeline.settings import Settings
from pipeline.storage.account_state import STATE_FORMAT
from pipeline.storage.client import RedisClient, Script, redis_client
from pipeline.storage.keys import Keys

STATES_PER_CALL = 500

# KEYS: watermark, then states. ARGV: the state's format. Deletes the states that lie past the
# watermark, and those that nobody can read: both count as absent. Returns how many.
SWEEP_SCRIPT = Script(b"""
local next_offset = struct.unpack('<i8', redis.call('GET', KEYS[1]), 9)
local swept = 0
for i = 2, #KEYS do
  local head = redis.call('GETRANGE', KEYS[i], 0, 23)
  if #head < 24 or string.byte(head) ~= tonumber(ARGV[1])
      or struct.unpack('<i8', head, 17) >= next_offset then
    swept = swept + redis.call('DEL', KEYS[i])
  end
end
return swept
""")


@dataclass(frozen=True)
class Copy:
    """A state of an account.

    Attributes:
        expires_ms: Redis deletes it after so long, milliseconds; None: never.
    """

    model: str
    partition: int
    size_bytes: int
    expires_ms: int | None


class StateScan:
    """Looks at the keys of one Redis or Redis Cluster; use as an async context manager.

    Args:
        settings: name the Redis, the key prefix and the transactions topic.

    Raises:
        StoreUnavailableError: from every call: Redis does not answer.
    """

    def __init__(self, settings: Settings) -> None:
        self._prefix = settings.redis_key_prefix
        self._topic = settings.topic("transactions")
        self._calls = RedisClient(redis_client(settings), SWEEP_SCRIPT)
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
        await self._calls.close()

    async def copies(self, account_id: str) -> list[Copy]:
        """The account's states, of whatever model, in whatever partition."""
        found = []
        async with aclosing(self._matching("*", account_id)) as states:
            async for model, partition, _ in states:
                (key,) = self._keys(model).accounts(partition, [account_id])
                size, expires = await self._calls.execute([("STRLEN", key), ("PTTL", key)])
                if size:
                    left = int(expires) if expires >= 0 else None
                    found.append(Copy(model, partition, int(size), left))
        return sorted(found, key=lambda copy: (copy.model, copy.partition))

    async def accounts(
        self, model: str, partition: int | None = None
    ) -> AsyncGenerator[tuple[int, list[str]]]:
        """Accounts that have a state of a model, a few at a time, with their partition.

        An account may come twice.
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

        Nothing changes by it: they count as absent. There must be a watermark.

        Returns:
            how many there were.
        """
        keys = self._keys(model)
        names = [keys.watermark(partition), *keys.accounts(partition, list(account_ids))]
        (swept,) = await self._calls.execute([SWEEP_SCRIPT.call(names, b"%d" % STATE_FORMAT)])
        return int(swept)

    async def copy(self, model: str, source: int, target: int, states: Mapping[str, bytes]) -> None:
        """Write accounts' states into another partition, to expire when those here do."""
        if not states:
            return
        keys, accounts = self._keys(model), list(states)
        left = await self._calls.execute([("PTTL", key) for key in keys.accounts(source, accounts)])
        await self._calls.execute(
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
            await self._calls.execute(
                [("DEL", *self._keys(model).accounts(partition, account_ids))]
            )

    def _keys(self, model: str) -> Keys:
        return Keys(self._prefix, model, self._topic)

    async def _matching(
        self, model: str, account_id: str | None, partition: int | None = None
    ) -> AsyncGenerator[tuple[str, int, str]]:
        """Model, partition and account of the keys that are found."""
        place = "*" if partition is None else str(partition)
        account = "*" if account_id is None else re.sub(r"([][*?\\^-])", r"\\\1", account_id)
        pattern = f"{self._prefix}:{model}:{{{self._topic}-{place}}}:{account}"
        async for keys in self._calls.scan(pattern):
            for key in keys:
                name = self._state.fullmatch(key.decode(errors="replace"))
                if name is not None and account_id in (None, name[3]):
                    yield name[1], int(name[2]), name[3]
