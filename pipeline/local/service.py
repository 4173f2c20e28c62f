"""A server process of this machine, and a cluster of them: start, stop, kill, pause.

A service listens on free ports of 127.0.0.1 and keeps its files in a directory of its own. It ends
with this process, however this process ends (see :mod:`pipeline.local.supervisor`). ``stop``,
``kill`` and a later ``start`` keep port and data. Leaving the context removes the directory unless
the caller gave one.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Generic, Self, TypeVar

import psutil

from pipeline.errors import ServiceError
from pipeline.local.ports import HOST, is_free
from pipeline.local.supervisor import SupervisedProcess

STARTUP_TIMEOUT_SECONDS = 60.0
STOP_TIMEOUT_SECONDS = 15.0
READY_POLL_SECONDS = 0.02
PAUSE_POLL_SECONDS = 0.001
REPLY_TIMEOUT_SECONDS = 2.0

_LOG_TAIL_LINES = 12
_LOG_TAIL_BYTES = 16_384


class Service(ABC):
    """One supervised server process.

    Args:
        directory: place of its data and its log. None: a temporary directory, which
            :meth:`close` removes.
        ports: ports that it listens on.
        startup_timeout_seconds: limit for its first answer.

    Attributes:
        directory: place of its files.
        log_path: file with its standard output and error.
    """

    name: ClassVar[str]

    def __init__(
        self, directory: Path | None, ports: tuple[int, ...], startup_timeout_seconds: float
    ) -> None:
        self._remove: Path | None = None
        if directory is None:
            directory = self._remove = Path(tempfile.mkdtemp(prefix=f"recur-{self.name.lower()}-"))
            weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self.directory = directory.absolute()
        self.log_path = self.directory / f"{self.name.lower()}.log"
        self._ports = ports
        self._startup_timeout_seconds = startup_timeout_seconds
        self._process: SupervisedProcess | None = None

    @property
    def running(self) -> bool:
        """Whether the process exists."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Id of the process.

        Raises:
            ServiceError: the service is not running.
        """
        return self._running_process().pid

    @property
    def supervisor_pid(self) -> int:
        """Id of the supervisor, which ends the service when this process ends.

        Raises:
            ServiceError: the service is not running.
        """
        return self._running_process().supervisor_pid

    def start(self) -> Self:
        """Start the service and wait until it answers.

        After ``stop`` or ``kill`` it keeps its port and its data.

        Raises:
            ServiceError: port, memory or program is missing, or the start takes too long.
        """
        self.launch()
        self.wait_until_ready()
        return self

    def launch(self) -> None:
        """Start the service without waiting for it.

        Raises:
            ServiceError: port, memory or program is missing.
        """
        if self.running:
            raise ServiceError(
                f"{self.name} already runs as process {self.pid}: stop it before the next start"
            )
        for port in self._ports:
            if not is_free(port):
                raise ServiceError(
                    f"{self.name} cannot start: port {HOST}:{port} is taken;"
                    " stop the program that listens there, or choose another port"
                )
        _require_memory(self.name, self._memory_mb())
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._process = SupervisedProcess(
                self._command(),
                log_path=self.log_path,
                directory=self.directory,
                remove=self._remove,
            )
        except OSError as error:
            raise ServiceError(f"{self.name} cannot start: {error}") from error

    def wait_until_ready(self) -> None:
        """Wait until the service answers.

        Raises:
            ServiceError: it ended, or took longer than ``startup_timeout_seconds``.
        """
        deadline = time.monotonic() + self._startup_timeout_seconds
        while not self._answers():
            process = self._running_process()
            if time.monotonic() > deadline:
                process.kill()
                raise ServiceError(
                    f"{self.name} did not answer within {self._startup_timeout_seconds:g} s of its"
                    f" start and was killed{self._log_tail()}"
                )
            time.sleep(READY_POLL_SECONDS)

    def stop(self) -> None:
        """Stop the service in good order, with SIGKILL after 15 s."""
        if self._process is not None:
            self._process.stop(STOP_TIMEOUT_SECONDS)

    def kill(self) -> None:
        """End the service with SIGKILL, as a crash would."""
        if self._process is not None:
            self._process.kill()

    def pause(self) -> None:
        """Freeze the service with SIGSTOP: connections stay open, requests stay unanswered.

        The supervisor forwards the signal; this waits until it has taken effect.
        """
        process = self._running_process()
        process.send_signal(signal.SIGSTOP)
        status = psutil.Process(process.pid).status
        while process.poll() is None and status() != psutil.STATUS_STOPPED:
            time.sleep(PAUSE_POLL_SECONDS)

    def resume(self) -> None:
        """Continue the service after :meth:`pause`."""
        self._running_process().send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the service for good and remove its temporary directory."""
        if self._remove is None:
            self.stop()
        else:
            self.kill()  # its data is deleted, so good order is not needed
            shutil.rmtree(self._remove, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _memory_mb(self) -> int:
        """Return the memory that must be available before the start."""

    @abstractmethod
    def _command(self) -> list[str]:
        """Write its configuration into its directory and return its command line."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether it serves requests now; the check takes a bounded time."""

    def _running_process(self) -> SupervisedProcess:
        if self._process is None:
            raise ServiceError(f"{self.name} is not running")
        status = self._process.poll()
        if status is not None:
            reason = f"killed by signal {status - 128}" if status > 128 else f"status {status}"
            raise ServiceError(f"{self.name} is not running: it ended, {reason}{self._log_tail()}")
        return self._process

    def _log_tail(self) -> str:
        """Format the last lines of its log, without stack frames, as the end of a message."""
        if not self.log_path.exists():
            return "; its log is gone"
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - _LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        lines = [line for line in lines if line.strip() and not line.startswith("\tat ")]
        if not lines:
            return "; its log is empty"
        return "".join(f"\n  | {line}" for line in ["its log ends:", *lines[-_LOG_TAIL_LINES:]])


ServiceT = TypeVar("ServiceT", bound=Service)


class ServiceCluster(ABC, Generic[ServiceT]):
    """Several servers that form one service.

    Attributes:
        nodes: the servers; each can be stopped, killed and started alone.
    """

    def __init__(self, nodes: Sequence[ServiceT]) -> None:
        self.nodes = tuple(nodes)

    def start(self) -> Self:
        """Start all nodes and wait until each of them reports a complete cluster.

        Raises:
            ServiceError: a node does not start, or the cluster is not complete in time.
        """
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            node.wait_until_ready()
        self._form_cluster()
        self.wait_until_complete()
        return self

    def stop(self) -> None:
        """Stop all nodes in good order."""
        for node in self.nodes:
            node.stop()

    def kill(self) -> None:
        """End all nodes with SIGKILL."""
        for node in self.nodes:
            node.kill()

    def pause(self) -> None:
        """Freeze all nodes."""
        for node in self.nodes:
            node.pause()

    def resume(self) -> None:
        """Continue all nodes after :meth:`pause`."""
        for node in self.nodes:
            node.resume()

    def close(self) -> None:
        """End all nodes for good and remove their temporary directories."""
        for node in self.nodes:
            node.close()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _form_cluster(self) -> None:
        """Join the running nodes into a cluster, if their configuration does not do it."""

    @abstractmethod
    def wait_until_complete(self) -> None:
        """Wait until each node reports a complete cluster.

        Raises:
            ServiceError: the cluster is not complete in time.
        """


def _require_memory(name: str, needed_mb: int) -> None:
    available_mb = _available_memory_mb()
    if available_mb < needed_mb:
        raise ServiceError(
            f"{name} needs {needed_mb} MB of memory and {available_mb} MB are available:"
            " end other programs, or use a smaller heap"
        )


def _available_memory_mb() -> int:
    """Find the memory left to this process, in the machine and in its control group."""
    available_bytes: int = psutil.virtual_memory().available + psutil.swap_memory().free
    group = Path("/sys/fs/cgroup")
    try:
        limit_bytes = int((group / "memory.max").read_text())
        used_bytes = int((group / "memory.current").read_text())
        cached_bytes = _cached_bytes(group / "memory.stat")
    except (FileNotFoundError, ValueError):  # no such group, or its limit is "max"
        return available_bytes >> 20
    return min(available_bytes, limit_bytes - used_bytes + cached_bytes) >> 20


def _cached_bytes(statistics: Path) -> int:
    """Read a control group's page cache, which the kernel gives back when memory is short."""
    values = dict(line.split() for line in statistics.read_text().splitlines())
    return int(values["file"])
