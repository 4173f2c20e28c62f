"""The Faust app of a worker: agents, lifecycle and monitors around the processors."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, cast

import faust
from faust.auth import OAuthCredentials
from faust.tables import TableManager
from faust.types import TP
from mode import CrashingSupervisor
from prometheus_client import CollectorRegistry

from model.checkpoint import Checkpoint
from pipeline import logs
from pipeline.errors import RecurError, StartupError
from pipeline.kafka.group_errors import PERMANENT_ERRORS, group_refusal
from pipeline.kafka.message_limits import MessageLimits
from pipeline.kafka.producer import KafkaProducer
from pipeline.kafka.score_log import KafkaScoreLog
from pipeline.kafka.topics import ROLES, partition_count
from pipeline.kafka.transactional_producer import TransactionalProducer
from pipeline.messages.decision import thresholds_of
from pipeline.scoring.assembly import WorkerParts, WorkerServices, assemble
from pipeline.scoring.evictions import Evictions
from pipeline.scoring.health import Health
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.scorer import scorer_of
from pipeline.scoring.stages import ComputedPoll
from pipeline.scoring.topic_watcher import TopicWatcher
from pipeline.settings import Settings
from pipeline.storage.client import StoreUnavailableError
from pipeline.storage.merchant_store import RedisMerchantStore
from pipeline.storage.poll_store import RedisPollStore
from pipeline.storage.state_store import RedisStateStore
from pipeline.tracing.polls import PollTracer
from pipeline.tracing.provider import start_tracing
from pipeline.worker import faust_transport
from pipeline.worker.checkpoint_watcher import CheckpointWatcher
from pipeline.worker.faust_transport import Delivery
from pipeline.worker.http_server import HttpServer
from pipeline.worker.lag_monitor import LagMonitor

log = logging.getLogger(__name__)

Agent = Callable[[AsyncIterator[Delivery]], Coroutine[Any, Any, None]]

REDIS_CHECK_SECONDS = 1.0
"""Time between two checks of Redis."""

LAG_CHECK_SECONDS = 5.0
"""Time between two measurements of the lag; each delays transactions by 3 ms."""

LABELS_CHECK_SECONDS = 10.0
"""Time between two checks whether Redis still has the recorded labels."""

GROUP_CHECK_SECONDS = 0.5
"""Time between two checks whether the group refuses this worker; each causes a new request."""

GROUP_REFUSAL_SECONDS = 10.0
"""Duration of a refusal by the group after which the worker ends."""

JOIN_WARNING_SECONDS = 60.0
"""Time between two warnings of a worker that has not joined a group."""

CRASH_TIMEOUT_SECONDS = 10.0
"""Longest orderly stop after an error that ends the worker."""

FAUST_LOGGER = "faust.app.base"
"""Logger of the traceback of an error that ends the app."""

FETCH_BYTES_PER_PARTITION = 256 * 1024
"""Most bytes of a partition in a fetch, unless one batch is larger: a few polls. Faust's default,
1 MiB, takes 20 MB more memory and is no faster."""


class Worker:
    """A worker: clients, processors and monitors in a Faust app.

    Args:
        settings: all settings.
        checkpoint: the model.
        partitions: partition count of the transactions topic.
        directory: holds Faust's own files.
    """

    def __init__(
        self, settings: Settings, checkpoint: Checkpoint, partitions: int, directory: Path
    ) -> None:
        self._settings = settings
        self._topic = settings.topic("transactions")
        self._labels_topic = settings.topic("labels")
        self.metrics = Metrics(CollectorRegistry())
        self.health = Health(settings.watchdog_seconds)
        self.http_server = HttpServer(
            settings.http_host, settings.http_port, self.metrics, self.health
        )
        self._set_model_info(checkpoint)
        self._checkpoint_watcher = CheckpointWatcher(
            settings.checkpoint, checkpoint.digest, checkpoint.header.thresholds
        )
        self._group_watch: asyncio.Task[None] | None = None
        self._refused_since: float | None = None
        self._make_clients(checkpoint)
        self.app = faust_app(settings, directory)
        self._make_processors(checkpoint, partitions)
        self._lag_monitor = self._make_lag_monitor()
        self._register()

    def _set_model_info(self, checkpoint: Checkpoint) -> None:
        architecture = checkpoint.header.architecture
        self.metrics.model.info(
            {
                "digest": checkpoint.digest,
                "architecture": f"GRU {architecture.layers}x{architecture.hidden_size}",
            }
        )

    def _make_clients(self, checkpoint: Checkpoint) -> None:
        """Make the clients of Redis and Kafka; the consumer is Faust's."""
        settings = self._settings
        self._store = RedisStateStore.from_settings(settings, checkpoint.digest)
        self._merchant_store = RedisMerchantStore.from_settings(settings)
        self._score_log = KafkaScoreLog(settings)
        self._limits = MessageLimits(settings)
        lost_dead_letters = self.metrics.dead_letters_lost.inc
        self._publisher = KafkaProducer(
            settings, self._limits, on_lost_dead_letters=lost_dead_letters
        )
        self._transactions: TransactionalProducer | None = None
        if settings.exactly_once:
            self._transactions = TransactionalProducer(settings, self._limits, lost_dead_letters)

    def _make_processors(self, checkpoint: Checkpoint, partitions: int) -> None:
        """Make what computes, publishes and saves."""
        settings = self._settings
        self._evictions = Evictions(
            settings=settings,
            model=checkpoint.digest,
            partitions=partitions,
            store=self._store,
            merchant_store=self._merchant_store,
            logs=self._score_log,
            labels_partitions=lambda: partition_count(settings, self._labels_topic),
            metrics=self.metrics,
            health=self.health,
            on_repaired=lambda: self._consumer().recheck_watermarks(self._topic),
        )
        self._store.loss_check = self._merchant_store.loss_check = self._evictions
        self._tracing = start_tracing(settings, "recur-worker")
        services = WorkerServices(
            store=self._store,
            merchants=self._merchant_store,
            polls=RedisPollStore(self._store, self._merchant_store),
            publisher=self._publisher,
            score_log=self._score_log,
            consumer=faust_transport.PartitionLog(self._consumer, self._topic),
            labels_consumer=faust_transport.PartitionLog(self._consumer, self._labels_topic),
            metrics=self.metrics,
            health=self.health,
            transactions=self._transactions,
            on_fenced=lambda partition: self._consumer().rejoin(),
            tracer=PollTracer(self._tracing.tracer, settings) if self._tracing else None,
        )
        self._use(assemble(settings, scorer_of(settings, checkpoint), partitions, services))

    def _use(self, parts: WorkerParts) -> None:
        """Work with these parts."""
        self.ownership, self.processor, self.labels = parts.ownership, parts.processor, parts.labels

    def _make_lag_monitor(self) -> LagMonitor:
        settings = self._settings
        roles = [role for role in ROLES if role != "labels" or settings.update_merchant_profiles]
        topic_watcher = TopicWatcher(
            [settings.topic(role) for role in roles],
            {self._topic: "states", self._labels_topic: "recorded labels"},
            settings.topic("scores"),
            settings.on_new_log == "stop",
            settings.topic_missing_seconds,
            self._score_log,
            self.health,
        )
        return LagMonitor(
            transactions=faust_transport.PartitionLog(self._consumer, self._topic),
            labels=faust_transport.PartitionLog(self._consumer, self._labels_topic),
            manager=self.ownership,
            label_processor=self.labels,
            topic_watcher=topic_watcher,
            score_log=self._score_log,
            metrics=self.metrics,
            health=self.health,
        )

    def _consumer(self) -> faust_transport.Consumer:
        return cast(faust_transport.Consumer, self.app.consumer)

    def _register(self) -> None:
        """Register agents, monitors and the end of the lifecycle with the app."""
        app = self.app
        agents = {self._topic: ("score", self._score)}
        if self._settings.update_merchant_profiles:
            agents[self._labels_topic] = "record_labels", self._record_labels
        for topic, (name, work) in agents.items():
            agent = partial(self._run_agent, work, topic)
            app.agent(app.topic(topic), name=name, supervisor_strategy=CrashingSupervisor)(agent)
        app.task(self._monitor_redis)
        app.task(self._monitor_lag)
        if self._settings.update_merchant_profiles:
            app.task(self._monitor_labels)
        app.task(self._monitor_checkpoint)
        app.on_before_shutdown.connect(self._on_before_shutdown)

    async def start_clients(self) -> None:
        """Connect the clients of the processors; the consumer is Faust's."""
        await self._score_log.start()
        await self._limits.read()
        await self.ownership.learn_topic_id()
        await self._publisher.start()
        consumer = self._consumer()
        consumer.on_assigned = self._on_assigned
        consumer.on_revoked = self._on_revoked
        consumer.from_begin = {self._labels_topic}
        # The watermark may be behind the committed offset, or belong to an earlier log.
        consumer.take_at_once = {self._topic}
        # The rest of the bound is for the commit and for leaving the group.
        consumer.stop_seconds = self._settings.shutdown_seconds / 3
        # Faust starts its own tasks only after the group has assigned partitions.
        self._group_watch = asyncio.create_task(self._watch_group())
        self.http_server.start()

    # agents ------------------------------------------------------------------------------

    async def _run_agent(self, work: Agent, topic: str, stream: Any) -> None:
        """Hand a topic's polls to its agent; Faust's stream only subscribes to the topic."""
        await work(self._consumer().deliveries(topic))

    async def _score(self, deliveries: AsyncIterator[Delivery]) -> None:
        """Compute polls in order, each while the one before is concluded."""
        concluding: asyncio.Task[None] | None = None
        async for delivery in deliveries:
            try:
                computed = await self.processor.compute(delivery.poll)
                if concluding is not None:
                    await concluding
            except BaseException as error:
                self._consumer().abandon(delivery)
                if isinstance(error, StartupError):
                    await self._end(error)
                    return
                raise
            concluding = asyncio.create_task(self._conclude(computed, delivery))

    async def _conclude(self, computed: ComputedPoll, delivery: Delivery) -> None:
        """Publish and save the computed poll, then ack it."""
        try:
            await self.processor.conclude(computed)
        except BaseException as error:
            self._consumer().abandon(delivery)
            if not isinstance(error, asyncio.CancelledError):
                await self.app.crash(error)
            raise
        self._consumer().ack(delivery)

    async def _record_labels(self, deliveries: AsyncIterator[Delivery]) -> None:
        """Record the labels of polls in order."""
        async for delivery in deliveries:
            try:
                await self.labels.process(delivery.poll)
            except BaseException as error:
                self._consumer().abandon(delivery)
                if isinstance(error, StartupError):
                    await self._end(error)
                    return
                raise
            self._consumer().ack(delivery)

    # lifecycle ---------------------------------------------------------------------------

    async def _end(self, error: StartupError) -> None:
        """End the process with the error as its last line, and without a traceback.

        Faust commits before it ends, and aiokafka retries that for ever on a deleted topic. So a
        timer ends the process.
        """
        asyncio.get_running_loop().call_later(CRASH_TIMEOUT_SECONDS, _end_now, error)
        with logs.quiet(FAUST_LOGGER):
            await self.app.crash(error)

    def _on_assigned(self, assigned: set[TP]) -> None:
        partitions = {tp.partition for tp in assigned if tp.topic == self._topic}
        self.ownership.assign(partitions)
        self.labels.assign({tp.partition for tp in assigned if tp.topic == self._labels_topic})
        self.metrics.partitions.set(len(partitions))
        self.health.up("partitions")
        self._refused_since = None
        # Until the first measurement of the lag: a worker that never begins is stalled, too.
        self.health.records_wait(bool(partitions))
        log.info("partitions assigned", extra={"partitions": sorted(partitions)})

    def _on_revoked(self, revoked: set[TP]) -> None:
        if not revoked:  # an empty revocation precedes the first assignment
            return
        partitions = {tp.partition for tp in revoked if tp.topic == self._topic}
        self.labels.assign(())
        self.ownership.revoke(partitions)
        if self._transactions is not None:
            self._transactions.release(partitions)
        for partition in partitions:
            self.metrics.lag.remove(str(partition))
            self.metrics.held.remove(str(partition))
        self.health.down("partitions", "a rebalance is under way")
        log.info("partitions revoked", extra={"partitions": sorted(partitions)})

    async def _on_before_shutdown(self, app: Any, **_: Any) -> None:
        """Disconnect the clients: the last micro-batch is applied and committed."""
        self.health.down("worker", "it is stopping")
        await self._publisher.stop()
        if self._transactions is not None:
            await self._transactions.stop()
        await self._score_log.stop()
        await self._store.close()
        await self._merchant_store.close()
        await self._evictions.close()
        if self._tracing is not None:
            await self._tracing.stop()

    # the group ---------------------------------------------------------------------------

    async def _watch_group(self) -> None:
        """End the worker when the group refuses it for good; it would wait for ever."""
        waiting_since = warned_at = refused_last = monotonic()
        while not self.app.should_stop:
            await asyncio.sleep(GROUP_CHECK_SECONDS)
            now = monotonic()
            if "partitions" not in self.health.missing():
                waiting_since = warned_at = now
            elif now - warned_at >= JOIN_WARNING_SECONDS:
                warned_at = now
                self._warn_of_no_group(now - waiting_since)
            error = self._consumer().group_error()
            if error is None:
                continue
            if self._refused_since is None or now - refused_last > GROUP_REFUSAL_SECONDS:
                self._refused_since = now
            refused_last = now
            hopeless = isinstance(error, PERMANENT_ERRORS)
            if hopeless or now - self._refused_since >= GROUP_REFUSAL_SECONDS:
                await self.app.crash(group_refusal(self._settings, error))
                return

    def _warn_of_no_group(self, seconds: float) -> None:
        log.warning(
            "still in no group; if the broker answers, see that its topic of groups exists"
            " (offsets.topic.replication.factor) and what the other members do",
            extra={"group": self._settings.kafka_group_id, "seconds": round(seconds)},
        )

    # monitors ----------------------------------------------------------------------------

    async def _monitor_redis(self) -> None:
        while not self.app.should_stop:
            await self._check_redis()
            self.metrics.polls_in_flight.set(self._consumer().polls_in_flight)
            await asyncio.sleep(REDIS_CHECK_SECONDS)

    async def _check_redis(self) -> None:
        try:
            await self._evictions.look()
            self.health.up("redis")
        except StoreUnavailableError as error:
            self.metrics.redis_errors.inc()
            self.health.down("redis", "it does not answer", str(error))

    async def _monitor_lag(self) -> None:
        while not self.app.should_stop:
            try:
                await self._lag_monitor.measure()
                await self.ownership.check_topic_id()
            except StartupError as error:  # a topic was deleted or recreated
                await self._end(error)
                return
            await asyncio.sleep(LAG_CHECK_SECONDS)

    async def _monitor_labels(self) -> None:
        """Record labels again that Redis lost, even if no new ones come."""
        while not self.app.should_stop:
            await asyncio.sleep(LABELS_CHECK_SECONDS)
            try:
                await self.labels.look()
            except StartupError as error:  # the topic was recreated
                await self._end(error)
                return

    async def _monitor_checkpoint(self) -> None:
        """Use new thresholds of the checkpoint file from the next micro-batch on."""
        while not self.app.should_stop:
            shipped = await asyncio.to_thread(self._checkpoint_watcher.new_thresholds)
            if shipped is not None:
                thresholds = thresholds_of(self._settings, shipped)
                if thresholds != self.processor.thresholds:
                    self.processor.use(thresholds)
                    log.info("thresholds changed", extra=dataclasses.asdict(thresholds))
            await asyncio.sleep(self._settings.checkpoint_poll_interval_seconds)


def _end_now(error: RecurError) -> None:
    """End without leaving the group, with the same last line and exit code."""
    print(f"recur: {error}", file=sys.stderr, flush=True)
    os._exit(1)


class _NoTables(TableManager):  # type: ignore[misc]
    """Table manager of an app without tables.

    Faust joins the group once its tables are registered, and gives them a second for that. The
    second was a fifth of a worker's start.
    """

    async def sleep(self, n: Any, *, loop: Any = None) -> None:
        """Return at once: only the wait for tables calls this."""


def faust_app(settings: Settings, directory: Path) -> faust.App:
    """Make the Faust app of this consumer group: it reads polls, without web, tables or leader.

    Args:
        directory: Faust makes a folder of its own there.
    """
    faust_transport.register()
    hosts = [host.strip() for host in settings.kafka_bootstrap_servers.split(",")]
    app = faust.App(
        settings.kafka_group_id,
        broker=[f"{faust_transport.URL_SCHEME}://{host}" for host in hosts],
        broker_credentials=_credentials(settings),
        autodiscover=False,
        web_enabled=False,
        store="memory://",
        TableManager=_NoTables,
        datadir=directory,
        topic_allow_declare=False,
        topic_disable_leader=True,
        stream_wait_empty=True,
        consumer_auto_offset_reset=settings.kafka_auto_offset_reset,
        consumer_group_instance_id=settings.kafka_group_instance_id or None,
        broker_commit_interval=settings.kafka_commit_interval_seconds,
        broker_session_timeout=settings.kafka_session_timeout_seconds,
        broker_heartbeat_interval=min(3.0, settings.kafka_session_timeout_seconds / 3),
        broker_request_timeout=max(40.0, settings.kafka_session_timeout_seconds * 1.5),
        broker_max_poll_records=settings.micro_batch_max,
        consumer_max_fetch_size=FETCH_BYTES_PER_PARTITION,
    )
    return app


def _credentials(settings: Settings) -> Any:
    protocol = settings.kafka_security_protocol
    if protocol == "PLAINTEXT":
        return None
    context = settings.kafka_ssl_context() if protocol.endswith("SSL") else None
    if protocol == "SSL":
        return faust.SSLCredentials(context=context)
    if settings.kafka_sasl_mechanism == "OAUTHBEARER":
        return OAuthCredentials(oauth_cb=settings.kafka_oauth_tokens(), ssl_context=context)
    password = settings.kafka_sasl_password
    return faust.SASLCredentials(
        username=settings.kafka_sasl_username,
        password=password.get_secret_value() if password else None,
        mechanism=settings.kafka_sasl_mechanism,
        ssl_context=context,
    )
