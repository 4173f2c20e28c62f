"""Views of whole histories, by which real and generated accounts are compared.

A view knows nothing of who made the transactions: only what a log of them holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.data.dataset import Dataset
from model.units import DAY_MS, HOUR_MS

Floats = NDArray[np.float64]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

STEP_VIEWS = (
    *("gap", "amount", "to_usual", "hour_x", "hour_y", "hour2_x", "hour2_y"),
    *(f"weekday_{day}" for day in range(7)),
    *("seen", "since_visit", "visits", "same", "fraud", "count", "cents"),
)
"""Numbers of a transaction that a discriminator sees, in order.

Each account is judged alone. How many accounts a merchant has is a mark of the whole group: by it,
two groups of real accounts can be told apart. It is a distance of its own instead.
"""

SINCE_NEVER = 8.0


@dataclass(frozen=True)
class Histories:
    """A log account by account.

    Attributes:
        start, length: [accounts] place and number of each account's rows.
        row: [N] rows of the log in that order.
        steps: [N, V] see :data:`STEP_VIEWS`.
        gap_hours: [N] since the account's last transaction; NaN for its first.
        seen: [N] whether the account was at the merchant before.
        visits: [N] earlier visits of the account at the merchant.
    """

    log: Dataset
    start: Int64
    length: Int64
    row: Int64
    steps: Float32
    gap_hours: Floats
    seen: NDArray[np.bool_]
    visits: Int64

    @property
    def accounts(self) -> int:
        """Number of accounts."""
        return len(self.start)

    def column(self, name: str) -> NDArray[np.float64]:
        """Return a column of the log in the order account by account."""
        return np.asarray(getattr(self.log, name)[self.row], np.float64)


def histories_of(log: Dataset) -> Histories:
    """Compute the views of a log."""
    row = np.lexsort((log.timestamp_ms, log.account))
    account, merchant = log.account[row].astype(np.int64), log.merchant[row].astype(np.int64)
    time, amount = log.timestamp_ms[row], np.asarray(log.amount[row])
    length = np.unique(account, return_counts=True)[1]
    start = np.cumsum(length) - length
    step = np.arange(len(row)) - np.repeat(start, length)
    gap = np.full(len(row), np.nan)
    gap[1:] = np.diff(time) / HOUR_MS
    gap[start] = np.nan
    visits, since = _visits(account, merchant, step)
    seen = visits > 0
    logs = np.log(amount + 0.01)
    total = np.cumsum(logs)
    before = total - logs - np.repeat((total - logs)[start], length)
    usual = np.where(step > 0, before / np.maximum(step, 1), logs)
    angle = 2 * np.pi * (time % DAY_MS) / DAY_MS
    weekday = (time // DAY_MS + 3) % 7
    same = np.zeros(len(row))
    same[1:] = np.diff(merchant) == 0
    same[start] = 0
    columns = [
        np.log(np.nan_to_num(gap, nan=24.0) + 1 / 60),
        logs,
        logs - usual,
        np.cos(angle),
        np.sin(angle),
        np.cos(2 * angle),
        np.sin(2 * angle),
        *(weekday == day for day in range(7)),
        seen,
        np.where(seen, np.log1p(since), SINCE_NEVER),
        np.log1p(visits),
        same,
        log.is_fraud[row],
        np.log1p(step),
        np.abs(amount - np.round(amount)) > 1e-6,
    ]
    steps = np.stack([np.asarray(column, np.float32) for column in columns], 1)
    return Histories(log, start, length, row, steps, gap, seen, visits)


def _visits(account: Int64, merchant: Int64, step: Int64) -> tuple[Int64, Int64]:
    """Return the earlier visits of the account at the merchant, and the steps since the last."""
    order = np.lexsort((step, merchant, account))
    first = np.ones(len(order), np.bool_)
    first[1:] = (np.diff(account[order]) != 0) | (np.diff(merchant[order]) != 0)
    group = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    visits, since = np.zeros(len(order), np.int64), np.zeros(len(order), np.int64)
    visits[order] = np.arange(len(order)) - group
    gaps = np.zeros(len(order), np.int64)
    gaps[1:] = np.diff(step[order])
    since[order] = np.where(first, 0, gaps)
    return visits, since


def account_vectors(histories: Histories) -> Floats:
    """Return numbers [accounts, D] that describe each account as a whole."""
    account = np.repeat(np.arange(histories.accounts), histories.length)
    n = histories.length.astype(float)

    def mean_of(values: NDArray[np.float64] | NDArray[np.bool_]) -> Floats:
        return np.asarray(np.bincount(account, np.asarray(values, float), histories.accounts) / n)

    steps = {name: histories.steps[:, at].astype(float) for at, name in enumerate(STEP_VIEWS)}
    columns = [np.log(n)]
    for name in ("gap", "amount", "since_visit"):
        mean = mean_of(steps[name])
        columns += [mean, np.sqrt(mean_of((steps[name] - mean[account]) ** 2))]
    columns += [mean_of(steps[name]) for name in ("hour_x", "hour_y", "seen", "fraud", "same")]
    columns += [mean_of(steps["weekday_5"]) + mean_of(steps["weekday_6"])]
    columns += [np.log1p(n * mean_of(~histories.seen))]
    return np.stack(columns, 1)
