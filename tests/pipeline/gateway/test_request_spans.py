"""Spans of score requests: who gets one, and what ends in it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pipeline.gateway.context import AsgiScope, Receive, Send
from pipeline.gateway.problems import INVALID_FIELDS, OVERLOADED, Problem
from pipeline.gateway.protection import make_authenticator, make_limiter, protect
from pipeline.gateway.request_spans import record_context
from pipeline.local.redis import Redis
from pipeline.messages.trace_context import Headers, trace_of
from pipeline.settings import load_settings
from pipeline.tracing.http_spans import HttpTracer
from pipeline.tracing.provider import Tracing
from tests.pipeline.gateway.calls import add_key, call, echo, key_store

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01".encode()
FAILURES: dict[bytes, Exception] = {
    b"busy": Problem(OVERLOADED),
    b"wrong": Problem(INVALID_FIELDS),
    b"defect": ValueError("secret-account"),
}


def test_an_authenticated_score_request_has_a_span_and_no_other_request(
    redis_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    settings = load_settings(redis_url=redis_server.url, tracing=True, trace_sample_ratio=1)
    exporter = InMemorySpanExporter()
    tracing = Tracing(settings, "recur-gateway", exporter)
    contexts: list[Headers] = []

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        contexts.append(record_context(scope))
        for name, value in scope["headers"]:
            if name == b"x-fail":
                raise FAILURES[value]
        await echo(scope, receive, send)

    async def run() -> list[int]:
        async with key_store(settings) as (client, store):
            _, token = await add_key(store, "score")
            protected = protect(
                app,
                settings,
                make_authenticator(settings, client),
                make_limiter(settings, client),
                tracer=HttpTracer(tracing.tracer),
            )
            parent = [(b"traceparent", PARENT)]
            calls: list[dict[str, Any]] = [
                {"headers": parent},
                {"headers": parent, "token": "recur_0000000000000000_" + "x" * 43},
                {"headers": parent, "token": token},
                {"headers": [(b"traceparent", b"00-no-context")], "token": token},
                {"headers": parent, "token": token, "path": "/v1/what-if"},
                {"headers": parent, "token": token, "path": "/v1/scores/t-1", "method": "GET"},
                {"path": "/v1/scores/batch", "token": token},
                *({"headers": [(b"x-fail", name)], "token": token} for name in FAILURES),
            ]
            return [(await call(protected, **each)).status for each in calls]

    assert asyncio.run(run()) == [401, 401, 200, 200, 200, 200, 200, 503, 422, 500]
    tracing._provider.force_flush()
    spans = exporter.get_finished_spans()
    ends = [
        (
            span.name,
            span.parent is not None,
            (span.attributes or {})["http.response.status_code"],
            (span.attributes or {}).get("error.type"),
        )
        for span in spans
    ]
    assert ends == [
        ("POST /v1/scores", True, 200, None),
        ("POST /v1/scores", False, 200, None),
        ("POST /v1/scores/batch", False, 200, None),
        ("POST /v1/scores", False, 503, "overloaded"),
        ("POST /v1/scores", False, 422, None),
        ("POST /v1/scores", False, 500, "internal"),
    ]
    traced = [trace_of(headers) for headers in (*contexts[:2], *contexts[4:])]
    assert traced == [(f"{s.context.trace_id:032x}", True) for s in spans if s.context]
    assert traced[0] == (TRACE, True)
    assert contexts[2:4] == [(("traceparent", PARENT),)] * 2  # no span: the caller's own
    assert "secret-account" not in "".join(span.to_json() for span in spans)


def test_without_tracing_the_records_carry_the_callers_context(redis_server: Redis) -> None:
    settings = load_settings(redis_url=redis_server.url)
    contexts: list[Headers] = []

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        contexts.append(record_context(scope))
        await echo(scope, receive, send)

    async def run() -> None:
        async with key_store(settings) as (client, store):
            _, token = await add_key(store, "score")
            authenticator = make_authenticator(settings, client)
            protected = protect(app, settings, authenticator, make_limiter(settings, client))
            for headers in ([(b"traceparent", PARENT)], [], [(b"traceparent", PARENT)] * 2):
                assert (await call(protected, token=token, headers=headers)).status == 200

    asyncio.run(run())
    assert contexts == [(("traceparent", PARENT),), (), ()]
