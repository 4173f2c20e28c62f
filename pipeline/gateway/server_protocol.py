"""uvicorn's HTTP protocol with a time limit for a request's head, and other bounds.

uvicorn (0.54) limits idle connections after a response, but waits without end for the first bytes
of a request and for the rest of its headers. It bounds no requests that a client sends without
waiting for answers, and tells only the last of them that the client is gone. At its end it waits
for the goodbye of each idle client that speaks TLS.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from pipeline.gateway.context import request_id_of
from pipeline.gateway.problems import HEAD_TOO_LARGE, NOT_HTTP, Problem

HEAD_SECONDS = 10.0
"""Longest time from the start of a connection, or of a request's head, to the head's end."""

HEAD_MAX_BYTES = 131_072
"""Most bytes of a head. uvicorn bounds it with h11 only, not with httptools."""

PIPELINED_MAX = 100
"""Most requests that wait behind the one that is served; then the connection ends."""

GOODBYE_SECONDS = 1.0
"""Longest time in which an idle client answers the end of TLS when the gateway stops."""


class HeadLimitedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Protocol that closes a connection whose request's head does not arrive in time.

    Give it to uvicorn as ``Config(http=HeadLimitedProtocol)``.
    """

    head_seconds = HEAD_SECONDS

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP with a problem, and close the connection."""
        self._refuse(b"400 Bad Request", Problem(NOT_HTTP))

    def _refuse(self, status: bytes, problem: Problem) -> None:
        body = problem.body(request_id_of(()))
        lines = [b"HTTP/1.1 " + status, b"connection: close", b"content-length: %d" % len(body)]
        lines += [name + b": " + value for name, value in problem.headers()]
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        self.transport.close()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._served: Any = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a head."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Handle bytes, and wait for the rest of a head that is not whole."""
        self._head_bytes += len(data)
        super().data_received(data)
        if len(getattr(self, "pipeline", ())) > PIPELINED_MAX:
            self.transport.abort()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:  # its body has a limit of its own
            self._cancel()
        elif self._head_bytes > HEAD_MAX_BYTES and not self.transport.is_closing():
            self._refuse(b"431 Request Header Fields Too Large", Problem(HEAD_TOO_LARGE))
        elif self._head_timer is None and not self.transport.is_closing():
            self._expect_head()

    def on_response_complete(self) -> None:
        """Go on to the next request, whose head may be here in part."""
        super().on_response_complete()
        if not self.transport.is_closing() and self.timeout_keep_alive_task is None:
            self._expect_head()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._served = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, error: Exception | None) -> None:
        """End with the connection, and tell the request that is served."""
        self._cancel()
        served = self._served
        if served is not None and not served.response_complete:
            served.disconnected = True
            served.message_event.set()
        super().connection_lost(error)

    def shutdown(self) -> None:
        """Close the connection once it is idle."""
        super().shutdown()
        if self.transport.is_closing():
            self.loop.call_later(GOODBYE_SECONDS, self.transport.abort)

    def _expect_head(self) -> None:
        self._cancel()
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self.head_seconds, self._close)

    def _cancel(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close(self) -> None:
        self._head_timer = None
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self.transport.abort()
