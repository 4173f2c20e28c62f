"""The inputs of a forecast: an account's bookkeeping at a time, and the calendar.

All of them are free of the currency: amounts are in units of the account's own usual amount, and
that amount is in units of the usual amount of all accounts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.features.account import USUAL_COUNT_MAX, WINDOW_DAYS, AccountHistory
from model.features.amount_scale import AmountScale
from model.units import DAY_MS, HOUR_MS

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

BOOKKEEPING: tuple[str, ...] = (
    "log_days_since_last",
    "log_hours_since_last",
    "lead_days",
    *(f"log_rate_{days}d" for days in WINDOW_DAYS),
    *(f"log_rate_at_last_{days}d" for days in WINDOW_DAYS),
    "log_payments",
    "few_payments",
    "usual_payments",
    *(f"log_mean_{days}d" for days in WINDOW_DAYS),
    "log_usual",
    "hour_sin",
    "hour_cos",
)
"""Names of the inputs of a first head, in the order of the columns."""

STEADY_BOOKKEEPING: tuple[str, ...] = (
    "log_days_since_last",
    "log_hours_since_last",
    "lead_days",
    "few_payments",
    "usual_payments",
    *(f"log_mean_{days}d" for days in WINDOW_DAYS),
    "log_usual",
    "hour_sin",
    "hour_cos",
    *(f"log_steady_rate_{days}d" for days in WINDOW_DAYS),
    *(f"root_steady_rate_{days}d" for days in WINDOW_DAYS),
    "log_long_rate",
    "root_long_rate",
    "log_age_days",
    *(f"mean_{days}d" for days in WINDOW_DAYS),
    "log_few_payments",
)
"""Names of the inputs of a second head: none of them grows with the age of an account for good."""

BOOKKEEPINGS = (BOOKKEEPING, STEADY_BOOKKEEPING)
"""The bookkeepings that heads have had; a head says how many inputs it takes."""

DAY_INPUTS: tuple[str, ...] = (
    *(f"weekday_{day}" for day in range(7)),
    "month_sin",
    "month_cos",
    "ahead",
    "log_ahead",
)
"""Names of the inputs of a day, in the order of the columns."""

RATE_PRIOR = 0.3
"""Payments that are added to a decayed count, so that its logarithm is finite."""

LONG_WEIGHT = 1.305
"""Weight of the count of 30 days in the rate over a long time; that of 7 days makes it 1.

A decayed count weighs the last days most. The difference weighs a month more evenly, and is the
combination with the least variance for an account with a steady rate: that of a mean of 74 days.
The count of 30 days alone has that of 60."""

LONG_RATE_MIN = 0.3
"""Least rate over a long time, as a share of the rate of 30 days."""

LOG_LONG_RATE_RANGE = (-5.0, 8.0)
AGE_MAX_DAYS = 60.0
"""Age of an account from which on the head sees no difference; the counts do not tell it either."""

FEW_PAYMENTS_MAX = 100
"""Number of payments from which on the head sees no difference."""

SILENCE_MAX_DAYS = 400.0
"""Longest silence that the head tells apart from a longer one."""

_MONDAY_OFFSET = 3  # 1970-01-01 was a Thursday
_MEAN_MONTH_DAYS = 30.4369
_WINDOWS = np.array(WINDOW_DAYS, np.float64)
_AGES = np.concatenate(([1e-3], np.geomspace(1e-2, 1e5, 4000)))
_RATIOS = (_AGES / 30.0) / -np.expm1(-_AGES / 30.0)


@dataclass(frozen=True)
class AskedStates:
    """The states of n accounts at the moments at which their forecasts are asked for.

    Attributes:
        bookkeeping: [n, B] the columns of :data:`BOOKKEEPING`.
        steady: [n, B'] the columns of :data:`STEADY_BOOKKEEPING`.
        hidden: [n, H] the last layer of the hidden state.
        unit: [n] usual amount of each account, in the checkpoint's currency.
        log_rate: [n] logarithm of the payments a day over the last month.
        log_long_rate: [n] the same over a longer time, whatever the account's age.
        first_day: [n] first day of the forecast, whole UTC days since 1970.
        count: [n] payments of each account.
    """

    bookkeeping: Float32
    steady: Float32
    hidden: Float32
    unit: Float64
    log_rate: Float64
    log_long_rate: Float64
    first_day: Int64
    count: NDArray[np.uint32]

    def given(self, bookkeeping: int) -> tuple[Float32, Float64]:
        """Return the inputs [n, B + H] and the logarithms of the rate [n] of a head.

        Args:
            bookkeeping: number of inputs that the head takes from the bookkeeping.
        """
        if bookkeeping == len(STEADY_BOOKKEEPING):
            return np.concatenate((self.steady, self.hidden), axis=1), self.log_long_rate
        return np.concatenate((self.bookkeeping, self.hidden), axis=1), self.log_rate


def asked_states(
    history: AccountHistory, hidden: NDArray[np.floating], asked_ms: Int64, scale: AmountScale
) -> AskedStates:
    """Compute the inputs of n accounts, each with one payment or more.

    The first day of a forecast is the first whole UTC day after the moment of asking. A moment
    before the account's last payment counts as that payment's.

    Args:
        history: the accounts after their last payments.
        hidden: [n, L, H] their hidden states; the last layer is used.
        asked_ms: [n] epoch milliseconds.
        scale: scale of amounts of the checkpoint.
    """
    asked_ms = np.maximum(asked_ms, history.last_event_ms)
    first_day = -(-asked_ms // DAY_MS)
    silence = np.minimum((asked_ms - history.last_event_ms) / DAY_MS, SILENCE_MAX_DAYS)
    counts = history.decayed_count.astype(np.float64)
    aged = counts * np.exp(-silence[:, None] / _WINDOWS)
    log_rate = np.log((aged + RATE_PRIOR) / _WINDOWS)
    at_last = np.log((counts + RATE_PRIOR) / _WINDOWS)
    usual = history.usual_amount.astype(np.float64)
    unit = np.maximum(usual, scale.floor)
    mean = history.decayed_amount.astype(np.float64) / np.maximum(counts, 1e-9)
    log_mean = np.clip(np.log(np.maximum(mean, scale.floor) / unit[:, None]), -4.0, 4.0)
    hour = asked_ms % DAY_MS / HOUR_MS * (2 * np.pi / 24)
    since = [np.log1p(silence), np.log1p(silence * 24.0), (first_day * DAY_MS - asked_ms) / DAY_MS]
    number = history.count.astype(np.float64)
    length = [1.0 / (1.0 + number), history.usual_count / USUAL_COUNT_MAX]
    level = [
        *log_mean.T,
        np.log(unit / max(scale.usual, scale.floor)),
        np.sin(hour),
        np.cos(hour),
    ]
    age = _age_days(history) + silence
    rate, long_rate = _steady_rates(aged, age)
    columns = [*since, *log_rate.T, *at_last.T, np.log1p(number), *length, *level]
    steady = [
        *since,
        *length,
        *level,
        *np.log(rate).T,
        *np.sqrt(rate).T,
        np.log(long_rate),
        np.sqrt(long_rate),
        np.log1p(np.minimum(age, AGE_MAX_DAYS)),
        *np.exp(np.clip(log_mean, -2.0, 2.0)).T,
        np.log1p(np.minimum(number, FEW_PAYMENTS_MAX)),
    ]
    return AskedStates(
        np.stack(columns, axis=1).astype(np.float32),
        np.stack(steady, axis=1).astype(np.float32),
        hidden[:, -1].astype(np.float32),
        unit,
        log_rate[:, -1],
        np.clip(np.log(long_rate), *LOG_LONG_RATE_RANGE),
        first_day,
        history.count,
    )


def _age_days(history: AccountHistory) -> Float64:
    """Return the days [n] from an account's first payment to its last, as its counts imply.

    A state does not hold the first payment's time. With a steady rate, the ratio of all payments
    to the decayed count of 30 days rises with the age. It tells the age of a young account; for an
    old one it is rough, but then the counts depend on the age no more.
    """
    before = history.count.astype(np.float64) - 1.0
    decayed = history.decayed_count[:, -1].astype(np.float64) - 1.0
    ratio = np.maximum(before, 1e-9) / np.maximum(decayed, 1e-9)
    age: Float64 = np.where(before > 0, np.interp(ratio, _RATIOS, _AGES), 0.0)
    return age


def _steady_rates(aged: Float64, age: Float64) -> tuple[Float64, Float64]:
    """Return payments a day [n, 3] by window, and over a long time [n], of accounts of any age.

    The first payment begins an account's time, so it is not counted. A window counts only the days
    that the account has existed.

    Args:
        aged: [n, 3] decayed counts at the moment of asking.
        age: [n] days from the first payment to that moment.
    """
    first = np.exp(-age[:, None] / _WINDOWS)
    days = _WINDOWS * (1.0 - first)
    rate = (np.maximum(aged - first, 0.0) + RATE_PRIOR) / (days + RATE_PRIOR)
    month = rate[:, -1]
    long_rate = LONG_WEIGHT * month + (1.0 - LONG_WEIGHT) * rate[:, -2]
    return rate, np.maximum(long_rate, LONG_RATE_MIN * month)


def day_inputs(first_day: Int64, ahead: int) -> Float32:
    """Return the inputs [n, D] of a day of n forecasts.

    Args:
        first_day: [n] first day of each forecast.
        ahead: number of the day; 0 is the first.
    """
    day = first_day + ahead
    inputs = np.zeros((len(day), len(DAY_INPUTS)), np.float32)
    inputs[np.arange(len(day)), weekday_of(day)] = 1.0
    month = day * (2 * np.pi / _MEAN_MONTH_DAYS)
    inputs[:, 7] = np.sin(month)
    inputs[:, 8] = np.cos(month)
    inputs[:, 9] = ahead / 30.0
    inputs[:, 10] = np.log1p(ahead)
    return inputs


def weekday_of(day: Int64) -> Int64:
    """Return the weekdays of days since 1970; 0 is Monday.

    >>> weekday_of(np.array([0, 4])).tolist()
    [3, 0]
    """
    return np.asarray((day + _MONDAY_OFFSET) % 7)
