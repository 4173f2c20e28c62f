"""``recur replay FILE``: a person's own transactions, from a parquet or CSV file.

At the recorded pace times a factor, at a rate, or as fast as the broker takes them. The file is
read in parts, so it may be of any size. With a report it waits until the workers have scored all
of it, and tells what came out.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.errors import SettingsError
from pipeline.files.column_mapping import load_mapping
from pipeline.files.reader import TransactionFile
from pipeline.kafka.committed_offsets import committed_offsets
from pipeline.kafka.topics import TopicRole, ensure_topics
from pipeline.progress import bar_for
from pipeline.replay.producer import Block, Feed, ahead, encode_block
from pipeline.replay.report import Readers, SentRows, Truth, gather_outcome, lost, report_rows
from pipeline.replay.score_counter import TopicReader
from pipeline.settings import Settings
from pipeline.units import DAY_MS

OUTPUTS: tuple[TopicRole, ...] = ("scores", "alerts", "dead_letter")
"""Topics that a report reads, in the order of :class:`Readers`."""

FRAME_SECONDS = 0.2
PARTITIONS_SHOWN = 16
OFFSET_DAYS_MAX = 100_000
FAILED = 1
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What the person asked for.

    Raises:
        SettingsError: options that exclude each other or are out of their bounds.
    """

    file: Path
    columns: str
    """A column mapping's file, or the name of a shipped one."""
    rate: float | None = None
    """Transactions/s; None with no ``speed`` either: as fast as the broker takes them."""
    speed: float | None = None
    """The recorded pace times this."""
    warm: bool = False
    """Build states, raise no alerts."""
    limit: int | None = None
    """Only the first so many usable rows."""
    offset_days: float = 0.0
    """Added to every time."""
    skip_unusable: bool = False
    """Leave out rows that cannot be transactions instead of stopping there."""
    allow_unsorted: bool = False
    """Send rows whose time is before the one above as they stand."""
    report: bool = False
    """Wait for the scores and tell what came out."""
    report_skip_days: int = 0
    """Days at the beginning that the report's measures leave out."""

    def __post_init__(self) -> None:
        if self.rate is not None and self.speed is not None:
            raise SettingsError("--rate and --speed exclude each other: keep one")
        for name in ("rate", "speed", "limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise SettingsError(f"--{name} is {value:g}; it must be more than 0")
        if not abs(self.offset_days) <= OFFSET_DAYS_MAX:
            raise SettingsError(
                f"--offset-days is {self.offset_days:g}; it must be within {OFFSET_DAYS_MAX:,}"
            )


def run_replay(options: ReplayOptions, settings: Settings, console: Console | None = None) -> int:
    """Replay a file.

    Returns:
        0, or 1 when the report found a transaction without a score or with two, or 130 after
        Ctrl-C.

    Raises:
        RecurError: the file, its column mapping or a row is wrong, or the broker is away.
    """
    console = console or Console(highlight=False)
    file = TransactionFile(
        options.file,
        load_mapping(options.columns),
        offset_ms=round(options.offset_days * DAY_MS),
        skip_unusable=options.skip_unusable,
        allow_unsorted=options.allow_unsorted,
        latest_ms=round((time.time() + settings.max_timestamp_ahead_seconds) * 1000),
    )
    return asyncio.run(_Replay(options, settings, file, console).run())


class _Replay:
    def __init__(
        self, options: ReplayOptions, settings: Settings, file: TransactionFile, console: Console
    ) -> None:
        self._options = options
        self._settings = settings
        self._file = file
        self._console = console
        self._stop = asyncio.Event()
        self._rows = SentRows() if options.report else None
        self._seconds = 0.0

    async def run(self) -> int:
        """The exit code. Ctrl-C stops the feed, and a second one the waiting for scores."""
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(self._run())

        def interrupt() -> None:
            if self._stop.is_set():
                task.cancel()
            self._stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt)
        try:
            return await task
        except asyncio.CancelledError:
            return INTERRUPTED

    async def _run(self) -> int:
        partitions = await ensure_topics(self._settings)
        async with AsyncExitStack() as stack:
            feed = Feed(self._settings)
            readers = None
            if self._rows is not None:
                readers = Readers(
                    *[
                        await stack.enter_async_context(
                            TopicReader(self._settings, role, partitions[role])
                        )
                        for role in OUTPUTS
                    ]
                )
            try:
                await self._feed(feed)
            finally:
                self._tell_sent(feed)
            if self._rows is None or readers is None:
                return INTERRUPTED if self._stop.is_set() else 0
            return await self._report(self._rows.first(feed.count.sent), feed, readers)

    async def _feed(self, feed: Feed) -> None:
        started = time.monotonic()
        with bar_for(self._console) as bar:
            async with feed:
                feeding = asyncio.ensure_future(
                    feed.run(
                        ahead(self._blocks()),
                        rate=self._options.rate,
                        warm=self._options.warm,
                        history=True,
                        stop=self._stop,
                    )
                )
                while not feeding.done():
                    await asyncio.wait([feeding], timeout=FRAME_SECONDS)
                    bar.show("sending", feed.count.acked, self._fraction(feed.count.acked))
                    self._seconds = time.monotonic() - started
                feeding.result()
            self._seconds = time.monotonic() - started

    def _fraction(self, sent: int) -> float:
        """How much of the file is sent, as well as that is known."""
        options, total = self._options, self._file.rows_total
        fractions = [self._file.fraction_read if total is None else sent / max(1, total)]
        if options.limit is not None:
            fractions.append(sent / options.limit)
        return max(fractions)

    def _blocks(self) -> Iterator[Block]:
        """The file's rows, encoded, with their due times where the pace is the recorded one."""
        left = self._options.limit
        first_ms = latest_ms = None
        for part in self._file.parts():
            part = part if left is None else part.first(left)
            times = part.timestamps_ms
            if self._rows is not None:
                self._rows.add(part)
            due_seconds = None
            if self._options.speed is not None:
                first_ms = int(times[0]) if first_ms is None else first_ms
                due_ms = np.maximum.accumulate(np.maximum(times, latest_ms or first_ms))
                latest_ms = int(due_ms[-1])
                due_seconds = (due_ms - first_ms) / (1000.0 * self._options.speed)
            yield encode_block(
                part.transaction_ids,
                part.account_ids,
                part.merchant_ids,
                part.amounts,
                part.currencies,
                times.tolist(),
                *part.optional,
                further=part.further(),
                due_seconds=due_seconds,
            )
            if left is not None:
                left -= len(times)
                if left <= 0:
                    return

    def _tell_sent(self, feed: Feed) -> None:
        count = feed.count
        rate = count.acked / max(0.001, self._seconds)
        verb = "stopped; sent" if self._stop.is_set() else "sent"
        rows = [(verb, f"{count.acked:,} transactions in {self._seconds:.1f} s: {rate:,.0f}/s")]
        if count.sent != count.acked:
            rows.append(("unknown", f"{count.sent - count.acked:,} without the broker's ack"))
        rows.append(("by partition", _by_partition(count.acked_by_partition)))
        left_out = self._file.left_out
        if left_out.rows:
            rows.append(("left out", f"{left_out.rows:,} rows, such as"))
            rows += [("", example) for example in left_out.examples]
        if self._file.unsorted_rows and self._options.allow_unsorted:
            rows.append(("unsorted", f"{self._file.unsorted_rows:,} rows before the one above"))
        if count.behind_seconds:
            rows.append(("behind", f"{count.behind_seconds:.1f} s: the pace was too fast"))
        self._print(rows)

    async def _report(self, truth: Truth, feed: Feed, readers: Readers) -> int:
        last_offsets = feed.count.last_offsets

        async def all_applied() -> bool:
            committed = await committed_offsets(self._settings)
            return all(committed.get(part, 0) > last for part, last in last_offsets.items())

        with bar_for(self._console) as bar:

            def show(what: str, done: int, total: int) -> None:
                bar.show(what, done, done / max(1, total))

            outcome = await gather_outcome(truth, readers, all_applied, show)
            show("adding up", outcome.tally.scored, len(truth))
            rows = report_rows(truth, outcome, self._options.report_skip_days)
        self._print(rows)
        if lost(truth, outcome) or outcome.tally.repeated:
            return FAILED
        return INTERRUPTED if self._stop.is_set() else 0

    def _print(self, rows: list[tuple[str, str]]) -> None:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", justify="right", min_width=18)
        grid.add_column()
        for name, text in rows:
            grid.add_row(name, text)
        self._console.print(grid)


def _by_partition(counts: dict[int, int]) -> str:
    shown = "  ".join(
        f"{number}: {counts[number]:,}" for number in sorted(counts)[:PARTITIONS_SHOWN]
    )
    more = len(counts) - PARTITIONS_SHOWN
    return shown + (f"  and {more} more" if more > 0 else "")
