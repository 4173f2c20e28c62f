"""The inputs of a new network and their statistics, chosen by the training period.

fields = chosen_fields(dataset, rows)            extra fields that are informative
spec = fitted_spec(raw, is_fraud, fields, 7.0)   inputs with bins, means and deviations
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.data.dataset import Dataset
from model.features.account import ACCOUNT_FEATURES
from model.features.amount_scale import AmountScale
from model.features.merchant import MERCHANT_FEATURES
from model.features.spec import (
    ACCOUNT_INPUTS,
    AMOUNTS,
    MERCHANT_INPUTS,
    SMALL_SHARE,
    FeatureSpec,
    Field,
    Input,
    ranges_of,
)
from model.training.binning import learn_bin_edges

BINNED_FEATURES = (
    "amount",
    "amount_to_mean",
    "amount_to_usual",
    "hour_of_day",
    "seconds_since_last",
    "merchant_oldest_fraud_days",
    "merchant_streak_days",
)
"""Features that are binned, besides numeric fields."""

VOCABULARY_MAX = 1000
"""Most texts of a categorical field that have an embedding; the most frequent ones have."""

TEXT_COUNT_MIN = 20
"""Fewest occurrences of an embedded text. Rarer ones train the vector of unknown texts."""

EMBEDDING_SIZE_MAX = 16

CENTRAL_PERCENTILES = (0.5, 99.5)
"""Percentiles between which a numeric field's mean and deviation are measured."""

HEAVY_TAIL_DEVIATIONS = 30.0
"""Deviations from the mean beyond which a numeric field is no linear input.

Otherwise one value could dominate all others."""

QUANTILE_STEPS = 9
"""Number of bin edges of a heavy-tailed field with negative values."""

BETWEEN_ACCOUNTS_SHARE = 0.95
"""Share of a field's variance between accounts above which the field identifies accounts."""

ACCOUNTS_FEW = 20_000
"""Number of accounts up to which a field that identifies them is left out.

A network can memorise that many. With positions, ages and occupations of 400 accounts average
precision was .949, without them .956 (validation .937 and .953; data of benchmarks/bursts.py, one
seed)."""

TEXTS_PER_ACCOUNT = 0.1
"""Texts per account above which a categorical field identifies accounts, if it is constant."""

MISSING_MIN = 20
"""Fewest missing values of a field for which "is missing" becomes an input."""

_FLOAT32_RESOLUTION = 1e-6

DEFAULT_SCALE = AmountScale()

Float32 = NDArray[np.float32]
Rows = NDArray[np.intp]


CONSTANT = "their value never changes"
OF_ACCOUNT = "they identify one of few accounts"
"""Reasons to leave fields out, for messages."""


def chosen_fields(dataset: Dataset, rows: Rows) -> tuple[tuple[Field, ...], dict[str, str]]:
    """Choose the extra fields that are informative.

    A field is left out if it has fewer than two different values or frequent texts. It is also
    left out if it identifies one of few accounts, as a position or a birthday does.

    Args:
        dataset: the transactions.
        rows: rows of the training period.

    Returns:
        The chosen fields, and the reason for each left-out field by name.
    """
    kept: list[Field] = []
    left_out: dict[str, str] = {}
    account = np.asarray(dataset.account[rows])
    for name, values in dataset.numeric.items():
        there = np.asarray(values[rows])
        missing = np.isnan(there)
        varied = not missing.all() and np.nanmin(there) < np.nanmax(there)
        if not varied and not MISSING_MIN <= missing.sum() <= len(missing) - MISSING_MIN:
            left_out[name] = CONSTANT
        elif varied and _number_identifies_accounts(account[~missing], there[~missing]):
            left_out[name] = OF_ACCOUNT
        else:
            kept.append(Field(name, "numeric"))
    for name, codes in dataset.categorical.items():
        coded = np.asarray(codes[rows])
        vocabulary, unknown = _vocabulary(dataset.texts[name], coded)
        if len(vocabulary) + (unknown >= TEXT_COUNT_MIN) <= 1:
            left_out[name] = CONSTANT
        elif _text_identifies_accounts(account, coded):
            left_out[name] = OF_ACCOUNT
        else:
            kept.append(Field(name, "categorical", vocabulary))
    return tuple(kept), left_out


def _number_identifies_accounts(account: NDArray[np.int32], values: Float32) -> bool:
    """Whether a numeric field varies almost only between accounts, and the accounts are few."""
    # Ranks, because the tails of the values would dominate.
    ranks = np.unique(values, return_inverse=True)[1].astype(np.float64)
    count = np.bincount(account)
    accounts = int((count > 0).sum())
    if not 1 < accounts <= ACCOUNTS_FEW or len(values) < 2 * accounts:
        return False
    mean = np.bincount(account, ranks) / np.maximum(count, 1)
    within = float(np.square(ranks - mean[account]).sum())
    return within <= (1 - BETWEEN_ACCOUNTS_SHARE) * float(np.square(ranks - ranks.mean()).sum())


def _text_identifies_accounts(account: NDArray[np.int32], codes: NDArray[np.int32]) -> bool:
    """Whether a categorical field has many texts and one text for almost every account."""
    accounts = len(np.unique(account))
    if not 1 < accounts <= ACCOUNTS_FEW or len(codes) < 2 * accounts:
        return False
    pairs = len(np.unique(account.astype(np.int64) << 32 | (codes.astype(np.int64) + 1)))
    return pairs <= 1.05 * accounts and len(np.unique(codes)) > TEXTS_PER_ACCOUNT * accounts


def _vocabulary(texts: Sequence[str], codes: NDArray[np.int32]) -> tuple[tuple[str, ...], int]:
    """Return the frequent texts by falling frequency, and the number of other transactions."""
    count = np.bincount(codes[codes >= 0], minlength=len(texts))
    frequent = np.argsort(-count, kind="stable")[:VOCABULARY_MAX]
    frequent = frequent[count[frequent] >= TEXT_COUNT_MIN]
    vocabulary = tuple(texts[code] for code in frequent)
    return vocabulary, int(len(codes) - count[frequent].sum())


def fitted_spec(
    raw: Float32,
    is_fraud: NDArray[np.bool_],
    fields: tuple[Field, ...] = (),
    label_delay_days: float = 7.0,
    scale: AmountScale = DEFAULT_SCALE,
) -> FeatureSpec:
    """Choose and fit the inputs of a new network.

    Args:
        raw: [n, R] of labelled transactions of the training period, or a sample of them.
        is_fraud: [n].
        fields: the extra fields, as in the columns of ``raw``.
        label_delay_days: time until a label is known.
        scale: the scale by which ``raw`` was computed.
    """
    spec = payment_spec(raw, is_fraud, fields, label_delay_days, scale)
    return with_merchant_inputs(spec, raw, is_fraud)


def payment_spec(
    raw: Float32,
    is_fraud: NDArray[np.bool_],
    fields: tuple[Field, ...],
    label_delay_days: float,
    scale: AmountScale,
) -> FeatureSpec:
    """Choose and fit the inputs of payment and account; see :func:`fitted_spec`.

    The merchants' columns of ``raw`` may still be empty.
    """
    spec = FeatureSpec(label_delay_days=label_delay_days, fields=fields, scale=scale)
    inputs = [
        msgspec.structs.replace(i, unit=scale.floor)
        if i.feature in AMOUNTS and i.transform == "log1p"
        else i
        for i in ACCOUNT_INPUTS
    ]
    names = [name for name in BINNED_FEATURES if name in ACCOUNT_FEATURES]
    inputs += _bins(spec, names, raw, is_fraud)
    if any(field.kind == "categorical" for field in fields):
        inputs += _small_steps(raw[:, spec.names.index("amount_to_least")], is_fraud)
    spec = msgspec.structs.replace(spec, inputs=tuple(inputs), ranges=ranges_of(raw, spec))
    spec = spec.fitted(raw)
    more: list[Input] = []
    for field in fields:
        if field.kind == "numeric":
            more += _numeric_inputs(field.name, raw[:, spec.names.index(field.name)], is_fraud)
    more += [Input(field.name, "category") for field in fields if field.kind == "categorical"]
    return msgspec.structs.replace(spec, inputs=(*spec.inputs, *more))


def with_merchant_inputs(
    spec: FeatureSpec, raw: Float32, is_fraud: NDArray[np.bool_]
) -> FeatureSpec:
    """Add the inputs of the merchant to a :func:`payment_spec` of the same transactions."""
    names = [name for name in BINNED_FEATURES if name in MERCHANT_FEATURES]
    inputs = (*MERCHANT_INPUTS, *_bins(spec, names, raw, is_fraud))
    ranges = ranges_of(raw, spec)
    merchant = msgspec.structs.replace(spec, inputs=inputs, ranges=ranges).fitted(raw).inputs
    payment = [i for i in spec.inputs if i.feature in ACCOUNT_FEATURES]
    given, bins = payment[: len(ACCOUNT_INPUTS)], payment[len(ACCOUNT_INPUTS) :]
    ordered = (
        *(*given, *merchant[: len(MERCHANT_INPUTS)]),
        *(*bins, *merchant[len(MERCHANT_INPUTS) :]),
        *(i for i in spec.inputs if i.feature not in ACCOUNT_FEATURES),
    )
    return msgspec.structs.replace(spec, inputs=ordered, ranges=ranges)


def embedding_sizes(spec: FeatureSpec) -> tuple[tuple[int, int], ...]:
    """Return the number of codes and the embedding size of each category.

    >>> from model.features.spec import INPUTS, Field
    >>> spec = FeatureSpec(fields=(Field("category", "categorical", tuple("abcdefgh")),),
    ...                    inputs=(*INPUTS, Input("category", "category")))
    >>> embedding_sizes(spec)
    ((9, 5),)
    """
    codes = [1 + len(field.vocabulary) for field in spec.embedded]
    return tuple((n, min(EMBEDDING_SIZE_MAX, 2 + round(n**0.5))) for n in codes)


def _bins(
    spec: FeatureSpec, names: Sequence[str], raw: Float32, is_fraud: NDArray[np.bool_]
) -> list[Input]:
    inputs: list[Input] = []
    for name in names:
        inputs += _steps(name, learn_bin_edges(raw[:, spec.names.index(name)], is_fraud))
    return inputs


def _steps(name: str, thresholds: tuple[float, ...]) -> list[Input]:
    return [Input(name, "step", threshold=threshold) for threshold in thresholds]


def _small_steps(to_least: Float32, is_fraud: NDArray[np.bool_]) -> list[Input]:
    """Return the steps of a payment under what is usual, where its amount may have any effect.

    None of them is at what is usual itself, where the amount's effect must not jump.
    """
    small = to_least < SMALL_SHARE
    return [
        Input("amount_to_least", "step", threshold=edge, at_most=SMALL_SHARE)
        for edge in learn_bin_edges(to_least[small], is_fraud[small])
    ]


def _numeric_inputs(name: str, values: Float32, is_fraud: NDArray[np.bool_]) -> list[Input]:
    """Return the inputs of a numeric field: scaled value, bins, and whether it is missing."""
    missing = np.isnan(values)
    inputs = [Input(name, "is_missing")] if missing.sum() >= MISSING_MIN else []
    there = values[~missing].astype(np.float64)
    if not len(there) or there.min() == there.max():
        return inputs
    scaled = _scaled("linear", name, there)
    if _deviations(there, scaled) <= HEAVY_TAIL_DEVIATIONS:
        inputs.append(scaled)
    elif there.min() >= 0 and _deviations(
        np.log1p(there), logged := _scaled("log1p", name, there)
    ) <= (HEAVY_TAIL_DEVIATIONS):
        inputs.append(logged)
    else:
        quantiles = np.quantile(there, np.linspace(0, 1, QUANTILE_STEPS + 2)[1:-1])
        inputs += _steps(name, tuple(np.unique(quantiles.astype(np.float32)).tolist()))
    return inputs + _steps(name, learn_bin_edges(values, is_fraud))


def _scaled(transform: str, name: str, values: NDArray[np.float64]) -> Input:
    """Return an input with mean and deviation of the values in :data:`CENTRAL_PERCENTILES`."""
    transformed = np.log1p(values) if transform == "log1p" else values
    central = np.clip(transformed, *np.percentile(transformed, CENTRAL_PERCENTILES))
    mean, deviation = float(central.mean()), float(central.std())
    if deviation <= _FLOAT32_RESOLUTION * abs(mean):  # constant except for a few values
        deviation = float(transformed.std())
    # float32 has seven digits: smaller differences are noise and must not be amplified.
    least = max(_FLOAT32_RESOLUTION * abs(mean), 1e-30)
    return Input(
        name,
        "log1p" if transform == "log1p" else "linear",
        mean=mean,
        deviation=max(deviation, least),
    )


def _deviations(transformed: NDArray[np.float64], scaled: Input) -> float:
    """Return the distance of the furthest value, in deviations."""
    return float(np.abs((transformed - scaled.mean) / scaled.deviation).max())
