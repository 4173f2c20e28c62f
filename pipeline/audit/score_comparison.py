"""Comparison of one partition's published scores with scores recomputed from the log."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.audit.account_filter import AccountFilter
from pipeline.audit.recompute import RecomputedBatch
from pipeline.audit.result import Verification
from pipeline.audit.score_reader import ScoreReader
from pipeline.storage.account_state import RECENT_IDS


class ScoreComparison:
    """Comparison of one partition's scores, one micro-batch after the other.

    Args:
        model: digest of the model; scores of other models are not compared.
        offsets: offsets of the transactions whose scores are compared.
        tolerance: scores that differ by at most this count as equal.
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

    def add(self, batch: RecomputedBatch) -> None:
        """Compare a micro-batch's scores."""
        row, offset = batch.row, batch.offset
        self.make_room(int(row.max(initial=-1)) + 1)
        is_due = batch.applied & (offset >= self._offsets.start) & (offset < self._offsets.stop)
        exists = np.array([score is not None for score in batch.recorded], bool)
        is_ours = np.array([s is not None and s.model == self._model for s in batch.recorded], bool)
        published = np.array([0.0 if s is None else s.score for s in batch.recorded], np.float32)
        compared = is_due & is_ours & batch.is_sure
        difference = np.where(compared, np.abs(batch.score - published), np.float32(0))
        np.maximum.at(self._largest, row, difference)
        np.add.at(self._counts[0], row[compared], 1)
        np.add.at(self._counts[1], row[is_due & exists & ~is_ours], 1)
        # Without a score, a transaction may repeat one that the log no longer holds.
        surely_missing = batch.is_complete | (batch.seen >= RECENT_IDS)
        missing = is_due & ~exists & surely_missing
        unverifiable = is_due & ~compared & ~missing & ~(exists & ~is_ours)
        np.add.at(self._counts[2], row[unverifiable], 1)
        np.add.at(self._counts[3], row[batch.applied], 1)
        for i in np.flatnonzero(missing).tolist():
            self._missing.append((int(row[i]), int(offset[i])))
        for i in np.flatnonzero(difference > self._tolerance).tolist():
            self._first_difference.setdefault(int(row[i]), int(offset[i]))
        self._unexpected += [key for source, key in batch.unexpected if source in self._offsets]

    def make_room(self, rows: int) -> None:
        """Extend the arrays to this number of accounts."""
        more = rows - len(self._largest)
        if more > 0:
            more = max(more, 1024, len(self._largest))
            self._largest = np.concatenate((self._largest, np.zeros(more, np.float32)))
            self._counts = np.concatenate((self._counts, np.zeros((4, more), np.int64)), axis=1)

    def first_difference(self, row: int) -> int | None:
        """Return the account's first offset whose score differs by more than the tolerance."""
        return self._first_difference.get(row)

    def largest(self, row: int) -> float | None:
        """Return the account's largest difference; None if no score was compared."""
        return float(self._largest[row]) if self._counts[0, row] else None

    def count(
        self,
        found: Verification,
        partition: int,
        chosen: Sequence[tuple[str, int]],
        scores: ScoreReader,
        account_filter: AccountFilter,
    ) -> None:
        """Add the results of the chosen accounts to the verification."""
        rows = np.array([row for _, row in chosen], np.intp)
        if len(rows):
            compared, other_models, unverifiable, found.transactions = (
                self._counts[:, rows].sum(axis=1).tolist()
            )
            found.scores += compared
            found.foreign_model += other_models
            found.unverifiable_scores += unverifiable
            found.largest_score = max(found.largest_score, float(self._largest[rows].max()))
        are_chosen = set(rows.tolist())
        missing = [offset for row, offset in self._missing if row in are_chosen]
        found.missing = len(missing)
        found.first_missing = (partition, missing[0]) if missing else None
        found.unexpected = sum(account_filter.selects(key) for key in self._unexpected)
        conflicting = []
        for further in scores.further:
            if further.source in self._offsets and account_filter.selects(further.key):
                found.duplicate += not further.differs
                if further.differs:
                    conflicting.append(further.source)
        found.conflicting = len(conflicting)
        found.first_conflicting = (partition, min(conflicting)) if conflicting else None
