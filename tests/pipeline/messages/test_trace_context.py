"""Which headers of a trace context an output carries."""

from __future__ import annotations

import pytest

from pipeline.messages.trace_context import (
    TRACESTATE_MAX_BYTES,
    context_headers,
    request_context,
    trace_of,
)

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01".encode()


def test_parent_and_state_are_carried_byte_for_byte_and_nothing_else_is() -> None:
    headers = [("recur-history", b"1"), ("tracestate", b"a=1"), ("traceparent", PARENT)]

    assert context_headers(headers) == (("traceparent", PARENT), ("tracestate", b"a=1"))


@pytest.mark.parametrize(
    "parent",
    [
        b"",
        b"\xff\x00",
        PARENT.upper(),
        PARENT + b"-more",
        PARENT[:-1],
        b"ff" + PARENT[2:],
        b"00-" + b"0" * 32 + PARENT[35:],
        PARENT[:36] + b"0" * 16 + b"-01",
        b"01" + PARENT[2:] + b"-" + b"x" * 200,
        b"01" + PARENT[2:] + b"-\xff",
        b"01" + PARENT[2:] + b"-a\r\nb: c",
    ],
)
def test_an_invalid_parent_is_not_carried(parent: bytes) -> None:
    assert context_headers([("traceparent", parent), ("tracestate", b"a=1")]) == ()
    assert trace_of([("traceparent", parent)]) is None


def test_a_parent_of_a_later_version_is_carried() -> None:
    later = b"01" + PARENT[2:] + b"-more"

    assert context_headers([("traceparent", later)]) == (("traceparent", later),)


def test_a_state_over_the_limit_is_left_out() -> None:
    longest = b"x" * TRACESTATE_MAX_BYTES

    assert len(context_headers([("traceparent", PARENT), ("tracestate", longest)])) == 2
    assert len(context_headers([("traceparent", PARENT), ("tracestate", longest + b"x")])) == 1


def test_a_state_with_other_than_printable_characters_is_left_out() -> None:
    for state in (b"a=\xff", b"a=1\r\nb: c", b"\x00"):
        assert len(context_headers([("traceparent", PARENT), ("tracestate", state)])) == 1


def test_a_request_with_two_parents_has_no_context_and_its_states_are_joined() -> None:
    parent, states = (b"traceparent", PARENT), [(b"tracestate", b"a=1"), (b"tracestate", b"b=2")]

    assert request_context([parent, parent, *states]) == ()
    assert request_context([(b"host", b"x"), *states]) == ()
    found = request_context([(b"host", b"x"), parent, *states])
    assert found == (("traceparent", PARENT), ("tracestate", b"a=1,b=2"))
    assert request_context([parent]) == (("traceparent", PARENT),)


def test_the_trace_and_whether_it_is_sampled_are_read() -> None:
    assert trace_of([("traceparent", PARENT)]) == (TRACE, True)
    assert trace_of([("traceparent", PARENT[:-2] + b"00")]) == (TRACE, False)
    assert trace_of([]) is None
