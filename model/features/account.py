"""What the network sees of a transaction: raw named features, and their encoding as inputs.

One implementation serves training, evaluation and the worker. It works on *rounds*: arrays
of transactions of distinct accounts, one row each. A row's result never depends on the other
rows or on how many there are, so a stream cut into micro-batches anywhere gives the same bits.

    history, amount, timestamp_ms  --observe-->  raw columns of the account, history after
    profiles, timestamp_ms         --observe_merchants-->  raw columns of the merchant
    the transaction's own fields   --field_columns-->  raw columns of further fields
    raw [n, R]                     --encode--->  inputs [n, I]

``raw`` is what a person can read (euros, seconds, counts) and what a score records;
``inputs`` is what the network takes, by a :class:`FeatureSpec` that its checkpoint carries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.features.merchant import MERCHANT_FEATURES
from model.units import DAY_MS, HOUR_MS

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]
UInt32 = NDArray[np.uint32]

WINDOW_DAYS = (1, 7, 30)
"""Time constants of the decayed aggregates, days: after so long a transaction weighs 1/e."""

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

FEATURES = ACCOUNT_FEATURES + MERCHANT_FEATURES
"""Names of the columns of ``raw``, before those of a checkpoint's further fields."""

DEFINITION = 4
"""Version of what :func:`observe` computes; part of a checkpoint's digest."""

OUTLIER = 2.5
"""A payment of more than this many times the usual amount is an outlier.

It counts as so much, or as the account's mean of the last day if that is more: a second payment
of the same kind is none."""

USUAL_COUNT_MAX = 100
"""About how many of an account's last payments the usual amount is a mean of."""

USUAL_PRIOR_COUNT = 1.0
"""The usual amount starts at the usual of all accounts, which counts as this many payments."""

_MONDAY_OFFSET = 3  # 1970-01-01 was a Thursday
_COUNT_MAX = np.uint32(2**32 - 1)
_WINDOWS = len(WINDOW_DAYS)
_DECAY_PER_MS = np.array([-1.0 / (days * DAY_MS) for days in WINDOW_DAYS])[:, None]  # [3, 1]


class AmountScale(msgspec.Struct, frozen=True):
    """What amounts mean in the currency of a checkpoint, from its training data.

    Attributes:
        floor: no ratio has a denominator under it. A payment under it, such as a card check of
            0.00 or 0.01, does not change what counts as usual.
        usual: the usual amount of an account without a payment yet.
    """

    floor: float = 1.0
    usual: float = 50.0

    @classmethod
    def of(cls, account: Int64 | NDArray[np.int32], amount: Float64) -> AmountScale:
        """The scale of a log: quantiles of its accounts' mean amounts.

        The floor is a fifth of what the fifth percentile of accounts spends.

        Args:
            account: [N] whole numbers, any.
            amount: [N].

        >>> AmountScale.of(np.array([1, 1, 2]), np.array([10.0, 30.0, 40.0]))
        AmountScale(floor=4.2, usual=30.0)
        """
        _, code, count = np.unique(account, return_inverse=True, return_counts=True)
        mean = np.bincount(code, amount) / count
        mean = mean[mean > 0]
        if len(mean) == 0:
            return cls()
        low, middle = np.quantile(mean, [FLOOR_QUANTILE, 0.5])
        return cls(float(low) * FLOOR_SHARE, float(middle))


FLOOR_QUANTILE = 0.05
FLOOR_SHARE = 0.2


@dataclass
class AccountHistory:
    """What the features remember of each of n accounts, as a struct of arrays.

    Attributes:
        last_event_ms: [n] latest event time, epoch milliseconds; meaningless at count 0.
        count: [n] transactions seen; stays at 2**32 - 1 once there.
        decayed_count: [n, 3] transactions, each weighing exp(-age / window) at
            ``last_event_ms``; a window of each of :data:`WINDOW_DAYS`.
        decayed_amount: [n, 3] amounts, weighed the same; without outliers but in the first.
        usual_amount: [n] running mean of the amount without its outliers; 0 at count 0.
        usual_count: [n] payments that it is of, up to :data:`USUAL_COUNT_MAX`.
    """

    last_event_ms: Int64
    count: UInt32
    decayed_count: Float32
    decayed_amount: Float32
    usual_amount: Float32
    usual_count: UInt8

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
            np.zeros(n, np.float32),
            np.zeros(n, np.uint8),
        )

    def __len__(self) -> int:
        return len(self.count)

    def take(self, rows: NDArray[np.intp] | slice) -> AccountHistory:
        """Those rows, in that order: copies, or views if ``rows`` is a slice."""
        return AccountHistory(*(getattr(self, name)[rows] for name in HISTORY_COLUMNS))

    def put(self, rows: NDArray[np.intp] | slice, other: AccountHistory) -> None:
        """Overwrites those rows by the rows of ``other``."""
        for name in HISTORY_COLUMNS:
            getattr(self, name)[rows] = getattr(other, name)


HISTORY_COLUMNS = tuple(field.name for field in fields(AccountHistory))


def observe(
    history: AccountHistory, amount: Float64, timestamp_ms: Int64, scale: AmountScale
) -> tuple[Float32, AccountHistory]:
    """Features of one transaction of each of n distinct accounts, and their histories after.

    Event time that runs backwards counts as no time passed, and ``last_event_ms`` stays. With the
    history fixed, only the columns :data:`AMOUNT_FEATURES` depend on the amount.

    Args:
        history: n accounts before the transaction; not changed.
        amount: [n] at least 0, in the checkpoint's currency.
        timestamp_ms: [n] event time, epoch milliseconds, at least 0.
        scale: of the checkpoint.

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
    some_first = bool(first.any())
    last_event_ms = np.maximum(history.last_event_ms, timestamp_ms)
    elapsed_ms = last_event_ms - history.last_event_ms
    # Columns of [n, .] arrays are worked on as rows of [., n]: inner loops of n, not of 3.
    decay = np.exp(elapsed_ms * _DECAY_PER_MS).astype(np.float32)  # [3, n]
    count_before = history.decayed_count.T  # [3, n]
    amount_before = history.decayed_amount.T  # [3, n]

    raw = np.empty((len(ACCOUNT_FEATURES), n), np.float32)
    raw[0] = amount
    np.divide(elapsed_ms, 1000.0, out=raw[1], casting="same_kind")
    days, ms_of_day = np.divmod(timestamp_ms, DAY_MS)
    np.divide(ms_of_day, HOUR_MS, out=raw[2], casting="same_kind")
    raw[3] = (days + _MONDAY_OFFSET) % 7
    count = history.count + (history.count != _COUNT_MAX)
    raw[4] = count
    count_after = raw[5:8]
    np.multiply(count_before, decay, out=count_after)
    count_after += np.float32(1.0)
    # The decay since the last transaction is in both and cancels. A count before is at least
    # 1 unless it is the first: the last transaction weighs 1 at last_event_ms.
    np.divide(amount_before, np.maximum(count_before, np.float32(1.0)), out=raw[8:11])
    raw[12] = history.usual_amount
    if some_first:
        raw[1, first] = -1.0
        raw[8:11, first] = raw[12, first] = np.float32(scale.usual)
    floor = np.float32(scale.floor)
    np.divide(raw[0], np.maximum(raw[10], floor), out=raw[11])
    np.divide(raw[0], np.maximum(raw[12], floor), out=raw[13])
    np.maximum(raw[11], raw[13], out=raw[14])

    # What enters the means: not a card check, nor all of an outlier.
    within = np.minimum(raw[0], np.maximum(np.float32(OUTLIER) * raw[12], raw[8]))
    checks = raw[0] < floor
    entered = np.empty((_WINDOWS, n), np.float32)
    entered[0] = raw[0]
    entered[1:] = within
    np.copyto(entered, raw[8:11], where=checks)
    amount_after = np.multiply(amount_before, decay)
    amount_after += entered
    counted = np.minimum(history.usual_count + ~checks, USUAL_COUNT_MAX).astype(np.uint8)
    share = np.float32(1.0) / (counted + np.float32(USUAL_PRIOR_COUNT))
    usual_after = raw[12] + np.where(checks, np.float32(0.0), within - raw[12]) * share
    after = AccountHistory(
        last_event_ms,
        count.astype(np.uint32, copy=False),
        np.ascontiguousarray(count_after.T),
        np.ascontiguousarray(amount_after.T),
        usual_after,
        counted,
    )
    return np.ascontiguousarray(raw.T), after


def observe_log(
    account: Int64, amount: Float64, timestamp_ms: Int64, scale: AmountScale
) -> Float32:
    """Accounts' features of a whole log, from empty histories: training and evaluation.

    Round r holds the r-th transaction of each account that has one, so N transactions cost
    as many calls of :func:`observe` as the busiest account has transactions.

    Args:
        account: [N] whole numbers, any; the log is in order of event time.
        amount: [N].
        timestamp_ms: [N].
        scale: of the checkpoint.

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
    """Rows of a log by round: the r-th array holds each account's r-th transaction.

    Accounts stand in the same order in every round, the ones with most transactions first,
    so the accounts of a round are the first ones of the round before.

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


FieldKind = Literal["numeric", "categorical"]


class Field(msgspec.Struct, frozen=True):
    """A further field of the transaction that a checkpoint looks at.

    Attributes:
        name: of the field in the transaction's JSON (``category`` is one).
        kind: a number, or a text of which there are few.
        vocabulary: the texts that training knew; every other one counts as unknown.
    """

    name: str
    kind: FieldKind
    vocabulary: tuple[str, ...] = ()


def field_column(
    field: Field,
) -> Callable[[Iterable[float | str | bool | None]], Float32]:
    """What makes a raw column [n] of a field's values: numbers, NaN where there is none; or of
    each text 1 + its place in the vocabulary, 0 where it is unknown.

    >>> column = field_column(Field("category", "categorical", ("food", "fuel")))
    >>> column(["fuel", None, "toys"])
    array([2., 0., 0.], dtype=float32)
    """
    if field.kind == "numeric":
        return lambda values: np.array([np.nan if v is None else v for v in values], np.float32)
    code_of = {text: code for code, text in enumerate(field.vocabulary, start=1)}
    return lambda values: np.array([code_of.get(category_text(v), 0) for v in values], np.float32)


def category_text(value: object) -> str:
    """A category as text; true and false as files have them."""
    return str(value).lower() if isinstance(value, bool) else str(value)


Transform = Literal[
    "log1p", "linear", "as_is", "is_first", "sin", "cos", "step", "is_missing", "category"
]
Role = Literal["own", "amount", "merchant", "frauds", "fraud_ages", "any_fraud", "category"]


def own_columns(roles: Sequence[Role]) -> list[int]:
    """Places of the inputs that tell of the payment and its account, not of the merchant.

    >>> own_columns(("own", "merchant", "amount"))
    [0, 2]
    """
    return [place for place, role in enumerate(roles) if role in ("own", "amount")]


class Input(msgspec.Struct, frozen=True):
    """One input of the network: ``(transform(feature) - mean) / deviation``.

    Before it is transformed, a value beyond the feature's range, or over ``at_most``, counts as
    the nearest one within.

    Attributes:
        feature: a name among the columns of ``raw``.
        transform: ``log1p`` of value / unit (of values under 0 as 0), ``linear``, ``as_is``
            (linear, but not standardised), ``is_first`` (1 where the
            value is negative, else 0), ``sin`` or ``cos`` of a value that runs round in
            ``period``, ``step`` (1 from ``threshold`` on, else 0), ``is_missing`` (1 where
            there is no value, else 0), or ``category`` (the code, for an embedding).
        mean, deviation: of the transformed value over the training period.
        period: only for ``sin`` and ``cos``, in units of the feature.
        threshold: only for ``step``, in units of the feature.
        unit: only for ``log1p``, in units of the feature.
        at_most: in units of the feature; None: no bound but the range.
    """

    feature: str
    transform: Transform
    mean: float = 0.0
    deviation: float = 1.0
    period: float = 1.0
    threshold: float = 0.0
    unit: float = 1.0
    at_most: float | None = None

    @property
    def role(self) -> Role:
        """What the network may make of it.

        ``amount`` and ``frauds``: more of it never lowers the score. ``any_fraud``: 0 where no
        fraud of the merchant is known. ``fraud_ages``: matters only where one is. The others
        may matter in any way.
        """
        if self.transform == "category":
            return "category"
        if self.feature in AMOUNT_FEATURES:
            return "amount" if self.at_most is None else "own"
        if self.feature in FRAUD_FEATURES:
            return "frauds" if self.at_most is None else "any_fraud"
        if self.feature in FRAUD_AGES:
            return "fraud_ages"
        return "merchant" if self.feature in MERCHANT_FEATURES else "own"


AMOUNT_FEATURES = ("amount", "amount_to_mean", "amount_to_usual", "amount_to_least")
"""Features that rise with the transaction's amount; the other ones do not depend on it."""

FRAUD_FEATURES = (
    "merchant_known_frauds",
    "merchant_risk_1d",
    "merchant_risk_7d",
    "merchant_risk_30d",
    "merchant_streak_frauds",
)
"""Features that rise with the number of the merchant's known frauds."""

FRAUD_AGES = (
    "merchant_oldest_fraud_days",
    "merchant_newest_fraud_days",
    "merchant_legitimate_days",
    "merchant_streak_days",
)
"""Features that depend on when the merchant's known frauds were."""

SMALL_SHARE = 1.0
"""A payment under this share of both the usual amount and the mean (or of the floor) may
be suspicious for being small, as a card test is. Above it more money never lowers the score."""

SMALL_UNIT = 0.001
"""Of that share, on a logarithmic scale: a cent and a euro of an account that usually spends 50."""


SCALED: tuple[Transform, ...] = ("log1p", "linear")
"""Transforms whose values are standardised; the others are of small range as they are."""

ACCOUNT_INPUTS: tuple[Input, ...] = (
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
    Input("usual_amount", "log1p"),
    Input("amount_to_usual", "log1p"),
    Input("amount", "linear"),
    Input("amount_to_mean", "linear"),
    Input("amount_to_usual", "linear"),
    Input("amount_to_least", "log1p", unit=SMALL_UNIT, at_most=SMALL_SHARE),
    Input("amount_to_least", "linear", at_most=SMALL_SHARE),
    Input("seconds_since_last", "is_first"),
    Input("hour_of_day", "sin", period=24.0),
    Input("hour_of_day", "cos", period=24.0),
    Input("day_of_week", "sin", period=7.0),
    Input("day_of_week", "cos", period=7.0),
)
MERCHANT_INPUTS: tuple[Input, ...] = (
    Input("merchant_count_1d", "log1p"),
    Input("merchant_count_7d", "log1p"),
    Input("merchant_count_30d", "log1p"),
    Input("merchant_known_frauds", "log1p"),
    Input("merchant_oldest_fraud_days", "log1p"),
    Input("merchant_newest_fraud_days", "log1p"),
    Input("merchant_legitimate_days", "log1p"),
    Input("merchant_streak_frauds", "log1p"),
    Input("merchant_streak_days", "log1p"),
    Input("merchant_risk_1d", "linear"),
    Input("merchant_risk_7d", "linear"),
    Input("merchant_risk_30d", "linear"),
    Input("merchant_oldest_fraud_days", "linear"),
    Input("merchant_streak_days", "linear"),
    Input("merchant_oldest_fraud_days", "is_first"),
    Input("merchant_streak_days", "is_first"),
    Input("merchant_known_frauds", "as_is", at_most=1.0),
)
INPUTS = ACCOUNT_INPUTS + MERCHANT_INPUTS
"""The inputs of a new network, before :meth:`FeatureSpec.fit`.

The amount is there twice: on the logarithmic scale, and linear. A feature's range is what
training saw, and no less: what is rare and far out is what matters.
"""

AMOUNTS = ("amount", "mean_amount_1d", "mean_amount_7d", "mean_amount_30d", "usual_amount")
"""Features in the checkpoint's currency: on a logarithmic scale their unit is the floor."""

SIGNED = ("seconds_since_last", *FRAUD_AGES)
"""Features whose -1 says that there is no value; it is within every range."""


class FeatureSpec(msgspec.Struct, frozen=True):
    """How raw features become inputs; a checkpoint carries it in its header.

    Attributes:
        inputs: in the order of the columns that :class:`Encoder` gives; categories last.
        definition: :data:`DEFINITION` of the code that computed the training features.
        window_days: its :data:`WINDOW_DAYS`.
        label_delay_days: merchants' risk is measured up to so long ago.
        fields: further fields of the transaction, each a column of ``raw`` after
            :data:`FEATURES`.
        scale: what amounts mean in the checkpoint's currency.
        ranges: of each column of ``raw``, the lowest and the highest value that training saw
            (:func:`ranges_of`); beyond it an input saturates. Empty: no bounds.
    """

    inputs: tuple[Input, ...] = INPUTS
    definition: int = DEFINITION
    window_days: tuple[int, ...] = WINDOW_DAYS
    label_delay_days: float = 7.0
    fields: tuple[Field, ...] = ()
    scale: AmountScale = AmountScale()
    ranges: tuple[tuple[float, float], ...] = ()

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles of the inputs, but of categories."""
        return tuple(i.role for i in self.inputs if i.transform != "category")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns of ``raw``."""
        return FEATURES + tuple(field.name for field in self.fields)

    @property
    def uses_merchants(self) -> bool:
        """Whether an input looks at the merchant's profile."""
        return any(i.feature in MERCHANT_FEATURES for i in self.inputs)

    @property
    def label_delay_ms(self) -> int:
        """The label delay in milliseconds."""
        return round(self.label_delay_days * DAY_MS)

    @property
    def embedded(self) -> tuple[Field, ...]:
        """The categorical fields behind the ``category`` inputs, in their order."""
        by_name = {field.name: field for field in self.fields}
        return tuple(by_name[i.feature] for i in self.inputs if i.transform == "category")

    def fitted(self, raw: Float32) -> FeatureSpec:
        """The same with each input's mean and deviation over ``raw`` [N, R].

        Only log1p and linear inputs have them; a value that is missing is left out.
        """
        plain = tuple(msgspec.structs.replace(i, mean=0.0, deviation=1.0) for i in self.inputs)
        # NaNs are kept for the mean, so the encoder's own treatment of them does not serve.
        encoded = Encoder(msgspec.structs.replace(self, inputs=plain)).transformed(raw)  # [I, N]
        inputs = []
        for i, values in zip(plain, encoded, strict=True):
            there = values[~np.isnan(values)]
            if i.transform in SCALED and len(there):
                mean, deviation = there.mean(dtype=np.float64), there.std(dtype=np.float64)
                in_currency = i.transform == "linear" and i.feature in AMOUNTS
                least = DEVIATION_MIN * (self.scale.floor if in_currency else 1.0)
                i = msgspec.structs.replace(
                    i, mean=float(mean), deviation=max(float(deviation), least)
                )
            inputs.append(i)
        return msgspec.structs.replace(self, inputs=tuple(inputs))


LABEL_DELAY_MAX_DAYS = 30.0
"""A profile is 38 days deep: what is left is the time that risk is measured over."""

DEVIATION_MIN = 1e-3
"""An input of smaller deviation is not stretched to one; of an amount, in units of the floor."""


class FeatureSpecError(ValueError):
    """A feature specification that this version cannot compute; the message says why."""


class Encoder:
    """A :class:`FeatureSpec` made ready to run: ``encode(raw [n, R]) -> inputs [n, I]``.

    Raises:
        FeatureSpecError: the specification needs what this version does not compute.
    """

    def __init__(self, spec: FeatureSpec) -> None:
        _check(spec)
        self.spec = spec
        names = spec.names
        transforms = [i.transform for i in spec.inputs]

        def chosen(*wanted: Transform) -> slice | NDArray[np.intp] | None:
            return _slice_or_rows(np.array([t in wanted for t in transforms]))

        def column(values: Sequence[float], rows: slice | NDArray[np.intp] | None) -> Float32:
            return np.array(values, np.float64)[slice(0) if rows is None else rows].astype(
                np.float32
            )[:, None]

        self._column = np.array([names.index(i.feature) for i in spec.inputs], np.intp)
        low, high = _bounds(spec)
        self._low, self._high = low, high  # [R]
        self._is_bounded = bool(np.isfinite(low).any() or np.isfinite(high).any())
        most = [np.inf if i.at_most is None else i.at_most for i in spec.inputs]
        self._least = low[self._column][:, None]  # [I, 1]
        self._most = np.minimum(high[self._column], np.array(most, np.float32))[:, None]
        self._is_clipped = bool(np.isfinite(self._least).any() or np.isfinite(self._most).any())
        self._log, self._wave, self._first = (
            chosen("log1p"),
            chosen("sin", "cos"),
            chosen("is_first"),
        )
        self._step, self._missing = chosen("step"), chosen("is_missing")
        # cos(x) = sin(x + a quarter turn): one call for all.
        self._turn = column([2 * np.pi / i.period for i in spec.inputs], self._wave)
        self._phase = column([np.pi / 2 * (t == "cos") for t in transforms], self._wave)
        self._threshold = column([i.threshold for i in spec.inputs], self._step)
        self._unit = column([1 / i.unit for i in spec.inputs], self._log)
        self._scale = column([1 / i.deviation for i in spec.inputs], slice(None))  # [I, 1]
        self._shift = column([-i.mean / i.deviation for i in spec.inputs], slice(None))
        self._may_miss = any(field.kind == "numeric" for field in spec.fields)

    def encode(self, raw: Float32) -> Float32:
        """Inputs [n, I], contiguous, of raw features [n, R]; each row for itself.

        A missing value is 0, as the mean is.
        """
        inputs = self.transformed(raw)
        inputs *= self._scale
        inputs += self._shift
        if self._may_miss:
            np.nan_to_num(inputs, copy=False, nan=0.0)
        return np.ascontiguousarray(inputs.T)

    def outside(self, raw: Float32) -> NDArray[np.bool_] | None:
        """Which raw features [n, R] are beyond their range; None where none is."""
        if not self._is_bounded:
            return None
        beyond: NDArray[np.bool_] = (raw < self._low) | (raw > self._high)
        return beyond if beyond.any() else None

    def transformed(self, raw: Float32) -> Float32:
        """Inputs [I, n] before they are standardised; NaN where a value is missing."""
        inputs = raw.T[self._column]  # [I, n]
        if self._is_clipped:
            np.clip(inputs, self._least, self._most, out=inputs)
        if self._log is not None:
            positive = np.maximum(inputs[self._log], np.float32(0.0))
            inputs[self._log] = np.log1p(positive * self._unit)
        if self._wave is not None:
            inputs[self._wave] = np.sin(inputs[self._wave] * self._turn + self._phase)
        if self._first is not None:
            inputs[self._first] = inputs[self._first] < 0
        if self._step is not None:
            inputs[self._step] = inputs[self._step] >= self._threshold
        if self._missing is not None:
            inputs[self._missing] = np.isnan(inputs[self._missing])
        return inputs


RANGE_RANK = 20
"""A range ends at the value that this many transactions of the training pass or reach, so that no
few odd ones widen it; of few transactions, one in a thousand."""


def ranges_of(raw: Float32, spec: FeatureSpec) -> tuple[tuple[float, float], ...]:
    """The range of each raw feature over transactions ``raw`` [N, R] of the training period.

    A missing value and the -1 of :data:`SIGNED` features are left out. A feature that runs round,
    a category, and one without values have no bounds.
    """
    categories = {field.name for field in spec.fields if field.kind == "categorical"}
    unbounded = {"hour_of_day", "day_of_week", *categories}
    found = []
    for name, column in zip(spec.names, raw.T, strict=True):
        there = column[~np.isnan(column)]
        if name in SIGNED:
            there = there[there >= 0]
        if name in unbounded or not len(there):
            found.append((-_FLOAT32_MAX, _FLOAT32_MAX))
            continue
        rank = min(RANGE_RANK, 1 + len(there) // 1000)
        ends = np.partition(there, [rank - 1, len(there) - rank])
        low = -1.0 if name in SIGNED else float(ends[rank - 1])
        found.append((low, float(ends[len(there) - rank])))
    return tuple(found)


_FLOAT32_MAX = float(np.finfo(np.float32).max)
"""No bound: JSON has no infinity."""


def _bounds(spec: FeatureSpec) -> tuple[Float32, Float32]:
    """Lowest and highest value [R] of each raw feature."""
    ranges = spec.ranges or ((-_FLOAT32_MAX, _FLOAT32_MAX),) * len(spec.names)
    low, high = np.array(ranges, np.float64).T
    low = np.where(low <= -_FLOAT32_MAX, -np.inf, low)
    high = np.where(high >= _FLOAT32_MAX, np.inf, high)
    return low.astype(np.float32), high.astype(np.float32)


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
    names = spec.names
    if len(set(names)) < len(names):
        raise FeatureSpecError("two features have the same name")
    if not 0 <= spec.label_delay_days <= LABEL_DELAY_MAX_DAYS:
        raise FeatureSpecError(
            f"label_delay_days is {spec.label_delay_days}; it must be 0 to {LABEL_DELAY_MAX_DAYS}"
        )
    if spec.ranges and (
        len(spec.ranges) != len(names)
        or not np.isfinite(spec.ranges).all()
        or any(low > high for low, high in spec.ranges)
    ):
        raise FeatureSpecError(
            f"{len(spec.ranges)} ranges for {len(names)} features; each has a lowest and a "
            "highest finite value, in this order"
        )
    if not (0 < spec.scale.floor < np.inf and 0 < spec.scale.usual < np.inf):
        raise FeatureSpecError(
            f"scale has floor {spec.scale.floor} and usual {spec.scale.usual}; both must be over 0"
        )
    kinds = {field.name: field.kind for field in spec.fields}
    for number, i in enumerate(spec.inputs):
        _check_input(number, i, names, kinds)
    transforms = [i.transform for i in spec.inputs]
    if "category" in transforms and set(transforms[transforms.index("category") :]) != {"category"}:
        raise FeatureSpecError("the inputs that are categories must be the last ones")


def _check_input(number: int, i: Input, names: Sequence[str], kinds: dict[str, FieldKind]) -> None:
    """One input, by its place among the others and the names and kinds of the columns."""
    if i.feature not in names:
        raise FeatureSpecError(
            f"input {number} needs the feature {i.feature[:64]!r}; known are {', '.join(names)}"
        )
    numbers = (i.mean, i.deviation, i.period, i.threshold, i.unit, i.at_most or 0.0)
    if not np.isfinite(numbers).all() or min(i.deviation, i.period, i.unit) <= 0:
        raise FeatureSpecError(
            f"input {number} ({i.feature}): mean {i.mean}, deviation {i.deviation}, "
            f"period {i.period}, threshold {i.threshold}, unit {i.unit}, at_most {i.at_most}; "
            "they must be finite, deviation, period and unit over 0"
        )
    if i.transform == "category" and (i.mean, i.deviation) != (0.0, 1.0):
        raise FeatureSpecError(
            f"input {number} ({i.feature}): mean {i.mean}, deviation {i.deviation}; a category"
            " is a code and not standardised"
        )
    if (i.transform == "category") != (kinds.get(i.feature) == "categorical"):
        raise FeatureSpecError(
            f"input {number} ({i.feature}): a category is embedded, and nothing else is"
        )
