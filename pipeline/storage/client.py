"""Calls to Redis or Redis Cluster as the stores make them: pipelined, with scripts, and with
errors that quote neither keys nor values.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import redis.asyncio as redis_asyncio
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import (
    ClusterCrossSlotError,
    MovedError,
    NoScriptError,
    RedisClusterException,
    RedisError,
)

from pipeline.errors import RecurError, SettingsError
from pipeline.settings import Settings, sentinel_address

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
"""What an ACL user of Redis must be allowed, on keys that begin with ``RECUR_REDIS_KEY_PREFIX``."""

COMMAND_RIGHTS = "+scan +strlen +pttl +getrange"
"""What the user of a person who runs ``recur state`` needs besides."""

_FORBIDDEN = ("no permissions", "can't run this command", "ACL failure")


T = TypeVar("T")

RETRY_SECONDS = 0.2
"""Between two calls of :func:`answered_within`."""


class StoreUnavailableError(Exception):
    """The store did not answer; what was asked may be asked again."""


class StoreForbiddenError(RecurError):
    """Redis's ACL does not allow its user a command; asking again does not help."""

    def __init__(self) -> None:
        super().__init__(
            f"Redis does not allow its user all that Recur does: grant {RIGHTS}, and for the"
            f" commands `recur state` {COMMAND_RIGHTS}, on the keys that begin with"
            " RECUR_REDIS_KEY_PREFIX (ACL SETUSER), and start again"
        )


class StoreAddressError(RecurError):
    """An address of another kind of Redis than the settings say; asking again is no use."""


IS_A_CLUSTER = (
    "the Redis that RECUR_REDIS_URL names is a node of a Redis Cluster: set RECUR_REDIS_CLUSTER"
    " to true"
)
IS_NO_CLUSTER = (
    "RECUR_REDIS_CLUSTER is true, and the Redis that RECUR_REDIS_URL names is no Redis Cluster:"
    " set RECUR_REDIS_CLUSTER to false, or RECUR_REDIS_URL to a node of the cluster"
)
NO_SUCH_DATABASE = (
    "the Redis that RECUR_REDIS_URL names has no database of that number: end the address with"
    " /0, or raise its setting `databases`"
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


class RedisClient:
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
            raise await self._unanswered(error) from error

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
            raise await self._unanswered(error) from error

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
            raise await self._unanswered(error) from error
        yield keys

    async def _unanswered(self, error: BaseException) -> Exception:
        """What to raise where a command was not answered."""
        said = str(error)
        if any(sign in said for sign in _FORBIDDEN):
            return StoreForbiddenError()
        if "Cluster mode is not enabled" in said:
            return StoreAddressError(IS_NO_CLUSTER)
        if not self.is_cluster and isinstance(error, (ClusterCrossSlotError, MovedError)):
            return StoreAddressError(IS_A_CLUSTER)
        if "DB index is out of range" in said:
            return StoreAddressError(NO_SUCH_DATABASE)
        if "READONLY" in said and not self.is_cluster:
            # It was the primary once. Sentinel, or the name's new address, tells of another.
            await self.client.connection_pool.disconnect(inuse_connections=False)
        return StoreUnavailableError(_complaint(error))

    async def close(self) -> None:
        """Give connections back."""
        await self.client.aclose()


def redis_client(settings: Settings) -> Any:
    """A client for the Redis or Redis Cluster that the settings name; connects when used."""
    options = settings.redis_client_options()
    if "+sentinel://" in settings.redis_url:
        return _client_of_sentinels(settings, options)
    try:
        if settings.redis_cluster:
            return RedisCluster.from_url(settings.redis_url, **options)
        client = redis_asyncio.Redis.from_url(settings.redis_url, **options)
        client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    except TypeError as error:
        raise SettingsError(
            "redis_url (RECUR_REDIS_URL) has an option after the question mark that the client does"
            " not know: take it off"
        ) from error
    return client


class _FollowsSentinels(redis_asyncio.Redis):
    """A client of the primary that also closes what it asks the Sentinels by."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Give connections back."""
        await super().aclose(close_connection_pool)
        for sentinel in self.connection_pool.sentinel_manager.sentinels:  # type: ignore[attr-defined]
            await sentinel.aclose()


def _client_of_sentinels(settings: Settings, options: dict[str, Any]) -> Any:
    """Make a client of the primary that Sentinels name; it asks them at each connection."""
    address = sentinel_address(settings.redis_url)
    assert address is not None  # the settings have looked
    if settings.redis_is_tls:
        options["ssl"] = True
    of_sentinels = {k: v for k, v in options.items() if k not in ("username", "password")}
    if settings.redis_sentinel_username:
        of_sentinels["username"] = settings.redis_sentinel_username
    if settings.redis_sentinel_password:
        of_sentinels["password"] = settings.redis_sentinel_password.get_secret_value()
    login = {"username": address.username, "password": address.password}
    options = {k: v for k, v in login.items() if v} | options
    hosts = list(address.hosts)
    sentinel = Sentinel(hosts, sentinel_kwargs=of_sentinels)  # type: ignore[no-untyped-call]
    return sentinel.master_for(
        address.master, redis_class=_FollowsSentinels, db=address.database, **options
    )


def _complaint(error: BaseException) -> str:
    """What went wrong, without the command that both client and server may quote."""
    if isinstance(error, RedisClusterException):
        return type(error).__name__
    return f"{type(error).__name__}: {error}".partition(", with args")[0][:300]


async def answered_within(timeout_seconds: float, call: Callable[[], Awaitable[T]]) -> T:
    """Ask the store until it answers.

    Raises:
        StoreUnavailableError: the time is over.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            return await call()
        except StoreUnavailableError:
            if time.monotonic() + RETRY_SECONDS > deadline:
                raise
            await asyncio.sleep(RETRY_SECONDS)
