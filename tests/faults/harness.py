"""Harness of a fault: services, workers, workload, and the measured recoveries."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from model.checkpoint import Checkpoint
from pipeline.checkpoint import load_checkpoint
from pipeline.errors import RecurError
from pipeline.kafka.topics import ensure_topics
from pipeline.local.workers import WorkerProcess
from pipeline.settings import Settings, load_settings
from pipeline.timestamps import ANY_AGE_SECONDS
from tests.faults.monitor import Monitor, Observation
from tests.faults.worker_pool import WorkerPool
from tests.faults.workload import (
    ChangeColumns,
    ChangeRecords,
    Workload,
    unchanged_columns,
    unchanged_records,
)

RECOVERY_LIMIT_SECONDS = 240.0
"""Limit for a recovery; a system that takes longer counts as stuck."""

LAG_SECONDS = 1.0
"""Time whose arrivals may wait when the lag counts as gone."""


class NoEffectError(RecurError):
    """A fault had no effect."""


def require_effect(had_effect: bool, what: str) -> None:
    """Reject a fault that had no effect: it proves nothing.

    Raises:
        NoEffectError: the fault had no effect.
    """
    if not had_effect:
        raise NoEffectError(f"the fault had no effect: {what}")


@dataclass(frozen=True)
class Mark:
    """A moment and the state of the system at that moment.

    Attributes:
        at: monotonic seconds.
        applied: watermarks at that moment.
        workers: process ids of the workers that ran.
    """

    at: float
    applied: dict[int, int]
    workers: frozenset[int]


@dataclass(frozen=True)
class Recovery:
    """Duration of one recovery, in seconds.

    Attributes:
        ready: time until every partition moved again and the workers of the mark were ready.
            Later workers need not be ready, but their rebalance counts.
        lag_gone: time until only the arrivals of a second waited.
        applied: records that were applied in that time.
    """

    ready: float
    lag_gone: float
    applied: int


class Harness:
    """A running system, and the tools with which a fault disturbs it.

    Args:
        settings: settings of the workers.
        checkpoint: checkpoint of the workers.
        pool: the workers.
        workload: the transactions.
        monitor: observer of workers and partitions.
        rate: records/s of the workload.
        scale: length of the fault; 1: full length.
        seed: seed of all random choices.

    Attributes:
        recoveries: recoveries measured so far.
        notes: remarks on the run.
        fraction: share of the fault that is done, 0 to 1.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        pool: WorkerPool,
        workload: Workload,
        monitor: Monitor,
        *,
        rate: float,
        scale: float,
        seed: int,
    ) -> None:
        self.settings = settings
        self.checkpoint = checkpoint
        self.pool = pool
        self.workload = workload
        self.monitor = monitor
        self.random = random.Random(seed)
        self.recoveries: list[Recovery] = []
        self.notes: list[str] = []
        self.fraction = 0.0
        self.rate = rate
        self._scale = scale

    def times(self, whole: int, least: int = 1) -> range:
        """Scale the number of repetitions of a fault."""
        return range(max(least, round(whole * self._scale)))

    def seconds(self, whole: float, least: float = 1.0) -> float:
        """Scale a duration."""
        return max(least, whole * self._scale)

    async def run_for(self, least: float, most: float | None = None) -> None:
        """Let the system run for a random time between two limits, in seconds.

        Raises:
            RecurError: the workload failed.
        """
        await asyncio.sleep(least if most is None else self.random.uniform(least, most))
        self.workload.raise_failure()

    def any_worker(self) -> WorkerProcess:
        """Choose a living worker."""
        return self.random.choice(self.pool.alive() or self.pool.members)

    async def mark(self) -> Mark:
        """Mark the present moment."""
        at = monotonic()
        workers = frozenset(worker.process.pid for worker in self.pool.alive())
        return Mark(at, await self.monitor.applied(), workers)

    async def recover(self, mark: Mark, *, measured: bool = True) -> None:
        """Wait until the system has recovered, and note the time since a mark.

        Args:
            measured: whether the time counts: only if the system was complete before the fault.

        Raises:
            StuckError: the system does not recover in time.
        """
        first = await self.monitor.until(
            lambda sample: self._moves(sample, mark),
            "the workers to be ready and every partition to move",
            RECOVERY_LIMIT_SECONDS,
        )
        last = await self.monitor.until(
            lambda sample: sample.lag is not None and sample.lag <= self.rate * LAG_SECONDS,
            "the lag to disappear",
            RECOVERY_LIMIT_SECONDS,
        )
        applied = sum((last.applied or {}).values()) - sum(mark.applied.values())
        if measured:
            self.recoveries.append(Recovery(first.at - mark.at, last.at - mark.at, applied))

    def _moves(self, sample: Observation, mark: Mark) -> bool:
        """Whether the workers are ready and every watermark has changed since the mark."""
        if sample.not_ready & mark.workers or sample.applied is None or sample.ends is None:
            return False
        return all(
            sample.applied.get(partition) != mark.applied.get(partition)
            for partition, end in sample.ends.items()
            if end
        )

    async def settle(self) -> None:
        """Stop the workload and wait until everything is applied.

        Raises:
            RecurError: records stay unapplied.
        """
        await self.workload.stop()
        await self.monitor.until(
            lambda sample: sample.lag == 0, "everything to be applied", RECOVERY_LIMIT_SECONDS
        )


@asynccontextmanager
async def running_harness(
    overrides: Mapping[str, Any],
    directory: Path,
    *,
    workers: int,
    rate: float,
    scale: float,
    seed: int,
    history: int = 0,
    change_columns: ChangeColumns = unchanged_columns,
    change_records: ChangeRecords = unchanged_records,
) -> AsyncIterator[Harness]:
    """Run a system with its own topics, group and keys; leaving the context ends all of it.

    Args:
        overrides: settings that differ from the defaults, with the addresses.
        directory: directory for the workers' logs and files.
        workers: number of workers.
        rate: records/s of the workload, which starts when the workers are ready.
        history: records that are sent and applied before, at full speed.

    Raises:
        RecurError: a part does not start.
    """
    name = uuid.uuid4().hex[:8]
    overrides = {
        "topic_prefix": f"{name}-",
        "redis_key_prefix": f"recur-{name}",
        "kafka_group_id": f"group-{name}",
        "max_timestamp_age_seconds": ANY_AGE_SECONDS,
        **overrides,
    }
    settings = load_settings(**overrides)
    checkpoint = load_checkpoint(settings)
    await ensure_topics(settings)
    environment = {f"RECUR_{key.upper()}": str(value) for key, value in overrides.items()}
    pool = WorkerPool(directory, environment)
    workload = Workload(settings, seed, change_columns, change_records)
    monitor = Monitor(settings, checkpoint.digest, pool, workload.raise_failure)
    try:
        async with monitor:
            await pool.start(workers)
            await workload.start(rate, history)
            harness = Harness(
                settings, checkpoint, pool, workload, monitor, rate=rate, scale=scale, seed=seed
            )
            await monitor.until(
                lambda s: s.lag is not None and s.lag <= rate * LAG_SECONDS,
                "the workers to keep up with the workload",
                RECOVERY_LIMIT_SECONDS,
            )
            yield harness
    finally:
        await workload.abandon()
        await pool.stop()
