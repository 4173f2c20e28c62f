"""Spans of a worker: one for each traced poll, and a child of it for each of its alerts.

Names and attributes follow OpenTelemetry's semantic conventions for messaging. They hold counts
and names of topics, and nothing of a record but its trace context.

A poll is traced if one of its records belongs to a sampled trace, or by the ratio of the settings.
In the first case the alerts of its other records have no span: where a part of the records is
sampled, almost every poll is traced, and the alerts' spans would be those of all records.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from opentelemetry.trace import (
    Link,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    TraceState,
    set_span_in_context,
)

from pipeline.kafka.polls import Poll
from pipeline.kafka.producer import (
    AppendResult,
    Outgoing,
    PartOutput,
    Publisher,
    Transactions,
)
from pipeline.messages.trace_context import TRACEPARENT, context_headers
from pipeline.settings import Settings

LINKS_MAX = 128
"""Most links of a poll's span, and OpenTelemetry's own limit."""

ALERT_SPANS_MAX = 256
"""Most spans of alerts for one poll."""

OPEN_POLLS_MAX = 16
"""Most polls with an open span. A worker computes one poll while it concludes another."""


_PLAIN_LENGTH = 55
_SAMPLED_DIGITS = frozenset(b"13579bdf")


@dataclass(frozen=True)
class _OpenPoll:
    """A poll with an open span.

    Attributes:
        is_linked: whether the span has links, so that only alerts of sampled records have spans.
    """

    span: Span
    is_linked: bool


class PollTracer:
    """Spans of one worker's polls; it concludes one poll at a time.

    Args:
        tracer: OpenTelemetry's, whose sampler decides on polls without a sampled record.
        settings: names of topics and group.
    """

    def __init__(self, tracer: Tracer, settings: Settings) -> None:
        self._tracer = tracer
        topic, self._alerts_topic = settings.topic("transactions"), settings.topic("alerts")
        self._name = f"process {topic}"
        self._attributes = {
            "messaging.system": "kafka",
            "messaging.operation.type": "process",
            "messaging.operation.name": "process",
            "messaging.destination.name": topic,
            "messaging.consumer.group.name": settings.kafka_group_id,
        }
        self._alert_name = f"send {self._alerts_topic}"
        self._alert_attributes = {
            "messaging.system": "kafka",
            "messaging.operation.type": "send",
            "messaging.operation.name": "send",
            "messaging.destination.name": self._alerts_topic,
        }
        self._open: dict[int, _OpenPoll] = {}
        self._concluding: _OpenPoll | None = None

    def begin(self, poll: Poll) -> None:
        """Begin the span of a poll that is computed next."""
        count = sum(len(chunk.records) for chunk in poll.chunks.values())
        attributes: dict[str, str | int] = {
            **self._attributes,
            "messaging.batch.message_count": count,
        }
        if len(poll.chunks) == 1:
            (partition,) = poll.chunks
            attributes["messaging.destination.partition.id"] = str(partition)
        links = sampled_links(poll)
        span = self._tracer.start_span(
            self._name, kind=SpanKind.CONSUMER, attributes=attributes, links=links
        )
        if span.is_recording():
            while len(self._open) >= OPEN_POLLS_MAX:  # of polls that a worker gave up
                self._open.pop(next(iter(self._open)))
            self._open[id(poll)] = _OpenPoll(span, bool(links))

    def computed(self, poll: Poll) -> None:
        """Note that the scores of a poll are decided on."""
        found = self._open.get(id(poll))
        if found is not None:
            found.span.add_event("computed")

    def conclude(self, poll: Poll) -> None:
        """Note that a poll is published and saved next."""
        self._concluding = self._open.get(id(poll))

    def end(self, poll: Poll, error: BaseException | None = None) -> None:
        """End the span of a poll.

        Args:
            error: what ended the work on it; only the name of its class is recorded.
        """
        found = self._open.pop(id(poll), None)
        if self._concluding is found:
            self._concluding = None
        if found is None:
            return
        span = found.span
        if error is not None:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def alerts_sent(self, alerts: Iterable[Outgoing], began_ns: int) -> None:
        """Record spans of the alerts of the poll that is concluded, if it is traced.

        Args:
            alerts: alerts that the broker has.
            began_ns: when they were sent, epoch nanoseconds.
        """
        poll = self._concluding
        if poll is None:
            return
        context = set_span_in_context(poll.span)
        now_ns = time.time_ns()
        links = (_link(alert.headers, poll.is_linked) for alert in alerts)
        wanted = (link for link in links if link is not None or not poll.is_linked)
        for link in islice(wanted, ALERT_SPANS_MAX):
            self._tracer.start_span(
                self._alert_name,
                context,
                kind=SpanKind.PRODUCER,
                attributes=self._alert_attributes,
                links=() if link is None else (link,),
                start_time=began_ns,
            ).end(now_ns)

    def publisher(self, publisher: Publisher) -> Publisher:
        """Return a publisher that records the alerts that it publishes."""
        return _TracedPublisher(publisher, self)

    def transactions(self, transactions: Transactions) -> Transactions:
        """Return transactions that record the alerts that they commit."""
        return _TracedTransactions(transactions, self)


def sampled_links(poll: Poll) -> list[Link]:
    """Make links to the sampled records of a poll, :data:`LINKS_MAX` at most."""
    found: list[Link] = []
    digits = _SAMPLED_DIGITS
    for chunk in poll.chunks.values():
        for record in chunk.records:
            for name, value in record.headers:
                # The last digit first, and no call: it was measured to be half of tracing's cost.
                if not value or (value[-1] not in digits and len(value) <= _PLAIN_LENGTH):
                    continue
                if name == TRACEPARENT and (link := _link(record.headers, is_sampled=True)):
                    found.append(link)
                    if len(found) >= LINKS_MAX:
                        return found
    return found


def _link(headers: Sequence[tuple[str, bytes]], is_sampled: bool) -> Link | None:
    """Make a link to the span that headers name; None if they name none, or no sampled one.

    It is the context that OpenTelemetry's propagator reads from valid headers, in half its time.

    Args:
        is_sampled: whether only a sampled span is wanted.
    """
    context = context_headers(headers)
    if not context:
        return None
    parent = context[0][1]
    flags = int(parent[53:55], 16)
    if is_sampled and not flags & TraceFlags.SAMPLED:
        return None
    state = TraceState.from_header([context[1][1].decode()]) if len(context) > 1 else None
    ids = int(parent[3:35], 16), int(parent[36:52], 16)
    return Link(SpanContext(*ids, is_remote=True, trace_flags=TraceFlags(flags), trace_state=state))


class _TracedPublisher:
    """A :class:`pipeline.kafka.producer.Publisher` that records alerts."""

    def __init__(self, publisher: Publisher, tracer: PollTracer) -> None:
        self._publisher = publisher
        self._tracer = tracer

    async def publish(
        self,
        scores: dict[int, Sequence[Outgoing]],
        alerts: Sequence[Outgoing],
        rejected: Sequence[Outgoing],
    ) -> dict[int, AppendResult]:
        """See :class:`pipeline.kafka.producer.Publisher`."""
        began_ns = time.time_ns()
        appended = await self._publisher.publish(scores, alerts, rejected)
        self._tracer.alerts_sent(alerts, began_ns)
        return appended


class _TracedTransactions:
    """:class:`pipeline.kafka.producer.Transactions` that record alerts."""

    def __init__(self, transactions: Transactions, tracer: PollTracer) -> None:
        self._transactions = transactions
        self._tracer = tracer

    async def take(self, partition: int) -> int:
        """See :class:`pipeline.kafka.producer.Transactions`."""
        return await self._transactions.take(partition)

    async def commit(self, outputs: Mapping[int, PartOutput]) -> dict[int, AppendResult | None]:
        """See :class:`pipeline.kafka.producer.Transactions`."""
        began_ns = time.time_ns()
        committed = await self._transactions.commit(outputs)
        sent = (alert for partition in committed for alert in outputs[partition].alerts)
        self._tracer.alerts_sent(sent, began_ns)
        return committed
