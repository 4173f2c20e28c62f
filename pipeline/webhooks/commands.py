"""The work of `recur webhooks list`, `test`, `pause`, `resume` and `replay`."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from prometheus_client import CollectorRegistry

from pipeline.errors import RecurError, StartupError
from pipeline.kafka.log_reader import LogReader
from pipeline.kafka.partition_reader import KafkaPartitionReader
from pipeline.kafka.polls import LogUnavailableError
from pipeline.kafka.topics import NO_COORDINATOR_YET, partition_count
from pipeline.settings import Settings
from pipeline.storage.client import StoreUnavailableError, retry_within
from pipeline.webhooks.alert_event import iso_time, sample_event
from pipeline.webhooks.dead_letters import DeadReason
from pipeline.webhooks.delivery import AlertDelivery, DeliveryTools
from pipeline.webhooks.endpoints import Endpoint, configured_endpoints, named_endpoint
from pipeline.webhooks.metrics import WebhookMetrics
from pipeline.webhooks.partition_progress import PartitionProgress, Retry
from pipeline.webhooks.runner import committed_progress, group_of
from pipeline.webhooks.schedule import RETRY_DELAYS_SECONDS, RetrySchedule
from pipeline.webhooks.sender import GetAddresses, Sender, get_addresses
from pipeline.webhooks.switches import Switch, Switches

REPLAY_DELAYS_SECONDS = (0.0, RETRY_DELAYS_SECONDS[1], RETRY_DELAYS_SECONDS[1])
"""Delays of a replay's attempts: the caller waits, and can replay again."""

FAILURES_SHOWN = 20
"""Most failed alerts that a replay lists."""

Sleep = Callable[[float], Awaitable[None]]


async def list_lines(settings: Settings) -> list[str]:
    """Describe each endpoint: state, records past its position, retries that wait.

    Raises:
        RecurError: the file is wrong, or broker or Redis do not answer.
    """
    _, endpoints = configured_endpoints(settings)
    switches = await _read_switches(settings, list(endpoints))
    try:
        ends = await _alert_ends(settings)
        rows = [
            await _row(settings, endpoint, switches.get(endpoint.name), ends)
            for endpoint in endpoints.values()
        ]
    except (KafkaError, OSError) as error:
        raise _broker_away(settings, error) from error
    return _columns([("endpoint", "state", "behind", "retries", "next retry"), *rows])


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Format rows with their cells beneath one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


async def _row(
    settings: Settings,
    endpoint: Endpoint,
    switch: Switch | None,
    ends: dict[TopicPartition, tuple[int, int]],
) -> tuple[str, ...]:
    try:
        _, progress = await committed_progress(settings, group_of(settings, endpoint.name))
    except NO_COORDINATOR_YET:
        progress = {}  # a new broker, whose first group has no coordinator yet
    behind = sum(
        max(0, end - max(begin, progress[place].position))
        for place, (begin, end) in ends.items()
        if place in progress
    )
    retries = [retry for at in progress.values() for retry in at.retries]
    due = min((retry.due for retry in retries), default=None)
    return (
        endpoint.name,
        "disabled" if endpoint.is_disabled else switch or "active",
        str(behind) if progress else "-",
        str(len(retries)),
        "-" if due is None else iso_time(round(due * 1000)),
    )


async def _alert_ends(settings: Settings) -> dict[TopicPartition, tuple[int, int]]:
    """Return begin and end of each partition of the alerts topic."""
    topic = settings.topic("alerts")
    count = await partition_count(settings, topic)
    if count is None:
        raise StartupError(f"there is no topic {topic}: start a worker first")
    places = [TopicPartition(topic, partition) for partition in range(count)]
    consumer = AIOKafkaConsumer(**settings.kafka_client_options())
    try:
        await consumer.start()
        begins = await consumer.beginning_offsets(places)
        ends = await consumer.end_offsets(places)
    finally:
        await consumer.stop()
    return {place: (begins[place], ends[place]) for place in places}


async def switch_endpoint(settings: Settings, name: str, switch: Switch | None) -> str:
    """Pause an endpoint, or resume it; return a line for the user.

    Args:
        switch: the switch to set; None removes it.

    Raises:
        RecurError: there is no such endpoint, or Redis does not answer.
    """
    _, endpoints = configured_endpoints(settings)
    endpoint = named_endpoint(endpoints, name)
    switches = Switches.from_settings(settings)
    try:
        call = switches.clear(name) if switch is None else switches.set(name, switch)
        await call
    except StoreUnavailableError as error:
        raise _redis_away(error) from error
    finally:
        await switches.close()
    if switch is not None:
        return f"{name} is paused: its alerts wait in the topic until `recur webhooks resume`"
    if endpoint.is_disabled:
        return f"{name} would go on, but the file disables it: remove `disabled` there"
    return f"{name} goes on from its position"


async def send_test(settings: Settings, name: str, lookup: GetAddresses = get_addresses) -> str:
    """Send a signed sample event to an endpoint; return a line for the user.

    Raises:
        RecurError: there is no such endpoint, or it did not take the event.
    """
    _, endpoints = configured_endpoints(settings)
    endpoint = named_endpoint(endpoints, name)
    sender = Sender(endpoint, settings.webhooks_timeout_seconds, lookup=lookup)
    message, body = sample_event(name, time.time_ns() // 1_000_000, uuid.uuid4().hex)
    try:
        attempt = await sender.send(message, body)
    finally:
        await sender.close()
    line = f"{name}: {attempt}, {attempt.seconds * 1000:.0f} ms, webhook-id {message}"
    if not attempt.is_delivered:
        raise RecurError(f"{line}; docs/webhooks.md explains the results")
    return line


@dataclass
class _Failures:
    """The alerts that a replay could not deliver; takes the place of dead letters."""

    lines: list[str] = field(default_factory=list)

    async def send(
        self, endpoint: str, record: Any, reason: DeadReason, error: str, time_ms: int
    ) -> bool:
        """Note a failure."""
        self.lines.append(f"{record.topic}:{record.partition}:{record.offset}  {error}")
        return True


class Replay:
    """A replay of the alerts of a range of time to one endpoint.

    The running processes know nothing of it. Each alert has the id that it always has.

    Args:
        settings: name broker and file.
        name: the endpoint's.
        from_ms, to_ms: first time, and first time after the range, of the records (CreateTime).
        delays_seconds: delay before each attempt.
        sleep: waits.
        lookup: resolves names.
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        from_ms: int,
        to_ms: int | None,
        delays_seconds: tuple[float, ...] = REPLAY_DELAYS_SECONDS,
        sleep: Sleep = asyncio.sleep,
        lookup: GetAddresses = get_addresses,
    ) -> None:
        _, endpoints = configured_endpoints(settings)
        self._endpoint = named_endpoint(endpoints, name)
        self._settings = settings
        self._from_ms, self._to_ms = from_ms, to_ms
        self._sleep = sleep
        self._registry = CollectorRegistry()
        self._failures = _Failures()
        self._records = LogReader(settings)
        self._sender = Sender(
            self._endpoint,
            settings.webhooks_timeout_seconds,
            settings.webhooks_concurrency,
            lookup,
        )
        tools = DeliveryTools(
            records=self._records,
            dead_letters=self._failures,
            metrics=WebhookMetrics(self._registry),
            schedule=RetrySchedule(delays_seconds),
            alerts_topic=settings.topic("alerts"),
            transactions_topic=settings.topic("transactions"),
            disable=_stay,
        )
        tools.metrics.begin(name)
        self._topics = tools.topics
        self._delivery = AlertDelivery(self._endpoint, self._sender, tools)

    async def run(self) -> tuple[list[str], bool]:
        """Deliver the range; return lines for the user, and whether all of it is delivered.

        Raises:
            RecurError: the broker does not answer.
        """
        try:
            await self._records.start(self._topics)
            for place in await _alert_ends(self._settings):
                if not self._delivery.gone:
                    await self._replay_partition(place)
        except (KafkaError, LogUnavailableError, OSError) as error:
            raise _broker_away(self._settings, error) from error
        finally:
            await self._records.stop()
            await self._sender.close()
        lines = [
            f"{self._endpoint.name}: {self._count('delivered')} delivered,"
            f" {self._count('filtered')} left out by its filters,"
            f" {len(self._failures.lines)} failed"
        ]
        lines += [f"  {line}" for line in self._failures.lines[:FAILURES_SHOWN]]
        if len(self._failures.lines) > FAILURES_SHOWN:
            lines.append(f"  and {len(self._failures.lines) - FAILURES_SHOWN} more")
        if self._delivery.gone:
            lines.append("  the endpoint answered 410 Gone: the replay ends")
        return lines, not self._failures.lines and not self._delivery.gone

    def _count(self, what: str) -> int:
        labels = {"endpoint": self._endpoint.name}
        return int(self._registry.get_sample_value(f"recur_webhooks_{what}_total", labels) or 0)

    async def _replay_partition(self, place: TopicPartition) -> None:
        async with KafkaPartitionReader(self._settings, *place) as reader:
            bounds = await reader.bounds()
            start = await reader.first_at(self._from_ms)
            end = None if self._to_ms is None else await reader.first_at(self._to_ms)
            if start is None:
                return
            reader.skip_to(start)
            progress = PartitionProgress(start)
            most = self._settings.webhooks_concurrency
            last = bounds.end if end is None else end
            while not self._delivery.gone and (records := await reader.read(last, most)):
                await self._pause()
                new = [r for r in records if progress.begin(r.offset, r.timestamp)]
                await asyncio.gather(*(self._delivery.first(r, progress) for r in new))
                await self._retry(place.partition, progress)

    async def _retry(self, partition: int, progress: PartitionProgress) -> None:
        while (due := progress.next_due()) is not None and not self._delivery.gone:
            await self._sleep(max(0.0, due - time.time()))
            await self._pause()
            taken: list[Retry] = progress.take_due(
                max(due, time.time()), self._settings.webhooks_concurrency
            )
            await asyncio.gather(*(self._delivery.again(partition, r, progress) for r in taken))

    async def _pause(self) -> None:
        """Wait as the endpoint asked."""
        await self._sleep(max(0.0, self._delivery.pace.until - time.time()))


async def _stay(name: str) -> None:
    """Change no switch: a replay only ends."""


async def _read_switches(settings: Settings, names: list[str]) -> dict[str, Switch]:
    switches = Switches.from_settings(settings)
    try:
        return await retry_within(settings.startup_timeout_seconds, lambda: switches.read(names))
    except StoreUnavailableError as error:
        raise _redis_away(error) from error
    finally:
        await switches.close()


def _redis_away(error: Exception) -> RecurError:
    return RecurError(
        f"Redis, which holds the switches of endpoints, does not answer ({error}): see that it is"
        " up, or correct RECUR_REDIS_URL"
    )


def _broker_away(settings: Settings, error: BaseException) -> RecurError:
    return RecurError(
        f"the broker at {settings.kafka_bootstrap_servers} gave no answer"
        f" ({type(error).__name__}): see that it is up"
    )
