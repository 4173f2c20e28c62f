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
"""Names of the inputs from the bookkeeping, in the order of the columns."""

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

SILENCE_MAX_DAYS = 400.0
"""Longest silence that the head tells apart from a longer one."""

_MONDAY_OFFSET = 3  # 1970-01-01 was a Thursday
_MEAN_MONTH_DAYS = 30.4369
_WINDOWS = np.array(WINDOW_DAYS, np.float64)


@dataclass(frozen=True)
class AskedStates:
    """The states of n accounts at the moments at which their forecasts are asked for.

    Attributes:
        inputs: [n, B + H] the bookkeeping, then the hidden state.
        unit: [n] usual amount of each account, in the checkpoint's currency.
        log_rate: [n] logarithm of the payments a day over the last month.
        first_day: [n] first day of the forecast, whole UTC days since 1970.
        count: [n] payments of each account.
    """

    inputs: Float32
    unit: Float64
    log_rate: Float64
    first_day: Int64
    count: NDArray[np.uint32]


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
    columns = [
        np.log1p(silence),
        np.log1p(silence * 24.0),
        (first_day * DAY_MS - asked_ms) / DAY_MS,
        *log_rate.T,
        *at_last.T,
        np.log1p(history.count.astype(np.float64)),
        1.0 / (1.0 + history.count),
        history.usual_count / USUAL_COUNT_MAX,
        *log_mean.T,
        np.log(unit / max(scale.usual, scale.floor)),
        np.sin(hour),
        np.cos(hour),
    ]
    bookkeeping = np.stack(columns, axis=1).astype(np.float32)
    last_layer = hidden[:, -1].astype(np.float32)
    return AskedStates(
        np.concatenate((bookkeeping, last_layer), axis=1),
        unit,
        log_rate[:, -1],
        first_day,
        history.count,
    )


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
