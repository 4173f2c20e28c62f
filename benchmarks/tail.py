"""Rare delays: p99.9 and p99.99 over ten minutes, and what went on in each longer pause.

Nothing is asked of the worker meanwhile, which would delay it. What its machine, its broker and its
Redis did is sampled from outside, and its log is read afterwards.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import psutil
import redis.asyncio as redis_asyncio

from benchmarks.alert_share import chosen_thresholds
from benchmarks.bench import RECUR, Bench, Contender, make_topics, start_up
from benchmarks.latency import measure, run_at, warmed_up
from benchmarks.results import console
from benchmarks.score_times import ScoreTimes

RATE = 2_000
QUANTILES = (0.5, 0.99, 0.999, 0.9999)
PAUSE_MS = 50
"""A pause is a run of payments that each waited longer than this."""
GAP_MS = 50
"""Slow payments that follow within this time belong to the same pause."""
PAUSES_MAX = 100
"""Most pauses that are printed."""
SAMPLE_SECONDS = 0.1
BROKER_PAUSE = re.compile(r"\[(\d+)ms\] GC\(\d+\) Pause .* ([\d.]+)ms")
BROKER_LOG = "kafka-collector.log"
STOLEN = 0.05
"""Share of the machine's time from which the hypervisor counts as a cause."""


class Pause(NamedTuple):
    """A run of slow payments, times in epoch milliseconds."""

    begin_ms: int
    end_ms: int
    payments: int
    longest_ms: int


@dataclass(frozen=True)
class Sample:
    """The work of the machine until a moment.

    Attributes:
        at_ms: epoch milliseconds.
        cpu_seconds: of each process since its start, by name.
        waited_ms: time that the worker's main thread was ready to run and had no core.
        stolen_seconds: time that the hypervisor gave to others, of all cores.
        redis: ``INFO persistence`` of Redis.
    """

    at_ms: float
    cpu_seconds: dict[str, float]
    waited_ms: float
    stolen_seconds: float
    redis: dict[str, Any]


class BrokerPause(NamedTuple):
    """A pause of the broker's garbage collector.

    Attributes:
        end_ms: its end, epoch milliseconds.
        pause_ms: its length.
    """

    end_ms: float
    pause_ms: float


class LogLine(msgspec.Struct):
    """A line of the worker's log."""

    time: str
    message: str
    pause_ms: float | None = None


def log_broker_pauses(directory: Path) -> None:
    """Let the Java programs that this process starts log their collector's pauses."""
    os.environ["JDK_JAVA_OPTIONS"] = f"-Xlog:gc:file={directory / BROKER_LOG}:timemillis"


@dataclass(frozen=True)
class Logs:
    """Times and messages of the worker's log, and the broker's pauses."""

    worker: list[tuple[float, str]]
    broker: list[BrokerPause]


async def tail(bench: Bench, seconds: float) -> None:
    """Measure the tail of the latency at one rate."""
    _, runs = await measure(bench, RECUR, bench.settings(), 1.0, rates=(RATE,))
    settings = bench.settings(**chosen_thresholds("the tail", runs[RATE].times.scores))
    await make_topics(settings)
    async with bench.recur(settings) as contender:
        await start_up(contender)
        stream = await warmed_up(settings, contender)
        samples: list[Sample] = []
        sampling = asyncio.create_task(_sample(bench, contender, samples))
        run = await run_at(settings, contender, stream, RATE, seconds)
        sampling.cancel()
        with suppress(asyncio.CancelledError):
            await sampling
    latencies = run.times.latency_ms
    values = ", ".join(f"p{q * 100:g} {np.quantile(latencies, q):.0f}" for q in QUANTILES)
    bench.results.add(
        f"latency at {RATE:,}/s over {seconds / 60:g} minutes",
        f"{values}, longest {latencies.max()} ms",
    )
    logs = Logs(_logged(contender.log_path), broker_pauses(bench.directory / BROKER_LOG))
    _print_pauses(run.times, samples, logs)


def pauses(times: ScoreTimes) -> Iterator[Pause]:
    """Group the slow payments, which stand in order of their creation.

    >>> created = np.array([0, 10, 20, 30, 500])
    >>> scored = np.array([5, 90, 95, 35, 600])
    >>> for pause in pauses(ScoreTimes(created, scored, created)):
    ...     print(pause)
    Pause(begin_ms=10, end_ms=95, payments=2, longest_ms=80)
    Pause(begin_ms=500, end_ms=600, payments=1, longest_ms=100)
    """
    slow = np.flatnonzero(times.latency_ms > PAUSE_MS)
    if not len(slow):
        return
    breaks = np.flatnonzero(np.diff(times.created_ms[slow]) > GAP_MS) + 1
    for group in np.split(slow, breaks):
        yield Pause(
            int(times.created_ms[group[0]]),
            int(times.scored_ms[group].max()),
            len(group),
            int(times.latency_ms[group].max()),
        )


def _print_pauses(times: ScoreTimes, samples: list[Sample], logs: Logs) -> None:
    found = list(pauses(times))
    console.print(f"  pauses over {PAUSE_MS} ms: {len(found)}")
    for pause in sorted(found, key=lambda p: -p.longest_ms)[:PAUSES_MAX]:
        at = datetime.fromtimestamp(pause.begin_ms / 1000).astimezone()
        causes = [*_causes(pause, times, samples), *_logged_causes(pause, logs)]
        console.print(
            f"    {at:%H:%M:%S.%f}  {pause.longest_ms} ms, {pause.payments} payments:"
            f" {'; '.join(causes) or 'nothing known'}",
            markup=False,
        )


def _causes(pause: Pause, times: ScoreTimes, samples: list[Sample]) -> Iterator[str]:
    """Tell what the samples around a pause show."""
    around = _around(pause, samples)
    if len(around) < 2:
        return
    first, last = around[0], around[-1]
    seconds = (last.at_ms - first.at_ms) / 1000
    shares = {
        name: (cpu - first.cpu_seconds.get(name, cpu)) / seconds
        for name, cpu in last.cpu_seconds.items()
    }
    yield "cores used: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    waited_ms = last.waited_ms - first.waited_ms
    if waited_ms > PAUSE_MS / 2:
        yield f"the worker waited {waited_ms:.0f} ms for a core"
    stolen = (last.stolen_seconds - first.stolen_seconds) / seconds / psutil.cpu_count()
    if stolen > STOLEN:
        yield f"the hypervisor took {stolen:.0%} of the machine"
    near = (times.created_ms >= pause.begin_ms - 2 * PAUSE_MS) & (times.created_ms <= pause.end_ms)
    gap = int(np.diff(times.created_ms[near]).max(initial=0))
    if gap > PAUSE_MS / 2:
        yield f"the feed itself paused for {gap} ms"
    longest_sample = max(b.at_ms - a.at_ms for a, b in pairwise(around))
    if longest_sample > 1000 * SAMPLE_SECONDS + PAUSE_MS:
        yield f"the benchmark's own process stood still, too ({longest_sample:.0f} ms)"
    yield from _redis_causes(around)


def _around(pause: Pause, samples: list[Sample]) -> list[Sample]:
    margin = 1.5 * SAMPLE_SECONDS * 1000
    return [s for s in samples if pause.begin_ms - margin <= s.at_ms <= pause.end_ms + margin]


def _redis_causes(around: list[Sample]) -> Iterator[str]:
    for name, what in (
        ("aof_rewrite_in_progress", "Redis rewrote its append-only file"),
        ("rdb_bgsave_in_progress", "Redis saved a snapshot"),
        ("aof_pending_bio_fsync", "Redis waited for the disk"),
    ):
        if any(sample.redis.get(name) for sample in around):
            yield what
    delayed = [sample.redis.get("aof_delayed_fsync", 0) for sample in around]
    if delayed[-1] > delayed[0]:
        yield "Redis delayed a write until the disk had synced"


def _logged(path: Path) -> list[tuple[float, str]]:
    """Read the worker's log: epoch milliseconds and message of each line."""
    found = []
    for line in path.read_bytes().splitlines():
        with suppress(msgspec.DecodeError, msgspec.ValidationError):
            entry = msgspec.json.decode(line, type=LogLine)
            at = datetime.fromisoformat(entry.time.replace("Z", "+00:00"))
            length = "" if entry.pause_ms is None else f" for {entry.pause_ms:g} ms"
            found.append((at.timestamp() * 1000, entry.message + length))
    return found


def broker_pauses(path: Path) -> list[BrokerPause]:
    """Read the pauses of the broker's collector; none if it was started elsewhere."""
    if not path.exists():
        return []
    matches = BROKER_PAUSE.finditer(path.read_text())
    return [BrokerPause(float(at), float(length)) for at, length in (m.groups() for m in matches)]


def _logged_causes(pause: Pause, logs: Logs) -> Iterator[str]:
    for at_ms, line in logs.worker:
        if pause.begin_ms - PAUSE_MS <= at_ms <= pause.end_ms + PAUSE_MS:
            yield f"the worker logged: {line}"
    for one in logs.broker:
        if pause.begin_ms <= one.end_ms and one.end_ms - one.pause_ms <= pause.end_ms:
            yield f"the broker's collector paused it for {one.pause_ms:.0f} ms"


def _waited_ms(pid: int) -> float:
    """Read how long a process's main thread has waited for a core; 0 where Linux does not tell."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e6
    except (OSError, IndexError):
        return 0.0


async def _sample(bench: Bench, contender: Contender, samples: list[Sample]) -> None:
    """Sample until cancelled."""
    processes = {"worker": psutil.Process(contender.process.pid), "this": psutil.Process()}
    for name, service in (("Kafka", bench.services.kafka), ("Redis", bench.services.redis)):
        if service is not None:
            processes[name] = psutil.Process(service.pid)
    client: Any = redis_asyncio.Redis.from_url(bench.services.redis_url)
    try:
        while True:
            persistence = await client.info("persistence")
            cpu_seconds = {name: sum(p.cpu_times()[:2]) for name, p in processes.items()}
            stolen = getattr(psutil.cpu_times(), "steal", 0.0)
            waited_ms = _waited_ms(contender.process.pid)
            now_ms = time.time() * 1000
            samples.append(Sample(now_ms, cpu_seconds, waited_ms, stolen, persistence))
            await asyncio.sleep(SAMPLE_SECONDS)
    finally:
        await client.aclose()
