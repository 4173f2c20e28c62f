"""Summary of the demo, in rows for a person."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil
from redis.asyncio import Redis

from model.simulator.world import LEGITIMATE, SCENARIOS
from model.units import DAY_MS
from pipeline.demo.http_traffic import HttpFigures
from pipeline.demo.stage import Phase, Stage
from pipeline.demo.view import DemoSummary, DetectionRate, milliseconds
from pipeline.local.worker_metrics import PARTITIONS, TRANSACTIONS
from pipeline.local.workers import WorkerProcess
from pipeline.settings import Settings
from pipeline.storage.keys import MerchantKeys

_ACCOUNT_STATE = re.compile(rb"^[^:]+:[0-9a-f]{12}:\{[^{}]+\}:")
SAMPLED = 100
"""Number of account states, and of merchant profiles, whose size is measured."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Phases of a demo; None: skipped phase."""

    histories: Phase | None
    live: Phase
    burst: Phase | None

    def all(self) -> list[Phase]:
        """List the phases in order."""
        return [phase for phase in (self.histories, self.live, self.burst) if phase is not None]


async def summarize(
    result: DemoResult, stage: Stage, workers: Sequence[WorkerProcess], settings: Settings
) -> DemoSummary:
    """Make the summary, with fresh values of Redis and the workers."""
    await asyncio.gather(*(worker.refresh() for worker in workers if worker.death is None))
    rows = [("transactions", _transactions(result)), ("live", _live(result.live))]
    rows.append(("HTTP", _http(stage.http.figures())))
    if result.burst is not None:
        rows.append(
            ("burst", _burst(result.burst, sum(worker.death is None for worker in workers)))
        )
    rows.append(("alerts", _alerts(result, stage)))
    rows.append(("labels", _labels(stage)))
    rows.append(("states", await _states(settings)))
    return DemoSummary(
        rows, _detection_rates(result), [_worker(worker) for worker in workers], list(stage.faults)
    )


def _transactions(result: DemoResult) -> str:
    phases = result.all()
    total = sum(len(phase.transactions) for phase in phases)
    lost = sum(max(0, phase.counter.missing - phase.rejected) for phase in phases)
    duplicates = sum(phase.counter.duplicates + phase.counter.unknown for phase in phases)
    rejected = sum(phase.rejected for phase in phases)
    return f"{total:,}: lost {lost:,}, scored twice {duplicates:,}, rejected {rejected:,}"


def _live(phase: Phase) -> str:
    return (
        f"{len(phase.transactions):,} at {phase.per_second:,.0f}/s:"
        f" p50 {milliseconds(phase.p50_seconds)}, p99 {milliseconds(phase.p99_seconds)}"
        " from record to score"
    )


def _http(figures: HttpFigures) -> str:
    return (
        f"{figures.requests:,} of the live ones through the gateway:"
        f" p50 {milliseconds(figures.p50_seconds)}, p99 {milliseconds(figures.p99_seconds)},"
        f" errors {figures.errors:,}"
    )


def _burst(phase: Phase, workers: int) -> str:
    return (
        f"{len(phase.transactions):,} in {phase.seconds:.1f} s: {phase.per_second:,.0f}/s by"
        f" {workers} worker{'s' * (workers > 1)}, all on {os.cpu_count()} cores"
    )


def _alerts(result: DemoResult, stage: Stage) -> str:
    flagged = false = 0
    for phase in (result.live, result.burst):
        if phase is not None:
            flags = phase.counter.flagged
            flagged += int(flags.sum())
            false += int((flags & (phase.transactions.columns.scenario == 0)).sum())
    share = f", {false / flagged:.0%} of them false" if flagged else ""
    return f"{flagged:,}{share}"


def _labels(stage: Stage) -> str:
    labels = stage.labels
    days = labels.delay_ms / DAY_MS
    return f"{labels.sent:,} frauds became known, each {days:.0f} simulated days late"


def _detection_rates(result: DemoResult) -> list[DetectionRate]:
    phases = [phase for phase in (result.live, result.burst) if phase is not None]
    scenario = np.concatenate([phase.transactions.columns.scenario for phase in phases])
    flagged = np.concatenate([phase.counter.flagged for phase in phases])
    return [
        DetectionRate(
            name, int((flagged & (scenario == kind)).sum()), int((scenario == kind).sum())
        )
        for kind, name in enumerate(SCENARIOS)
        if kind != LEGITIMATE and (scenario == kind).any()
    ]


async def _states(settings: Settings) -> str:
    """Count the account states and merchant profiles in Redis, and measure their size."""
    merchant = MerchantKeys(settings.redis_key_prefix).profiles_begin()
    client = Redis.from_url(settings.redis_url, **settings.redis_client_options())
    async with client:
        keys = [bytes(key) async for key in client.scan_iter(count=10_000)]
        profiles = [key for key in keys if key.startswith(merchant)]
        states = [key for key in keys if _ACCOUNT_STATE.search(key)]
        sizes = [await client.strlen(key) for key in states[:SAMPLED]]
        profile_sizes = [await client.strlen(key) for key in profiles[:SAMPLED]]
        used_bytes = (await client.info("memory"))["used_memory"]
    accounts = f"{len(states):,} accounts{_each(sizes)}, {len(profiles):,} merchants"
    return f"{accounts}{_each(profile_sizes)}: {used_bytes / 1e6:,.0f} MB"


def _each(sizes: list[int]) -> str:
    return f" of {np.mean(sizes):,.0f} B" if sizes else ""


def _worker(worker: WorkerProcess) -> str:
    samples = worker.samples
    scored = samples.get(TRANSACTIONS, 0.0)
    partitions = samples.get(PARTITIONS, 0.0)
    parts = [f"{worker.name}: {scored:,.0f} transactions", f"{partitions:.0f} partitions"]
    memory_mb = _resident_mb(worker.process.pid)
    if memory_mb is not None and worker.death is None:
        parts.append(f"{memory_mb:,.0f} MB")
    return ", ".join(parts) + (f"; it {worker.death}" if worker.death else "")


def _resident_mb(pid: int) -> float | None:
    """Read the resident memory of a process; None if it has ended."""
    try:
        return float(psutil.Process(pid).memory_info().rss) / (1 << 20)
    except psutil.NoSuchProcess:
        return None
