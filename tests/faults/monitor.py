"""Watches a running system: who is ready, how far each partition is, how much waits."""

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
from pipeline.storage.state_store import RedisStateStore, StoreUnavailableError
from pipeline.storage.watermark import Watermark
from tests.faults.worker_pool import Crew

LOOK_SECONDS = 0.2
ANSWER_SECONDS = 3.0
"""A look that takes longer tells nothing."""


class StuckError(RecurError):
    """The system did not recover in time."""


@dataclass(frozen=True)
class Sample:
    """What one look told.

    Attributes:
        began, at: monotonic seconds, of its begin and end.
        not_ready: process numbers of the workers that shall run and are not ready.
        applied: the watermark of each partition that has one; None where Redis is away.
        ends: where each partition's log ends; None where the broker is away.
    """

    began: float
    at: float
    not_ready: frozenset[int]
    applied: dict[int, int] | None
    ends: dict[int, int] | None

    @property
    def lag(self) -> int | None:
        """Records that are not applied yet; None where that is not known."""
        if self.applied is None or self.ends is None:
            return None
        return sum(max(0, end - self.applied.get(p, 0)) for p, end in self.ends.items())

    def describe(self) -> str:
        """For a person who asks what is stuck."""
        if self.applied is None or self.ends is None:
            return "Redis does not answer" if self.applied is None else "Kafka does not answer"
        waiting = {p: end - self.applied.get(p, 0) for p, end in self.ends.items()}
        behind = ", ".join(f"{waiting[p]:,} in partition {p}" for p in waiting if waiting[p])
        return f"{len(self.not_ready)} workers are not ready; records wait: {behind or 'none'}"


class Watch:
    """Looks every so often; an async context manager.

    Args:
        settings: name broker and Redis.
        model: digest of the checkpoint.
        crew: the workers.
        alarm: called with each look; raises what is to end the waiting.
    """

    def __init__(
        self, settings: Settings, model: str, crew: Crew, alarm: Callable[[], None]
    ) -> None:
        self.latest = Sample(0.0, monotonic(), frozenset(), None, None)
        self._topic = settings.topic("transactions")
        self._partitions = list(range(settings.topic_partitions))
        self._crew = crew
        self._alarm = alarm
        self._score_log = KafkaScoreLog(settings)
        self._store = RedisStateStore.from_settings(settings, model)
        self._changed = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Watch:
        await self._score_log.start()
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._watching is not None
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        await self._score_log.stop()
        await self._store.close()

    async def applied(self) -> dict[int, int]:
        """Watermarks now; none where Redis is away."""
        return await self._applied() or {}

    async def until(
        self, condition: Callable[[Sample], bool], what: str, limit_seconds: float
    ) -> Sample:
        """The first look from now on for which the condition holds.

        Raises:
            StuckError: there is none in time.
        """
        start = monotonic()
        while True:
            self._changed.clear()
            sample = self.latest
            if sample.began >= start and condition(sample):
                return sample
            self._alarm()
            assert self._watching is not None
            if self._watching.done():
                self._watching.result()
            if monotonic() - start > limit_seconds:
                raise StuckError(f"waited {limit_seconds:g} s for {what}: {sample.describe()}")
            try:
                await asyncio.wait_for(self._changed.wait(), 1.0)
            except TimeoutError:
                continue

    async def _watch(self) -> None:
        while True:
            began = monotonic()
            not_ready, applied, ends = await asyncio.gather(
                self._crew.not_ready(), self._applied(), self._ends()
            )
            self.latest = Sample(began, monotonic(), not_ready, applied, ends)
            self._changed.set()
            await asyncio.sleep(LOOK_SECONDS)

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
    """Return once a condition holds.

    Raises:
        StuckError: it does not in time.
    """
    try:
        async with asyncio.timeout(limit_seconds):
            while True:
                if await condition():
                    return
                await asyncio.sleep(LOOK_SECONDS)
    except TimeoutError as error:
        raise StuckError(f"waited {limit_seconds:g} s for {what}") from error
