"""Metrics, compared with cases worked out by hand and with slow definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.metrics import (
    EvaluationError,
    auc_roc,
    average_precision,
    brier_score,
    card_precision_at,
    expected_calibration_error,
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
    """Draw scores with ties, and both classes."""
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
    # Pairs fraud/legitimate in order: 3 + 2.5 + 1 of 9.
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


def test_calibration_error_and_brier_score_match_their_definitions() -> None:
    rng = np.random.default_rng(3)
    scores = rng.random(5000).astype(np.float32) ** 3
    is_fraud = rng.random(5000) < scores**1.2
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (scores >= low) & (scores < low + 1 / 15)
        expected += inside.mean() * abs(scores[inside].mean() - is_fraud[inside].mean())
    assert expected_calibration_error(scores, is_fraud) == pytest.approx(expected, abs=1e-6)
    assert brier_score(scores, is_fraud) == pytest.approx(((scores - is_fraud) ** 2).mean())


def test_true_probabilities_are_calibrated_and_a_score_of_1_has_a_bin() -> None:
    truth = np.array([True, False, True])
    assert expected_calibration_error(truth.astype(np.float64), truth) == 0
    assert brier_score(truth.astype(np.float64), truth) == 0
    for measure in (expected_calibration_error, brier_score):
        with pytest.raises(EvaluationError, match="no transactions"):
            measure(np.array([]), np.array([], np.bool_))


def test_operating_points_count_the_alerts_of_each_threshold() -> None:
    rng = np.random.default_rng(5)
    is_fraud = rng.random(3000) < 0.05
    normal = rng.normal(0.2 + 0.4 * is_fraud, 0.15)
    scores = np.asarray(np.round(np.clip(normal, 0, 1), 3), np.float64)  # with ties
    amount = rng.gamma(2.0, 30.0, 3000)

    points = operating_points(scores, is_fraud, amount, days=14.0, points_max=50)

    assert 20 < len(points) <= 50
    assert [p[0] for p in points] == sorted({p[0] for p in points}, reverse=True)
    assert points[-1][1:5] == pytest.approx([3000 / 14, 1, 1, is_fraud.mean()], rel=1e-5)
    for threshold, alerts, recall, false_positives, precision, caught, flagged in points:
        over = scores >= threshold
        assert alerts == pytest.approx(over.sum() / 14, rel=1e-5)
        assert recall == pytest.approx(over[is_fraud].mean(), rel=1e-5)
        assert false_positives == pytest.approx(over[~is_fraud].mean(), rel=1e-5)
        assert precision == pytest.approx(is_fraud[over].mean(), rel=1e-5)
        assert caught == pytest.approx(amount[over & is_fraud].sum() / 14, rel=1e-5)
        assert flagged == pytest.approx(amount[over & ~is_fraud].sum() / 14, rel=1e-5)


def test_operating_points_of_one_class_or_no_time_are_refused() -> None:
    with pytest.raises(EvaluationError, match="0 frauds"):
        operating_points(SCORES, np.zeros(6, np.bool_), SCORES.astype(np.float64), 1.0)
    with pytest.raises(EvaluationError, match="days"):
        operating_points(SCORES, FRAUD, SCORES, 0.0)
