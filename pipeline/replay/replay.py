"""``recur replay FILE``: send a person's transactions from a Parquet or CSV file.

They go at a multiple of the recorded pace, at a rate, or at the broker's speed. The file is read in
parts, so it may have any size. With a report, the command waits until the workers have scored all
transactions, and shows the result.
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

from model.units import DAY_MS
from pipeline.errors import SettingsError
from pipeline.files.column_mapping import load_mapping
from pipeline.files.reader import TransactionFile
from pipeline.kafka.committed_offsets import committed_offsets
from pipeline.kafka.topics import TopicRole, ensure_topics
from pipeline.progress import Bar
from pipeline.replay.feeding import feed_with_bar
from pipeline.replay.producer import Block, Feed, encode_block
from pipeline.replay.report import (
    LabelledRows,
    OutputReaders,
    SentRows,
    collect_result,
    lost,
    report_rows,
)
from pipeline.replay.score_counter import TopicReader
from pipeline.settings import Settings
from pipeline.tables import pair_lines

OUTPUTS: tuple[TopicRole, ...] = ("scores", "alerts", "dead_letter")
"""Topics that a report reads, in the order of :class:`OutputReaders`."""

PARTITIONS_SHOWN = 16
OFFSET_DAYS_MAX = 100_000
FAILED = 1
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """Options of the command.

    Raises:
        SettingsError: an option is out of bounds, or two exclude each other.
    """

    file: Path
    columns: str
    """Path of a column mapping, or the name of a shipped one."""
    rate: float | None = None
    """Transactions/s. Without ``rate`` and ``speed``: the broker's speed."""
    speed: float | None = None
    """Multiple of the recorded pace."""
    warm: bool = False
    """Build states without raising alerts."""
    limit: int | None = None
    """Number of usable rows to send, from the first."""
    offset_days: float = 0.0
    """Days added to every time."""
    skip_unusable: bool = False
    """Skip rows that cannot be transactions instead of stopping there."""
    allow_unsorted: bool = False
    """Send rows with a time before that of the row above."""
    report: bool = False
    """Wait for the scores and show the result."""
    report_skip_days: int = 0
    """Days at the beginning that the report's measures exclude."""

    def __post_init__(self) -> None:
        if self.rate is not None and self.speed is not None:
            raise SettingsError("--rate and --speed exclude each other: keep one")
        for name in ("rate", "speed", "limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise SettingsError(f"--{name} is {value:g}; it must be over 0")
        if not abs(self.offset_days) <= OFFSET_DAYS_MAX:
            raise SettingsError(
                f"--offset-days is {self.offset_days:g}; it must be within {OFFSET_DAYS_MAX:,}"
            )


def run_replay(options: ReplayOptions, settings: Settings, console: Console | None = None) -> int:
    """Replay a file.

    Returns:
        0; 1 if the report found a transaction without a score or with two; 130 after Ctrl-C.

    Raises:
        RecurError: the file, its column mapping or a row is wrong, or the broker is unreachable.
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
        """Replay and return the exit code. Ctrl-C stops the feed, a second one the report."""
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
                readers = OutputReaders(
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
                self._show_sent(feed)
            if self._rows is None or readers is None:
                return INTERRUPTED if self._stop.is_set() else 0
            return await self._report(self._rows.first(feed.count.sent), feed, readers)

    async def _feed(self, feed: Feed) -> None:
        started = time.monotonic()
        try:
            await feed_with_bar(
                feed,
                self._blocks(),
                self._console,
                "sending",
                self._fraction,
                rate=self._options.rate,
                warm=self._options.warm,
                history=True,
                stop=self._stop,
            )
        finally:
            self._seconds = time.monotonic() - started

    def _fraction(self, sent: int) -> float:
        """Estimate the share of the file that has been sent."""
        options, total = self._options, self._file.rows_total
        fractions = [self._file.fraction_read if total is None else sent / max(1, total)]
        if options.limit is not None:
            fractions.append(sent / options.limit)
        return max(fractions)

    def _blocks(self) -> Iterator[Block]:
        """Encode the file's rows, with due times if they follow the recorded pace."""
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
                extra=part.extra_fields(),
                due_seconds=due_seconds,
            )
            if left is not None:
                left -= len(times)
                if left <= 0:
                    return

    def _show_sent(self, feed: Feed) -> None:
        count = feed.count
        rate = count.acked / max(0.001, self._seconds)
        verb = "stopped; sent" if self._stop.is_set() else "sent"
        rows = [(verb, f"{count.acked:,} transactions in {self._seconds:.1f} s: {rate:,.0f}/s")]
        if count.sent != count.acked:
            rows.append(("not acked", f"{count.sent - count.acked:,}: the broker may have them"))
        rows.append(("by partition", _by_partition(count.acked_by_partition)))
        skipped = self._file.skipped
        if skipped.rows:
            rows.append(("skipped", f"{skipped.rows:,} rows, such as"))
            rows += [("", example) for example in skipped.examples]
        if self._file.unsorted_rows and self._options.allow_unsorted:
            rows.append(
                (
                    "unsorted",
                    f"{self._file.unsorted_rows:,} rows with a time before that of the row above",
                )
            )
        if count.behind_seconds:
            rows.append(
                ("behind", f"{count.behind_seconds:.1f} s: the broker or this machine was too slow")
            )
        self._print(rows)

    async def _report(self, sent: LabelledRows, feed: Feed, readers: OutputReaders) -> int:
        last_offsets = feed.count.last_offsets

        async def all_applied() -> bool:
            committed = await committed_offsets(self._settings)
            return all(committed.get(part, 0) > last for part, last in last_offsets.items())

        with Bar(self._console) as bar:

            def show(what: str, done: int, total: int) -> None:
                bar.show(what, done, done / max(1, total))

            result = await collect_result(sent, readers, all_applied, show)
            show("adding up", result.counter.scored, len(sent))
            rows = report_rows(sent, result, self._options.report_skip_days)
        self._print(rows)
        if lost(sent, result) or result.counter.duplicates:
            return FAILED
        return INTERRUPTED if self._stop.is_set() else 0

    def _print(self, rows: list[tuple[str, str]]) -> None:
        for line in pair_lines(rows, align_right=True):
            self._console.print(line, soft_wrap=True)


def _by_partition(counts: dict[int, int]) -> str:
    shown = "  ".join(
        f"{number}: {counts[number]:,}" for number in sorted(counts)[:PARTITIONS_SHOWN]
    )
    more = len(counts) - PARTITIONS_SHOWN
    return shown + (f"  and {more} more" if more > 0 else "")
