"""Verification of a log and a store in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from pipeline.audit.result import Verification
from pipeline.audit.verifier import Verifier, VerifyOptions
from pipeline.kafka.partition_reader import PartitionReader
from pipeline.kafka.polls import Bounds
from pipeline.progress import Bar
from pipeline.storage.client import StoreForbiddenError
from pipeline.storage.state_store import Load, LoadResult, Save
from tests.fakes.memory import MemoryKafka, MemoryRecord
from tests.fakes.memory_workers import HIDDEN_TOLERANCE, SCORE_TOLERANCE, World

OPTIONS = VerifyOptions(tolerance_hidden=HIDDEN_TOLERANCE, tolerance_score=SCORE_TOLERANCE)
"""Limits of differences for the steep network of these tests."""


class MemoryLogReader:
    """A :class:`pipeline.kafka.partition_reader.LogReader` of a broker in memory."""

    def __init__(self, kafka: MemoryKafka, topic: str, partition: int, start: int = 0) -> None:
        self.position = start
        self._kafka, self._topic, self._partition = kafka, topic, partition

    async def __aenter__(self) -> PartitionReader:
        return self

    async def __aexit__(self, *error: object) -> None:
        return None

    async def bounds(self) -> Bounds:
        return self._kafka.bounds(self._topic, self._partition)

    async def first_at(self, time_ms: int) -> int | None:
        records = self._kafka.records(self._topic, self._partition)
        return next((record.offset for record in records if record.timestamp >= time_ms), None)

    def skip_to(self, offset: int) -> None:
        self.position = offset

    async def read(self, end: int, most: int) -> list[MemoryRecord]:
        self.position = max(self.position, (await self.bounds()).begin)
        found = self._kafka.fetch(self._topic, self._partition, self.position, most)
        found = [record for record in found if record.offset < end]
        self.position = found[-1].offset + 1 if found else self.position
        return found


class StoreOfWorld:
    """A world's store as the verification reads it.

    Args:
        before_load: called before states are loaded, to let workers act meanwhile.
    """

    def __init__(self, world: World, before_load: Callable[[], None] | None = None) -> None:
        self._world = world
        self._before_load = before_load
        self.may_list = True

    async def watermarks(self, partitions: int) -> dict[int, bytes]:
        return dict(self._world.store.watermarks)

    async def load(self, requests: Sequence[Load]) -> list[LoadResult]:
        if self._before_load is not None and any(request.account_ids for request in requests):
            self._before_load()
        return await self._world.store.load(requests)

    async def accounts(self, partition: int | None = None) -> AsyncIterator[list[tuple[int, str]]]:
        if not self.may_list:
            raise StoreForbiddenError
        yield list(self._world.store.states)

    async def save(self, requests: Sequence[Save]) -> list[bool]:
        raise AssertionError("verifying writes nothing")

    async def ping(self) -> None:
        return None

    async def close(self) -> None:
        return None


class NoBar(Bar):
    """A progress bar that shows nothing and keeps its last value."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))
        self.fraction = 0.0

    def show(self, stage: str, done: int, fraction: float) -> None:
        self.fraction = fraction


def verify_world(
    world: World, store: StoreOfWorld | None = None, bar: NoBar | None = None, **options: Any
) -> Verification:
    """Verify a world now."""
    verifier = Verifier(
        world.settings,
        world.checkpoint,
        replace(OPTIONS, **options),
        bar or NoBar(),
        store or StoreOfWorld(world),
        world.settings.topic_partitions,
        lambda topic, partition, start: MemoryLogReader(world.kafka, topic, partition, start),
    )
    return asyncio.run(verifier.run())
