"""What came out of a replay: scored, missing, rejected, and how good the scores are.

Keeps about 40 bytes for each row that was sent, and nothing of its content: ids are hashes.
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
from pipeline.errors import RecurError
from pipeline.files.reader import LABEL_UNKNOWN, Part
from pipeline.messages.decision import DECISIONS
from pipeline.replay.score_counter import ScoreCounter, TopicReader
from pipeline.units import DAY_MS

ROWS_MAX = 50_000_000
"""A report of more rows would take gigabytes."""

SCENARIOS_MAX = 100
"""Kinds of fraud that are told apart."""

CARDS_PER_DAY = 100
"""Of card precision."""

STALL_SECONDS = 30.0
"""Nothing was scored for so long: the rest counts as not scored."""

COMMIT_SECONDS = 2.0
"""Nothing was scored for so long: perhaps the workers are done; commits come each second."""

LOOK_SECONDS = 0.5


class SentRows:
    """Ids, labels, accounts and days of the rows that were read, in order."""

    def __init__(self) -> None:
        self._ids: list[NDArray[np.int64]] = []
        self._accounts: list[NDArray[np.int64]] = []
        self._days: list[NDArray[np.int32]] = []
        self._labels: list[NDArray[np.int8]] = []
        self._kinds: list[NDArray[np.int8]] = []
        self._kind_of: dict[str, int] = {}
        self._rows = 0

    def add(self, part: Part) -> None:
        """Remember a part.

        Raises:
            RecurError: more than :data:`ROWS_MAX` rows.
        """
        count = len(part.transaction_ids)
        self._rows += count
        if self._rows > ROWS_MAX:
            raise RecurError(f"a report takes at most {ROWS_MAX:,} rows: use --limit, or none")
        self._ids.append(_hashes(part.transaction_ids))
        self._accounts.append(_hashes(part.account_ids))
        self._days.append((part.timestamps_ms // DAY_MS).astype(np.int32))
        labels = part.labels
        self._labels.append(np.full(count, LABEL_UNKNOWN, np.int8) if labels is None else labels)
        kinds = part.scenarios or [None] * count
        self._kinds.append(np.fromiter(map(self._kind, kinds), np.int8, count))

    def first(self, rows: int) -> Truth:
        """The truth about the first so many rows: those that were sent."""
        columns = (self._ids, self._accounts, self._days, self._labels, self._kinds)
        ids, accounts, days, labels, kinds = (_first(chunks, rows) for chunks in columns)
        names = {kind: name for name, kind in self._kind_of.items()}
        return Truth(ids, accounts, days, labels, kinds, names)

    def _kind(self, name: str | None) -> int:
        if name is None or name in ("", "0"):
            return 0
        if name not in self._kind_of and len(self._kind_of) >= SCENARIOS_MAX:
            raise RecurError(
                f"the scenario column has more than {SCENARIOS_MAX} values: it names the kind of"
                " fraud; map another column or none"
            )
        return self._kind_of.setdefault(name, len(self._kind_of) + 1)


@dataclass(slots=True)
class Truth:
    """n rows that were sent; ``kinds`` are numbers of scenarios, 0 for none."""

    ids: NDArray[np.int64]
    accounts: NDArray[np.int64]
    days: NDArray[np.int32]
    labels: NDArray[np.int8]
    kinds: NDArray[np.int8]
    kind_names: dict[int, str]
    _order: NDArray[np.intp] = field(init=False)
    _sorted_ids: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self._order = np.argsort(self.ids, kind="stable")
        self._sorted_ids = self.ids[self._order]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def repeated_ids(self) -> int:
        """Rows whose transaction id an earlier row has; the worker drops or scores them."""
        return int((np.diff(self._sorted_ids) == 0).sum())

    def index_of(self, transaction_ids: Sequence[str]) -> NDArray[np.int64]:
        """int64[n]: the row of each id, the first one where an id repeats; -1 for none."""
        wanted = _hashes(transaction_ids)
        place = np.searchsorted(self._sorted_ids, wanted)
        place[place == len(self)] = 0
        found = self._order[place].astype(np.int64)
        if not len(self):
            return np.full(len(wanted), -1, np.int64)
        found[self._sorted_ids[place] != wanted] = -1
        return found


def _first(chunks: Sequence[NDArray[Any]], rows: int) -> NDArray[Any]:
    return np.concatenate(chunks)[:rows] if chunks else np.empty(0, np.int64)


def _hashes(names: Sequence[str]) -> NDArray[np.int64]:
    """Python's own 64-bit hashes: the same within a process, which is all that is needed."""
    return np.fromiter(map(hash, names), np.int64, len(names))


@dataclass(slots=True)
class Outcome:
    """Everything that came out until nothing more came."""

    tally: ScoreCounter
    alerts: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """By reason."""
    all_applied: bool = False
    """The workers' committed offsets are past every row that was sent."""


@dataclass(frozen=True, slots=True)
class Readers:
    """Of what comes out; there before the first row is sent."""

    scores: TopicReader
    alerts: TopicReader
    dead_letters: TopicReader


async def gather_outcome(
    truth: Truth,
    readers: Readers,
    all_applied: Callable[[], Awaitable[bool]],
    show: Callable[[str, int, int], None],
) -> Outcome:
    """Wait until every row is scored or rejected, or the workers are past all of them.

    Args:
        all_applied: whether the workers have committed every row.
        show: called with what is going on, how many rows are done, and of how many.
    """
    outcome = Outcome(ScoreCounter(len(truth), truth.index_of))
    expected = len(truth) - truth.repeated_ids
    moved_at, before = time.monotonic(), -1
    while True:
        published = await readers.scores.published() + await readers.dead_letters.published()
        show("scoring", min(published, expected), expected)
        if published != before:
            moved_at, before = time.monotonic(), published
        still_seconds = time.monotonic() - moved_at
        if published >= expected or still_seconds > COMMIT_SECONDS:
            outcome.all_applied = await all_applied()
        if outcome.all_applied or still_seconds > STALL_SECONDS:
            break
        await asyncio.sleep(LOOK_SECONDS)
    async for records in readers.scores.to_end():
        outcome.tally.add(records)
        show("counting", outcome.tally.scored, expected)
    async for records in readers.dead_letters.to_end():
        for record in records:
            reason = dict(record.headers).get("reason", b"unknown")
            outcome.rejected[reason.decode(errors="replace")] += 1
    async for records in readers.alerts.to_end():  # offsets count markers of transactions, too
        outcome.alerts += len(records)
    return outcome


def report_rows(truth: Truth, outcome: Outcome, skip_days: int = 0) -> list[tuple[str, str]]:
    """The report, as rows of name and text.

    Args:
        skip_days: days at the beginning that the measures leave out: accounts are new then.
    """
    tally = outcome.tally
    flags = Counter(tally.decisions[tally.decisions > 0].tolist())
    decided = ", ".join(f"{flags[index]:,} {name}" for index, name in enumerate(DECISIONS) if index)
    rows = [
        ("scored", f"{tally.scored:,} of {len(truth):,} transactions"),
        ("not scored", _not_scored(truth, outcome)),
        ("scored twice", f"{tally.repeated:,}"),
        ("flagged", f"{tally.flagged.sum():,} ({decided}); {outcome.alerts:,} alerts published"),
    ]
    if tally.strangers:
        rows.append(("others", f"{tally.strangers:,} scores of transactions not sent here"))
    return rows + _measures(truth, tally, skip_days)


def lost(truth: Truth, outcome: Outcome) -> int:
    """Rows that were neither scored nor rejected nor repeats of another row."""
    accounted = outcome.tally.scored + outcome.rejected.total() + truth.repeated_ids
    return max(0, len(truth) - accounted)


def _not_scored(truth: Truth, outcome: Outcome) -> str:
    parts = [f"{count:,} rejected for {reason}" for reason, count in outcome.rejected.items()]
    if truth.repeated_ids:
        parts.append(f"{truth.repeated_ids:,} repeat another row's transaction id")
    if missing := lost(truth, outcome):
        parts.append(
            f"{missing:,} dropped: the accounts' states know their transaction ids"
            if outcome.all_applied
            else f"{missing:,} had no score after {STALL_SECONDS:g} s without any: see that workers"
            " of this group are running"
        )
    return "; ".join(parts) or "0"


def _measures(truth: Truth, tally: ScoreCounter, skip_days: int) -> list[tuple[str, str]]:
    """How good the scores are, over the rows with a label and a score."""
    if not len(truth):
        return []
    use = (truth.labels != LABEL_UNKNOWN) & (tally.times > 0)
    use &= truth.days >= truth.days.min() + skip_days
    if not use.any():
        return [("measures", "none: no scored row has a label")]
    score, fraud, day = tally.scores[use], truth.labels[use] == 1, truth.days[use]
    flagged = tally.flagged[use]
    try:
        ap, auc = average_precision(score, fraud), auc_roc(score, fraud)
    except EvaluationError as error:
        return [("measures", f"none: {error}")]
    cards = np.unique(truth.accounts[use], return_inverse=True)[1]  # small numbers are quicker
    card_precision = card_precision_at(score, fraud, cards, day.astype(np.int64), CARDS_PER_DAY)
    caught = int((flagged & fraud).sum())
    precise = f"{caught / flagged.sum():.1%} of what is flagged is fraud" if flagged.any() else ""
    rows = [
        ("measured over", f"{use.sum():,} rows, {fraud.sum():,} frauds ({fraud.mean():.2%})"),
        ("AP", f"{ap:.4f}"),
        ("AUC", f"{auc:.4f}"),
        (f"card precision@{CARDS_PER_DAY}", f"{card_precision:.4f}"),
        ("caught", f"{caught:,} of {fraud.sum():,} frauds ({caught / fraud.sum():.1%}); {precise}"),
    ]
    for kind, name in sorted(truth.kind_names.items(), key=lambda item: item[1]):
        of_kind = truth.kinds[use] == kind
        if of_kind.any():
            share = flagged[of_kind].mean()
            rows.append((f"  scenario {name}", f"{share:.1%} of {of_kind.sum():,} flagged"))
    return rows
