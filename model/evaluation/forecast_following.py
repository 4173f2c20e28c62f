"""The number of payments until a forecast follows an account whose rate or level changes.

    steady accounts, then a change for good  ->  forecasts after each payment  ->  share of the way

The share of the way is that of the logarithm, in the mean over the accounts: 0 is the forecast just
before the change, 1 is the new rate or level.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.checkpoint import Checkpoint
from model.data.dataset import LEGITIMATE, Dataset
from model.forecast.shape import LEVELS
from model.training.forecast_samples import Moments, StateLog
from model.training.preparation import write_raw_for
from model.training.sequences import Sequences
from model.units import DAY_MS

ACCOUNTS = 150
STEADY_DAYS = 90
AFTER_PAYMENTS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 80)
"""Payments after the change at which forecasts are asked for."""

FOLLOWED = 0.5
"""Share of the way from which a forecast counts as following."""

CHANGES = (
    ("level doubled", 1.0, 2.0),
    ("level halved", 1.0, 0.5),
    ("rate doubled", 2.0, 1.0),
    ("rate halved", 0.5, 1.0),
)
"""Changes with the factors of rate and level."""

MERCHANTS = 300
START_MS = 1_522_540_800_000
CLOSED_DAYS = (1, 2, 3, 5, 7, 10, 15, 20, 30)
"""Days after the last payment at which a closed account is looked at."""


class Following(msgspec.Struct, frozen=True):
    """Steps after one kind of change.

    Attributes:
        title: the change.
        share: share of the way, by number of payments since.
        payments: fewest payments with a share of :data:`FOLLOWED`; None if it was not reached.
    """

    title: str
    share: dict[int, float]
    payments: int | None


def measure_following(checkpoint: Checkpoint, seed: int = 1) -> list[Following]:
    """Measure how fast the checkpoint's forecast follows each of :data:`CHANGES`."""
    assert checkpoint.forecaster is not None
    return [_followed(checkpoint, title, rate, level, seed) for title, rate, level in CHANGES]


def silence_of_closed(checkpoint: Checkpoint, seed: int = 1) -> dict[int, float]:
    """Return the mean forecast that an account stays silent for a week more.

    Returns:
        The probability by days since the last payment of accounts with a payment a day before.
    """
    assert checkpoint.forecaster is not None
    rng = np.random.default_rng(seed)
    account, times, amount = _payments(rng, np.ones(ACCOUNTS), np.ones(ACCOUNTS), 0)
    last = np.array([times[account == a].max() for a in range(ACCOUNTS)])
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        log, sequences = _log(checkpoint, account, times, amount, Path(folder))
        for days in CLOSED_DAYS:
            part = np.arange(ACCOUNTS)
            position = sequences.start + sequences.length - 1
            asked = last + days * DAY_MS
            samples = log.samples(sequences, Moments(part, position, asked), 1)
            forecast = checkpoint.forecaster.decode(samples.asked, 7)
            found[days] = round(float(forecast.silent[:, -1].mean()), 4)
    return found


def _followed(
    checkpoint: Checkpoint, title: str, rate: float, level: float, seed: int
) -> Following:
    rng = np.random.default_rng(seed)
    rates = np.exp(rng.uniform(np.log(0.5), np.log(4.0), ACCOUNTS))
    account, times, amount = _payments(
        rng, rates, np.ones(ACCOUNTS), max(AFTER_PAYMENTS) + 1, rate, level
    )
    changed_ms = START_MS + STEADY_DAYS * DAY_MS
    share: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        log, sequences = _log(checkpoint, account, times, amount, Path(folder))
        row_times = times[sequences.row]
        steady = np.array(
            [
                np.searchsorted(row_times[s : s + n], changed_ms)
                for s, n in zip(sequences.start, sequences.length, strict=True)
            ]
        )
        before = _expected(checkpoint, log, sequences, steady - 1, row_times)
        for number in AFTER_PAYMENTS:
            now = _expected(checkpoint, log, sequences, steady + number - 1, row_times)
            place = 0 if rate != 1.0 else 1
            way = np.log(rate if rate != 1.0 else level)
            share[number] = round(float(np.mean(now[place] - before[place]) / way), 3)
    reached = [number for number, found in share.items() if found >= FOLLOWED]
    return Following(title, share, min(reached, default=None))


def _expected(
    checkpoint: Checkpoint,
    log: StateLog,
    sequences: Sequences,
    number: NDArray[np.intp],
    row_times: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the logarithms of the expected rate and of the largest payment's median [accounts].

    The median is of the largest payment that there is: its quantiles above no payment.
    """
    assert checkpoint.forecaster is not None
    position = sequences.start + number
    part = np.arange(len(sequences.start))
    samples = log.samples(sequences, Moments(part, position, row_times[position]), 1)
    forecast = checkpoint.forecaster.decode(samples.asked, 7)
    rate = np.log(forecast.mean_payments.mean(axis=1))
    high = forecast.amount[:, :, LEVELS.index(0.95)].mean(axis=1)
    return rate, np.log(np.maximum(high, 1e-9))


def _payments(
    rng: np.random.Generator,
    rates: NDArray[np.float64],
    levels: NDArray[np.float64],
    after: int,
    rate: float = 1.0,
    level: float = 1.0,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Draw payments of steady accounts and ``after`` more after the change, in order of time."""
    parts = []
    for number, per_day in enumerate(rates):
        steady = max(2, int(rng.poisson(per_day * STEADY_DAYS)))
        old = np.sort(rng.uniform(0, STEADY_DAYS, steady))
        new = STEADY_DAYS + np.cumsum(rng.exponential(1 / (per_day * rate), after))
        at = np.concatenate((old, new))
        amount = 40.0 * levels[number] * np.exp(0.5 * rng.standard_normal(len(at)))
        amount[steady:] *= level
        parts.append((np.full(len(at), number), at, amount))
    account, at, amount = (np.concatenate(c) for c in zip(*parts, strict=True))
    order = np.argsort(at, kind="stable")
    times = START_MS + (at[order] * DAY_MS).astype(np.int64)
    return account[order].astype(np.int64), times, np.round(amount[order], 2)


def _log(
    checkpoint: Checkpoint,
    account: NDArray[np.int64],
    times: NDArray[np.int64],
    amount: NDArray[np.float64],
    folder: Path,
) -> tuple[StateLog, Sequences]:
    spec = checkpoint.header.features
    n = len(account)
    dataset = Dataset(
        account.astype(np.int32),
        np.random.default_rng(0).integers(0, MERCHANTS, n).astype(np.int32),
        amount * (spec.scale.usual / 40.0),
        times,
        np.full(n, LEGITIMATE, np.int8),
        np.zeros(n, np.int8),
        numeric={
            f.name: np.full(n, np.nan, np.float32) for f in spec.fields if f.kind == "numeric"
        },
        categorical={f.name: np.full(n, -1, np.int32) for f in spec.fields if f.kind != "numeric"},
        texts={f.name: [] for f in spec.fields if f.kind != "numeric"},
    )
    sequences = Sequences(dataset.account)
    raw = write_raw_for(dataset, sequences, spec, checkpoint.network.own, folder / "raw")
    return StateLog(dataset, sequences, raw, spec, checkpoint.stepper), sequences
