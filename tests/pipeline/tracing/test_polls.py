"""Spans of polls and alerts, and what outputs carry, with the real processor on fakes."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from pipeline.errors import SettingsError
from pipeline.kafka.producer import PublishError
from pipeline.messages.scores import decode_alert
from pipeline.settings import load_settings
from pipeline.tracing import polls
from pipeline.tracing.polls import PollTracer
from pipeline.tracing.provider import Tracing, start_tracing
from tests.fakes.memory_workers import World, finish
from tests.pipeline.scoring.helpers import die, one_poll, run_until_killed, when

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PAYLOAD = "a-transaction-id"


class TracedWorld:
    """A world whose workers trace into memory."""

    def __init__(self, ratio: float = 0.0, **settings: Any) -> None:
        self.world = World(topic_partitions=1, tracing=True, trace_sample_ratio=ratio, **settings)
        self._exporter = InMemorySpanExporter()
        self._tracing = Tracing(self.world.settings, "recur-worker", self._exporter)
        self.world.tracer = PollTracer(self._tracing.tracer, self.world.settings)

    def spans(self, name: str) -> list[ReadableSpan]:
        """Return the finished spans of a name."""
        self._tracing._provider.force_flush()
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    def everything(self) -> str:
        """Return all spans as JSON."""
        self._tracing._provider.force_flush()
        return "".join(span.to_json() for span in self._exporter.get_finished_spans())


def parent(number: int, *, sampled: bool = True) -> tuple[str, bytes]:
    """Make a traceparent header with a span id of this number."""
    return "traceparent", f"00-{TRACE}-{number:016x}-{int(sampled):02x}".encode()


@pytest.fixture(autouse=True)
def _export_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")


def produce_alerts(world: World, count: int) -> None:
    """Append transactions of one account, among them some that raise alerts."""
    for i in range(count):
        amount = 900.0 if i % 2 else 0.01
        world.produce("A", f"{PAYLOAD}-{i}", amount=amount, headers=[parent(i + 1)])


def test_a_poll_has_a_span_with_links_to_its_sampled_records_alone() -> None:
    traced = TracedWorld()
    world = traced.world
    world.produce("A", headers=[parent(1)])
    world.produce("B", headers=[parent(2, sampled=False)])
    world.produce("C")
    world.produce("D", headers=[("traceparent", b"no context"), ("other", b"1")])
    world.produce("E", headers=[parent(5), ("tracestate", b"vendor=1")])

    one_poll(world.worker())

    (span,) = traced.spans("process transactions")
    assert [link.context.span_id for link in span.links] == [1, 5]
    assert {f"{link.context.trace_id:032x}" for link in span.links} == {TRACE}
    assert span.links[1].context.trace_state.get("vendor") == "1"
    assert span.kind is SpanKind.CONSUMER
    assert dict(span.attributes or {}) == {
        "messaging.system": "kafka",
        "messaging.operation.type": "process",
        "messaging.operation.name": "process",
        "messaging.destination.name": "transactions",
        "messaging.destination.partition.id": "0",
        "messaging.consumer.group.name": "recur",
        "messaging.batch.message_count": 5,
    }
    assert [event.name for event in span.events] == ["computed"]
    assert span.resource.attributes["service.name"] == "recur-worker"


@pytest.mark.parametrize(("ratio", "spans"), [(0.0, 0), (1.0, 1)])
def test_a_poll_without_a_sampled_record_is_traced_by_the_ratio(ratio: float, spans: int) -> None:
    traced = TracedWorld(ratio)
    traced.world.produce("A", headers=[parent(1, sampled=False)])

    one_poll(traced.world.worker())

    assert len(traced.spans("process transactions")) == spans


@pytest.mark.parametrize(("ratio", "sampled", "spans"), [(0.0, True, 1), (1.0, False, 8)])
def test_alerts_of_other_records_have_spans_only_where_the_ratio_chose_the_poll(
    ratio: float, sampled: bool, spans: int
) -> None:
    traced = TracedWorld(ratio, review_threshold=0, decline_threshold=1)  # everything alerts
    for i in range(8):
        headers = [parent(i + 1, sampled=sampled and i == 1)]
        traced.world.produce(
            "A", f"{PAYLOAD}-{i}", amount=900.0 if i % 2 else 0.01, headers=headers
        )

    one_poll(traced.world.worker())

    assert len(traced.world.kafka.records("alerts")) == 8
    assert len(traced.spans("process transactions")) == 1
    assert len(traced.spans("send alerts")) == spans


@pytest.mark.parametrize("guarantee", ["at_least_once", "exactly_once"])
def test_each_alert_has_a_child_span_with_a_link_to_its_record(guarantee: str) -> None:
    traced = TracedWorld(processing_guarantee=guarantee)
    world = traced.world
    produce_alerts(world, 8)

    one_poll(world.worker())

    (poll,) = traced.spans("process transactions")
    children = traced.spans("send alerts")
    alerts = world.kafka.records("alerts")
    assert len(children) == len(alerts) > 0
    for child, alert in zip(children, alerts, strict=True):
        offset = int(decode_alert(alert.value or b"").source.rsplit(":", 1)[1])
        assert child.parent == poll.context
        assert [link.context.span_id for link in child.links] == [offset + 1]
        assert child.kind is SpanKind.PRODUCER
        assert (child.attributes or {})["messaging.destination.name"] == "alerts"
        assert (poll.start_time or 0) <= (child.start_time or 0) <= (child.end_time or 0)
    assert PAYLOAD not in traced.everything()
    assert '"A"' not in traced.everything()


def test_alerts_beyond_the_limit_have_no_span(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polls, "ALERT_SPANS_MAX", 2)
    monkeypatch.setattr(polls, "LINKS_MAX", 3)
    traced = TracedWorld()
    produce_alerts(traced.world, 8)

    one_poll(traced.world.worker())

    assert len(traced.world.kafka.records("alerts")) > 2
    assert len(traced.spans("send alerts")) == 2
    assert len(traced.spans("process transactions")[0].links) == 3


def test_a_poll_that_fails_has_a_span_with_the_error_s_class_alone() -> None:
    traced = TracedWorld(ratio=1.0)
    world = traced.world
    world.produce("A")
    worker = world.worker()

    def switch_off() -> None:
        raise PublishError("secret")

    world.interrupt(when("before publish scores", switch_off))
    with pytest.raises(PublishError):
        one_poll(worker)

    (span,) = traced.spans("process transactions")
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description is None
    assert "secret" not in traced.everything()
    assert (span.attributes or {})["error.type"] == "PublishError"
    assert [event.name for event in span.events] == ["computed"]


@pytest.mark.parametrize("tracing", [False, True])
def test_scores_and_alerts_carry_the_context_of_their_record(tracing: bool) -> None:
    traced = TracedWorld()
    world = traced.world
    if not tracing:
        world.tracer = None
    produce_alerts(world, 4)
    world.produce("A", amount=900.0)
    world.produce("A", amount=900.0, headers=[("traceparent", b"none"), ("recur-history", b"1")])

    finish(world.worker().run())

    scores = world.kafka.records("scores", 0)
    assert [list(score.headers) for score in scores] == [
        *([parent(i + 1)] for i in range(4)),
        [],
        [],
    ]
    alerts = world.kafka.records("alerts")
    assert alerts
    for alert in alerts:
        offset = int(decode_alert(alert.value or b"").source.rsplit(":", 1)[1])
        context = [header for header in alert.headers if header[0] == "traceparent"]
        assert context == ([parent(offset + 1)] if offset < 4 else [])


def test_a_record_delivered_again_gives_an_alert_with_the_same_headers() -> None:
    traced = TracedWorld(ratio=1.0)
    world = traced.world
    first = world.worker()
    world.produce("A", amount=0.01, headers=[parent(99)])
    one_poll(first)  # it takes the partition over
    before = len(world.kafka.records("alerts"))
    produce_alerts(world, 4)
    world.interrupt(when("before save", die))
    run_until_killed(first)
    published = [(r.key, tuple(r.headers)) for r in world.kafka.records("alerts")[before:]]
    world.interrupt(lambda name: None)

    finish(world.worker().run())

    world.assert_all_applied()
    again = [(r.key, tuple(r.headers)) for r in world.kafka.records("alerts")[before:]]
    assert len(published) > 0
    assert again == published * 2


def test_polls_that_are_given_up_leave_a_bounded_number_of_open_spans() -> None:
    traced = TracedWorld(ratio=1.0)
    world, tracer = traced.world, traced.world.tracer
    assert tracer is not None
    worker = world.worker()
    for _ in range(polls.OPEN_POLLS_MAX + 5):
        world.produce("A")
        poll = worker.consumer.poll(1)
        assert poll is not None
        tracer.begin(poll)

    assert len(tracer._open) <= polls.OPEN_POLLS_MAX


def test_without_the_setting_nothing_starts_and_without_the_extra_the_error_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert start_tracing(load_settings(), "recur-worker") is None
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)

    with pytest.raises(SettingsError, match=r"pip install 'recur\[tracing\]'"):
        start_tracing(load_settings(tracing=True), "recur-worker")


def test_spans_hold_no_account_and_no_payload() -> None:
    traced = TracedWorld(ratio=1.0)
    world = traced.world
    secrets = [f"secret-account-{i}" for i in range(4)]
    for account in secrets:
        world.produce(account, f"{PAYLOAD}-{account}", merchant_id="secret-merchant", amount=900.0)
    world.produce_raw(b"secret-key", json.dumps({"secret": 1}).encode())

    finish(world.worker().run())

    assert traced.spans("process transactions")
    assert "secret" not in traced.everything()
