"""Measures against cases worked out by hand, and against slow definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.evaluation import (
    OPERATING_POINTS_MAX,
    EvaluationError,
    auc_roc,
    average_precision,
    card_precision_at,
    operating_points,
    precision_at,
    recall_at_false_positive_rate,
    recall_by_scenario,
    threshold_at_false_positive_rate,
    threshold_at_precision,
)

Case = tuple[NDArray[np.float64], NDArray[np.bool_]]

SCORES = np.array([0.9, 0.8, 0.8, 0.6, 0.4, 0.2])
FRAUD = np.array([True, True, False, False, True, False])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Both classes, with ties."""
    size = draw(st.integers(2, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    is_fraud = rng.random(size) < 0.4
    is_fraud[:2] = True, False
    return rng.integers(0, draw(st.integers(1, 12)), size) / 7, is_fraud


@given(cases())
def test_auc_is_the_share_of_pairs_in_the_right_order(case: Case) -> None:
    scores, is_fraud = case
    pairs = scores[is_fraud][:, None] - scores[~is_fraud][None, :]
    assert auc_roc(scores, is_fraud) == pytest.approx(((pairs > 0) + (pairs == 0) / 2).mean())


@given(cases())
def test_average_precision_is_the_sum_over_thresholds(case: Case) -> None:
    scores, is_fraud = case
    expected, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        over = scores >= threshold
        recall = is_fraud[over].sum() / is_fraud.sum()
        expected += (recall - recall_before) * is_fraud[over].mean()
        recall_before = recall
    assert average_precision(scores, is_fraud) == pytest.approx(expected)


def test_measures_of_a_worked_case() -> None:
    # Pairs fraud/genuine in order: 3 + 2.5 + 1 of 9.
    assert auc_roc(SCORES, FRAUD) == pytest.approx(6.5 / 9)
    # Thresholds .9 (1/1), .8 (2/3), .4 (3/5), a third of the recall each.
    assert average_precision(SCORES, FRAUD) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)


def test_perfect_and_useless_scores_have_their_known_values() -> None:
    truth = np.array([True, False, False, False])
    assert average_precision(truth.astype(float), truth) == 1.0
    assert auc_roc(truth.astype(float), truth) == 1.0
    assert average_precision(np.zeros(4), truth) == 0.25
    assert auc_roc(np.zeros(4), truth) == 0.5


def test_a_threshold_keeps_its_share_of_false_positives_and_is_the_lowest_that_does() -> None:
    assert threshold_at_false_positive_rate(SCORES, FRAUD, 0.0) == 0.9
    assert threshold_at_false_positive_rate(SCORES, FRAUD, 0.34) == 0.8
    assert threshold_at_false_positive_rate(SCORES, FRAUD, 0.7) == 0.4
    assert threshold_at_false_positive_rate(SCORES, FRAUD, 1.0) == 0.2
    assert threshold_at_false_positive_rate(SCORES, ~FRAUD, 0.1) == math.inf
    assert recall_at_false_positive_rate(SCORES, FRAUD, 0.34) == pytest.approx(2 / 3)


def test_a_threshold_by_precision_is_the_lowest_with_enough_alerts() -> None:
    assert threshold_at_precision(SCORES, FRAUD, 0.9) == 0.9
    assert threshold_at_precision(SCORES, FRAUD, 0.6) == 0.4
    assert threshold_at_precision(SCORES, FRAUD, 0.9, alerts_min=2) == math.inf


def test_precision_at_k_is_the_mean_over_days_and_shares_ties() -> None:
    day = np.array([0, 0, 0, 1, 1, 1])
    # Day 0: .9 and one of two .8 (half a fraud): 1.5 / 2. Day 1: .6 and .4: 1 / 2.
    assert precision_at(SCORES, FRAUD, day, k=2) == pytest.approx((0.75 + 0.5) / 2)
    assert precision_at(SCORES, FRAUD, day, k=10) == pytest.approx((0.2 + 0.1) / 2)


def test_card_precision_ranks_cards_by_day_and_drops_those_found_or_known() -> None:
    score = np.array([0.9, 0.1, 0.8, 0.7, 0.95, 0.6, 0.5, 0.4])
    card = np.array([1, 1, 2, 3, 1, 2, 3, 4])
    fraud = np.array([False, True, False, True, True, True, False, True])
    day = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    # Day 0: cards 1 (.9, has a fraud) and 2: 1/2; card 1 leaves. Day 1: 2 (fraud) and 3: 1/2.
    assert card_precision_at(score, fraud, card, day, k=2) == pytest.approx(0.5)
    # Without card 2: day 0 cards 1 and 3, both found; day 1 only card 4 is left, of k = 2.
    known = np.array([2])
    assert card_precision_at(score, fraud, card, day, 2, known) == pytest.approx((1 + 0.5) / 2)


def test_recall_is_given_for_each_scenario() -> None:
    scenario = np.array([1, 3, 0, 0, 3, 0], np.int8)
    assert recall_by_scenario(SCORES, scenario, 0.8) == {1: 1.0, 3: 0.5}


@pytest.mark.parametrize("truth", [True, False])
def test_one_class_only_is_refused(truth: bool) -> None:
    with pytest.raises(EvaluationError, match="both must be there"):
        auc_roc(SCORES, np.full(6, truth))
    with pytest.raises(EvaluationError, match="both must be there"):
        average_precision(SCORES, np.full(6, truth))


def test_operating_points_say_what_each_threshold_catches_and_costs() -> None:
    rng = np.random.default_rng(0)
    is_fraud = rng.random(20_000) < 0.01
    scores = np.round(rng.normal(is_fraud * 2.0, 1.0), 2)  # many ties
    amount = rng.gamma(2.0, 30.0, len(scores))

    points = operating_points(scores, is_fraud, amount, days=4)

    assert len(points) <= OPERATING_POINTS_MAX
    thresholds = [row[0] for row in points]
    assert thresholds == sorted(set(thresholds), reverse=True)
    assert thresholds[-1] == scores.min()
    assert np.diff([row[2] for row in points]).max() < 0.03, "no wide gaps in recall"
    for threshold, alerts, recall, rate, precision, caught, flagged in points:
        over = scores >= threshold
        assert alerts == over.sum() / 4
        assert recall == pytest.approx(over[is_fraud].mean())
        assert rate == pytest.approx(over[~is_fraud].mean())
        assert precision == pytest.approx(is_fraud[over].mean())
        assert caught == pytest.approx(amount[over & is_fraud].sum() / 4)
        assert flagged == pytest.approx(amount[over & ~is_fraud].sum() / 4)
