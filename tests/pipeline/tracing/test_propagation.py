"""Trace context from headers and into headers, without an SDK."""

from __future__ import annotations

from opentelemetry.context import Context

from pipeline.tracing.propagation import extract, inject, inject_http

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_a_context_passes_from_a_request_to_a_record_and_to_a_request() -> None:
    record: list[tuple[str, bytes]] = [("recur-reply-to", b"g1"), ("traceparent", b"old")]
    inject(record, extract([(b"TraceParent", PARENT.encode()), (b"tracestate", b"a=1,b=2")]))

    assert record == [
        ("recur-reply-to", b"g1"),
        ("traceparent", PARENT.encode()),
        ("tracestate", b"a=1,b=2"),
    ]

    request = {"webhook-id": "1"}
    inject_http(request, extract(record))

    assert request == {"webhook-id": "1", "traceparent": PARENT, "tracestate": "a=1,b=2"}


def test_without_a_context_headers_stay_as_they_are() -> None:
    record: list[tuple[str, bytes]] = [("traceparent", b"kept")]
    inject(record, extract([("traceparent", "not one"), ("host", "x")]))
    inject(record, Context())
    request: dict[str, str] = {}
    inject_http(request, extract([]))

    assert record == [("traceparent", b"kept")]
    assert request == {}
