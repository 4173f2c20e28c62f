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

from model.merchants import MERCHANT_FEATURES

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
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
    "mean_amount_1d",  # decayed means before this one; its own amount at an account's first
    "mean_amount_7d",
    "mean_amount_30d",
    "amount_to_mean",  # amount / mean_amount_30d
    "usual_amount",  # running mean before this one, in which outliers count as 2.5 times it
    "amount_to_usual",  # amount / usual_amount
)
"""Names of an account's raw features, in the order of the columns."""

FEATURES = ACCOUNT_FEATURES + MERCHANT_FEATURES
"""Names of the columns of ``raw``, before those of a checkpoint's further fields."""

DEFINITION = 3
"""Version of what :func:`observe` computes; part of a checkpoint's digest."""

MEAN_AMOUNT_FLOOR = 0.01
"""A mean amount counts as at least this (a cent) when an amount is divided by it."""

USUAL_OUTLIER = 2.5
"""Of an amount so many times the usual amount, or the plain mean if that is more, enters it."""

USUAL_COUNT_MAX = 100
"""The usual amount is a mean over about so many of an account's last transactions."""

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
        usual_amount: [n] running mean of the amount without its outliers.
    """

    last_event_ms: Int64
    count: UInt32
    decayed_count: Float32
    decayed_amount: Float32
    usual_amount: Float32

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
    history: AccountHistory, amount: Float64, timestamp_ms: Int64
) -> tuple[Float32, AccountHistory]:
    """Features of one transaction of each of n distinct accounts, and their histories after.

    Event time that runs backwards counts as no time passed, and ``last_event_ms`` stays.

    Args:
        history: n accounts before the transaction; not changed.
        amount: [n] at least 0, in the checkpoint's currency.
        timestamp_ms: [n] event time, epoch milliseconds, at least 0.

    Returns:
        raw: [n, A] the columns of :data:`ACCOUNT_FEATURES`.
        history: the n accounts after the transaction.

    >>> raw, history = observe(AccountHistory.empty(1), np.array([20.0]), np.array([0]))
    >>> raw, history = observe(history, np.array([60.0]), np.array([43_200_000]))
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
    usual_amount             20.00
    amount_to_usual          3.00
    """
    n = len(amount)
    first = history.count == 0
    last_event_ms = np.maximum(history.last_event_ms, timestamp_ms)
    elapsed_ms = last_event_ms - history.last_event_ms
    # Columns of [n, .] arrays are worked on as rows of [., n]: inner loops of n, not of 3.
    decay = np.exp(elapsed_ms * _DECAY_PER_MS).astype(np.float32)  # [3, n]
    count_before = history.decayed_count.T  # [3, n]
    amount_before = history.decayed_amount.T  # [3, n]

    raw = np.empty((len(ACCOUNT_FEATURES), n), np.float32)
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
    floor = np.float32(MEAN_AMOUNT_FLOOR)
    np.divide(raw[0], np.maximum(raw[10], floor), out=raw[11])
    raw[12] = history.usual_amount
    if first.any():
        raw[12, first] = raw[0, first]
    np.divide(raw[0], np.maximum(raw[12], floor), out=raw[13])

    amount_after = np.multiply(amount_before, decay)
    amount_after += raw[0]
    counted = np.minimum(count, USUAL_COUNT_MAX).astype(np.float32)
    # No less than the plain mean: or a first amount of a cent, a card's verification, would stay.
    bound = np.maximum(np.float32(USUAL_OUTLIER) * raw[12], raw[10])
    within = np.minimum(raw[0], bound)
    usual_after = raw[12] + (within - raw[12]) / counted
    after = AccountHistory(
        last_event_ms,
        count.astype(np.uint32, copy=False),
        np.ascontiguousarray(count_after.T),
        np.ascontiguousarray(amount_after.T),
        usual_after,
    )
    return np.ascontiguousarray(raw.T), after


def observe_log(account: Int64, amount: Float64, timestamp_ms: Int64) -> Float32:
    """Accounts' features of a whole log, from empty histories: training and evaluation.

    Round r holds the r-th transaction of each account that has one, so N transactions cost
    as many calls of :func:`observe` as the busiest account has transactions.

    Args:
        account: [N] whole numbers, any; the log is in order of event time.
        amount: [N].
        timestamp_ms: [N].

    Returns:
        raw: [N, A] in the order of the log.
    """
    raw = np.empty((len(amount), len(ACCOUNT_FEATURES)), np.float32)
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


Transform = Literal["log1p", "linear", "is_first", "sin", "cos", "step", "is_missing", "category"]


class Input(msgspec.Struct, frozen=True):
    """One input of the network: ``(transform(feature) - mean) / deviation``.

    Attributes:
        feature: a name among the columns of ``raw``.
        transform: ``log1p`` (of values under 0 as 0), ``linear``, ``is_first`` (1 where the
            value is negative, else 0), ``sin`` or ``cos`` of a value that runs round in
            ``period``, ``step`` (1 from ``threshold`` on, else 0), ``is_missing`` (1 where
            there is no value, else 0), or ``category`` (the code, for an embedding).
        mean, deviation: of the transformed value over the training period.
        period: only for ``sin`` and ``cos``, in units of the feature.
        threshold: only for ``step``, in units of the feature.
    """

    feature: str
    transform: Transform
    mean: float = 0.0
    deviation: float = 1.0
    period: float = 1.0
    threshold: float = 0.0


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
    Input("merchant_genuine_days", "log1p"),
    Input("merchant_streak_frauds", "log1p"),
    Input("merchant_streak_days", "log1p"),
    Input("merchant_risk_1d", "linear"),
    Input("merchant_risk_7d", "linear"),
    Input("merchant_risk_30d", "linear"),
    Input("merchant_oldest_fraud_days", "linear"),
    Input("merchant_streak_days", "linear"),
    Input("merchant_oldest_fraud_days", "is_first"),
    Input("merchant_streak_days", "is_first"),
)
INPUTS = ACCOUNT_INPUTS + MERCHANT_INPUTS
"""The inputs of a new network, before :meth:`FeatureSpec.fit`.

The amount is there twice: on the logarithmic scale, and linear. Nothing is clipped: what is
rare and far out is what matters.
"""


class FeatureSpec(msgspec.Struct, frozen=True):
    """How raw features become inputs; a checkpoint carries it in its header.

    Attributes:
        inputs: in the order of the columns that :class:`Encoder` gives; categories last.
        definition: :data:`DEFINITION` of the code that computed the training features.
        window_days: its :data:`WINDOW_DAYS`.
        label_delay_days: merchants' risk is measured up to so long ago.
        fields: further fields of the transaction, each a column of ``raw`` after
            :data:`FEATURES`.
    """

    inputs: tuple[Input, ...] = INPUTS
    definition: int = DEFINITION
    window_days: tuple[int, ...] = WINDOW_DAYS
    label_delay_days: float = 7.0
    fields: tuple[Field, ...] = ()

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
        return round(self.label_delay_days * _DAY_MS)

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
                i = msgspec.structs.replace(
                    i, mean=float(mean), deviation=max(float(deviation), DEVIATION_MIN)
                )
            inputs.append(i)
        return msgspec.structs.replace(self, inputs=tuple(inputs))


LABEL_DELAY_MAX_DAYS = 30.0
"""A profile is 38 days deep: what is left is the time that risk is measured over."""

DEVIATION_MIN = 1e-3
"""An input of smaller deviation is not stretched to one."""


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

    def transformed(self, raw: Float32) -> Float32:
        """Inputs [I, n] before they are standardised; NaN where a value is missing."""
        inputs = raw.T[self._column]  # [I, n]
        if self._log is not None:
            inputs[self._log] = np.log1p(np.maximum(inputs[self._log], np.float32(0.0)))
        if self._wave is not None:
            inputs[self._wave] = np.sin(inputs[self._wave] * self._turn + self._phase)
        if self._first is not None:
            inputs[self._first] = inputs[self._first] < 0
        if self._step is not None:
            inputs[self._step] = inputs[self._step] >= self._threshold
        if self._missing is not None:
            inputs[self._missing] = np.isnan(inputs[self._missing])
        return inputs


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
    numbers = (i.mean, i.deviation, i.period, i.threshold)
    if not np.isfinite(numbers).all() or i.deviation <= 0 or i.period <= 0:
        raise FeatureSpecError(
            f"input {number} ({i.feature}): mean {i.mean}, deviation {i.deviation}, "
            f"period {i.period}, threshold {i.threshold}; they must be finite, deviation and "
            "period over 0"
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
