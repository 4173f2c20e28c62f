"""The resident memory of a worker over a long run."""

from __future__ import annotations

import asyncio

import psutil

from benchmarks.bench import Bench, Contender, make_topics, start_up
from benchmarks.traffic import feed

MEBIBYTE = 1 << 20
SAMPLE_SECONDS = 0.5


async def memory(bench: Bench, transactions: int) -> None:
    """Compare a worker's memory after a fifth with its peak."""
    settings = bench.settings()
    await make_topics(settings)
    async with bench.recur(settings) as contender:
        await start_up(contender)
        feeding = asyncio.create_task(feed(settings, bench.payments(), transactions, rate=None))
        points = await _follow(contender, transactions)
        await feeding
    early = max(rss for done, rss in points if done <= max(transactions / 5, points[0][0]))
    peak = max(rss for _, rss in points)
    bench.results.add(
        f"resident memory over {transactions:,} transactions",
        f"{early / MEBIBYTE:.0f} MiB after a fifth, at most {peak / MEBIBYTE:.0f} MiB",
        "flat, under 700",
        peak < 700 * MEBIBYTE and peak < 1.1 * early,
    )


async def _follow(contender: Contender, transactions: int) -> list[tuple[float, float]]:
    """Sample transactions applied and resident bytes until all are applied."""
    worker = contender.worker
    assert worker is not None
    process = psutil.Process(contender.process.pid)
    points: list[tuple[float, float]] = []
    while not points or points[-1][0] < transactions:
        await asyncio.sleep(SAMPLE_SECONDS)
        contender.check()
        await worker.refresh()
        done = worker.samples.get("recur_transactions_total", 0.0)
        points.append((done, float(process.memory_info().rss)))
    return points
