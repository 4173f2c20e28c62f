"""Preparation of a training: raw features of the whole log, inputs, and merchant weights.

training rows -> scale of amounts, extra fields -> raw features of the accounts
              -> inputs of payment and account -> merchant weights of the known frauds
              -> raw features of the merchants -> inputs of the merchant
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.data.dataset import Dataset
from model.features.account import Float32
from model.features.amount_scale import AmountScale
from model.features.spec import Encoder, FeatureSpec, payment_columns
from model.merchant_weight import MerchantWeightNetwork
from model.training.feature_table import open_raw, write_raw
from model.training.inputs import chosen_fields, payment_spec, with_merchant_inputs
from model.training.merchant_weight_fit import fit_merchant_weight
from model.training.sequences import Sequences

FIT_ROWS_MAX = 2_000_000
"""Most transactions from which the inputs' statistics are taken. Above it, a random sample."""

ENCODED_AT_ONCE = 65_536

Rows = NDArray[np.intp]


@dataclass(frozen=True)
class PreparedInputs:
    """Inputs chosen by one training period; several networks may share them.

    Attributes:
        raw: [N, R] raw features, account by account (the order of ``sequences.row``).
        spec: specification of the inputs.
        merchant_weight: the network that weighs the known frauds.
        left_out: fields that no network gets, and why.
        sample: rows of the training period by which the inputs were chosen.
    """

    raw: Float32
    spec: FeatureSpec
    merchant_weight: MerchantWeightNetwork
    left_out: dict[str, str]
    sample: Rows


def prepare(
    dataset: Dataset,
    sequences: Sequences,
    training_rows: Rows,
    label_delay_days: float,
    path: Path,
    seed: int,
    show: Callable[[float, str], None] = lambda share, note: None,
) -> PreparedInputs:
    """Compute the raw features, and choose the inputs by the training period.

    Args:
        sequences: the transactions of each account.
        training_rows: labelled rows of the training period.
        path: file of the raw features. An existing file is read instead of written.
        seed: decides the sample and the first weights of the merchant weight network.
        show: called with the share done and the current step.

    Raises:
        model.data.dataset.DatasetError: the file cannot be written, or the disk is full.
    """
    fields, left_out = chosen_fields(dataset, training_rows)
    scale = AmountScale.of(
        dataset.account[training_rows], np.asarray(dataset.amount[training_rows])
    )
    empty_spec = FeatureSpec(label_delay_days=label_delay_days, fields=fields, scale=scale)
    sample = _sample(training_rows, seed)
    position = np.empty(len(dataset), np.intp)
    position[sequences.row] = np.arange(len(dataset))
    sampled = position[sample]
    is_fraud = dataset.is_fraud[sample]
    found: list[tuple[FeatureSpec, MerchantWeightNetwork]] = []

    def fit_payments(raw: Float32) -> None:
        spec = payment_spec(raw[sampled], is_fraud, fields, label_delay_days, scale)
        encoded = _payment_inputs(spec, raw, sampled)
        show(0.4, "merchant weights")
        weight = fit_merchant_weight(
            lambda rows: encoded[torch.from_numpy(rows)], is_fraud, encoded.shape[1], seed
        )
        found.append((spec, weight))

    def weigh(raw: Float32, fraud: Rows) -> NDArray[np.uint8]:
        fit_payments(raw)
        spec, weight = found[0]
        return weight.merchant_weight(_payment_inputs(spec, raw, fraud))

    if path.is_file():
        raw = open_raw(path, dataset, empty_spec)
        fit_payments(raw)
    else:
        raw = write_raw(
            dataset, sequences, empty_spec, path, weigh, lambda share: show(share, "features")
        )
    spec, weight = found[0]
    spec = with_merchant_inputs(spec, raw[sampled], is_fraud)
    return PreparedInputs(raw, spec, weight, left_out, sample)


def write_raw_for(
    dataset: Dataset,
    sequences: Sequences,
    spec: FeatureSpec,
    merchant_weight: MerchantWeightNetwork,
    path: Path,
    show: Callable[[float], None] = lambda _: None,
) -> Float32:
    """Compute the raw features with the specification and the weights of a checkpoint."""

    def weigh(raw: Float32, fraud: Rows) -> NDArray[np.uint8]:
        return merchant_weight.merchant_weight(_payment_inputs(spec, raw, fraud))

    return write_raw(dataset, sequences, spec, path, weigh, show)


def _sample(rows: Rows, seed: int) -> Rows:
    """Return the rows, or a random sample of :data:`FIT_ROWS_MAX` of them, ascending."""
    if len(rows) <= FIT_ROWS_MAX:
        return rows
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(rows, FIT_ROWS_MAX, replace=False))


def _payment_inputs(spec: FeatureSpec, raw: Float32, positions: Rows) -> Tensor:
    """Return the inputs [m, P] of payment and account at positions [m] of raw features [N, R]."""
    encoder, columns = Encoder(spec), payment_columns(spec.roles)
    parts = [
        encoder.encode(raw[positions[begin : begin + ENCODED_AT_ONCE]])[:, columns]
        for begin in range(0, max(1, len(positions)), ENCODED_AT_ONCE)
    ]
    return torch.from_numpy(np.concatenate(parts))
