"""Measures of forecasts: pinball loss, and the coverage of the 80 % interval."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from model.forecast.forecaster import Forecasts
from model.forecast.shape import LENGTHS, LEVELS, WEEKDAYS, length_group
from model.training.forecast_samples import ForecastSamples

Float64 = NDArray[np.float64]
Mask = NDArray[np.bool_]

LOWER, UPPER = LEVELS.index(0.10), LEVELS.index(0.90)
"""Places of the ends of the 80 % interval."""

WEEKDAY_NAMES = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
FEW = LENGTHS[1]
"""Accounts with fewer payments are measured apart."""

_LEVELS = np.array(LEVELS)


def pinball_loss(quantiles: Float64, truth: NDArray[np.floating]) -> Float64:
    """Return the pinball loss [...] of quantiles [..., Q] of truths [...], mean over the levels.

    >>> pinball_loss(np.full((1, 7), 10.0), np.array([10.0, 14.0])[:1]).tolist()
    [0.0]
    """
    above = truth[..., None] - quantiles
    loss: Float64 = np.maximum(_LEVELS * above, (_LEVELS - 1.0) * above).mean(-1)
    return loss


def covered(quantiles: Float64, truth: NDArray[np.floating], none: Float64 | None) -> Float64:
    """Return the share [...] of each truth that lies in the 80 % interval.

    The distribution has an atom: a day without payment. A truth of 0 counts in part, by the share
    of the atom between the levels 10 % and 90 % (the randomized probability integral transform,
    in expectation). Without that, every interval that begins at 0 would cover 90 %.

    Args:
        quantiles: [..., Q].
        truth: [...].
        none: [...] forecast probability of no payment. None: a truth of 0 counts like any other.
    """
    low, high = quantiles[..., LOWER], quantiles[..., UPPER]
    inside = ((truth >= low) & (truth <= high)).astype(np.float64)
    if none is None:
        return inside
    atom = np.clip(np.minimum(none, _LEVELS[UPPER]) - _LEVELS[LOWER], 0.0, None)
    return np.where(truth == 0, atom / np.maximum(none, 1e-12), inside)


def measure_forecasts(forecasts: Forecasts, samples: ForecastSamples) -> dict[str, float]:
    """Return the measures of a head by name; empty if no day is known."""
    after = samples.after
    known = after.known
    if not known.any():
        return {}
    inside = covered(forecasts.amount, after.amount, forecasts.none)
    found = {
        "pinball_amount": float(pinball_loss(forecasts.amount, after.amount)[known].mean()),
        "pinball_payments": float(pinball_loss(forecasts.payments, after.count)[known].mean()),
        "pinball_largest": float(pinball_loss(forecasts.largest, after.largest)[known].mean()),
        "coverage_80": float(inside[known].mean()),
        "days": float(known.sum()),
    }
    for name, mask in groups(samples):
        if name != "all" and mask.any():
            found[f"coverage_80 {name}"] = float(inside[mask].mean())
    return found


def groups(samples: ForecastSamples) -> Iterator[tuple[str, Mask]]:
    """Yield groups of forecast days by name: all, by weekday, and by length of history."""
    after = samples.after
    yield "all", after.known
    for weekday in range(WEEKDAYS):
        yield WEEKDAY_NAMES[weekday], after.known & (after.weekday == weekday)
    length = length_group(samples.asked.count)
    for number, name in enumerate(length_names()):
        yield name, after.known & (length == number)[:, None]


def length_names() -> list[str]:
    """Return the names of the groups of history lengths.

    >>> length_names()
    ['1-9 payments', '10-29 payments', '30-99 payments', '100+ payments']
    """
    ends = [f"-{following - 1}" for following in LENGTHS[1:]]
    return [f"{begin}{end} payments" for begin, end in zip(LENGTHS, [*ends, "+"], strict=True)]
