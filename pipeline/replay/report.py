"""Report of a replay: scored, missing and rejected rows, and the quality of the scores.

It keeps about 40 bytes for each row that was sent, and nothing of its content: ids are hashed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.metrics import (
    EvaluationError,
    auc_roc,
    average_precision,
    card_precision_at,
)
from model.units import DAY_MS
from pipeline.errors import RecurError
from pipeline.files.parsing import LABEL_UNKNOWN
from pipeline.files.reader import TransactionPart
from pipeline.files.scenarios import ScenarioNumbers
from pipeline.messages.decision import DECISIONS
from pipeline.replay.score_counter import ScoreCounter, TopicReader

ROWS_MAX = 50_000_000
"""Limit of the rows of a report; more would take gigabytes."""

CARDS_PER_DAY = 100
"""Number of cards a day that card precision considers."""

STALL_SECONDS = 30.0
"""Time without a new score after which the rest counts as not scored."""

COMMIT_SECONDS = 2.0
"""Time without a new score after which the report checks the workers' commits."""

POLL_SECONDS = 0.5


class SentRows:
    """Ids, accounts, days, labels and scenarios of the rows that were read, in order."""

    def __init__(self) -> None:
        self._ids: list[NDArray[np.int64]] = []
        self._accounts: list[NDArray[np.int64]] = []
        self._days: list[NDArray[np.int32]] = []
        self._labels: list[NDArray[np.int8]] = []
        self._scenarios: list[NDArray[np.int8]] = []
        self._numbers = ScenarioNumbers()
        self._rows = 0

    def add(self, part: TransactionPart) -> None:
        """Add a part.

        Raises:
            RecurError: more than :data:`ROWS_MAX` rows.
        """
        count = len(part.transaction_ids)
        self._rows += count
        if self._rows > ROWS_MAX:
            raise RecurError(
                f"a report can have {ROWS_MAX:,} rows at most: use --limit, or no --report"
            )
        self._ids.append(_hashes(part.transaction_ids))
        self._accounts.append(_hashes(part.account_ids))
        self._days.append((part.timestamps_ms // DAY_MS).astype(np.int32))
        labels = part.labels
        self._labels.append(np.full(count, LABEL_UNKNOWN, np.int8) if labels is None else labels)
        names = part.scenarios or [None] * count
        self._scenarios.append(np.fromiter(map(self._numbers.number_of, names), np.int8, count))

    def first(self, rows: int) -> LabelledRows:
        """Take the first rows: those that were sent."""
        columns = (self._ids, self._accounts, self._days, self._labels, self._scenarios)
        ids, accounts, days, labels, scenarios = (_first(chunks, rows) for chunks in columns)
        return LabelledRows(ids, accounts, days, labels, scenarios, self._numbers.names)


@dataclass(slots=True)
class LabelledRows:
    """The n rows that were sent; ``scenarios`` are numbers of scenarios, 0 for none."""

    ids: NDArray[np.int64]
    accounts: NDArray[np.int64]
    days: NDArray[np.int32]
    labels: NDArray[np.int8]
    scenarios: NDArray[np.int8]
    scenario_names: dict[int, str]
    _order: NDArray[np.intp] = field(init=False)
    _sorted_ids: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self._order = np.argsort(self.ids, kind="stable")
        self._sorted_ids = self.ids[self._order]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def duplicate_ids(self) -> int:
        """Number of rows with the id of an earlier row; the worker drops or scores them."""
        return int((np.diff(self._sorted_ids) == 0).sum())

    def index_of(self, transaction_ids: Sequence[str]) -> NDArray[np.int64]:
        """Find the first row of each id as int64[n]; -1: no such row."""
        hashes = _hashes(transaction_ids)
        place = np.searchsorted(self._sorted_ids, hashes)
        place[place == len(self)] = 0
        found = self._order[place].astype(np.int64)
        if not len(self):
            return np.full(len(hashes), -1, np.int64)
        found[self._sorted_ids[place] != hashes] = -1
        return found


def _first(chunks: Sequence[NDArray[Any]], rows: int) -> NDArray[Any]:
    return np.concatenate(chunks)[:rows] if chunks else np.empty(0, np.int64)


def _hashes(names: Sequence[str]) -> NDArray[np.int64]:
    """Hash texts with Python's 64-bit hash, which is stable within this process."""
    return np.fromiter(map(hash, names), np.int64, len(names))


@dataclass(slots=True)
class ReplayResult:
    """Scores, alerts and rejections of the rows that were sent."""

    counter: ScoreCounter
    alerts: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Number of rejected rows by reason."""
    all_applied: bool = False
    """Whether the workers' committed offsets are past all rows that were sent."""


@dataclass(frozen=True, slots=True)
class OutputReaders:
    """Readers of the output topics, started before the first row is sent."""

    scores: TopicReader
    alerts: TopicReader
    dead_letters: TopicReader


async def collect_result(
    sent: LabelledRows,
    readers: OutputReaders,
    all_applied: Callable[[], Awaitable[bool]],
    show: Callable[[str, int, int], None],
) -> ReplayResult:
    """Wait until each row is scored or rejected, or the workers are past all rows.

    Args:
        all_applied: check whether the workers have committed all rows.
        show: receiver of the progress: activity, number of rows done, number of all rows.
    """
    result = ReplayResult(ScoreCounter(len(sent), sent.index_of))
    expected = len(sent) - sent.duplicate_ids
    moved_at, before = time.monotonic(), -1
    while True:
        published = await readers.scores.published() + await readers.dead_letters.published()
        show("scoring", min(published, expected), expected)
        if published != before:
            moved_at, before = time.monotonic(), published
        still_seconds = time.monotonic() - moved_at
        if published >= expected or still_seconds > COMMIT_SECONDS:
            result.all_applied = await all_applied()
        if result.all_applied or still_seconds > STALL_SECONDS:
            break
        await asyncio.sleep(POLL_SECONDS)
    async for records in readers.scores.to_end():
        result.counter.add(records)
        show("counting", result.counter.scored, expected)
    async for records in readers.dead_letters.to_end():
        for record in records:
            reason = dict(record.headers).get("reason", b"unknown")
            result.rejected[reason.decode(errors="replace")] += 1
    async for records in readers.alerts.to_end():  # offsets would include transaction markers
        result.alerts += len(records)
    return result


def report_rows(
    sent: LabelledRows, result: ReplayResult, skip_days: int = 0
) -> list[tuple[str, str]]:
    """Make the report as rows of name and text.

    Args:
        skip_days: days at the beginning that the measures exclude, since accounts are new then.
    """
    counter = result.counter
    flags = Counter(counter.decisions[counter.decisions > 0].tolist())
    decided = ", ".join(f"{flags[index]:,} {name}" for index, name in enumerate(DECISIONS) if index)
    rows = [
        ("scored", f"{counter.scored:,} of {len(sent):,} transactions"),
        ("not scored", _not_scored(sent, result)),
        ("scored twice", f"{counter.duplicates:,}"),
        ("flagged", f"{counter.flagged.sum():,} ({decided}); {result.alerts:,} alerts published"),
    ]
    if counter.unknown:
        rows.append(("others", f"{counter.unknown:,} scores of transactions from other senders"))
    return rows + _measures(sent, counter, skip_days)


def lost(sent: LabelledRows, result: ReplayResult) -> int:
    """Count the rows that were neither scored nor rejected and do not repeat another id."""
    accounted = result.counter.scored + result.rejected.total() + sent.duplicate_ids
    return max(0, len(sent) - accounted)


def _not_scored(sent: LabelledRows, result: ReplayResult) -> str:
    parts = [f"{count:,} rejected for {reason}" for reason, count in result.rejected.items()]
    if sent.duplicate_ids:
        parts.append(f"{sent.duplicate_ids:,} repeat another row's transaction id")
    if missing := lost(sent, result):
        parts.append(
            f"{missing:,} dropped: the accounts' states have their transaction ids already"
            if result.all_applied
            else f"{missing:,} had no score when no score came for {STALL_SECONDS:g} s: see that"
            " workers of this group are running"
        )
    return "; ".join(parts) or "0"


def _measures(sent: LabelledRows, counter: ScoreCounter, skip_days: int) -> list[tuple[str, str]]:
    """Measure the quality of the scores over the rows with a label and a score."""
    if not len(sent):
        return []
    use = (sent.labels != LABEL_UNKNOWN) & (counter.times > 0)
    use &= sent.days >= sent.days.min() + skip_days
    if not use.any():
        return [("measures", "none: no scored row has a label")]
    score, fraud, day = counter.scores[use], sent.labels[use] == 1, sent.days[use]
    flagged = counter.flagged[use]
    try:
        ap, auc = average_precision(score, fraud), auc_roc(score, fraud)
    except EvaluationError as error:
        return [("measures", f"none: {error}")]
    cards = np.unique(sent.accounts[use], return_inverse=True)[1]  # small numbers are faster
    card_precision = card_precision_at(score, fraud, cards, day.astype(np.int64), CARDS_PER_DAY)
    caught = int((flagged & fraud).sum())
    precise = f"{caught / flagged.sum():.1%} of the flagged rows are fraud" if flagged.any() else ""
    rows = [
        ("measured over", f"{use.sum():,} rows, {fraud.sum():,} frauds ({fraud.mean():.2%})"),
        ("AP", f"{ap:.4f}"),
        ("AUC", f"{auc:.4f}"),
        (f"card precision@{CARDS_PER_DAY}", f"{card_precision:.4f}"),
        ("caught", f"{caught:,} of {fraud.sum():,} frauds ({caught / fraud.sum():.1%}); {precise}"),
    ]
    for number, name in sorted(sent.scenario_names.items(), key=lambda item: item[1]):
        of_scenario = sent.scenarios[use] == number
        if of_scenario.any():
            share = flagged[of_scenario].mean()
            rows.append((f"  scenario {name}", f"{share:.1%} of {of_scenario.sum():,} flagged"))
    return rows
