"""``recur demo``: the whole system on this machine for about a minute, for a person to watch.

Kafka and Redis start (:mod:`pipeline.local.services`), and workers as processes of their own. Then

    histories   simulated days with the header recur-warm, so that accounts have a past
    live        the days after them at a steady rate, with fraud in them
    burst       more days, prepared beforehand, as fast as the workers take them

Frauds become known seven simulated days later, by the labels topic, so that skimmed terminals
are found. After each part every score is read back and counted: the demo ends well only if
each transaction was scored exactly once. The payments are simulated and their time runs faster
than the clock; everything else is real.
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

from rich.console import Console

from model.simulator.world import WORLDS, WorldName
from pipeline.demo.labels import LateLabels
from pipeline.demo.stage import Show
from pipeline.demo.summary import DemoResult, summarize
from pipeline.demo.view import Display, display_for
from pipeline.errors import SettingsError
from pipeline.kafka.topics import ensure_topics
from pipeline.local.kafka_jars import jar_directory
from pipeline.local.services import Services, embedded
from pipeline.local.workers import WorkerProcess, start_worker, stop_all, until_ready
from pipeline.replay.producer import Block, Feed
from pipeline.replay.score_counter import TopicReader
from pipeline.replay.simulated import SimulatedStream, SimulatedTransactions
from pipeline.settings import load_settings
from pipeline.units import DAY_MS

CUSTOMERS = 5_000
TERMINALS = 10_000
SEED = 20_260
"""Not the one that the shipped model was trained with: these accounts are new to it."""

LABEL_DELAY_DAYS = 7
"""A fraud becomes known so long after; then other payments at its terminal are suspected."""

READY_SECONDS = 60.0
PREPARED_MAX = 500_000
"""A larger burst is encoded while it is sent."""

CHAPTER_SECONDS = 60.0
"""With ``keep_running`` the live feed is counted every so often."""

KEEP_RUNNING_YEARS = 20
"""With ``keep_running`` simulated time begins so long ago: it must not reach today."""

FAILED = 1
INTERRUPTED = 130

_PER_CUSTOMER_DAY_MIN = 1.2  # transactions; on average 1.94, in the wide world 1.4 to 1.8


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the person asked for.

    Raises:
        SettingsError: one of them is out of its bounds.
    """

    transactions: int = 200_000
    """Of the burst."""
    rate: float = 500.0
    """Of the live part, transactions/s."""
    seconds: float = 30.0
    """Of the live part."""
    workers: int = 2
    keep_running: bool = False
    """Go on with the live part until Ctrl-C."""
    world: WorldName = "wide"
    """Which accounts, merchants and frauds are simulated."""
    history_days: int = 20
    """Simulated days before the live part."""

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
                    f"--{option} is {value:,g}; it must be {least:,.0f} to {most:,.0f}"
                )

    @property
    def live_transactions(self) -> int:
        """Of the live part."""
        return max(1, round(self.rate * self.seconds))


def run_demo(options: DemoOptions, console: Console | None = None) -> int:
    """Run the demo; nothing is left running or lying about.

    Returns:
        0 when every transaction was scored exactly once, 1 when not, 130 after Ctrl-C.

    Raises:
        RecurError: services or workers did not start, or went away.
    """
    console = console or Console(highlight=False)
    display = display_for(console)
    directory = Path(tempfile.mkdtemp(prefix="recur-demo-"))
    code = FAILED
    before = signal.signal(signal.SIGTERM, _raise_interrupt)
    log = logging.FileHandler(directory / "demo.log", delay=True)
    logging.getLogger().addHandler(log)  # what client libraries say would disturb the view
    try:
        display.heading("Recur: card transactions scored as they happen")
        code = _run(options, directory, display)
    except KeyboardInterrupt:
        code = INTERRUPTED
        display.note("stopped before its end; nothing is left running")
    finally:
        display.close()
        signal.signal(signal.SIGTERM, before)
        logging.getLogger().removeHandler(log)
        log.close()
        if code == FAILED:
            display.note(f"logs are in {directory}", bad=True)
        else:
            shutil.rmtree(directory, ignore_errors=True)  # of a run that went well
    return code


def _raise_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(options: DemoOptions, directory: Path, display: Display) -> int:
    jar_directory()  # the first time ever it fetches Kafka, and shows its own progress
    display.working("starting Kafka and Redis")
    started = time.monotonic()
    with embedded() as services:
        display.done("Kafka and Redis", f"started in {time.monotonic() - started:.1f} s")
        return asyncio.run(_Demo(options, services, directory, display).run_interruptibly())


@dataclass(frozen=True, slots=True)
class _Script:
    """Everything that is sent, made before it is needed."""

    stream: SimulatedStream
    history: SimulatedTransactions
    live: SimulatedTransactions
    burst: SimulatedTransactions
    burst_blocks: list[Block] | None
    """None where it is too large to be kept encoded."""

    @classmethod
    def write(cls, options: DemoOptions) -> _Script:
        stream = SimulatedStream(
            CUSTOMERS, TERMINALS, _start_date(options), SEED, WORLDS[options.world]
        )
        history = stream.take_days(options.history_days)
        live = stream.take(options.live_transactions)
        burst = stream.take(options.transactions)
        prepared = list(burst.blocks()) if len(burst) <= PREPARED_MAX else None
        return cls(stream, history, live, burst, prepared)


def _start_date(options: DemoOptions) -> str:
    """A day so early that the simulated days end before today."""
    counted = options.live_transactions + options.transactions
    days = options.history_days + 2 + counted / (CUSTOMERS * _PER_CUSTOMER_DAY_MIN)
    if options.keep_running:
        days += 365 * KEEP_RUNNING_YEARS
    return (datetime.now(UTC) - timedelta(days=days)).date().isoformat()


class _Demo:
    """One run, from started services to the summary."""

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
        self._show: Show | None = None
        self._over = False

    async def run_interruptibly(self) -> int:
        """The exit code. The first Ctrl-C cancels; later ones do not disturb its clean-up."""
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
            told = self._show.so_far() if self._show else "stopped before its end"
            self._display.note(told)
            return INTERRUPTED if not self._over else self._exit_code()

    async def _run(self) -> int:
        partitions = await ensure_topics(self._settings)
        async with self._running_workers(), AsyncExitStack() as stack:
            script = await self._prepared(partitions["transactions"])
            feed = await stack.enter_async_context(Feed(self._settings))
            scores, alerts, dead_letters = [
                await stack.enter_async_context(TopicReader(self._settings, role, partitions[role]))
                for role in ("scores", "alerts", "dead_letter")
            ]
            label_feed = await stack.enter_async_context(Feed(self._settings, "labels"))
            self._show = Show(
                self._display,
                self._services,
                self._workers,
                feed,
                LateLabels(label_feed, LABEL_DELAY_DAYS * DAY_MS),
                scores,
                alerts,
                dead_letters,
            )
            played = await self._play(self._show, script)
            self._display.working("adding up")
            self._display.summary(
                await summarize(played, self._show, self._workers, self._settings)
            )
            self._over = True
            if self._options.keep_running:
                await self._keep_running(self._show, script.stream)
        return self._exit_code()

    def _exit_code(self) -> int:
        return FAILED if self._show is None or self._show.faults else 0

    @asynccontextmanager
    async def _running_workers(self) -> AsyncIterator[None]:
        environment = self._services.environment() | {"TMPDIR": str(self._directory)}
        try:
            for number in range(1, self._options.workers + 1):
                self._workers.append(start_worker(number, self._directory, environment))
            yield
        finally:
            await stop_all(self._workers)

    async def _prepared(self, partitions: int) -> _Script:
        """The script, written while the workers start."""
        count = self._options.workers
        name = "1 worker" if count == 1 else f"{count} workers"
        self._display.working(f"starting {name}")
        started = time.monotonic()
        script, _ = await asyncio.gather(
            asyncio.to_thread(_Script.write, self._options),
            until_ready(self._workers, READY_SECONDS),
        )
        seconds = time.monotonic() - started
        self._display.done(name, f"ready in {seconds:.1f} s, {partitions} partitions")
        self._display.done("metrics", "  ".join(worker.address for worker in self._workers))
        return script

    async def _play(self, show: Show, script: _Script) -> DemoResult:
        histories = burst = None
        if len(script.history):
            histories = await show.histories(script.history, self._options.history_days)
        live = await show.live(script.live, self._options.rate)
        if len(script.burst):
            burst = await show.burst(script.burst, script.burst_blocks)
        return DemoResult(histories, live, burst)

    async def _keep_running(self, show: Show, stream: SimulatedStream) -> None:
        chapter = max(1, round(self._options.rate * CHAPTER_SECONDS))
        while not show.faults:
            await show.live(stream.take(chapter), self._options.rate, endless=True)
