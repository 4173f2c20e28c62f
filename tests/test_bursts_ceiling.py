"""The ceilings on bursts: the filter is calibrated, and no monotone score is over the free one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import isotonic_regression
from scipy.special import ndtr

from benchmarks.bursts import CATEGORIES, Habits
from benchmarks.bursts_ceiling import (
    Float64,
    Payments,
    ceilings,
    log_ratio,
    monotone_log_ratio,
    usual_amounts,
)
from model import metrics

BIN_EDGES = (0.0, 0.01, 0.5, 0.95, 1.01)


@pytest.fixture(scope="module")
def payments() -> Payments:
    return Payments.generated(accounts=60, count=40_000, days=300, bursts=240, seed=5)


@pytest.fixture(scope="module")
def scores(payments: Payments) -> tuple[Float64, Float64]:
    free, monotone, _ = ceilings(payments)
    return free, monotone


def _surprises(log_odds: Float64, is_fraud: np.ndarray) -> list[float]:
    """Return how many deviations the frauds of each bin are off their expected number."""
    probability = 1 / (1 + np.exp(-np.clip(log_odds, -500, 500)))
    found = []
    for low, high in pairwise(BIN_EDGES):
        here = (probability >= low) & (probability < high)
        expected = probability[here]
        deviation = np.sqrt((expected * (1 - expected)).sum())
        found.append((is_fraud[here].sum() - expected.sum()) / deviation)
    return found


def test_the_filters_probabilities_are_the_observed_rates(
    payments: Payments, scores: tuple[Float64, Float64]
) -> None:
    assert np.abs(_surprises(scores[0], payments.is_fraud)).max() < 3.0
    assert np.abs(_surprises(scores[0] + 1.0, payments.is_fraud)).max() > 3.0


def test_the_monotone_probabilities_are_the_observed_rates(
    payments: Payments, scores: tuple[Float64, Float64]
) -> None:
    assert np.abs(_surprises(scores[1], payments.is_fraud)).max() < 3.0


def test_the_monotone_ceiling_is_not_over_the_free_one(
    payments: Payments, scores: tuple[Float64, Float64]
) -> None:
    free, monotone = (metrics.average_precision(s, payments.is_fraud) for s in scores)
    assert 0.9 < monotone < free


def test_the_monotone_ratio_is_the_isotonic_regression_over_the_usual_amount() -> None:
    usual, spending, steps = 60.0, 1.2, 20_000
    edges = np.geomspace(usual, 10_000, steps + 1)
    middle = np.sqrt(edges[1:] * edges[:-1])
    account = np.zeros(steps, np.int64)
    for place, (_, _, median, spread, _, mean, deviation) in enumerate(CATEGORIES):
        thief = np.diff(ndtr((edges - mean) / deviation))
        owner = np.diff(ndtr(np.log(edges / (median * spending)) / spread))
        some = thief + owner > 1e-12
        share = isotonic_regression(
            (thief / np.maximum(thief + owner, 1e-300))[some], weights=(thief + owner)[some]
        ).x
        one = Payments(
            account,
            account,
            np.full(steps, place),
            middle,
            account > 0,
            Habits(np.ones((1, 14)), np.ones(1), np.array([spending])),
            1,
            0.0,
        )
        found = 1 / (1 + np.exp(-monotone_log_ratio(one, np.full(steps, usual))[some]))
        assert np.abs(found - share).max() < 0.02, CATEGORIES[place][0]


def test_at_most_the_usual_amount_the_ratio_is_free(payments: Payments) -> None:
    usual = usual_amounts(payments, np.arange(len(payments.amount)) < 20_000)
    free = log_ratio(payments.amount, payments.category, payments.spending)
    monotone = monotone_log_ratio(payments, usual)
    below = payments.amount <= usual
    assert below.any()
    assert np.array_equal(monotone[below], free[below])
    assert (monotone != free)[~below].any()
