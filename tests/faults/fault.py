"""Faults, their runs and their results."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pipeline.errors import RecurError
from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.progress import Bar
from tests.faults.harness import Harness, Recovery, running_harness
from tests.faults.invariants import Invariants, check_invariants
from tests.faults.workload import ChangeColumns, ChangeRecords, unchanged_columns, unchanged_records

FRAME_SECONDS = 0.5
WORKER_DEATH_SECONDS = 15.0
"""Limit for the recovery from a worker's death, at the default session timeout of 10 s."""

REDIS_BACK_SECONDS = 5.0
"""Limit for the recovery after Redis is back."""

Addresses = dict[str, str]
"""Settings with the addresses of broker and Redis."""


class Shared:
    """Broker and Redis of all faults that do not disturb them; started at their first use.

    Args:
        kafka: running broker to use.
        redis: running Redis to use.
    """

    def __init__(self, kafka: Kafka | None = None, redis: Redis | None = None) -> None:
        self._kafka = kafka
        self._redis = redis
        self._stack = ExitStack()

    def __enter__(self) -> Shared:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def kafka(self) -> Kafka:
        """The shared broker.

        Raises:
            ServiceError: the broker does not start.
        """
        if self._kafka is None:
            self._kafka = self._stack.enter_context(Kafka())
        return self._kafka

    @property
    def redis(self) -> Redis:
        """The shared Redis.

        Raises:
            ServiceError: Redis does not start.
        """
        if self._redis is None:
            self._redis = self._stack.enter_context(Redis())
        return self._redis


class Fault(ABC):
    """A fault that disturbs a system under load.

    Attributes:
        name: name on the command line.
        what: description in one line.
        workers: number of workers.
        rate: records/s of the workload.
        history: records that are applied before, at full length.
        ready_within: promised seconds until the system is ready again. None: no promise.
        leaves_zombies: whether workers wake up after they lost their partitions. Without fencing
            they may publish a different score.
        settings: settings of the workers that differ from the defaults.
    """

    name: ClassVar[str]
    what: ClassVar[str]
    workers: ClassVar[int] = 3
    rate: ClassVar[float] = 2_000.0
    history: ClassVar[int] = 0
    ready_within: ClassVar[float | None] = None
    leaves_zombies: ClassVar[bool] = False
    settings: ClassVar[Mapping[str, Any]] = {}

    @asynccontextmanager
    async def services(self, shared: Shared) -> AsyncIterator[Addresses]:
        """Run the broker and the Redis of the fault."""
        yield {"kafka_bootstrap_servers": shared.kafka.bootstrap, "redis_url": shared.redis.url}

    def change_columns(self) -> ChangeColumns:
        """Choose the change of the transactions before they are encoded."""
        return unchanged_columns

    def change_records(self) -> ChangeRecords:
        """Choose the change of the records before they are sent."""
        return unchanged_records

    @abstractmethod
    async def disturb(self, harness: Harness) -> None:
        """Disturb the system, repeatedly if the fault does, and wait for each recovery.

        Raises:
            RecurError: the system does not recover.
        """

    async def check(self, harness: Harness) -> list[str]:
        """Describe other violations when everything is applied and the workers still run."""
        return []


@dataclass
class Row:
    """Result of a fault, as a row of the table.

    Attributes:
        invariants: counts after the fault. None: the fault ended before they were checked.
        recoveries: measured recoveries.
        complaints: violations of the guarantees.
        late: description of a recovery that took longer than promised.
        notes: other remarks.
    """

    fault: Fault
    invariants: Invariants | None = None
    recoveries: list[Recovery] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    late: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def ready(self) -> float | None:
        """Longest time until the system was ready again, seconds."""
        return max((recovery.ready for recovery in self.recoveries), default=None)

    @property
    def lag_gone(self) -> float | None:
        """Longest time until the lag was gone, seconds."""
        return max((recovery.lag_gone for recovery in self.recoveries), default=None)


async def run_fault(
    fault: Fault,
    shared: Shared,
    bar: Bar,
    *,
    show_seconds: float = FRAME_SECONDS,
    workers: int | None = None,
    rate_max: float = float("inf"),
    scale: float = 1.0,
    seed: int = 0,
    overrides: Mapping[str, Any] = {},
) -> Row:
    """Run a fault on a system of its own and check the invariants.

    Args:
        show_seconds: interval of the bar's updates.
        workers: number of workers. None: the fault's number.
        rate_max: limit of the workload's rate, records/s, for a slow machine.
        scale: length of the fault; 1: full length.
        seed: seed of all random choices.
        overrides: settings of the workers that override the fault's.
    """
    row = Row(fault)
    directory = Path(tempfile.mkdtemp(prefix=f"recur-fault-{fault.name}-"))
    try:
        async with fault.services(shared) as addresses:
            async with running_harness(
                {**fault.settings, **overrides, **addresses},
                directory,
                workers=workers or fault.workers,
                rate=min(fault.rate, rate_max),
                scale=scale,
                seed=seed,
                history=round(fault.history * scale),
                change_columns=fault.change_columns(),
                change_records=fault.change_records(),
            ) as harness:
                row.recoveries, row.notes = harness.recoveries, harness.notes
                showing = asyncio.create_task(_show(fault, harness, bar, show_seconds))
                try:
                    await _disturb_and_check(fault, harness, row)
                finally:
                    showing.cancel()
                    await asyncio.gather(showing, return_exceptions=True)
    except RecurError as error:
        row.complaints.append(str(error))
    if fault.ready_within is not None and (row.ready or 0.0) > fault.ready_within:
        row.late = (
            f"ready again after {row.ready:.1f} s instead of the promised {fault.ready_within:g} s"
        )
    if row.complaints:
        row.notes.append(f"logs are in {directory}")
    else:
        shutil.rmtree(directory, ignore_errors=True)
    return row


async def _disturb_and_check(fault: Fault, harness: Harness, row: Row) -> None:
    await fault.disturb(harness)
    harness.fraction = 1.0
    await harness.settle()
    row.complaints += await fault.check(harness)
    row.notes += sorted(set(harness.pool.ended))
    await harness.pool.stop()
    row.invariants = await check_invariants(harness.settings, harness.checkpoint, harness.workload)
    fenced = harness.settings.exactly_once
    row.complaints += row.invariants.complaints(allow_conflicts=fault.leaves_zombies and not fenced)


async def _show(fault: Fault, harness: Harness, bar: Bar, seconds: float) -> None:
    while True:
        applied = harness.monitor.latest.applied
        if applied is not None:
            bar.show(fault.name, sum(applied.values()), harness.fraction)
        await asyncio.sleep(seconds)
