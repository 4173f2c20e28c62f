"""Spans of requests, and the context that they hand on."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from pipeline.messages.trace_context import trace_of
from pipeline.settings import load_settings
from pipeline.tracing.http_spans import HttpTracer
from pipeline.tracing.provider import Tracing

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01".encode()
SAMPLED = (("traceparent", PARENT), ("tracestate", b"a=1"))
UNSAMPLED = (("traceparent", PARENT[:-1] + b"0"),)


class Traces:
    """A tracer whose spans stay in memory."""

    def __init__(self, ratio: float) -> None:
        self._exporter = InMemorySpanExporter()
        settings = load_settings(tracing=True, trace_sample_ratio=ratio)
        self._tracing = Tracing(settings, "recur-gateway", self._exporter)
        self.tracer = HttpTracer(self._tracing.tracer)

    def finished(self) -> list[ReadableSpan]:
        """Return the finished spans."""
        self._tracing._provider.force_flush()
        return list(self._exporter.get_finished_spans())


@pytest.fixture(params=[0.0, 1.0])
def traces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Traces:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    return Traces(request.param)


def test_a_sampled_request_has_a_server_span_whatever_the_ratio_is(traces: Traces) -> None:
    span = traces.tracer.serve("POST", "/v1/scores", "http", SAMPLED)
    span.end(200)

    (found,) = traces.finished()
    assert (found.name, found.kind) == ("POST /v1/scores", SpanKind.SERVER)
    assert dict(found.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/scores",
        "url.path": "/v1/scores",
        "url.scheme": "http",
        "http.response.status_code": 200,
    }
    assert found.status.status_code is StatusCode.UNSET
    assert found.context is not None
    own = f"00-{TRACE}-{found.context.span_id:016x}-01".encode()
    assert span.headers == (("traceparent", own), ("tracestate", b"a=1"))


def test_an_unsampled_context_is_handed_on_as_it_came(traces: Traces) -> None:
    span = traces.tracer.serve("POST", "/v1/scores", "http", UNSAMPLED)
    span.end(200)

    assert span.headers == UNSAMPLED
    assert not traces.finished()


@pytest.mark.parametrize("traces", [1.0], indirect=True)
def test_a_request_without_a_context_begins_a_trace_by_the_ratio(traces: Traces) -> None:
    span = traces.tracer.serve("POST", "/v1/scores", "http", ())
    span.end(503, "overloaded")

    (found,) = traces.finished()
    assert found.parent is None
    assert found.context is not None
    assert trace_of(span.headers) == (f"{found.context.trace_id:032x}", True)
    assert found.status.status_code is StatusCode.ERROR
    assert (found.attributes or {})["error.type"] == "overloaded"


@pytest.mark.parametrize("traces", [0.0], indirect=True)
def test_a_request_without_a_context_costs_no_header_outside_the_ratio(traces: Traces) -> None:
    span = traces.tracer.serve("POST", "/v1/scores", "http", ())
    span.end(200)

    assert span.headers == ()
    assert not traces.finished()


def test_an_attempt_has_a_client_span_that_names_the_endpoint_and_no_address(
    traces: Traces,
) -> None:
    for resends in (0, 2):
        span = traces.tracer.deliver("cases", resends, SAMPLED)
        span.end(None, "timeout")

    first, again = traces.finished()
    assert (first.name, first.kind) == ("POST", SpanKind.CLIENT)
    assert dict(first.attributes or {}) == {
        "http.request.method": "POST",
        "recur.webhook.endpoint": "cases",
        "error.type": "timeout",
    }
    assert (again.attributes or {})["http.request.resend_count"] == 2
    for found in (first, again):
        assert found.parent is not None
        assert f"{found.parent.trace_id:032x}" == TRACE
