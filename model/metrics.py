"""Metrics of scores: ranking, calibration, and results within a review budget.

They need NumPy only. ``scores`` [N] may be any numbers; a higher one is more suspicious.
``is_fraud`` [N] is the truth. No metric depends on the order of transactions with equal scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32] | NDArray[np.float64]
Truth = NDArray[np.bool_]
Whole = NDArray[np.int64] | NDArray[np.int32]


class EvaluationError(ValueError):
    """A metric is not defined for these transactions; the message says why."""


def auc_roc(scores: Scores, is_fraud: Truth) -> float:
    """Return the probability that a fraud scores above a legitimate transaction; ties count half.

    Raises:
        EvaluationError: one class only.

    >>> auc_roc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    0.75
    """
    false, true = _cumulated(scores, is_fraud)
    frauds, legitimate = _both_classes(true, false)
    area = (np.diff(false) * (true[1:] + true[:-1]) / 2).sum()  # trapezoids: ties count half
    return float(area / (frauds * legitimate))


def average_precision(scores: Scores, is_fraud: Truth) -> float:
    """Return the area under the precision-recall curve: the sum of precision x recall gained.

    Raises:
        EvaluationError: one class only.

    >>> round(average_precision(
    ...     np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])), 4)
    0.8333
    """
    false, true = _cumulated(scores, is_fraud)
    frauds, _ = _both_classes(true, false)
    precision = true[1:] / (true[1:] + false[1:])
    return float((np.diff(true) * precision).sum() / frauds)


def threshold_at_false_positive_rate(scores: Scores, is_fraud: Truth, rate: float) -> float:
    """Return the lowest threshold that at most ``rate`` of the legitimate transactions reach.

    It is one of the scores, or infinity if too many reach even the highest one.

    Raises:
        EvaluationError: one class only.
    """
    thresholds = _distinct_descending(scores)
    false, true = _cumulated(scores, is_fraud)
    _, legitimate = _both_classes(true, false)
    allowed = np.flatnonzero(false[1:] <= rate * legitimate)
    return float(thresholds[allowed[-1]]) if len(allowed) else float("inf")


def threshold_at_precision(
    scores: Scores, is_fraud: Truth, precision: float, alerts_min: int = 1
) -> float:
    """Return the lowest threshold at which the share of fraud is at least ``precision``.

    Args:
        scores: [N].
        is_fraud: [N].
        precision: the least share of fraud among the alerts.
        alerts_min: fewest transactions at or over the threshold; with fewer the share is chance.

    Returns:
        One of the scores; infinity if none fits.
    """
    thresholds = _distinct_descending(scores)
    false, true = _cumulated(scores, is_fraud)
    alerts = (true + false)[1:]
    enough = np.flatnonzero((true[1:] >= precision * alerts) & (alerts >= alerts_min))
    return float(thresholds[enough[-1]]) if len(enough) else float("inf")


def recall_at_false_positive_rate(scores: Scores, is_fraud: Truth, rate: float) -> float:
    """Return the recall at the threshold that at most ``rate`` of legitimate transactions reach.

    Raises:
        EvaluationError: one class only.
    """
    threshold = threshold_at_false_positive_rate(scores, is_fraud, rate)
    return float((scores[is_fraud] >= threshold).mean())


def precision_at(scores: Scores, is_fraud: Truth, day: Whole, k: int = 100) -> float:
    """Return the share of fraud among the k highest scores of a day, averaged over days.

    Transactions that tie at the k-th place count in part.
    """
    return float(
        np.mean([_top_share(scores[day == d], is_fraud[day == d], k) for d in np.unique(day)])
    )


def card_precision_at(
    scores: Scores,
    is_fraud: Truth,
    account: Whole,
    day: Whole,
    k: int = 100,
    known_fraudulent: Whole | None = None,
) -> float:
    """Return the card precision top-k of the Fraud Detection Handbook (chapter 4).

    Each day the cards are ranked by their highest score. The day's precision is the share of the
    top k cards that have a fraud on that day. A card found in this way leaves the later days. The
    result is the mean over days.

    Args:
        scores: [N].
        is_fraud: [N].
        account: [N] the card of each transaction.
        day: [N] whole numbers.
        k: number of cards that can be reviewed in a day.
        known_fraudulent: cards that are left out from the start, such as those with a fraud
            known before the first day.
    """
    if not len(scores):
        raise EvaluationError("no transactions: card precision is a mean over days")
    cards, card = np.unique(account, return_inverse=True)  # [cards], [N] small whole numbers
    known = np.zeros(len(cards), np.bool_)
    if known_fraudulent is not None:
        known[np.isin(cards, known_fraudulent)] = True
    by_day = np.argsort(day, kind="stable")
    begins = np.flatnonzero(np.diff(day[by_day], prepend=day[by_day[0]] - 1))
    shares = []
    for today in np.split(by_day, begins[1:]):
        rows = today[~known[card[today]]]
        highest = np.full(len(cards), -np.inf)
        np.maximum.at(highest, card[rows], scores[rows])
        compromised = np.zeros(len(cards), np.bool_)
        compromised[card[rows[is_fraud[rows]]]] = True
        active = np.flatnonzero(highest > -np.inf)
        top = active[np.argsort(-highest[active], kind="stable")[:k]]
        found = top[compromised[top]]
        shares.append(len(found) / k)
        known[found] = True
    return float(np.mean(shares))


def expected_calibration_error(scores: Scores, is_fraud: Truth, bins: int = 15) -> float:
    """Return the expected calibration error (ECE) of probabilities.

    It is the mean over transactions of abs(mean score - share of fraud) of their bin. The bins have
    equal width (Guo et al., "On Calibration of Modern Neural Networks", 2017).

    Args:
        scores: [N] probabilities in [0, 1].
        is_fraud: [N].
        bins: number of bins.

    Raises:
        EvaluationError: no transactions, or a score outside [0, 1].

    >>> round(expected_calibration_error(
    ...     np.array([0.1, 0.1, 0.9, 0.9]), np.array([False, False, True, False])), 6)
    0.25
    """
    bins_of = reliability(scores, is_fraud, bins)
    return float(
        np.abs(bins_of.mean_score - bins_of.fraud_share) @ bins_of.count / bins_of.count.sum()
    )


def brier_score(scores: Scores, is_fraud: Truth) -> float:
    """Return the mean squared difference of probability and truth.

    Raises:
        EvaluationError: no transactions, or a score outside [0, 1].

    >>> brier_score(np.array([0.5, 1.0]), np.array([False, True]))
    0.125
    """
    _check_probabilities(scores)
    return float(np.square(scores.astype(np.float64) - is_fraud).mean())


@dataclass(frozen=True)
class Reliability:
    """Transactions by score in b non-empty bins of equal width.

    Attributes:
        count: [b] transactions.
        mean_score: [b].
        fraud_share: [b].
    """

    count: Whole
    mean_score: NDArray[np.float64]
    fraud_share: NDArray[np.float64]


def reliability(scores: Scores, is_fraud: Truth, bins: int = 15) -> Reliability:
    """Compute the bins of a reliability diagram; empty bins are left out.

    Raises:
        EvaluationError: no transactions, or a score outside [0, 1].
    """
    _check_probabilities(scores)
    scores = scores.astype(np.float64)
    place = np.minimum((scores * bins).astype(np.int64), bins - 1)
    count = np.bincount(place, minlength=bins)
    some = count > 0
    return Reliability(
        count[some],
        np.bincount(place, scores, bins)[some] / count[some],
        np.bincount(place, is_fraud, bins)[some] / count[some],
    )


OPERATING_POINT = (
    "threshold",
    "alerts_per_day",
    "recall",
    "false_positive_rate",
    "precision",
    "fraud_amount_caught_per_day",
    "legitimate_amount_flagged_per_day",
)
"""Names of the columns of :func:`operating_points`."""


def operating_points(
    scores: Scores,
    is_fraud: Truth,
    amount: NDArray[np.float64],
    days: float,
    points_max: int = 200,
) -> list[list[float]]:
    """Measure the alerts at each of some thresholds: rows of :data:`OPERATING_POINT`.

    The thresholds are scores, highest first; the last one is the lowest score. Half of them are
    evenly spaced in recall, the others in the logarithm of the number of alerts.

    Args:
        scores: [N].
        is_fraud: [N].
        amount: [N] in the currency's main unit.
        days: length of the period of the transactions.
        points_max: most thresholds.

    Raises:
        EvaluationError: one class only, or no time.

    >>> points = operating_points(
    ...     np.array([0.9, 0.4, 0.4, 0.1]), np.array([True, True, False, False]),
    ...     np.array([50.0, 30.0, 20.0, 10.0]), days=2.0)
    >>> points[1]
    [0.4, 1.5, 1.0, 0.5, 0.666667, 40.0, 10.0]
    """
    if not days > 0:
        raise EvaluationError(f"{days} days; operating points are counted per day of some time")
    thresholds, place = np.unique(-scores.astype(np.float64), return_inverse=True)
    steps = len(thresholds)
    true, false = (np.bincount(place, of, steps).cumsum() for of in (is_fraud, ~is_fraud))
    frauds, legitimate = _both_classes(true, false)
    caught, flagged = (
        np.bincount(place, amount * of, steps).cumsum() for of in (is_fraud, ~is_fraud)
    )
    alerts = true + false
    half = points_max // 2
    by_recall = np.searchsorted(true, np.linspace(0, frauds, half + 1)[1:] - 0.5)
    by_alerts = np.searchsorted(alerts, np.geomspace(1, len(scores), half))
    chosen = np.unique(np.minimum(np.concatenate((by_recall, by_alerts)), steps - 1))
    return [
        [
            float(-thresholds[at]),
            *(
                float(f"{value:.6g}")
                for value in (
                    alerts[at] / days,
                    true[at] / frauds,
                    false[at] / legitimate,
                    true[at] / alerts[at],
                    caught[at] / days,
                    flagged[at] / days,
                )
            ),
        ]
        for at in chosen
    ]


def recall_by_scenario(
    scores: Scores, scenario: NDArray[np.int8], threshold: float
) -> dict[int, float]:
    """Return the share of each fraud scenario's transactions at or over the threshold.

    >>> recall_by_scenario(np.array([.9, .2, .8]), np.array([1, 1, 0], np.int8), .5)
    {1: 0.5}
    """
    return {
        int(s): float((scores[scenario == s] >= threshold).mean())
        for s in np.unique(scenario)
        if s > 0
    }


def _check_probabilities(scores: Scores) -> None:
    if not len(scores):
        raise EvaluationError("no transactions: calibration is a mean over them")
    lowest, highest = float(scores.min()), float(scores.max())
    if not (lowest >= 0 and highest <= 1):  # also False for NaN
        raise EvaluationError(
            f"scores reach from {lowest:g} to {highest:g}; calibration needs probabilities "
            "in [0, 1]"
        )


def _distinct_descending(scores: Scores) -> NDArray[np.float64]:
    return np.unique(scores.astype(np.float64))[::-1]


def _cumulated(scores: Scores, is_fraud: Truth) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Count legitimate and fraudulent transactions at or over each distinct score.

    The scores fall. Both counts begin with a 0 for a threshold over all scores.
    """
    _, place = np.unique(-scores, return_inverse=True)
    steps = int(place.max()) + 1 if len(place) else 0
    true = np.bincount(place[is_fraud], minlength=steps)
    false = np.bincount(place[~is_fraud], minlength=steps)
    nothing = np.zeros(1)
    return (
        np.concatenate((nothing, np.cumsum(false))),
        np.concatenate((nothing, np.cumsum(true))),
    )


def _both_classes(true: NDArray[np.float64], false: NDArray[np.float64]) -> tuple[float, float]:
    frauds, legitimate = float(true[-1]), float(false[-1])
    if not frauds or not legitimate:
        raise EvaluationError(
            f"{frauds:.0f} frauds and {legitimate:.0f} legitimate transactions; both must be there"
        )
    return frauds, legitimate


def _top_share(scores: Scores, is_fraud: Truth, k: int) -> float:
    if len(scores) <= k:
        return float(is_fraud.sum() / k)
    kth = np.partition(scores, -k)[-k]
    above = scores > kth
    tied = scores == kth
    in_part = is_fraud[tied].mean() * (k - above.sum())
    return float((is_fraud[above].sum() + in_part) / k)
