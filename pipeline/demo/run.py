"""``recur demo``: show the whole system on this machine for about a minute.

The demo starts Kafka and Redis (:mod:`pipeline.local.embedded`), worker processes and a gateway.
Its phases:

    histories   simulated days with the header recur-warm, so that accounts have a past
    live        the next days at a steady rate, with fraud among them, partly over HTTP
    burst       more days, prepared before, at the workers' full speed

The labels topic makes frauds known seven simulated days later, so that skimmed terminals are
found. After each phase the demo reads every score back. It succeeds only if each transaction was
scored exactly once. Payments are simulated and their time runs faster than the clock. Everything
else is real.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType

import uvloop
from rich.console import Console

from model.simulator.handbook import account_id, merchant_id
from model.simulator.world import WORLDS, WorldName
from model.units import DAY_MS
from pipeline.demo.http_traffic import HttpTraffic, add_demo_key
from pipeline.demo.labels import DelayedLabels
from pipeline.demo.stage import Stage
from pipeline.demo.summary import DemoResult, summarize
from pipeline.demo.view import Display, display_for
from pipeline.errors import SettingsError
from pipeline.extras import require_gateway_packages
from pipeline.files.generated_stream import SHIPPED_GENERATOR, open_stream
from pipeline.kafka.topics import ensure_topics
from pipeline.local.embedded import Services, embedded
from pipeline.local.kafka_jars import jar_directory
from pipeline.local.workers import (
    LocalGateway,
    WorkerProcess,
    start_gateway,
    start_worker,
    stop_all,
    until_ready,
)
from pipeline.replay.generated import generated_days
from pipeline.replay.producer import Block, Feed
from pipeline.replay.score_counter import TopicReader
from pipeline.replay.simulated import CURRENCY, SimulatedStream, SimulatedTransactions
from pipeline.settings import load_settings

CUSTOMERS = 5_000
TERMINALS = 10_000
SEED = 20_260
"""Seed of the simulator; it differs from the training's, so the accounts are new to the model."""

LABEL_DELAY_DAYS = 7
"""Delay of labels; then the model suspects other payments at the fraud's terminal."""

GENERATED_DAYS = 36_500
"""Days of generated histories: more than a demo takes."""

READY_SECONDS = 60.0
PREPARED_MAX = 500_000
"""Limit of a burst that is encoded before it is sent."""

CHECK_SECONDS = 60.0
"""Interval at which ``keep_running`` counts the scores of the live phase."""

OLDEST_YEARS = 30
"""Age of payments that workers and the gateway accept here."""

KEEP_RUNNING_YEARS = 20
"""Distance of simulated time from today with ``keep_running``: it must not reach today."""

FAILED = 1
INTERRUPTED = 130

_PER_CUSTOMER_DAY_MIN = 1.2  # transactions; on average 1.94, in the wide world 1.4 to 1.8


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """Options of the command.

    Raises:
        SettingsError: an option is out of bounds.
    """

    transactions: int = 200_000
    """Transactions of the burst."""
    rate: float = 500.0
    """Transactions/s of the live phase."""
    seconds: float = 30.0
    """Duration of the live phase."""
    workers: int = 2
    keep_running: bool = False
    """Go on with the live phase until Ctrl-C."""
    world: WorldName = "wide"
    """World of the simulated accounts, merchants and frauds."""
    generated: bool = False
    """Take generated histories instead of simulated ones."""
    history_days: int = 20
    """Simulated days before the live phase."""

    def __post_init__(self) -> None:
        bounds: dict[str, tuple[float, float]] = {
            "transactions": (0, 5_000_000),
            "rate": (1, 50_000),
            "seconds": (1, 3_600),
            "workers": (1, 16),
            "history_days": (0, 365),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if not least <= value <= most:
                option = name.replace("_", "-")
                raise SettingsError(
                    f"--{option} is {value:,g}; it must be from {least:,.0f} to {most:,.0f}"
                )

    @property
    def live_transactions(self) -> int:
        """Transactions of the live phase."""
        return max(1, round(self.rate * self.seconds))


def run_demo(options: DemoOptions, console: Console | None = None) -> int:
    """Run the demo and clean up after it.

    Returns:
        0 if every transaction was scored exactly once, 1 if not, 130 after Ctrl-C.

    Raises:
        RecurError: services or workers did not start, or ended; or a package is missing.
    """
    require_gateway_packages("the demo's gateway")
    console = console or Console(highlight=False)
    display = display_for(console)
    directory = Path(tempfile.mkdtemp(prefix="recur-demo-"))
    code = FAILED
    before = signal.signal(signal.SIGTERM, _raise_interrupt)
    log = logging.FileHandler(directory / "demo.log", delay=True)
    logging.getLogger().addHandler(log)  # messages of client libraries would disturb the view
    try:
        display.heading("Recur: card transactions scored as they happen")
        code = _run(options, directory, display)
    except KeyboardInterrupt:
        code = INTERRUPTED
        display.note("stopped early; nothing is left running")
    finally:
        display.close()
        signal.signal(signal.SIGTERM, before)
        logging.getLogger().removeHandler(log)
        log.close()
        if code == FAILED:
            display.note(f"the logs are in {directory}", bad=True)
        else:
            shutil.rmtree(directory, ignore_errors=True)
    return code


def _raise_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(options: DemoOptions, directory: Path, display: Display) -> int:
    jar_directory()  # the first run fetches Kafka and shows its own progress
    display.working("starting Kafka and Redis")
    started = time.monotonic()
    with embedded() as services:
        display.done("Kafka and Redis", f"started in {time.monotonic() - started:.1f} s")
        return uvloop.run(_Demo(options, services, directory, display).run_interruptibly())


@dataclass(frozen=True, slots=True)
class _DemoPayments:
    """Payments of all phases, made before the phases need them."""

    stream: SimulatedStream
    history: SimulatedTransactions
    live: SimulatedTransactions
    burst: SimulatedTransactions
    burst_blocks: list[Block] | None
    """Encoded burst. None: it is too large to be kept encoded."""

    @classmethod
    def make(cls, options: DemoOptions) -> _DemoPayments:
        stream = _stream(options)
        history = stream.take_days(options.history_days)
        live = stream.take(options.live_transactions)
        burst = stream.take(options.transactions)
        prepared = list(burst.blocks()) if len(burst) <= PREPARED_MAX else None
        return cls(stream, history, live, burst, prepared)


def _stream(options: DemoOptions) -> SimulatedStream:
    start = _start_date(options)
    if not options.generated:
        return SimulatedStream(CUSTOMERS, TERMINALS, start, SEED, WORLDS[options.world])
    stream = open_stream(
        SHIPPED_GENERATOR,
        {},
        accounts=CUSTOMERS,
        days=GENERATED_DAYS,
        seed=SEED,
        start_date=start,
    )
    return SimulatedStream.of_days(generated_days(stream))


def _start_date(options: DemoOptions) -> str:
    """Choose a first day so that the simulated days end before today."""
    counted = options.live_transactions + options.transactions
    days = options.history_days + 2 + counted / (CUSTOMERS * _PER_CUSTOMER_DAY_MIN)
    if options.keep_running:
        days += 365 * KEEP_RUNNING_YEARS
    return (datetime.now(UTC) - timedelta(days=days)).date().isoformat()


def _visit(payments: _DemoPayments) -> dict[str, object]:
    """Make a payment for a person to send: the first live one's, by an account of its own."""
    columns = payments.live.columns
    return {
        "account_id": account_id(CUSTOMERS),  # the simulated accounts have smaller numbers
        "merchant_id": merchant_id(int(columns.merchant[0])),
        "amount": float(columns.amount[0]),
        "currency": CURRENCY,
        "timestamp": int(columns.timestamp_ms[0]),
    }


class _Demo:
    """A run of the demo, from the started services to the summary."""

    def __init__(
        self, options: DemoOptions, services: Services, directory: Path, display: Display
    ) -> None:
        self._options = options
        self._services = services
        self._directory = directory
        self._display = display
        self._settings = load_settings(
            kafka_bootstrap_servers=services.kafka_bootstrap_servers, redis_url=services.redis_url
        )
        self._workers: list[WorkerProcess] = []
        self._gateway: LocalGateway | None = None
        self._stage: Stage | None = None
        self._is_over = False

    async def run_interruptibly(self) -> int:
        """Run and return the exit code. The first Ctrl-C cancels; later ones are ignored."""
        task = asyncio.ensure_future(self._run())
        interrupts = 0

        def interrupt() -> None:
            nonlocal interrupts
            interrupts += 1
            if interrupts == 1:
                task.cancel()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt)
        try:
            return await task
        except asyncio.CancelledError:
            self._display.close()
            self._display.note(self._stage.progress_text() if self._stage else "stopped early")
            return INTERRUPTED if not self._is_over else self._exit_code()

    async def _run(self) -> int:
        partitions = await ensure_topics(self._settings)
        async with self._running_workers(), AsyncExitStack() as stack:
            payments = await self._prepare(partitions["transactions"])
            feed = await stack.enter_async_context(Feed(self._settings))
            assert self._gateway is not None
            token = await add_demo_key(self._settings)
            http = HttpTraffic(self._gateway.base_url, token, feed)
            await stack.enter_async_context(http)
            scores, alerts, dead_letters = [
                await stack.enter_async_context(TopicReader(self._settings, role, partitions[role]))
                for role in ("scores", "alerts", "dead_letter")
            ]
            label_feed = await stack.enter_async_context(Feed(self._settings, "labels"))
            self._stage = Stage(
                self._display,
                self._services,
                self._workers,
                self._gateway,
                http,
                feed,
                DelayedLabels(label_feed, LABEL_DELAY_DAYS * DAY_MS),
                scores,
                alerts,
                dead_letters,
            )
            result = await self._play(self._stage, payments)
            self._display.working("adding up the results")
            self._display.summary(
                await summarize(result, self._stage, self._workers, self._settings)
            )
            self._is_over = True
            if self._options.keep_running:
                await self._keep_running(self._stage, payments.stream)
        return self._exit_code()

    def _exit_code(self) -> int:
        return FAILED if self._stage is None or self._stage.faults else 0

    @asynccontextmanager
    async def _running_workers(self) -> AsyncIterator[None]:
        environment = self._services.environment() | {
            "TMPDIR": str(self._directory),
            "RECUR_MAX_TIMESTAMP_AGE_SECONDS": str(OLDEST_YEARS * 366 * DAY_MS // 1000),
        }
        try:
            for number in range(1, self._options.workers + 1):
                self._workers.append(start_worker(number, self._directory, environment))
            self._gateway = start_gateway(self._directory, environment)
            yield
        finally:
            await stop_all([*self._workers, *([self._gateway] if self._gateway else [])])

    async def _prepare(self, partitions: int) -> _DemoPayments:
        """Make the payments while the workers start."""
        count = self._options.workers
        name = "1 worker" if count == 1 else f"{count} workers"
        self._display.working(f"starting {name} and a gateway")
        started = time.monotonic()
        payments, _ = await asyncio.gather(
            asyncio.to_thread(_DemoPayments.make, self._options),
            until_ready(
                [*self._workers, *([self._gateway] if self._gateway else [])], READY_SECONDS
            ),
        )
        seconds = time.monotonic() - started
        self._display.done(name, f"ready in {seconds:.1f} s, for {partitions} partitions")
        self._display.done("metrics", "  ".join(worker.address for worker in self._workers))
        return payments

    async def _play(self, stage: Stage, payments: _DemoPayments) -> DemoResult:
        histories = burst = None
        if len(payments.history):
            histories = await stage.histories(payments.history, self._options.history_days)
        self._display.command(
            "score a payment yourself while this runs", stage.http.command(_visit(payments))
        )
        live = await stage.live(payments.live, self._options.rate)
        if len(payments.burst):
            burst = await stage.burst(payments.burst, payments.burst_blocks)
        return DemoResult(histories, live, burst)

    async def _keep_running(self, stage: Stage, stream: SimulatedStream) -> None:
        transactions = max(1, round(self._options.rate * CHECK_SECONDS))
        while not stage.faults:
            await stage.live(stream.take(transactions), self._options.rate, endless=True)
