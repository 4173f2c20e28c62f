"""The middlewares around an application: refusals, limits, ids, and what the log shows."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiokafka.errors import KafkaConnectionError
from hypothesis import given
from hypothesis import strategies as st

from pipeline import logs
from pipeline.gateway.api_keys import ApiKeyStore
from pipeline.gateway.audit import AuditUnavailableError
from pipeline.gateway.context import AsgiApp, AsgiMessage, AsgiScope, Receive, Send
from pipeline.gateway.protection import make_authenticator, make_limiter, protect
from pipeline.gateway.request_limits import json_depth_exceeds
from pipeline.gateway.request_log import RequestLog, route_of
from pipeline.gateway.tenants import not_found
from pipeline.local.redis import Redis
from pipeline.settings import Settings, load_settings
from pipeline.storage.client import StoreUnavailableError
from tests.pipeline.gateway.calls import add_key, body, call, echo, key_store


def settings_of(redis_server: Redis, **changes: Any) -> Settings:
    return load_settings(
        redis_url=redis_server.url, redis_key_prefix=f"gw-{uuid.uuid4().hex[:8]}", **changes
    )


@asynccontextmanager
async def gateway(settings: Settings, app: AsgiApp = echo) -> AsyncIterator[tuple[Any, Any]]:
    """Protect an application; yield it and the store of its keys."""
    async with key_store(settings) as (client, store):
        authenticator = make_authenticator(settings, client)
        yield protect(app, settings, authenticator, make_limiter(settings, client)), store


def test_only_a_valid_key_with_the_scope_reaches_the_handler(redis_server: Redis) -> None:
    async def run() -> None:
        async with gateway(settings_of(redis_server)) as (app, store):
            _, scorer = await add_key(store, "score")
            _, admin = await add_key(store, "admin", "read", "label")

            served = await call(app, token=scorer, messages=body(b'{"a":1}'))
            assert (served.status, served.body) == (200, b'till{"a":1}')
            assert served.headers["ratelimit-policy"] == '"key";q=1000;w=1'
            assert served.headers["ratelimit"].startswith('"key";r=999;t=')
            by_header = await call(app, headers=[(b"x-api-key", scorer.encode())])
            assert by_header.status == 200

            forbidden = await call(app, token=admin)
            assert (forbidden.status, forbidden.problem) == (403, "forbidden")
            assert json.loads(forbidden.body)["scope"] == "score"

            missing = await call(app)
            assert (missing.status, missing.problem) == (401, "unauthenticated")
            assert missing.headers["www-authenticate"] == "Bearer"
            both = [(b"x-api-key", scorer.encode())]
            for wrong in (
                await call(app, token=scorer[:-1]),
                await call(app, token=scorer, headers=both),
                await call(app, headers=[(b"authorization", b"Basic " + scorer.encode())]),
                await call(app, token="x" * 100_000),
                await call(app, token="recur_\xff"),
            ):
                assert (wrong.status, wrong.problem) == (401, "unauthenticated")
                assert wrong.headers["www-authenticate"] == 'Bearer error="invalid_token"'

    asyncio.run(run())


def test_expired_and_revoked_keys_are_told_so_only_with_their_secret(redis_server: Redis) -> None:
    async def run() -> None:
        async with gateway(settings_of(redis_server)) as (app, store):
            revoked_id, revoked = await add_key(store)
            await store.revoke(revoked_id)
            _, expired = await add_key(store, expires_ms=2, now_ms=1)

            told = [json.loads((await call(app, token=t)).body) for t in (revoked, expired)]
            assert [t["detail"] for t in told] == [
                "the key was revoked",
                "the credentials have expired",
            ]
            guess = revoked[:23] + "A" * 43
            assert json.loads((await call(app, token=guess)).body)["detail"] == (
                "the credentials are not valid"
            )

    asyncio.run(run())


def test_without_redis_nobody_is_let_in() -> None:
    async def run() -> None:
        settings = load_settings(redis_url="redis://127.0.0.1:1/0")
        async with gateway(settings) as (app, _):
            token = f"recur_{'0' * 16}_{'A' * 43}"
            answer = await call(app, token=token)
            assert (answer.status, answer.problem) == (503, "identity-unavailable")
            assert answer.headers["retry-after"] == "2"
            assert (await call(app, "/ready")).status != 503  # no credentials needed

    asyncio.run(run())


def test_a_key_over_its_rate_gets_429_and_nothing_is_done(redis_server: Redis) -> None:
    served = 0

    async def count(scope: AsgiScope, receive: Receive, send: Send) -> None:
        nonlocal served
        served += 1
        await echo(scope, receive, send)

    async def run() -> None:
        settings = settings_of(redis_server, gateway_default_rate="3/h")
        async with gateway(settings, count) as (app, store):
            _, token = await add_key(store)
            statuses = [(await call(app, token=token)).status for _ in range(5)]
            assert statuses == [200, 200, 200, 429, 429]
            refused = await call(app, token=token)
            assert refused.problem == "rate-limited"
            assert refused.headers["ratelimit"].startswith('"key";r=0;t=')
            assert 0 < int(refused.headers["retry-after"]) <= 1_200

    asyncio.run(run())
    assert served == 3


def test_bodies_are_bounded_in_bytes_and_depth(redis_server: Redis) -> None:
    async def run() -> None:
        settings = settings_of(redis_server, gateway_max_body_bytes=2_000, gateway_max_json_depth=8)
        async with gateway(settings) as (app, store):
            _, token = await add_key(store)

            announced = [(b"content-length", b"2001")]
            first = await call(app, token=token, headers=announced)
            assert (first.status, first.problem) == (413, "too-large")
            endless = [{"type": "http.request", "body": b"x" * 900, "more_body": True}] * 50
            chunked = await call(app, token=token, messages=endless)
            assert (chunked.status, chunked.problem) == (413, "too-large")
            assert chunked.headers["connection"] == "close"

            bomb = await call(app, token=token, messages=body(b"[" * 1_000 + b"]" * 1_000))
            assert (bomb.status, bomb.problem) == (400, "too-deep")
            assert json.loads(bomb.body)["errors"][0]["pointer"] == ""
            just = b"[" * 8 + b"]" * 8
            assert (await call(app, token=token, messages=body(just))).status == 200

            packed = [(b"content-encoding", b"gzip")]
            zipped = await call(app, token=token, headers=packed)
            assert (zipped.status, zipped.problem) == (415, "unsupported-media-type")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "deep"),
    [
        (b"[[[[]]]]", True),
        (b"[[[]]]" * 9, False),
        (b'["[[[[[[", "\\"[[[[[", "\\\\"]', False),
        (b'["\\\\", [[[[]]]]]', True),
        (b"]]]][[[[", True),
        (b'"' + b"[" * 50, False),
        (b"{" * 100_000, True),
        (b'"\\' * 500_000 + b"[[[[", False),  # in linear time
        (b"[{}]" * 250_000, False),
        (b'{"a": {"b": [1, {"c": 2}]}}', True),
        (b'{"a": {"b": [1, 2]}, "d": [[3]]}', False),
    ],
)
def test_depth_is_counted_outside_of_texts(text: bytes, deep: bool) -> None:
    assert json_depth_exceeds(text, 3) == deep


_JSON = st.recursive(
    st.none() | st.integers() | st.text(alphabet='[]{}"\\\\a'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


@given(_JSON)
def test_depth_is_that_of_the_decoded_json(value: Any) -> None:
    text, depth = json.dumps(value).encode(), depth_of(value)

    assert not json_depth_exceeds(text, depth)
    if depth:
        assert json_depth_exceeds(text, depth - 1)


def test_a_slow_body_is_refused_and_holds_up_nobody(redis_server: Redis) -> None:
    async def run() -> None:
        settings = settings_of(
            redis_server, gateway_body_timeout_seconds=0.3, gateway_max_concurrent_requests=1
        )
        async with gateway(settings) as (app, store):
            _, token = await add_key(store)

            async def drip() -> AsgiMessage:
                await asyncio.sleep(0.05)
                return {"type": "http.request", "body": b"[", "more_body": True}

            slow = [asyncio.create_task(call(app, token=token, receive=drip)) for _ in range(20)]
            await asyncio.sleep(0.1)
            assert (await call(app, token=token)).status == 200
            answers = await asyncio.gather(*slow)
            assert {(a.status, a.problem) for a in answers} == {(408, "slow-request")}
            gone = await call(app, token=token, messages=[{"type": "http.disconnect"}])
            assert gone.status == 0

    asyncio.run(run())


def test_requests_over_the_limits_get_503_before_they_do_anything(redis_server: Redis) -> None:
    async def run() -> None:
        settings = settings_of(
            redis_server, gateway_max_concurrent_requests=2, gateway_max_open_requests=3
        )
        go_on, both_work = asyncio.Event(), asyncio.Event()
        served = 0

        async def wait(scope: AsgiScope, receive: Receive, send: Send) -> None:
            nonlocal served
            served += 1
            if served == 2:
                both_work.set()
            await go_on.wait()
            await echo(scope, receive, send)

        async with gateway(settings, wait) as (app, store):
            _, token = await add_key(store)
            working = [asyncio.create_task(call(app, token=token)) for _ in range(2)]
            await both_work.wait()
            third = await call(app, token=token)
            assert (third.status, third.problem) == (503, "overloaded")
            assert third.headers["retry-after"] == "1"

            pending = asyncio.Event()

            async def never() -> AsgiMessage:
                pending.set()
                await asyncio.Event().wait()
                return {}

            uploading = asyncio.create_task(call(app, token=token, receive=never))
            await pending.wait()
            assert (await call(app)).problem == "overloaded"  # before any look at credentials
            uploading.cancel()
            await asyncio.gather(uploading, return_exceptions=True)
            go_on.set()
            assert [a.status for a in await asyncio.gather(*working)] == [200, 200]
            assert served == 2
            assert (await call(app, token=token)).status == 200  # the places are free again

    asyncio.run(run())


def test_a_request_ends_at_its_time(redis_server: Redis) -> None:
    async def run() -> None:
        settings = settings_of(redis_server, gateway_request_timeout_seconds=0.2)

        async def hang(scope: AsgiScope, receive: Receive, send: Send) -> None:
            await asyncio.Event().wait()

        async def fail(scope: AsgiScope, receive: Receive, send: Send) -> None:
            raise TimeoutError("the application's own: secret-account")

        async with gateway(settings, hang) as (app, store):
            _, token = await add_key(store)
            late = await call(app, token=token)
            assert (late.status, late.problem) == (503, "timed-out")
        async with gateway(settings, fail) as (app, store):
            own = await call(app, token=token)
            assert (own.status, own.problem) == (500, "internal")

    asyncio.run(run())


def test_each_response_has_the_request_id(redis_server: Redis) -> None:
    async def run() -> None:
        async with gateway(settings_of(redis_server)) as (app, store):
            _, token = await add_key(store)
            given = [(b"x-request-id", b"till-4-0001")]
            trace = [(b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")]
            ids = [
                (await call(app, token=token, headers=headers)).headers["x-request-id"]
                for headers in (
                    given,
                    given + trace,
                    trace,
                    [(b"x-request-id", b"bad id\n")],
                    [(b"x-request-id", b"x" * 65)],
                    [(b"traceparent", b"00-" + b"0" * 32 + b"-b7ad6b7169203331-01")],
                    [],
                )
            ]
            assert ids[:3] == ["till-4-0001"] * 2 + ["0af7651916cd43dd8448eb211c80319c"]
            assert all(len(made) == 32 and int(made, 16) for made in ids[3:])
            assert len(set(ids[3:])) == 4
            assert (await call(app, headers=given)).headers["x-request-id"] == "till-4-0001"

    asyncio.run(run())


@pytest.mark.parametrize("form", [logs.JsonFormatter(), logs.TextFormatter()])
def test_no_log_line_holds_a_secret_an_id_or_a_payload(
    redis_server: Redis, caplog: pytest.LogCaptureFixture, form: logging.Formatter
) -> None:
    class Route:
        path = "/v1/accounts/{account_id}"

    async def serve(scope: AsgiScope, receive: Receive, send: Send) -> None:
        scope["route"] = Route()
        content = (await receive())["body"]
        if b"fail" in content:
            raise ValueError(f"no such account secret-account: {content!r}")
        if b"missing" in content:
            raise not_found()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if b"break" in content:
            raise ValueError("in the middle: secret-payload")
        await send({"type": "http.response.body", "body": b""})

    async def run() -> tuple[str, list[str]]:
        async with gateway(settings_of(redis_server), serve) as (app, store):
            key_id, token = await add_key(store)
            _, other = await add_key(store)
            wrong = token[:23] + other[23:]
            path = "/v1/accounts/secret-account"
            for content in (b"", b"missing", b"fail", b"break"):
                sent = body(b'["secret-payload", "' + content + b'"]')
                await call(app, path, token=token, messages=sent, method="GET")
            await call(app, path, token=wrong)
            await call(app, path, token="secret-token")
            await call(app, path, method="SECRET-METHOD")
            await call(app, "/ready", token=token)
            return key_id, [token, token[23:], other[23:], "secret-", "SECRET"]

    caplog.set_level(logging.DEBUG)
    key_id, secrets = asyncio.run(run())
    records = [r for r in caplog.records if r.name.startswith("pipeline.")]
    text = "\n".join(form.format(record) for record in caplog.records)

    assert not [secret for secret in secrets if secret in text], text
    access = [vars(r) for r in records if r.name == "pipeline.gateway.access"]
    assert [(r["route"], r["status"], r["key"]) for r in access] == [
        ("/v1/accounts/{account_id}", 200, key_id),
        ("/v1/accounts/{account_id}", 404, key_id),
        ("/v1/accounts/{account_id}", 500, key_id),
        ("/v1/accounts/{account_id}", 200, key_id),
        ("(none)", 401, "-"),
        ("(none)", 401, "-"),
        ("(none)", 401, "-"),
        ("/v1/accounts/{account_id}", 200, "-"),
    ]
    assert all(r["ms"] >= 0 and r["request_id"] for r in access)
    assert access[-2]["method"] == "other"
    assert access[-1]["levelno"] == logging.DEBUG
    refused = [vars(r) for r in records if r.getMessage() == "credentials were refused"]
    assert [(r["why"], r["key"]) for r in refused] == [("secret", key_id), ("malformed", "-")]
    failures = [r for r in records if r.getMessage() == "a request failed"]
    assert [vars(r)["why"] for r in failures] == ["ValueError"] * 2
    assert all(vars(r)["place"].startswith("test_requests.py:") for r in failures)


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (not_found(), "not-found"),
        (AuditUnavailableError("away"), "audit-unavailable"),
        (StoreUnavailableError("away"), "store-unavailable"),
        (KafkaConnectionError("away"), "log-unavailable"),
        (ValueError("secret-account"), "internal"),
    ],
)
def test_errors_of_services_become_problems(error: Exception, name: str) -> None:
    async def fail(scope: AsgiScope, receive: Receive, send: Send) -> None:
        raise error

    answer = asyncio.run(call(RequestLog(fail)))
    assert answer.problem == name
    assert b"secret" not in answer.body


def test_the_route_is_the_template_of_either_framework() -> None:
    class Route:
        path = "/v1/scores/{id}"

    assert route_of({"route": Route(), "path": "/v1/scores/T1"}) == "/v1/scores/{id}"
    assert route_of({"path_template": "/v1/x/{y}", "path": "/v1/x/T1"}) == "/v1/x/{y}"
    assert route_of({"path": "/v1/scores/T1"}) == "(none)"


def test_a_websocket_is_closed_before_any_application_sees_it() -> None:
    sent: list[AsgiMessage] = []

    async def never(scope: AsgiScope, receive: Receive, send: Send) -> None:
        raise AssertionError

    async def receive() -> AsgiMessage:
        return {"type": "websocket.connect"}

    async def send(message: AsgiMessage) -> None:
        sent.append(message)

    asyncio.run(RequestLog(never)({"type": "websocket", "path": "/v1/alerts"}, receive, send))

    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_the_store_of_keys_is_shared_by_gateways(redis_server: Redis) -> None:
    """Each finds the other's key, and both take from one limit."""

    async def run() -> None:
        settings = settings_of(redis_server, gateway_default_rate="4/h")
        async with gateway(settings) as (first, store), gateway(settings) as (second, _):
            assert isinstance(store, ApiKeyStore)
            _, token = await add_key(store)
            statuses = [
                (await call(app, token=token)).status for app in (first, second, first, second)
            ]
            assert statuses == [200] * 4
            assert (await call(first, token=token)).status == 429
            assert (await call(second, token=token)).status == 429

    asyncio.run(run())
