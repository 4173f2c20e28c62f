"""Monitor of a running system: ready workers, watermarks of partitions, waiting records."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic
from types import TracebackType

from pipeline.errors import RecurError
from pipeline.kafka.polls import LogUnavailableError
from pipeline.kafka.score_log import KafkaScoreLog
from pipeline.settings import Settings
from pipeline.storage.client import StoreUnavailableError
from pipeline.storage.state_store import RedisStateStore
from pipeline.storage.watermark import Watermark
from tests.faults.worker_pool import WorkerPool

POLL_SECONDS = 0.2
ANSWER_SECONDS = 3.0
"""Limit for an answer of Redis or Kafka; then the value counts as unknown."""


class StuckError(RecurError):
    """The system did not recover in time."""


@dataclass(frozen=True)
class Observation:
    """One observation of the system.

    Attributes:
        began: start of the observation, in monotonic seconds.
        at: end of the observation, in monotonic seconds.
        not_ready: process ids of the workers that are not ready.
        applied: watermarks by partition. None: Redis is unreachable.
        ends: end offsets by partition. None: the broker is unreachable.
    """

    began: float
    at: float
    not_ready: frozenset[int]
    applied: dict[int, int] | None
    ends: dict[int, int] | None

    @property
    def lag(self) -> int | None:
        """Number of records that are not applied yet; None: unknown."""
        if self.applied is None or self.ends is None:
            return None
        return sum(max(0, end - self.applied.get(p, 0)) for p, end in self.ends.items())

    def describe(self) -> str:
        """Describe what is stuck."""
        if self.applied is None or self.ends is None:
            return "Redis does not answer" if self.applied is None else "Kafka does not answer"
        waiting = {p: end - self.applied.get(p, 0) for p, end in self.ends.items()}
        behind = ", ".join(f"{waiting[p]:,} in partition {p}" for p in waiting if waiting[p])
        return f"{len(self.not_ready)} workers are not ready; records wait: {behind or 'none'}"


class Monitor:
    """Observer of a system at short intervals; an async context manager.

    Args:
        settings: addresses of broker and Redis.
        model: digest of the checkpoint.
        pool: the workers.
        alarm: check that runs with each observation; its error ends the waiting.
    """

    def __init__(
        self, settings: Settings, model: str, pool: WorkerPool, alarm: Callable[[], None]
    ) -> None:
        self.latest = Observation(0.0, monotonic(), frozenset(), None, None)
        self._topic = settings.topic("transactions")
        self._partitions = list(range(settings.topic_partitions))
        self._pool = pool
        self._alarm = alarm
        self._score_log = KafkaScoreLog(settings)
        self._store = RedisStateStore.from_settings(settings, model)
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Monitor:
        await self._score_log.start()
        self._task = asyncio.create_task(self._observe())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._score_log.stop()
        await self._store.close()

    async def applied(self) -> dict[int, int]:
        """Read the watermarks; empty if Redis is unreachable."""
        return await self._applied() or {}

    async def until(
        self, condition: Callable[[Observation], bool], what: str, limit_seconds: float
    ) -> Observation:
        """Wait for an observation from now on that meets the condition.

        Raises:
            StuckError: no observation meets it in time.
        """
        start = monotonic()
        while True:
            self._changed.clear()
            sample = self.latest
            if sample.began >= start and condition(sample):
                return sample
            self._alarm()
            assert self._task is not None
            if self._task.done():
                self._task.result()
            if monotonic() - start > limit_seconds:
                raise StuckError(f"waited {limit_seconds:g} s for {what}: {sample.describe()}")
            try:
                await asyncio.wait_for(self._changed.wait(), 1.0)
            except TimeoutError:
                continue

    async def _observe(self) -> None:
        while True:
            began = monotonic()
            not_ready, applied, ends = await asyncio.gather(
                self._pool.not_ready(), self._applied(), self._ends()
            )
            self.latest = Observation(began, monotonic(), not_ready, applied, ends)
            self._changed.set()
            await asyncio.sleep(POLL_SECONDS)

    async def _applied(self) -> dict[int, int] | None:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                values = await self._store.watermarks(len(self._partitions))
        except (StoreUnavailableError, TimeoutError):
            return None
        return {p: Watermark.from_bytes(value).next_offset for p, value in values.items()}

    async def _ends(self) -> dict[int, int] | None:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await self._score_log.ends(self._topic, self._partitions)
        except (LogUnavailableError, TimeoutError):
            return None


async def until_true(
    condition: Callable[[], Awaitable[bool]], what: str, limit_seconds: float
) -> None:
    """Wait until a condition holds.

    Raises:
        StuckError: it does not hold in time.
    """
    try:
        async with asyncio.timeout(limit_seconds):
            while True:
                if await condition():
                    return
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError as error:
        raise StuckError(f"waited {limit_seconds:g} s for {what}") from error
