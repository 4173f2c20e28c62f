"""Thresholds with which about 0.2 % of the bench's payments alert.

The bench's accounts pay far more often than real ones, so that the shipped thresholds alert on a
third of its payments. No real stream does that, and an alert costs more than a score.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.results import console

REVIEW_SHARE = 0.002
DECLINE_SHARE = 0.0005


def chosen_thresholds(kind: str, scores: NDArray[np.float64]) -> dict[str, Any]:
    """Choose the settings of both thresholds by a sample of n scores, and print them.

    >>> chosen_thresholds("a ramp", np.arange(1001) / 1000)
      thresholds for a ramp: review 0.998, decline 0.9995
    {'review_threshold': 0.998, 'decline_threshold': 0.9995}
    """
    review, decline = np.quantile(scores, [1 - REVIEW_SHARE, 1 - DECLINE_SHARE]).tolist()
    console.print(f"  thresholds for {kind}: review {review:.6g}, decline {decline:.6g}")
    return {"review_threshold": review, "decline_threshold": decline}
