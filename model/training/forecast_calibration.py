"""Calibration of a forecast head on days that it did not learn from.

Quantiles get a factor for each length of history, weekday and level (conformal: the quantile of the
ratio of truth and forecast). Expected counts get a factor, and silence and fraud a shift of their
logits. Groups with few days are drawn to no change.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from model.features.amount_scale import AmountScale
from model.forecast.forecaster import Forecaster, Forecasts
from model.forecast.shape import LENGTHS, LEVELS, WEEKDAYS, length_group
from model.training.forecast_samples import DaysAfter, ForecastSamples

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

PRIOR_DAYS = 1000.0
"""Weight of no change, in days of accounts, for the factors of quantiles."""

PRIOR_PAYMENTS = 1000.0
"""Weight of no change, in payments, for the factors of counts."""

PRIOR_EVENTS = 20.0
"""Weight of no change, in events, for the shifts of logits."""

FACTOR_RANGE = (0.2, 5.0)
SHIFT_STEPS = 30


def calibrate(
    weights: Mapping[str, Float32], scale: AmountScale, samples: ForecastSamples
) -> dict[str, Float32]:
    """Return the tensors of a head with its calibration by these samples."""
    calibrated = dict(weights)
    if not len(samples) or not samples.after.known.any():
        return calibrated
    length = length_group(samples.asked.count)
    after = samples.after
    forecasts = Forecaster(calibrated, scale).decode(samples.asked)
    payments = _count_factors(forecasts, after, length)
    calibrated["calibration.payments"] = payments
    forecasts = Forecaster(calibrated, scale).decode(samples.asked)
    for name in ("amount", "largest"):
        calibrated[f"calibration.{name}"] = _quantile_factors(
            getattr(forecasts, name), getattr(after, name), after, length
        )
    calibrated["calibration.silent"] = _hazard_shifts(forecasts, after, length)
    calibrated["calibration.fraud"] = np.array(
        [
            _shift(forecasts.fraud[there], after.is_fraud[there])
            for group in range(len(LENGTHS))
            for there in [after.known & (length == group)[:, None]]
        ],
        np.float32,
    )
    return calibrated


def _count_factors(forecasts: Forecasts, after: DaysAfter, length: NDArray[np.intp]) -> Float32:
    factors = np.ones((len(LENGTHS), WEEKDAYS), np.float32)
    for group in range(len(LENGTHS)):
        for weekday in range(WEEKDAYS):
            there = _cell(after, length, group, weekday)
            truth = float(after.count[there].sum()) + PRIOR_PAYMENTS
            factors[group, weekday] = truth / (
                float(forecasts.mean_payments[there].sum()) + PRIOR_PAYMENTS
            )
    return np.clip(factors, *FACTOR_RANGE)


def _quantile_factors(
    quantiles: Float64, truth: Float32, after: DaysAfter, length: NDArray[np.intp]
) -> Float32:
    factors = np.ones((len(LENGTHS), WEEKDAYS, len(LEVELS)), np.float32)
    for group in range(len(LENGTHS)):
        for weekday in range(WEEKDAYS):
            there = _cell(after, length, group, weekday)
            forecast, found = quantiles[there], truth[there]
            for place, level in enumerate(LEVELS):
                counts = forecast[:, place] > 0
                days = int(counts.sum())
                if not days:
                    continue
                ratio = np.quantile(found[counts] / forecast[counts, place], level)
                ratio = np.clip(ratio, *FACTOR_RANGE)
                factors[group, weekday, place] = ratio ** (days / (days + PRIOR_DAYS))
    return factors


def _hazard_shifts(forecasts: Forecasts, after: DaysAfter, length: NDArray[np.intp]) -> Float32:
    """Return the shift of each length group, from the days before which the account was silent."""
    before = np.concatenate((np.ones((len(length), 1)), forecasts.silent[:, :-1]), axis=1)
    pays = 1.0 - forecasts.silent / np.maximum(before, 1e-300)
    paid = after.count > 0
    was_silent: NDArray[np.bool_] = np.cumsum(paid, axis=1) - paid == 0
    known = np.logical_and.accumulate(after.known, axis=1)
    shifts = []
    for group in range(len(LENGTHS)):
        there = known & was_silent & (length == group)[:, None]
        shifts.append(_shift(pays[there], paid[there]))
    return np.array(shifts, np.float32)


def _cell(
    after: DaysAfter, length: NDArray[np.intp], group: int, weekday: int
) -> NDArray[np.bool_]:
    there: NDArray[np.bool_] = after.known & (after.weekday == weekday)
    there &= (length == group)[:, None]
    return there


def _shift(probability: Float64, happened: NDArray[np.bool_]) -> float:
    """Return the shift of the logits that makes their mean probability the observed share."""
    if not len(probability):
        return 0.0
    p = np.clip(probability, 1e-9, 1 - 1e-9)
    logit = np.log(p) - np.log1p(-p)
    expected, events = float(p.sum()), float(happened.sum())
    # A prior of events that are as frequent as forecast.
    share = (events + PRIOR_EVENTS) / (expected + PRIOR_EVENTS)
    target = min(share * expected, 0.999 * len(p))
    low, high = -5.0, 5.0
    for _ in range(SHIFT_STEPS):
        middle = (low + high) / 2
        mean = float((1.0 / (1.0 + np.exp(-logit - middle))).sum())
        low, high = (middle, high) if mean < target else (low, middle)
    return (low + high) / 2
