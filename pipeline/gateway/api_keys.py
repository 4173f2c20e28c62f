"""API keys: their tokens, their records in Redis, and the gateways' short memory of them.

A token is ``recur_<id>_<secret>``. The id is public: logs, audit records and `recur keys` show it.
The secret has 256 random bits. Redis holds its SHA-256: no list of guesses can reach a random
secret, so a slow password hash would cost each request its time and protect nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Annotated

import msgspec

from pipeline.errors import RecurError
from pipeline.gateway.principal import SCOPES, TENANT, Principal, Scope
from pipeline.gateway.rates import parse_rate
from pipeline.settings import Settings
from pipeline.storage.client import RedisClient, StoreUnavailableError, redis_client
from pipeline.storage.keys import GatewayKeys

API_KEYS_MAX = 10_000
"""Most keys, revoked ones included; `recur keys remove` deletes those."""

NAME_MAX_CHARACTERS = 64
CACHE_SECONDS = 1.0
"""A gateway asks Redis again about a key after this: a revoked key works no longer than that."""

STALE_SECONDS = 30.0
"""While Redis is away, a gateway accepts a key that it knew for at most this long."""

LOOKUP_SECONDS = 1.0
"""Longest wait for Redis's answer about a key. After it Redis counts as away."""

RETRY_SECONDS = 0.5
"""Time from a failed lookup to the next one, for all keys."""

CACHED_KEYS_MAX = 10_000
"""Most keys, unknown ones included, in a gateway's memory."""

_ID_BYTES = 8
_SECRET_BYTES = 32
_TOKEN = re.compile(r"recur_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_NO_HASH = bytes(32)

log = logging.getLogger(__name__)

ShortName = Annotated[str, msgspec.Meta(min_length=1, max_length=NAME_MAX_CHARACTERS)]


class ApiKeyError(RecurError):
    """A key cannot be added, shown or revoked; the message says why."""


class ApiKey(msgspec.Struct, frozen=True, omit_defaults=True):
    """A key's record, as Redis holds it; without the secret.

    Attributes:
        id: public id, 16 hexadecimal digits.
        name: what the key is for.
        secret_hash: SHA-256 of the secret, 32 bytes.
        scopes: what the key may do.
        created_ms, expires_ms, revoked_ms: epoch milliseconds; None: never.
        tenant: prefix of the accounts and transactions that it sees; None: all.
        rate: its own rate limit; None: the gateways' default.
    """

    id: str
    name: ShortName
    secret_hash: bytes
    scopes: tuple[Scope, ...]
    created_ms: int
    expires_ms: int | None = None
    revoked_ms: int | None = None
    tenant: str | None = None
    rate: str | None = None

    def principal(self) -> Principal:
        """Return whom the key stands for."""
        return Principal(
            "api_key", self.id, self.name, frozenset(self.scopes), self.tenant, self.rate
        )

    def state(self, now_ms: int) -> str:
        """Return ``active``, ``expired`` or ``revoked``."""
        if self.revoked_ms is not None:
            return "revoked"
        return "expired" if self.expires_ms is not None and self.expires_ms <= now_ms else "active"


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(ApiKey).decode


def hash_secret(secret: str) -> bytes:
    """Hash a token's secret, 32 bytes; see the module for the choice of hash."""
    return hashlib.sha256(secret.encode()).digest()


def parse_token(token: str) -> tuple[str, str] | None:
    """Split a token into id and secret; None if it is no API key's token."""
    found = _TOKEN.fullmatch(token)
    return None if found is None else (found[1], found[2])


def new_key(
    name: str,
    scopes: Iterable[str],
    *,
    tenant: str | None = None,
    rate: str | None = None,
    expires_ms: int | None = None,
    now_ms: int | None = None,
) -> tuple[ApiKey, str]:
    """Make a key.

    Returns:
        its record and its token, which nothing can show again.

    Raises:
        ApiKeyError: an argument is not valid.
    """
    wanted = tuple(scope for scope in SCOPES if scope in set(scopes))
    if not wanted or set(scopes) - set(SCOPES):
        raise ApiKeyError(f"a key needs at least one of the scopes {', '.join(SCOPES)}")
    if not 0 < len(name) <= NAME_MAX_CHARACTERS or not name.isprintable():
        raise ApiKeyError(f"a key's name has 1 to {NAME_MAX_CHARACTERS} printable characters")
    if tenant is not None and not TENANT.fullmatch(tenant):
        raise ApiKeyError(
            "a tenant's prefix has up to 64 of the characters a-z A-Z 0-9 . _ : - and ends with"
            " one of . _ : - so that no other tenant's begins with it"
        )
    now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    if expires_ms is not None and expires_ms <= now_ms:
        raise ApiKeyError("the key would have expired already: choose a time in the future")
    if rate is not None:
        try:
            parse_rate(rate)
        except ValueError as error:
            raise ApiKeyError(str(error)) from None
    key_id, secret = secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES)
    key = ApiKey(
        key_id, name, hash_secret(secret), wanted, now_ms, expires_ms, tenant=tenant, rate=rate
    )
    return key, f"recur_{key_id}_{secret}"


class ApiKeyStore:
    """The keys in Redis: one hash, so that listing them scans nothing.

    Args:
        client: the Redis that all gateways share.
        keys: names of its keys.

    Every method raises StoreUnavailableError if Redis does not answer.
    """

    def __init__(self, client: RedisClient, keys: GatewayKeys) -> None:
        self._client = client
        self._name = keys.api_keys()

    async def add(self, key: ApiKey) -> None:
        """Store a new key.

        Raises:
            ApiKeyError: there are too many keys, or one has this id.
        """
        (count,) = await self._client.execute([("HLEN", self._name)])
        if count >= API_KEYS_MAX:
            raise ApiKeyError(f"there are {count} keys, the most that may be: remove revoked ones")
        (added,) = await self._client.execute([("HSETNX", self._name, key.id, _encode(key))])
        if not added:
            raise ApiKeyError("a key has this id already: run the command again")

    async def get(self, key_id: str) -> ApiKey | None:
        """Return a key; None if there is none of this id, or its record is not readable."""
        (record,) = await self._client.execute([("HGET", self._name, key_id)])
        return None if record is None else _read(key_id, record)

    async def all(self) -> list[ApiKey]:
        """Return all keys, the oldest first."""
        (flat,) = await self._client.execute([("HGETALL", self._name)])
        if isinstance(flat, dict):  # redis-py pairs them
            pairs = list(flat.items())
        else:
            pairs = list(zip(flat[::2], flat[1::2], strict=True))
        found = [_read(key_id.decode(), record) for key_id, record in pairs]
        return sorted((k for k in found if k is not None), key=lambda k: (k.created_ms, k.id))

    async def revoke(self, key_id: str) -> ApiKey:
        """Revoke a key for good; a revoked one stays as it is.

        Raises:
            ApiKeyError: there is no such key.
        """
        key = await self.get(key_id)
        if key is None:
            raise ApiKeyError(f"there is no key {key_id}: `recur keys list` lists them")
        if key.revoked_ms is None:
            key = msgspec.structs.replace(key, revoked_ms=time.time_ns() // 1_000_000)
            await self._client.execute([("HSET", self._name, key_id, _encode(key))])
        return key

    async def remove(self, key_id: str) -> None:
        """Delete the record of a key that is revoked or expired.

        Raises:
            ApiKeyError: there is no such key, or it is active.
        """
        key = await self.get(key_id)
        if key is None or key.state(time.time_ns() // 1_000_000) == "active":
            raise ApiKeyError(f"there is no revoked or expired key {key_id}")
        await self._client.execute([("HDEL", self._name, key_id)])


@asynccontextmanager
async def api_key_store(settings: Settings) -> AsyncIterator[ApiKeyStore]:
    """Connect to the keys of the gateways that have these settings; disconnect at the end."""
    client = RedisClient(redis_client(settings))
    try:
        yield ApiKeyStore(client, GatewayKeys(settings.redis_key_prefix))
    finally:
        await client.close()


def _read(key_id: str, record: bytes) -> ApiKey | None:
    try:
        return _decode(record)
    except msgspec.DecodeError:
        log.error("the record of an API key is damaged: add a new key", extra={"key": key_id})
        return None


class InvalidKeyError(Exception):
    """A token is not valid.

    Attributes:
        reason: ``malformed``, ``unknown``, ``secret``, ``expired`` or ``revoked``.
        key_id: the public id in the token; ``-`` if it has none.
    """

    def __init__(self, reason: str, key_id: str = "-") -> None:
        super().__init__(reason)
        self.reason = reason
        self.key_id = key_id


class ApiKeyCache:
    """Checks tokens against the store, and remembers each key for :data:`CACHE_SECONDS`.

    Args:
        store: the keys.
        clock: monotonic seconds.
        epoch_ms: the time of day, epoch milliseconds.
    """

    def __init__(
        self,
        store: ApiKeyStore,
        clock: Callable[[], float] = time.monotonic,
        epoch_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._store = store
        self._clock = clock
        self._epoch_ms = epoch_ms
        # By key id: when Redis was asked, and its answer.
        self._known: OrderedDict[str, tuple[float, ApiKey | None]] = OrderedDict()
        self._lookups: dict[str, asyncio.Task[ApiKey | None]] = {}
        self._away_until = float("-inf")

    async def verify(self, token: str) -> Principal:
        """Return whom a token stands for.

        Raises:
            InvalidKeyError: the token is not valid.
            StoreUnavailableError: Redis does not answer, and no gateway may trust its memory.
        """
        parts = parse_token(token)
        if parts is None:
            raise InvalidKeyError("malformed")
        key_id, secret = parts
        key = await self._find(key_id)
        # An unknown id costs the same comparison as a wrong secret.
        expected = _NO_HASH if key is None else key.secret_hash
        matches = hmac.compare_digest(hash_secret(secret), expected)
        if key is None:
            raise InvalidKeyError("unknown", key_id)
        if not matches:
            raise InvalidKeyError("secret", key_id)
        state = key.state(self._epoch_ms())
        if state != "active":
            raise InvalidKeyError(state, key_id)
        return key.principal()

    def remembers(self, token: str) -> bool:
        """Whether a token was valid when Redis was last asked about its key."""
        parts = parse_token(token)
        known = None if parts is None else self._known.get(parts[0])
        if parts is None or known is None or known[1] is None:
            return False
        key = known[1]
        matches = hmac.compare_digest(hash_secret(parts[1]), key.secret_hash)
        return matches and key.state(self._epoch_ms()) == "active"

    async def _find(self, key_id: str) -> ApiKey | None:
        known = self._known.get(key_id)
        now = self._clock()
        if known is not None and now - known[0] < CACHE_SECONDS:
            return known[1]
        try:
            if now < self._away_until:
                raise StoreUnavailableError("it did not answer a moment ago")
            return await self._look_up(key_id)
        except StoreUnavailableError:
            if known is None or known[1] is None or self._clock() - known[0] > STALE_SECONDS:
                raise
            return known[1]

    async def _look_up(self, key_id: str) -> ApiKey | None:
        """Ask Redis, once for all requests that wait for the same key."""
        lookup = self._lookups.get(key_id)
        if lookup is None:
            lookup = self._lookups[key_id] = asyncio.create_task(self._ask(key_id))
            lookup.add_done_callback(lambda task: self._forget_lookup(key_id, task))
        return await asyncio.shield(lookup)

    def _forget_lookup(self, key_id: str, lookup: asyncio.Task[ApiKey | None]) -> None:
        self._lookups.pop(key_id, None)
        if not lookup.cancelled():
            lookup.exception()  # all that waited may have hung up: then nobody else reads it

    async def _ask(self, key_id: str) -> ApiKey | None:
        asked = self._clock()
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                key = await self._store.get(key_id)
        except (StoreUnavailableError, TimeoutError) as error:
            self._away_until = self._clock() + RETRY_SECONDS
            raise StoreUnavailableError("no answer about an API key") from error
        self._known[key_id] = asked, key
        self._known.move_to_end(key_id)
        if len(self._known) > CACHED_KEYS_MAX:
            self._known.popitem(last=False)
        return key
