"""``make bench``: measure a worker and its peers on this machine, and print a table.

One contender at a time shares the cores with broker and Redis. docs/performance.md tells how.

    python -m benchmarks [--quick] [--rounds N] [--transactions N] [--seconds S] [--only NAME]
                         [--generated]
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import uvloop

from benchmarks import promptness
from benchmarks.bench import Bench
from benchmarks.latency import latency
from benchmarks.machine_speed import measure_machine
from benchmarks.memory import memory
from benchmarks.results import console
from benchmarks.tail import log_broker_pauses, tail
from benchmarks.throughput import throughput
from benchmarks.transactional import transactional
from pipeline.garbage_collector import tune_garbage_collector
from pipeline.local.embedded import embedded

ONLY = ["throughput", "latency", "poll-cost", "memory", "promptness", "tail", "transactional"]
"""Measurements; ``poll-cost`` is ``latency`` without peers. The last two run only if named."""

QUICK: dict[str, Any] = {
    "rounds": 1,
    "transactions": 60_000,
    "memory_transactions": 0,
    "seconds": 4.0,
}


@dataclass(frozen=True)
class Plan:
    """The measurements and their sizes."""

    only: str | None
    rounds: int
    transactions: int
    memory_transactions: int
    seconds: float
    tail_seconds: float

    def includes(self, *names: str) -> bool:
        """Whether one of these measurements runs."""
        return self.only in (None, *names)


async def run(bench: Bench, plan: Plan) -> None:
    """Run all measurements of the plan."""
    peers = bench.installed_peers() if plan.includes("throughput", "latency") else []
    if plan.includes("throughput"):
        await throughput(bench, peers, plan.transactions, plan.rounds)
    if plan.includes("latency", "poll-cost"):
        await latency(bench, peers, plan.seconds, plan.rounds)
    if plan.includes("promptness"):
        async for row in promptness.rows(bench.services.kafka_bootstrap_servers, bench.directory):
            bench.results.add(*row)
    if plan.includes("memory") and plan.memory_transactions:
        await memory(bench, plan.memory_transactions)
    if plan.only == "tail":
        await tail(bench, plan.tail_seconds)
    if plan.only == "transactional":
        await transactional(bench, plan.transactions, plan.seconds)


@click.command()
@click.option("--rounds", default=3, help="rounds in turn; the table has their medians")
@click.option("--transactions", default=150_000, help="transactions of a throughput measurement")
@click.option("--memory-transactions", default=1_000_000, help="of the memory run; 0: skip it")
@click.option("--seconds", default=8.0, help="duration at each rate of the latency measurement")
@click.option("--tail-seconds", default=600.0, help="duration of the tail measurement")
@click.option("--quick", is_flag=True, help="one short round, to see that everything runs")
@click.option("--generated", is_flag=True, help="payments by the shipped generator")
@click.option("--only", type=click.Choice(ONLY), help="run only this measurement")
def main(
    rounds: int,
    transactions: int,
    memory_transactions: int,
    seconds: float,
    tail_seconds: float,
    quick: bool,
    generated: bool,
    only: str | None,
) -> None:
    """Measure a worker and its peers on this machine."""
    plan = Plan(only, rounds, transactions, memory_transactions, seconds, tail_seconds)
    if quick:
        plan = replace(plan, **QUICK)
    began = time.monotonic()
    console.print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}"
    )
    before = measure_machine()
    console.print(f"  this machine before: {before}")
    with tempfile.TemporaryDirectory(prefix="recur-bench-") as directory:
        if plan.only == "tail":
            log_broker_pauses(Path(directory))
        with embedded() as services:
            bench = Bench(services, Path(directory), generated=generated)
            tune_garbage_collector()  # its pauses would stop the feed
            uvloop.run(run(bench, plan))
    bench.results.add("this machine before and after", f"{before}; {measure_machine()}")
    bench.results.add("duration", f"{(time.monotonic() - began) / 60:.0f} minutes")
    console.print(bench.results.table())


if __name__ == "__main__":
    main()
