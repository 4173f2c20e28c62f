"""Decisions on scores: approve, review or decline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.checkpoint import CheckpointThresholds
from pipeline.settings import Settings

Decision = Literal["approve", "review", "decline"]
DECISIONS = ("approve", "review", "decline")
"""All decisions, in the order of their scores."""

APPROVE = DECISIONS[0]


@dataclass(frozen=True)
class DecisionThresholds:
    """The lowest scores of a review and of a decline, in [0, 1].

    >>> thresholds = DecisionThresholds(review=0.5, decline=0.9)
    >>> [DECISIONS[i] for i in thresholds.decide(np.array([0.1, 0.5, 0.95], np.float32))]
    ['approve', 'review', 'decline']
    """

    review: float
    decline: float

    def decide(self, scores: NDArray[np.float32]) -> NDArray[np.intp]:
        """Decide each score: indexes into :data:`DECISIONS`, intp[n]."""
        limits = np.array((self.review, self.decline), np.float32)
        return limits.searchsorted(scores, side="right")


def thresholds_of(settings: Settings, shipped: CheckpointThresholds) -> DecisionThresholds:
    """Take the checkpoint's thresholds; a setting replaces each that it gives."""
    review = shipped.review if settings.review_threshold is None else settings.review_threshold
    if settings.decline_threshold is None:
        return DecisionThresholds(review, max(review, shipped.decline))
    return DecisionThresholds(min(review, settings.decline_threshold), settings.decline_threshold)
