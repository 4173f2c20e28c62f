"""The best that any score can do on the data of benchmarks/bursts.py, free and monotone.

    python -m benchmarks.bursts_ceiling        # the table of docs/model.md, in a minute

A Bayes filter knows the generator's rules and each account's habits, which a network must learn. It
computes the posterior of fraud from the past and the payment itself. No score ranks better on
average. The monotone ceiling is the best score that never falls while the amount rises over what is
usual, with everything else fixed.

For a given history, time and category the posterior odds are a product: odds before the amount is
known, times the likelihood ratio of the amount. So the best monotone score replaces this ratio by
its isotonic regression over what is usual. Its upper sets catch the most frauds of all upper sets
with as many false alarms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import log_ndtr

from benchmarks.bursts import CATEGORIES, NIGHT_SHARE_OF_FRAUD, Habits, transactions
from model import metrics
from model.features.account import ACCOUNT_FEATURES, observe_log, rounds_of
from model.features.amount_scale import AmountScale
from model.training.split import Split

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

AMOUNT_MIN = 1.0
"""Smallest amount of the generator. Smaller ones are raised to it."""

SIZES = np.arange(6, 14)
"""Numbers of payments of a burst, all equally likely."""

RATIO_BOUND = 35.0
"""Bound of a payment's log likelihood ratio inside the filter, so that products stay finite."""

DAY_SECONDS = 86_400

_NAMES = [c[0] for c in CATEGORIES]
_MEDIAN, _SPREAD, _FRAUD_SHARE, _MEAN, _DEVIATION = (
    np.array([c[i] for c in CATEGORIES], np.float64) for i in range(2, 7)
)
_FRAUD_SHARE /= _FRAUD_SHARE.sum()

# Share of a burst that has happened by an hour after midnight of its first day.
_HOURS = np.array([10.0, 22.0, 28.0, 34.0, 46.0, 52.0])
_HAPPENED = np.array([0, 1 - NIGHT_SHARE_OF_FRAUD, 1, 1, 2 - NIGHT_SHARE_OF_FRAUD, 2]) / 2
_PER_DAY = np.append(np.diff(_HAPPENED) / np.diff(_HOURS), 0.0) * 24

# C[n, k] = n! / (n - k)!: ways to be the first k payments of a burst of n.
_SIZE_MAX = int(SIZES[-1])
_WAYS = np.array(
    [
        [
            np.prod(np.arange(n - k + 1, n + 1, dtype=np.float64)) if k <= n else 0.0
            for k in range(_SIZE_MAX + 1)
        ]
        for n in SIZES
    ]
) / len(SIZES)
_REST = np.maximum(SIZES[:, None] - np.arange(_SIZE_MAX + 1), 0)


@dataclass(frozen=True)
class Payments:
    """N payments in order of time, and what the filter knows of their world.

    Attributes:
        account: [N] 0 up to the number of accounts.
        second: [N] since the first day's midnight.
        category: [N] place in CATEGORIES.
        amount: [N].
        is_fraud: [N].
        habits: of the accounts. The rate is in payments a day.
        days: length of the log.
        bursts_per_day: expected bursts of an account that begin on a day.
    """

    account: Int64
    second: Int64
    category: Int64
    amount: Float64
    is_fraud: NDArray[np.bool_]
    habits: Habits
    days: int
    bursts_per_day: float

    @classmethod
    def generated(cls, accounts: int, count: int, days: int, bursts: int, seed: int) -> Payments:
        """Make the data set, and draw the habits of its accounts once more."""
        table = transactions(accounts, count, days, bursts, seed)
        habits = Habits.drawn(np.random.default_rng(seed), accounts)
        rate = habits.rate / habits.rate.sum() * count / days
        second = table["trans_date_trans_time"].to_numpy()
        code = pa.compute.index_in(table["category"], pa.array(_NAMES))
        return cls(
            table["cc_num"].to_numpy() - 4_000_000_000_000_000,
            (second - second[0].astype("datetime64[D]")).astype(np.int64),
            code.to_numpy().astype(np.int64),
            table["amt"].to_numpy(),
            table["is_fraud"].to_numpy() > 0,
            Habits(habits.preference, rate, habits.spending),
            days,
            bursts / accounts / (days - 3),
        )

    @property
    def spending(self) -> Float64:
        """Spending factors [N] of the payments' accounts."""
        return self.habits.spending[self.account]


def log_ratio(amount: Float64, category: Int64, spending: Float64) -> Float64:
    """Return the log likelihood ratio of amounts: thief over owner."""
    thief, owner = _deviations(amount, category, spending)
    density = (
        0.5 * (owner**2 - thief**2)
        + np.log(amount * _SPREAD[category])
        - np.log(_DEVIATION[category])
    )
    least = log_ndtr(thief) - log_ndtr(owner)
    return np.where(amount <= AMOUNT_MIN, least, density)


def log_tail_ratio(amount: Float64, category: Int64, spending: Float64) -> Float64:
    """Return the log of the thief's over the owner's probability of this amount or more."""
    thief, owner = _deviations(amount, category, spending)
    tails: Float64 = log_ndtr(-thief) - log_ndtr(-owner)
    return tails


def _deviations(amount: Float64, category: Int64, spending: Float64) -> tuple[Float64, Float64]:
    """Return how far an amount is from a thief's and the owner's usual one, in deviations."""
    thief = (amount - _MEAN[category]) / _DEVIATION[category]
    owner = (np.log(amount) - np.log(_MEDIAN[category] * spending)) / _SPREAD[category]
    return thief, owner


def monotone_log_ratio(payments: Payments, usual: Float64) -> Float64:
    """Return the log ratio's isotonic regression over the usual amount [N]; as it is below.

    Over what is usual the ratio rises to the thief's typical amount and falls beyond. So its
    isotonic regression is the ratio itself up to some amount, and constant from there on. The
    constant is the highest ratio of tails.
    """
    p = payments
    free = log_ratio(p.amount, p.category, p.spending)
    grid = np.geomspace(AMOUNT_MIN, 4000, 1000)
    accounts = len(p.habits.spending)
    top = np.empty((accounts, len(CATEGORIES)))
    for category in range(len(CATEGORIES)):
        for account, spending in enumerate(p.habits.spending):
            tails = log_tail_ratio(grid, np.full(len(grid), category), spending)
            top[account, category] = grid[tails.argmax()]
    begin = np.maximum(top[p.account, p.category], usual)
    level = log_tail_ratio(begin, p.category, p.spending)
    return np.where((p.amount >= begin) & (p.amount > usual), level, free)


def log_odds_before_amount(payments: Payments) -> Float64:
    """Return the log odds of fraud [N] of each payment, from its past, time and category.

    A burst is unfinished on its first day and the two after. For each of these days as its first
    the filter keeps the sums over all ways in which k of the payments are the burst's. Two bursts
    of an account do not overlap here; in the data one in two hundred does.
    """
    p = payments
    hour_of_day = p.second % DAY_SECONDS / 3600
    owner = (
        p.habits.rate[p.account]
        * _honest_density(hour_of_day)
        * p.habits.preference[p.account, p.category]
    )  # payments a day
    thief = _FRAUD_SHARE[p.category] / owner
    ratio = np.exp(np.clip(log_ratio(p.amount, p.category, p.spending), -RATIO_BOUND, RATIO_BOUND))
    day = p.second // DAY_SECONDS
    odds = np.zeros(len(day))
    rounds = rounds_of(p.account)
    n = len(rounds[0])
    # sums[:, j]: of the burst that began j days before the account's day; [n, 3, k].
    sums = np.zeros((n, 3, _SIZE_MAX + 1))
    sums[:, :, 0] = 1.0
    past = np.ones((n, 2))  # weight of the pasts without a burst begun later than 4, 3 days ago
    today = np.zeros(n, np.int64)
    for rows in rounds:
        m = len(rows)
        _advance(sums[:m], past[:m], today[:m], day[rows], p)
        today[:m] = day[rows]
        hours = hour_of_day[rows][:, None] + np.array([0.0, 24.0, 48.0])  # [m, 3]
        left = 1 - np.interp(hours, _HOURS, _HAPPENED)
        place = np.searchsorted(_HOURS, hours, side="right") - 1
        speed = np.where(place >= 0, _PER_DAY[place], 0.0)
        weight, next_one = _weights(sums[:m], left)
        prior = _prior(today[:m, None] - np.arange(3), p)
        before2, before1 = past[:m].T
        begun2 = before1 + before2 * prior[:, 2] * weight[:, 2]
        begun1 = begun2 + before1 * prior[:, 1] * weight[:, 1]
        begun0 = begun1 + begun2 * prior[:, 0] * weight[:, 0]
        after = 1 + prior[:, 0] * weight[:, 0]
        burst = prior * np.stack((begun2, before1, before2 * after), 1) * next_one * speed
        odds[rows] = burst.sum(1) * thief[rows] / begun0
        gained = speed * (thief[rows] * ratio[rows])[:, None]
        sums[:m, :, 1:] += sums[:m, :, :-1] * gained[:, :, None]
    return np.log(np.maximum(odds, 1e-300))


def _prior(first_day: Int64, p: Payments) -> Float64:
    return np.where((first_day >= 0) & (first_day < p.days - 3), p.bursts_per_day, 0.0)


def _weights(sums: Float64, left: Float64) -> tuple[Float64, Float64]:
    """Return the weight of a burst, and that weight times the rate of its next payment."""
    power = left[..., None, None] ** _REST  # [m, 3, sizes, k]
    weight = np.einsum("mdsk,sk,mdk->md", power, _WAYS, sums)
    one_less = left[..., None, None] ** np.maximum(_REST - 1, 0) * _REST
    return weight, np.einsum("mdsk,sk,mdk->md", one_less, _WAYS, sums)


def _advance(sums: Float64, past: Float64, today: Int64, day: Int64, p: Payments) -> None:
    """Bring n accounts to a later day: bursts that began long ago end."""
    # After three days without a payment nothing of a burst is left to forget.
    for step in range(4):
        moved = np.flatnonzero(day - today > step)
        if not len(moved):
            return
        ended = sums[moved, 2] @ (_WAYS * (_REST == 0)).sum(0)
        first = today[moved] + step - 2
        two = past[moved, 1] + past[moved, 0] * _prior(first, p) * ended
        past[moved, 0] = past[moved, 1] / two
        past[moved, 1] = 1.0
        sums[moved, 1:] = sums[moved, :-1]
        sums[moved, 0] = 0.0
        sums[moved, 0, 0] = 1.0


def _honest_density(hour: Float64) -> Float64:
    """Return the density of legitimate payments at an hour of the day, for a day."""
    around = hour[:, None] + 24 * np.arange(-2, 3)
    bell = np.exp(-0.5 * ((around - 15.5) / 4) ** 2).sum(1) / (4 * np.sqrt(2 * np.pi))
    density: Float64 = 0.75 * 24 * bell + 0.25
    return density


def usual_amounts(payments: Payments, training: NDArray[np.bool_]) -> Float64:
    """Return the amount [N] from which on a score may not fall, as the product's features say.

    Args:
        training: [N] payments of the training period; they decide the scale.
    """
    p = payments
    scale = AmountScale.of(p.account[training], p.amount[training])
    raw = observe_log(p.account, p.amount, p.second * 1000, scale)
    mean, usual = (
        np.maximum(raw[:, ACCOUNT_FEATURES.index(name)], scale.floor)
        for name in ("mean_amount_30d", "usual_amount")
    )
    return np.minimum(mean, usual).astype(np.float64)


def ceilings(payments: Payments) -> tuple[Float64, Float64, Int64]:
    """Return the log odds of fraud [N] without a constraint and monotone, and each one's day."""
    p = payments
    day = p.second // DAY_SECONDS
    split = Split.of(p.days)
    usual = usual_amounts(p, (day >= split.training) & (day < split.validation))
    before = log_odds_before_amount(p)
    free = before + log_ratio(p.amount, p.category, p.spending)
    return free, before + monotone_log_ratio(p, usual), day


def main() -> None:
    """Print the ceilings on the held-out days of the data set of docs/model.md."""
    payments = Payments.generated(accounts=600, count=700_000, days=600, bursts=570, seed=3)
    free, monotone, day = ceilings(payments)
    held_out = day >= Split.of(payments.days).held_out
    is_fraud = payments.is_fraud[held_out]
    print(f"{held_out.sum():,} payments, {is_fraud.sum():,} frauds")
    for name, score in (("free", free), ("rising from what is usual on", monotone)):
        precision = metrics.average_precision(score[held_out], is_fraud)
        recall = metrics.recall_at_false_positive_rate(score[held_out], is_fraud, 0.001)
        print(f"{name}: average precision {precision:.4f}, recall at .1 % {recall:.4f}")


if __name__ == "__main__":
    main()
