"""The course of a call without any input or output: what to send, and how long to pause.

A call is a generator. It yields a :class:`Send` or a :class:`Pause`. It is sent the response to a
:class:`Send`, or the transport error in its place. It returns the body of the last response.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from recur_client.errors import (
    ConnectionLostError,
    DeadlineError,
    FieldProblem,
    PendingError,
    ProblemError,
)

RETRIED = frozenset({429, 500, 502, 503, 504})
PAUSE_FIRST_SECONDS, PAUSE_MAX_SECONDS = 0.1, 5.0
ATTEMPTS_MAX = 100
"""Most requests of one call."""

_RESET = re.compile(r"\bt=(\d{1,6})")
_EMPTY = re.compile(r"\br=0\b")


@dataclass(frozen=True)
class Send:
    """A request to send.

    Attributes:
        method: ``GET`` or ``POST``.
        path: path and query.
        body: JSON, or None.
        wait_seconds: longest wait of the gateway for a score; None leaves it to the gateway.
        timeout_seconds: time of this attempt.
    """

    method: str
    path: str
    body: bytes | None = None
    wait_seconds: int | None = None
    timeout_seconds: float = 0.0


@dataclass(frozen=True)
class Pause:
    """A pause in seconds."""

    seconds: float


Step = Send | Pause
Reply = httpx.Response | httpx.TransportError | None
Call = Generator[Step, Reply, Any]


def make_call(request: Send, timeout_seconds: float) -> Call:
    """Run a call until an answer, a final error or its deadline.

    Raises:
        ProblemError: the gateway refused the request, or failed until the deadline.
        PendingError: a score did not come in time.
        DeadlineError: no answer came in time.
        ConnectionLostError: the gateway could not be reached until the deadline.
    """
    deadline = time.monotonic() + timeout_seconds
    failures, location = 0, ""
    last: Exception = DeadlineError("no answer came in time")
    for _ in range(ATTEMPTS_MAX):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        reply = yield replace(request, timeout_seconds=left)
        if isinstance(reply, httpx.Response) and reply.status_code not in RETRIED:
            if reply.status_code == 202 and "location" in reply.headers:
                location, failures = _path_of(reply.headers["location"]), 0
                wait = max(0, min(5, int(deadline - time.monotonic()) - 1))
                request = Send("GET", location, wait_seconds=wait)
                pause = PAUSE_FIRST_SECONDS if wait else _retry_after(reply) or PAUSE_MAX_SECONDS
            elif reply.is_success:
                return reply.json()
            else:
                raise problem_of(reply)
        else:
            last, pause = _failure(reply, failures)
            failures += 1
        if pause >= deadline - time.monotonic():
            break
        yield Pause(pause)
    raise PendingError(location) if location else last


def _path_of(location: str) -> str:
    """Return a location if it is a path: the key must not go to another host.

    Raises:
        ProblemError: it is no path.
    """
    if not location.startswith("/") or location.startswith("//"):
        raise ProblemError(202, title="the location of the score is no path")
    return location


def _failure(reply: Reply, failures: int) -> tuple[Exception, float]:
    """Return the error that a failed attempt stands for, and the pause after it."""
    longest = min(PAUSE_FIRST_SECONDS * 2 ** min(failures, 20), PAUSE_MAX_SECONDS)
    pause = random.uniform(longest / 2, longest)
    if isinstance(reply, httpx.Response):
        asked = _retry_after(reply)
        return problem_of(reply), max(pause, asked or 0.0)
    if isinstance(reply, httpx.TimeoutException):
        return DeadlineError("no answer came in time"), pause
    return ConnectionLostError(type(reply).__name__), pause


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds that a response asks to wait; ``RateLimit`` counts if nothing is left."""
    value = response.headers.get("retry-after", "")
    if value.isascii() and value.isdigit() and len(value) < 7:
        return float(value)
    if value:
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:  # neither seconds nor a date
            pass
    limit = response.headers.get("ratelimit", "")
    reset = _RESET.search(limit)
    return float(reset[1]) if reset and _EMPTY.search(limit) else None


def problem_of(response: httpx.Response) -> ProblemError:
    """Read an error response; one without problem+json has its status alone."""
    try:
        body = response.json()
    except ValueError:  # a proxy's page
        body = None
    if not isinstance(body, dict):
        return ProblemError(response.status_code, title=response.reason_phrase)
    texts = {
        name: value if isinstance(value := body.get(name), str) else ""
        for name in ("title", "detail", "request_id", "reason")
    }
    kind = str(body.get("type", "")).rpartition("/")[2]
    found = body.get("errors")
    errors = tuple(
        FieldProblem(
            str(one.get("detail", "")), one.get("pointer"), one.get("parameter"), one.get("header")
        )
        for one in (found if isinstance(found, list) else ())
        if isinstance(one, dict)
    )
    return ProblemError(response.status_code, kind, errors=errors, **texts)
