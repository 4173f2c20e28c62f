"""Workers as processes of this one: start, wait until ready, read their metrics, stop.

They are supervised (:mod:`pipeline.local.supervisor`): none outlives this process.
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

import pipeline
from pipeline.errors import ServiceError
from pipeline.local.services import HOST, free_port
from pipeline.local.supervisor import SupervisedProcess

STOP_SECONDS = 20.0
"""A worker may take so long to finish its micro-batch and leave the group: its own bound
(RECUR_SHUTDOWN_SECONDS), and what ending takes."""

HTTP_TIMEOUT_SECONDS = 2.0
POLL_SECONDS = 0.1
TAIL_LINES = 12
TAIL_MAX_BYTES = 16_384
METRICS_MAX_BYTES = 1 << 20

LATENCY = "recur_score_latency_seconds"

Samples = dict[str, float]
"""Sample name with labels, as /metrics prints it, to its value."""


@dataclass
class WorkerProcess:
    """One worker; ``samples`` are the metrics it last told, also after its death."""

    number: int
    process: SupervisedProcess
    host: str
    port: int
    log_path: Path
    samples: Samples = field(default_factory=dict)
    stopping: bool = False

    @property
    def name(self) -> str:
        """For people: worker 1, worker 2."""
        return f"worker {self.number}"

    @property
    def address(self) -> str:
        """Of its metrics."""
        return f"http://{self.host}:{self.port}/metrics"

    @property
    def death(self) -> str | None:
        """How it died without being told to; None while it lives."""
        status = self.process.poll()
        if status is None or self.stopping:
            return None
        if status > 128:
            return f"was ended by {_signal_name(status - 128)}"
        return f"ended with exit status {status}"

    @property
    def killed(self) -> bool:
        """A signal ended it: somebody's doing, not a fault of its own."""
        status = self.process.poll()
        return status is not None and status > 128

    def log_tail(self) -> str:
        """The last lines of its log."""
        with self.log_path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - TAIL_MAX_BYTES))
            text = log.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-TAIL_LINES:])

    async def ready(self) -> bool:
        """Whether /ready says so."""
        status, _ = await _get(self.host, self.port, "/ready")
        return status == 200

    async def refresh(self) -> None:
        """Read /metrics; keeps the samples as they were when there is no answer."""
        status, body = await _get(self.host, self.port, "/metrics")
        if status == 200:
            self.samples = parse_samples(body)

    async def stop(self) -> int:
        """SIGTERM, then SIGKILL if it does not end in time; its exit status."""
        self.stopping = True
        return await asyncio.to_thread(self.process.stop, STOP_SECONDS)


def start_worker(number: int, directory: Path, environment: Mapping[str, str]) -> WorkerProcess:
    """Start ``recur worker`` with these variables besides our own; its log lies in directory.

    Raises:
        ServiceError: the process cannot be started.
    """
    port = free_port()
    log_path = directory / f"worker-{number}.log"
    source = str(Path(pipeline.__file__).parents[1])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        **os.environ,
        **environment,
        "PYTHONPATH": os.pathsep.join(paths),
        "RECUR_HTTP_HOST": HOST,
        "RECUR_HTTP_PORT": str(port),
    }
    try:
        process = SupervisedProcess(
            [sys.executable, "-m", "pipeline.cli.main", "worker"],
            log_path=log_path,
            directory=directory,
            environment=variables,
            grace_seconds=STOP_SECONDS,
        )
    except OSError as error:
        raise ServiceError(f"worker {number} cannot be started: {error}") from error
    return WorkerProcess(number, process, HOST, port, log_path)


async def until_ready(workers: Sequence[WorkerProcess], timeout_seconds: float) -> None:
    """Wait until every worker is ready at the same time: the group has settled.

    Raises:
        ServiceError: one died, or they are not ready in time; with the tail of a log.
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
    """Stop all at once; their exit statuses."""
    return list(await asyncio.gather(*(worker.stop() for worker in workers)))


def parse_samples(text: str) -> Samples:
    """Samples of a /metrics page.

    >>> parse_samples('# HELP a b\\na_total 3.0\\nb{le="+Inf"} 2.0\\n')
    {'a_total': 3.0, 'b{le="+Inf"}': 2.0}
    """
    samples = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            samples[name] = float(value)
    return samples


def buckets(samples: Samples, name: str) -> dict[float, float]:
    """Upper bound to cumulative count, of a histogram without other labels."""
    start = f'{name}_bucket{{le="'
    return {
        float(key.removeprefix(start).removesuffix('"}')): value
        for key, value in samples.items()
        if key.startswith(start)
    }


def quantile(cumulative: Mapping[float, float], share: float) -> float | None:
    """The value under which a share of a histogram's observations lies; None without any.

    Between two bounds it is interpolated, as Prometheus does; over the last finite bound it is
    that bound.

    >>> quantile({0.001: 10, 0.002: 30, float("inf"): 30}, 0.5)
    0.00125
    """
    total = cumulative.get(float("inf"), 0.0)
    if total <= 0:
        return None
    wanted = share * total
    below_bound, below_count = 0.0, 0.0
    for bound in sorted(cumulative):
        count = cumulative[bound]
        if count >= wanted:
            if bound == float("inf"):
                return below_bound
            inside = (wanted - below_count) / (count - below_count) if count > below_count else 1.0
            return below_bound + (bound - below_bound) * inside
        below_bound, below_count = bound, count
    return below_bound


async def _get(host: str, port: int, path: str) -> tuple[int, str]:
    """Status and body of a GET; status 0 when there is no answer."""
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
