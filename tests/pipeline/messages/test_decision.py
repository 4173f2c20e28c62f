"""Decisions at the edges of the thresholds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.messages.decision import DECISIONS, DecisionThresholds

probabilities = st.floats(0, 1, width=32)


def decisions(thresholds: DecisionThresholds, *scores: float) -> list[str]:
    return [DECISIONS[i] for i in thresholds.decide(np.array(scores, np.float32))]


@given(probabilities, probabilities, probabilities)
def test_a_score_at_or_over_a_threshold_is_decided_by_it(a: float, b: float, score: float) -> None:
    review, decline = sorted((a, b))
    expected = "decline" if score >= decline else "review" if score >= review else "approve"

    assert decisions(DecisionThresholds(review, decline), score) == [expected]


@pytest.mark.parametrize("review", [0.1, 0.3, 0.7])
def test_a_score_that_prints_like_the_threshold_is_at_it_although_it_has_32_bits(
    review: float,
) -> None:
    below = float(np.nextafter(np.float32(review), np.float32(0)))

    assert decisions(DecisionThresholds(review, 0.9), below, review) == ["approve", "review"]


@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [
        (DecisionThresholds(0.0, 0.0), ["decline", "decline", "decline"]),
        (DecisionThresholds(0.0, 1.0), ["review", "review", "decline"]),
        (DecisionThresholds(0.5, 0.5), ["approve", "decline", "decline"]),
        (DecisionThresholds(1.0, 1.0), ["approve", "approve", "decline"]),
    ],
)
def test_thresholds_at_the_ends_of_the_range_or_on_each_other_decide(
    thresholds: DecisionThresholds, expected: list[str]
) -> None:
    assert decisions(thresholds, 0.0, 0.5, 1.0) == expected


def test_no_scores_are_no_decisions() -> None:
    assert decisions(DecisionThresholds(0.5, 0.9)) == []
