"""Choice of thresholds by a budget of alerts, a precision, or costs.

A checkpoint carries its operating points: the results of about 200 thresholds on the validation
days (:func:`model.metrics.operating_points`). A :class:`Goal` or :class:`Costs` picks one of them.
The expected results are those of the validation days.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from model.checkpoint import CheckpointThresholds, Header

ALERTS_MIN = 20
"""Fewest alerts of the validation days on which a precision is trusted."""

GoalKind = Literal["alerts-per-day", "false-positive-rate", "precision", "threshold"]

_NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+")


class ThresholdsError(ValueError):
    """A checkpoint cannot fulfil the request; the message says why and what is possible."""


@dataclass(frozen=True)
class Goal:
    """Goal of one threshold; the lowest threshold that reaches it catches the most fraud.

    Attributes:
        kind: the most alerts a day, the largest share of legitimate transactions flagged, the
            smallest share of fraud among alerts, or the threshold itself.
        value: alerts a day, or a share from 0 to 1.
    """

    kind: GoalKind
    value: float

    @classmethod
    def parse(cls, text: str) -> Goal:
        """Parse ``kind=number`` or, for shares, ``kind=number%``.

        Raises:
            ThresholdsError: the text is no goal; the message names the goals.

        >>> Goal.parse("alerts-per-day=100"), Goal.parse("precision=90%").value
        (Goal(kind='alerts-per-day', value=100.0), 0.9)
        """
        name, _, number = text.partition("=")
        for kind in get_args(GoalKind):
            if name.strip() == kind:
                return cls.of(kind, number)
        raise ThresholdsError(
            f"a goal is one of {', '.join(f'{kind}=NUMBER' for kind in get_args(GoalKind))}; "
            f"{text!r} is not"
        )

    @classmethod
    def of(cls, kind: GoalKind, number: str) -> Goal:
        """Make a goal of this kind from a number as text.

        Raises:
            ThresholdsError: the text is no number, or it is out of bounds.
        """
        value, is_share = _number(number)
        if kind == "alerts-per-day":
            if value is None or is_share or value <= 0:
                raise ThresholdsError(f"{kind} takes a number over 0, such as 100; not {number!r}")
        elif value is None or not 0 < value <= 1:
            raise ThresholdsError(
                f"{kind} takes a number over 0 and at most 1, or per cent, such as 0.9 or 90%; "
                f"not {number!r}"
            )
        return cls(kind, value)


@dataclass(frozen=True)
class Price:
    """Cost of one mistake: an amount, a share of the payment's amount, or both.

    >>> Price.parse("2.50"), Price.parse("100%")
    (Price(amount=2.5, share=0.0), Price(amount=0.0, share=1.0))
    """

    amount: float = 0.0
    share: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Price:
        """Parse ``12.50`` (an amount) or ``80%`` (of the payment's amount).

        Raises:
            ThresholdsError: the text is neither.
        """
        value, is_share = _number(text)
        if value is None:
            raise ThresholdsError(f"a cost is an amount, or per cent of one; {text!r} is neither")
        return cls(share=value) if is_share else cls(amount=value)


@dataclass(frozen=True)
class Costs:
    """Costs of a missed fraud, a review, and a declined legitimate payment.

    They are in the checkpoint's currency.
    """

    missed: Price
    review: Price
    decline: Price

    def __post_init__(self) -> None:
        if self.review.share:
            raise ThresholdsError("a review costs an amount, not a share of the payment")


@dataclass(frozen=True)
class OperatingPoint:
    """Results of one threshold on the validation days.

    Attributes:
        threshold: the lowest score of an alert.
        alerts_per_day: transactions at or over the threshold.
        recall: share of the frauds that raise an alert.
        false_positive_rate: share of the legitimate transactions that raise an alert.
        precision: share of fraud among the alerts.
        fraud_amount_per_day, legitimate_amount_per_day: amounts of the alerts, in the currency.
    """

    threshold: float
    alerts_per_day: float
    recall: float
    false_positive_rate: float
    precision: float
    fraud_amount_per_day: float
    legitimate_amount_per_day: float


class OperatingPoints:
    """Operating points of a checkpoint, by falling threshold.

    Args:
        header: header of the checkpoint.

    Raises:
        ThresholdsError: the header carries no operating points.
    """

    def __init__(self, header: Header) -> None:
        columns = len(OperatingPoint.__dataclass_fields__)
        rows = header.operating_points
        table = np.array(rows, np.float64) if all(len(r) == columns for r in rows) else None
        if not rows or table is None or not (np.diff(table[:, 0]) < 0).all():
            raise ThresholdsError(
                "the checkpoint carries no operating points, since an older version or other "
                "code wrote it: train it again with `recur train`, or set the thresholds with "
                "RECUR_REVIEW_THRESHOLD and RECUR_DECLINE_THRESHOLD"
            )
        needed = {
            "days",
            "transactions",
            "frauds",
            "fraud_amount_per_day",
            "legitimate_amount_per_day",
        }
        if missing := sorted(needed - header.validation.keys()):
            raise ThresholdsError(
                f"the checkpoint does not say its validation's {', '.join(missing)}: train it "
                "again with `recur train`"
            )
        if table[0, 0] < 1.0:  # no score reaches 1
            table = np.vstack(([1.0, 0, 0, 0, 1, 0, 0], table))
        self.currency = header.currency
        self.days = header.validation["days"]
        self.transactions = header.validation["transactions"]
        self.frauds = header.validation["frauds"]
        self._fraud_amount = header.validation["fraud_amount_per_day"]
        self._table = table
        self._points = [OperatingPoint(*row) for row in table.tolist()]

    def at(self, threshold: float) -> OperatingPoint:
        """Return the results of a threshold, interpolated between the nearest points."""
        rising = self._table[::-1]
        _, alerts, recall, rate, _, caught, flagged = (
            float(np.interp(threshold, rising[:, 0], column)) for column in rising.T
        )
        precision = recall * self.frauds / self.days / alerts if alerts else 1.0
        return OperatingPoint(threshold, alerts, recall, rate, precision, caught, flagged)

    def lowest(self, goal: Goal) -> OperatingPoint:
        """Return the lowest threshold that reaches the goal.

        Raises:
            ThresholdsError: no threshold reaches it; the message gives the nearest result.
        """
        if goal.kind == "threshold":
            return self.at(goal.value)
        measured = [p for p in self._points if p.alerts_per_day > 0]
        match goal.kind:
            case "alerts-per-day":
                reached = [p for p in measured if p.alerts_per_day <= goal.value]
                best = f"the fewest alerts a day are {measured[0].alerts_per_day:.3g}"
            case "false-positive-rate":
                reached = [p for p in measured if p.false_positive_rate <= goal.value]
                best = f"the lowest is {measured[0].false_positive_rate:.3g}"
            case "precision":
                sure = [p for p in measured if p.alerts_per_day * self.days >= ALERTS_MIN]
                reached = [p for p in sure if p.precision >= goal.value]
                highest = max((p.precision for p in sure), default=0.0)
                best = f"the highest on {ALERTS_MIN} alerts or more is {highest:.3g}"
        if not reached:
            raise ThresholdsError(
                f"no threshold gives {goal.kind}={goal.value:g} on the validation days: {best}"
            )
        return reached[-1]

    def cheapest(self, costs: Costs) -> CheckpointThresholds:
        """Return the two thresholds with the lowest expected cost a day."""
        review = np.array([self._cost_of_review(costs, p) for p in self._points])
        decline = np.array([self._cost_of_decline(costs, p) for p in self._points])
        total = review[:, None] + decline[None, :]  # [review, decline]
        # The decline threshold must not be below review.
        total[np.triu_indices(len(total), 1)] = np.inf
        r, d = np.unravel_index(int(np.argmin(total)), total.shape)
        return CheckpointThresholds(self._points[r].threshold, self._points[d].threshold)

    def cost_per_day(self, costs: Costs, thresholds: CheckpointThresholds) -> float:
        """Return the expected cost a day in the currency, if every review finds the truth."""
        return self._cost_of_review(costs, self.at(thresholds.review)) + self._cost_of_decline(
            costs, self.at(thresholds.decline)
        )

    def cost_of_nothing_per_day(self, costs: Costs) -> float:
        """Return the cost of all fraud a day, in the currency."""
        nothing = OperatingPoint(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0)
        return self._cost_of_review(costs, nothing)

    def _cost_of_review(self, costs: Costs, point: OperatingPoint) -> float:
        """Return the cost a day of missed fraud and of reviewing all alerts."""
        missed = (1.0 - point.recall) * self.frauds / self.days
        return (
            costs.missed.amount * missed
            + costs.missed.share * (self._fraud_amount - point.fraud_amount_per_day)
            + costs.review.amount * point.alerts_per_day
        )

    def _cost_of_decline(self, costs: Costs, point: OperatingPoint) -> float:
        """Return the cost a day of declined legitimate payments, less the reviews saved."""
        good = point.false_positive_rate * (self.transactions - self.frauds) / self.days
        return (
            costs.decline.amount * good
            + costs.decline.share * point.legitimate_amount_per_day
            - costs.review.amount * point.alerts_per_day
        )


@dataclass(frozen=True)
class ThresholdGoals:
    """Goals of the two thresholds, or costs that decide both, or neither."""

    review: Goal | None = None
    decline: Goal | None = None
    costs: Costs | None = None

    @classmethod
    def parse(cls, options: Mapping[str, str | None]) -> ThresholdGoals:
        """Parse command-line options by name.

        ``review`` and ``decline`` are goals. ``alerts_per_day`` and the like are goals of the
        review threshold. ``cost_missed``, ``cost_review`` and ``cost_decline`` are costs.

        Raises:
            ThresholdsError: a text is wrong, or two options contradict each other.
        """
        given = {name: text for name, text in options.items() if text is not None}
        reviews = [Goal.parse(given["review"])] if "review" in given else []
        for kind in get_args(GoalKind):
            if (text := given.get(kind.replace("-", "_"))) is not None:
                reviews.append(Goal.of(kind, text))
        if len(reviews) > 1:
            raise ThresholdsError(
                f"the review threshold has one goal; {' and '.join(g.kind for g in reviews)} "
                "are two. The other one may be the decline threshold's: --decline GOAL"
            )
        review = reviews[0] if reviews else None
        decline = Goal.parse(given["decline"]) if "decline" in given else None
        costs = _costs(given)
        if costs and (review or decline):
            raise ThresholdsError("give goals or costs, not both: costs decide both thresholds")
        return cls(review, decline, costs)

    def choose(
        self, points: OperatingPoints, now: CheckpointThresholds
    ) -> CheckpointThresholds | None:
        """Return the thresholds that reach the goals; None without goals and costs.

        Raises:
            ThresholdsError: a goal cannot be reached.
        """
        if self.costs is not None:
            return points.cheapest(self.costs)
        if self.review is None and self.decline is None:
            return None
        review = points.lowest(self.review).threshold if self.review else now.review
        decline = points.lowest(self.decline).threshold if self.decline else now.decline
        return CheckpointThresholds(review, max(review, decline))


def _costs(given: Mapping[str, str]) -> Costs | None:
    prices = {
        name: Price.parse(given[f"cost_{name}"])
        for name in ("missed", "review", "decline")
        if f"cost_{name}" in given
    }
    if not prices:
        return None
    if missing := [name for name in ("review", "decline") if name not in prices]:
        raise ThresholdsError(f"costs need --cost-{' and --cost-'.join(missing)}, too")
    return Costs(prices.get("missed", Price(share=1.0)), prices["review"], prices["decline"])


def report(
    points: OperatingPoints,
    before: CheckpointThresholds,
    after: CheckpointThresholds | None = None,
    costs: Costs | None = None,
) -> Iterator[str]:
    """Yield the lines of a table with the expected results of the thresholds."""
    currency = points.currency
    rows: list[tuple[str, ...]] = [
        ("", "", "threshold", "alerts", "fraud", "false", "alerts", currency, currency),
        ("", "", "", "a day", "caught", "positives", "are fraud", "caught", "wrongly"),
    ]
    for name in ("review", "decline"):
        rows.append((name, "before" if after else "now", *_cells(points, before, name)))
        if after is not None:
            rows.append(("", "after", *_cells(points, after, name)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield ("  " + "  ".join(cells)).rstrip()
    yield ""
    if costs is not None:
        totals = [f"{points.cost_per_day(costs, before):,.0f} before"]
        if after is not None:
            totals.append(f"{points.cost_per_day(costs, after):,.0f} after")
        nothing = points.cost_of_nothing_per_day(costs)
        costs_text = ", ".join(totals)
        yield f"  Cost in {currency} a day: {costs_text}, {nothing:,.0f} if nothing were done."
    yield (
        f"  Expected from {points.days:g} validation days with {points.transactions:,.0f} "
        f"transactions, {points.frauds:,.0f} of them fraud."
    )
    yield "  Amounts are of a day. The review rows hold what is declined, too."


def _cells(points: OperatingPoints, thresholds: CheckpointThresholds, name: str) -> Sequence[str]:
    point = points.at(getattr(thresholds, name))
    return (
        f"{point.threshold:.4f}",
        f"{point.alerts_per_day:,.1f}",
        f"{point.recall:.1%}",
        f"{point.false_positive_rate:.3%}",
        f"{point.precision:.1%}" if point.alerts_per_day else "-",
        f"{point.fraud_amount_per_day:,.0f}",
        f"{point.legitimate_amount_per_day:,.0f}",
    )


def _number(text: str) -> tuple[float | None, bool]:
    """Return the number in a text, or None, and whether it was per cent."""
    text = text.strip()
    is_share = text.endswith("%")
    digits = text.removesuffix("%").rstrip()
    if not _NUMBER.fullmatch(digits):
        return None, is_share
    return float(digits) / (100 if is_share else 1), is_share
