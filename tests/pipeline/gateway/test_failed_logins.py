"""The limit of failed logins: an address is bounded, its known keys are not, nor is any other."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Any

import pytest

from pipeline.gateway.api_keys import ApiKeyCache
from pipeline.gateway.authentication import AccessControl, Authenticator
from pipeline.gateway.failed_logins import ADDRESSES_MAX, WINDOW_SECONDS, FailedLogins
from pipeline.gateway.limits import RateLimiter
from pipeline.gateway.request_log import RequestLog
from pipeline.local.redis import Redis
from pipeline.settings import load_settings
from pipeline.storage.keys import GatewayKeys
from tests.fakes.clock import Clock
from tests.pipeline.gateway.calls import add_key, call, echo, key_store


def test_an_allowance_comes_back_evenly() -> None:
    clock = Clock()
    failed = FailedLogins(4, clock)

    assert [failed.count("a") for _ in range(4)] == [False, False, False, True]
    assert failed.wait_seconds("a") == pytest.approx(WINDOW_SECONDS / 4)
    assert failed.wait_seconds("b") == 0
    clock.now_seconds += WINDOW_SECONDS / 4
    assert failed.wait_seconds("a") == 0
    assert failed.count("a")
    assert not failed.count("a")  # past the limit, and told before
    clock.now_seconds += WINDOW_SECONDS
    assert [failed.count("a") for _ in range(4)] == [False, False, False, True]


def test_addresses_are_bounded_and_a_subscribers_network_is_one() -> None:
    failed = FailedLogins(1, Clock())
    for number in range(ADDRESSES_MAX + 10):
        failed.count(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(failed) == ADDRESSES_MAX
    failed.count("2001:db8::1")
    assert failed.wait_seconds("2001:db8::ffff") > 0
    assert failed.wait_seconds("2001:db8:0:1::1") == 0


def test_no_limit_remembers_nobody() -> None:
    failed = FailedLogins(0)
    assert not any(failed.count("a") for _ in range(100))
    assert (failed.wait_seconds("a"), len(failed)) == (0, 0)


def test_an_address_over_its_limit_gets_429_and_its_known_keys_are_served(
    redis_server: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        settings = load_settings(
            redis_url=redis_server.url, redis_key_prefix=f"gw-{secrets.token_hex(4)}"
        )
        clock = Clock()
        async with key_store(settings) as (client, store):
            asked = 0
            get = store.get

            async def counted(key_id: str) -> Any:
                nonlocal asked
                asked += 1
                return await get(key_id)

            store.get = counted  # type: ignore[method-assign]
            authenticator = Authenticator(ApiKeyCache(store), failed=FailedLogins(3, clock))
            limiter = RateLimiter(client, GatewayKeys(settings.redis_key_prefix), None)
            app = RequestLog(AccessControl(echo, authenticator, limiter))
            known_id, known = await add_key(store)
            _, new = await add_key(store)
            assert (await call(app, token=known)).status == 200

            def guess() -> str:
                return f"recur_{secrets.token_hex(8)}_{'A' * 43}"

            assert [(await call(app, token=guess())).status for _ in range(5)] == [401] * 3 + [
                429
            ] * 2
            before, lines = asked, len(refusals())
            refused = await call(app, token=guess())
            assert (refused.problem, refused.headers["retry-after"]) == (
                "too-many-failed-logins", "20",
            )  # fmt: skip
            assert (asked, len(refusals())) == (before, lines)

            assert (await call(app, token=known)).status == 200
            assert (await call(app, token=known[:-1] + "_")).status == 429  # a wrong secret
            assert (await call(app, token=new)).status == 429
            assert (await call(app, token=new, address="192.0.2.9")).status == 200
            assert (await call(app, token=new)).status == 200  # known now
            assert (await call(app)).status == 401  # no credentials are no guess

            clock.now_seconds += 20.5
            assert (await call(app, token=guess())).status == 401
            assert (await call(app, token=guess())).status == 429
            await store.revoke(known_id)
            await asyncio.sleep(1.1)  # a gateway remembers a key for a second
            assert [(await call(app, token=known)).status for _ in range(2)] == [429, 429]

    def refusals() -> list[str]:
        return [r.message for r in caplog.records if r.message == "credentials were refused"]

    with caplog.at_level(logging.INFO):
        asyncio.run(run())
    told = [r for r in caplog.records if r.message == "an address has no failed logins left"]
    assert len(told) == 2
    assert "192.0.2" not in caplog.text
