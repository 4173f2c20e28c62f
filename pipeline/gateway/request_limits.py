"""Limits of each request, as ASGI middleware: open requests, bytes, depth, time, concurrency.

A body is read whole, within its time, before the application sees it. So a slow client holds a
place among the open requests, and none among those that work.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Collection

from pipeline.gateway.authentication import PUBLIC_PATHS
from pipeline.gateway.context import AsgiApp, AsgiMessage, AsgiScope, Receive, Send
from pipeline.gateway.problems import (
    NOT_JSON,
    OVERLOADED,
    SLOW_REQUEST,
    TIMED_OUT,
    TOO_DEEP,
    TOO_LARGE,
    UNSUPPORTED_MEDIA_TYPE,
    FieldError,
    Problem,
)
from pipeline.settings import Settings

# A text without an end takes all the rest: searching for each of its quotes again would take
# quadratic time.
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_EMPTY_PAIR = re.compile(rb"\[\]|\{\}")


class ClientGoneError(Exception):
    """The client hung up before its body was whole."""


def json_depth_exceeds(body: bytes, depth_max: int) -> bool:
    """Tell whether arrays and objects lie deeper in each other than allowed.

    A decoder would find it out by recursion. Brackets that do not match count as too deep.

    >>> json_depth_exceeds(b'{"a": [1, "[[["]}', 2), json_depth_exceeds(b"[[[]]]", 2)
    (False, True)
    """
    if body.count(b"[") + body.count(b"{") <= depth_max:  # almost always
        return False
    brackets = _STRINGS.sub(b"", body).translate(None, _NO_BRACKETS)
    for _ in range(depth_max):  # each time the innermost ones vanish
        brackets = _EMPTY_PAIR.sub(b"", brackets)
    return bool(brackets)


class Admission:
    """ASGI middleware: refuses requests over the number that may be open in any phase.

    Args:
        app: the next application.
        open_max: most open requests.
        public_paths: paths that are always served, so that health is visible under load.
    """

    def __init__(
        self, app: AsgiApp, open_max: int, public_paths: Collection[str] = PUBLIC_PATHS
    ) -> None:
        self._app = app
        self._open_max = open_max
        self._public = frozenset(public_paths)
        self.open = 0

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Serve a request, or raise its problem (503)."""
        if scope["type"] != "http" or scope["path"] in self._public:
            await self._app(scope, receive, send)
            return
        if self.open >= self._open_max:
            raise Problem(OVERLOADED)
        self.open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.open -= 1


class RequestLimits:
    """ASGI middleware: limits bytes, depth and time of each request, and how many work at once.

    An application that is cancelled at the end of its time must leave nothing half done: a
    transaction that Kafka may have is found again by its id.

    Args:
        app: the next application.
        settings: the limits.

    Attributes:
        working: requests in the application now.
    """

    def __init__(self, app: AsgiApp, settings: Settings) -> None:
        self._app = app
        self._body_max = settings.gateway_max_body_bytes
        self._depth_max = settings.gateway_max_json_depth
        self._body_seconds = settings.gateway_body_timeout_seconds
        self._request_seconds = settings.gateway_request_timeout_seconds
        self._working_max = settings.gateway_max_concurrent_requests
        self.working = 0

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Serve a request, or raise its problem."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = await self._body(scope, receive)
        if json_depth_exceeds(body, self._depth_max):
            raise Problem(
                TOO_DEEP,
                f"brackets must match, and at most {self._depth_max} may lie in each other",
                errors=[FieldError("nested too deeply", pointer="")],
            )
        if self.working >= self._working_max:
            raise Problem(OVERLOADED)
        self.working += 1
        try:
            await self._serve(scope, _Replay(body, receive), send)
        finally:
            self.working -= 1

    async def _serve(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: AsgiMessage) -> None:
            nonlocal started
            started = True
            await send(message)

        limit = asyncio.timeout(self._request_seconds)
        try:
            async with limit:
                await self._app(scope, receive, watch)
        except TimeoutError as error:
            # Another TimeoutError is the application's own. After the start of a response only
            # the end of the connection tells the client.
            if limit.expired() and not started:
                raise Problem(TIMED_OUT) from error
            raise

    async def _body(self, scope: AsgiScope, receive: Receive) -> bytes:
        """Receive the whole body.

        Raises:
            Problem: it is too large, too slow, or in an encoding.
            ClientGoneError: the client hung up.
        """
        headers = dict(scope["headers"])
        encoding = headers.get(b"content-encoding", b"identity")
        if encoding.lower() != b"identity":
            raise Problem(
                UNSUPPORTED_MEDIA_TYPE,
                "send the body without an encoding",
                errors=[FieldError("only identity is supported", header="Content-Encoding")],
                headers=((b"accept-encoding", b"identity"),),
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 15 or int(length) > self._body_max):
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        deadline = time.monotonic() + self._body_seconds
        while True:
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    message = await receive()
            except TimeoutError as error:
                raise Problem(SLOW_REQUEST, headers=((b"connection", b"close"),)) from error
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            size += len(part)
            if size > self._body_max:
                raise self._too_large()
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> Problem:
        return Problem(
            TOO_LARGE,
            f"the body may have {self._body_max} bytes",
            errors=[FieldError("too large", pointer="")],
            headers=((b"connection", b"close"),),
        )


class _Replay:
    """Gives the application the body that was received, and then what follows it."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> AsgiMessage:
        body, self._body = self._body, None
        if body is None:
            return await self._receive()
        return {"type": "http.request", "body": body, "more_body": False}


def check_json(body: bytes) -> None:
    """Refuse a body that is empty where JSON is needed.

    Raises:
        Problem: 400.
    """
    if not body.strip():
        raise Problem(NOT_JSON, "the body is empty", errors=[FieldError("empty", pointer="")])
