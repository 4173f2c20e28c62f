"""Forecasts by other means, for comparison with the forecast head.

All see the complete days before the moment of asking, and have as much memory as they want:

- the account's own mean and deviation (a normal distribution, cut at 0);
- the account's own empirical quantiles, of all its days and of its last 90;
- simple exponential smoothing, with the smoothing that fits the account's days best, and the
  intervals of its usual model (Hyndman, Koehler, Ord and Snyder 2008, ETS(A,N,N));
- LightGBM, a quantile regression on windows of the account's days.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from model.data.dataset import Dataset
from model.evaluation.lightgbm_reference import lightgbm
from model.forecast.shape import DAYS_MAX, LEVELS
from model.training.forecast_samples import ForecastSamples
from model.units import DAY_MS

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Rows = NDArray[np.intp]

RECENT_DAYS = 90
SMOOTHINGS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
WINDOWS = (1, 7, 30, 90)
TREES = 150
LEARNED_ROWS = 60_000
"""Forecast days from which LightGBM learns."""

PARAMETERS = {
    "objective": "quantile",
    "learning_rate": 0.07,
    "num_leaves": 31,
    "min_data_in_leaf": 100,
    "deterministic": True,
    "num_threads": 1,
    "verbosity": -1,
}

_LEVELS = np.array(LEVELS)
_Z = np.array([NormalDist().inv_cdf(level) for level in LEVELS])


class AccountDays:
    """The days of some accounts as a table [accounts, days].

    Args:
        dataset: the transactions.
        account: [m] accounts of interest.
    """

    def __init__(self, dataset: Dataset, account: NDArray[np.int64]) -> None:
        chosen = np.unique(account)
        place = np.full(int(dataset.account.max()) + 1, -1)
        place[chosen] = np.arange(len(chosen))
        at, day = place[dataset.account], dataset.day
        mine = np.flatnonzero(at >= 0)
        shape = len(chosen), int(day[-1]) + 1
        self._chosen = chosen
        self.first_day = int(dataset.timestamp_ms[0] // DAY_MS)
        self.amount = np.zeros(shape)
        self.count = np.zeros(shape)
        np.add.at(self.amount, (at[mine], day[mine]), dataset.amount[mine])
        np.add.at(self.count, (at[mine], day[mine]), 1.0)
        self.begin = np.argmax(self.count > 0, axis=1)  # day of each account's first payment

    def place(self, samples: ForecastSamples) -> tuple[Rows, Rows]:
        """Return row and first unseen day [m] of samples in the table."""
        row = np.searchsorted(self._chosen, samples.account)
        return row, samples.asked_ms // DAY_MS - self.first_day


def own_quantiles(
    table: Float64, days: AccountDays, samples: ForecastSamples, recent: int | None
) -> Float64:
    """Return the empirical quantiles [m, 1, Q] of each account's own days."""
    row, end = days.place(samples)
    begin = days.begin[row]
    if recent is not None:
        begin = np.maximum(begin, end - recent)
    found = np.zeros((len(row), 1, len(LEVELS)))
    for i in np.flatnonzero(end > begin).tolist():
        found[i, 0] = np.quantile(table[row[i], begin[i] : end[i]], _LEVELS)
    return found


def own_mean(table: Float64, days: AccountDays, samples: ForecastSamples) -> Float64:
    """Return normal quantiles [m, 1, Q] of the mean and deviation of each account's own days."""
    row, end = days.place(samples)
    mean, square, _ = _moments(table, days.begin[row], row, end)
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
    quantiles: Float64 = np.maximum(mean[:, None] + deviation[:, None] * _Z, 0.0)
    return quantiles[:, None]


def _moments(table: Float64, begin: Rows, row: Rows, end: Rows) -> tuple[Float64, Float64, Float64]:
    """Return mean, mean square and number of days [m] from ``begin`` to ``end``."""
    zero = np.zeros((len(table), 1))
    total = np.concatenate((zero, np.cumsum(table, axis=1)), axis=1)
    square = np.concatenate((zero, np.cumsum(table**2, axis=1)), axis=1)
    end = np.maximum(end, begin)
    number = np.maximum(end - begin, 1).astype(np.float64)
    mean = (total[row, end] - total[row, begin]) / number
    return mean, (square[row, end] - square[row, begin]) / number, number


def smoothed(table: Float64, days: AccountDays, samples: ForecastSamples) -> Float64:
    """Return the quantiles [m, T, Q] of simple exponential smoothing."""
    row, end = days.place(samples)
    m, accounts = len(row), len(table)
    best = np.full(m, np.inf)
    level, error, alpha = np.zeros(m), np.zeros(m), np.zeros(m)
    day_ends = [np.flatnonzero(end == day) for day in range(table.shape[1] + 1)]
    number = np.maximum(end - days.begin[row] - 1, 1)
    for smoothing in SMOOTHINGS:
        now, squares = np.zeros(accounts), np.zeros(accounts)
        for day in range(table.shape[1] + 1):
            asked = day_ends[day]
            better = asked[squares[row[asked]] < best[asked]]
            best[better] = squares[row[better]]
            level[better] = now[row[better]]
            error[better] = np.sqrt(squares[row[better]] / number[better])
            alpha[better] = smoothing
            if day == table.shape[1]:
                break
            value = table[:, day]
            difference = np.where(day > days.begin, value - now, 0.0)
            squares += difference**2
            now = np.where(day == days.begin, value, now + smoothing * difference)
    ahead = np.arange(DAYS_MAX)
    deviation = error[:, None] * np.sqrt(1.0 + ahead * alpha[:, None] ** 2)  # [m, T]
    quantiles: Float64 = np.maximum(level[:, None, None] + deviation[:, :, None] * _Z, 0.0)
    return quantiles


class BoostedQuantiles:
    """LightGBM's quantile regression on windows of an account's days.

    Args:
        days: the accounts' days.
        training: samples to learn from.
        truth: gives the truth [m, T] of samples.
        table: [accounts, days] of the quantity to forecast.
        seed: decides the rows that it learns from.
    """

    def __init__(
        self,
        days: AccountDays,
        training: ForecastSamples,
        truth: Callable[[ForecastSamples], Float32],
        table: Float64,
        seed: int,
        show: Callable[[float], None] = lambda share: None,
    ) -> None:
        module = lightgbm()
        self._days, self._table = days, table
        sample, ahead = np.nonzero(training.after.known)
        rng = np.random.default_rng(seed)
        chosen = rng.permutation(len(sample))[:LEARNED_ROWS]
        sample, ahead = sample[chosen], ahead[chosen]
        inputs = self._inputs(training, sample, ahead)
        values = truth(training)[sample, ahead]
        self._boosters = []
        for number, level in enumerate(LEVELS):
            data = module.Dataset(inputs, values)
            parameters = PARAMETERS | {"alpha": level, "seed": seed}
            self._boosters.append(module.train(parameters, data, TREES))
            show((number + 1) / len(LEVELS))

    def quantiles(self, samples: ForecastSamples) -> Float64:
        """Return the quantiles [m, T, Q]."""
        m = len(samples)
        sample, ahead = np.divmod(np.arange(m * DAYS_MAX), DAYS_MAX)
        inputs = self._inputs(samples, sample, ahead)
        found = [booster.predict(inputs, num_threads=1) for booster in self._boosters]
        quantiles = np.maximum.accumulate(np.maximum(np.stack(found, axis=-1), 0.0), axis=-1)
        return np.asarray(quantiles.reshape(m, DAYS_MAX, len(LEVELS)))

    def _inputs(self, samples: ForecastSamples, sample: Rows, ahead: Rows) -> Float32:
        """Return the inputs of forecast days: windows, age, silence, weekday and distance."""
        row, end = self._days.place(samples)
        begin = self._days.begin[row]
        columns = []
        for table in (self._table, self._days.count):
            for window in (*WINDOWS, None):
                since = begin if window is None else np.maximum(begin, end - window)
                mean, square, _ = _moments(table, since, row, end)
                columns += [mean, np.sqrt(np.maximum(square - mean**2, 0.0))]
        paid = np.where(self._days.count > 0, np.arange(self._days.count.shape[1]), -1)
        last = np.maximum.accumulate(paid, axis=1)
        before = np.maximum(end - 1, 0)
        columns += [end - begin, end - last[row, before]]
        of_sample = np.stack(columns, axis=1)[sample]
        of_day = np.stack((samples.after.weekday[sample, ahead], ahead), axis=1)
        return np.concatenate((of_sample, of_day), axis=1).astype(np.float32)
