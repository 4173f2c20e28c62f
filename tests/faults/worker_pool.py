"""Workers that a supervisor keeps running, as an operator's does: who dies is started again."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from signal import SIGCONT, SIGSTOP

from pipeline.local.workers import WorkerProcess, start_worker, stop_all, until_ready

READY_SECONDS = 120.0
LOOK_SECONDS = 0.1
RESTART_SECONDS = 0.5
"""Between a worker's death and its new start."""


class Crew:
    """Worker processes.

    Args:
        directory: for their logs.
        environment: their settings.

    Attributes:
        members: those that shall run; one that died is replaced in its place.
        frozen: members that are stopped with SIGSTOP.
        ended: of each worker that ended by itself, which one and how.
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
        self._keeping: asyncio.Task[None] | None = None
        self._leaving: list[asyncio.Task[int]] = []

    async def start(self, count: int) -> None:
        """So many workers, ready; from now on they are kept running.

        Raises:
            ServiceError: one does not become ready.
        """
        for _ in range(count):
            await self.join()
        await until_ready(self.members, READY_SECONDS)
        self._is_over = False
        self._keeping = asyncio.create_task(self._keep())

    async def join(self) -> WorkerProcess:
        """One more worker, which is not ready yet."""
        self._numbers += 1
        worker = await self._started(self._numbers)
        self.members.append(worker)
        return worker

    def leave(self, worker: WorkerProcess) -> None:
        """Tell a worker to stop, with SIGTERM; it is not waited for."""
        self.members.remove(worker)
        self._leaving.append(asyncio.create_task(worker.stop()))

    async def kill(self, worker: WorkerProcess) -> None:
        """SIGKILL; it will be started again."""
        self._killed.add(worker.process.pid)
        await asyncio.to_thread(worker.process.kill)

    def freeze(self, worker: WorkerProcess) -> None:
        """SIGSTOP."""
        self.frozen.append(worker)
        worker.process.send_signal(SIGSTOP)

    def thaw(self, worker: WorkerProcess) -> None:
        """SIGCONT."""
        worker.process.send_signal(SIGCONT)
        self.frozen.remove(worker)

    def alive(self) -> list[WorkerProcess]:
        """Members whose process runs and is not frozen."""
        return [w for w in self.members if w.process.poll() is None and w not in self.frozen]

    async def not_ready(self) -> frozenset[int]:
        """Process numbers of members that are neither frozen nor ready."""
        awake = [worker for worker in self.members if worker not in self.frozen]
        ready = await asyncio.gather(*(worker.ready() for worker in awake))
        return frozenset(
            w.process.pid for w, is_ready in zip(awake, ready, strict=True) if not is_ready
        )

    async def samples(self, name: str) -> float:
        """A metric's sum over the members; they forget it when they die."""
        await asyncio.gather(*(worker.refresh() for worker in self.members))
        return sum(worker.samples.get(name, 0.0) for worker in self.members)

    async def stop(self) -> list[int]:
        """SIGTERM to all of them, and start none again; exit statuses."""
        if self._keeping is not None:
            self._is_over = True
            await self._keeping  # not cancelled: a worker that it just started would be lost
            self._keeping = None
        members, self.members, self.frozen = self.members, [], []
        statuses = await stop_all(members)
        return statuses + list(await asyncio.gather(*self._leaving))

    async def _keep(self) -> None:
        while not self._is_over:
            await asyncio.sleep(LOOK_SECONDS)
            for worker in list(self.members):
                if worker.process.poll() is not None and not worker.stopping:
                    await self._replace(worker)

    async def _replace(self, worker: WorkerProcess) -> None:
        if worker.process.pid not in self._killed:
            self.ended.append(f"{worker.name} {worker.death}")
        if worker in self.frozen:
            self.frozen.remove(worker)
        await asyncio.sleep(RESTART_SECONDS)
        successor = await self._started(worker.number)
        if worker in self.members:
            self.members[self.members.index(worker)] = successor
        else:  # told to leave meanwhile
            self._leaving.append(asyncio.create_task(successor.stop()))

    async def _started(self, number: int) -> WorkerProcess:
        return await asyncio.to_thread(start_worker, number, self._directory, self._environment)
