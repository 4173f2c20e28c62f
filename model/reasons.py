"""The reasons of an alert: up to three from a closed set, with weights.

The weight of a reason is the fall of the logit when its group of raw features is replaced by
typical values. The network scores all these variants in one batch. The hidden state before the
transaction stays the same. For ``history`` the features stay and the hidden state is that of a new
account.

    raw [n, R], hidden before [n, L, H]  --Explainer.explain-->  reasons of n transactions

The weight of the amount is split between ``amount_high`` and ``amount_unusual`` by surprise: the
rarity of the amount among all payments, and its rarity for an account with this usual amount.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.checkpoint import TAIL_MAX, Amounts, Checkpoint
from model.features.account import Float32, Float64, Int64, rounds_of
from model.features.spec import AMOUNTS, FRAUD_AGES, FRAUD_FEATURES, FeatureSpec

REASONS: Mapping[str, str] = {
    "amount_unusual": "the amount is far over what this account usually spends",
    "amount_high": "the amount is high for any account",
    "merchant_risky": "fraud is known of this merchant, or of its kind",
    "new_merchant": "the merchant, or its category, is new or rarely seen",
    "velocity": "the account pays unusually often, or after an unusual pause",
    "time": "the hour or the day of the week is unusual for a payment",
    "history": "the account's payments before this one look like fraud",
}
"""The closed set of reasons: text by code. Reasons of equal weight are in this order."""

REASONS_MAX = 3
"""Most reasons of an alert."""

WEIGHT_MIN = 0.05
"""Smallest weight of a shown reason, unless it is the only one."""

TINY = 1e-12
"""Smallest denominator, in any currency."""

EXPLAINED_AT_ONCE = 256
"""Most transactions in one batch; the network scores seven variants of each."""

_CODES = tuple(REASONS)
_GROUPS = ("amount", "merchant_risky", "new_merchant", "velocity", "time", "history")
_LOG_AMOUNT = ("amount", "log1p")
_TIME = _GROUPS.index("time")
_HISTORY = _GROUPS.index("history")
_DAYS_OF_FRAUDS = tuple(name for name in FRAUD_AGES if name != "merchant_legitimate_days")
_MERCHANT_COUNTS = ("merchant_count_1d", "merchant_count_7d", "merchant_count_30d")
_ORDINARY: Mapping[str, Mapping[str, float | None]] = {
    "amount": dict.fromkeys(("amount_to_mean", "amount_to_usual", "amount_to_least"), 1.0),
    "merchant_risky": dict.fromkeys(FRAUD_FEATURES, 0.0) | dict.fromkeys(_DAYS_OF_FRAUDS, -1.0),
    "velocity": dict.fromkeys(("seconds_since_last", "count_1d", "count_7d", "count_30d")),
}
"""Features that are always the same in a group's variant; None: the typical value."""

_DEGREES_OF_FREEDOM = 8
"""Degrees of freedom of the Student distribution of an account's amounts.

The distribution has heavy tails because the usual amount is known only roughly."""

_T90 = 1.397
"""90th percentile of that distribution, in deviations."""

_WHOLE_FROM = 10.0
"""Upper end of what is usual from which amounts are shown without decimals."""

_PARETO_EXPONENT = 2.0
"""Exponent of the tail of amounts beyond the highest known quantile."""


class Reason(msgspec.Struct, frozen=True, omit_defaults=True):
    """One reason of an alert.

    Attributes:
        code: a key of :data:`REASONS`.
        weight: share of the total, over 0; the weights of the shown reasons sum to 1.
        detail: the reason in the account's own figures. None: it has none.
    """

    code: str
    weight: float
    detail: str | None = None


class Explainer:
    """Explainer of the scores of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        spec = checkpoint.header.features
        self._column = {name: place for place, name in enumerate(spec.names)}
        at, typical = self._column, _typical(spec)
        constants = [
            (1 + _GROUPS.index(group), at[name], typical[name] if value is None else value)
            for group, values in _ORDINARY.items()
            for name, value in values.items()
        ]
        self._constant_variants = [variant for variant, _, _ in constants]
        self._constant_columns = [column for _, column, _ in constants]
        self._constants = np.array([[value] for _, _, value in constants], np.float32)
        self._spent = [at[name] for name in AMOUNTS]
        self._counts = [at[name] for name in _MERCHANT_COUNTS]
        self._typical_counts = np.array([typical[name] for name in _MERCHANT_COUNTS], np.float32)
        self._legitimate = at["merchant_legitimate_days"]
        self._typical_legitimate = typical["merchant_legitimate_days"]
        self._amounts = checkpoint.header.amounts or _lognormal(spec)
        self._waves = np.array(
            [place for place, i in enumerate(spec.inputs) if i.transform in ("sin", "cos")],
            np.intp,
        )
        category = [field for field in spec.fields if field.name == "category"]
        self._has_categories = bool(category) and category[0].kind == "categorical"

    def explain(self, raw: Float32, hidden: NDArray[np.floating]) -> list[list[Reason]]:
        """Return one to three reasons for each of n transactions, by falling weight.

        Args:
            raw: [n, R] the raw features.
            hidden: [n, L, H] hidden states of the accounts before the transactions.
        """
        found: list[list[Reason]] = []
        for start in range(0, len(raw), EXPLAINED_AT_ONCE):
            part = slice(start, start + EXPLAINED_AT_ONCE)
            shown = map(_reasons, self.falls(raw[part], hidden[part]).tolist())
            found += map(self._with_detail, shown, raw[part])
        return found

    def _with_detail(self, reasons: list[Reason], raw: Float32) -> list[Reason]:
        """Add to ``amount_unusual`` what the account usually pays, from its raw features [R]."""
        at = self._column
        if raw[at["transactions_seen"]] <= 1:
            return reasons
        usual, amount = float(raw[at["usual_amount"]]), float(raw[at["amount"]])
        detail = usual_range_text(usual, self._amounts.deviation, amount)
        return [
            Reason(r.code, r.weight, detail) if r.code == "amount_unusual" else r for r in reasons
        ]

    def falls(self, raw: Float32, hidden: NDArray[np.floating]) -> Float64:
        """Return the fall of the logit [n, codes] without each code, in the order of REASONS."""
        n = len(raw)
        variants = np.repeat(raw[None], 1 + len(_GROUPS), axis=0)  # [1 + groups, n, R]
        self._make_ordinary(variants)
        inputs = self._checkpoint.encode(variants.reshape(-1, raw.shape[1]))
        # No hour is typical. Zero is the centre of the circle, equally far from every hour.
        inputs[(1 + _TIME) * n : (2 + _TIME) * n, self._waves] = 0.0
        before = np.repeat(hidden[None], 1 + len(_GROUPS), axis=0)
        before[1 + _HISTORY] = 0.0
        logits = self._checkpoint.stepper.logits(inputs, before.reshape(-1, *hidden.shape[1:]))
        logit = logits.astype(np.float64).reshape(-1, n)
        fall = np.empty((n, len(_CODES)))
        fall[:, 1:] = (logit[0] - logit[1:]).T
        unusual = self._unusual_share(raw)
        fall[:, 0] = fall[:, 1] * unusual
        fall[:, 1] *= 1.0 - unusual
        fall[~np.isfinite(fall)] = 0.0
        return fall

    def _make_ordinary(self, variants: Float32) -> None:
        """Replace the features of each group in its variant of [1 + groups, n, R]."""
        at = self._column
        raw = variants[0]
        amount, risky, new, _ = variants[1:5]
        variants[self._constant_variants, :, self._constant_columns] = self._constants
        amount[:, self._spent] = raw[:, at["usual_amount"], None]
        risky[raw[:, at["merchant_known_frauds"]] > 0, self._legitimate] = self._typical_legitimate
        new[:, self._counts] = np.maximum(raw[:, self._counts], self._typical_counts)
        new[raw[:, self._legitimate] < 0, self._legitimate] = self._typical_legitimate
        if self._has_categories:  # 0 is an unknown category, 1 the most frequent one
            category = raw[:, at["category"]]
            new[:, at["category"]] = np.where(category == 0, 1, category)
            risky[:, at["category"]] = np.where(category == 0, 0, 1)

    def _unusual_share(self, raw: Float32) -> Float64:
        """Return the share [n] of the amount's weight that is due to the account, 0 to 1."""
        amount = raw[:, self._column["amount"]].astype(np.float64)
        usual = raw[:, self._column["usual_amount"]].astype(np.float64)
        usual = np.maximum(usual, self._checkpoint.header.features.scale.floor)
        # At an account's first transaction no amount is unusual for the account itself.
        usual = np.where(raw[:, self._column["transactions_seen"]] > 1, usual, amount)
        for_account = surprise_for_account(amount, usual, self._amounts.deviation)
        for_anyone = surprise_for_anyone(amount, np.asarray(self._amounts.tail))
        both = for_account + for_anyone
        share: Float64 = for_account / np.maximum(both, 1e-9)
        return share


def surprise_for_anyone(amount: Float64, tail: Float64) -> Float64:
    """Return -log of the share of payments that reach each amount [n], in nats.

    Args:
        amount: [n].
        tail: amounts reached by a share of 1, 1/2, 1/4 and so on of all payments.
    """
    if len(tail) == 0:
        return np.zeros(len(amount))
    halvings = np.interp(amount, tail, np.arange(len(tail)))
    beyond = np.log(np.maximum(amount / max(tail[-1], TINY), 1.0))
    surprise: Float64 = halvings * np.log(2.0) + _PARETO_EXPONENT * beyond
    return surprise


def surprise_for_account(amount: Float64, usual: Float64, deviation: float) -> Float64:
    """Return -log of the probability that the account pays this much or more, in nats.

    The distribution is a Student distribution with 8 degrees of freedom around the usual amount. So
    the probability is one half at the usual amount.

    Args:
        amount: [n].
        usual: [n] usual amounts of the accounts.
        deviation: deviation of an account's amounts, relative to its usual amount.

    >>> surprise_for_account(np.array([10.0, 30.0, 100.0]), np.full(3, 20.0), 0.5).round(1)
    array([ 0.7,  1.8, 10.7])
    """
    t = (amount - usual) / np.maximum(deviation * usual, TINY)
    t = np.maximum(t, 0.0)
    # The closed form for even degrees of freedom (Abramowitz and Stegun 26.7.4).
    cos2 = 1.0 / (1.0 + t * t / _DEGREES_OF_FREEDOM)
    series = 1.0 + cos2 * (1 / 2 + cos2 * (3 / 8 + cos2 * (15 / 48)))
    two_sided = 1.0 - np.sqrt(1.0 - cos2) * series
    surprise: Float64 = -np.log(np.maximum(two_sided / 2.0, 1e-15))
    return surprise


def usual_range_text(usual: float, deviation: float, amount: float) -> str:
    """Say what an account usually pays, as the range of 80 % of its payments, and what this is.

    The distribution is that of :func:`surprise_for_account`.

    >>> usual_range_text(40.0, 0.36, 412.0)
    'usually 20 to 60, this is 412'
    """
    low, high = (usual * max(0.0, 1.0 + sign * _T90 * deviation) for sign in (-1.0, 1.0))
    digits = 0 if high >= _WHOLE_FROM else 2
    return f"usually {low:,.{digits}f} to {high:,.{digits}f}, this is {amount:,.{digits}f}"


def _typical(spec: FeatureSpec) -> dict[str, float]:
    """Return a typical value of each raw feature, from the means of the inputs."""
    values = dict.fromkeys(spec.names, 0.0)
    for i in spec.inputs:
        if i.transform == "linear":
            values[i.feature] = i.mean
    for i in spec.inputs:
        if i.transform == "log1p" and i.at_most is None:
            values[i.feature] = float(np.expm1(i.mean)) * i.unit
    return values


def _lognormal(spec: FeatureSpec) -> Amounts:
    """Estimate the spread of amounts from the inputs, for a checkpoint without it."""
    scale = [
        (i.mean, i.deviation, i.unit)
        for i in spec.inputs
        if (i.feature, i.transform) == _LOG_AMOUNT
    ]
    if not scale:
        return Amounts()
    mean, deviation, unit = scale[0]
    normal = NormalDist()
    z = np.array([normal.inv_cdf(1.0 - 0.5**halvings) for halvings in range(1, TAIL_MAX)])
    return Amounts((0.0, *(unit * np.expm1(mean + deviation * z)).tolist()))


def _reasons(falls: list[float]) -> list[Reason]:
    """Return the reasons of greatest weight; negative falls count as 0."""
    order = sorted(range(len(falls)), key=falls.__getitem__, reverse=True)[:REASONS_MAX]
    counted = [max(falls[code], 0.0) for code in order]
    least = WEIGHT_MIN * sum(counted)
    shown = max(1, sum(fall > 0.0 and fall >= least for fall in counted))
    total = sum(counted[:shown])
    weights = [round(fall / total, 3) for fall in counted[:shown]] if total > 0 else [1.0]
    weights[0] = round(1.0 - sum(weights[1:]), 3)
    return [Reason(_CODES[code], weight) for code, weight in zip(order, weights, strict=False)]


def explain_log(
    checkpoint: Checkpoint, account: Int64, raw: Float32, chosen: NDArray[np.bool_]
) -> list[list[Reason]]:
    """Return the reasons of chosen transactions of a whole log, as a worker gives them.

    Args:
        account: [N]; the log is in order of time.
        raw: [N, R] the raw features.
        chosen: [N] whether to explain the transaction.

    Returns:
        The reasons of each chosen transaction, in the order of the log.
    """
    stepper = checkpoint.stepper
    rounds = rounds_of(account)
    hidden = stepper.empty_hidden(len(rounds[0]) if rounds else 0)
    place = np.cumsum(chosen) - 1
    kept = stepper.empty_hidden(int(chosen.sum()))
    for rows in rounds:
        before = hidden[: len(rows)]
        explained = np.flatnonzero(chosen[rows])
        kept[place[rows[explained]]] = before[explained]
        _, after = stepper.step(checkpoint.encode(raw[rows]), before)
        before[:] = after.astype(np.float16)
    return Explainer(checkpoint).explain(raw[chosen], kept)


SCENARIO_REASONS: Mapping[int, str] = {1: "amount_high", 2: "merchant_risky", 3: "amount_unusual"}
"""True reason of each fraud scenario of the Handbook and of the simulator."""


def reason_agreement(first: Sequence[str], scenario: NDArray[np.integer]) -> dict[int, float]:
    """Return the share of each scenario's transactions whose first reason is the true one.

    Args:
        first: n codes.
        scenario: [n] number of the scenario; 0 without one.

    >>> reason_agreement(["amount_high", "history", "time"], np.array([1, 1, 0]))
    {1: 0.5}
    """
    return {
        number: float(np.mean([code == truth for code in np.asarray(first)[scenario == number]]))
        for number, truth in SCENARIO_REASONS.items()
        if (scenario == number).any()
    }
