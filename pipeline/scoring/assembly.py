"""Assembly of a worker's parts from the services that it uses.

Workers and the tests' simulated workers are wired here, so that tests run the same wiring.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.kafka.producer import Publisher, Transactions
from pipeline.kafka.score_log import ScoreLog
from pipeline.scoring.computer import PollComputer
from pipeline.scoring.consumer import PartitionConsumer
from pipeline.scoring.health import Health
from pipeline.scoring.labels import LabelProcessor
from pipeline.scoring.metrics import Metrics
from pipeline.scoring.partitions import PartitionManager
from pipeline.scoring.processor import Processor
from pipeline.scoring.retry import Retrier
from pipeline.scoring.scorer import Scorer
from pipeline.scoring.writer import PollWriter
from pipeline.settings import Settings
from pipeline.storage.merchant_store import MerchantStore
from pipeline.storage.poll_store import PollStore
from pipeline.storage.state_store import StateStore
from pipeline.tracing.polls import PollTracer


def wall_clock_ms() -> int:
    """Return the time in epoch milliseconds."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class WorkerServices:
    """The services that a worker uses, as interfaces.

    Attributes:
        store, merchants, polls: account states, merchants' profiles, and both for a poll.
        publisher: publishes scores, alerts and dead letters.
        score_log: bounds and ids of topics, published scores.
        consumer, labels_consumer: committed offsets and seeks of the two topics.
        metrics, health: monitoring.
        transactions: transactions of exactly-once processing; None without them.
        on_fenced: called with a partition that another worker took.
        clock_ms: wall clock, epoch milliseconds.
        writer: id of this worker in the watermarks that it writes, u64.
        tracer: records spans of polls and alerts; None without tracing.
    """

    store: StateStore
    merchants: MerchantStore
    polls: PollStore
    publisher: Publisher
    score_log: ScoreLog
    consumer: PartitionConsumer
    labels_consumer: PartitionConsumer
    metrics: Metrics
    health: Health
    transactions: Transactions | None = None
    on_fenced: Callable[[int], None] = lambda partition: None
    clock_ms: Callable[[], int] = wall_clock_ms
    writer: int = field(default_factory=lambda: secrets.randbits(64))
    tracer: PollTracer | None = None


@dataclass(frozen=True)
class WorkerParts:
    """Parts that do a worker's work.

    Attributes:
        ownership: the owned partitions and their progress.
        processor: processes polls of transactions.
        labels: processes polls of labels.
    """

    ownership: PartitionManager
    processor: Processor
    labels: LabelProcessor


def assemble(
    settings: Settings, scorer: Scorer, partitions: int, services: WorkerServices
) -> WorkerParts:
    """Wire the parts of a worker.

    Args:
        settings: limits and names.
        scorer: the model.
        partitions: partition count of the transactions topic and of the scores topic.
        services: what the parts use.
    """
    metrics, health = services.metrics, services.health
    retrier = Retrier(metrics, health)
    tracer, publisher, transactions = services.tracer, services.publisher, services.transactions
    if tracer is not None:
        publisher = tracer.publisher(publisher)
        transactions = transactions and tracer.transactions(transactions)
    ownership = PartitionManager(
        topic=settings.topic("transactions"),
        scores_topic=settings.topic("scores"),
        partitions=partitions,
        store=services.store,
        score_log=services.score_log,
        consumer=services.consumer,
        retrier=retrier,
        metrics=metrics,
        writer=services.writer,
        transactions=services.transactions,
        on_fenced=services.on_fenced,
        on_new_log=settings.on_new_log,
    )
    computer = PollComputer(
        settings=settings,
        scorer=scorer,
        store=services.polls,
        partitions=ownership,
        retrier=retrier,
        metrics=metrics,
        clock_ms=services.clock_ms,
    )
    writer = PollWriter(
        settings=settings,
        features=scorer.checkpoint.header.features,
        store=services.polls,
        publisher=publisher,
        transactions=transactions,
        partitions=ownership,
        retrier=retrier,
        metrics=metrics,
        health=health,
        clock_ms=services.clock_ms,
    )
    labels = LabelProcessor(
        settings=settings,
        store=services.merchants,
        publisher=services.publisher,
        logs=services.score_log,
        consumer=services.labels_consumer,
        retrier=retrier,
        metrics=metrics,
        health=health,
        clock_ms=services.clock_ms,
    )
    return WorkerParts(ownership, Processor(computer, writer, tracer), labels)
