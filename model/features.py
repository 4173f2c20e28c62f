"""What the network sees of a transaction: raw named features, and their encoding as inputs.

One implementation serves training, evaluation and the worker. It works on *rounds*: arrays
of transactions of distinct accounts, one row each. A row's result never depends on the other
rows or on how many there are, so a stream cut into micro-batches anywhere gives the same bits.

    history, amount, timestamp_ms  --observe-->  raw [n, F], history after
    raw [n, F]                     --encode--->  inputs [n, I]

``raw`` is what a person can read (euros, seconds, counts) and what a score records;
``inputs`` is what the network takes, by a :class:`FeatureSpec` that its checkpoint carries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
UInt32 = NDArray[np.uint32]

WINDOW_DAYS = (1, 7, 30)
"""Time constants of the decayed aggregates, days: after so long a transaction weighs 1/e."""

FEATURES: tuple[str, ...] = (
    "amount",  # in the checkpoint's currency
    "seconds_since_last",  # since the account's last transaction; -1 at its first
    "hour_of_day",  # UTC, 0 up to 24, with fraction
    "day_of_week",  # UTC, 0 is Monday
    "transactions_seen",  # of the account, with this one
    "count_1d",  # decayed counts of the account's transactions, with this one
    "count_7d",
    "count_30d",
    "mean_amount_1d",  # decayed means before this one; its own amount at an account's first
    "mean_amount_7d",
    "mean_amount_30d",
    "amount_to_mean",  # amount / mean_amount_30d
)
"""Names of the raw features, in the order of the columns of ``raw``."""

DEFINITION = 1
"""Version of what :func:`observe` computes; part of a checkpoint's digest."""

AMOUNT_TO_MEAN_FLOOR = 0.01
"""A mean amount counts as at least this (a cent) when an amount is divided by it."""

_DAY_MS = 86_400_000
_HOUR_MS = 3_600_000
_MONDAY_OFFSET = 3  # 1970-01-01 was a Thursday
_COUNT_MAX = np.uint32(2**32 - 1)
_WINDOWS = len(WINDOW_DAYS)
_DECAY_PER_MS = np.array([-1.0 / (days * _DAY_MS) for days in WINDOW_DAYS])[:, None]  # [3, 1]


@dataclass
class AccountHistory:
    """What the features remember of each of n accounts, as a struct of arrays.

    Attributes:
        last_event_ms: [n] latest event time, epoch milliseconds; meaningless at count 0.
        count: [n] transactions seen; stays at 2**32 - 1 once there.
        decayed_count: [n, 3] transactions, each weighing exp(-age / window) at
            ``last_event_ms``; a window of each of :data:`WINDOW_DAYS`.
        decayed_amount: [n, 3] amounts, weighed the same.
    """

    last_event_ms: Int64
    count: UInt32
    decayed_count: Float32
    decayed_amount: Float32

    @classmethod
    def empty(cls, n: int) -> AccountHistory:
        """Histories of n accounts that have made no transaction.

        >>> AccountHistory.empty(2).count.tolist()
        [0, 0]
        """
        return cls(
            np.zeros(n, np.int64),
            np.zeros(n, np.uint32),
            np.zeros((n, _WINDOWS), np.float32),
            np.zeros((n, _WINDOWS), np.float32),
        )

    def __len__(self) -> int:
        return len(self.count)

    def take(self, rows: NDArray[np.intp] | slice) -> AccountHistory:
        """Those rows, in that order: copies, or views if ``rows`` is a slice."""
        return AccountHistory(
            self.last_event_ms[rows],
            self.count[rows],
            self.decayed_count[rows],
            self.decayed_amount[rows],
        )

    def put(self, rows: NDArray[np.intp] | slice, other: AccountHistory) -> None:
        """Overwrites those rows by the rows of ``other``."""
        self.last_event_ms[rows] = other.last_event_ms
        self.count[rows] = other.count
        self.decayed_count[rows] = other.decayed_count
        self.decayed_amount[rows] = other.decayed_amount


def observe(
    history: AccountHistory, amount: Float64, timestamp_ms: Int64
) -> tuple[Float32, AccountHistory]:
    """Features of one transaction of each of n distinct accounts, and their histories after.

    Event time that runs backwards counts as no time passed, and ``last_event_ms`` stays.

    Args:
        history: n accounts before the transaction; not changed.
        amount: [n] at least 0, in the checkpoint's currency.
        timestamp_ms: [n] event time, epoch milliseconds, at least 0.

    Returns:
        raw: [n, F] the columns of :data:`FEATURES`.
        history: the n accounts after the transaction.

    >>> raw, history = observe(AccountHistory.empty(1), np.array([20.0]), np.array([0]))
    >>> raw, history = observe(history, np.array([60.0]), np.array([43_200_000]))
    >>> for name, value in zip(FEATURES, raw[0].tolist(), strict=True):
    ...     print(f"{name:18} {value:.2f}")
    amount             60.00
    seconds_since_last 43200.00
    hour_of_day        12.00
    day_of_week        3.00
    transactions_seen  2.00
    count_1d           1.61
    count_7d           1.93
    count_30d          1.98
    mean_amount_1d     20.00
    mean_amount_7d     20.00
    mean_amount_30d    20.00
    amount_to_mean     3.00
    """
    n = len(amount)
    first = history.count == 0
    last_event_ms = np.maximum(history.last_event_ms, timestamp_ms)
    elapsed_ms = last_event_ms - history.last_event_ms
    # Columns of [n, .] arrays are worked on as rows of [., n]: inner loops of n, not of 3.
    decay = np.exp(elapsed_ms * _DECAY_PER_MS).astype(np.float32)  # [3, n]
    count_before = history.decayed_count.T  # [3, n]
    amount_before = history.decayed_amount.T  # [3, n]

    raw = np.empty((len(FEATURES), n), np.float32)
    raw[0] = amount
    np.divide(elapsed_ms, 1000.0, out=raw[1], casting="same_kind")
    days, ms_of_day = np.divmod(timestamp_ms, _DAY_MS)
    np.divide(ms_of_day, _HOUR_MS, out=raw[2], casting="same_kind")
    raw[3] = (days + _MONDAY_OFFSET) % 7
    count = history.count + (history.count != _COUNT_MAX)
    raw[4] = count
    count_after = raw[5:8]
    np.multiply(count_before, decay, out=count_after)
    count_after += np.float32(1.0)
    # The decay since the last transaction is in both and cancels. A count before is at least
    # 1 unless it is the first: the last transaction weighs 1 at last_event_ms.
    np.divide(amount_before, np.maximum(count_before, np.float32(1.0)), out=raw[8:11])
    if first.any():
        raw[1, first] = -1.0
        raw[8:11, first] = raw[0, first]
    np.divide(raw[0], np.maximum(raw[10], np.float32(AMOUNT_TO_MEAN_FLOOR)), out=raw[11])

    amount_after = np.multiply(amount_before, decay)
    amount_after += raw[0]
    after = AccountHistory(
        last_event_ms,
        count.astype(np.uint32, copy=False),
        np.ascontiguousarray(count_after.T),
        np.ascontiguousarray(amount_after.T),
    )
    return np.ascontiguousarray(raw.T), after


def observe_log(account: Int64, amount: Float64, timestamp_ms: Int64) -> Float32:
    """Features of a whole log of transactions, from empty histories: training and evaluation.

    Round r holds the r-th transaction of each account that has one, so N transactions cost
    as many calls of :func:`observe` as the busiest account has transactions.

    Args:
        account: [N] whole numbers, any; the log is in order of event time.
        amount: [N].
        timestamp_ms: [N].

    Returns:
        raw: [N, F] in the order of the log.
    """
    raw = np.empty((len(amount), len(FEATURES)), np.float32)
    rounds = rounds_of(account)
    histories = AccountHistory.empty(len(rounds[0]) if rounds else 0)
    for rows in rounds:
        active = slice(0, len(rows))
        raw[rows], after = observe(histories.take(active), amount[rows], timestamp_ms[rows])
        histories.put(active, after)
    return raw


def rounds_of(account: Int64) -> list[NDArray[np.intp]]:
    """Rows of a log by round: the r-th array holds each account's r-th transaction.

    Accounts stand in the same order in every round, the ones with most transactions first,
    so the accounts of a round are the first ones of the round before.

    >>> [rows.tolist() for rows in rounds_of(np.array([7, 9, 9, 7, 9]))]
    [[1, 0], [2, 3], [4]]
    """
    if len(account) == 0:
        return []
    by_account = np.argsort(account, kind="stable")
    lengths = np.unique(account, return_counts=True)[1]
    starts = np.cumsum(lengths) - lengths
    longest_first = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[longest_first], lengths[longest_first]
    active = np.searchsorted(-lengths, -np.arange(lengths[0]), side="left")  # lengths > round
    return [by_account[starts[:n] + r] for r, n in enumerate(active)]


Transform = Literal["log1p", "linear", "is_first", "sin", "cos"]


class Input(msgspec.Struct, frozen=True):
    """One input of the network: ``(transform(feature) - mean) / deviation``.

    Attributes:
        feature: a name in :data:`FEATURES`.
        transform: ``log1p`` (of values under 0 as 0), ``linear``, ``is_first`` (1 where the
            value is negative, else 0), ``sin`` or ``cos`` of a value that runs round in
            ``period``.
        mean, deviation: of the transformed value over the training period.
        period: only for ``sin`` and ``cos``, in units of the feature.
    """

    feature: str
    transform: Transform
    mean: float = 0.0
    deviation: float = 1.0
    period: float = 1.0


INPUTS: tuple[Input, ...] = (
    Input("amount", "log1p"),
    Input("seconds_since_last", "log1p"),
    Input("transactions_seen", "log1p"),
    Input("count_1d", "log1p"),
    Input("count_7d", "log1p"),
    Input("count_30d", "log1p"),
    Input("mean_amount_1d", "log1p"),
    Input("mean_amount_7d", "log1p"),
    Input("mean_amount_30d", "log1p"),
    Input("amount_to_mean", "log1p"),
    Input("amount", "linear"),
    Input("amount_to_mean", "linear"),
    Input("seconds_since_last", "is_first"),
    Input("hour_of_day", "sin", period=24.0),
    Input("hour_of_day", "cos", period=24.0),
    Input("day_of_week", "sin", period=7.0),
    Input("day_of_week", "cos", period=7.0),
)
"""The inputs of a new network, before :meth:`FeatureSpec.fit`.

The amount is there twice: on the logarithmic scale, and linear so that a sharp step in it
can be resolved. Nothing is clipped: what is rare and far out is what matters.
"""


class FeatureSpec(msgspec.Struct, frozen=True):
    """How raw features become inputs; a checkpoint carries it in its header.

    Attributes:
        definition: :data:`DEFINITION` of the code that computed the training features.
        window_days: its :data:`WINDOW_DAYS`.
        inputs: in the order of the columns that :class:`Encoder` gives.
    """

    inputs: tuple[Input, ...] = INPUTS
    definition: int = DEFINITION
    window_days: tuple[int, ...] = WINDOW_DAYS

    @classmethod
    def fit(cls, raw: Float32, inputs: tuple[Input, ...] = INPUTS) -> FeatureSpec:
        """These inputs with mean and deviation over ``raw`` [N, F].

        ``sin``, ``cos`` and ``is_first`` stay as they are: their range is small anyhow.
        """
        plain = tuple(msgspec.structs.replace(i, mean=0.0, deviation=1.0) for i in inputs)
        encoded = Encoder(cls(plain)).encode(raw)
        mean = encoded.mean(axis=0, dtype=np.float64).tolist()
        deviation = encoded.std(axis=0, dtype=np.float64).tolist()
        return cls(
            tuple(
                msgspec.structs.replace(i, mean=m, deviation=max(d, 1e-3))
                if i.transform in ("log1p", "linear")
                else i
                for i, m, d in zip(plain, mean, deviation, strict=True)
            )
        )


class FeatureSpecError(ValueError):
    """A feature specification that this version cannot compute; the message says why."""


class Encoder:
    """A :class:`FeatureSpec` made ready to run: ``encode(raw [n, F]) -> inputs [n, I]``.

    Raises:
        FeatureSpecError: the specification needs what this version does not compute.
    """

    def __init__(self, spec: FeatureSpec) -> None:
        _check(spec)
        self.spec = spec
        transforms = [i.transform for i in spec.inputs]
        column = np.array([FEATURES.index(i.feature) for i in spec.inputs], np.intp)
        log = np.array([t == "log1p" for t in transforms])
        wave = np.array([t in ("sin", "cos") for t in transforms])
        first = np.array([t == "is_first" for t in transforms])
        self._column = column
        self._log, self._wave, self._first = (_slice_or_rows(m) for m in (log, wave, first))
        # cos(x) = sin(x + a quarter turn): one call for all.
        period = np.array([i.period for i in spec.inputs], np.float64)[wave]
        self._turn = (2 * np.pi / period).astype(np.float32)[:, None]
        self._phase = np.array([np.pi / 2 if t == "cos" else 0.0 for t in transforms], np.float32)[
            wave
        ][:, None]
        scale = np.array([1.0 / i.deviation for i in spec.inputs])
        mean = np.array([i.mean for i in spec.inputs])
        self._scale = scale.astype(np.float32)[:, None]  # [I, 1]
        self._shift = (-mean * scale).astype(np.float32)[:, None]  # [I, 1]

    def encode(self, raw: Float32) -> Float32:
        """Inputs [n, I], contiguous, of raw features [n, F]; each row for itself."""
        inputs = raw.T[self._column]  # [I, n]
        if self._log is not None:
            inputs[self._log] = np.log1p(np.maximum(inputs[self._log], np.float32(0.0)))
        if self._wave is not None:
            inputs[self._wave] = np.sin(inputs[self._wave] * self._turn + self._phase)
        if self._first is not None:
            inputs[self._first] = inputs[self._first] < 0
        inputs *= self._scale
        inputs += self._shift
        return np.ascontiguousarray(inputs.T)


def _slice_or_rows(chosen: NDArray[np.bool_]) -> slice | NDArray[np.intp] | None:
    """The rows chosen: as a slice (views cost less) where they lie side by side."""
    rows = np.flatnonzero(chosen)
    if len(rows) == 0:
        return None
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _check(spec: FeatureSpec) -> None:
    if spec.definition != DEFINITION or tuple(spec.window_days) != WINDOW_DAYS:
        raise FeatureSpecError(
            f"features of definition {spec.definition} over {list(spec.window_days)} days; "
            f"this version computes definition {DEFINITION} over {list(WINDOW_DAYS)} days"
        )
    if not spec.inputs:
        raise FeatureSpecError("no inputs")
    for number, i in enumerate(spec.inputs):
        if i.feature not in FEATURES:
            raise FeatureSpecError(
                f"input {number} needs the feature {i.feature[:64]!r}; known are "
                f"{', '.join(FEATURES)}"
            )
        finite = np.isfinite([i.mean, i.deviation, i.period]).all()
        if not finite or i.deviation <= 0 or i.period <= 0:
            raise FeatureSpecError(
                f"input {number} ({i.feature}): mean {i.mean}, deviation {i.deviation}, "
                f"period {i.period}; they must be finite, the last two over 0"
            )
