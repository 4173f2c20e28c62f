"""What a fault is, how one is run, and what is said of it."""

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
from pipeline.local.services import Kafka, Redis
from pipeline.progress import Bar
from tests.faults.harness import Recovery, Rig, rigged
from tests.faults.invariants import Outcome, find_outcome
from tests.faults.workload import ChangeColumns, ChangeRecords, as_they_are, nothing_else

FRAME_SECONDS = 0.5
WORKER_DEATH_SECONDS = 15.0
"""After a worker's death, at the default session time-out of 10 s."""

REDIS_BACK_SECONDS = 5.0
"""After Redis is back."""

Addresses = dict[str, str]
"""Settings that name broker and Redis."""


class Shared:
    """Broker and Redis of all faults that leave them alone; started when first asked for.

    Args:
        kafka, redis: those that run already.
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
        """The broker.

        Raises:
            ServiceError: it does not start.
        """
        if self._kafka is None:
            self._kafka = self._stack.enter_context(Kafka())
        return self._kafka

    @property
    def redis(self) -> Redis:
        """The Redis.

        Raises:
            ServiceError: it does not start.
        """
        if self._redis is None:
            self._redis = self._stack.enter_context(Redis())
        return self._redis


class Fault(ABC):
    """Something that goes wrong, done to a system under load.

    Attributes:
        name: for the command line.
        what: it is, in a line.
        workers: how many run.
        rate: of the load, records/s.
        history: records that are applied before, in the whole form.
        ready_within: seconds until the system must be ready again; None where nothing is promised.
        leaves_zombies: workers wake up that lost their partitions: where nothing fences them,
            they may publish a score that differs.
        settings: of the workers, besides the defaults.
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
        """The broker and the Redis to do it to, running."""
        yield {"kafka_bootstrap_servers": shared.kafka.bootstrap, "redis_url": shared.redis.url}

    def change_columns(self) -> ChangeColumns:
        """What becomes of the transactions before they are encoded."""
        return as_they_are

    def change_records(self) -> ChangeRecords:
        """What becomes of the records before they are sent."""
        return nothing_else

    @abstractmethod
    async def disturb(self, rig: Rig) -> None:
        """Do it, as often as it is done, and see that the system recovers.

        Raises:
            RecurError: it does not.
        """

    async def check(self, rig: Rig) -> list[str]:
        """What else is wrong once everything is applied and the workers still run."""
        return []


@dataclass
class Row:
    """What is said of a fault.

    Attributes:
        outcome: None where it was not found out.
        recoveries: each that was measured.
        complaints: what contradicts the guarantees.
        late: a promised recovery took longer than it may.
        notes: what else there is to say.
    """

    fault: Fault
    outcome: Outcome | None = None
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
    scale: float = 1.0,
    seed: int = 0,
    overrides: Mapping[str, Any] = {},
) -> Row:
    """Do a fault to a system of its own and find out what became of it.

    Args:
        show_seconds: between two updates of the bar.
        workers: how many run; as many as the fault says when None.
        scale: 1 for the whole fault, less for a shorter form.
        seed: of all that is drawn.
        overrides: settings of the workers that go before the fault's.
    """
    row = Row(fault)
    directory = Path(tempfile.mkdtemp(prefix=f"recur-fault-{fault.name}-"))
    try:
        async with fault.services(shared) as addresses:
            async with rigged(
                {**fault.settings, **overrides, **addresses},
                directory,
                workers=workers or fault.workers,
                rate=fault.rate,
                scale=scale,
                seed=seed,
                history=round(fault.history * scale),
                change_columns=fault.change_columns(),
                change_records=fault.change_records(),
            ) as rig:
                row.recoveries, row.notes = rig.recoveries, rig.notes
                showing = asyncio.create_task(_show(fault, rig, bar, show_seconds))
                try:
                    await _do(fault, rig, row)
                finally:
                    showing.cancel()
                    await asyncio.gather(showing, return_exceptions=True)
    except RecurError as error:
        row.complaints.append(str(error))
    if fault.ready_within is not None and (row.ready or 0.0) > fault.ready_within:
        row.late = f"{row.ready:.1f} s until ready again, {fault.ready_within:g} s are promised"
    if row.complaints:
        row.notes.append(f"logs are in {directory}")
    else:
        shutil.rmtree(directory, ignore_errors=True)
    return row


async def _do(fault: Fault, rig: Rig, row: Row) -> None:
    await fault.disturb(rig)
    rig.fraction = 1.0
    await rig.settle()
    row.complaints += await fault.check(rig)
    row.notes += sorted(set(rig.crew.ended))
    await rig.crew.stop()
    row.outcome = await find_outcome(rig.settings, rig.checkpoint, rig.load)
    fenced = bool(rig.settings.exactly_once)
    row.complaints += row.outcome.complaints(allow_conflicts=fault.leaves_zombies and not fenced)


async def _show(fault: Fault, rig: Rig, bar: Bar, seconds: float) -> None:
    while True:
        applied = rig.watch.latest.applied
        if applied is not None:
            bar.show(fault.name, sum(applied.values()), rig.fraction)
        await asyncio.sleep(seconds)
