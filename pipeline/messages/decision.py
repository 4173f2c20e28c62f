"""From a score to a decision: approve, review or decline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.checkpoint import CheckpointThresholds
from pipeline.settings import Settings

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


def thresholds_of(settings: Settings, shipped: CheckpointThresholds) -> Thresholds:
    """The checkpoint's thresholds, each replaced by a setting where there is one."""
    review = shipped.review if settings.review_threshold is None else settings.review_threshold
    if settings.decline_threshold is None:
        return Thresholds(review, max(review, shipped.decline))
    return Thresholds(min(review, settings.decline_threshold), settings.decline_threshold)
