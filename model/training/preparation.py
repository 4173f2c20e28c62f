"""What a training prepares once: raw features of the whole log, inputs, and merchant weights.

learned rows -> scale of amounts, fields -> accounts' raw features
             -> own risk, fitted -> weights of frauds -> merchants' raw features
             -> inputs with their ranges, means, deviations and steps
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
from model.features.account import AmountScale, Encoder, FeatureSpec, Float32, own_columns
from model.merchant_weight import MerchantWeightNetwork
from model.training.feature_table import open_raw, write_raw
from model.training.inputs import chosen_fields, fitted_spec
from model.training.merchant_weight_fit import fit_merchant_weight
from model.training.sequences import Sequences

FIT_ROWS_MAX = 2_000_000
"""Transactions that statistics of the inputs are taken from; of more, a random sample."""

ENCODED_AT_ONCE = 65_536

Rows = NDArray[np.intp]


@dataclass(frozen=True)
class Prepared:
    """What networks of one training period share.

    Attributes:
        raw: [N, R] raw features, account by account (the order of ``sequences.row``).
        spec: of the inputs.
        own: by which known frauds are weighed.
        left_out: fields that no network gets, and why.
        sample: rows of the training period from which the inputs were chosen.
    """

    raw: Float32
    spec: FeatureSpec
    own: MerchantWeightNetwork
    left_out: dict[str, str]
    sample: Rows


def prepare(
    dataset: Dataset,
    sequences: Sequences,
    learned: Rows,
    label_delay_days: float,
    path: Path,
    seed: int,
    show: Callable[[float, str], None] = lambda share, note: None,
) -> Prepared:
    """Prepare a training; what lies at ``path`` already is read instead of written.

    Args:
        sequences: of the dataset's accounts.
        learned: labelled rows of the training period.
        path: file of the raw features.
        show: called with the share that is done and what is being done.

    Raises:
        model.data.dataset.DatasetError: the file cannot be written, or the disk is full.
    """
    fields, left_out = chosen_fields(dataset, learned)
    scale = AmountScale.of(dataset.account[learned], np.asarray(dataset.amount[learned]))
    unfitted = FeatureSpec(label_delay_days=label_delay_days, fields=fields, scale=scale)
    sample = learned
    if len(sample) > FIT_ROWS_MAX:
        rng = np.random.default_rng(seed)
        sample = np.sort(rng.choice(sample, FIT_ROWS_MAX, replace=False))
    place = np.empty(len(dataset), np.intp)
    place[sequences.row] = np.arange(len(dataset))
    is_fraud = dataset.is_fraud[sample]

    def own_of(raw: Float32) -> tuple[MerchantWeightNetwork, _OwnInputs]:
        spec = fitted_spec(raw[place[sample]], is_fraud, fields, label_delay_days, scale)
        inputs = _OwnInputs(spec)
        encoded = inputs.of(raw, place[sample])
        show(0.4, "what payments explain by themselves")
        own = fit_merchant_weight(
            lambda rows: encoded[torch.from_numpy(rows)], is_fraud, encoded.shape[1], seed
        )
        return own, inputs

    own: list[MerchantWeightNetwork] = []

    def weigh(raw: Float32, fraud: Rows) -> NDArray[np.uint8]:
        found, inputs = own_of(raw)
        own.append(found)
        return found.merchant_weight(inputs.of(raw, fraud))

    if path.is_file():
        raw = open_raw(path, dataset, unfitted)
        own.append(own_of(raw)[0])
    else:
        raw = write_raw(
            dataset, sequences, unfitted, path, weigh, lambda share: show(share, "features")
        )
    spec = fitted_spec(raw[place[sample]], is_fraud, fields, label_delay_days, scale)
    return Prepared(raw, spec, own[0], left_out, sample)


def write_raw_for(
    dataset: Dataset,
    sequences: Sequences,
    spec: FeatureSpec,
    own: MerchantWeightNetwork,
    path: Path,
    show: Callable[[float], None] = lambda _: None,
) -> Float32:
    """Compute raw features as a checkpoint with this specification and own risk does."""
    inputs = _OwnInputs(spec)

    def weigh(raw: Float32, fraud: Rows) -> NDArray[np.uint8]:
        return own.merchant_weight(inputs.of(raw, fraud))

    return write_raw(dataset, sequences, spec, path, weigh, show)


class _OwnInputs:
    """Inputs of a payment and its account, by a specification."""

    def __init__(self, spec: FeatureSpec) -> None:
        self._encoder = Encoder(spec)
        self._columns = own_columns(spec.roles)

    def of(self, raw: Float32, positions: Rows) -> Tensor:
        """[m, own] of positions [m] of raw features [N, R]."""
        parts = [
            self._encoder.encode(raw[positions[begin : begin + ENCODED_AT_ONCE]])[:, self._columns]
            for begin in range(0, max(1, len(positions)), ENCODED_AT_ONCE)
        ]
        return torch.from_numpy(np.concatenate(parts))
