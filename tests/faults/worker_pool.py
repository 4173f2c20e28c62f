"""Pool of worker processes that restarts dead workers, as an operator's supervisor does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from signal import SIGCONT, SIGSTOP

from pipeline.local.workers import (
    LocalGateway,
    WorkerProcess,
    start_gateway,
    start_worker,
    stop_all,
    until_ready,
)

READY_SECONDS = 120.0
POLL_SECONDS = 0.1
RESTART_SECONDS = 0.5
"""Pause between a worker's death and its restart."""


class WorkerPool:
    """Worker processes that are kept running.

    Args:
        directory: directory for their logs.
        environment: their settings.

    Attributes:
        members: workers to keep running; a restarted worker takes the dead one's place.
        frozen: members that SIGSTOP has stopped.
        ended: descriptions of the workers that ended by themselves.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self.members: list[WorkerProcess] = []
        self.frozen: list[WorkerProcess] = []
        self.ended: list[str] = []
        self._directory = directory
        self._environment = {**environment, "TMPDIR": str(directory), "RECUR_LOG_FORMAT": "text"}
        self._numbers = 0
        self._killed: set[int] = set()
        self._is_over = False
        self._restarting: asyncio.Task[None] | None = None
        self._leaving: list[asyncio.Task[int]] = []
        self._gateways: list[LocalGateway] = []

    async def start(self, count: int) -> None:
        """Start workers, wait until they are ready, and keep them running.

        Raises:
            ServiceError: a worker does not become ready.
        """
        for _ in range(count):
            await self.join()
        await until_ready(self.members, READY_SECONDS)
        self._is_over = False
        self._restarting = asyncio.create_task(self._restart_dead())

    async def start_gateways(self, count: int) -> list[LocalGateway]:
        """Start gateways beside the workers, and wait until they are ready.

        Raises:
            ServiceError: a gateway does not become ready.
        """
        for _ in range(count):
            directory = self._directory / f"gateway-{len(self._gateways)}"
            directory.mkdir()
            gateway = await asyncio.to_thread(start_gateway, directory, self._environment)
            self._gateways.append(gateway)
        await until_ready(self._gateways, READY_SECONDS)
        return self._gateways

    async def join(self) -> WorkerProcess:
        """Start one more worker without waiting for it."""
        self._numbers += 1
        worker = await self._start_worker(self._numbers)
        self.members.append(worker)
        return worker

    def leave(self, worker: WorkerProcess) -> None:
        """Stop a worker with SIGTERM without waiting for it."""
        self.members.remove(worker)
        self._leaving.append(asyncio.create_task(worker.stop()))

    async def kill(self, worker: WorkerProcess) -> None:
        """Kill a worker with SIGKILL; it will be restarted."""
        self._killed.add(worker.process.pid)
        await asyncio.to_thread(worker.process.kill)

    def freeze(self, worker: WorkerProcess) -> None:
        """Freeze a worker with SIGSTOP."""
        self.frozen.append(worker)
        worker.process.send_signal(SIGSTOP)

    def thaw(self, worker: WorkerProcess) -> None:
        """Continue a frozen worker with SIGCONT."""
        worker.process.send_signal(SIGCONT)
        self.frozen.remove(worker)

    def alive(self) -> list[WorkerProcess]:
        """List the members whose process runs and is not frozen."""
        return [w for w in self.members if w.process.poll() is None and w not in self.frozen]

    async def not_ready(self) -> frozenset[int]:
        """Collect the process ids of members that are neither frozen nor ready."""
        awake = [worker for worker in self.members if worker not in self.frozen]
        ready = await asyncio.gather(*(worker.ready() for worker in awake))
        return frozenset(
            w.process.pid for w, is_ready in zip(awake, ready, strict=True) if not is_ready
        )

    async def samples(self, name: str) -> float:
        """Sum a metric over the members; a restarted worker starts at zero."""
        await asyncio.gather(*(worker.refresh() for worker in self.members))
        return sum(worker.samples.get(name, 0.0) for worker in self.members)

    async def stop(self) -> list[int]:
        """Stop all workers for good with SIGTERM and return their exit statuses."""
        if self._restarting is not None:
            self._is_over = True
            await self._restarting  # not cancelled: it may just be starting a worker
            self._restarting = None
        members, self.members, self.frozen = self.members, [], []
        gateways, self._gateways = self._gateways, []
        await stop_all(gateways)
        statuses = await stop_all(members)
        return statuses + list(await asyncio.gather(*self._leaving))

    async def _restart_dead(self) -> None:
        while not self._is_over:
            await asyncio.sleep(POLL_SECONDS)
            for worker in list(self.members):
                if worker.process.poll() is not None and not worker.stopping:
                    await self._replace(worker)

    async def _replace(self, worker: WorkerProcess) -> None:
        if worker.process.pid not in self._killed:
            self.ended.append(f"{worker.name} {worker.death}")
        if worker in self.frozen:
            self.frozen.remove(worker)
        await asyncio.sleep(RESTART_SECONDS)
        successor = await self._start_worker(worker.number)
        if worker in self.members:
            self.members[self.members.index(worker)] = successor
        else:  # the worker has left in the meantime
            self._leaving.append(asyncio.create_task(successor.stop()))

    async def _start_worker(self, number: int) -> WorkerProcess:
        return await asyncio.to_thread(start_worker, number, self._directory, self._environment)
