"""From a score to a decision: approve, review or decline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DECISIONS = ("approve", "review", "decline")
"""In the order of their scores."""


@dataclass(frozen=True)
class Thresholds:
    """Scores from which on a transaction is reviewed or declined, in [0, 1].

    >>> thresholds = Thresholds(review=0.5, decline=0.9)
    >>> [DECISIONS[i] for i in thresholds.decide(np.array([0.1, 0.5, 0.95], np.float32))]
    ['approve', 'review', 'decline']
    """

    review: float
    decline: float

    def decide(self, scores: NDArray[np.float32]) -> NDArray[np.intp]:
        """Index into :data:`DECISIONS` for each score, intp[n]."""
        return np.searchsorted(
            np.array([self.review, self.decline], np.float32), scores, side="right"
        )
