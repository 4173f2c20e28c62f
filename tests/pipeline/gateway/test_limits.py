"""Rate limits in a real Redis: gateways share them, and the headers say what is left."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from pipeline.gateway.limits import RateLimiter
from pipeline.gateway.principal import Principal
from pipeline.gateway.problems import Problem
from pipeline.gateway.rates import Rate, RateDecision, parse_rate
from pipeline.local.redis import Redis, RedisCluster
from pipeline.settings import load_settings
from pipeline.storage.client import RedisClient, redis_client
from pipeline.storage.keys import GatewayKeys

HOUR = Rate(20, 3_600)
"""A window so long that nothing comes back while a test runs."""


def principal(rate: str | None = None) -> Principal:
    return Principal("api_key", uuid.uuid4().hex[:16], "till", frozenset(), rate=rate)


def client_of(url: str, cluster: bool = False) -> RedisClient:
    return RedisClient(redis_client(load_settings(redis_url=url, redis_cluster=cluster)))


def test_two_gateways_share_one_limit(redis_server: Redis) -> None:
    async def run() -> list[RateDecision | None]:
        clients = [client_of(redis_server.url) for _ in range(2)]
        gateways = [RateLimiter(client, GatewayKeys("rates"), HOUR) for client in clients]
        key = principal()
        found = await asyncio.gather(*(gateways[i % 2].take(key) for i in range(50)))
        for client in clients:
            await client.close()
        return found

    decisions = [d for d in asyncio.run(run()) if d is not None]

    assert sum(d.allowed for d in decisions) == HOUR.quota
    assert sorted(d.remaining for d in decisions if d.allowed) == list(range(HOUR.quota))
    refused = [d for d in decisions if not d.allowed]
    assert all(d.remaining == 0 and 170 < d.reset_seconds <= 180 for d in refused)


def test_keys_have_limits_of_their_own(redis_server: Redis) -> None:
    async def run() -> None:
        client = client_of(redis_server.url)
        limiter = RateLimiter(client, GatewayKeys("rates"), Rate(1, 3_600))
        first, second, unlimited = principal(), principal("2/h"), principal("none")
        allowed = [await limiter.take(key) for key in (first, first, second, second, second)]
        assert [d and d.allowed for d in allowed] == [True, False, True, True, False]
        assert await limiter.take(unlimited) is None
        await client.close()

    asyncio.run(run())


def test_a_batch_counts_its_items_and_a_refused_one_takes_nothing(redis_server: Redis) -> None:
    async def run() -> None:
        client = client_of(redis_server.url)
        limiter, key = RateLimiter(client, GatewayKeys("rates"), HOUR), principal()
        await limiter.charge(key, 15)
        with pytest.raises(Problem) as caught:
            await limiter.charge(key, 6)
        problem = caught.value
        assert (problem.kind.status, problem.kind.name) == (429, "rate-limited")
        headers = dict(problem.headers())
        assert headers[b"ratelimit-policy"] == b'"key";q=20;w=3600'
        assert headers[b"ratelimit"] == b'"key";r=5;t=180'
        assert headers[b"retry-after"] == b"180"
        assert problem.members("id")["violated-policies"] == ["key"]
        decision = await limiter.charge(key, 5)
        assert decision is not None
        assert decision.remaining == 0
        assert not (await limiter.take(key) or decision).allowed
        much = await limiter.take(principal(), 1_000)  # counts as the quota: it may pass once
        assert much is not None
        assert much.allowed
        await client.close()

    asyncio.run(run())


def test_the_quota_comes_back_with_time(redis_server: Redis) -> None:
    """The server's clock decides; a key is gone from Redis once all is paid back."""

    async def run() -> None:
        client = client_of(redis_server.url)
        keys = GatewayKeys("rates")
        limiter, key = RateLimiter(client, keys, Rate(10, 1)), principal()
        first = await limiter.take(key, 10)
        assert first is not None
        assert first.allowed
        refused = await limiter.take(key)
        assert refused is not None
        assert not refused.allowed
        await asyncio.sleep(refused.reset_seconds + 0.001)  # the server's time, so never too short
        again = await limiter.take(key)
        assert again is not None
        assert again.allowed
        (left_ms,) = await client.execute([("PTTL", keys.rate(key.label))])
        assert 0 < left_ms <= 1_000
        await client.close()

    asyncio.run(run())


def test_a_lowered_limit_does_not_lock_a_key_out(redis_server: Redis) -> None:
    async def run() -> None:
        client = client_of(redis_server.url)
        key = principal()
        keys = GatewayKeys("rates")
        await RateLimiter(client, keys, Rate(1_000, 86_400)).take(key, 1_000)
        now = await RateLimiter(client, keys, Rate(10, 1)).take(key)
        assert now is not None
        assert now.reset_seconds <= 1
        await client.close()

    asyncio.run(run())


def test_the_script_works_on_a_cluster(redis_cluster: RedisCluster) -> None:
    async def run() -> None:
        client = client_of(redis_cluster.url, cluster=True)
        limiter = RateLimiter(client, GatewayKeys("rates"), HOUR)
        decision = await limiter.take(principal())
        assert decision is not None
        assert decision.remaining == 19
        await client.close()

    asyncio.run(run())


@pytest.mark.live
def test_without_redis_a_limited_key_gets_503(redis_server: Redis) -> None:
    async def run() -> None:
        client = client_of("redis://127.0.0.1:1/0")
        with pytest.raises(Problem) as caught:
            await RateLimiter(client, GatewayKeys("rates"), HOUR).charge(principal())
        assert (caught.value.kind.status, caught.value.retry_after_seconds) == (503, 2)
        await client.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "text", ["", "5", "5/", "s", "-1/s", "5/0s", "1/2day", "200000/s", "5 / s"]
)
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="rate"):
        parse_rate(text)


def test_rates_are_read() -> None:
    assert parse_rate("5000/10min") == Rate(5_000, 600)
    assert parse_rate("1/day") == Rate(1, 86_400)
    assert parse_rate("none") is None
