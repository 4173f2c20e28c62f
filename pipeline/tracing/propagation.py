"""Trace context between processes: from headers, and into headers.

They need OpenTelemetry's API alone. Without an SDK, :func:`inject` forwards what :func:`extract`
found, so a context passes through a process that does not trace.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pipeline.messages.trace_context import (
    TRACEPARENT,
    TRACESTATE,
    TRACESTATE_MAX_BYTES,
    is_valid,
)

_propagator = TraceContextTextMapPropagator()


def extract(headers: Iterable[tuple[str | bytes, str | bytes]]) -> Context:
    """Read the trace context from the headers of a record or of an HTTP request.

    Args:
        headers: names in any case, and values; the last one of a name counts.

    Returns:
        the context to begin a span in; an empty one if the headers have none.
    """
    found: dict[str, str] = {}
    for name, value in headers:
        text = name if isinstance(name, str) else name.decode("latin-1")
        text = text.lower()
        if text in (TRACEPARENT, TRACESTATE):
            found[text] = value if isinstance(value, str) else value.decode("latin-1")
    parent, state = found.get(TRACEPARENT, ""), found.get(TRACESTATE, "")
    if not is_valid(parent.encode("latin-1", "replace")):
        return Context()
    carrier = {TRACEPARENT: parent}
    if state and len(state) <= TRACESTATE_MAX_BYTES:
        carrier[TRACESTATE] = state
    return _propagator.extract(carrier, Context())


def inject(headers: list[tuple[str, bytes]], context: Context | None = None) -> None:
    """Append the trace context to a record's headers; nothing if there is none.

    Args:
        headers: of a record to produce; older headers of a trace context are removed.
        context: what :func:`extract` returned, or a span's context; None for the current one.
    """
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, context)
    if carrier:
        headers[:] = [header for header in headers if header[0] not in (TRACEPARENT, TRACESTATE)]
        headers += [(name, value.encode("latin-1")) for name, value in carrier.items()]


def inject_http(headers: MutableMapping[str, str], context: Context | None = None) -> None:
    """Set the trace context in the headers of an HTTP request; nothing if there is none.

    Args:
        headers: of a request to send.
        context: see :func:`inject`.
    """
    _propagator.inject(headers, context)
