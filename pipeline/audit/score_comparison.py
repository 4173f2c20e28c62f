"""Published scores against the same scores computed from the log, of one partition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.audit.account_filter import AccountFilter
from pipeline.audit.recompute import Advanced
from pipeline.audit.result import Verification
from pipeline.audit.score_reader import ScoresInStep
from pipeline.storage.account_state import RECENT_IDS


class ScoreTally:
    """Scores of one partition, compared as they are computed.

    Args:
        model: digest of the one that computes; other models' scores are not compared.
        offsets: of the transactions whose scores are compared.
        tolerance: largest difference that is none.
    """

    def __init__(self, model: str, offsets: range, tolerance: float) -> None:
        self._model = model
        self._offsets = offsets
        self._tolerance = tolerance
        self._largest = np.zeros(0, np.float32)  # by row
        # By row: compared, of other models, unverifiable, all.
        self._counts = np.zeros((4, 0), np.int64)
        self._first_difference: dict[int, int] = {}
        self._missing: list[tuple[int, int]] = []  # row and offset
        self._unexpected: list[bytes] = []

    def add(self, advanced: Advanced) -> None:
        """Compare a micro-batch's scores."""
        row, offset = advanced.row, advanced.offset
        self.make_room(int(row.max(initial=-1)) + 1)
        asked = advanced.applied & (offset >= self._offsets.start) & (offset < self._offsets.stop)
        there = np.array([score is not None for score in advanced.recorded], bool)
        is_ours = np.array(
            [s is not None and s.model == self._model for s in advanced.recorded], bool
        )
        published = np.array([0.0 if s is None else s.score for s in advanced.recorded], np.float32)
        compared = asked & is_ours & advanced.is_sure
        difference = np.where(compared, np.abs(advanced.score - published), np.float32(0))
        np.maximum.at(self._largest, row, difference)
        np.add.at(self._counts[0], row[compared], 1)
        np.add.at(self._counts[1], row[asked & there & ~is_ours], 1)
        # A transaction without a score may be a repeat of one that is in the log no longer.
        surely_missing = advanced.is_complete | (advanced.seen >= RECENT_IDS)
        missing = asked & ~there & surely_missing
        unsure = asked & ~compared & ~missing & ~(there & ~is_ours)
        np.add.at(self._counts[2], row[unsure], 1)
        np.add.at(self._counts[3], row[advanced.applied], 1)
        for i in np.flatnonzero(missing).tolist():
            self._missing.append((int(row[i]), int(offset[i])))
        for i in np.flatnonzero(difference > self._tolerance).tolist():
            self._first_difference.setdefault(int(row[i]), int(offset[i]))
        self._unexpected += [key for source, key in advanced.unexpected if source in self._offsets]

    def make_room(self, rows: int) -> None:
        """Know of so many accounts, those of which no transaction was seen included."""
        more = rows - len(self._largest)
        if more > 0:
            more = max(more, 1024, len(self._largest))
            self._largest = np.concatenate((self._largest, np.zeros(more, np.float32)))
            self._counts = np.concatenate((self._counts, np.zeros((4, more), np.int64)), axis=1)

    def first_difference(self, row: int) -> int | None:
        """The account's first offset whose score differs past the tolerance."""
        return self._first_difference.get(row)

    def largest(self, row: int) -> float | None:
        """The account's largest difference; None where no score was compared."""
        return float(self._largest[row]) if self._counts[0, row] else None

    def count(
        self,
        found: Verification,
        partition: int,
        chosen: Sequence[tuple[str, int]],
        scores: ScoresInStep,
        choice: AccountFilter,
    ) -> None:
        """Add up what was found of the chosen accounts."""
        rows = np.array([row for _, row in chosen], np.intp)
        if len(rows):
            compared, foreign, unsure, found.transactions = (
                self._counts[:, rows].sum(axis=1).tolist()
            )
            found.scores += compared
            found.foreign_model += foreign
            found.unverifiable_scores += unsure
            found.largest_score = max(found.largest_score, float(self._largest[rows].max()))
        are_chosen = set(rows.tolist())
        missing = [offset for row, offset in self._missing if row in are_chosen]
        found.missing = len(missing)
        found.first_missing = (partition, missing[0]) if missing else None
        found.unexpected = sum(choice.wants(key) for key in self._unexpected)
        conflicting = []
        for again in scores.again:
            if again.source in self._offsets and choice.wants(again.key):
                found.duplicate += not again.differs
                if again.differs:
                    conflicting.append(again.source)
        found.conflicting = len(conflicting)
        found.first_conflicting = (partition, min(conflicting)) if conflicting else None
