"""The cost of tracing: processor time of polls, in memory or with a broker.

    python -m benchmarks.tracing [--polls N]
    python -m benchmarks.tracing --broker [--transactions N]

Cases run in turn, so that a machine's changes of speed meet all of them. In memory a turn is a
poll. With a broker it is a few polls of one worker process (:mod:`benchmarks.traced_drain`).
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import uvloop
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from benchmarks.bench import Bench
from benchmarks.results import console
from benchmarks.traced_drain import traced_drain
from pipeline.checkpoint import load_checkpoint
from pipeline.local.embedded import embedded
from pipeline.settings import load_settings
from pipeline.tracing.polls import PollTracer
from pipeline.tracing.provider import Tracing
from tests.fakes.memory_workers import MemoryWorker, World, finish

POLL_RECORDS = 2_048
ACCOUNTS = 20_000
SAMPLED = 0.01
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"

OFF, CARRIED, ON = "off, no headers", "off, each record with a context", "on, 1 % sampled"
SAME = "off, no headers, again"


class _Nowhere(SpanExporter):
    """An exporter to nowhere: a collector's cost is not the worker's."""

    def export(self, spans: object) -> SpanExportResult:
        return SpanExportResult.SUCCESS


@dataclass
class Case:
    """A worker, and how its records look."""

    name: str
    world: World
    worker: MemoryWorker
    seconds: list[float]


def make_case(name: str) -> Case:
    """Make a worker of the shipped checkpoint."""
    tracing = name == ON
    world = World(
        load_checkpoint(load_settings()),
        topic_partitions=1,
        micro_batch_max=POLL_RECORDS,
        tracing=tracing,
        trace_sample_ratio=SAMPLED,
    )
    if tracing:
        tracer = Tracing(world.settings, "recur-worker", _Nowhere()).tracer
        world.tracer = PollTracer(tracer, world.settings)
    return Case(name, world, world.worker(), [])


def process_poll(case: Case, number: int) -> None:
    """Produce a poll's records, and measure the processor time of the poll."""
    rng = np.random.default_rng(number)
    for i in range(POLL_RECORDS):
        sampled = int(rng.random() < SAMPLED)
        parent = f"00-{TRACE}-{number * POLL_RECORDS + i + 1:016x}-{sampled:02x}".encode()
        headers = [("traceparent", parent)] if case.name in (CARRIED, ON) else []
        account = f"A{rng.integers(ACCOUNTS)}"
        case.world.produce(account, amount=float(rng.gamma(2.0, 20.0)), headers=headers)
    poll = case.worker.consumer.poll(POLL_RECORDS)
    assert poll is not None
    processor = case.worker.processor
    began = time.process_time()
    computed = finish(processor.compute(poll))
    finish(processor.conclude(computed))
    case.seconds.append(time.process_time() - began)


@click.command()
@click.option("--polls", default=40, help="polls of each case, in memory")
@click.option("--broker", is_flag=True, help="measure worker processes with broker and Redis")
@click.option("--transactions", default=600_000, help="length of the log, with a broker")
def main(polls: int, broker: bool, transactions: int) -> None:
    """Measure what tracing costs."""
    if broker:
        with (
            tempfile.TemporaryDirectory(prefix="recur-bench-") as directory,
            embedded() as services,
        ):
            bench = Bench(services, Path(directory))
            uvloop.run(traced_drain(bench, transactions, SAMPLED))
            console.print(bench.results.table())
        return
    measure_in_memory(polls)


def measure_in_memory(polls: int) -> None:
    """Measure polls of workers on a broker and stores in memory."""
    from pipeline.scoring import computer

    computer.THREAD_MIN = POLL_RECORDS + 1  # coroutines are stepped without a loop or threads
    cases = [make_case(name) for name in (OFF, SAME, CARRIED, ON)]
    for number in range(polls):
        for case in cases[number % len(cases) :] + cases[: number % len(cases)]:
            process_poll(case, number)
    warm = polls // 5
    times = {case.name: np.array(case.seconds[warm:]) for case in cases}
    for name, seconds in times.items():
        ratio = np.median(seconds / times[OFF])
        click.echo(
            f"{name:34} {np.median(seconds) * 1000:7.1f} ms for {POLL_RECORDS:,} records;"
            f" {ratio - 1:+.1%} (median of pairs), least {seconds.min() * 1000:.1f} ms"
        )
    on = np.median(times[ON] / times[CARRIED]) - 1
    click.echo(f"tracing itself, beside records that carry the same contexts: {on:+.1%}")


if __name__ == "__main__":
    main()
