"""CheckpointThresholds from the validation days, and metrics of the held-out days."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model import metrics as evaluation
from model.checkpoint import CheckpointThresholds
from model.data.dataset import Dataset
from model.features.account import Float32
from model.training.loop import LabelledLog
from model.training.settings import TrainingSettings
from model.training.split import Split

ALERTS_MIN = 20
"""Smallest number of alerts on which a precision is measured."""


def labelled_rows(log: LabelledLog, begin: int, end: int) -> NDArray[np.intp]:
    """Return the rows with a known label on the days ``begin`` up to, but not, ``end``."""
    first, last = np.searchsorted(log.day, [begin, end])
    return np.asarray(np.flatnonzero(log.is_labelled[first:last]) + first)


def choose_thresholds(
    log: LabelledLog, scores: Float32, split: Split, settings: TrainingSettings
) -> CheckpointThresholds:
    """Choose the thresholds on the validation days.

    The review threshold is the lowest score at which at most ``review_false_positive_rate`` of
    the legitimate transactions are reviewed or declined. The decline threshold is the lowest
    score, not below the review threshold, at which at least ``decline_precision`` of the declined
    transactions are fraud. It is 1 if no score reaches that precision.
    """
    rows = labelled_rows(log, split.validation, split.gap)
    scored, is_fraud = scores[rows], log.is_fraud[rows]
    review = evaluation.threshold_at_false_positive_rate(
        scored, is_fraud, settings.review_false_positive_rate
    )
    decline = evaluation.threshold_at_precision(
        scored, is_fraud, settings.decline_precision, ALERTS_MIN
    )
    review = min(review, 1.0)
    return CheckpointThresholds(review=review, decline=max(review, min(decline, 1.0)))


def validation_operating_points(
    dataset: Dataset, scores: Float32, split: Split
) -> list[list[float]]:
    """Measure each threshold on the validation days (:func:`model.metrics.operating_points`)."""
    rows = labelled_rows(dataset, split.validation, split.gap)
    return evaluation.operating_points(
        scores[rows],
        dataset.is_fraud[rows],
        np.asarray(dataset.amount[rows]),
        split.gap - split.validation,
    )


def validation_counts(dataset: Dataset, split: Split) -> dict[str, float]:
    """Count days, transactions, frauds and amounts of the validation days."""
    rows = labelled_rows(dataset, split.validation, split.gap)
    is_fraud, amount = dataset.is_fraud[rows], np.asarray(dataset.amount[rows])
    days = split.gap - split.validation
    return {
        "days": float(days),
        "transactions": float(len(rows)),
        "frauds": float(is_fraud.sum()),
        "fraud_amount_per_day": float(amount[is_fraud].sum() / days),
        "legitimate_amount_per_day": float(amount[~is_fraud].sum() / days),
    }


def measure_held_out(
    log: Dataset, scores: Float32, split: Split, thresholds: CheckpointThresholds
) -> dict[str, float]:
    """Measure the scores on the labelled transactions of the held-out days.

    Card precision leaves out the cards that had a fraud in the validation days.

    Returns:
        The metrics by name, in the order in which they are shown.
    """
    validated = labelled_rows(log, split.validation, split.gap)
    known = np.unique(log.account[validated][log.is_fraud[validated]]).astype(np.int64)
    held = labelled_rows(log, split.held_out, split.end)
    score, is_fraud, day = scores[held], log.is_fraud[held], log.day[held]
    reviewed = score >= thresholds.review
    declined = score >= thresholds.decline
    days = split.end - split.held_out
    account = log.account[held].astype(np.int64)
    metrics = {
        "held_out_days": float(days),
        "transactions": float(len(score)),
        "frauds": float(is_fraud.sum()),
        "average_precision": evaluation.average_precision(score, is_fraud),
        "auc_roc": evaluation.auc_roc(score, is_fraud),
        "card_precision_at_100": evaluation.card_precision_at(
            score, is_fraud, account, day, 100, known
        ),
        "precision_at_100": evaluation.precision_at(score, is_fraud, day, 100),
        "recall_at_fpr_0.001": evaluation.recall_at_false_positive_rate(score, is_fraud, 0.001),
        "recall_at_fpr_0.01": evaluation.recall_at_false_positive_rate(score, is_fraud, 0.01),
        "calibration_error": evaluation.expected_calibration_error(score, is_fraud),
        "brier_score": evaluation.brier_score(score, is_fraud),
        "review_alerts_per_day": float(reviewed.sum() / days),
        "review_recall": float(reviewed[is_fraud].mean()),
        "review_false_positive_rate": float(reviewed[~is_fraud].mean()),
        "declines_per_day": float(declined.sum() / days),
        "decline_recall": float(declined[is_fraud].mean()),
    }
    if reviewed.any():
        metrics["review_precision"] = float(is_fraud[reviewed].mean())
    if declined.any():
        metrics["decline_precision"] = float(is_fraud[declined].mean())
    recalls = evaluation.recall_by_scenario(score, log.scenario[held], thresholds.review)
    return metrics | {f"review_recall_scenario_{s}": r for s, r in recalls.items()}
