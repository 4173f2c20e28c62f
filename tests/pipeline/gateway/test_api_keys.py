"""API keys in a real Redis: wrong, expired and revoked ones are refused, with Redis or without."""

from __future__ import annotations

import asyncio
import hmac
import uuid

import pytest
from click.testing import CliRunner

from pipeline.cli.keys import expiry_ms
from pipeline.gateway import api_keys
from pipeline.gateway.api_keys import (
    CACHE_SECONDS,
    CACHED_KEYS_MAX,
    STALE_SECONDS,
    ApiKey,
    ApiKeyCache,
    ApiKeyError,
    InvalidKeyError,
    hash_secret,
    new_key,
    parse_token,
)
from pipeline.local.redis import Redis
from pipeline.settings import Settings, load_settings
from pipeline.storage.client import StoreUnavailableError
from tests.fakes.clock import Clock
from tests.pipeline.gateway.calls import add_key, key_store


def settings_of(redis_server: Redis) -> Settings:
    return load_settings(
        redis_url=redis_server.url,
        redis_key_prefix=f"keys-{uuid.uuid4().hex[:8]}",
        redis_timeout_seconds=1,
    )


async def refusal(cache: ApiKeyCache, token: str) -> str:
    with pytest.raises(InvalidKeyError) as caught:
        await cache.verify(token)
    return caught.value.reason


def test_a_valid_key_is_accepted_and_every_other_refused(redis_server: Redis) -> None:
    async def run() -> None:
        async with key_store(settings_of(redis_server)) as (_, store):
            now_ms = 1_000_000
            cache = ApiKeyCache(store, epoch_ms=lambda: now_ms)
            key_id, token = await add_key(
                store, "read", "label", tenant="acme-", rate="7/s", expires_ms=2_000_000, now_ms=1
            )
            _, other = await add_key(store)

            found = await cache.verify(token)
            assert (found.id, found.name, found.tenant, found.rate) == (
                key_id, "till", "acme-", "7/s",
            )  # fmt: skip
            assert found.scopes == {"read", "label"}
            secret = other.rpartition("_")[0] and parse_token(other)
            assert secret is not None
            assert await refusal(cache, f"recur_{key_id}_{secret[1]}") == "secret"
            assert await refusal(cache, token.replace(key_id, "0" * 16)) == "unknown"
            for wrong in ("", "x", token[:-1], token + "x", token.upper(), f"recur__{secret[1]}"):
                assert await refusal(cache, wrong) == "malformed"
            now_ms = 2_000_000
            assert await refusal(cache, token) == "expired"

    asyncio.run(run())


def test_no_secret_is_in_redis(redis_server: Redis) -> None:
    async def run() -> None:
        async with key_store(settings_of(redis_server)) as (client, store):
            key_id, token = await add_key(store)
            (record,) = await client.execute([("HGET", store._name, key_id)])
            assert token.encode() not in record
            parts = parse_token(token)
            assert parts is not None
            assert parts[1].encode() not in record
            assert hash_secret(parts[1]) == (await store.all())[0].secret_hash

    asyncio.run(run())


def test_secrets_are_compared_in_constant_time(
    redis_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token of the right form reaches the same comparison, also one of an unknown id."""
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def count(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", count)

    async def run() -> None:
        async with key_store(settings_of(redis_server)) as (_, store):
            _, token = await add_key(store)
            cache = ApiKeyCache(store)
            await cache.verify(token)
            await refusal(cache, token[:-2] + ("AA" if token[-2:] != "AA" else "BB"))
            await refusal(cache, new_key("x", ["read"])[1])

    asyncio.run(run())
    assert compared == [(32, 32)] * 3


def test_keys_are_added_and_revoked_while_a_gateway_runs(redis_server: Redis) -> None:
    async def run() -> None:
        async with key_store(settings_of(redis_server)) as (_, store):
            clock = Clock()
            cache = ApiKeyCache(store, clock)
            key, token = new_key("till", ["score"])
            assert await refusal(cache, token) == "unknown"
            await store.add(key)
            clock.now_seconds += CACHE_SECONDS
            await cache.verify(token)

            await store.revoke(key.id)
            clock.now_seconds += CACHE_SECONDS
            assert await refusal(cache, token) == "revoked"

            again = await store.revoke(key.id)  # the first time stays
            assert again == (await store.all())[0]
            await store.remove(key.id)
            assert await store.all() == []

    asyncio.run(run())


def test_one_second_of_requests_asks_redis_once(redis_server: Redis) -> None:
    async def run() -> None:
        async with key_store(settings_of(redis_server)) as (_, store):
            asked = 0
            get = store.get

            async def counted(key_id: str) -> ApiKey | None:
                nonlocal asked
                asked += 1
                return await get(key_id)

            store.get = counted  # type: ignore[method-assign]
            _, token = await add_key(store)
            cache = ApiKeyCache(store, Clock())
            await asyncio.gather(*(cache.verify(token) for _ in range(50)))
            await cache.verify(token)
            assert asked == 1

    asyncio.run(run())


@pytest.mark.live
def test_while_redis_is_away_known_keys_work_for_a_bounded_time_and_no_others() -> None:
    async def run() -> None:
        with Redis() as server:
            async with key_store(settings_of(server)) as (_, store):
                clock = Clock()
                cache = ApiKeyCache(store, clock)
                _, token = await add_key(store)
                _, unseen = await add_key(store)
                await cache.verify(token)
                await asyncio.to_thread(server.stop)

                clock.now_seconds += STALE_SECONDS
                assert (await cache.verify(token)).name == "till"
                with pytest.raises(StoreUnavailableError):
                    await cache.verify(unseen)
                clock.now_seconds += 1
                with pytest.raises(StoreUnavailableError):
                    await cache.verify(token)

                await asyncio.to_thread(server.start)
                clock.now_seconds += 1
                await cache.verify(token)
                await cache.verify(unseen)

    asyncio.run(run())


def test_a_key_revoked_before_redis_went_away_stays_revoked(redis_server: Redis) -> None:
    async def run() -> None:
        async with key_store(settings_of(redis_server)) as (_, store):
            clock = Clock()
            cache = ApiKeyCache(store, clock)
            key_id, token = await add_key(store)
            await store.revoke(key_id)
            assert await refusal(cache, token) == "revoked"

            async def away(key_id: str) -> ApiKey | None:
                raise StoreUnavailableError("away")

            store.get = away  # type: ignore[method-assign]
            clock.now_seconds += CACHE_SECONDS
            assert await refusal(cache, token) == "revoked"

    asyncio.run(run())


def test_unknown_ids_do_not_fill_the_memory(
    redis_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_keys, "CACHED_KEYS_MAX", 5)
    assert CACHED_KEYS_MAX > 5

    async def run() -> None:
        async with key_store(settings_of(redis_server)) as (_, store):
            cache = ApiKeyCache(store)
            for _ in range(9):
                await refusal(cache, new_key("x", ["read"])[1])
            assert len(cache._known) == 5

    asyncio.run(run())


@pytest.mark.parametrize(
    "options",
    [
        {"scopes": []},
        {"scopes": ["score", "root"]},
        {"name": ""},
        {"name": "x" * 65},
        {"name": "two\nlines"},
        {"tenant": "acme"},
        {"tenant": ""},
        {"tenant": "x" * 64 + "-"},
        {"rate": "100"},
        {"rate": "0/s"},
        {"rate": "10000000/s"},
        {"expires_ms": 1},
    ],
)
def test_a_key_that_means_nothing_is_not_made(options: dict[str, object]) -> None:
    arguments: dict[str, object] = {"name": "till", "scopes": ["score"]} | options
    with pytest.raises(ApiKeyError):
        new_key(**arguments)  # type: ignore[arg-type]


def test_a_time_of_expiry_is_a_duration_or_a_time() -> None:
    assert expiry_ms("12h", 5) == 5 + 12 * 3_600_000
    assert expiry_ms("2027-05-31T00:00:00Z", 5) == 1_811_721_600_000


def test_an_unknown_key_ends_the_command_with_one_line(redis_server: Redis) -> None:
    from pipeline.cli.keys import keys

    settings = settings_of(redis_server)
    environment = {
        "RECUR_REDIS_URL": settings.redis_url,
        "RECUR_REDIS_KEY_PREFIX": settings.redis_key_prefix,
    }
    shown = CliRunner().invoke(keys, ["show", "nobody"], env=environment)
    assert isinstance(shown.exception, ApiKeyError)
    listed = CliRunner().invoke(keys, ["list"], env=environment)
    assert listed.exit_code == 0
