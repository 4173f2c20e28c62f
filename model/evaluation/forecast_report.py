"""The comparison of the forecast head with other forecasts, on days that no one learned from."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.checkpoint import Checkpoint
from model.evaluation.forecast_baselines import (
    RECENT_DAYS,
    AccountDays,
    BoostedQuantiles,
    own_mean,
    own_quantiles,
    smoothed,
)
from model.evaluation.forecast_following import (
    Following,
    measure_following,
    silence_of_closed,
)
from model.forecast.shape import length_group
from model.training.forecast_head import (
    ForecastData,
    draw_samples,
    held_out_samples,
    state_log,
)
from model.training.forecast_measures import covered, groups, pinball_loss
from model.training.forecast_samples import ForecastSamples, some_accounts

Float64 = NDArray[np.float64]
Show = Callable[[float, str], None]

HEAD = "forecast head"


class ForecastRow(msgspec.Struct, frozen=True):
    """Measures of one way to forecast.

    Attributes:
        title: the way.
        amount, payments: mean pinball loss of a day's amount and of its number of payments.
        few_amount, few_payments: the same of accounts with fewer than ten payments.
        coverage: share of days in the 80 % interval of the amount; a day without payment counts
            by the interval's share of its probability. None: the way gives no probability.
        plain_coverage: share of days in the closed interval.
    """

    title: str
    amount: float
    payments: float
    few_amount: float | None
    few_payments: float | None
    coverage: float | None
    plain_coverage: float


class ForecastResults(msgspec.Struct, frozen=True):
    """Results of the comparison.

    Attributes:
        rows: the ways to forecast.
        days: forecast days that were measured.
        samples: moments of asking.
        groups: coverage of the head by weekday and by length of history, with the days of each.
        silent: mean forecast and observed share of accounts that are silent for a week.
        fraud: mean forecast and observed share of days with fraud.
        following: how fast the head follows simulated accounts that change.
        closed: the head's mean probability that an account with a payment a day stays silent for
            a week more, by days since its last payment.
    """

    rows: list[ForecastRow]
    days: int
    samples: int
    groups: dict[str, tuple[float, int]]
    silent: tuple[float, float]
    fraud: tuple[float, float]
    following: list[Following] = []
    closed: dict[int, float] = {}


def compare_forecasts(
    checkpoint: Checkpoint,
    data: ForecastData,
    seed: int,
    show: Show = lambda share, note: None,
    *,
    boosted: bool = True,
) -> ForecastResults | None:
    """Compare the checkpoint's head with the baselines; None without a head or without days.

    Args:
        checkpoint: with a forecast head.
        data: the log, with raw features of the checkpoint's specification.
        seed: decides the moments.
        show: called with the share done and the present step.
        boosted: whether LightGBM takes part; it must be installed.
    """
    if checkpoint.forecaster is None:
        return None
    log, split = state_log(checkpoint.stepper, data), data.split
    chosen = some_accounts(data.sequences, seed)
    test = held_out_samples(log, chosen, split, seed + 2)
    if not len(test):
        return None
    show(0.2, HEAD)
    forecasts = checkpoint.forecaster.decode(test.asked)
    rows = [_row(HEAD, test, forecasts.amount, forecasts.payments, forecasts.none)]
    show(0.3, "own history")
    days = AccountDays(data.dataset, test.account)
    for title, recent in (("own quantiles", None), (f"own, {RECENT_DAYS} days", RECENT_DAYS)):
        amount, count = (own_quantiles(t, days, test, recent) for t in (days.amount, days.count))
        rows.append(_row(title, test, amount, count))
    amount, count = (own_mean(t, days, test) for t in (days.amount, days.count))
    rows.append(_row("own mean", test, amount, count))
    show(0.5, "exponential smoothing")
    amount, count = (smoothed(t, days, test) for t in (days.amount, days.count))
    rows.append(_row("exponential smoothing", test, amount, count))
    if boosted:
        show(0.6, "LightGBM")
        training = draw_samples(
            log, chosen, (split.training, split.validation), split.validation, seed, whole=True
        )
        both = AccountDays(data.dataset, np.concatenate((test.account, training.account)))
        amount = BoostedQuantiles(
            both, training, lambda s: s.after.amount, both.amount, seed,
            lambda share: show(0.7 + 0.1 * share, "LightGBM, amounts"),
        ).quantiles(test)  # fmt: skip
        count = BoostedQuantiles(
            both, training, lambda s: s.after.count, both.count, seed,
            lambda share: show(0.85 + 0.1 * share, "LightGBM, payments"),
        ).quantiles(test)  # fmt: skip
        rows.append(_row("LightGBM, windows", test, amount, count))
    show(0.95, "accounts that change")
    following, closed = measure_following(checkpoint, seed), silence_of_closed(checkpoint, seed)
    inside = covered(forecasts.amount, test.after.amount, forecasts.none)
    known = test.after.known
    week = known[:, :7].all(axis=1)
    quiet = test.after.count[week, :7].sum(axis=1) == 0
    show(1.0, "")
    return ForecastResults(
        rows=rows,
        days=int(known.sum()),
        samples=len(test),
        groups={
            name: (float(inside[mask].mean()), int(mask.sum()))
            for name, mask in groups(test)
            if mask.any()
        },
        silent=_pair(forecasts.silent[week, 6], quiet),
        fraud=_pair(forecasts.fraud[known], test.after.is_fraud[known]),
        following=following,
        closed=closed,
    )


def _row(
    title: str,
    test: ForecastSamples,
    amount: Float64,
    count: Float64,
    none: Float64 | None = None,
) -> ForecastRow:
    after = test.after
    known = after.known
    shape = (*known.shape, amount.shape[-1])
    amount, count = np.broadcast_to(amount, shape), np.broadcast_to(count, shape)
    of_amount, of_count = pinball_loss(amount, after.amount), pinball_loss(count, after.count)
    few = known & (length_group(test.asked.count) == 0)[:, None]
    return ForecastRow(
        title,
        float(of_amount[known].mean()),
        float(of_count[known].mean()),
        float(of_amount[few].mean()) if few.any() else None,
        float(of_count[few].mean()) if few.any() else None,
        None if none is None else float(covered(amount, after.amount, none)[known].mean()),
        float(covered(amount, after.amount, None)[known].mean()),
    )


def _pair(forecast: Float64, happened: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the mean forecast and the observed share; zeros without any."""
    if not len(forecast):
        return 0.0, 0.0
    return float(forecast.mean()), float(happened.mean())


def forecast_table(results: ForecastResults) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the table of forecasts."""
    headings = ["forecast", "amount", "payments", "amount, <10", "payments, <10"]
    headings += ["coverage", "closed"]
    rows = [
        [
            row.title,
            f"{row.amount:.3f}",
            f"{row.payments:.4f}",
            "–" if row.few_amount is None else f"{row.few_amount:.3f}",
            "–" if row.few_payments is None else f"{row.few_payments:.4f}",
            "–" if row.coverage is None else f"{row.coverage:.1%}",
            f"{row.plain_coverage:.1%}",
        ]
        for row in results.rows
    ]
    return headings, rows


def following_table(results: ForecastResults) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the table of accounts that change."""
    numbers = list(results.following[0].share) if results.following else []
    headings = ["change, share of the way after payments", *(str(n) for n in numbers), "half way"]
    rows = [
        [
            found.title,
            *(f"{share:.0%}" for share in found.share.values()),
            "–" if found.payments is None else str(found.payments),
        ]
        for found in results.following
    ]
    return headings, rows
