"""Spans of HTTP requests: those that a gateway serves, and those that deliver a webhook.

Names and attributes follow OpenTelemetry's semantic conventions for HTTP. They hold no URL, path
parameter, account, payload or error message: a URL may hold a secret or an id.
"""

from __future__ import annotations

from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context

from pipeline.messages.trace_context import Headers
from pipeline.tracing.propagation import extract, inject

ENDPOINT = "recur.webhook.endpoint"
"""Attribute with the configured name of a webhook's endpoint."""


class HttpSpan:
    """The span of one request.

    Args:
        span: it may not be recorded.
        given: context that the request came with.

    Attributes:
        headers: context to hand on: the span's; the given one if the span is not recorded.
    """

    def __init__(self, span: Span, given: Headers) -> None:
        self._span = span
        self.headers = given
        if span.is_recording():
            own: list[tuple[str, bytes]] = []
            inject(own, set_span_in_context(span))
            self.headers = tuple(own)

    def end(self, status: int | None, error: str | None = None) -> None:
        """End the span.

        Args:
            status: the response's; None without one.
            error: a short name of what went wrong; None if nothing did.
        """
        if status is not None:
            self._span.set_attribute("http.response.status_code", status)
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class HttpTracer:
    """Spans of one process's requests.

    A request with a sampled context is always traced, and a ratio of those without any context.

    Args:
        tracer: OpenTelemetry's, with its sampler.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def serve(self, method: str, route: str, scheme: str, given: Headers) -> HttpSpan:
        """Begin the span of a request that this process serves.

        Args:
            method: of a known list.
            route: the path, which has no parameters.
            scheme: http or https.
            given: valid trace context of the request; empty without one.
        """
        attributes = {
            "http.request.method": method,
            "http.route": route,
            "url.path": route,
            "url.scheme": scheme,
        }
        span = self._tracer.start_span(
            f"{method} {route}",
            extract(given),
            kind=SpanKind.SERVER,
            attributes=attributes,
        )
        return HttpSpan(span, given)

    def deliver(self, endpoint: str, resends: int, given: Headers) -> HttpSpan:
        """Begin the span of an attempt to deliver a webhook.

        Args:
            endpoint: configured name of the endpoint.
            resends: number of failed attempts before this one.
            given: valid trace context of the alert; empty without one.
        """
        attributes: dict[str, str | int] = {"http.request.method": "POST", ENDPOINT: endpoint}
        if resends:
            attributes["http.request.resend_count"] = resends
        span = self._tracer.start_span(
            "POST",
            extract(given),
            kind=SpanKind.CLIENT,
            attributes=attributes,
        )
        return HttpSpan(span, given)
