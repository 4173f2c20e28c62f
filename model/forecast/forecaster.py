"""Forecasts of accounts from their states, calibrated and in the currency.

history, hidden, moment  --asked_states-->  inputs  --Decoder, a step a day-->  days
                                                    --calibration-->  Forecasts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.features.account import AccountHistory
from model.features.amount_scale import AmountScale
from model.forecast.decoder import DecodedDay, Decoder
from model.forecast.inputs import AskedStates, asked_states, day_inputs, weekday_of
from model.forecast.shape import DAYS_MAX, LEVELS, length_group

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

COUNT_MAX = 20_000
"""Largest number of payments of a day that a quantile names."""

DEVIATIONS = 12.0
"""Deviations over the mean in which the quantiles of a count are looked for."""

NONE_MIN = 1e-12
"""Smallest probability of a day without payment; smaller ones count as this."""

_LEVELS = np.array(LEVELS)


class DaysError(ValueError):
    """The number of days cannot be forecast; the message says which can."""


@dataclass(frozen=True)
class Forecasts:
    """Forecasts of n accounts for T days.

    Attributes:
        first_day: [n] whole UTC days since 1970.
        mean_payments: [n, T] expected number of payments.
        payments: [n, T, Q] quantiles of the number of payments, at :data:`LEVELS`.
        amount: [n, T, Q] quantiles of the sum of the amounts, in the checkpoint's currency.
        largest: [n, T, Q] quantiles of the largest payment; 0 stands for no payment.
        none: [n, T] probability of a day without payment.
        silent: [n, T] probability that the account makes no payment up to the day's end.
        fraud: [n, T] probability that a payment of the day is fraud.
    """

    first_day: Int64
    mean_payments: Float64
    payments: Float64
    amount: Float64
    largest: Float64
    none: Float64
    silent: Float64
    fraud: Float64


class Forecaster:
    """Forecaster of one checkpoint.

    Args:
        weights: the tensors of the head, by name without the prefix.
        scale: scale of amounts of the checkpoint.
    """

    def __init__(self, weights: Mapping[str, Float32], scale: AmountScale) -> None:
        self._decoder = Decoder(weights)
        self._scale = scale
        self._factors = {
            name.removeprefix("calibration."): value.astype(np.float64)
            for name, value in weights.items()
            if name.startswith("calibration.")
        }

    def forecast(
        self,
        history: AccountHistory,
        hidden: NDArray[np.floating],
        asked_ms: Int64,
        days: int = DAYS_MAX,
    ) -> Forecasts:
        """Forecast n accounts, each with one payment or more.

        Args:
            history: the accounts after their last payments.
            hidden: [n, L, H] their hidden states.
            asked_ms: [n] moments of asking, epoch milliseconds.
            days: number of days, 1 to :data:`DAYS_MAX`.

        Raises:
            DaysError: the number of days is out of bounds.
        """
        return self.decode(asked_states(history, hidden, asked_ms, self._scale), days)

    def decode(self, asked: AskedStates, days: int = DAYS_MAX) -> Forecasts:
        """Forecast the days after n states.

        Raises:
            DaysError: the number of days is out of bounds.
        """
        if not 1 <= days <= DAYS_MAX:
            raise DaysError(f"{days} days; a forecast has 1 to {DAYS_MAX}")
        given, log_rate = asked.given(self._decoder.inputs - asked.hidden.shape[1])
        context, state = self._decoder.start(given)
        group = length_group(asked.count)
        silent = np.ones(len(group))
        found: list[tuple[Float64, ...]] = []
        for ahead in range(days):
            inputs = day_inputs(asked.first_day, ahead)
            day, state = self._decoder.step(context, state, inputs, log_rate, ahead == 0)
            weekday = weekday_of(asked.first_day + ahead)
            mean = day.mean * self._factors["payments"][group, weekday]
            none = none_probability(mean, day.dispersion)
            # The hazard that the first payment comes on this day.
            logit = np.log1p(-none) - np.log(none) + day.shift + self._factors["silent"][group]
            silent = silent * _sigmoid(-logit)
            found.append(
                (
                    mean,
                    count_quantiles(mean, day.dispersion),
                    self._amounts("amount", day, group, weekday, none) * asked.unit[:, None],
                    self._amounts("largest", day, group, weekday, none) * asked.unit[:, None],
                    none,
                    silent,
                    _sigmoid(day.fraud + self._factors["fraud"][group]),
                )
            )
        return Forecasts(asked.first_day, *(np.stack(c, axis=1) for c in zip(*found, strict=True)))

    def _amounts(
        self, name: str, day: DecodedDay, group: NDArray[np.intp], weekday: Int64, none: Float64
    ) -> Float64:
        """Calibrate the quantiles [n, Q]; those up to the probability of no payment are 0."""
        quantiles: Float64 = getattr(day, name) * self._factors[name][group, weekday]
        quantiles = np.maximum.accumulate(quantiles, axis=1)
        quantiles[_LEVELS <= none[:, None]] = 0.0
        return quantiles


def none_probability(mean: Float64, dispersion: Float64) -> Float64:
    """Return the probability [n] that a negative binomial count is 0."""
    none: Float64 = np.exp(-dispersion * np.log1p(mean / dispersion))
    return np.clip(none, NONE_MIN, 1.0 - NONE_MIN)


def count_quantiles(mean: Float64, dispersion: Float64) -> Float64:
    """Return the quantiles [n, Q] of negative binomial counts, up to :data:`COUNT_MAX`.

    >>> count_quantiles(np.array([2.0]), np.array([1e6])).astype(int).tolist()
    [[0, 0, 1, 2, 3, 4, 5]]
    """
    found = np.zeros((len(mean), len(LEVELS)))
    deviation = np.sqrt(mean + mean**2 / dispersion)
    most = np.minimum(np.ceil(mean + DEVIATIONS * deviation) + 10, COUNT_MAX).astype(np.intp)
    # Rows of about the same length at once, so that one busy account costs the others nothing.
    size = np.ceil(np.log2(most)).astype(np.intp)
    for exponent in np.unique(size):
        rows = np.flatnonzero(size == exponent)
        number = np.arange(1, int(most[rows].max()) + 1)
        m, r = mean[rows, None], dispersion[rows, None]
        ratio = np.log((number - 1 + r) / number) + np.log(m / (m + r))
        log_none = -r * np.log1p(m / r)
        log_share = np.concatenate((log_none, log_none + np.cumsum(ratio, axis=1)), axis=1)
        reached = np.cumsum(np.exp(log_share), axis=1)
        for place, level in enumerate(LEVELS):
            found[rows, place] = np.minimum((reached < level).sum(axis=1), number[-1])
    return found


def _sigmoid(logit: Float64) -> Float64:
    probability: Float64 = np.exp(-np.logaddexp(0.0, -logit))
    return probability
