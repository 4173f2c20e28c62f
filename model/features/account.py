"""The features of an account: what its past payments tell about the next one.

Training, evaluation and the worker share this implementation. It works on *rounds*: arrays with one
transaction each of distinct accounts. The result of a row depends on no other row and not on their
number. So micro-batches of any size give the same bits.

    history, amount, timestamp_ms  --observe-->  raw columns of the account, history after
    profiles, timestamp_ms         --observe_merchants-->  raw columns of the merchant
    fields of the transaction      --field_column-->  raw columns of the extra fields
    raw [n, R]                     --Encoder-->  inputs [n, I]

The merchant is in :mod:`model.features.merchant`, the rest in :mod:`model.features.spec`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from model.features.amount_scale import AmountScale
from model.units import DAY_MS, HOUR_MS

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]
UInt32 = NDArray[np.uint32]
Rows = NDArray[np.intp] | slice

WINDOW_DAYS = (1, 7, 30)
"""Time constants of the decayed aggregates, days. A transaction that old weighs 1/e."""

ACCOUNT_FEATURES: tuple[str, ...] = (
    "amount",  # in the checkpoint's currency
    "seconds_since_last",  # since the account's last transaction; -1 at its first
    "hour_of_day",  # UTC, 0 up to 24, with fraction
    "day_of_week",  # UTC, 0 is Monday
    "transactions_seen",  # of the account, with this one
    "count_1d",  # decayed counts of the account's transactions, with this one
    "count_7d",
    "count_30d",
    "mean_amount_1d",  # decayed means before this one; AmountScale.usual at an account's first
    "mean_amount_7d",  # in these two an outlier counts as at most OUTLIER times the usual amount
    "mean_amount_30d",
    "amount_to_mean",  # amount / mean_amount_30d, or AmountScale.floor if that is more
    "usual_amount",  # running mean before this one, without outliers
    "amount_to_usual",  # amount / usual_amount, or AmountScale.floor if that is more
    "amount_to_least",  # the greater of these two ratios: how far it is under both
)
"""Names of an account's raw features, in the order of the columns."""

DEFINITION = 4
"""Version of what :func:`observe` computes; part of a checkpoint's digest."""

OUTLIER = 2.5
"""Multiple of the usual amount above which a payment is an outlier.

An outlier enters the means as this multiple, or as the account's mean of the last day if that is
more. So a second payment of the same size is no outlier."""

USUAL_COUNT_MAX = 100
"""Approximate number of last payments over which the usual amount is a mean."""

USUAL_PRIOR_COUNT = 1.0
"""Weight, in payments, of the usual amount of all accounts in a new account's usual amount."""

_MONDAY_OFFSET = 3  # 1970-01-01 was a Thursday
_COUNT_MAX = np.uint32(2**32 - 1)
_OUTLIER = np.float32(OUTLIER)
_USUAL_COUNT_MAX = np.uint8(USUAL_COUNT_MAX)
_USUAL_PRIOR_COUNT = np.float32(USUAL_PRIOR_COUNT)
_ONE = np.float32(1.0)
_WINDOWS = len(WINDOW_DAYS)
_DECAY_PER_MS = np.array([-1.0 / (days * DAY_MS) for days in WINDOW_DAYS])[:, None]  # [3, 1]


@dataclass
class AccountHistory:
    """The histories of n accounts, as a struct of arrays.

    Attributes:
        last_event_ms: [n] latest event time, epoch milliseconds; meaningless at count 0.
        count: [n] transactions seen; it stops at 2**32 - 1.
        decayed_count: [n, 3] sum of exp(-age / window) over the transactions, at
            ``last_event_ms``, for each of :data:`WINDOW_DAYS`.
        decayed_amount: [n, 3] amounts with the same weights. Outliers count in full only in the
            first window.
        usual_amount: [n] running mean of the amount without outliers; 0 at count 0.
        usual_count: [n] payments in that mean, up to :data:`USUAL_COUNT_MAX`.
    """

    last_event_ms: Int64
    count: UInt32
    decayed_count: Float32
    decayed_amount: Float32
    usual_amount: Float32
    usual_count: UInt8

    @classmethod
    def empty(cls, n: int) -> AccountHistory:
        """Return the histories of n accounts without a transaction.

        >>> AccountHistory.empty(2).count.tolist()
        [0, 0]
        """
        return cls(
            np.zeros(n, np.int64),
            np.zeros(n, np.uint32),
            np.zeros((n, _WINDOWS), np.float32),
            np.zeros((n, _WINDOWS), np.float32),
            np.zeros(n, np.float32),
            np.zeros(n, np.uint8),
        )

    def __len__(self) -> int:
        return len(self.count)

    def take(self, rows: Rows) -> AccountHistory:
        """Return these rows in this order: copies, or views if ``rows`` is a slice."""
        return AccountHistory(*(getattr(self, name)[rows] for name in HISTORY_COLUMNS))

    def put(self, rows: Rows, other: AccountHistory) -> None:
        """Overwrite these rows with the rows of ``other``."""
        for name in HISTORY_COLUMNS:
            getattr(self, name)[rows] = getattr(other, name)


HISTORY_COLUMNS = tuple(field.name for field in fields(AccountHistory))


def observe(
    history: AccountHistory, amount: Float64, timestamp_ms: Int64, scale: AmountScale
) -> tuple[Float32, AccountHistory]:
    """Compute the features of one transaction of each of n distinct accounts.

    If event time runs backwards, no time passes and ``last_event_ms`` stays. For a given history
    only the columns :data:`model.features.spec.AMOUNT_FEATURES` depend on the amount.

    Args:
        history: n accounts before the transaction; not changed.
        amount: [n] at least 0, in the checkpoint's currency.
        timestamp_ms: [n] event time, epoch milliseconds, at least 0.
        scale: scale of amounts of the checkpoint.

    Returns:
        raw: [n, A] the columns of :data:`ACCOUNT_FEATURES`.
        history: the n accounts after the transaction.

    >>> scale = AmountScale(floor=1.0, usual=40.0)
    >>> raw, history = observe(AccountHistory.empty(1), np.array([20.0]), np.array([0]), scale)
    >>> raw, history = observe(history, np.array([60.0]), np.array([43_200_000]), scale)
    >>> for name, value in zip(ACCOUNT_FEATURES, raw[0].tolist(), strict=True):
    ...     print(f"{name:24} {value:.2f}")
    amount                   60.00
    seconds_since_last       43200.00
    hour_of_day              12.00
    day_of_week              3.00
    transactions_seen        2.00
    count_1d                 1.61
    count_7d                 1.93
    count_30d                1.98
    mean_amount_1d           20.00
    mean_amount_7d           20.00
    mean_amount_30d          20.00
    amount_to_mean           3.00
    usual_amount             30.00
    amount_to_usual          2.00
    amount_to_least          3.00
    """
    n = len(amount)
    first = history.count == 0
    last_event_ms = np.maximum(history.last_event_ms, timestamp_ms)
    elapsed_ms = last_event_ms - history.last_event_ms
    # Transposed to [., n], so that inner loops run over n and not over 3.
    decay = np.exp(elapsed_ms * _DECAY_PER_MS).astype(np.float32)  # [3, n]
    count_before = history.decayed_count.T  # [3, n]
    amount_before = history.decayed_amount.T  # [3, n]

    raw = np.empty((len(ACCOUNT_FEATURES), n), np.float32)
    paid, means, usual = raw[0], raw[8:11], raw[12]
    paid[:] = amount
    np.divide(elapsed_ms, 1000.0, out=raw[1], casting="same_kind")
    days, ms_of_day = np.divmod(timestamp_ms, DAY_MS)
    np.divide(ms_of_day, HOUR_MS, out=raw[2], casting="same_kind")
    days += _MONDAY_OFFSET
    np.remainder(days, 7, out=raw[3], casting="same_kind")
    count = history.count + (history.count != _COUNT_MAX)
    raw[4] = count
    count_after = np.multiply(count_before, decay, out=raw[5:8])
    count_after += _ONE
    # The decay since the last transaction cancels. A count is at least 1 after the first
    # transaction, because the last one weighs 1 at last_event_ms.
    np.divide(amount_before, np.maximum(count_before, _ONE), out=means)
    usual[:] = history.usual_amount
    if np.count_nonzero(first):
        raw[1, first] = -1.0
        means[:, first] = usual[first] = np.float32(scale.usual)
    floor = np.float32(scale.floor)
    # The mean of 30 days and the usual amount, then the ratios to them.
    np.divide(paid, np.maximum(raw[10:13:2], floor), out=raw[11:14:2])
    np.maximum(raw[11], raw[13], out=raw[14])

    # A card check does not enter the means, and an outlier only in part.
    within = np.minimum(paid, np.maximum(_OUTLIER * usual, means[0]))
    checks = paid < floor
    entered = np.empty((_WINDOWS, n), np.float32)
    entered[0] = paid
    entered[1:] = within
    np.copyto(entered, means, where=checks)
    amount_after = amount_before * decay
    amount_after += entered
    counted = np.minimum(history.usual_count + ~checks, _USUAL_COUNT_MAX)
    change = within - usual
    change[checks] = 0.0
    change *= _ONE / (counted + _USUAL_PRIOR_COUNT)
    after = AccountHistory(
        last_event_ms,
        count.astype(np.uint32, copy=False),
        count_after.T,
        amount_after.T,
        usual + change,
        counted,
    )
    return np.ascontiguousarray(raw.T), after


def observe_log(
    account: Int64, amount: Float64, timestamp_ms: Int64, scale: AmountScale
) -> Float32:
    """Compute the features of accounts for a whole log, from empty histories.

    Round r holds the r-th transaction of every account that has one. So the number of calls of
    :func:`observe` is the number of transactions of the busiest account.

    Args:
        account: [N] any whole numbers; the log is in order of event time.
        amount: [N].
        timestamp_ms: [N].
        scale: scale of amounts of the checkpoint.

    Returns:
        raw: [N, A] in the order of the log.
    """
    raw = np.empty((len(amount), len(ACCOUNT_FEATURES)), np.float32)
    rounds = rounds_of(account)
    histories = AccountHistory.empty(len(rounds[0]) if rounds else 0)
    for rows in rounds:
        active = slice(0, len(rows))
        taken = histories.take(active)
        raw[rows], after = observe(taken, amount[rows], timestamp_ms[rows], scale)
        histories.put(active, after)
    return raw


def rounds_of(account: Int64) -> list[NDArray[np.intp]]:
    """Group the rows of a log into rounds: array r holds each account's r-th transaction.

    Accounts have the same order in every round, by falling number of transactions. So the accounts
    of a round are the first ones of the previous round.

    >>> [rows.tolist() for rows in rounds_of(np.array([7, 9, 9, 7, 9]))]
    [[1, 0], [2, 3], [4]]
    """
    if len(account) == 0:
        return []
    by_account = account.argsort(kind="stable")
    grouped = account[by_account]
    is_another = grouped[1:] != grouped[:-1]
    if is_another.all():
        return [by_account]
    starts = np.concatenate(([0], is_another.nonzero()[0] + 1))
    lengths = np.diff(starts, append=len(account))
    longest_first = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[longest_first], lengths[longest_first]
    active = np.searchsorted(-lengths, -np.arange(lengths[0]), side="left")  # lengths > round
    return [by_account[starts[:n] + r] for r, n in enumerate(active)]
