"""Outermost middleware: request ids, the access log, and the response to each problem.

A line of the access log has the route's template, never the path: a path holds account and
transaction ids. It has neither query, payload nor headers. The server's own access log writes
paths, so it must be off (``access_log=False`` of uvicorn).
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Collection
from pathlib import Path

from aiokafka.errors import KafkaError

from pipeline.gateway.audit import AuditUnavailableError
from pipeline.gateway.context import (
    CONTEXT_KEY,
    AsgiApp,
    AsgiMessage,
    AsgiScope,
    Receive,
    RequestContext,
    Send,
    request_id_of,
)
from pipeline.gateway.problems import (
    AUDIT_UNAVAILABLE,
    INTERNAL,
    LOG_UNAVAILABLE,
    STORE_UNAVAILABLE,
    Problem,
)
from pipeline.gateway.request_limits import ClientGoneError
from pipeline.storage.client import StoreUnavailableError

QUIET_PATHS = frozenset({"/live", "/ready", "/metrics"})
"""Paths whose answered requests are logged at debug: probes ask every few seconds."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Methods that the log names. A client may send any text as its method."""

POLICY_VIOLATION = 1008
"""WebSocket's code for a connection that the server does not take."""

NO_ROUTE = "(none)"

log = logging.getLogger(__name__)
access_log = logging.getLogger("pipeline.gateway.access")


def route_of(scope: AsgiScope) -> str:
    """Return the template of the route that served a request, such as ``/v1/scores/{id}``.

    The router of Litestar leaves it as ``path_template``, that of FastAPI in ``route``.
    """
    template = scope.get("path_template") or getattr(scope.get("route"), "path", None)
    return template if isinstance(template, str) else NO_ROUTE


def problem_of(error: Exception) -> Problem:
    """Return the problem to answer with when a handler fails.

    For exception handlers of the framework, too: they make the same responses then.
    """
    if isinstance(error, Problem):
        return error
    if isinstance(error, AuditUnavailableError):
        return Problem(AUDIT_UNAVAILABLE)
    if isinstance(error, StoreUnavailableError):
        return Problem(STORE_UNAVAILABLE)
    if isinstance(error, KafkaError):
        return Problem(LOG_UNAVAILABLE)
    return Problem(INTERNAL)


class RequestLog:
    """ASGI middleware: gives each request an id and a log line, and answers with its problem.

    Args:
        app: the next application. A Problem that it raises becomes the response.
        quiet_paths: paths whose requests are logged at debug.
    """

    def __init__(self, app: AsgiApp, quiet_paths: Collection[str] = QUIET_PATHS) -> None:
        self._app = app
        self._quiet = frozenset(quiet_paths)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Serve a request; raise nothing but the server's own errors."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no middleware behind this one knows WebSockets
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
            return
        began = time.perf_counter()
        context = scope[CONTEXT_KEY] = RequestContext(request_id_of(scope["headers"]))
        status = 0

        async def answer(message: AsgiMessage) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), *_missing(context, message)]
                message = {**message, "headers": headers}
            await send(message)

        try:
            try:
                await self._app(scope, receive, answer)
            except ClientGoneError:
                status = status or 499  # as nginx writes it: nobody is left to read an answer
            except Exception as error:
                problem = problem_of(error)
                if problem.kind is INTERNAL:
                    _log_failure(error, context, status)
                await self._send_problem(context, problem, status, answer)
        finally:
            self._write(scope, context, status, began)

    async def _send_problem(
        self, context: RequestContext, problem: Problem, status: int, send: Send
    ) -> None:
        if status:
            return  # in the middle of a response: the server ends the connection
        context.problem = problem.kind.name
        body = problem.body(context.request_id)
        length = (b"content-length", b"%d" % len(body))
        headers = [*problem.headers(), length]
        start = {"type": "http.response.start", "status": problem.kind.status, "headers": headers}
        await send(start)
        await send({"type": "http.response.body", "body": body})

    def _write(self, scope: AsgiScope, context: RequestContext, status: int, began: float) -> None:
        is_quiet = scope["path"] in self._quiet and status < 400
        level = logging.DEBUG if is_quiet else logging.INFO
        if not access_log.isEnabledFor(level):
            return
        method = scope["method"]
        access_log.log(
            level,
            "request",
            extra={
                "method": method if method in METHODS else "other",
                "route": route_of(scope),
                "status": status,
                "ms": round((time.perf_counter() - began) * 1000, 2),
                "key": context.principal.label if context.principal else "-",
                "request_id": context.request_id,
            },
        )


def _log_failure(error: Exception, context: RequestContext, status: int) -> None:
    """Log a failure without its text and traceback, which may quote the request."""
    extra = {"why": type(error).__name__, "request_id": context.request_id}
    if status and isinstance(error, TimeoutError):
        log.warning("the client did not read its response in time", extra=extra)
        return
    place = traceback.extract_tb(error.__traceback__)[-1]
    extra["place"] = f"{Path(place.filename).name}:{place.lineno}"
    log.error("a request failed", extra=extra)


def _missing(context: RequestContext, message: AsgiMessage) -> list[tuple[bytes, bytes]]:
    """Return the context's headers that the response does not have already."""
    present = {name.lower() for name, _ in message.get("headers", ())}
    wanted = [(b"x-request-id", context.request_id.encode()), *context.headers]
    return [(name, value) for name, value in wanted if name not in present]
