"""Client of Redis or Redis Cluster: pipelines, scripts, and errors without keys or values."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import redis.asyncio as redis_asyncio
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import (
    ClusterCrossSlotError,
    MovedError,
    NoScriptError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
)

from pipeline.errors import RecurError, SettingsError
from pipeline.settings import Settings, sentinel_address
from pipeline.storage.connection import HeldConnection
from pipeline.storage.script import Command, scripts_of

# AttributeError: after an error of one call, redis-py's cluster client closes the connections of
# all other calls. Some of these then find no socket.
_UNAVAILABLE = (RedisError, RedisClusterException, OSError, TimeoutError, AttributeError)

SCAN_COUNT = 1_000
"""Keys that one SCAN inspects: it takes Redis a fraction of a millisecond."""

RIGHTS = (
    "+get +mget +set +del +bitfield +setrange +pexpire +evalsha +script|load +ping +info"
    " +client|setinfo +publish"
)
"""Rights of a worker's ACL user, on keys that begin with ``RECUR_REDIS_KEY_PREFIX``.

It also needs the channels that begin with that: without them gateways wait longer for answers."""

COMMAND_RIGHTS = "+scan +strlen +pttl +getrange +hlen +hget +hgetall +hset +hsetnx +hdel"
"""Further rights of the ACL user that runs ``recur state`` and ``recur keys``."""

GATEWAY_RIGHTS = (
    "+get +mget +set +del +hget +evalsha +script|load +ping +info +client|setinfo"
    " +subscribe +unsubscribe"
)
"""Rights of a gateway's ACL user, on the same keys and on the channels of its replies."""

WEBHOOK_RIGHTS = "+mget +set +del +ping +info +client|setinfo"
"""Rights of the ACL user of ``recur webhooks``, on the keys of its switches."""

_FORBIDDEN = ("no permissions", "can't run this command", "ACL failure")


T = TypeVar("T")

RETRY_SECONDS = 0.2
"""Pause between two calls of :func:`retry_within`."""


class StoreUnavailableError(Exception):
    """The store did not answer; the call may be repeated."""


class StoreForbiddenError(RecurError):
    """Redis's ACL forbids the user a command; repeating the call does not help."""

    def __init__(self) -> None:
        super().__init__(
            f"Redis forbids its user a command that Recur needs: grant {RIGHTS}, and for the"
            f" commands `recur state` and `recur keys` {COMMAND_RIGHTS}, for a gateway"
            f" {GATEWAY_RIGHTS}, for webhooks {WEBHOOK_RIGHTS}, on the keys that begin with"
            " RECUR_REDIS_KEY_PREFIX (ACL SETUSER). Then start again"
        )


class StoreAddressError(RecurError):
    """The address leads to another kind of Redis than the settings name; do not retry."""


IS_A_CLUSTER = (
    "the Redis at RECUR_REDIS_URL is a node of a Redis Cluster: set RECUR_REDIS_CLUSTER to true"
)
IS_NO_CLUSTER = (
    "RECUR_REDIS_CLUSTER is true, but the Redis at RECUR_REDIS_URL is not a Redis Cluster:"
    " set RECUR_REDIS_CLUSTER to false, or RECUR_REDIS_URL to a node of the cluster"
)
NO_SUCH_DATABASE = (
    "the Redis at RECUR_REDIS_URL has no database of that number: end the address with /0, or"
    " raise the server's setting `databases`"
)


class RedisClient:
    """Client that runs commands and loads the scripts that they call.

    Args:
        client: a client of redis-py that returns bytes.

    Attributes:
        is_cluster: whether this is a Redis Cluster, where all keys of a command must lie in one
            slot.
    """

    def __init__(self, client: Any) -> None:
        self.client = client
        self.is_cluster = isinstance(client, RedisCluster)
        self._held = None if self.is_cluster else HeldConnection(client)

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        """Run the commands in one round trip to each server, and return their replies.

        One server runs them in order, and goes on after a command that fails.

        Raises:
            StoreUnavailableError: Redis did not answer one command; others may have run.
            StoreForbiddenError: Redis forbids one command.
        """
        if not commands:
            return []
        try:
            replies = await self._replies(commands)
            # A new server, or one that forgot its scripts.
            unknown = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
            if unknown:
                again = [commands[i] for i in unknown]
                await self._load_scripts(again)
                for i, reply in zip(unknown, await self._replies(again), strict=True):
                    replies[i] = reply
            _raise_errors(replies)
        except NoScriptError as error:
            raise StoreUnavailableError("it forgets scripts at once after loading") from error
        except _UNAVAILABLE as error:
            raise await self._error_for(error) from error
        return replies

    async def _replies(self, commands: Sequence[Command]) -> list[Any]:
        """Run the commands; the reply of one that fails is its error."""
        if self._held is not None:
            return await self._held.run(commands)
        if len(commands) == 1:
            try:
                return [await self.client.execute_command(*commands[0])]
            except NoScriptError as error:
                return [error]
        async with self.client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            # raise_on_error would put keys, and so account ids, into the message of the
            # exception.
            replies: list[Any] = await pipeline.execute(raise_on_error=False)
            return replies

    async def _load_scripts(self, commands: Sequence[Command]) -> None:
        """Load the scripts that the commands call, on each primary."""
        sources = [script.source for script in scripts_of(commands)]
        if self._held is not None:
            _raise_errors(await self._held.run([("SCRIPT", "LOAD", source) for source in sources]))
            return
        for source in sources:
            await self.ask("SCRIPT LOAD", source, target_nodes=RedisCluster.PRIMARIES)

    async def ask(self, *command: str | bytes, **options: Any) -> Any:
        """Run one command and return its reply.

        Raises:
            StoreUnavailableError: Redis does not answer.
        """
        try:
            return await self.client.execute_command(*command, **options)
        except _UNAVAILABLE as error:
            raise await self._error_for(error) from error

    async def scan(self, pattern: str) -> AsyncIterator[list[bytes]]:
        """Yield lists of the keys that match the pattern, on all nodes of a cluster.

        Raises:
            StoreUnavailableError: Redis does not answer.
            StoreForbiddenError: Redis forbids SCAN.
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
            raise await self._error_for(error) from error
        yield keys

    async def _error_for(self, error: BaseException) -> Exception:
        """Choose the exception for a command that Redis did not answer."""
        message = str(error)
        if any(sign in message for sign in _FORBIDDEN):
            return StoreForbiddenError()
        if "Cluster mode is not enabled" in message:
            return StoreAddressError(IS_NO_CLUSTER)
        if not self.is_cluster and isinstance(error, (ClusterCrossSlotError, MovedError)):
            return StoreAddressError(IS_A_CLUSTER)
        if "DB index is out of range" in message:
            return StoreAddressError(NO_SUCH_DATABASE)
        if self._held is not None and (isinstance(error, ReadOnlyError) or "READONLY" in message):
            # This server was the primary once. Connect again: Sentinel or DNS now name another.
            self._held.drop()
            await self.client.connection_pool.disconnect(inuse_connections=False)
        return StoreUnavailableError(_complaint(error))

    async def close(self) -> None:
        """Close the connections."""
        if self._held is not None:
            await self._held.close()
        await self.client.aclose()


def redis_client(settings: Settings) -> Any:
    """Make a client of the Redis or Redis Cluster in the settings; it connects on first use."""
    options = settings.redis_client_options()
    if "+sentinel://" in settings.redis_url:
        return _client_sentinel_options(settings, options)
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


class _SentinelPrimary(redis_asyncio.Redis):
    """Client of the primary that also closes its connections to the Sentinels."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close the connections."""
        await super().aclose(close_connection_pool)
        for sentinel in self.connection_pool.sentinel_manager.sentinels:  # type: ignore[attr-defined]
            await sentinel.aclose()


def _client_sentinel_options(settings: Settings, options: dict[str, Any]) -> Any:
    """Make a client of the primary; it asks the Sentinels for it at each connection."""
    address = sentinel_address(settings.redis_url)
    assert address is not None  # the settings have checked it
    if settings.redis_is_tls:
        options["ssl"] = True
    sentinel_options = {k: v for k, v in options.items() if k not in ("username", "password")}
    if settings.redis_sentinel_username:
        sentinel_options["username"] = settings.redis_sentinel_username
    if settings.redis_sentinel_password:
        sentinel_options["password"] = settings.redis_sentinel_password.get_secret_value()
    login = {"username": address.username, "password": address.password}
    options = {k: v for k, v in login.items() if v} | options
    hosts = list(address.hosts)
    sentinel = Sentinel(hosts, sentinel_kwargs=sentinel_options)  # type: ignore[no-untyped-call]
    return sentinel.master_for(
        address.master, redis_class=_SentinelPrimary, db=address.database, **options
    )


def _raise_errors(replies: Sequence[Any]) -> None:
    """Raise the first reply that is an error."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply


def _complaint(error: BaseException) -> str:
    """Describe an error without the command, which both client and server may quote."""
    if isinstance(error, RedisClusterException):
        return type(error).__name__
    return f"{type(error).__name__}: {error}".partition(", with args")[0][:300]


async def retry_within(timeout_seconds: float, call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a call until the store answers.

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
