"""``make bench``: measures a worker on this machine and prints a table.

One worker, with broker and Redis on the same cores, one score out for each transaction, all
features in each score; 20,000 accounts, GRU of hidden size 128. The stock Faust workers
run in the same way, on the same broker, one after the other.

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
from model.checkpoint import Checkpoint, Header, Thresholds
from model.features.account import ACCOUNT_FEATURES, FeatureSpec
from model.network import Network
from model.simulator.handbook import Simulator, account_id, merchant_id
from pipeline.checkpoint import load_checkpoint
from pipeline.kafka.score_log import KafkaScoreLog
from pipeline.kafka.topics import ensure_topics
from pipeline.local.services import Services, embedded
from pipeline.local.supervisor import SupervisedProcess
from pipeline.local.workers import (
    LATENCY,
    WorkerProcess,
    buckets,
    quantile,
    start_worker,
    until_ready,
)
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
"""By rate and share."""
LIVE_BLOCK_TRANSACTIONS = 500
"""A second of them at the lower rate, so that times are not old when they are sent."""
WARM_UP_RATE = 8_000
WARM_UP_TRANSACTIONS = 60_000
"""Before the latencies: Java compiles, and most accounts and merchants have been seen."""
SETTLE_SECONDS = 3.0
"""Of each rate, before it is measured."""
MEBIBYTE = 1 << 20

ONLY = ["throughput", "stock", "latency", "memory", "promptness", "transactional"]
"""The last one is only measured when it is named."""

console = Console(highlight=False)


@dataclass
class Results:
    """Rows of the table: what, measured, wanted, whether it is met."""

    rows: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def add(self, what: str, measured: str, wanted: str, met: bool) -> None:
        """Keep a row and show it at once."""
        self.rows.append((what, measured, wanted, met))
        console.print(f"  {what}: [bold]{measured}[/] (wanted {wanted})")

    def table(self) -> Table:
        """All rows."""
        table = Table(title="Recur on this machine")
        for heading in ("what", "measured", "wanted", ""):
            table.add_column(heading)
        for what, measured, wanted, met in self.rows:
            table.add_row(what, measured, wanted, "[green]met[/]" if met else "[red]missed[/]")
        return table


class Bench:
    """A broker, a Redis, and workers one after the other."""

    def __init__(self, services: Services, directory: Path) -> None:
        self._services = services
        self._directory = directory
        self.results = Results()
        self._number = itertools.count(1)

    def settings(self, *, transactional: bool = False) -> Settings:
        """Topics, group and keys of its own for each measurement."""
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
        """A worker process of these settings."""
        names = (
            "kafka_bootstrap_servers",
            "redis_url",
            "topic_prefix",
            "redis_key_prefix",
            "kafka_group_id",
            "checkpoint",
            "transactional",
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
        """Transactions a second while a worker drains a full log, by account alone and shipped.

        Live, a merchant is asked for once in three hours. A log of weeks is the hardest one for
        merchants: a second of it is a day, so almost every transaction asks anew.
        """
        settings = self.settings()
        checkpoint = self._directory / "accounts.safetensors"
        accounts_only(load_checkpoint(settings)).save(checkpoint)
        rate = await self._drain(
            settings.model_copy(update={"checkpoint": checkpoint}), transactions
        )
        self.results.add(
            "throughput, features of accounts",
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
        self.results.add("a state", f"{state_bytes} bytes", "at most 450", state_bytes <= 450)
        return rate

    async def _drain(self, settings: Settings, transactions: int, *, live: bool = False) -> float:
        await ensure_topics(settings)
        await preload(settings, transactions, live=live)
        async with self.worker(settings) as worker:
            points = await drained(worker, transactions)
        return steady_rate(points, transactions)

    async def memory(self, transactions: int) -> None:
        """Resident memory of a worker over a long run."""
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
            f"{early / MEBIBYTE:.0f} MiB after a fifth, {peak / MEBIBYTE:.0f} MiB at most",
            "flat, under 700",
            peak < 700 * MEBIBYTE and grown < 1.1,
        )

    # latency and start --------------------------------------------------------------------

    async def latency(self, seconds: float) -> None:
        """Start-up, and latency at live rates."""
        settings = self.settings()
        await ensure_topics(settings)
        began = time.monotonic()
        async with self.worker(settings) as worker:
            await until_ready([worker], READY_SECONDS)
            ready = time.monotonic() - began
            self.results.add("a worker ready after", f"{ready:.1f} s", "10", ready <= 10)
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
        """Latency in milliseconds by rate and share, of a worker that has warmed up."""
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

    # transactions of Kafka ----------------------------------------------------------------

    async def transactional(self, transactions: int, seconds: float) -> None:
        """What RECUR_PROCESSING_GUARANTEE costs: with and without in turn, on the same services."""
        rates: dict[bool, list[float]] = {False: [], True: []}
        latencies: dict[bool, list[dict[tuple[int, float], float]]] = {False: [], True: []}
        for mode in (False, True, True, False):  # so that a drift of the machine cancels out
            settings = self.settings(transactional=mode)
            rates[mode].append(await self._drain(settings, transactions, live=True))
            settings = self.settings(transactional=mode)
            await ensure_topics(settings)
            async with self.worker(settings) as worker:
                await until_ready([worker], READY_SECONDS)
                latencies[mode].append(await self._latencies(settings, worker, seconds))
        without, with_them = fmean(rates[False]), fmean(rates[True])
        self.results.add(
            "throughput without and with transactions of Kafka",
            f"{without:,.0f}, {with_them:,.0f} transactions/s ({with_them / without:.0%})",
            "-",
            True,
        )
        for rate, share in latencies[False][0]:
            without, with_them = (
                fmean(found[rate, share] for found in latencies[mode]) for mode in (False, True)
            )
            self.results.add(
                f"latency p{share * 100:.0f} at {rate:,}/s without and with them",
                f"{without:.1f}, {with_them:.1f} ms",
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
        """Throughput of a stock Faust worker, and how many times it our worker is."""
        count = STOCK_TRANSACTIONS[mode]
        settings = self.settings()
        await ensure_topics(settings)
        await preload(settings, count)
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1]),
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
                f"Recur to stock Faust, {mode}",
                f"{rate / stock_rate:.1f} times",
                f"at least {least}",
                rate / stock_rate >= least,
            )


def accounts_only(checkpoint: Checkpoint) -> Checkpoint:
    """A network of the same sizes that looks at accounts alone; its weights are by chance."""
    inputs = tuple(i for i in checkpoint.header.features.inputs if i.feature in ACCOUNT_FEATURES)
    architecture = replace(checkpoint.network.architecture, inputs=len(inputs))
    return Checkpoint(
        Network(architecture),
        Header(
            architecture=architecture,
            features=FeatureSpec(inputs),
            thresholds=Thresholds(review=1.0, decline=1.0),
        ),
    )


Point = tuple[float, float, float]
"""Transactions done, seconds, resident bytes."""


async def drained(worker: WorkerProcess, transactions: int) -> list[Point]:
    """Progress of a worker until all is applied."""
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
    """Of a worker's process."""
    return worker.samples.get("process_resident_memory_bytes", 0.0)


async def published(
    settings: Settings, count: int, process: SupervisedProcess, log: Path
) -> list[Point]:
    """Progress of a stock worker, by the records in its scores topic."""
    score_log = KafkaScoreLog(settings)
    await score_log.start()
    points: list[Point] = []
    try:
        while not points or points[-1][0] < count:
            await asyncio.sleep(SAMPLE_SECONDS)
            if process.poll() is not None:
                raise SystemExit(f"the stock worker ended; its log is {log}")
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
    """Transactions a second between a tenth and the end: without the start."""
    begin = next(p for p in points if p[0] >= transactions / 10)
    end = points[-1]
    return (end[0] - begin[0]) / (end[1] - begin[1])


def blocks(*, live: bool = False) -> Iterator[Block]:
    """Simulated transactions, encoded, without end.

    Args:
        live: stamped with the time at which they are encoded, as a payment system does.
            Otherwise with the simulator's: flat out, a second of them is a day or more.
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
    """The stream's next transactions, so many; the rest of the last block is dropped."""
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
    """All measurements, or one."""
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
@click.option("--transactions", default=600_000, help="of the throughput measurement")
@click.option("--memory-transactions", default=5_000_000, help="of the memory run; 0 skips it")
@click.option("--seconds", default=30.0, help="of each latency measurement")
@click.option("--only", type=click.Choice(ONLY))
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
