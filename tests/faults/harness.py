"""A system under a fault: its services, its workers, its load, and how it recovers."""

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
from tests.faults.monitor import Sample, Watch
from tests.faults.worker_pool import Crew
from tests.faults.workload import ChangeColumns, ChangeRecords, Load, as_they_are, nothing_else

RECOVERY_LIMIT_SECONDS = 240.0
"""A system that has not recovered by then never will."""

LAG_SECONDS = 1.0
"""The lag is gone once no more waits than arrives in so long."""


class NoEffectError(RecurError):
    """A fault did not do what it is to do."""


def require(has_bitten: bool, what: str) -> None:
    """A fault that did not do what it is to do shows nothing.

    Raises:
        NoEffectError: it has not bitten.
    """
    if not has_bitten:
        raise NoEffectError(f"the fault had no effect: {what}")


@dataclass(frozen=True)
class Mark:
    """When something happened.

    Attributes:
        at: monotonic seconds.
        applied: the watermarks then.
        workers: process numbers of those that ran then.
    """

    at: float
    applied: dict[int, int]
    workers: frozenset[int]


@dataclass(frozen=True)
class Recovery:
    """How long it took, seconds.

    Attributes:
        ready: until every partition moved again and the workers that ran then were ready. (One
            that was started since is not waited for, but for the rebalance that it brings.)
        lag_gone: until no more waited than arrives in a second.
        applied: records that were applied until then.
    """

    ready: float
    lag_gone: float
    applied: int


class Rig:
    """What a fault has in its hands.

    Args:
        settings: the workers'.
        checkpoint: theirs.
        crew, load, watch: workers, transactions, and how they are watched.
        rate: of the load, records/s.
        scale: 1 for the whole fault, less for a shorter form.
        seed: of all that is drawn.

    Attributes:
        recoveries: measured so far.
        notes: what else there is to say about the run.
        fraction: how much of the fault is done, 0 to 1.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        crew: Crew,
        load: Load,
        watch: Watch,
        *,
        rate: float,
        scale: float,
        seed: int,
    ) -> None:
        self.settings = settings
        self.checkpoint = checkpoint
        self.crew = crew
        self.load = load
        self.watch = watch
        self.random = random.Random(seed)
        self.recoveries: list[Recovery] = []
        self.notes: list[str] = []
        self.fraction = 0.0
        self._rate = rate
        self._scale = scale

    def times(self, whole: int, least: int = 1) -> range:
        """How often, for a fault that is done ``whole`` times."""
        return range(max(least, round(whole * self._scale)))

    def seconds(self, whole: float, least: float = 1.0) -> float:
        """For how long, for what takes ``whole`` seconds."""
        return max(least, whole * self._scale)

    async def go_on(self, least: float, most: float | None = None) -> None:
        """Let the system run for a while, drawn between the two, seconds.

        Raises:
            RecurError: the load failed.
        """
        await asyncio.sleep(least if most is None else self.random.uniform(least, most))
        self.load.raise_failure()

    def any_worker(self) -> WorkerProcess:
        """One that is alive."""
        return self.random.choice(self.crew.alive() or self.crew.members)

    async def mark(self) -> Mark:
        """Now."""
        at = monotonic()
        workers = frozenset(worker.process.pid for worker in self.crew.alive())
        return Mark(at, await self.watch.applied(), workers)

    async def recover(self, mark: Mark, *, measured: bool = True) -> None:
        """Wait until the system works as before, and note how long that took since a mark.

        Args:
            measured: whether it was whole before; else the time is not that of one fault alone.

        Raises:
            StuckError: it does not.
        """
        first = await self.watch.until(
            lambda sample: self._moves(sample, mark),
            "the workers to be ready and every partition to move",
            RECOVERY_LIMIT_SECONDS,
        )
        last = await self.watch.until(
            lambda sample: sample.lag is not None and sample.lag <= self._rate * LAG_SECONDS,
            "the lag to go",
            RECOVERY_LIMIT_SECONDS,
        )
        applied = sum((last.applied or {}).values()) - sum(mark.applied.values())
        if measured:
            self.recoveries.append(Recovery(first.at - mark.at, last.at - mark.at, applied))

    def _moves(self, sample: Sample, mark: Mark) -> bool:
        """The workers are ready, and every partition has another watermark than at the mark."""
        if sample.not_ready & mark.workers or sample.applied is None or sample.ends is None:
            return False
        return all(
            sample.applied.get(partition) != mark.applied.get(partition)
            for partition, end in sample.ends.items()
            if end
        )

    async def settle(self) -> None:
        """Send no more, and wait until everything is applied.

        Raises:
            RecurError: that does not happen.
        """
        await self.load.stop()
        await self.watch.until(
            lambda sample: sample.lag == 0, "everything to be applied", RECOVERY_LIMIT_SECONDS
        )


@asynccontextmanager
async def rigged(
    overrides: Mapping[str, Any],
    directory: Path,
    *,
    workers: int,
    rate: float,
    scale: float,
    seed: int,
    history: int = 0,
    change_columns: ChangeColumns = as_they_are,
    change_records: ChangeRecords = nothing_else,
) -> AsyncIterator[Rig]:
    """A running system with topics, group and keys of its own; all of it ends with the context.

    Args:
        overrides: settings besides the defaults; addresses among them.
        directory: for the workers' logs and files.
        workers: how many.
        rate: records/s; the load begins once the workers are ready.
        history: records that are sent and applied before, as fast as that goes.

    Raises:
        RecurError: something does not start.
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
    crew = Crew(directory, environment)
    load = Load(settings, seed, change_columns, change_records)
    watch = Watch(settings, checkpoint.digest, crew, load.raise_failure)
    try:
        async with watch:
            await crew.start(workers)
            await load.start(rate, history)
            rig = Rig(settings, checkpoint, crew, load, watch, rate=rate, scale=scale, seed=seed)
            await watch.until(
                lambda s: s.lag is not None and s.lag <= rate * LAG_SECONDS,
                "the workers to keep up with the load",
                RECOVERY_LIMIT_SECONDS,
            )
            yield rig
    finally:
        await load.abandon()
        await crew.stop()
