"""Metrics, compared with those of scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from model.metrics import auc_roc, average_precision, brier_score, reliability

Case = tuple[NDArray[np.float32], NDArray[np.bool_]]


@pytest.fixture(params=["continuous", "ties", "rare fraud", "reversed"])
def case(request: pytest.FixtureRequest) -> Case:
    """Draw scores and truth of several kinds."""
    rng = np.random.default_rng(3)
    scores = rng.beta(0.4, 4.0, 5_000).astype(np.float32)
    is_fraud = rng.random(len(scores)) < scores
    if request.param == "ties":
        scores = np.round(scores, 1)
    elif request.param == "rare fraud":
        is_fraud &= rng.random(len(scores)) < 0.01
    elif request.param == "reversed":
        scores = 1 - scores
    return scores, is_fraud


def test_auc_is_that_of_scikit_learn(case: Case) -> None:
    scores, is_fraud = case
    assert auc_roc(scores, is_fraud) == pytest.approx(roc_auc_score(is_fraud, scores), abs=1e-12)


def test_average_precision_is_that_of_scikit_learn(case: Case) -> None:
    scores, is_fraud = case
    expected = average_precision_score(is_fraud, scores)
    assert average_precision(scores, is_fraud) == pytest.approx(expected, abs=1e-12)


def test_the_brier_score_is_that_of_scikit_learn(case: Case) -> None:
    scores, is_fraud = case
    expected = brier_score_loss(is_fraud, scores.astype(np.float64))
    assert brier_score(scores, is_fraud) == pytest.approx(expected, abs=1e-12)


def test_the_calibration_curve_is_that_of_scikit_learn(case: Case) -> None:
    scores, is_fraud = case
    off_edges = scores.astype(np.float64) * 0.99 + 0.003  # the two put a score on an edge apart
    bins = reliability(off_edges, is_fraud)
    fraud_share, mean_score = calibration_curve(is_fraud, off_edges, n_bins=15)
    np.testing.assert_allclose(bins.fraud_share, fraud_share, atol=1e-12)
    np.testing.assert_allclose(bins.mean_score, mean_score, atol=1e-12)
