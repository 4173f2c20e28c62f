"""A forecast as commands and gateways give it: a row for each day, by name."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from model.forecast.forecaster import Forecasts
from model.units import DAY_SECONDS


class Spread(msgspec.Struct, frozen=True):
    """Quantiles; a value is under ``p5`` with a probability of 5 %, and so on."""

    p5: float
    p10: float
    p25: float
    p50: float
    p75: float
    p90: float
    p95: float


class DayForecast(msgspec.Struct, frozen=True):
    """The forecast of a day.

    Attributes:
        date: UTC day, ISO 8601.
        expected_payments: mean number of payments.
        payments: number of payments.
        amount: sum of the day's amounts, in the checkpoint's currency.
        largest_payment: the day's largest payment; 0 stands for no payment.
        no_payment: probability of a day without payment.
        silent: probability of no payment from the first day to the end of this one.
        fraud: probability that a payment of the day is fraud.
    """

    date: str
    expected_payments: float
    payments: Spread
    amount: Spread
    largest_payment: Spread
    no_payment: float
    silent: float
    fraud: float


def day_forecasts(forecasts: Forecasts, row: int = 0) -> list[DayForecast]:
    """Return the days of one of n forecasts."""
    days = []
    for ahead in range(forecasts.silent.shape[1]):
        at = row, ahead
        days.append(
            DayForecast(
                iso_day(int(forecasts.first_day[row]) + ahead),
                round(float(forecasts.mean_payments[at]), 3),
                Spread(*(float(value) for value in forecasts.payments[at])),
                Spread(*(round(float(value), 2) for value in forecasts.amount[at])),
                Spread(*(round(float(value), 2) for value in forecasts.largest[at])),
                *(
                    round(float(value[at]), 6)
                    for value in (forecasts.none, forecasts.silent, forecasts.fraud)
                ),
            )
        )
    return days


def iso_day(day: int) -> str:
    """Return the date of a UTC day since 1970.

    >>> iso_day(17758)
    '2018-08-15'
    """
    return datetime.fromtimestamp(day * DAY_SECONDS, UTC).date().isoformat()
