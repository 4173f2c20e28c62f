"""``make bench``: measure a worker on this machine and print a table.

One worker shares the cores with broker and Redis. It publishes a score with all features for each
transaction of 20,000 accounts, from a GRU with hidden size 128. The stock Faust workers run in the
same way on the same broker, one after the other.

    python -m benchmarks [--transactions N] [--memory-transactions N] [--seconds S] [--only NAME]
"""

from __future__ import annotations

import asyncio
import itertools
import os
import platform
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import click
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks import promptness
from model.checkpoint import Checkpoint, CheckpointThresholds, Header
from model.features.account import ACCOUNT_FEATURES
from model.features.spec import FeatureSpec
from model.network import Network
from model.simulator.handbook import Simulator, account_id, merchant_id
from pipeline.checkpoint import load_checkpoint
from pipeline.kafka.score_log import KafkaScoreLog
from pipeline.kafka.topics import ensure_topics
from pipeline.local.embedded import Services, embedded
from pipeline.local.supervisor import SupervisedProcess
from pipeline.local.worker_metrics import LATENCY, buckets, quantile
from pipeline.local.workers import WorkerProcess, start_worker, until_ready
from pipeline.replay.producer import BLOCK_TRANSACTIONS, Block, Feed, ahead, encode_block
from pipeline.scoring.scorer import Scorer
from pipeline.settings import Settings, load_settings
from pipeline.timestamps import ANY_AGE_SECONDS

ACCOUNTS = 20_000
READY_SECONDS = 60.0
SAMPLE_SECONDS = 0.5
STOCK_TRANSACTIONS = {"event": 12_000, "take": 60_000}
RATES = (500, 5_000)
LATENCY_LIMITS_MS = {(500, 0.5): 3.0, (500, 0.99): 12.0, (5_000, 0.99): 30.0}
"""Limits of the latency by rate and quantile."""
LIVE_BLOCK_TRANSACTIONS = 500
"""Size of a block: a second at the lower rate, so that timestamps are fresh when sent."""
WARM_UP_RATE = 8_000
WARM_UP_TRANSACTIONS = 60_000
"""Warm-up of Java's compiler and of most accounts and merchants, before latencies."""
SETTLE_SECONDS = 3.0
"""Time at each rate before its measurement."""
MEBIBYTE = 1 << 20

ONLY = ["throughput", "stock", "latency", "memory", "promptness", "transactional"]
"""Measurements; the last one runs only if it is named."""

console = Console(highlight=False)


@dataclass
class Results:
    """Rows of the table: measurement, value, target, and whether it is met."""

    rows: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def add(self, what: str, measured: str, target: str, met: bool) -> None:
        """Add a row and print it."""
        self.rows.append((what, measured, target, met))
        console.print(f"  {what}: [bold]{measured}[/] (target {target})")

    def table(self) -> Table:
        """Make the table of all rows."""
        table = Table(title="Recur on this machine")
        for heading in ("measurement", "measured", "target", ""):
            table.add_column(heading)
        for what, measured, target, met in self.rows:
            table.add_row(what, measured, target, "[green]met[/]" if met else "[red]missed[/]")
        return table


class Bench:
    """Bench with a broker, a Redis, and one worker at a time."""

    def __init__(self, services: Services, directory: Path) -> None:
        self._services = services
        self._directory = directory
        self.results = Results()
        self._number = itertools.count(1)

    def settings(self, *, transactional: bool = False) -> Settings:
        """Make settings with separate topics, group and keys for a measurement."""
        name = uuid.uuid4().hex[:6]
        return load_settings(
            kafka_bootstrap_servers=self._services.kafka_bootstrap_servers,
            redis_url=self._services.redis_url,
            topic_prefix=f"{name}-",
            redis_key_prefix=f"bench-{name}",
            kafka_group_id=f"bench-{name}",
            processing_guarantee="exactly_once" if transactional else "at_least_once",
            max_timestamp_age_seconds=ANY_AGE_SECONDS,
        )

    @asynccontextmanager
    async def worker(self, settings: Settings) -> AsyncIterator[WorkerProcess]:
        """Run a worker process with these settings."""
        names = (
            "kafka_bootstrap_servers",
            "redis_url",
            "topic_prefix",
            "redis_key_prefix",
            "kafka_group_id",
            "checkpoint",
            "processing_guarantee",
            "max_timestamp_age_seconds",
        )
        environment = {f"RECUR_{name.upper()}": str(getattr(settings, name)) for name in names}
        process = start_worker(next(self._number), self._directory, environment)
        try:
            yield process
        finally:
            await process.stop()

    # throughput and memory ----------------------------------------------------------------

    async def throughput(self, transactions: int) -> float:
        """Measure transactions/s while a worker drains a full log.

        It measures a checkpoint with account features only, and the shipped one. Live, a worker
        loads a merchant once in three hours. A log of weeks is the hardest case: a second is a
        simulated day, so almost every transaction loads its merchant again.
        """
        settings = self.settings()
        checkpoint = self._directory / "accounts.safetensors"
        accounts_only(load_checkpoint(settings)).save(checkpoint)
        rate = await self._drain(
            settings.model_copy(update={"checkpoint": checkpoint}), transactions
        )
        self.results.add(
            "throughput, account features only",
            f"{rate:,.0f} transactions/s",
            "45,000",
            rate >= 45_000,
        )
        for kind, live in (("live", True), ("a log of weeks", False)):
            shipped = await self._drain(self.settings(), transactions, live=live)
            self.results.add(
                f"throughput, shipped checkpoint, {kind}",
                f"{shipped:,.0f} transactions/s",
                "-",
                True,
            )
        state_bytes = Scorer(load_checkpoint(settings), 1).codec.size_bytes
        self.results.add(
            "size of a state", f"{state_bytes} bytes", "at most 450", state_bytes <= 450
        )
        return rate

    async def _drain(self, settings: Settings, transactions: int, *, live: bool = False) -> float:
        await ensure_topics(settings)
        await preload(settings, transactions, live=live)
        async with self.worker(settings) as worker:
            points = await drained(worker, transactions)
        return steady_rate(points, transactions)

    async def memory(self, transactions: int) -> None:
        """Measure the resident memory of a worker over a long run."""
        settings = self.settings()
        await ensure_topics(settings)
        async with self.worker(settings) as worker:
            await until_ready([worker], READY_SECONDS)
            feeding = asyncio.create_task(feed(settings, blocks(), transactions, rate=None))
            points = await drained(worker, transactions)
            await feeding
        early = max(rss for done, _, rss in points if done <= max(transactions / 5, points[0][0]))
        peak = max(rss for _, _, rss in points)
        grown = peak / early
        self.results.add(
            f"resident memory over {transactions:,} transactions",
            f"{early / MEBIBYTE:.0f} MiB after a fifth, at most {peak / MEBIBYTE:.0f} MiB",
            "flat, under 700",
            peak < 700 * MEBIBYTE and grown < 1.1,
        )

    # latency and start --------------------------------------------------------------------

    async def latency(self, seconds: float) -> None:
        """Measure the start-up time, and the latency at live rates."""
        settings = self.settings()
        await ensure_topics(settings)
        began = time.monotonic()
        async with self.worker(settings) as worker:
            await until_ready([worker], READY_SECONDS)
            ready = time.monotonic() - began
            self.results.add("time until a worker is ready", f"{ready:.1f} s", "10", ready <= 10)
            found = await self._latencies(settings, worker, seconds)
        for (rate, share), value in found.items():
            limit = LATENCY_LIMITS_MS.get((rate, share))
            self.results.add(
                f"latency p{share * 100:.0f} at {rate:,}/s",
                f"{value:.1f} ms",
                "-" if limit is None else f"{limit:.0f}",
                limit is None or value <= limit,
            )

    async def _latencies(
        self, settings: Settings, worker: WorkerProcess, seconds: float
    ) -> dict[tuple[int, float], float]:
        """Measure the latency of a warm worker in milliseconds, by rate and quantile."""
        stream = blocks(live=True)
        await feed(settings, stream, WARM_UP_TRANSACTIONS, WARM_UP_RATE)
        found = {}
        for rate in RATES:
            await feed(settings, stream, int(rate * SETTLE_SECONDS), rate)
            await worker.refresh()
            before = buckets(worker.samples, LATENCY)
            await feed(settings, stream, int(rate * seconds), rate)
            await asyncio.sleep(1)
            await worker.refresh()
            after = buckets(worker.samples, LATENCY)
            for share in (0.5, 0.99):
                value = quantile({le: after[le] - before[le] for le in after}, share)
                assert value is not None
                found[rate, share] = value * 1000
        return found

    # exactly once -------------------------------------------------------------------------

    async def transactional(self, transactions: int, seconds: float) -> None:
        """Measure the cost of exactly_once, in turn with at_least_once on the same services."""
        rates: dict[bool, list[float]] = {False: [], True: []}
        latencies: dict[bool, list[dict[tuple[int, float], float]]] = {False: [], True: []}
        for mode in (False, True, True, False):  # this order cancels a drift of the machine
            settings = self.settings(transactional=mode)
            rates[mode].append(await self._drain(settings, transactions, live=True))
            settings = self.settings(transactional=mode)
            await ensure_topics(settings)
            async with self.worker(settings) as worker:
                await until_ready([worker], READY_SECONDS)
                latencies[mode].append(await self._latencies(settings, worker, seconds))
        plain, transactional = fmean(rates[False]), fmean(rates[True])
        self.results.add(
            "throughput, at_least_once and exactly_once",
            f"{plain:,.0f}, {transactional:,.0f} transactions/s ({transactional / plain:.0%})",
            "-",
            True,
        )
        for rate, share in latencies[False][0]:
            plain, transactional = (
                fmean(found[rate, share] for found in latencies[mode]) for mode in (False, True)
            )
            self.results.add(
                f"latency p{share * 100:.0f} at {rate:,}/s, at_least_once and exactly_once",
                f"{plain:.1f}, {transactional:.1f} ms",
                "-",
                True,
            )

    # promptness ---------------------------------------------------------------------------

    async def promptness(self) -> None:
        """How soon something is told or ends."""
        async for row in promptness.rows(self._services.kafka_bootstrap_servers, self._directory):
            self.results.add(*row)

    # the reference ------------------------------------------------------------------------

    async def stock(self, mode: str, rate: float) -> None:
        """Measure the throughput of a stock Faust worker, and its ratio to Recur's."""
        count = STOCK_TRANSACTIONS[mode]
        settings = self.settings()
        await ensure_topics(settings)
        await preload(settings, count)
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "OPENBLAS_NUM_THREADS": "1",  # as a worker's
            "STOCK_MODE": mode,
            "STOCK_BROKER": settings.kafka_bootstrap_servers,
            "STOCK_REDIS": settings.redis_url,
            "STOCK_GROUP": settings.kafka_group_id,
            "STOCK_TRANSACTIONS": settings.topic("transactions"),
            "STOCK_SCORES": settings.topic("scores"),
        }
        log = self._directory / f"stock-{mode}.log"
        command = [sys.executable, "-m", "benchmarks.stock_faust", "worker", "-l", "warn"]
        process = SupervisedProcess(
            command, log_path=log, directory=self._directory, environment=environment
        )
        try:
            points = await published(settings, count, process, log)
        finally:
            process.kill()
        stock_rate = steady_rate(points, count)
        least = {"event": 25, "take": 8}[mode]
        self.results.add(f"stock Faust, {mode}", f"{stock_rate:,.0f} transactions/s", "-", True)
        if rate:
            self.results.add(
                f"ratio of Recur to stock Faust, {mode}",
                f"{rate / stock_rate:.1f} times",
                f"at least {least}",
                rate / stock_rate >= least,
            )


def accounts_only(checkpoint: Checkpoint) -> Checkpoint:
    """Make a network of the same size with account features only and random weights."""
    inputs = tuple(i for i in checkpoint.header.features.inputs if i.feature in ACCOUNT_FEATURES)
    features = FeatureSpec(inputs)
    architecture = replace(
        checkpoint.network.architecture, inputs=len(inputs), roles=features.roles
    )
    return Checkpoint.of(
        Network(architecture),
        Header(
            architecture=architecture,
            features=features,
            thresholds=CheckpointThresholds(review=1.0, decline=1.0),
        ),
    )


Point = tuple[float, float, float]
"""Number of transactions done, time in seconds, resident bytes."""


async def drained(worker: WorkerProcess, transactions: int) -> list[Point]:
    """Follow a worker's progress until it has applied all transactions."""
    points: list[Point] = []
    while not points or points[-1][0] < transactions:
        await asyncio.sleep(SAMPLE_SECONDS)
        if worker.death is not None:
            raise SystemExit(f"the worker {worker.death}:\n{worker.log_tail()}")
        await worker.refresh()
        done = worker.samples.get("recur_transactions_total", 0.0)
        if done > (points[-1][0] if points else 0.0):
            points.append((done, time.monotonic(), resident_bytes(worker)))
    return points


def resident_bytes(worker: WorkerProcess) -> float:
    """Read the resident bytes of a worker's process."""
    return worker.samples.get("process_resident_memory_bytes", 0.0)


async def published(
    settings: Settings, count: int, process: SupervisedProcess, log: Path
) -> list[Point]:
    """Follow a stock worker's progress by the records in its scores topic."""
    score_log = KafkaScoreLog(settings)
    await score_log.start()
    points: list[Point] = []
    try:
        while not points or points[-1][0] < count:
            await asyncio.sleep(SAMPLE_SECONDS)
            if process.poll() is not None:
                raise SystemExit(f"the stock worker ended early; see its log {log}")
            ends = await score_log.ends(
                settings.topic("scores"), list(range(settings.topic_partitions))
            )
            done = float(sum(ends.values()))
            if done > (points[-1][0] if points else 0.0):
                points.append((done, time.monotonic(), 0.0))
    finally:
        await score_log.stop()
    return points


def steady_rate(points: list[Point], transactions: int) -> float:
    """Compute transactions/s from the first tenth to the end, without the start-up."""
    begin = next(p for p in points if p[0] >= transactions / 10)
    end = points[-1]
    return (end[0] - begin[0]) / (end[1] - begin[1])


def blocks(*, live: bool = False) -> Iterator[Block]:
    """Simulate transactions without end and encode them.

    Args:
        live: whether they have the time of encoding, as in a payment system. Otherwise they
            have the simulator's time: at full speed, a second is a simulated day or more.
    """
    size = LIVE_BLOCK_TRANSACTIONS if live else BLOCK_TRANSACTIONS
    for day in Simulator(customers=ACCOUNTS, start_date="2018-04-01", seed=3).days():
        for at in range(0, len(day.amount), size):
            part = slice(at, at + size)
            times = day.timestamp_ms[part].tolist()
            if live:
                times = [time.time_ns() // 1_000_000] * len(times)
            yield encode_block(
                [f"T{i}" for i in day.transaction_id[part].tolist()],
                [account_id(i) for i in day.account[part].tolist()],
                [merchant_id(i) for i in day.merchant[part].tolist()],
                day.amount[part].tolist(),
                ["EUR"] * len(times),
                times,
            )


def first(stream: Iterator[Block], transactions: int) -> Iterator[Block]:
    """Take a number of transactions from the stream; drop the rest of the last block."""
    while transactions > 0:
        block = next(stream)
        yield Block(block.keys[:transactions], block.values[:transactions])
        transactions -= len(block.keys)


async def feed(
    settings: Settings, stream: Iterator[Block], transactions: int, rate: float | None
) -> None:
    """Publish the stream's next transactions."""
    async with Feed(settings) as producer:
        await producer.run(ahead(first(stream, transactions)), rate=rate)


async def preload(settings: Settings, transactions: int, *, live: bool = False) -> None:
    """Fill the log before a worker starts."""
    console.print(f"  publishing {transactions:,} transactions ...", style="dim")
    await feed(settings, blocks(live=live), transactions, rate=None)


async def run(
    bench: Bench, only: str | None, transactions: int, memory: int, seconds: float
) -> None:
    """Run all measurements, or one."""
    rate = 0.0
    if only in (None, "throughput", "stock"):
        rate = await bench.throughput(transactions)
    if only in (None, "stock"):
        for mode in STOCK_TRANSACTIONS:
            await bench.stock(mode, rate)
    if only in (None, "latency"):
        await bench.latency(seconds)
    if only in (None, "promptness"):
        await bench.promptness()
    if only == "transactional":
        await bench.transactional(transactions, seconds)
    if only in (None, "memory") and memory:
        await bench.memory(memory)


@click.command()
@click.option("--transactions", default=600_000, help="transactions of the throughput measurement")
@click.option(
    "--memory-transactions", default=5_000_000, help="transactions of the memory run; 0: skip it"
)
@click.option("--seconds", default=30.0, help="duration of each latency measurement")
@click.option("--only", type=click.Choice(ONLY), help="run only this measurement")
def main(transactions: int, memory_transactions: int, seconds: float, only: str | None) -> None:
    """Measure a worker on this machine."""
    console.print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}"
    )
    with tempfile.TemporaryDirectory(prefix="recur-bench-") as directory:
        with embedded() as services:
            bench = Bench(services, Path(directory))
            uvloop.run(run(bench, only, transactions, memory_transactions, seconds))
    console.print(bench.results.table())


if __name__ == "__main__":
    main()
