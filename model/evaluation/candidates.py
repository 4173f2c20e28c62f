"""The candidates of a comparison: a network or boosted trees, trained on one fold.

    material (data set, raw features on disk) + fold -> scores of the log, seconds, speed

Networks are trained by :mod:`model.training.recipe`, as `recur train` trains them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from model.architecture import Cell
from model.checkpoint import Checkpoint
from model.data.dataset import Dataset
from model.evaluation.lightgbm_reference import TREES, fit_boosted
from model.evaluation.protocol import Fold, iso_date
from model.evaluation.windows import WINDOW_INPUTS, window_inputs
from model.features.account import Float32
from model.features.spec import FeatureSpec, Field
from model.merchant_weight import MerchantWeightNetwork
from model.network import Network
from model.stepper import Stepper
from model.torch_threads import one_thread
from model.training.account_head import states_of
from model.training.feature_table import EncodedInputs, field_values
from model.training.forecast_head import ForecastData
from model.training.inputs import chosen_fields
from model.training.preparation import write_raw_for
from model.training.recipe import (
    AccountScores,
    TrainingData,
    fit_network,
    make_checkpoint,
    prepare_training,
    score_accounts,
)
from model.training.resume import TrainingState
from model.training.sequences import Sequences, unrolled_logits
from model.training.settings import TrainingSettings

TRANSACTION_FEATURES = ("amount", "hour_of_day", "day_of_week")
"""Features of a transaction by itself, besides its extra fields."""

BATCH_TRANSACTIONS = 512
"""Size of the batch that is timed."""

TIMED_BATCHES = 40
TIMED_ROUNDS = 5
"""Rounds of batches; the fastest counts because the machine disturbs the others."""

CPU = torch.device("cpu")

Rows = NDArray[np.intp]
Show = Callable[[float, str], None]
"""Function that is called with the share done and a figure to show, or nothing."""


@dataclass(frozen=True)
class NetworkKind:
    """Kind of network in a comparison.

    Attributes:
        title: title in tables and plots.
        cell, layers: see :class:`model.network.Architecture`.
        alone: whether it sees the transaction alone, without account and merchant.
        cost: approximate time of its training, relative to a GRU.
    """

    title: str
    cell: Cell
    layers: int = 1
    alone: bool = False
    cost: float = 1.0


@dataclass(frozen=True)
class CandidateResult:
    """Scores of one trained candidate, with the costs of its training and scoring.

    Attributes:
        scores: [N] by row of the log; NaN after the test of the fold.
        seconds: time of the training; 0 if nothing was trained.
        parameters: trained numbers on which a score depends.
        microseconds: time to score a transaction, see :data:`BATCH_TRANSACTIONS`.
        checkpoint: only of a GRU.
        accounts: scores of the account head up to the end of the test; only of a GRU.
    """

    scores: Float32
    seconds: float
    parameters: int
    microseconds: float
    checkpoint: Checkpoint | None = None
    accounts: AccountScores | None = None


class Material:
    """A data set with its raw features and windows, each computed once.

    Args:
        dataset: the transactions.
        folder: for raw features, about 180 bytes for each transaction, fold and seed.
    """

    def __init__(self, dataset: Dataset, folder: Path) -> None:
        self.dataset = dataset
        self.sequences = Sequences(dataset.account)
        self._folder = folder
        self._position = np.empty(len(dataset), np.intp)
        self._position[self.sequences.row] = np.arange(len(dataset))
        self._raw: dict[str, Float32] = {}
        self._windows: dict[tuple[tuple[Field, ...], float], Float32] = {}

    @property
    def restarted_path(self) -> Path:
        """File for the inputs of restarted accounts; each training overwrites it."""
        return self._folder / "raw-restarted"

    def inputs(
        self, spec: FeatureSpec, merchant_weight: MerchantWeightNetwork, device: torch.device = CPU
    ) -> EncodedInputs:
        """Return the inputs by the specification and the merchant weights of a checkpoint."""
        return EncodedInputs(self._raw_by_position(spec, merchant_weight), spec, device)

    def raw_of(
        self, spec: FeatureSpec, merchant_weight: MerchantWeightNetwork
    ) -> Callable[[Rows], Float32]:
        """Return a function that gives the raw features [m, R] of rows [m] of the log."""
        raw = self._raw_by_position(spec, merchant_weight)
        return lambda rows: raw[self._position[rows]]

    def forecast_data(self, checkpoint: Checkpoint, fold: Fold) -> ForecastData:
        """Return the log for the forecast head of a checkpoint."""
        spec = checkpoint.header.features
        raw = self._raw_by_position(spec, checkpoint.network.own)
        return ForecastData(self.dataset, self.sequences, raw, spec, fold.split)

    def prepared(self, fold: Fold, settings: TrainingSettings, show: Show) -> TrainingData:
        """Return the data of a fold and seed; their raw features are computed once."""
        path = self._folder / f"raw-{fold.name}-{settings.label_delay_days:g}-{settings.seed}"
        data = prepare_training(self.dataset, self.sequences, fold.split, settings, path, show)
        key = _raw_key(data.prepared.spec, data.prepared.merchant_weight)
        self._raw[key] = data.prepared.raw
        return data

    def windows(self, fields: tuple[Field, ...], label_delay_days: float) -> Float32:
        """Return :func:`window_inputs` [N, 15], followed by the extra fields."""
        key = fields, label_delay_days
        if key not in self._windows:
            everywhere = np.arange(len(self.dataset))
            extra = [field_values(self.dataset, field)(everywhere)[:, None] for field in fields]
            windows = window_inputs(self.dataset, label_delay_days)
            self._windows[key] = np.hstack((windows, *extra))
        return self._windows[key]

    def _raw_by_position(
        self, spec: FeatureSpec, merchant_weight: MerchantWeightNetwork
    ) -> Float32:
        key = _raw_key(spec, merchant_weight)
        if key not in self._raw:
            path = self._folder / f"raw-{len(self._raw)}"
            self._raw[key] = write_raw_for(
                self.dataset, self.sequences, spec, merchant_weight, path
            )
        return self._raw[key]


def _raw_key(spec: FeatureSpec, merchant_weight: MerchantWeightNetwork) -> str:
    """Digest everything that decides the raw features."""
    weights = [parameter.numpy().tobytes() for parameter in merchant_weight.state_dict().values()]
    decides = [spec.fields, spec.label_delay_days, spec.scale, spec.inputs, *weights]
    return hashlib.sha256(msgspec.msgpack.encode(decides)).hexdigest()


def train_network(
    kind: NetworkKind,
    material: Material,
    fold: Fold,
    data: TrainingData,
    settings: TrainingSettings,
    show: Show = lambda share, note: None,
    state: TrainingState | None = None,
) -> CandidateResult:
    """Train a network of this kind by the recipe of `recur train`.

    Args:
        kind: the network; one that sees the transaction alone gets some of the inputs only.
        material: the data set.
        fold: the days to train on.
        data: the prepared data of the fold.
        settings: the settings of the training.
        show: called with the share done and a figure.
        state: progress of an interrupted training, which continues from there.
    """
    # The forecast of the described checkpoint alone is compared, after the networks.
    settings = dataclasses.replace(settings, layers=kind.layers, forecast=False)
    fields = (field.name for field in data.prepared.spec.fields)
    fitted = fit_network(
        data,
        settings,
        material.restarted_path,
        cell=kind.cell,
        features=(*TRANSACTION_FEATURES, *fields) if kind.alone else None,
        report=lambda r: show(0.95 * r.done, r.note),
        state=state,
    )
    show(0.96, "")
    checkpoint, accounts = None, None
    if kind.cell == "gru":
        training = {"seed": settings.seed, "train_until": iso_date(fold.train_until)}
        checkpoint, accounts = make_checkpoint(fitted, data, settings, training)
    network = fitted.network.cpu()
    return CandidateResult(
        fitted.scores,
        fitted.seconds,
        _parameters(network),
        _timed(network, fitted.inputs),
        checkpoint,
        accounts,
    )


def score_given(checkpoint: Checkpoint, material: Material, fold: Fold) -> CandidateResult:
    """Score with a checkpoint that was trained elsewhere."""
    dataset, network = material.dataset, checkpoint.network
    inputs = material.inputs(checkpoint.header.features, network.own)
    until_test = material.sequences.before(fold.end_row(dataset))
    logits = unrolled_logits(network, inputs, until_test)
    states = states_of(network, inputs, until_test)
    return CandidateResult(
        torch.sigmoid(torch.from_numpy(logits)).numpy(),
        0.0,
        _parameters(network),
        _timed(network, inputs),
        checkpoint,
        score_accounts(network, states, dataset, material.sequences),
    )


def train_reference(
    material: Material,
    fold: Fold,
    label_delay_days: float,
    seed: int,
    show: Show = lambda share, note: None,
    trees: int = TREES,
) -> CandidateResult:
    """Train LightGBM on exact windows and the extra fields that networks use.

    It also learns from the days on which networks are validated.

    Raises:
        model.evaluation.lightgbm_reference.MissingRequirementError: LightGBM is not installed.
    """
    dataset = material.dataset
    fields, _ = chosen_fields(dataset, fold.learned_rows(dataset))
    windows = material.windows(fields, label_delay_days)
    rows = fold.trained_rows(dataset)
    categories = [
        column
        for column, field in enumerate(fields, start=len(WINDOW_INPUTS))
        if field.kind == "categorical"
    ]
    boosted, seconds = fit_boosted(
        windows[rows], dataset.is_fraud[rows], seed, show, trees, categories
    )
    scores = np.full(len(windows), np.nan, np.float32)
    end = fold.end_row(dataset)
    scores[:end] = boosted.score(windows[:end])
    batch = windows[rows[-BATCH_TRANSACTIONS:]]
    return CandidateResult(
        scores,
        seconds,
        boosted.parameters,
        _microseconds(lambda: boosted.score(batch), len(batch)),
    )


def _timed(network: Network, inputs: EncodedInputs) -> float:
    """Measure the microseconds for a transaction in a batch of distinct accounts, on one core.

    Only the network is timed, without features, Kafka and Redis.
    """
    position = np.arange(BATCH_TRANSACTIONS) % len(inputs)
    batch = inputs.at(position).cpu()  # [n, I]
    if network.architecture.cell == "gru":
        stepper = Stepper(network.architecture, network.weights())
        rows, states = batch.numpy(), stepper.empty_hidden(len(batch))
        return _microseconds(lambda: stepper.step(rows, states), len(batch))
    hidden = network.empty_hidden(len(batch))

    def step() -> object:
        return network.unroll(batch.unsqueeze(1), hidden)

    with torch.inference_mode():
        return _microseconds(step, len(batch))


def _parameters(network: Network) -> int:
    """Count the parameters on which a score depends."""
    return sum(
        weight.numel()
        for name, weight in network.named_parameters()
        if not name.startswith(("verdict.", "own."))
    )


def _microseconds(compute: Callable[[], object], transactions: int) -> float:
    with one_thread():
        rounds = []
        for _ in range(TIMED_ROUNDS):
            began = time.perf_counter()
            for _ in range(TIMED_BATCHES):
                compute()
            rounds.append(time.perf_counter() - began)
    return min(rounds) / TIMED_BATCHES / transactions * 1e6
