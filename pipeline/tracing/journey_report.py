"""Output of `recur trace`: a table for a person, and JSON."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime

from rich.console import Console

from model.units import DAY_SECONDS, HOUR_MS, HOUR_SECONDS, MINUTE_SECONDS, SECOND_MS
from pipeline.errors import SettingsError
from pipeline.messages.decoding import encode_json
from pipeline.progress import Bar
from pipeline.settings import Settings
from pipeline.timestamps import epoch_ms_of
from pipeline.tracing.journey import NO_TIME, Journey, JourneyStage, find_journey
from pipeline.tracing.topic_search import TopicSearch

PROGRESS_AFTER_SECONDS = 2.0
"""A search that takes longer shows its progress."""

UNIT_SECONDS = {"s": 1, "m": MINUTE_SECONDS, "h": HOUR_SECONDS, "d": DAY_SECONDS}
_DURATION = re.compile(r"(\d{1,6})([smhd])")


def trace_transaction(
    settings: Settings,
    transaction_id: str,
    *,
    since: str,
    account_id: str | None = None,
    console: Console | None = None,
) -> Journey:
    """Find the way of a transaction, with progress on standard error if it takes long.

    Args:
        settings: names broker and topics.
        transaction_id: the transaction.
        since: see :func:`since_ms_of`.
        account_id: its account, to search one partition first.
        console: shows the progress; None for standard error.

    Raises:
        RecurError: there is no such record, or the broker does not answer.
    """
    now_ms = time.time_ns() // 1_000_000
    since_ms = since_ms_of(since, now_ms)

    async def find(progress: _LateProgress) -> Journey:
        async with TopicSearch(settings, progress.report) as search:
            return await find_journey(
                settings,
                search,
                transaction_id,
                since_ms=since_ms,
                now_ms=now_ms,
                account_id=account_id,
            )

    with _LateProgress(console or Console(stderr=True, highlight=False)) as progress:
        return asyncio.run(find(progress))


def since_ms_of(text: str, now_ms: int) -> int:
    """Convert ``--since``: a duration before now (90s, 15m, 6h, 2d), or a time.

    Raises:
        SettingsError: it is neither.

    >>> since_ms_of("15m", now_ms=1_700_000_000_000)
    1699999100000
    """
    duration = _DURATION.fullmatch(text)
    if duration is not None:
        return max(0, now_ms - int(duration[1]) * UNIT_SECONDS[duration[2]] * 1000)
    try:
        return epoch_ms_of(text, "--since")
    except SettingsError as error:
        raise SettingsError(f"{error}, or as a duration before now: 90s, 15m, 6h or 2d") from error


def journey_lines(journey: Journey) -> Iterator[str]:
    """Yield lines for a person to read."""
    yield f"transaction  {journey.transaction_id}"
    if journey.trace_id is not None:
        sampled = "sampled" if journey.is_sampled else "not sampled"
        yield f"trace        {journey.trace_id} ({sampled})"
    if journey.decision is not None:
        yield f"decision     {journey.decision}"
    yield ""
    rows = [("stage", "time (UTC)", "after", "record age", "record")]
    for stage, (after, age) in zip(journey.stages, _intervals(journey), strict=True):
        texts = [text for text in (stage.place, stage.note) if text]
        rows.append((stage.stage, _utc(stage), _ms(after), _ms(age), ", ".join(texts)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for name, at, after_text, age_text, record in rows:
        cells = [name.ljust(widths[0]), at.ljust(widths[1])]
        cells += [after_text.rjust(widths[2]), age_text.rjust(widths[3]), record]
        yield "  ".join(cells).rstrip()
    for note in journey.notes:
        yield f"note: {note}"


def journey_json(journey: Journey) -> str:
    """Return the same as a JSON object; times in epoch milliseconds, null where not known."""
    stages = [
        {
            "stage": stage.stage,
            "time_ms": None if stage.time_ms == NO_TIME else stage.time_ms,
            "after_ms": after,
            "record_age_ms": age,
            "record": stage.place,
            "note": stage.note,
        }
        for stage, (after, age) in zip(journey.stages, _intervals(journey), strict=True)
    ]
    found = {
        "transaction_id": journey.transaction_id,
        "trace_id": journey.trace_id,
        "sampled": journey.is_sampled,
        "decision": journey.decision,
        "stages": stages,
        "notes": list(journey.notes),
    }
    return encode_json(found).decode()


def _intervals(journey: Journey) -> Iterator[tuple[int | None, int | None]]:
    """Yield for each stage the time since the one before, and since the transaction's record."""
    sent = next((s.time_ms for s in journey.stages if s.stage == "transaction"), NO_TIME)
    before = NO_TIME
    for stage in journey.stages:
        at = stage.time_ms
        known = at != NO_TIME
        after = at - before if known and before != NO_TIME else None
        yield after, at - sent if known and sent != NO_TIME else None
        before = at if known else before


def _utc(stage: JourneyStage) -> str:
    if stage.time_ms == NO_TIME:
        return "-"
    at = datetime.fromtimestamp(stage.time_ms / 1000, UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _ms(interval_ms: int | None) -> str:
    """Write an interval; three units are enough.

    >>> _ms(17), _ms(-2500), _ms(7_200_000), _ms(None)
    ('17 ms', '-2.5 s', '2.0 h', '-')
    """
    if interval_ms is None:
        return "-"
    size = abs(interval_ms)
    if size < SECOND_MS:
        return f"{interval_ms} ms"
    if size < HOUR_MS:
        return f"{interval_ms / SECOND_MS:,.1f} s"
    return f"{interval_ms / HOUR_MS:,.1f} h"


class _LateProgress:
    """A bar that begins once a search has taken :data:`PROGRESS_AFTER_SECONDS`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stack = ExitStack()
        self._began = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> _LateProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def report(self, topic: str, read: int, fraction: float) -> None:
        """Show progress of a search."""
        if time.monotonic() - self._began < PROGRESS_AFTER_SECONDS:
            return
        if self._bar is None:
            self._bar = self._stack.enter_context(Bar(self._console, "trace"))
        self._bar.show(topic, read, fraction)
