"""Interrupts, faults and workers for the tests of the processor."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from model.checkpoint import Checkpoint
from pipeline.admin.rebuild_states import PartitionRebuild
from pipeline.kafka.polls import Poll
from pipeline.storage.watermark import Watermark
from tests.fakes.memory_workers import (
    Killed,
    MemoryWorker,
    World,
    finish,
    small_checkpoint,
    step,
)

POISON = 666.0


def at(number: int, act: Callable[[], object]) -> Callable[[str], None]:
    """Act at the n-th step."""
    steps = iter(range(number + 1))

    def interrupt(name: str) -> None:
        if next(steps, None) == number:
            act()

    return interrupt


def when(name: str, act: Callable[[], object], times: int = 1) -> Callable[[str], None]:
    """Act at the first steps of this name."""
    left = iter(range(times))

    def interrupt(step_name: str) -> None:
        if step_name == name and next(left, None) is not None:
            act()

    return interrupt


def nothing(name: str) -> None:
    """Let every step happen."""


def die() -> None:
    raise Killed


def run_until_killed(worker: MemoryWorker) -> None:
    with pytest.raises(Killed):
        finish(worker.run())


def kill_at(world: World, number: int) -> None:
    """Kill a worker at the n-th step of its run."""
    world.interrupt(at(number, die))
    run_until_killed(world.worker())
    world.assert_published_before_saved()


def kill_repeatedly(world: World, rng: random.Random) -> None:
    """Kill one worker after the other at random steps, until one finishes."""
    for _ in range(100):
        world.interrupt(at(rng.randrange(30), die))
        try:
            finish(world.worker().run(choose=rng.choice))
        except Killed:
            world.assert_published_before_saved()
        else:
            break


def next_poll(worker: MemoryWorker, records_max: int | None = None) -> Poll:
    poll = worker.consumer.poll(records_max)
    assert poll is not None
    return poll


def one_poll(worker: MemoryWorker, records_max: int | None = None) -> Poll:
    """Process only the next poll."""
    poll = next_poll(worker, records_max)
    finish(worker.process(poll))
    return poll


def lose_everything(world: World) -> None:
    """Empty the store, as a loss of data or another model does."""
    world.store.watermarks.clear()
    world.store.states.clear()


def produce_everywhere(world: World) -> None:
    """Produce a transaction in each partition: without any, no worker loads its states."""
    for partition in world.partitions:
        world.produce(world.account_in(partition))


def read_on(world: World, **settings: Any) -> MemoryWorker:
    """A fresh worker that works to the end of the log."""
    world.interrupt(nothing)
    worker = world.worker(**settings)
    finish(worker.run())
    return worker


def small_world(**settings: Any) -> World:
    world = World(**settings)
    world.produce_many(36)
    return world


def when_nth(name: str, number: int, act: Callable[[], object]) -> Callable[[str], None]:
    """Act at the n-th step of this name."""
    left = iter(range(number + 1))

    def interrupt(step_name: str) -> None:
        if step_name == name and next(left, None) == number:
            act()

    return interrupt


def save_elsewhere(world: World, partition: int, watermark: Watermark) -> None:
    """Write a watermark as another worker does."""
    world.store.watermarks[partition] = watermark.to_bytes()


def note(names: list[str], name: str) -> Callable[[str], None]:
    """Record each step of this name."""

    def interrupt(step_name: str) -> None:
        if step_name == name:
            names.append(step_name)

    return interrupt


class Simulation:
    """Workers that all believe they own everything, killed and overtaken at any step.

    The group assigns the partitions to each new worker; the old ones may learn of it or not. The
    store may be set back to a snapshot.
    """

    def __init__(self, seed: int, workers_max: int, **settings: Any) -> None:
        self._workers_max = workers_max
        rng = self.rng = random.Random(seed)
        self.world = World(
            topic_partitions=rng.choice([1, 2]),
            micro_batch_max=rng.choice([3, 8, 20]),
            state_cache_size=rng.choice([0, 1000]),
            **settings,
        )
        self.world.produce_many(50, seed=seed)
        self._snapshots = [self.world.store.copy()]
        self.also: tuple[float, Callable[[], None]] = 0.0, lambda: None  # done at random times
        self._alive: list[tuple[MemoryWorker, Coroutine[Any, Any, None]]] = []

    def run(self) -> World:
        """Run as many steps as the seed says, then all workers to their end."""
        for _ in range(self.rng.randrange(50, 400)):
            if not self._alive:
                self._start()
            self._act(self.rng.random())
        while self._alive:
            self._step()
        return self.world

    def _act(self, chance: float) -> None:
        share, act = self.also
        if share and self.rng.random() < share:
            act()
        if chance < 0.01 and len(self._alive) < self._workers_max:
            self._start()
        elif chance < 0.015:
            self._alive.pop(self.rng.randrange(len(self._alive)))[1].close()
        elif chance < 0.02:
            self.world.store.restore(self.rng.choice(self._snapshots))
        elif chance < 0.06:
            self._snapshots.append(self.world.store.copy())
        elif chance < 0.09:
            self.world.produce_many(2, seed=self.rng.randrange(1000))
        else:
            self._step()

    def _start(self) -> None:
        if self._alive and self.rng.random() < 0.5:
            self._alive[-1][0].rebalance([])
        worker = self.world.worker()
        self._alive.append((worker, worker.run(choose=self.rng.choice)))

    def _step(self) -> None:
        one = self.rng.choice(self._alive)
        if not step(one[1]):
            self._alive.remove(one)


def rebuild(world: World, partition: int) -> PartitionRebuild | None:
    """Set a partition's watermark back as `recur state rebuild` does."""
    plan: PartitionRebuild | None = finish(world.rebuild().reset(partition))
    return plan


class Brittle(Checkpoint):
    """A checkpoint whose computation fails for :data:`POISON`."""

    def __init__(self) -> None:
        sound = small_checkpoint()
        super().__init__(sound.weights, sound.header)

    def encode(self, raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if (raw[:, 0] == POISON).any():
            raise FloatingPointError("it fails")
        return super().encode(raw)


def count_steps(**settings: Any) -> int:
    world = small_world(**settings)
    steps: list[str] = []
    world.interrupt(steps.append)
    finish(world.worker().run())
    return len(steps)
