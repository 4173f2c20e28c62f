"""The exact windows of the Fraud Detection Handbook: the inputs of the outside reference.

They serve only for comparison. They use single transactions, not closed buckets, so a stream would
have to keep every transaction of the last 37 days. The published definition
(Le Borgne, Siblini, Lebichot, Bontempi: "Reproducible Machine Learning for Credit Card Fraud
Detection - Practical Handbook", chapter 3, "Baseline feature transformation"):

- weekend, and night (hours 0 to 6), as flags;
- for the card: transactions and mean amount in the last 1, 7 and 30 days, this one included;
- for the terminal: transactions and their share of fraud in the 1, 7 and 30 days that ended one
  label delay ago.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.data.dataset import Dataset
from model.features.account import Float32
from model.units import DAY_MS, HOUR_MS

WINDOW_DAYS = (1, 7, 30)

WINDOW_INPUTS: tuple[str, ...] = (
    "amount",
    "weekend",
    "night",
    *(f"card_{what}_{days}d" for days in WINDOW_DAYS for what in ("transactions", "mean_amount")),
    *(f"terminal_{what}_{days}d" for days in WINDOW_DAYS for what in ("transactions", "risk")),
)
"""Names of the columns of :func:`window_inputs`."""

_NIGHT_UNTIL_HOUR = 6
_MONDAY_OFFSET = 3  # 1970-01-01 was a Thursday
_SATURDAY = 5


def window_inputs(log: Dataset, label_delay_days: float = 7.0) -> Float32:
    """Compute the columns [N, 15] of :data:`WINDOW_INPUTS` of each transaction.

    A window of w days that ends at t holds the times in (t - w, t]. Risk is 0 in a window without
    transactions.
    """
    delay_ms = round(label_delay_days * DAY_MS)
    inputs = np.empty((len(log), len(WINDOW_INPUTS)), np.float32)
    inputs[:, 0] = log.amount
    inputs[:, 1] = (log.timestamp_ms // DAY_MS + _MONDAY_OFFSET) % 7 >= _SATURDAY
    inputs[:, 2] = log.timestamp_ms % DAY_MS // HOUR_MS <= _NIGHT_UNTIL_HOUR
    cards = _Past(log.account, log.timestamp_ms, log.amount)
    terminals = _Past(log.merchant, log.timestamp_ms, log.is_fraud.astype(np.float64))
    column = 3
    for days in WINDOW_DAYS:
        count, amount = cards.within(0, days * DAY_MS)
        inputs[:, column] = count
        # At least 1: the window includes the transaction itself.
        inputs[:, column + 1] = amount / count
        column += 2
    for days in WINDOW_DAYS:
        count, frauds = terminals.within(delay_ms, days * DAY_MS)
        inputs[:, column] = count
        inputs[:, column + 1] = frauds / np.maximum(count, 1)
        column += 2
    return inputs


class _Past:
    """Counts and sums over windows of each key's past, by binary search."""

    def __init__(
        self,
        key: NDArray[np.int32],
        timestamp_ms: NDArray[np.int64],
        value: NDArray[np.float64],
    ) -> None:
        number = np.unique(key, return_inverse=True)[1].astype(np.int64)
        since_ms = timestamp_ms - timestamp_ms.min(initial=2**62)
        span_ms = int(since_ms.max(initial=0)) + 1
        self._order = np.lexsort((since_ms, number))
        # Each key gets its own section of one long time line. Sorted, so that neighbouring
        # searches read neighbouring memory.
        self._base = number[self._order] * span_ms
        self._since_ms = since_ms[self._order]
        self._place = self._base + self._since_ms
        self._sum = np.concatenate((np.zeros(1), np.cumsum(value[self._order])))

    def within(
        self, delay_ms: int, window_ms: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return count and sum [N] of the window that ended ``delay_ms`` before each time."""
        end = self._until(self._since_ms - delay_ms)
        begin = self._until(self._since_ms - delay_ms - window_ms)
        count, total = np.empty_like(end), np.empty(len(end))
        count[self._order] = end - begin
        total[self._order] = self._sum[end] - self._sum[begin]
        return count, total

    def _until(self, since_ms: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the place after the key's last transaction up to that time."""
        clipped = np.maximum(since_ms, -1)  # before the first: the start of the key's section
        return np.searchsorted(self._place, self._base + clipped, side="right").astype(np.int64)
