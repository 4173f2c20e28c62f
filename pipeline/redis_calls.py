"""Calls to Redis or Redis Cluster as the stores make them: pipelined, with scripts, and with
errors that quote neither keys nor values."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis.asyncio as redis_asyncio
from redis.asyncio.cluster import RedisCluster
from redis.exceptions import NoScriptError, RedisClusterException, RedisError

from pipeline.errors import RecurError
from pipeline.settings import Settings

# AttributeError: redis-py's cluster client, after an error of one call, closes the connections
# of all others, some of which then find no socket.
_UNAVAILABLE = (RedisError, RedisClusterException, OSError, TimeoutError, AttributeError)

Command = tuple[str | bytes, ...]

SCAN_COUNT = 1_000
"""Keys that one SCAN looks at: a fraction of a millisecond of Redis's time."""

RIGHTS = (
    "+get +mget +set +del +bitfield +setrange +pexpire +evalsha +script|load +ping +info"
    " +client|setinfo"
)
"""What an ACL user of Redis must be allowed, on keys that begin with ``RECUR_KEY_PREFIX``."""

COMMAND_RIGHTS = "+scan +strlen +pttl +getrange"
"""What the user of a person who runs ``recur state`` needs besides."""

_FORBIDDEN = ("no permissions", "can't run this command", "ACL failure")


class StoreUnavailableError(Exception):
    """The store did not answer; what was asked may be asked again."""


class StoreForbiddenError(RecurError):
    """Redis's ACL does not allow its user a command; asking again does not help."""

    def __init__(self) -> None:
        super().__init__(
            f"Redis does not allow its user all that Recur does: grant {RIGHTS}, and for the"
            f" commands `recur state` {COMMAND_RIGHTS}, on the keys that begin with"
            " RECUR_KEY_PREFIX (ACL SETUSER), and start again"
        )


@dataclass(frozen=True)
class Script:
    """A Lua script, called by its digest."""

    source: bytes
    sha: bytes = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha1(self.source, usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest.encode())

    def call(self, keys: Sequence[bytes], *arguments: bytes) -> Command:
        """The command that runs it."""
        return "EVALSHA", self.sha, b"%d" % len(keys), *keys, *arguments


class RedisCalls:
    """Runs commands.

    Args:
        client: a connected client that returns bytes.
        scripts: the scripts that the commands may call.
    """

    def __init__(self, client: Any, *scripts: Script) -> None:
        self.client = client
        self._scripts = scripts

    @property
    def is_cluster(self) -> bool:
        """Whether each command's keys must lie in one slot."""
        return isinstance(self.client, RedisCluster)

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        """Run the commands, in one round trip to each server; their replies.

        Raises:
            StoreUnavailableError: one of them was not answered; others may have been run.
            StoreForbiddenError: Redis does not allow one of them.
        """
        try:
            return await self._execute(commands)
        except NoScriptError:  # a new server, or one that forgot its scripts
            await self._load_scripts()
            try:
                return await self._execute(commands)
            except NoScriptError as error:
                raise StoreUnavailableError("it forgets scripts at once") from error

    async def _execute(self, commands: Sequence[Command]) -> list[Any]:
        try:
            if len(commands) == 1:
                return [await self.client.execute_command(*commands[0])]
            async with self.client.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                # Not raise_on_error: redis-py would write keys, and so account ids, into
                # the exception's message.
                replies: list[Any] = await pipeline.execute(raise_on_error=False)
            for reply in replies:
                if isinstance(reply, BaseException):
                    raise reply
            return replies
        except NoScriptError:
            raise
        except _UNAVAILABLE as error:
            raise _unanswered(error) from error

    async def _load_scripts(self) -> None:
        options = {"target_nodes": RedisCluster.PRIMARIES} if self.is_cluster else {}
        for script in self._scripts:
            await self.ask("SCRIPT LOAD", script.source, **options)

    async def ask(self, *command: str | bytes, **options: Any) -> Any:
        """One command's reply.

        Raises:
            StoreUnavailableError: it is not answered.
        """
        try:
            return await self.client.execute_command(*command, **options)
        except _UNAVAILABLE as error:
            raise _unanswered(error) from error

    async def scan(self, pattern: str) -> AsyncIterator[list[bytes]]:
        """Every key like this, some at a time, of all nodes of a cluster.

        Raises:
            StoreUnavailableError: it is not answered.
            StoreForbiddenError: Redis does not allow it.
        """
        keys: list[bytes] = []
        found = self.client.scan_iter(match=pattern, count=SCAN_COUNT)
        try:
            async for key in found:
                keys.append(key)
                if len(keys) == SCAN_COUNT:
                    yield keys
                    keys = []
        except _UNAVAILABLE as error:
            raise _unanswered(error) from error
        yield keys

    async def close(self) -> None:
        """Give connections back."""
        await self.client.aclose()


def redis_client(settings: Settings) -> Any:
    """A client for the Redis or Redis Cluster that the settings name; connects when used."""
    options = settings.redis_client_options()
    if settings.redis_cluster:
        return RedisCluster.from_url(settings.redis_url, **options)
    return redis_asyncio.Redis.from_url(settings.redis_url, **options)


def _unanswered(error: BaseException) -> StoreUnavailableError | StoreForbiddenError:
    """What to raise where a command was not answered."""
    if any(sign in str(error) for sign in _FORBIDDEN):
        return StoreForbiddenError()
    return StoreUnavailableError(_complaint(error))


def _complaint(error: BaseException) -> str:
    """What went wrong, without the command that both client and server may quote."""
    if isinstance(error, RedisClusterException):
        return type(error).__name__
    return f"{type(error).__name__}: {error}".partition(", with args")[0][:300]
