"""The inputs of the network: how a :class:`FeatureSpec` makes them from raw features.

    raw [n, R]  --Encoder-->  inputs [n, I]

A raw feature is what a person can read (euros, seconds, counts). A checkpoint carries its
specification in its header, so that every reader of the checkpoint makes the same inputs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.features.account import (
    ACCOUNT_FEATURES,
    DEFINITION,
    WINDOW_DAYS,
    Float32,
)
from model.features.amount_scale import AmountScale
from model.features.merchant import MERCHANT_FEATURES
from model.units import DAY_MS

FEATURES = ACCOUNT_FEATURES + MERCHANT_FEATURES
"""Names of the columns of ``raw``, before those of a checkpoint's extra fields."""

FieldKind = Literal["numeric", "categorical"]


class Field(msgspec.Struct, frozen=True):
    """An extra field of the transaction that a checkpoint uses.

    Attributes:
        name: name of the field in the transaction's JSON, such as ``category``.
        kind: numeric, or categorical for one of a few texts.
        vocabulary: the texts known from training; all others count as unknown.
    """

    name: str
    kind: FieldKind
    vocabulary: tuple[str, ...] = ()


def field_column(
    field: Field,
) -> Callable[[Iterable[float | str | bool | None]], Float32]:
    """Return a function that makes a raw column [n] of a field's values.

    A missing number is NaN. A text is 1 + its place in the vocabulary, or 0 if it is unknown.

    >>> column = field_column(Field("category", "categorical", ("food", "fuel")))
    >>> column(["fuel", None, "toys"])
    array([2., 0., 0.], dtype=float32)
    """
    if field.kind == "numeric":
        return lambda values: np.array([np.nan if v is None else v for v in values], np.float32)
    code_of = {text: code for code, text in enumerate(field.vocabulary, start=1)}
    return lambda values: np.array([code_of.get(category_text(v), 0) for v in values], np.float32)


def category_text(value: object) -> str:
    """Return a category as text; booleans are written as in files."""
    return str(value).lower() if isinstance(value, bool) else str(value)


Transform = Literal[
    "log1p", "linear", "as_is", "is_first", "sin", "cos", "step", "is_missing", "category"
]
Role = Literal["own", "amount", "merchant", "frauds", "fraud_ages", "any_fraud", "category"]


def payment_columns(roles: Sequence[Role]) -> list[int]:
    """Return the places of the payment inputs: those of the payment and its account.

    The role is named ``own`` in checkpoints.

    >>> payment_columns(("own", "merchant", "amount"))
    [0, 2]
    """
    return [place for place, role in enumerate(roles) if role in ("own", "amount")]


class Input(msgspec.Struct, frozen=True):
    """One input of the network: ``(transform(feature) - mean) / deviation``.

    Before the transform, a value outside the feature's range or over ``at_most`` is clipped.

    Attributes:
        feature: a name among the columns of ``raw``.
        transform: ``log1p`` of value / unit (negative values count as 0), ``linear``, ``as_is``
            (linear, but not standardised), ``is_first`` (1 if the value is negative, else 0),
            ``sin`` or ``cos`` of a value that repeats after ``period``, ``step`` (1 from
            ``threshold`` on, else 0), ``is_missing`` (1 without a value, else 0), or ``category``
            (the code, for an embedding).
        mean, deviation: those of the transformed value over the training period.
        period: only for ``sin`` and ``cos``, in units of the feature.
        threshold: only for ``step``, in units of the feature.
        unit: only for ``log1p``, in units of the feature.
        at_most: upper bound in units of the feature. None: only the range bounds it.
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
        """Role of the input in the network.

        A higher ``amount`` or ``frauds`` never lowers the score. ``any_fraud`` is 0 if no fraud of
        the merchant is known. ``fraud_ages`` matters only if one is known. The others may have any
        effect.
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
"""Features that rise with the transaction's amount. No other feature depends on it."""

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
"""Features that depend on the times of the merchant's known frauds."""

SMALL_SHARE = 1.0
"""Share of the usual amount and the mean (or of the floor) below which a payment is small.

A small payment may be suspicious, as a card test is. Above it more money never lowers the score."""

SMALL_UNIT = 0.001
"""Unit of that share on a logarithmic scale. It separates a cent from a euro for an account that
usually spends 50."""


SCALED: tuple[Transform, ...] = ("log1p", "linear")
"""Transforms whose values are standardised. The others already have a small range."""

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
"""The inputs of a new network, before :meth:`FeatureSpec.fitted`.

The amount is an input on a logarithmic and on a linear scale. The range of a feature is the whole
range of the training, because rare extremes matter most.
"""

AMOUNTS = ("amount", "mean_amount_1d", "mean_amount_7d", "mean_amount_30d", "usual_amount")
"""Features in the checkpoint's currency. Their unit on a logarithmic scale is the floor."""

SIGNED = ("seconds_since_last", *FRAUD_AGES)
"""Features where -1 stands for "no value"; it is within every range."""


class FeatureSpec(msgspec.Struct, frozen=True):
    """Specification of how raw features become inputs; part of a checkpoint's header.

    Attributes:
        inputs: in the order of the columns of :class:`Encoder`; categories last.
        definition: :data:`DEFINITION` of the code that computed the training features.
        window_days: its :data:`WINDOW_DAYS`.
        label_delay_days: age of a transaction at which its label is known.
        fields: extra fields of the transaction, each a column of ``raw`` after :data:`FEATURES`.
        scale: scale of amounts in the checkpoint's currency.
        ranges: lowest and highest value of each column of ``raw`` in training
            (:func:`ranges_of`); inputs are clipped to them. Empty: no bounds.
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
        """Roles of the inputs other than categories."""
        return tuple(i.role for i in self.inputs if i.transform != "category")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns of ``raw``."""
        return FEATURES + tuple(field.name for field in self.fields)

    @property
    def uses_merchants(self) -> bool:
        """Whether an input needs the merchant's profile."""
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
        """Return the specification with mean and deviation of each input over ``raw`` [N, R].

        Only log1p and linear inputs have them. Missing values are left out.
        """
        plain = tuple(msgspec.structs.replace(i, mean=0.0, deviation=1.0) for i in self.inputs)
        # encode() would replace missing values; the mean must leave them out.
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
"""Longest label delay. A profile covers 38 days; the rest of it is the time to measure risk."""

DEVIATION_MIN = 1e-3
"""Smallest deviation by which an input is divided; for an amount, in units of the floor."""


class FeatureSpecError(ValueError):
    """This version cannot compute a feature specification; the message says why."""


_GROUP_OF: dict[Transform, int] = {
    "log1p": 0,
    "sin": 1,
    "cos": 1,
    "is_first": 2,
    "step": 3,
    "is_missing": 4,
    "linear": 5,
    "as_is": 5,
    "category": 5,
}
"""Group of each transform in an :class:`Encoder`; the last one needs no computation."""


class Encoder:
    """Encoder of a :class:`FeatureSpec`: ``encode(raw [n, R]) -> inputs [n, I]``.

    Raises:
        FeatureSpecError: the specification needs what this version does not compute.
    """

    def __init__(self, spec: FeatureSpec) -> None:
        _check(spec)
        self.spec = spec
        names = spec.names
        transforms = [i.transform for i in spec.inputs]

        # In here the inputs are grouped by transform, so that each group is a slice: a view.
        order = sorted(range(len(transforms)), key=lambda i: _GROUP_OF[transforms[i]])
        inputs = [spec.inputs[i] for i in order]
        groups = [_GROUP_OF[i.transform] for i in inputs]
        self._place = None if order == sorted(order) else np.argsort(order)

        def chosen(group: int) -> slice | None:
            begin, end = bisect_left(groups, group), bisect_right(groups, group)
            return slice(begin, end) if begin < end else None

        def column(values: Iterable[float], rows: slice | None = slice(None)) -> Float32:
            if rows is None:
                rows = slice(0)
            return np.array(list(values), np.float64)[rows].astype(np.float32)[:, None]

        self._column = np.array([names.index(i.feature) for i in inputs], np.intp)
        low, high = _bounds(spec)
        self._low, self._high = low, high  # [R]
        self._is_bounded = bool(np.isfinite(low).any() or np.isfinite(high).any())
        self._log, self._wave, self._first, self._step, self._missing = map(chosen, range(5))
        most = [np.inf if i.at_most is None else i.at_most for i in inputs]
        self._least = low[self._column][:, None]  # [I, 1]
        self._most = np.minimum(high[self._column], np.array(most, np.float32))[:, None]
        if self._log is not None:  # negative values count as 0
            np.maximum(self._least[self._log], 0.0, out=self._least[self._log])
            np.maximum(self._most[self._log], 0.0, out=self._most[self._log])
        # cos(x) = sin(x + a quarter turn): one call for all.
        self._turn = column((2 * np.pi / i.period for i in inputs), self._wave)
        self._phase = column((np.pi / 2 * (i.transform == "cos") for i in inputs), self._wave)
        self._threshold = column((i.threshold for i in inputs), self._step)
        self._unit = column((1 / i.unit for i in inputs), self._log)
        self._scale = column(1 / i.deviation for i in inputs)  # [I, 1]
        self._shift = column(-i.mean / i.deviation for i in inputs)
        self._may_miss = any(field.kind == "numeric" for field in spec.fields)

    def encode(self, raw: Float32) -> Float32:
        """Encode raw features [n, R] to contiguous inputs [n, I], each row independently.

        A missing value becomes 0, the mean.
        """
        inputs = self._grouped(raw)
        inputs *= self._scale
        inputs += self._shift
        if self._may_miss:
            inputs[np.isnan(inputs)] = 0.0
        if self._place is not None:
            inputs = inputs.take(self._place, axis=0)
        return np.ascontiguousarray(inputs.T)

    def outside(self, raw: Float32) -> NDArray[np.bool_] | None:
        """Return which raw features [n, R] are out of their range; None if all are within."""
        if not self._is_bounded:
            return None
        beyond: NDArray[np.bool_] = (raw < self._low) | (raw > self._high)
        return beyond if beyond.any() else None

    def transformed(self, raw: Float32) -> Float32:
        """Return the inputs [I, n] before standardisation; NaN for a missing value."""
        inputs = self._grouped(raw)
        return inputs if self._place is None else inputs.take(self._place, axis=0)

    def _grouped(self, raw: Float32) -> Float32:
        """Return the inputs [I, n] before standardisation, grouped by transform."""
        inputs = raw.T.take(self._column, axis=0)  # [I, n]
        np.maximum(inputs, self._least, out=inputs)
        np.minimum(inputs, self._most, out=inputs)
        if self._log is not None:
            logarithms = inputs[self._log]
            logarithms *= self._unit
            np.log1p(logarithms, out=logarithms)
        if self._wave is not None:
            waves = inputs[self._wave]
            waves *= self._turn
            waves += self._phase
            np.sin(waves, out=waves)
        if self._first is not None:
            inputs[self._first] = inputs[self._first] < 0
        if self._step is not None:
            inputs[self._step] = inputs[self._step] >= self._threshold
        if self._missing is not None:
            inputs[self._missing] = np.isnan(inputs[self._missing])
        return inputs


RANGE_RANK = 20
"""Number of training transactions at or beyond each end of a range.

So a few odd values do not widen it. With few transactions it is one in a thousand."""


def ranges_of(raw: Float32, spec: FeatureSpec) -> tuple[tuple[float, float], ...]:
    """Return the range of each raw feature over transactions ``raw`` [N, R] of the training.

    Missing values and the -1 of :data:`SIGNED` features are left out. Periodic features, categories
    and features without values have no bounds.
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
"""Stands for "no bound", because JSON has no infinity."""


def _bounds(spec: FeatureSpec) -> tuple[Float32, Float32]:
    """Return the lowest and highest value [R] of each raw feature."""
    ranges = spec.ranges or ((-_FLOAT32_MAX, _FLOAT32_MAX),) * len(spec.names)
    low, high = np.array(ranges, np.float64).T
    low = np.where(low <= -_FLOAT32_MAX, -np.inf, low)
    high = np.where(high >= _FLOAT32_MAX, np.inf, high)
    return low.astype(np.float32), high.astype(np.float32)


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
    """Check one input; ``number`` is its place among the inputs."""
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
