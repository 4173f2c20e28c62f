"""Workers and gateways on this machine: start, wait until ready, read their metrics, stop.

A supervisor (:mod:`pipeline.local.supervisor`) ends each worker with this process.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import pipeline
from pipeline.errors import ServiceError
from pipeline.local.ports import HOST, free_port
from pipeline.local.supervisor import SupervisedProcess
from pipeline.local.worker_metrics import Samples, parse_samples

STOP_SECONDS = 20.0
"""Limit for a worker to finish its micro-batch and leave the group.

It covers the worker's own limit (RECUR_SHUTDOWN_SECONDS) and the end of its process.
"""

HTTP_TIMEOUT_SECONDS = 2.0
POLL_SECONDS = 0.1
TAIL_LINES = 12
TAIL_MAX_BYTES = 16_384
METRICS_MAX_BYTES = 1 << 20


@dataclass
class WorkerProcess:
    """A worker process; ``samples`` are its last known metrics, also after its death."""

    number: int
    process: SupervisedProcess
    host: str
    port: int
    log_path: Path
    samples: Samples = field(default_factory=dict)
    stopping: bool = False

    @property
    def name(self) -> str:
        """Name for people, such as worker 1."""
        return f"worker {self.number}"

    @property
    def address(self) -> str:
        """Address of its metrics."""
        return f"http://{self.host}:{self.port}/metrics"

    @property
    def death(self) -> str | None:
        """Description of an unexpected end; None while it runs or after a stop."""
        status = self.process.poll()
        if status is None or self.stopping:
            return None
        if status > 128:
            return f"was killed by {_signal_name(status - 128)}"
        return f"ended with exit status {status}"

    @property
    def killed(self) -> bool:
        """Whether a signal ended it, which is not a fault of its own."""
        status = self.process.poll()
        return status is not None and status > 128

    def log_tail(self) -> str:
        """Read the last lines of its log."""
        with self.log_path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - TAIL_MAX_BYTES))
            text = log.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-TAIL_LINES:])

    async def ready(self) -> bool:
        """Whether /ready answers with status 200."""
        status, _ = await _get(self.host, self.port, "/ready")
        return status == 200

    async def refresh(self, names: Sequence[str] = ()) -> None:
        """Read /metrics, or the samples with these names; keep old samples without an answer."""
        query = urlencode([("name[]", name) for name in names])
        status, body = await _get(self.host, self.port, f"/metrics?{query}")
        if status == 200:
            read = parse_samples(body)
            self.samples = self.samples | read if names else read

    async def stop(self) -> int:
        """Send SIGTERM, then SIGKILL after a limit, and return the exit status."""
        self.stopping = True
        return await asyncio.to_thread(self.process.stop, STOP_SECONDS)


class LocalGateway(WorkerProcess):
    """A gateway process; it answers to /ready and /metrics as a worker does."""

    @property
    def name(self) -> str:
        """Name for people."""
        return "gateway"

    @property
    def base_url(self) -> str:
        """Address of its API, such as http://127.0.0.1:8080."""
        return f"http://{self.host}:{self.port}"


def start_worker(number: int, directory: Path, environment: Mapping[str, str]) -> WorkerProcess:
    """Start ``recur worker`` with more environment variables; write its log to the directory.

    Raises:
        ServiceError: the process cannot be started.
    """
    port = free_port()
    more = {**environment, "RECUR_HTTP_HOST": HOST, "RECUR_HTTP_PORT": str(port)}
    log_path = directory / f"worker-{number}.log"
    process = _start("worker", log_path, more)
    return WorkerProcess(number, process, HOST, port, log_path)


def start_gateway(directory: Path, environment: Mapping[str, str]) -> LocalGateway:
    """Start ``recur gateway`` as :func:`start_worker` does a worker.

    Raises:
        ServiceError: the process cannot be started.
    """
    port = free_port()
    more = {**environment, "RECUR_GATEWAY_HOST": HOST, "RECUR_GATEWAY_PORT": str(port)}
    log_path = directory / "gateway.log"
    return LocalGateway(0, _start("gateway", log_path, more), HOST, port, log_path)


def _start(command: str, log_path: Path, environment: Mapping[str, str]) -> SupervisedProcess:
    source = str(Path(pipeline.__file__).parents[1])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        **os.environ,
        **environment,
        "PYTHONPATH": os.pathsep.join(paths),
    }
    try:
        return SupervisedProcess(
            [sys.executable, "-m", "pipeline.cli.main", command],
            log_path=log_path,
            directory=log_path.parent,
            environment=variables,
            grace_seconds=STOP_SECONDS,
        )
    except OSError as error:
        raise ServiceError(f"`recur {command}` cannot be started: {error}") from error


async def until_ready(workers: Sequence[WorkerProcess], timeout_seconds: float) -> None:
    """Wait until all workers are ready at the same time: then the group is stable.

    Raises:
        ServiceError: a worker died or is not ready in time. The message ends with its log.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        await asyncio.sleep(POLL_SECONDS)
        for worker in workers:
            if worker.death is not None:
                raise ServiceError(
                    f"{worker.name} {worker.death}; the end of its log:\n{worker.log_tail()}"
                )
        ready = await asyncio.gather(*(worker.ready() for worker in workers))
        if all(ready):
            return
        if time.monotonic() > deadline:
            late = workers[ready.index(False)]
            raise ServiceError(
                f"{late.name} is not ready after {timeout_seconds:g} s;"
                f" the end of its log:\n{late.log_tail()}"
            )


async def stop_all(workers: Sequence[WorkerProcess]) -> list[int]:
    """Stop all workers at the same time and return their exit statuses."""
    return list(await asyncio.gather(*(worker.stop() for worker in workers)))


async def _get(host: str, port: int, path: str) -> tuple[int, str]:
    """Get a page: its status and body, or status 0 if there is no answer."""
    try:
        async with asyncio.timeout(HTTP_TIMEOUT_SECONDS):
            reader, writer = await asyncio.open_connection(host, port, limit=METRICS_MAX_BYTES)
            try:
                writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}:{port}\r\n\r\n".encode())
                await writer.drain()
                reply = await reader.read(-1)
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return 0, ""
    head, _, body = reply.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if len(words) < 2 or not words[1].isdigit():
        return 0, ""
    return int(words[1]), body.decode()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
