"""A worker's process: the real agents, processors, ownership and consumer on simulated services.

It is :class:`pipeline.worker.app.Worker` with another constructor. The agents compute each poll
while they conclude the previous one. The callbacks take over partitions and give them up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from prometheus_client import CollectorRegistry

from pipeline.kafka.polls import Poll
from pipeline.kafka.producer import Outgoing
from pipeline.scoring.assembly import WorkerServices, assemble
from pipeline.scoring.health import Health
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.processor import Processor
from pipeline.scoring.scorer import Scorer
from pipeline.scoring.stages import ComputedPoll
from pipeline.settings import Settings
from pipeline.worker import app
from pipeline.worker.faust_transport import PartitionLog
from tests.fakes.memory import MemoryKafka, MemoryMerchantStore
from tests.simulation.auditor import Auditor, Conclusion
from tests.simulation.chain import ChainScorer
from tests.simulation.clock import Host, Loop
from tests.simulation.group import Consumer, Coordinator, Member
from tests.simulation.network import Network
from tests.simulation.services import (
    MerchantClient,
    PollClient,
    Publisher,
    ScoreLog,
    StateClient,
    StateStore,
)

METRICS = Metrics(CollectorRegistry())
"""Shared metrics that no check reads; making them for each run would take a tenth of it."""


@dataclass
class Parts:
    """Classes that workers are built from; a bug planted by hand replaces one."""

    consumer: type[Consumer] = Consumer
    state_client: type[StateClient] = StateClient
    merchant_client: type[MerchantClient] = MerchantClient
    poll_client: type[PollClient] = PollClient
    publisher: type[Publisher] = Publisher
    score_log: type[ScoreLog] = ScoreLog
    scorer: type[ChainScorer] = ChainScorer
    worker: type[Worker] | None = None


@dataclass
class Services:
    """Objects that all workers share."""

    loop: Loop
    rng: Random
    network: Network
    coordinator: Coordinator
    settings: Settings
    scorer: Scorer
    kafka: MemoryKafka
    store: StateStore
    merchants: MemoryMerchantStore
    auditor: Auditor
    clock_ms: Callable[[], int]
    is_cluster: bool


class Worker(app.Worker):
    """A worker in one simulated process.

    Args:
        died: called when the process ends by itself.
    """

    def __init__(
        self, host: Host, services: Services, parts: Parts, died: Callable[[Worker], None]
    ) -> None:
        settings, network = services.settings, services.network
        self.host = host
        self.error: BaseException | None = None
        self.metrics = METRICS
        self.health = Health(settings.watchdog_seconds, services.loop.time)
        self._services = services
        self._settings = settings
        self._topic = settings.topic("transactions")
        self._labels_topic = settings.topic("labels")
        self._transactions = None
        self._died = died
        self._known: dict[int, tuple[Any, int]] = {}
        self._conclusions: dict[int, Conclusion] = {}
        self._concluding: Conclusion | None = None
        self.member = Member(
            host,
            services.loop,
            services.rng,
            network,
            services.coordinator,
            services.kafka,
            settings,
            parts.consumer,
            self._crashed,
        )
        self.app = self.member.app
        consumer = self.member.consumer
        consumer.on_assigned = self._on_assigned
        consumer.on_revoked = self._on_revoked
        consumer.from_begin = {self._labels_topic}
        consumer.take_at_once = {self._topic}
        merchants = parts.merchant_client(host, network, services.merchants, services.auditor)
        store = parts.state_client(host, network, services.store)
        merchants.writer = services.rng.getrandbits(64)
        assembled = assemble(
            settings,
            services.scorer,
            settings.topic_partitions,
            WorkerServices(
                store=store,
                merchants=merchants,
                polls=parts.poll_client(
                    host, network, store, merchants, is_cluster=services.is_cluster
                ),
                publisher=parts.publisher(
                    host, network, services.kafka, settings, services.rng, self._published
                ),
                score_log=parts.score_log(host, network, services.kafka, settings),
                consumer=PartitionLog(self._consumer, self._topic),
                labels_consumer=PartitionLog(self._consumer, self._labels_topic),
                metrics=METRICS,
                health=self.health,
                clock_ms=services.clock_ms,
                writer=merchants.writer,
            ),
        )
        self._use(assembled)
        self.ownership.recovery.log_id._last = services.kafka.topic_id(self._topic)  # as at a start
        self._watch(self.processor)

    async def _end(self, error: BaseException) -> None:
        """End the process without the timer of a real one."""
        await self.app.crash(error)

    def start(self) -> None:
        """Start the member and the agents."""
        member = self.member
        member.start()
        for topic, agent in ((self._topic, self._score), (self._labels_topic, self._record_labels)):
            task = self.host.start(self._services.loop, agent(member.consumer.deliveries(topic)))
            task.add_done_callback(member._ended)

    def look_at_labels(self) -> None:
        """Check once that the labels are still recorded; a real worker repeats this."""
        task = self.host.start(self._services.loop, self.labels.look())
        task.add_done_callback(self.member._ended)

    def stop(self) -> None:
        """End the process as with SIGTERM."""
        task = self.host.start(self._services.loop, self.member.leave())
        task.add_done_callback(lambda _: self._crashed(None))

    def kill(self) -> None:
        """Kill the process as with SIGKILL; messages that it sent may still arrive."""
        self.host.is_dead = True
        self._services.loop.close_tasks(self.host.tasks)

    def _crashed(self, error: BaseException | None) -> None:
        if not self.host.is_dead:
            self.error = error
            self.host.is_dead = True
            self._services.loop.soon(self._died, self)

    # the auditor's record of the scores that a worker must know -------------------------------

    def _watch(self, processor: Processor) -> None:
        compute, conclude = processor.compute, processor.conclude

        async def watched_compute(poll: Poll) -> ComputedPoll:
            conclusion = Conclusion(
                self.member.app.consumer_generation_id,
                {partition: self._known_now(partition) for partition in poll.chunks},
            )
            fresh = [p for p in poll.chunks if self.ownership.owned(p) is None]
            computed = await compute(poll)
            self._conclusions[id(poll)] = conclusion
            for partition in fresh:
                self._known[partition] = (
                    self.ownership.owned(partition),
                    conclusion.known[partition],
                )
            return computed

        async def watched_conclude(computed: ComputedPoll) -> None:
            poll = computed.poll
            self._concluding = self._conclusions.pop(id(poll))
            owned = {partition: self.ownership.owned(partition) for partition in poll.chunks}
            await conclude(computed)
            for partition, part in owned.items():
                if part is not None and partition in self._appended:
                    self._known[partition] = part, self._appended[partition]
            self._concluding = None

        self._appended: dict[int, int] = {}
        processor.compute = watched_compute  # type: ignore[method-assign]
        processor.conclude = watched_conclude  # type: ignore[method-assign]

    def _known_now(self, partition: int) -> int:
        """Return the offset before which the worker knows every score."""
        owned = self.ownership.owned(partition)
        if owned is None:  # taking it over reads its scores
            return self._services.kafka.bounds(self._settings.topic("scores"), partition).end
        known, end = self._known.get(partition, (None, 0))
        return end if known is owned else 0

    def _published(self) -> Callable[[str, int, int, Sequence[Outgoing]], None]:
        """Return the callback that reports appended records to the auditor."""
        services, settings, concluding = self._services, self._settings, self._concluding
        auditor = services.auditor
        scores, alerts = settings.topic("scores"), settings.topic("alerts")

        def appended(topic: str, partition: int, first: int, records: Sequence[Outgoing]) -> None:
            if topic == scores:
                assert concluding is not None
                is_late = not services.coordinator.is_owner(
                    self.member, self._topic, partition, concluding.generation
                )
                known = concluding.known[partition]
                for place, record in enumerate(records, first):
                    auditor.scored(partition, place, record.value, is_late, known)
                if self._concluding is concluding:
                    self._appended[partition] = first + len(records)
            else:
                for record in records:
                    if topic == alerts:
                        auditor.alerted(record.value)
                    else:
                        auditor.rejected(dict(record.headers))

        return appended
