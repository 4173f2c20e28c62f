"""Context of one request: its id, its principal, and headers for the response.

The middlewares share it under ``scope["recur"]`` of the ASGI scope; handlers read it there with
:func:`context_of`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.gateway.principal import Principal, Scope
from pipeline.gateway.problems import FORBIDDEN, UNAUTHENTICATED, Headers, Problem
from pipeline.messages.trace_context import Headers as TraceHeaders

AsgiScope = MutableMapping[str, Any]
AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]
AsgiApp = Callable[[AsgiScope, Receive, Send], Awaitable[None]]

CONTEXT_KEY = "recur"

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{8,64}")
_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-.{2}")


class AnswerStatus:
    """The sender of one answer, which notes its status.

    Attributes:
        status: HTTP status of the answer; None before it begins.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def __call__(self, message: AsgiMessage) -> None:
        """Send a message."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


@dataclass
class RequestContext:
    """One request.

    Attributes:
        request_id: names the request in the response, the log and the audit topic.
        principal: who makes it; None before they are authenticated and on public paths.
        headers: headers that the response gets besides its own.
        problem: name of the problem that the response tells.
        trace: trace context for the records of the request; None: what the caller sent.
    """

    request_id: str
    principal: Principal | None = None
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    problem: str | None = None
    trace: TraceHeaders | None = None

    def require(self, scope: Scope) -> Principal:
        """Return the principal if they have the scope.

        Raises:
            Problem: nobody is authenticated, or the scope is missing. ``admin`` has no other
                scope in it.
        """
        if self.principal is None:
            raise unauthenticated()
        if scope not in self.principal.scopes:
            detail = f"the credentials lack the scope {scope}"
            raise Problem(FORBIDDEN, detail, extensions={"scope": scope})
        return self.principal


def context_of(scope: AsgiScope) -> RequestContext:
    """Return the context of a request; a request that passed no middleware gets a new one."""
    found = scope.get(CONTEXT_KEY)
    if not isinstance(found, RequestContext):
        found = scope[CONTEXT_KEY] = RequestContext(request_id_of(scope.get("headers", ())))
    return found


def unauthenticated(detail: str = "", *, invalid: bool = False) -> Problem:
    """Make the problem for missing or invalid credentials.

    Args:
        detail: what is wrong with them.
        invalid: whether the request has credentials (RFC 6750 names the error then).
    """
    challenge = b'Bearer error="invalid_token"' if invalid else b"Bearer"
    headers: Headers = ((b"www-authenticate", challenge),)
    return Problem(UNAUTHENTICATED, detail, headers=headers)


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Take the id from a valid ``X-Request-Id``, else from ``traceparent``, else make one.

    >>> request_id_of([(b"x-request-id", b"order-4711-a")])
    'order-4711-a'
    >>> trace = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    >>> request_id_of([(b"traceparent", trace)])
    '0af7651916cd43dd8448eb211c80319c'
    """
    ids, traces = (
        [value for name, value in headers if name == wanted]
        for wanted in (b"x-request-id", b"traceparent")
    )
    if len(ids) == 1 and _REQUEST_ID.fullmatch(ids[0]):
        return ids[0].decode("ascii")
    if len(traces) == 1 and (found := _TRACEPARENT.match(traces[0])):
        return found[1].decode("ascii")
    return secrets.token_hex(16)
