"""Delivery of one endpoint's alerts: filter, attempt, and what follows from the result."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, Protocol

from aiokafka.errors import KafkaError

from pipeline.kafka.polls import LogUnavailableError
from pipeline.messages.trace_context import TRACEPARENT, context_headers
from pipeline.tracing.http_spans import HttpTracer
from pipeline.webhooks.alert_event import AlertEvent, alert_event, category_of, place_of
from pipeline.webhooks.dead_letters import DeadLetterSink
from pipeline.webhooks.endpoints import Endpoint
from pipeline.webhooks.metrics import WebhookMetrics
from pipeline.webhooks.partition_progress import PartitionProgress, Retry
from pipeline.webhooks.schedule import Pace, RetrySchedule
from pipeline.webhooks.sender import Attempt

log = logging.getLogger(__name__)

BROKER_PAUSE_SECONDS = 2
"""Time until an alert is tried again whose record the broker did not give, seconds."""


class EventSender(Protocol):
    """A sender of events (:class:`pipeline.webhooks.sender.Sender`)."""

    async def send(
        self, message_id: str, body: bytes, more_headers: Mapping[str, str] = {}
    ) -> Attempt:
        """Make one attempt."""


class RecordSource(Protocol):
    """A reader of single records (:class:`pipeline.kafka.log_reader.LogReader`)."""

    async def record_at(self, topic: str, partition: int, offset: int) -> Any | None:
        """Return the record at an offset; None if the log no longer has it.

        Raises:
            LogUnavailableError: the broker does not answer.
        """


@dataclass(frozen=True)
class DeliveryTools:
    """The services that all endpoints of a process share.

    Attributes:
        records: reads alerts for retries, and transactions for their categories.
        dead_letters: takes alerts after the last attempt.
        metrics: the process's metrics.
        schedule: times of the attempts.
        alerts_topic, transactions_topic: full names.
        disable: called with the name of an endpoint that answered 410.
        tracer: makes a span of each attempt; None without tracing.
        clock: wall clock, epoch seconds.
    """

    records: RecordSource
    dead_letters: DeadLetterSink
    metrics: WebhookMetrics
    schedule: RetrySchedule
    alerts_topic: str
    transactions_topic: str
    disable: Callable[[str], Awaitable[None]]
    tracer: HttpTracer | None = None
    clock: Callable[[], float] = time.time

    @property
    def topics(self) -> tuple[str, str]:
        """The topics that ``records`` reads."""
        return self.alerts_topic, self.transactions_topic


class AlertDelivery:
    """Delivery of alerts to one endpoint; it changes the progress of their partitions.

    Args:
        endpoint: the destination.
        sender: makes the attempts.
        tools: shared services.

    Attributes:
        pace: the pause that the endpoint asked for.
        gone: whether the endpoint answered 410.
    """

    def __init__(self, endpoint: Endpoint, sender: EventSender, tools: DeliveryTools) -> None:
        self._endpoint = endpoint
        self._sender = sender
        self._tools = tools
        self.pace = Pace()
        self.gone = False

    async def first(self, record: Any, progress: PartitionProgress) -> None:
        """Handle a new record, whose progress has begun."""
        event = alert_event(record.value)
        name = self._endpoint.name
        if event is None:
            self._tools.metrics.invalid.labels(name).inc()
            log.warning(
                "a record of the alerts topic is no alert: it is left out",
                extra={"endpoint": name, "partition": record.partition, "offset": record.offset},
            )
            progress.settle(record.offset)
            return
        await self._guarded(record, Retry(record.offset, 0, self._tools.clock()), event, progress)

    async def again(self, partition: int, retry: Retry, progress: PartitionProgress) -> None:
        """Handle a retry that is due."""
        tools = self._tools
        try:
            record = await tools.records.record_at(tools.alerts_topic, partition, retry.offset)
        except LogUnavailableError:
            self._later(retry, progress)
            return
        event = None if record is None else alert_event(record.value)
        if record is None or event is None:
            lost = SimpleNamespace(
                topic=tools.alerts_topic, partition=partition, offset=retry.offset,
                key=None, value=None,
            )  # fmt: skip
            await self._bury(lost, "webhook_alert_gone", "not in the topic", retry, progress)
            return
        await self._guarded(record, retry, event, progress)

    async def _guarded(
        self, record: Any, retry: Retry, event: AlertEvent, progress: PartitionProgress
    ) -> None:
        try:
            permitted = retry.failed > 0 or await self.permits(event)
        except LogUnavailableError:
            self._later(retry, progress)
            return
        if not permitted:
            self._tools.metrics.filtered.labels(self._endpoint.name).inc()
            progress.settle(retry.offset)
            return
        attempt = await self._attempt(record, retry, event)
        self._count(attempt)
        if attempt.is_delivered:
            self._tools.metrics.delivered.labels(self._endpoint.name).inc()
            self.pace.succeed()
            was_full = progress.is_full
            progress.settle(retry.offset)
            if was_full:
                progress.hasten(self._tools.clock())
            return
        await self._fail(record, retry, attempt, progress)

    async def _attempt(self, record: Any, retry: Retry, event: AlertEvent) -> Attempt:
        """Make an attempt, with the trace context (W3C) of its span or of the alert's record."""
        headers, tracer = context_headers(record.headers or ()), self._tools.tracer
        span = None
        if tracer is not None:
            span = tracer.deliver(self._endpoint.name, retry.failed, headers)
            headers = span.headers
        # The state may hold what is nobody's business but the tracing systems' inside.
        parent = {name: value.decode("ascii") for name, value in headers if name == TRACEPARENT}
        attempt = await self._sender.send(event.message_id, event.body, parent)
        if span is not None:
            span.end(attempt.status, None if attempt.is_delivered else attempt.result)
        return attempt

    async def permits(self, event: AlertEvent) -> bool:
        """Apply the filters; the category of an alert is that of its transaction.

        Raises:
            LogUnavailableError: the transaction cannot be read now.
        """
        wanted = self._endpoint.filter
        if not wanted.permits(event.decision, event.score):
            return False
        if not wanted.categories:
            return True
        category = event.category
        place = place_of(event.source)
        if category is None and place is not None and place[0] == self._tools.transactions_topic:
            record = await self._tools.records.record_at(*place)
            category = None if record is None else category_of(record.value)
        return category in wanted.categories

    async def _fail(
        self, record: Any, retry: Retry, attempt: Attempt, progress: PartitionProgress
    ) -> None:
        """Schedule the next attempt of an alert, or make it a dead letter."""
        now, name = self._tools.clock(), self._endpoint.name
        if attempt.result == "gone":
            progress.wait(Retry(retry.offset, retry.failed, now))
            if not self.gone:
                self.gone = True
                log.error(
                    "the endpoint answered 410 Gone and is disabled; `recur webhooks resume`"
                    " enables it",
                    extra={"endpoint": name},
                )
                await self._tools.disable(name)
            return
        not_before = 0.0
        if attempt.result == "slow_down":
            not_before = self.pace.slow_down(now, attempt.retry_after_seconds)
        due = self._tools.schedule.next_due(retry.failed + 1, now, not_before)
        if due is None:
            await self._bury(record, "webhook_failed", str(attempt), retry, progress)
            return
        self._tools.metrics.retried.labels(name).inc()
        progress.wait(Retry(retry.offset, retry.failed + 1, due))

    async def _bury(
        self,
        record: Any,
        reason: Literal["webhook_failed", "webhook_alert_gone"],
        error: str,
        retry: Retry,
        progress: PartitionProgress,
    ) -> None:
        now, name = self._tools.clock(), self._endpoint.name
        try:
            is_kept = await self._tools.dead_letters.send(
                name, record, reason, error, round(now * 1000)
            )
        except (KafkaError, OSError):
            self._later(retry, progress)
            return
        self._tools.metrics.dead.labels(name).inc()
        log.warning(
            "an alert is given up: the dead-letter topic holds it"
            if is_kept
            else "an alert is given up, and the broker refuses its dead letter",
            extra={
                "endpoint": name,
                "reason": reason,
                "error": error,
                "partition": record.partition,
                "offset": record.offset,
            },
        )
        progress.settle(retry.offset)

    def _later(self, retry: Retry, progress: PartitionProgress) -> None:
        """Repeat an attempt soon that the broker, not the endpoint, has prevented."""
        due = self._tools.clock() + BROKER_PAUSE_SECONDS
        progress.wait(Retry(retry.offset, retry.failed, due))

    def _count(self, attempt: Attempt) -> None:
        name, metrics = self._endpoint.name, self._tools.metrics
        metrics.attempts.labels(name, attempt.result).inc()
        metrics.delivery_seconds.labels(name).observe(attempt.seconds)
        if not attempt.is_delivered:
            log.debug(
                "an attempt failed",
                extra={"endpoint": name, "result": attempt.result, "status": attempt.status},
            )
