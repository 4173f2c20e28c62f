"""HTTP server of a worker, for `/metrics`, `/live` and `/ready`, with the watchdog.

Both run in threads of their own, so they notice a stall even if the event loop hangs.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest

from pipeline.errors import StartupError
from pipeline.scoring.health import Health

log = logging.getLogger(__name__)

STALLED_EXIT_CODE = 75
"""Exit code of a process that the watchdog ended (EX_TEMPFAIL: try again)."""

CHECK_SECONDS = 0.5
"""Time between two checks of the watchdog."""

GRACE_SECONDS = 2.0
"""Time from `/live` turning false to the end of the process."""

NAME_PARAMETER = "name[]"
"""Parameter of `/metrics`, as in Prometheus's own clients: a sample's name, without labels."""


class _Server(ThreadingHTTPServer):
    """Server that logs a defect, but not a client that hung up."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            log.error("a request for health or metrics failed", exc_info=error)


class ServedMetrics(Protocol):
    """The metrics of a process, as the server needs them."""

    @property
    def registry(self) -> CollectorRegistry:
        """All of them."""

    @property
    def ready(self) -> Gauge:
        """Whether the process is ready; the server sets it."""


class HttpServer:
    """Server of a worker's health and metrics over HTTP.

    Args:
        host, port: address to listen on; port 0 takes a free one.
        end_process: called with an exit code when the worker is stalled.

    Raises:
        StartupError: the port is taken; the message says what to do.
    """

    def __init__(
        self,
        host: str,
        port: int,
        metrics: ServedMetrics,
        health: Health,
        end_process: Callable[[int], object] = os._exit,
    ) -> None:
        self._metrics = metrics
        self._health = health
        self._end_process = end_process
        self._stopped = threading.Event()
        try:
            self._server = _Server((host, port), self._handler())
        except OSError as error:
            raise StartupError(
                f"cannot listen on {host}:{port} ({error.strerror}): set RECUR_HTTP_PORT to "
                "another port, or to 0 for a free one"
            ) from error
        self._server.daemon_threads = True

    @property
    def address(self) -> str:
        """Address in use, ``host:port``."""
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    def start(self) -> None:
        """Start server and watchdog, in threads that end with the process."""
        for task in (self._server.serve_forever, self._watch):
            threading.Thread(target=task, daemon=True, name="recur-http").start()

    def stop(self) -> None:
        """Stop server and watchdog."""
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def _watch(self) -> None:
        while not self._stopped.wait(CHECK_SECONDS):
            self._metrics.ready.set(self._health.ready)
            if not self._health.live:
                log.critical(
                    "records wait, but processing has stopped; the process ends so that its "
                    "supervisor restarts it",
                    extra={"stalled_seconds": round(self._health.stalled_seconds(), 1)},
                )
                self._stopped.wait(GRACE_SECONDS)
                self._end_process(STALLED_EXIT_CODE)
                return

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        metrics, health = self._metrics, self._health

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = urlsplit(self.path)
                if asked.path == "/metrics":
                    page = _page(metrics.registry, asked.query)
                    self._answer(200, CONTENT_TYPE_LATEST, page)
                elif self.path == "/live":
                    live = health.live
                    stalled = round(health.stalled_seconds(), 1)
                    self._answer_json(live, {"live": live, "stalled_seconds": stalled})
                elif self.path == "/ready":
                    missing = health.missing()
                    self._answer_json(not missing, {"ready": not missing, "missing": missing})
                else:
                    self._answer(404, "text/plain", b"/metrics, /live or /ready\n")

            def _answer_json(self, good: bool, content: dict[str, object]) -> None:
                body = json.dumps(content).encode() + b"\n"
                self._answer(200 if good else 503, "application/json", body)

            def _answer(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Log no line for each request."""

        return Handler


def _page(registry: CollectorRegistry, query: str) -> bytes:
    """Print all samples, or only those with a name that the query asks for as ``name[]``.

    A whole page holds the interpreter's lock for milliseconds, in which no poll is computed.
    """
    names = parse_qs(query).get(NAME_PARAMETER)
    if names is None:
        return generate_latest(registry)
    return generate_latest(registry.restricted_registry(names))
