"""The Faust app: consumer group, agent and lifecycle around the processor.

The only importer of faust, with :mod:`pipeline.worker.faust_transport`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from time import monotonic
from typing import Any, cast

import faust
import torch
import uvloop
from aiokafka.errors import KafkaError
from faust.types import TP
from mode import CrashingSupervisor
from prometheus_client import CollectorRegistry

from model.checkpoint import Checkpoint
from pipeline import logs
from pipeline.checkpoint import load_checkpoint
from pipeline.errors import RecurError, StartupError
from pipeline.kafka.group_errors import PERMANENT_ERRORS, group_refusal
from pipeline.kafka.message_limits import MessageLimits
from pipeline.kafka.polls import LogUnavailableError
from pipeline.kafka.producer import KafkaProducer
from pipeline.kafka.score_log import KafkaScoreLog
from pipeline.kafka.topics import ROLES, partition_count
from pipeline.kafka.transactional_producer import TransactionalProducer
from pipeline.messages.decision import thresholds_of
from pipeline.scoring.batch import ComputedPoll
from pipeline.scoring.evictions import Evictions
from pipeline.scoring.health import Health
from pipeline.scoring.labels import STREAM, LabelProcessor
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.partitions import PartitionManager
from pipeline.scoring.processor import Processor
from pipeline.scoring.retry import Retrier
from pipeline.scoring.scorer import scorer_of
from pipeline.scoring.topic_watcher import OpenTransactions, TopicWatcher
from pipeline.settings import Settings
from pipeline.storage.merchant_store import RedisMerchantStore
from pipeline.storage.state_store import RedisStateStore, StoreUnavailableError
from pipeline.worker import faust_transport as poll_transport
from pipeline.worker.checkpoint_watcher import CheckpointWatcher
from pipeline.worker.http_server import HttpServer
from pipeline.worker.preflight import check_services
from pipeline.worker.shutdown import ShutdownGuard, leave_at_signals

log = logging.getLogger(__name__)

REDIS_LOOK_SECONDS = 1.0
"""Between two looks at Redis."""

LAG_LOOK_SECONDS = 5.0
"""Between two looks at lag and broker: each delays the transactions of that moment by 3 ms."""

END_SECONDS = 10.0
"""So long an end in good order may take, where the worker has to end."""

FAUST_LOGGER = "faust.app.base"
"""It logs the trace of whatever ends the app."""

LOOK_LIMIT_SECONDS = 5.0
"""So long the broker may take to answer at a look."""

LABELS_LOOK_SECONDS = 10.0
"""Between two looks at whether Redis still has the labels that were booked."""

GROUP_LOOK_SECONDS = 0.5
"""Between two looks at whether the group refuses this worker; each has it ask again."""

GROUP_PATIENCE_SECONDS = 10.0
"""A group that refuses a worker for so long will not take it: the worker ends."""

JOIN_TELL_SECONDS = 60.0
"""Between two lines of a worker that is in no group yet."""

GC_THRESHOLD = 100_000
"""Objects allocated and not freed before the collector looks at the young ones."""

FETCH_BYTES_PER_PARTITION = 256 * 1024
"""What a fetch may bring of a partition, but for a batch of records that is larger: a few polls.
Faust's 1 MiB takes 20 MB of memory more and is no faster."""

SWITCH_INTERVAL_SECONDS = 0.0005
"""A thread that computes lets the event loop run after so long; Python's 5 ms would be most of a
fast answer."""


class Worker:
    """One worker process: settings and checkpoint made into a running Faust app.

    Args:
        settings: all of them.
        checkpoint: the model.
        partitions: partition count of the transactions topic.
        directory: for Faust's own files.
    """

    def __init__(
        self, settings: Settings, checkpoint: Checkpoint, partitions: int, directory: Path
    ) -> None:
        self._settings = settings
        self._topic = settings.topic("transactions")
        self._labels_topic = settings.topic("labels")
        self.metrics = Metrics(CollectorRegistry())
        self.health = Health(settings.watchdog_seconds)
        self.endpoints = HttpServer(
            settings.http_host, settings.http_port, self.metrics, self.health
        )
        architecture = checkpoint.network.architecture
        self.metrics.model.info(
            {
                "digest": checkpoint.digest,
                "architecture": f"GRU {architecture.layers}x{architecture.hidden_size}",
            }
        )
        self._checkpoint_watch = CheckpointWatcher(
            settings.checkpoint, checkpoint.digest, checkpoint.header.thresholds
        )
        self._store = RedisStateStore.from_settings(settings, checkpoint.digest)
        self._merchant_store = RedisMerchantStore.from_settings(settings)
        self._score_log = KafkaScoreLog(settings)
        self._limits = MessageLimits(settings)
        lost_letters = self.metrics.letters_lost.inc
        self._publisher = KafkaProducer(settings, self._limits, on_lost_dead_letters=lost_letters)
        self._transactions: TransactionalProducer | None = None
        if settings.exactly_once:
            self._transactions = TransactionalProducer(settings, self._limits, lost_letters)
        self._group_watch: asyncio.Task[None] | None = None
        self._refused_since: float | None = None
        self._watch_topics()
        self.app = faust_app(settings, directory)
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
            on_repaired=lambda: self._consumer().look_again(self._topic),
        )
        self._store.loss_check = self._merchant_store.loss_check = self._evictions
        retrier = Retrier(self.metrics, self.health)
        self.ownership = PartitionManager(
            topic=self._topic,
            scores_topic=settings.topic("scores"),
            partitions=partitions,
            store=self._store,
            score_log=self._score_log,
            consumer=poll_transport.PartitionLog(self._consumer, self._topic),
            retrier=retrier,
            metrics=self.metrics,
            transactions=self._transactions,
            on_fenced=lambda partition: self._consumer().rejoin(),
            on_new_log=settings.on_new_log,
        )
        self.processor = Processor(
            settings=settings,
            scorer=scorer_of(settings, checkpoint),
            store=self._store,
            merchant_store=self._merchant_store,
            publisher=self._publisher,
            transactions=self._transactions,
            partitions=self.ownership,
            retrier=retrier,
            metrics=self.metrics,
            health=self.health,
        )
        self.labels = LabelProcessor(
            settings=settings,
            store=self._merchant_store,
            publisher=self._publisher,
            logs=self._score_log,
            consumer=poll_transport.PartitionLog(self._consumer, self._labels_topic),
            retrier=retrier,
            metrics=self.metrics,
            health=self.health,
        )
        self._wire()

    def _watch_topics(self) -> None:
        """What the monitors hold of the topics."""
        settings = self._settings
        roles = [role for role in ROLES if role != "labels" or settings.update_merchant_profiles]
        self._topic_watch = TopicWatcher(
            [settings.topic(role) for role in roles],
            {self._topic: "states", self._labels_topic: "recorded labels"},
            settings.topic("scores"),
            settings.on_new_log == "stop",
            settings.topic_missing_seconds,
            self._score_log,
            self.health,
        )
        self._open_transactions = OpenTransactions(self._topic)
        self._open_label_transactions = OpenTransactions(self._labels_topic)

    def _consumer(self) -> poll_transport.Consumer:
        return cast(poll_transport.Consumer, self.app.consumer)

    def _wire(self) -> None:
        """Register agents, monitors and lifecycle with the app."""
        app = self.app
        agents = {self._topic: ("score", self._score)}
        if self._settings.update_merchant_profiles:
            agents[self._labels_topic] = "book", self._book
        for topic, (name, agent) in agents.items():
            polls = app.topic(topic, schema=poll_transport.PollSchema())
            app.agent(polls, name=name, supervisor_strategy=CrashingSupervisor)(agent)
        app.task(self._monitor_redis)
        app.task(self._monitor_lag)
        if self._settings.update_merchant_profiles:
            app.task(self._monitor_labels)
        app.task(self._monitor_checkpoint)
        app.on_before_shutdown.connect(self._on_before_shutdown)

    async def start_clients(self) -> None:
        """Connect what the processor uses; the consumer is Faust's."""
        await self._score_log.start()
        await self._limits.read()
        await self.ownership.learn_topic_id()
        await self._publisher.start()
        consumer = self._consumer()
        consumer.on_assigned = self._on_assigned
        consumer.on_revoked = self._on_revoked
        consumer.from_begin = {self._labels_topic}
        # A watermark may be behind the committed offset, or of a log before this one.
        consumer.take_at_once = {self._topic}
        # What is left of the bound goes into the commit and into leaving the group.
        consumer.stop_seconds = self._settings.shutdown_seconds / 3
        # Faust starts its own tasks only once the group has given partitions.
        self._group_watch = asyncio.create_task(self._watch_group())
        self.endpoints.start()

    async def _score(self, polls: Any) -> None:
        """The agent: computes polls in order, each while the one before is concluded."""
        consumer = self._consumer()
        concluding: asyncio.Task[None] | None = None
        async for event in polls.noack().events():
            if not consumer.start_work(event.message):
                continue
            try:
                computed = await self.processor.compute(event.value)
                if concluding is not None:
                    await concluding
            except BaseException as error:
                consumer.abandon(event.message)
                if isinstance(error, StartupError):
                    await self._end(error)
                    return
                raise
            concluding = asyncio.create_task(self._conclude(computed, event))

    async def _conclude(self, computed: ComputedPoll, event: Any) -> None:
        """Publish, save and ack by hand what was computed."""
        try:
            await self.processor.conclude(computed)
        except BaseException as error:
            self._consumer().abandon(event.message)
            if not isinstance(error, asyncio.CancelledError):
                await self.app.crash(error)
            raise
        event.ack()

    async def _book(self, polls: Any) -> None:
        """The agent of labels: books polls in order."""
        consumer = self._consumer()
        async for event in polls.noack().events():
            if not consumer.start_work(event.message):
                continue
            try:
                await self.labels.process(event.value)
            except BaseException as error:
                consumer.abandon(event.message)
                if isinstance(error, StartupError):
                    await self._end(error)
                    return
                raise
            event.ack()

    async def _end(self, error: StartupError) -> None:
        """End the process; its last line says all, and a trace of it would hide that.

        Faust commits before it ends, and aiokafka tries that for ever of a topic that is gone.
        """
        asyncio.get_running_loop().call_later(END_SECONDS, _end_now, error)
        with logs.quiet(FAUST_LOGGER):
            await self.app.crash(error)

    def _on_assigned(self, assigned: set[TP]) -> None:
        partitions = {tp.partition for tp in assigned if tp.topic == self._topic}
        self.ownership.assign(partitions)
        self.labels.assign({tp.partition for tp in assigned if tp.topic == self._labels_topic})
        self.metrics.partitions.set(len(partitions))
        self.health.up("partitions")
        self._refused_since = None
        # Until the monitors have looked: a worker that does not even begin is stalled, too.
        self.health.records_wait(bool(partitions))
        log.info("partitions assigned", extra={"partitions": sorted(partitions)})

    def _on_revoked(self, revoked: set[TP]) -> None:
        if not revoked:  # the first assignment comes with an empty revocation
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
        """The last micro-batch is applied and committed: disconnect."""
        self.health.down("worker", "it is stopping")
        await self._publisher.stop()
        if self._transactions is not None:
            await self._transactions.stop()
        await self._score_log.stop()
        await self._store.close()
        await self._merchant_store.close()
        await self._evictions.close()

    # the group ---------------------------------------------------------------------------

    async def _watch_group(self) -> None:
        """End the worker where the group refuses it for good; it would wait for ever."""
        waiting_since = told = refused_last = monotonic()
        while not self.app.should_stop:
            await asyncio.sleep(GROUP_LOOK_SECONDS)
            now = monotonic()
            if "partitions" not in self.health.missing():
                waiting_since = told = now
            elif now - told >= JOIN_TELL_SECONDS:
                told = now
                log.warning(
                    "still in no group; where the broker answers, see that its topic of groups "
                    "is there (offsets.topic.replication.factor) and what the other members do",
                    extra={
                        "group": self._settings.kafka_group_id,
                        "seconds": round(now - waiting_since),
                    },
                )
            error = self._consumer().group_error()
            if error is None:
                continue
            if self._refused_since is None or now - refused_last > GROUP_PATIENCE_SECONDS:
                self._refused_since = now
            refused_last = now
            hopeless = isinstance(error, PERMANENT_ERRORS)
            if hopeless or now - self._refused_since >= GROUP_PATIENCE_SECONDS:
                await self.app.crash(group_refusal(self._settings, error))
                return

    # monitors ----------------------------------------------------------------------------

    async def _monitor_redis(self) -> None:
        while not self.app.should_stop:
            await self._look_at_redis()
            self.metrics.polls_in_flight.set(self._consumer().polls_in_flight)
            await asyncio.sleep(REDIS_LOOK_SECONDS)

    async def _monitor_lag(self) -> None:
        while not self.app.should_stop:
            try:
                await self._look_at_lag()
                await self.ownership.check_topic_id()
            except StartupError as error:  # a topic is gone, or another one
                await self._end(error)
                return
            await asyncio.sleep(LAG_LOOK_SECONDS)

    async def _monitor_labels(self) -> None:
        """Labels that Redis lost are booked again even where no others come."""
        while not self.app.should_stop:
            await asyncio.sleep(LABELS_LOOK_SECONDS)
            try:
                await self.labels.look()
            except StartupError as error:  # the topic is another one
                await self._end(error)
                return

    async def _monitor_checkpoint(self) -> None:
        """New thresholds in the checkpoint's file decide from the next micro-batch on."""
        while not self.app.should_stop:
            shipped = await asyncio.to_thread(self._checkpoint_watch.look)
            if shipped is not None:
                thresholds = thresholds_of(self._settings, shipped)
                if thresholds != self.processor.thresholds:
                    self.processor.use(thresholds)
                    log.info("thresholds changed", extra=dataclasses.asdict(thresholds))
            await asyncio.sleep(self._settings.checkpoint_poll_interval_seconds)

    async def _look_at_redis(self) -> None:
        try:
            await self._evictions.look()
            self.health.up("redis")
        except StoreUnavailableError as error:
            self.metrics.redis_errors.inc()
            self.health.down("redis", "it does not answer", str(error))

    async def _look_at_lag(self) -> None:
        """Lag of what is assigned, from a connection that is not the consumer's."""
        assigned, labels = self.ownership.assigned(), self.labels.assigned()
        try:
            there = await asyncio.wait_for(self._topic_watch.look(), timeout=LOOK_LIMIT_SECONDS)
            if self._topic_watch.changed & {self._topic, self._labels_topic}:
                self._consumer().look_at_topics()
            # aiokafka would ask for what is not there, ten times a second.
            ends = await self._ends(self._topic, assigned if self._topic in there else set())
            label_ends = await self._ends(
                self._labels_topic, labels if self._labels_topic in there else set()
            )
            self.health.up("kafka")
            await self._tell_lag(ends)
            await self._tell_labels_lag(label_ends)
        except (TimeoutError, LogUnavailableError) as error:
            self.metrics.kafka_errors.inc()
            self.health.down("kafka", "it does not answer", str(error) or type(error).__name__)
            self.health.records_wait(self._consumer().polls_in_flight > 0)

    async def _tell_lag(self, ends: dict[int, int]) -> None:
        """Lag and what is held back, of the transactions topic."""
        positions = await self._positions(self._topic, ends, self.ownership.next_offsets())
        stable = await self._stable_ends(self._topic, ends, positions)
        held = self._open_transactions.check(ends, stable, positions)
        for partition, end in ends.items():
            lag = max(0, end - positions.get(partition, end))
            self.metrics.lag.labels(str(partition)).set(lag)
            records = held[partition].records if partition in held else 0
            self.metrics.held.labels(str(partition)).set(records)
        # What is held back moves when its transaction ends, and not by a new start.
        self.health.records_wait(any(stable[p] > position for p, position in positions.items()))

    async def _tell_labels_lag(self, ends: dict[int, int]) -> None:
        """The same of the labels topic."""
        positions = await self._positions(self._labels_topic, ends, self.labels.next_offsets())
        stable = await self._stable_ends(self._labels_topic, ends, positions)
        self._open_label_transactions.check(ends, stable, positions)
        self.metrics.labels_lag.set(sum(max(0, ends[p] - at) for p, at in positions.items()))
        waiting = any(stable[p] > position for p, position in positions.items())
        self.health.records_wait(waiting, STREAM)

    async def _ends(self, topic: str, partitions: set[int]) -> dict[int, int]:
        if not partitions:
            return {}
        return await asyncio.wait_for(
            self._score_log.high_watermarks(topic, sorted(partitions)), timeout=LOOK_LIMIT_SECONDS
        )

    async def _stable_ends(
        self, topic: str, ends: dict[int, int], positions: dict[int, int]
    ) -> dict[int, int]:
        """Up to where records are given to who reads what is committed."""
        behind = [p for p, position in positions.items() if position < ends[p]]
        if not behind:
            return ends
        found = await asyncio.wait_for(
            self._score_log.ends(topic, sorted(behind)), timeout=LOOK_LIMIT_SECONDS
        )
        return {**ends, **found}

    async def _positions(
        self, topic: str, ends: dict[int, int], applied: dict[int, int]
    ) -> dict[int, int]:
        """Up to where all is applied, of each partition of which that is known."""
        positions = {}
        for partition in ends:
            tp = TP(topic, partition)
            position = applied.get(partition)
            if position is None:
                position = await self._committed(tp)
            read_to = self._consumer().read_to(tp)
            if position is None or (read_to is not None and read_to > position):
                position = read_to
            if position is not None:
                positions[partition] = position
        return positions

    async def _committed(self, tp: TP) -> int | None:
        try:
            # A consumer whose broker is away waits for it, and the monitor with it.
            return await asyncio.wait_for(
                self._consumer().committed(tp), timeout=LOOK_LIMIT_SECONDS
            )
        except (TimeoutError, LogUnavailableError) as error:
            self.metrics.kafka_errors.inc()
            self.health.down("kafka", "it does not answer", str(error) or type(error).__name__)
            return None


def _end_now(error: RecurError) -> None:
    """End without leaving the group, with the same last line and exit status."""
    print(f"recur: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def faust_app(settings: Settings, directory: Path) -> faust.App:
    """A Faust app of this consumer group that reads polls; no web, no tables, no leader.

    Faust makes a folder of its own in ``directory``.
    """
    poll_transport.register()
    hosts = [host.strip() for host in settings.kafka_bootstrap_servers.split(",")]
    app = faust.App(
        settings.kafka_group_id,
        broker=[f"{poll_transport.URL_SCHEME}://{host}" for host in hosts],
        broker_credentials=_credentials(settings),
        autodiscover=False,
        web_enabled=False,
        store="memory://",
        datadir=directory,
        topic_allow_declare=False,
        topic_disable_leader=True,
        stream_wait_empty=True,
        consumer_auto_offset_reset=settings.kafka_auto_offset_reset,
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
    password = settings.kafka_sasl_password
    return faust.SASLCredentials(
        username=settings.kafka_sasl_username,
        password=password.get_secret_value() if password else None,
        mechanism=settings.kafka_sasl_mechanism,
        ssl_context=context,
    )


class _Process(faust.Worker):  # type: ignore[misc]
    """Faust's worker process with our clients started before the app, and a bound on its stop."""

    def __init__(self, worker: Worker, ending: ShutdownGuard, **options: Any) -> None:
        super().__init__(worker.app, **options)
        self.spinner = None  # Faust's progress on the terminal
        self._recur = worker
        self._ending = ending

    def _schedule_shutdown(self, signal: signal.Signals) -> None:
        self._ending.told(signal)
        super()._schedule_shutdown(signal)

    def _crash(self, reason: BaseException) -> None:
        self._ending.begin()
        super()._crash(reason)

    async def stop(self) -> None:
        """Stop, within the bound."""
        self._ending.begin()
        await super().stop()

    async def on_first_start(self) -> None:
        try:
            await self._recur.start_clients()
        except (RecurError, KafkaError, OSError) as error:
            refusal = error
            if not isinstance(error, RecurError):
                refusal = StartupError(
                    f"the broker went away during the start ({type(error).__name__}): see that it"
                    " is up, and start again"
                )
            self._recur.app.crash_reason = refusal  # _run() tells it
            raise refusal from error
        await super().on_first_start()

    def on_setup_root_logger(self, logger: Any, level: int) -> None:
        """Logging is set up already."""


def _spare_the_collector() -> None:
    """Keep the garbage collector from walking what stays: a poll allocates many objects.

    Reference counting frees almost all of them; at Python's default threshold of 700 the
    collector takes a tenth of the worker's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 20)


def run_worker(settings: Settings) -> int:
    """Run a worker until SIGTERM or SIGINT; the exit code.

    Raises:
        RecurError: the worker cannot start or go on; the message says what to do.
    """
    logs.configure(settings.log_level, settings.log_format)
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(settings)
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    partitions = loop.run_until_complete(check_services(settings, checkpoint))
    with tempfile.TemporaryDirectory(prefix="recur-worker-") as directory:
        leave_at_signals(Path(directory))  # until Faust takes the signals
        worker = Worker(settings, checkpoint, partitions, Path(directory))
        log.info(
            "worker starts",
            extra={
                "model": checkpoint.digest,
                "partitions": partitions,
                "endpoints": worker.endpoints.address,
            },
        )
        _spare_the_collector()
        sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
        return _run(worker, loop, ShutdownGuard(settings.shutdown_seconds, Path(directory)))


def _run(worker: Worker, loop: asyncio.AbstractEventLoop, ending: ShutdownGuard) -> int:
    process = _Process(
        worker, ending, loop=loop, quiet=True, override_logging=False, redirect_stdouts=False
    )
    try:
        process.execute_from_commandline()
    except SystemExit as end:
        crash = worker.app.crash_reason
        if isinstance(crash, RecurError):
            raise crash from None
        log.info("worker ends", extra={"code": end.code})
        return 1 if crash is not None else int(end.code or 0)
    return 0
