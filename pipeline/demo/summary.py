"""What the demo came to, in rows that a person would show to a colleague."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from redis.asyncio import Redis

from model.simulator.world import LEGITIMATE, SCENARIOS
from pipeline.demo.stage import Phase, Show
from pipeline.demo.view import Caught, Summary, milliseconds
from pipeline.local.workers import WorkerProcess
from pipeline.settings import Settings
from pipeline.storage.keys import MerchantKeys
from pipeline.units import DAY_MS

_ACCOUNT_STATE = re.compile(rb"^[^:]+:[0-9a-f]{12}:\{[^{}]+\}:")
SAMPLED = 100
"""Account states, and merchant profiles, whose size is looked at."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The phases that were played; None where one was left out."""

    histories: Phase | None
    live: Phase
    burst: Phase | None

    def all(self) -> list[Phase]:
        """In order."""
        return [phase for phase in (self.histories, self.live, self.burst) if phase is not None]


async def summarize(
    played: DemoResult, show: Show, workers: Sequence[WorkerProcess], settings: Settings
) -> Summary:
    """The summary; asks Redis and the workers once more."""
    await asyncio.gather(*(worker.refresh() for worker in workers if worker.death is None))
    rows = [("transactions", _transactions(played)), ("live", _live(played.live))]
    if played.burst is not None:
        rows.append(
            ("burst", _burst(played.burst, sum(worker.death is None for worker in workers)))
        )
    rows.append(("alerts", _alerts(played, show)))
    rows.append(("labels", _labels(show)))
    rows.append(("states", await _states(settings)))
    return Summary(
        rows, _caught(played), [_worker(worker) for worker in workers], list(show.faults)
    )


def _transactions(played: DemoResult) -> str:
    phases = played.all()
    total = sum(len(phase.transactions) for phase in phases)
    lost = sum(max(0, phase.tally.missing - phase.rejected) for phase in phases)
    double = sum(phase.tally.repeated + phase.tally.strangers for phase in phases)
    rejected = sum(phase.rejected for phase in phases)
    return f"{total:,}: lost {lost:,}, scored twice {double:,}, rejected {rejected:,}"


def _live(phase: Phase) -> str:
    return (
        f"{len(phase.transactions):,} at {phase.per_second:,.0f}/s:"
        f" p50 {milliseconds(phase.p50_seconds)}, p99 {milliseconds(phase.p99_seconds)}"
        " from record to score"
    )


def _burst(phase: Phase, workers: int) -> str:
    return (
        f"{len(phase.transactions):,} in {phase.seconds:.1f} s: {phase.per_second:,.0f}/s by"
        f" {workers} worker{'s' * (workers > 1)}, all on {os.cpu_count()} cores"
    )


def _alerts(played: DemoResult, show: Show) -> str:
    flagged = false = 0
    for phase in (played.live, played.burst):
        if phase is not None:
            flags = phase.tally.flagged
            flagged += int(flags.sum())
            false += int((flags & (phase.transactions.columns.scenario == 0)).sum())
    share = f", {false / flagged:.0%} of them false" if flagged else ""
    return f"{flagged:,}{share}"


def _labels(show: Show) -> str:
    labels = show.labels
    days = labels.delay_ms / DAY_MS
    return f"{labels.sent:,} frauds became known, each {days:.0f} simulated days late"


def _caught(played: DemoResult) -> list[Caught]:
    phases = [phase for phase in (played.live, played.burst) if phase is not None]
    scenario = np.concatenate([phase.transactions.columns.scenario for phase in phases])
    flagged = np.concatenate([phase.tally.flagged for phase in phases])
    return [
        Caught(name, int((flagged & (scenario == kind)).sum()), int((scenario == kind).sum()))
        for kind, name in enumerate(SCENARIOS)
        if kind != LEGITIMATE and (scenario == kind).any()
    ]


async def _states(settings: Settings) -> str:
    """How many account states and merchant profiles Redis holds, and how large they are."""
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
    scored = samples.get("recur_transactions_total", 0.0)
    partitions = samples.get("recur_partitions_assigned", 0.0)
    parts = [f"{worker.name}: {scored:,.0f} transactions", f"{partitions:.0f} partitions"]
    memory_mb = _resident_mb(worker.process.pid)
    if memory_mb is not None and worker.death is None:
        parts.append(f"{memory_mb:,.0f} MB")
    return ", ".join(parts) + (f"; it {worker.death}" if worker.death else "")


def _resident_mb(pid: int) -> float | None:
    """Resident memory, where the system tells (Linux)."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return None
