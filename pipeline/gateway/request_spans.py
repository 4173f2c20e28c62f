"""Trace context of score requests: from their headers, through a span, into the records."""

from __future__ import annotations

from pipeline.gateway.context import AnswerStatus, AsgiApp, AsgiScope, Receive, Send, context_of
from pipeline.gateway.request_limits import ClientGoneError
from pipeline.gateway.request_log import problem_of
from pipeline.messages.trace_context import Headers, request_context
from pipeline.tracing.http_spans import HttpTracer

TRACED_ROUTES = frozenset({"/v1/scores", "/v1/scores/batch"})
"""Routes whose POST requests produce transactions."""

SERVER_ERROR = 500
"""Least status that counts as an error of a server's span."""


def record_context(scope: AsgiScope) -> Headers:
    """Return the trace context for the records of a request: its span's, or the caller's."""
    trace = context_of(scope).trace
    return request_context(scope["headers"]) if trace is None else trace


class TracedRequests:
    """ASGI middleware: a server span for each score request of an authenticated caller.

    Args:
        app: the next application.
        tracer: makes the spans.
    """

    def __init__(self, app: AsgiApp, tracer: HttpTracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Serve a request, or raise its problem."""
        path = scope["path"] if scope["type"] == "http" and scope["method"] == "POST" else ""
        if path not in TRACED_ROUTES:
            await self._app(scope, receive, send)
            return
        given = request_context(scope["headers"])
        span = self._tracer.serve("POST", path, scope.get("scheme", "http"), given)
        context_of(scope).trace = span.headers
        answer, error = AnswerStatus(send), None
        status = None
        try:
            await self._app(scope, receive, answer)
        except ClientGoneError:
            error = "client_gone"
            raise
        except Exception as raised:
            kind = problem_of(raised).kind
            status = kind.status
            error = kind.name if kind.status >= SERVER_ERROR else None
            raise
        finally:
            span.end(answer.status or status, error)
