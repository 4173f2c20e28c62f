"""The HTTP application: Litestar's router between the gateway's own middlewares and handlers."""

from __future__ import annotations

import time
from typing import Any, NoReturn, cast

from litestar import Litestar, Request
from litestar.exceptions import HTTPException, MethodNotAllowedException

from pipeline.gateway.authentication import PUBLIC_PATHS
from pipeline.gateway.context import AnswerStatus, AsgiApp, AsgiScope, Receive, Send, context_of
from pipeline.gateway.docs_page import render_page
from pipeline.gateway.gateway_metrics import GatewayMetrics
from pipeline.gateway.openapi import make_document
from pipeline.gateway.problems import INTERNAL, METHOD_NOT_ALLOWED, NOT_FOUND, Problem
from pipeline.gateway.protection import protect
from pipeline.gateway.request_log import route_of
from pipeline.gateway.routes import make_routes, problem_from
from pipeline.gateway.service import Gateway
from pipeline.tracing.http_spans import HttpTracer

OPEN_PATHS = PUBLIC_PATHS | {"/docs", "/openapi.json"}
"""Paths without credentials: they tell nothing of any account."""


def make_app(gateway: Gateway, tracer: HttpTracer | None = None) -> AsgiApp:
    """Make the application of a gateway; the caller starts and stops the gateway's parts.

    Args:
        gateway: the services.
        tracer: makes spans of score requests; None without tracing.
    """
    document = make_document(gateway.settings, gateway.checkpoint)

    app = Litestar(
        make_routes(gateway, document, render_page(document)),
        openapi_config=None,
        logging_config=None,
        request_max_body_size=None,  # the middleware has read it already
        exception_handlers={Exception: _hand_on},
    )
    protected = protect(
        cast("AsgiApp", app),
        gateway.settings,
        gateway.authenticator,
        gateway.limiter,
        OPEN_PATHS,
        tracer,
    )
    return Measured(protected, gateway.metrics)


def _hand_on(request: Request[Any, Any, Any], error: Exception) -> NoReturn:
    """Leave each error to the outermost middleware, as a problem where it is one.

    Raises:
        Exception: always.
    """
    if isinstance(error, MethodNotAllowedException):
        allowed = ", ".join(sorted(_methods_of(request)))
        raise Problem(METHOD_NOT_ALLOWED, headers=((b"allow", allowed.encode()),)) from error
    if isinstance(error, HTTPException) and error.status_code == NOT_FOUND.status:
        raise Problem(NOT_FOUND) from error
    if isinstance(error, HTTPException):
        raise Problem(INTERNAL) from error
    raise problem_from(error) from error


def _methods_of(request: Request[Any, Any, Any]) -> set[str]:
    """Return the methods of the routes that have a request's path."""
    path = request.scope["path"].rstrip("/")
    found: set[str] = set()
    for route in request.app.routes:
        fixed, is_open, _ = route.path.partition("{")
        if path == route.path or (is_open and path.startswith(fixed) and len(path) > len(fixed)):
            found |= getattr(route, "methods", set())
    return found


class Measured:
    """ASGI middleware that measures each request by its route's template and status.

    Args:
        app: the routes.
        metrics: monitoring.
    """

    def __init__(self, app: AsgiApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._seconds = metrics.requests
        self._problems = metrics.problems

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        answer = AnswerStatus(send)
        try:
            await self._app(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - began
            self._seconds.labels(route_of(scope), str(answer.status or 500)).observe(seconds)
            if (name := context_of(scope).problem) is not None:
                self._problems.labels(name).inc()
