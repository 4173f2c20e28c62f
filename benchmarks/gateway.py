"""The gateway's latency beside the stream's, in the same run, at loads up to where it breaks.

    python -m benchmarks.gateway [--seconds S] [--rates 50,200,500] [--oha PATH]

One worker and one gateway share this machine with broker, Redis and the load tool, `oha`. It sends
each request at its time whether others are answered or not, and counts a latency from that time.
It takes bodies by chance, so some transactions are sent again: the table has their share.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psutil
import uvloop
from rich.table import Table

from benchmarks.bench import Bench, environment_of, make_topics, published, start_up
from benchmarks.latency import warmed_up
from benchmarks.machine_speed import measure_machine
from benchmarks.results import console
from benchmarks.score_times import ends, read_score_times
from benchmarks.traffic import ACCOUNTS
from pipeline.gateway.api_keys import api_key_store, new_key
from pipeline.local.embedded import embedded
from pipeline.local.ports import HOST, free_port
from pipeline.local.supervisor import SupervisedProcess
from pipeline.settings import Settings

RATES = "50,200,500,1000,2000,4000"
SECONDS = 8.0
WARM_UP_REQUESTS_RATE, WARM_UP_REQUESTS_SECONDS = 200, 3.0
CONNECTIONS = 256
"""Connections of the load tool: the most requests at a time."""

BODIES_PER_REQUEST = 20
"""Bodies to choose from for each request: about one in forty requests is a repeat."""

RUN_SECONDS_MAX = 60.0
"""Longest run at one rate; the load tool then ends."""

TABLE_WIDTH = 140
READY_SECONDS = 60.0
STOP_SECONDS = 20.0
KEPT_UP_SHARE = 0.95
"""A gateway keeps up if it answers this share of the rate, all with status 200."""

JUDGED_RATE = 200
ABOVE_MS = {"p50": 4.0, "p99": 20.0}
"""Most milliseconds of an answer above the record-to-score latency at the judged rate."""

QUANTILES = {"p50": 0.5, "p99": 0.99}


@dataclass(frozen=True)
class LoadRun:
    """A run at one rate; latencies in milliseconds.

    Attributes:
        http: latency at the client, by quantile.
        score: from record to score, by quantile.
        answered: answers/s.
        statuses: answers by status, and errors by text.
        repeated: share of the requests whose transaction was sent before.
        cpu: CPU time a request, µs, of gateway and worker.
    """

    rate: int
    http: dict[str, float]
    score: dict[str, float]
    answered: float
    statuses: dict[str, int]
    repeated: float
    cpu: tuple[float, float]

    @property
    def kept_up(self) -> bool:
        """Whether all was answered, as fast as it came."""
        return set(self.statuses) == {"200"} and self.answered >= KEPT_UP_SHARE * self.rate


async def make_token(settings: Settings) -> str:
    """Add a key that may score, without a rate limit, and return its token."""
    key, token = new_key("benchmark", ["score"], rate="none")
    async with api_key_store(settings) as store:
        await store.add(key)
    return token


@asynccontextmanager
async def running_gateway(bench: Bench, settings: Settings) -> AsyncIterator[tuple[int, int]]:
    """Run a gateway; yield its port and its process's id.

    Raises:
        SystemExit: it does not become ready.
    """
    port, log_path = free_port(), bench.directory / "gateway.log"
    process = SupervisedProcess(
        [sys.executable, "-m", "pipeline.cli.main", "gateway"],
        log_path=log_path,
        directory=bench.directory,
        environment={
            **os.environ,
            **environment_of(settings),
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "RECUR_GATEWAY_HOST": HOST,
            "RECUR_GATEWAY_PORT": str(port),
            "RECUR_GATEWAY_DEFAULT_RATE": "none",
            "RECUR_LOG_FORMAT": "json",
        },
    )
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not await _is_ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log_path.read_text(errors="replace")[-2000:]
                raise SystemExit(f"the gateway is not ready:\n{tail}")
            await asyncio.sleep(0.1)
        yield port, process.pid
    finally:
        await asyncio.to_thread(process.stop, STOP_SECONDS)


async def _is_ready(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    try:
        writer.write(b"GET /ready HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\n\r\n")
        return b" 200 " in await reader.readline()
    finally:
        writer.close()


def write_bodies(path: Path, count: int, name: str, rng: random.Random) -> None:
    """Write bodies of transactions, a line each, with ids that begin with a name."""
    now_ms = time.time_ns() // 1_000_000
    with path.open("w") as file:
        for i in range(count):
            file.write(
                f'{{"transaction_id":"{name}-{i}","account_id":"C{rng.randrange(ACCOUNTS):06d}",'
                f'"merchant_id":"T{rng.randrange(10_000):06d}",'
                f'"amount":{rng.gammavariate(2.0, 25.0) + 0.01:.2f},"currency":"EUR",'
                f'"timestamp":{now_ms}}}\n'
            )


async def load(oha: str, port: int, token: str, rate: int, seconds: float, bodies: Path) -> Any:
    """Send requests at a rate; return what the load tool reports.

    Raises:
        SystemExit: the load tool fails.
    """
    count = round(rate * seconds)
    await asyncio.to_thread(
        write_bodies,
        bodies,
        count * BODIES_PER_REQUEST,
        f"B{time.time_ns():x}",
        random.Random(rate),
    )
    process = await asyncio.create_subprocess_exec(
        *(oha, "--no-tui", "--output-format", "json", "--latency-correction"),
        *("-n", str(count), "-q", str(rate), "-c", str(min(CONNECTIONS, rate)), "-t", "30s"),
        *("-m", "POST", "-T", "application/json", "-H", f"Authorization: Bearer {token}"),
        *("-Z", str(bodies), f"http://{HOST}:{port}/v1/scores"),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(RUN_SECONDS_MAX):
            printed, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise SystemExit(f"{rate}/s took longer than {RUN_SECONDS_MAX:.0f} s") from None
    if process.returncode:
        raise SystemExit(f"the load tool ended with status {process.returncode}")
    return json.loads(printed)


async def measure(bench: Bench, oha: str, rates: list[int], seconds: float) -> list[LoadRun]:
    """Run a worker and a gateway at each rate, until they do not keep up."""
    settings = bench.settings()
    await make_topics(settings)
    token = await make_token(settings)
    bodies = bench.directory / "bodies.jsonl"
    runs: list[LoadRun] = []
    async with bench.recur(settings) as worker:
        await start_up(worker)
        await warmed_up(bench, settings, worker)
        async with running_gateway(bench, settings) as (port, pid):
            gateway = psutil.Process(pid)
            warm = WARM_UP_REQUESTS_RATE, WARM_UP_REQUESTS_SECONDS
            await load(oha, port, token, *warm, bodies)
            for rate in rates:
                payments = await ends(settings, settings.topic("transactions"))
                scores = await ends(settings, settings.topic("scores"))
                cpu = _cpu_seconds(gateway), worker.cpu_seconds()
                found = await load(oha, port, token, rate, seconds, bodies)
                cpu = _cpu_seconds(gateway) - cpu[0], worker.cpu_seconds() - cpu[1]
                after = await ends(settings, settings.topic("transactions"))
                await published(settings, sum(after.values()), worker)
                times = await read_score_times(settings, payments, scores)
                runs.append(_run_of(rate, seconds, found, times.latency_ms, cpu))
                console.print(f"    {rate}/s: {runs[-1]}", style="dim")
                if not runs[-1].kept_up:
                    break
    return runs


def _run_of(
    rate: int, seconds: float, found: Any, score_ms: Any, cpu: tuple[float, float]
) -> LoadRun:
    requests = round(rate * seconds)
    statuses = {**found["statusCodeDistribution"], **found["errorDistribution"]}
    percentiles = found["latencyPercentiles"]
    return LoadRun(
        rate,
        {name: (percentiles[name] or float("nan")) * 1000 for name in QUANTILES},
        {name: _quantile(score_ms, share) for name, share in QUANTILES.items()},
        found["summary"]["requestsPerSec"],
        statuses,
        1 - len(score_ms) / requests,
        (cpu[0] / requests * 1e6, cpu[1] / requests * 1e6),
    )


def _quantile(latencies_ms: Any, share: float) -> float:
    ordered = sorted(latencies_ms.tolist())
    return float(ordered[min(int(len(ordered) * share), len(ordered) - 1)]) if ordered else 0.0


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def table(runs: list[LoadRun]) -> Table:
    """Make the table of the runs."""
    drawn = Table(title="Gateway beside the stream, ms")
    headings = ("requests/s", "answered/s", "HTTP p50", "p99", "record to score p50", "p99")
    for heading in (*headings, "statuses", "repeated", "CPU gateway, worker, µs", ""):
        drawn.add_column(heading)
    for run in runs:
        drawn.add_row(
            f"{run.rate:,}",
            f"{run.answered:,.0f}",
            *(f"{run.http[name]:.1f}" for name in QUANTILES),
            *(f"{run.score[name]:.1f}" for name in QUANTILES),
            ", ".join(f"{name}: {count:,}" for name, count in sorted(run.statuses.items())),
            f"{run.repeated:.1%}",
            "{:.0f}, {:.0f}".format(*run.cpu),
            "kept up" if run.kept_up else "broke",
        )
    return drawn


@click.command()
@click.option("--seconds", default=SECONDS, show_default=True, help="duration at each rate")
@click.option("--rates", default=RATES, show_default=True, help="requests/s, in rising order")
@click.option("--oha", default=None, help="path of the load tool; by default it is on PATH")
def main(seconds: float, rates: str, oha: str | None) -> None:
    """Measure a gateway's answers beside the stream's scores."""
    tool = oha or shutil.which("oha")
    if tool is None:
        raise click.UsageError("the load tool `oha` is not on PATH: install it, or use --oha PATH")
    began = time.monotonic()
    console.print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}"
    )
    before = measure_machine()
    with tempfile.TemporaryDirectory(prefix="recur-bench-") as directory, embedded() as services:
        bench = Bench(services, Path(directory))
        wanted = [int(rate) for rate in rates.split(",")]
        runs = uvloop.run(measure(bench, tool, wanted, seconds))
    console.print(table(runs), width=TABLE_WIDTH)
    for run in runs:
        if run.rate == JUDGED_RATE:
            for name, most in ABOVE_MS.items():
                above = run.http[name] - run.score[name]
                mark = "[green]met[/]" if above <= most else "[red]missed[/]"
                console.print(
                    f"  HTTP {name} above record to score at {run.rate}/s: {above:.1f} ms"
                    f" (at most {most:.0f}) {mark}"
                )
    console.print(f"  this machine before and after: {before}; {measure_machine()}")
    console.print(f"  duration: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
