"""The cost of tracing to a worker process with a broker, Redis and a collector.

The log is filled with records that each have a trace context. Then one worker drains it, and
traces every other block of polls (:mod:`benchmarks.traced_worker`).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from aiokafka import AIOKafkaProducer
from numpy.typing import NDArray

from benchmarks.bench import Bench, Contender, environment_of, make_topics, published
from benchmarks.peers.environment import ROOT
from benchmarks.score_times import ends
from benchmarks.throughput import sample_thresholds
from benchmarks.traced_worker import FILE_VARIABLE, ORDER, POLLS_VARIABLE, BlockTime
from benchmarks.traffic import blocks, first
from pipeline.local.supervisor import SupervisedProcess
from pipeline.settings import Settings

TARGET = 0.02
"""Most of the processor time that tracing may take."""

BLOCK_POLLS = 4
WARM_SHARE = 0.1
"""Share of the blocks that warm up: most accounts are new in them."""

RESAMPLES = 2_000
LINGER_MS = 5
BATCH_BYTES = 1 << 19
CHUNK = 5_000


class _Sink(BaseHTTPRequestHandler):
    """A collector that forgets spans: its cost is not the worker's."""

    protocol_version = "HTTP/1.1"
    requests = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        _Sink.requests += 1
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing."""


@contextmanager
def sink() -> Iterator[str]:
    """Run a collector; yield its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Sink) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


async def traced_drain(bench: Bench, transactions: int, ratio: float) -> None:
    """Drain a log with tracing off and on in turn; add what it costs to the results.

    Args:
        transactions: length of the log.
        ratio: share of sampled records, and of sampled polls.
    """
    # As long a log as the measured one: the share of alerts rises with the accounts' histories.
    thresholds = await sample_thresholds(
        bench, "live stamps", transactions, live=True, history=False
    )
    settings = bench.settings(**thresholds, tracing=True, trace_sample_ratio=ratio)
    await make_topics(settings)
    await _fill(settings, transactions, ratio)
    file, log_path = bench.directory / "blocks.jsonl", bench.directory / "traced.log"
    with sink() as address:
        process = SupervisedProcess(
            [sys.executable, "-m", "benchmarks.traced_worker"],
            log_path=log_path,
            directory=bench.directory,
            environment=_environment(settings, file, address),
        )
        try:
            await published(settings, transactions, Contender("Recur", process, log_path))
        finally:
            await asyncio.to_thread(process.stop, 20.0)
    if not _Sink.requests:
        raise SystemExit("no span reached the collector: nothing was measured")
    alerts = sum((await ends(settings, settings.topic("alerts"))).values())
    bench.results.add("share of transactions with an alert", f"{alerts / transactions:.2%}")
    lines = file.read_text().splitlines()
    report(bench, [BlockTime(*json.loads(line)) for line in lines], ratio)


def _environment(settings: Settings, file: Path, address: str) -> dict[str, str]:
    return {
        **os.environ,
        **environment_of(settings),
        "RECUR_TRACING": "true",
        "RECUR_TRACE_SAMPLE_RATIO": str(settings.trace_sample_ratio),
        "RECUR_HTTP_PORT": "0",
        "OTEL_EXPORTER_OTLP_ENDPOINT": address,
        "PYTHONPATH": str(ROOT),
        "OPENBLAS_NUM_THREADS": "1",
        FILE_VARIABLE: str(file),
        POLLS_VARIABLE: str(BLOCK_POLLS),
    }


async def _fill(settings: Settings, transactions: int, ratio: float) -> None:
    """Produce records that each have a trace context, sampled by the ratio."""
    topic, chance = settings.topic("transactions"), np.random.default_rng(1)
    options = settings.kafka_client_options()
    pending: list[Any] = []
    async with AIOKafkaProducer(
        **options, linger_ms=LINGER_MS, max_batch_size=BATCH_BYTES
    ) as producer:
        for block in first(blocks(live=True), transactions):
            ids = chance.bytes(24 * len(block.keys)).hex()
            flags = (chance.random(len(block.keys)) < ratio).astype(int).tolist()
            for i, (key, value) in enumerate(zip(block.keys, block.values, strict=True)):
                name = ids[48 * i : 48 * (i + 1)]
                parent = f"00-{name[:32]}-{name[32:]}-{flags[i]:02x}"
                headers = [("traceparent", parent.encode())]
                pending.append(await producer.send(topic, value, key, headers=headers))
            if len(pending) >= CHUNK:
                await asyncio.gather(*pending)
                pending.clear()
        await asyncio.gather(*pending)


def report(bench: Bench, times: Sequence[BlockTime], ratio: float) -> None:
    """Add the cost to the results, from neighbouring blocks."""
    warm = times[int(WARM_SHARE * len(times)) // len(ORDER) * len(ORDER) :]
    rounds = len(warm) // len(ORDER)
    if not rounds:
        raise SystemExit("too few transactions: no round was measured")
    warm = warm[: rounds * len(ORDER)]
    each_us = np.array([block.cpu_ns / block.records / 1000 for block in warm])
    off, on, on_again, off_again = each_us.reshape(rounds, len(ORDER)).T
    traced = sum(block.records for block in warm if block.traced)
    export_us = sum(block.export_ns for block in warm) / 1000 / traced
    calls_us = sum(block.calls_ns for block in warm) / 1000 / traced
    off_us = float(np.median([off, off_again]))
    ratios = (on + on_again) / (off + off_again) - 1
    cost = (calls_us + export_us) / off_us
    low, high = _interval(ratios)
    row = bench.results.add
    size = sum(block.records for block in warm) / len(warm) / BLOCK_POLLS
    row("records of a poll", f"{size:,.0f}, {rounds} rounds of 4 blocks of {BLOCK_POLLS} polls")
    row("CPU of a transaction without tracing", f"{off_us:.1f} µs")
    row("CPU of the tracer's calls, of sending spans", f"{calls_us:.2f}, {export_us:.2f} µs")
    row(
        "blocks' CPU, on against off", f"{np.median(ratios):+.1%} (90 %: {low:+.1%} to {high:+.1%})"
    )
    row("the same, second half of a round against its first", f"{_noise(each_us, rounds):+.1%}")
    row(f"tracing with {ratio:.0%} sampled costs", f"{cost:+.1%}", f"{TARGET:.0%}", cost <= TARGET)


def _noise(each_us: NDArray[np.float64], rounds: int) -> float:
    """Compare halves of rounds that both trace half of their blocks: the measurement's error."""
    halves = each_us.reshape(rounds, 2, len(ORDER) // 2).sum(axis=2)
    return float(np.median(halves[:, 1] / halves[:, 0])) - 1


def _interval(ratios: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 5 % and 95 % quantiles of the median of resampled rounds."""
    drawn = np.random.default_rng(1).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.05, 0.95]).tolist()
    return low, high
