"""The training recipe: from a data set to a calibrated network and its checkpoint.

    prepare_training  -> raw features on disk, the inputs and the merchant weights
    fit_network       -> the network of the best epoch, with its calibration in the output layer
    make_checkpoint   -> account head, thresholds, metrics, header, forecast head

`recur train` and `recur evaluate` both call these functions, so evaluation measures exactly what
training ships.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from model import metrics as evaluation
from model.architecture import Cell
from model.checkpoint import Amounts, Checkpoint, Header
from model.data.dataset import Dataset
from model.features.account import Float32
from model.features.spec import FeatureSpec
from model.network import Network
from model.training.account_head import (
    SampledStates,
    account_scores,
    fit_account_head,
    is_compromised,
    states_of,
)
from model.training.calibration import fold_into_output_layer, platt
from model.training.feature_table import EncodedInputs, restarted_inputs
from model.training.forecast_head import ForecastData, fit_forecast_head
from model.training.loop import device_of, fit
from model.training.period_metrics import (
    choose_thresholds,
    labelled_rows,
    measure_held_out,
    validation_counts,
    validation_operating_points,
)
from model.training.preparation import PreparedInputs, prepare
from model.training.resume import TrainingState
from model.training.sequences import Sequences, unrolled_logits
from model.training.settings import Report, Reporter, TrainingSettings
from model.training.split import Split

Rows = NDArray[np.intp]


@dataclass(frozen=True)
class TrainingData:
    """A data set with its split into periods and the inputs prepared from its training days.

    Attributes:
        sequences: the transactions of each account.
    """

    dataset: Dataset
    sequences: Sequences
    split: Split
    prepared: PreparedInputs

    @property
    def sequences_to_end(self) -> Sequences:
        """The sequences up to the end of the held-out days."""
        return self.sequences.before(self.first_row_of(self.split.end))

    def first_row_of(self, day: int) -> int:
        """Return the row of the first transaction on that day or later."""
        return int(np.searchsorted(self.dataset.day, day))


@dataclass(frozen=True)
class FittedNetwork:
    """A network in evaluation mode whose logits are calibrated.

    Attributes:
        network: on the device on which it was fitted.
        inputs: of all transactions.
        scores: [N] by row of the data set; NaN after the held-out days.
        seconds: time that fitting and calibration took.
    """

    network: Network
    inputs: EncodedInputs
    scores: Float32
    seconds: float


@dataclass(frozen=True)
class AccountScores:
    """Scores of the account head after some of the transactions.

    Attributes:
        row: [m] the transactions after which the head was applied.
        score: [m] probability that the account is compromised.
        truth: [m] whether the account is compromised.
    """

    row: Rows
    score: Float32
    truth: NDArray[np.bool_]


def prepare_training(
    dataset: Dataset,
    sequences: Sequences,
    split: Split,
    settings: TrainingSettings,
    path: Path,
    show: Callable[[float, str], None] = lambda share, note: None,
) -> TrainingData:
    """Compute the raw features and choose the inputs by the training days.

    Args:
        path: file of the raw features. An existing file is read instead of written.
        show: called with the share done and the current step.

    Raises:
        model.data.dataset.DatasetError: the file cannot be written, or the disk is full.
    """
    rows = labelled_rows(dataset, split.training, split.validation)
    prepared = prepare(
        dataset, sequences, rows, settings.label_delay_days, path, settings.seed, show
    )
    return TrainingData(dataset, sequences, split, prepared)


def fit_network(
    data: TrainingData,
    settings: TrainingSettings,
    restarted_path: Path,
    *,
    cell: Cell = "gru",
    features: tuple[str, ...] | None = None,
    report: Reporter = lambda _: None,
    state: TrainingState | None = None,
) -> FittedNetwork:
    """Fit a network to the training days and calibrate it on the validation days.

    Args:
        restarted_path: file of the inputs of restarted accounts; it is overwritten.
        cell: the recurrent layer.
        features: the only features that the network gets. None: all of them.
        report: called often; ``done`` is the share of the fitting.
        state: progress of an interrupted fitting, which continues from there.

    Raises:
        model.training.settings.TrainingError: the loss is no longer finite.
    """
    began = time.perf_counter()
    device = device_of(settings)
    spec = data.prepared.spec
    if features is not None:
        chosen = tuple(i for i in spec.inputs if i.feature in features)
        spec = msgspec.structs.replace(spec, inputs=chosen)
    inputs = EncodedInputs(data.prepared.raw, spec, device)
    network = _new_network(data, spec, settings, cell, device)
    fit(
        network,
        inputs,
        data.dataset,
        data.split,
        settings,
        report,
        sequences=data.sequences,
        restarted=_restarted(data, inputs, settings.seed, restarted_path, report),
        validate=_validation(data, inputs),
        state=state,
    )
    report(Report("evaluating", 1.0))
    network.eval()
    logits = unrolled_logits(network, inputs, data.sequences_to_end)
    scores = _calibrate(network, logits, data)
    return FittedNetwork(network, inputs, scores, time.perf_counter() - began)


def make_checkpoint(
    fitted: FittedNetwork,
    data: TrainingData,
    settings: TrainingSettings,
    training: dict[str, Any],
    show: Callable[[float], None] = lambda share: None,
) -> tuple[Checkpoint, AccountScores]:
    """Fit the account head, choose the thresholds, measure, write the header, fit the forecast.

    Args:
        fitted: a GRU; its network moves to the CPU.
        training: the entry ``training`` of the header.
        show: called with the share of the forecast head's fitting that is done.
    """
    dataset, split = data.dataset, data.split
    thresholds = choose_thresholds(dataset, fitted.scores, split, settings)
    metrics = measure_held_out(dataset, fitted.scores, split, thresholds)
    accounts = _fit_account_head(fitted, data)
    header = Header(
        architecture=fitted.network.architecture,
        features=fitted.inputs.spec,
        currency=dataset.currency,
        thresholds=thresholds,
        metrics=metrics | _measure_account_head(accounts, data),
        training=training,
        operating_points=validation_operating_points(dataset, fitted.scores, split),
        validation=validation_counts(dataset, split),
        amounts=_amounts(data),
        data_digest=dataset.digest(),
    )
    checkpoint = Checkpoint.of(fitted.network.cpu(), header)
    if settings.forecast:
        checkpoint = add_forecast(checkpoint, data, settings.seed, show)
    return checkpoint, accounts


def add_forecast(
    checkpoint: Checkpoint,
    data: TrainingData,
    seed: int,
    show: Callable[[float], None] = lambda share: None,
) -> Checkpoint:
    """Fit a forecast head to a checkpoint; the same checkpoint if the data are too few.

    Args:
        checkpoint: its network and digest stay the same.
        data: prepared with the checkpoint's specification of the inputs.
        seed: decides samples and weights.
        show: called with the share done.
    """
    spec = checkpoint.header.features
    given = ForecastData(data.dataset, data.sequences, data.prepared.raw, spec, data.split)
    head = fit_forecast_head(checkpoint.stepper, given, seed, show)
    return checkpoint if head is None else checkpoint.with_forecast(head.shape, head.weights)


def score_accounts(
    network: Network, states: SampledStates, dataset: Dataset, sequences: Sequences
) -> AccountScores:
    """Apply the account head of a network to its states after some of the transactions.

    Args:
        sequences: of all transactions of the data set.
    """
    truth = is_compromised(dataset, sequences)[states.row]
    return AccountScores(states.row, account_scores(network, states), truth)


def _new_network(
    data: TrainingData,
    spec: FeatureSpec,
    settings: TrainingSettings,
    cell: Cell,
    device: torch.device,
) -> Network:
    architecture = dataclasses.replace(settings.architecture(spec), cell=cell)
    with _seeded(settings.seed, device):
        network = Network(architecture)
    if spec.uses_merchants:
        network.own.load_state_dict(data.prepared.merchant_weight.state_dict())
    return network.to(device)


def _restarted(
    data: TrainingData, inputs: EncodedInputs, seed: int, path: Path, report: Reporter
) -> tuple[EncodedInputs, Sequences]:
    def show(done: float) -> None:
        report(Report("computing features", 0.0, f"new accounts, {done:.0%} done"))

    until_row = data.first_row_of(data.split.validation)
    return restarted_inputs(data.dataset, data.sequences, inputs, until_row, path, seed, show)


def _validation(data: TrainingData, inputs: EncodedInputs) -> Callable[[Network], float]:
    """Return a function that measures average precision on the validation days."""
    until = data.sequences.before(data.first_row_of(data.split.gap))
    rows = labelled_rows(data.dataset, data.split.validation, data.split.gap)
    is_fraud = data.dataset.is_fraud[rows]

    def validate(network: Network) -> float:
        logits = unrolled_logits(network, inputs, until)[rows]
        return evaluation.average_precision(logits, is_fraud)

    return validate


def _calibrate(network: Network, logits: Float32, data: TrainingData) -> Float32:
    """Calibrate the network in place, and return the scores [N] of its former logits [N]."""
    rows = labelled_rows(data.dataset, data.split.validation, data.split.gap)
    scale, shift = platt(logits[rows], data.dataset.is_fraud[rows])
    fold_into_output_layer(network, scale, shift)
    return torch.sigmoid(torch.from_numpy(scale * logits + shift)).numpy()


def _fit_account_head(fitted: FittedNetwork, data: TrainingData) -> AccountScores:
    network, split = fitted.network, data.split
    states = states_of(network, fitted.inputs, data.sequences_to_end)
    truth = is_compromised(data.dataset, data.sequences)[states.row]
    day = data.dataset.day[states.row]
    rows = np.flatnonzero((day >= split.training) & (day < split.gap))
    fit_account_head(network, states.take(rows), truth[rows])
    return score_accounts(network, states, data.dataset, data.sequences)


def _measure_account_head(accounts: AccountScores, data: TrainingData) -> dict[str, float]:
    """Measure the account head on the held-out days; nothing if all accounts are of one class."""
    held_out = data.dataset.day[accounts.row] >= data.split.held_out
    score, truth = accounts.score[held_out], accounts.truth[held_out]
    if not truth.any() or truth.all():
        return {}
    return {
        "verdict_auc": evaluation.auc_roc(score, truth),
        "verdict_ap": evaluation.average_precision(score, truth),
    }


def _amounts(data: TrainingData) -> Amounts:
    """Return the spread of the amounts in the training days."""
    prepared, row = data.prepared, data.sequences.row
    position = np.empty(len(row), np.intp)
    position[row] = np.arange(len(row))
    sample = prepared.raw[position[prepared.sample]]
    column = {name: sample[:, i] for i, name in enumerate(prepared.spec.names)}
    return Amounts.of(column["amount"], column["amount_to_usual"])


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's random numbers, and restore the caller's afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
