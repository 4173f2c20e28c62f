"""Trace context of a record, as W3C Trace Context level 1 writes it in headers.

A score and an alert carry the context of their transaction's record, byte for byte. So they are
the same when a record is delivered again, whether a worker traces or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

TRACEPARENT = "traceparent"
"""Header that names the trace, the span that caused the record, and whether it is sampled."""

TRACESTATE = "tracestate"
"""Header of what tracing systems add to it."""

TRACEPARENT_MAX_BYTES = 128
"""A longer one, of a later version than 00, is not forwarded."""

TRACESTATE_MAX_BYTES = 512
"""A longer one, or one with other than printable characters, is not forwarded."""

Headers = tuple[tuple[str, bytes], ...]

_VALID = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-[!-~]*)?"
)
_PRINTABLE = re.compile(rb"[ -~\t]+")
_HTTP_PARENT, _HTTP_STATE = TRACEPARENT.encode(), TRACESTATE.encode()
_PLAIN_LENGTH = 55
_FLAGS_AT = 53
_SAMPLED = 1


def context_headers(headers: Iterable[tuple[str, bytes]]) -> Headers:
    """Select the headers of the trace context that a record's output carries; none if invalid."""
    parent = state = None
    for name, value in headers:
        if name == TRACEPARENT:
            parent = value
        elif name == TRACESTATE:
            state = value
    if parent is None or not is_valid(parent):
        return ()
    if not state or len(state) > TRACESTATE_MAX_BYTES or not _PRINTABLE.fullmatch(state):
        return ((TRACEPARENT, parent),)
    return (TRACEPARENT, parent), (TRACESTATE, state)


def request_context(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Select the trace context of an HTTP request; none if it is invalid or there are several.

    Args:
        headers: names in lower case, and values.
    """
    parents, states = [], []
    for name, value in headers:
        if name == _HTTP_PARENT:
            parents.append(value)
        elif name == _HTTP_STATE:
            states.append(value)
    if len(parents) != 1:
        return ()
    return context_headers([(TRACEPARENT, parents[0]), (TRACESTATE, b",".join(states))])


def is_valid(traceparent: bytes) -> bool:
    """Tell whether a header's value names a trace and a span.

    >>> is_valid(b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
    True
    >>> is_valid(b"00-00000000000000000000000000000000-00f067aa0ba902b7-01")
    False
    """
    if len(traceparent) > TRACEPARENT_MAX_BYTES or _VALID.fullmatch(traceparent) is None:
        return False
    return len(traceparent) == _PLAIN_LENGTH or not traceparent.startswith(b"00")


def trace_of(headers: Iterable[tuple[str, bytes]]) -> tuple[str, bool] | None:
    """Return the id of a record's trace in hex, and whether it is sampled; None without one."""
    found = context_headers(headers)
    if not found:
        return None
    parent = found[0][1].decode("latin-1")
    return parent.split("-")[1], bool(int(parent[_FLAGS_AT : _FLAGS_AT + 2], 16) & _SAMPLED)
