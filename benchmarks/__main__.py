"""``make bench``: measure a worker and its peers on this machine, and print a table.

One contender at a time shares the cores with broker and Redis. docs/performance.md tells the method.

    python -m benchmarks [--quick] [--rounds N] [--transactions N] [--seconds S] [--only NAME]
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from pathlib import Path

import click
import uvloop

from benchmarks import promptness
from benchmarks.bench import Bench
from benchmarks.latency import latency
from benchmarks.machine_speed import measure_machine
from benchmarks.memory import memory
from benchmarks.results import console
from benchmarks.tail import tail
from benchmarks.throughput import throughput
from benchmarks.transactional import transactional
from pipeline.local.embedded import embedded

ONLY = ["throughput", "latency", "poll-cost", "memory", "promptness", "tail", "transactional"]
"""Measurements; ``poll-cost`` is ``latency`` without peers. The last two run only if named."""

QUICK_TRANSACTIONS = 60_000
QUICK_SECONDS = 4.0


async def run(
    bench: Bench, only: str | None, transactions: int, memory_run: int, seconds: float, rounds: int
) -> None:
    """Run all measurements, or one."""
    peers = bench.installed_peers() if only in (None, "throughput", "latency") else []
    if only in (None, "throughput"):
        await throughput(bench, peers, transactions, rounds)
    if only in (None, "latency", "poll-cost"):
        await latency(bench, peers, seconds, rounds)
    if only in (None, "promptness"):
        async for row in promptness.rows(bench.services.kafka_bootstrap_servers, bench.directory):
            bench.results.add(*row)
    if only in (None, "memory") and memory_run:
        await memory(bench, memory_run)
    if only == "tail":
        await tail(bench)
    if only == "transactional":
        await transactional(bench, transactions, seconds)


@click.command()
@click.option("--rounds", default=3, help="rounds in turn; the table has their medians")
@click.option("--transactions", default=240_000, help="transactions of a throughput measurement")
@click.option("--memory-transactions", default=1_000_000, help="of the memory run; 0: skip it")
@click.option("--seconds", default=10.0, help="duration at each rate of the latency measurement")
@click.option("--quick", is_flag=True, help="one short round, to see that everything runs")
@click.option("--only", type=click.Choice(ONLY), help="run only this measurement")
def main(
    rounds: int,
    transactions: int,
    memory_transactions: int,
    seconds: float,
    quick: bool,
    only: str | None,
) -> None:
    """Measure a worker and its peers on this machine."""
    if quick:
        rounds, transactions, memory_transactions = 1, QUICK_TRANSACTIONS, 0
        seconds = QUICK_SECONDS
    began = time.monotonic()
    console.print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}"
    )
    before = measure_machine()
    console.print(f"  this machine before: {before}")
    with tempfile.TemporaryDirectory(prefix="recur-bench-") as directory:
        with embedded() as services:
            bench = Bench(services, Path(directory))
            uvloop.run(run(bench, only, transactions, memory_transactions, seconds, rounds))
    bench.results.add("this machine before and after", f"{before}; {measure_machine()}")
    bench.results.add("duration", f"{(time.monotonic() - began) / 60:.0f} minutes")
    console.print(bench.results.table())


if __name__ == "__main__":
    main()
