"""The latency at live rates, and the cost of a poll, beside the peers' and in turn with them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import redis.asyncio as redis_asyncio

from benchmarks.alert_share import chosen_thresholds
from benchmarks.bench import (
    BYTEWAX,
    QUIX_PROMPT,
    RECUR,
    Bench,
    Contender,
    make_topics,
    published,
    start_up,
)
from benchmarks.results import Rounds, console
from benchmarks.score_times import Offsets, ScoreTimes, ends, read_score_times
from benchmarks.traffic import blocks, feed
from pipeline.local.worker_metrics import LATENCY, Samples, buckets, quantile
from pipeline.replay.producer import Block
from pipeline.settings import Settings

RATES = (500, 1_000, 2_000, 5_000)
QUANTILES = (0.5, 0.99)
HISTORY_TRANSACTIONS = 200_000
"""Transactions before all others, 10 of each account: new accounts cost more."""
WARM_UP_RATE = 5_000
WARM_UP_TRANSACTIONS = 40_000
"""Warm-up of Java's compiler and of most accounts and merchants."""
SETTLE_SECONDS = 2.0
"""Time at each rate before its measurement."""
LATE_SECONDS = 1.0
"""A contender keeps up with a rate if its last score comes at most this late."""
BACKLOG_SECONDS = 60.0
"""Longest wait for the rest."""
REWRITING = ("aof_rewrite_in_progress", "aof_rewrite_scheduled")
REWRITE_SECONDS = 60.0
"""Longest wait for Redis to write its append-only file again."""
CALIBRATION_SECONDS = 3.0
READY_AT_MOST_SECONDS = 5.0
POLLS = "recur_micro_batch_transactions_count"


@dataclass(frozen=True)
class RateRun:
    """A contender at a rate.

    Attributes:
        times: its scores.
        cpu_seconds: of its process.
        polls: None if it does not tell.
        own: its own quantiles of the latency, ms; empty if it does not tell.
        kept_up: whether it scored the payments as fast as they came.
    """

    rate: int
    times: ScoreTimes
    cpu_seconds: float
    polls: float | None
    own: dict[float, float]
    kept_up: bool


@dataclass
class PollCosts:
    """Pairs of transactions in a poll and the worker's CPU for it, one of each rate and round."""

    sizes: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)

    def add(self, run: RateRun) -> None:
        """Add a rate of a round that the worker kept up with."""
        if run.polls and run.kept_up:
            self.sizes.append(len(run.times.scores) / run.polls)
            self.cpu_ms.append(run.cpu_seconds * 1000 / run.polls)

    def line(self) -> tuple[float, float]:
        """Fit CPU = a + b n by least squares; return a in ms and b in µs.

        >>> tuple(round(x, 6) for x in PollCosts([1.0, 5.0, 11.0], [2.1, 2.5, 3.1]).line())
        (2.0, 100.0)
        """
        b, a = np.polyfit(self.sizes, self.cpu_ms, 1).tolist()
        return a, b * 1000


async def latency(bench: Bench, peers: list[str], seconds: float, rounds: int) -> None:
    """Measure latencies and CPU at each rate."""
    thresholds = await _thresholds(bench)
    contenders = [RECUR, *(name for name in (BYTEWAX, QUIX_PROMPT) if name in peers)]
    found = Rounds()
    costs = PollCosts()
    times_kept_up: Counter[tuple[str, int]] = Counter()
    ready = []
    for _ in range(rounds):
        for name in contenders:
            settings = bench.settings(**thresholds if name == RECUR else {})
            seconds_to_ready, runs = await measure(bench, name, settings, seconds)
            if name == RECUR:
                ready.append(seconds_to_ready)
            for rate in RATES:
                if (run := runs.get(rate)) is not None:
                    times_kept_up[name, rate] += run.kept_up
                    _add(found, name, run)
                    costs.add(run)
    until_ready = float(np.median(ready))
    bench.results.add(
        "time until a worker is ready",
        f"{until_ready:.1f} s",
        f"{READY_AT_MOST_SECONDS:.0f}",
        until_ready <= READY_AT_MOST_SECONDS,
    )
    kept_up = {key for key, times in times_kept_up.items() if times > rounds / 2}
    for rate in RATES:
        _add_rows(bench, found, kept_up, rate, contenders)
    _add_cost(bench, costs)


def _add(found: Rounds, name: str, run: RateRun) -> None:
    for share in QUANTILES:
        value = float(np.quantile(run.times.latency_ms, share))
        found.add(f"{name}, p{share * 100:.0f} at {run.rate:,}/s, ms", value)
        if share in run.own:
            found.add(f"{name}'s own p{share * 100:.0f} at {run.rate:,}/s, ms", run.own[share])
    found.add(f"{name}, CPU at {run.rate:,}/s, µs a payment", _cpu_us(run))


def _cpu_us(run: RateRun) -> float:
    return run.cpu_seconds * 1e6 / max(len(run.times.scores), 1)


def _add_rows(
    bench: Bench,
    found: Rounds,
    kept_up: set[tuple[str, int]],
    rate: int,
    contenders: list[str],
) -> None:
    """Add a rate's rows: each contender's values, and Recur's ratio to the better peer."""
    for name in contenders:
        if (name, rate) not in kept_up:
            bench.results.add(f"latency at {rate:,}/s, {name}", "does not keep up")
            continue
        p50, p99 = (found.median(f"{name}, p{p} at {rate:,}/s, ms") for p in (50, 99))
        text = f"p50 {p50:.1f}, p99 {p99:.1f} ms"
        if name == RECUR:
            own = (found.median(f"{name}'s own p{p} at {rate:,}/s, ms") for p in (50, 99))
            text += "; its own measure {:.1f}, {:.1f}".format(*own)
        cpu = found.median(f"{name}, CPU at {rate:,}/s, µs a payment")
        bench.results.add(f"latency at {rate:,}/s, {name}", f"{text}; {cpu:.0f} µs of CPU each")
    rivals = [name for name in contenders if name != RECUR and (name, rate) in kept_up]
    for share in QUANTILES:
        key = f"p{share * 100:.0f} at {rate:,}/s, ms"
        best = min((found.median(f"{name}, {key}") for name in rivals), default=float("nan"))
        ratio = found.median(f"{RECUR}, {key}") / best
        if rivals and (RECUR, rate) in kept_up:
            bench.results.add(
                f"latency p{share * 100:.0f} at {rate:,}/s, Recur / better peer",
                f"{ratio:.2f} times",
                "at most 0.5",
                ratio <= 0.5,
            )


def _add_cost(bench: Bench, costs: PollCosts) -> None:
    if len(set(costs.sizes)) > 1:
        a, b = costs.line()
        sizes = f"{min(costs.sizes):.1f} to {max(costs.sizes):.1f} transactions"
        bench.results.add(
            f"CPU of a poll of n transactions, from polls of {sizes}",
            f"{a:.2f} ms + {b:.0f} µs · n",
        )


async def _thresholds(bench: Bench) -> dict[str, Any]:
    """Choose thresholds by the scores of a short run at every rate."""
    _, runs = await measure(bench, RECUR, bench.settings(), CALIBRATION_SECONDS)
    scores = np.concatenate([run.times.scores for run in runs.values()])
    return chosen_thresholds("live rates", scores)


async def measure(
    bench: Bench,
    name: str,
    settings: Settings,
    seconds: float,
    rates: Sequence[int] = RATES,
) -> tuple[float, dict[int, RateRun]]:
    """Warm a contender up and run it at each rate, until it does not keep up."""
    await make_topics(settings)
    runs: dict[int, RateRun] = {}
    async with bench.run(name, settings) as contender:
        ready = await start_up(contender)
        stream = await warmed_up(settings, contender)
        for rate in rates:
            await feed(settings, stream, int(rate * SETTLE_SECONDS), rate)
            runs[rate] = await run_at(settings, contender, stream, rate, seconds)
            if not runs[rate].kept_up:
                break
    return ready, runs


async def warmed_up(settings: Settings, contender: Contender) -> Iterator[Block]:
    """Feed a contender the history and the warm-up; return the stream of what follows."""
    stream = blocks(live=True, history=HISTORY_TRANSACTIONS)
    await feed(settings, stream, HISTORY_TRANSACTIONS, rate=None)
    await published(settings, HISTORY_TRANSACTIONS, contender)
    await feed(settings, stream, WARM_UP_TRANSACTIONS, WARM_UP_RATE)
    await published(settings, HISTORY_TRANSACTIONS + WARM_UP_TRANSACTIONS, contender)
    await rewrite_redis_log(settings)
    return stream


async def rewrite_redis_log(settings: Settings) -> None:
    """Let Redis write its append-only file again, and wait for the end of it.

    The history makes the file grow until Redis begins by itself, at any moment of a measurement.
    """
    client: Any = redis_asyncio.Redis.from_url(settings.redis_url)
    async with client, asyncio.timeout(REWRITE_SECONDS):
        if not (await client.info("persistence"))["aof_rewrite_in_progress"]:
            await client.bgrewriteaof()
        is_writing = True
        while is_writing:
            await asyncio.sleep(0.1)
            info = await client.info("persistence")
            is_writing = any(info[name] for name in REWRITING)


async def run_at(
    settings: Settings, contender: Contender, stream: Any, rate: int, seconds: float
) -> RateRun:
    """Feed a contender at a rate and read its scores afterwards."""
    payments, scores = await _ends(settings)
    before = await _samples(contender)
    cpu_seconds = contender.cpu_seconds()
    late = await feed(settings, stream, int(rate * seconds), rate)
    if late:
        console.print(f"    the feed was late by {late:.1f} s in all", style="dim")
    kept_up = True
    try:
        async with asyncio.timeout(LATE_SECONDS):
            await _until_scored(settings, contender)
    except TimeoutError:
        kept_up = False
    cpu_seconds = contender.cpu_seconds() - cpu_seconds
    after = await _samples(contender)
    if not kept_up:
        try:
            async with asyncio.timeout(BACKLOG_SECONDS):
                await _until_scored(settings, contender)
        except TimeoutError:
            console.print(f"    {contender.name} left payments without a score", style="dim")
    times = await read_score_times(settings, payments, scores)
    polls = after[POLLS] - before[POLLS] if POLLS in after else None
    return RateRun(rate, times, cpu_seconds, polls, _own(before, after), kept_up)


async def _ends(settings: Settings) -> tuple[Offsets, Offsets]:
    topics = (settings.topic("transactions"), settings.topic("scores"))
    payments, scores = [await ends(settings, topic) for topic in topics]
    return payments, scores


async def _until_scored(settings: Settings, contender: Contender) -> None:
    """Wait until each payment has a score."""
    payments = await ends(settings, settings.topic("transactions"))
    await published(settings, sum(payments.values()), contender)


async def _samples(contender: Contender) -> Samples:
    if contender.worker is None:
        return {}
    await contender.worker.refresh()
    return dict(contender.worker.samples)


def _own(before: Samples, after: Samples) -> dict[float, float]:
    """Compute the quantiles of Recur's own histogram, ms."""
    start, end = buckets(before, LATENCY), buckets(after, LATENCY)
    counts = {bound: end[bound] - start.get(bound, 0.0) for bound in end}
    found = {share: quantile(counts, share) for share in QUANTILES}
    return {share: value * 1000 for share, value in found.items() if value is not None}
