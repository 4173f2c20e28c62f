"""The loop of one endpoint: its consumer, its deliveries under way, its commits.

Each endpoint is a consumer group of its own. So its position is durable in Kafka, a slow endpoint
holds up no other, and processes side by side share the partitions of each endpoint.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Coroutine
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from aiokafka.structs import OffsetAndMetadata

from pipeline.errors import StartupError
from pipeline.kafka.topics import topic_ids
from pipeline.scoring.health import Health
from pipeline.settings import Settings
from pipeline.topic_id import NO_ID, is_other
from pipeline.webhooks.delivery import AlertDelivery, DeliveryTools
from pipeline.webhooks.endpoints import Endpoint
from pipeline.webhooks.partition_progress import (
    CommittedProgress,
    PartitionProgress,
    Retry,
    decode_commit,
)
from pipeline.webhooks.sender import GetAddresses, Sender, get_addresses

log = logging.getLogger(__name__)

POLL_MS = 100
"""Wait of a fetch for records, and so the precision of retries, milliseconds."""

FETCH_BYTES = 128 * 1024
"""Bytes of a partition in one fetch: an endpoint holds few alerts in memory."""

DEFECT_PAUSE_SECONDS = 60.0
"""Time until an alert is tried again whose delivery a defect stopped, seconds."""

COMMIT_SECONDS = 10.0
"""Longest wait for a commit, seconds."""

STOP_SHARE = 0.6
"""Share of RECUR_SHUTDOWN_SECONDS that a stop waits for deliveries under way."""

RETRY_PAUSE_SECONDS = 0.5
"""Pause after a call that the broker did not answer, seconds."""


def group_of(settings: Settings, endpoint: str) -> str:
    """Return the consumer group of an endpoint."""
    return f"{settings.kafka_group_id}-webhooks-{endpoint}"


class EndpointRunner:
    """Runner of one endpoint, until it is stopped.

    Args:
        settings: name the broker and the limits.
        endpoint: the destination.
        tools: shared services.
        health: told that the loop moves, under the endpoint's name.
        lookup: resolves names.

    Attributes:
        state: one of :data:`pipeline.webhooks.metrics.STATES`; it delivers only if active.
    """

    def __init__(
        self,
        settings: Settings,
        endpoint: Endpoint,
        tools: DeliveryTools,
        health: Health,
        lookup: GetAddresses = get_addresses,
    ) -> None:
        self._settings = settings
        self._tools = tools
        self._health = health
        self._lookup = lookup
        self.endpoint = endpoint
        self.state = "paused"  # until the switches are read
        self._sender = self._new_sender()
        self._delivery = AlertDelivery(endpoint, self._sender, tools)
        self._group = group_of(settings, endpoint.name)
        self._consumer: AIOKafkaConsumer | None = None
        self._progress: dict[TopicPartition, PartitionProgress] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._committed: dict[TopicPartition, OffsetAndMetadata] = {}
        self._last_ms: dict[TopicPartition, float] = {}
        self._commit_at = 0.0
        self._stopping = asyncio.Event()
        self._hands_over = False
        self._has_joined = False
        tools.metrics.begin(endpoint.name)

    @property
    def has_joined(self) -> bool:
        """Whether the group has assigned partitions, perhaps none."""
        return self._has_joined

    def _new_sender(self) -> Sender:
        return Sender(
            self.endpoint,
            self._settings.webhooks_timeout_seconds,
            self._settings.webhooks_concurrency,
            self._lookup,
            self._tools.clock,
        )

    def update(self, endpoint: Endpoint) -> None:
        """Take another configuration of the same endpoint, for attempts from now on."""
        self.endpoint = endpoint
        closing = asyncio.create_task(_close_after(self._sender, set(self._tasks)))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        self._sender = self._new_sender()
        gone = self._delivery.gone
        self._delivery = AlertDelivery(endpoint, self._sender, self._tools)
        self._delivery.gone = gone

    def set_state(self, state: str) -> None:
        """Set the state that switches and file give."""
        if state != self.state:
            log.info("endpoint", extra={"endpoint": self.endpoint.name, "state": state})
        if state == "active":
            self._delivery.gone = False
        self.state = state
        self._tools.metrics.set_state(self.endpoint.name, state)

    def stop(self) -> None:
        """Let the loop end after the deliveries under way."""
        self._stopping.set()

    async def run(self) -> None:
        """Deliver until :meth:`stop`; wait for a broker that is away."""
        name = self.endpoint.name
        self._health.records_wait(True, name)
        try:
            while not self._stopping.is_set():
                try:
                    await self._start()
                    await self._deliver()
                except (KafkaError, OSError) as error:
                    self._health.down("kafka", "does not answer", type(error).__name__)
                    await asyncio.sleep(RETRY_PAUSE_SECONDS)
                finally:
                    await self._stop_consumer()
                self._health.moved(name)
        finally:
            self._health.records_wait(False, name)
            await asyncio.gather(*self._closing, return_exceptions=True)
            await self._sender.close()

    async def _start(self) -> None:
        self._consumer = AIOKafkaConsumer(
            **self._settings.kafka_client_options(),
            group_id=self._group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            max_partition_fetch_bytes=FETCH_BYTES,
            session_timeout_ms=round(self._settings.kafka_session_timeout_seconds * 1000),
            heartbeat_interval_ms=round(self._settings.kafka_session_timeout_seconds * 1000 / 5),
            rebalance_timeout_ms=round(
                (self._settings.webhooks_timeout_seconds
                 + self._settings.kafka_session_timeout_seconds) * 1000
            ),
        )  # fmt: skip
        await self._consumer.start()
        self._consumer.subscribe([self._tools.alerts_topic], listener=_Listener(self))

    async def _stop_consumer(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is None:
            return
        try:
            await self._finish(consumer)
            await consumer.stop()
        except (KafkaError, OSError) as error:
            log.debug("a consumer did not stop well", extra={"error": type(error).__name__})
        self._progress.clear()

    async def _deliver(self) -> None:
        """Fetch, start what is due, and commit, in turns."""
        consumer = self._consumer
        assert consumer is not None
        while not self._stopping.is_set():
            self._health.moved(self.endpoint.name)
            now = self._tools.clock()
            may_send = (
                self.state == "active"
                and not self._hands_over
                and not self._delivery.gone
                and now >= self._delivery.pace.until
            )
            free = self._limit() - len(self._tasks) if may_send else 0
            if free > 0:
                free -= self._start_retries(now, -(-free // 2))
            self._pause_partitions(consumer, free > 0)
            if free > 0 or not self._tasks:
                wait_ms = 0 if free > 0 and self._has_due(now) else POLL_MS
                self._begin(
                    await consumer.getmany(timeout_ms=wait_ms, max_records=max(1, free)), now
                )
            else:
                await asyncio.wait(
                    self._tasks, timeout=POLL_MS / 1000, return_when=asyncio.FIRST_COMPLETED
                )
            await self._commit_if_due(consumer)

    def _limit(self) -> int:
        """Deliveries that may be under way: one at a time while the endpoint is slow."""
        return 1 if self._delivery.pace.is_slow else self._settings.webhooks_concurrency

    def _has_due(self, now: float) -> bool:
        due = (progress.next_due() for progress in self._progress.values())
        return any(time is not None and time <= now for time in due)

    def _start_retries(self, now: float, most: int) -> int:
        started = 0
        for place, progress in self._progress.items():
            for retry in progress.take_due(now, most - started):
                delivery = self._delivery.again(place.partition, retry, progress)
                self._spawn(delivery, retry, progress)
                started += 1
        return started

    def _begin(self, fetched: dict[TopicPartition, list[Any]], now: float) -> None:
        for place, records in fetched.items():
            progress = self._progress.get(place)
            if progress is None:
                continue  # taken away meanwhile; its next owner reads them
            for record in records:
                if record.offset < progress.next_offset:
                    progress = self._begin_again(place, record.offset)
                if progress.begin(record.offset, record.timestamp):
                    self._last_ms[place] = record.timestamp
                    retry = Retry(record.offset, 0, now)
                    self._spawn(self._delivery.first(record, progress), retry, progress)

    def _begin_again(self, place: TopicPartition, offset: int) -> PartitionProgress:
        """Follow a log that went back: the topic was made again while it was read."""
        log.warning(
            "the alerts topic went back: its endpoint begins there, without earlier retries",
            extra={"endpoint": self.endpoint.name, "partition": place.partition},
        )
        self._progress[place] = PartitionProgress(offset)  # the next owner asks for the log's id
        return self._progress[place]

    def _spawn(
        self, delivery: Coroutine[Any, Any, None], retry: Retry, progress: PartitionProgress
    ) -> None:
        task = asyncio.create_task(self._guard(delivery, retry, progress))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guard(
        self, delivery: Coroutine[Any, Any, None], retry: Retry, progress: PartitionProgress
    ) -> None:
        """Keep an alert that a defect of the code stops; others go on."""
        try:
            await delivery
        except Exception:
            log.exception(
                "a delivery failed by a defect; it is tried again",
                extra={"endpoint": self.endpoint.name, "offset": retry.offset},
            )
            due = self._tools.clock() + DEFECT_PAUSE_SECONDS
            progress.wait(Retry(retry.offset, retry.failed, due))

    def _pause_partitions(self, consumer: AIOKafkaConsumer, may_read: bool) -> None:
        paused = consumer.paused()
        for place in consumer.assignment():
            progress = self._progress.get(place)
            wanted = not may_read or progress is None or progress.is_full
            if wanted and place not in paused:
                consumer.pause(place)
            elif not wanted and place in paused:
                consumer.resume(place)

    async def _commit_if_due(self, consumer: AIOKafkaConsumer) -> None:
        if time.monotonic() >= self._commit_at:
            self._commit_at = time.monotonic() + self._settings.kafka_commit_interval_seconds
            await self._commit(consumer)
            self._measure(consumer)

    async def _commit(self, consumer: AIOKafkaConsumer) -> None:
        offsets = {
            place: OffsetAndMetadata(progress.position, progress.metadata())
            for place, progress in self._progress.items()
        }
        changed = {p: at for p, at in offsets.items() if self._committed.get(p) != at}
        if not changed:
            return
        try:
            async with asyncio.timeout(COMMIT_SECONDS):
                await consumer.commit(changed)
        except (CommitFailedError, IllegalStateError) as error:
            # A rebalance took the partitions: their next owner has the last commit.
            log.debug("a commit came too late", extra={"error": type(error).__name__})
            return
        self._committed |= changed

    def _measure(self, consumer: AIOKafkaConsumer) -> None:
        """Set the gauges of lag and of waiting alerts, over this process's partitions."""
        name, metrics = self.endpoint.name, self._tools.metrics
        records, oldest = 0, self._tools.clock() * 1000
        now_ms = oldest
        for place, progress in self._progress.items():
            end = consumer.highwater(place)
            behind = 0 if end is None else max(0, end - progress.position)
            records += behind
            since = progress.oldest_ms()
            if since is None and behind:
                since = self._last_ms.get(place)
            oldest = min(oldest, now_ms if since is None else since)
        metrics.lag_records.labels(name).set(records)
        metrics.lag_seconds.labels(name).set(max(0.0, (now_ms - oldest) / 1000))
        metrics.waiting.labels(name).set(sum(p.waiting for p in self._progress.values()))

    async def _finish(self, consumer: AIOKafkaConsumer) -> None:
        """Wait for the deliveries under way, which an attempt's limit bounds, and commit.

        What is then still under way is delivered again from the position.
        """
        limit = self._settings.webhooks_timeout_seconds + 1
        if self._stopping.is_set():
            limit = min(limit, STOP_SHARE * self._settings.shutdown_seconds)
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=limit)
            for task in late:
                task.cancel()
        await self._commit(consumer)

    async def revoked(self) -> None:
        """Give up all partitions: finish and commit first, so that no delivery is repeated."""
        self._hands_over = True  # the loop goes on meanwhile, and must begin nothing
        try:
            if self._consumer is not None:
                await self._finish(self._consumer)
        finally:
            self._hands_over = False
            self._progress.clear()
            self._committed.clear()

    async def assigned(self, places: Collection[TopicPartition]) -> None:
        """Take partitions: read their positions and retries, and seek there."""
        consumer = self._consumer
        while places and consumer is not None and not self._stopping.is_set():
            try:
                log_id, found = await committed_progress(self._settings, self._group)
                bounds = await self._bounds(consumer, places)
            except (KafkaError, OSError, StartupError) as error:
                self._health.down("kafka", "does not answer", type(error).__name__)
                await asyncio.sleep(RETRY_PAUSE_SECONDS)
                continue
            for place in places:
                at = self._where_to_begin(place, found.get(place), bounds[place], log_id)
                consumer.seek(place, at.position)
                consumer.pause(place)  # until the loop's next turn sees whether it may deliver
                self._progress[place] = PartitionProgress(at.position, at.retries, log_id)
            break
        self._commit_at = 0.0  # a new endpoint's position is committed before it reads
        self._has_joined = True

    async def _bounds(
        self, consumer: AIOKafkaConsumer, places: Collection[TopicPartition]
    ) -> dict[TopicPartition, tuple[int, int]]:
        """Return begin and end of each partition."""
        begins = await consumer.beginning_offsets(places)
        ends = await consumer.end_offsets(places)
        return {place: (begins[place], ends[place]) for place in places}

    def _where_to_begin(
        self,
        place: TopicPartition,
        found: CommittedProgress | None,
        bounds: tuple[int, int],
        log_id: bytes,
    ) -> CommittedProgress:
        """Return the committed progress, or where an endpoint begins that has none in this log."""
        begin, end = bounds
        if found is None:
            return CommittedProgress(end if self.endpoint.start == "latest" else begin)
        if is_other(found.log_id, log_id) or found.position > end:
            log.warning(
                "the alerts topic is another than before: its endpoint begins at its start",
                extra={"endpoint": self.endpoint.name, "partition": place.partition},
            )
            return CommittedProgress(begin)
        return found


async def _close_after(sender: Sender, tasks: Collection[asyncio.Task[None]]) -> None:
    """Close a sender once its deliveries are done."""
    if tasks:
        await asyncio.wait(tasks)
    await sender.close()


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """The consumer's callbacks."""

    def __init__(self, runner: EndpointRunner) -> None:
        self._runner = runner

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        await self._runner.revoked()

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        await self._runner.assigned(assigned)


async def committed_progress(
    settings: Settings, group: str
) -> tuple[bytes, dict[TopicPartition, CommittedProgress]]:
    """Read the alerts topic's id, and an endpoint's progress from its consumer group.

    Raises:
        KafkaError, StartupError: the broker does not answer.
    """
    topic = settings.topic("alerts")
    ids = await topic_ids(settings, ("alerts",))
    admin = AIOKafkaAdminClient(**settings.kafka_client_options())
    try:
        await admin.start()
        found = await admin.list_consumer_group_offsets(group)
    finally:
        await admin.close()
    return ids.get(topic, NO_ID), {
        place: decode_commit(at.offset, at.metadata)
        for place, at in found.items()
        if place.topic == topic and at.offset >= 0
    }
