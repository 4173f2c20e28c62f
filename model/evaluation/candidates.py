"""The candidates of a comparison: one network, or trees, trained on one fold.

    material (dataset, raw features on disk) + fold -> Trained: scores of the log, seconds, speed

A network is trained as :mod:`model.training.train` does it: inputs chosen and fitted on the
training days, the best of its last epochs and its calibration from the validation days.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from model.checkpoint import Amounts, Checkpoint, Header
from model.data.dataset import Dataset
from model.evaluation.lightgbm_reference import TREES, fit_boosted
from model.evaluation.protocol import Fold, iso_date
from model.evaluation.windows import WINDOW_INPUTS, window_inputs
from model.features.account import Float32
from model.features.spec import FeatureSpec, Field
from model.merchant_weight import MerchantWeightNetwork
from model.metrics import average_precision
from model.network import Cell, Network
from model.training.account_head import account_scores, fit_account_head, is_compromised, states_of
from model.training.calibration import fold as fold_calibration
from model.training.calibration import platt
from model.training.feature_table import EncodedInputs, field_values, restarted_inputs
from model.training.inputs import chosen_fields
from model.training.loop import device_of, fit
from model.training.period_metrics import choose_thresholds
from model.training.preparation import Prepared, prepare, write_raw_for
from model.training.resume import TrainingState
from model.training.sequences import Sequences, unrolled_logits
from model.training.settings import TrainingSettings

TRANSACTION_FEATURES = ("amount", "hour_of_day", "day_of_week")
"""What a transaction shows by itself, besides its further fields."""

BATCH_TRANSACTIONS = 512
"""Transactions that are timed together."""

TIMED_BATCHES = 40
TIMED_ROUNDS = 5
"""Of so many rounds of batches the quickest counts: the others were disturbed."""

CPU = torch.device("cpu")

Rows = NDArray[np.intp]
Show = Callable[[float, str], None]
"""Called with the share that is done, and a figure worth reading or nothing."""


@dataclass(frozen=True)
class NetworkKind:
    """One of the networks that are compared; each scores every transaction.

    Attributes:
        title: in tables and plots.
        cell, layers: see :class:`model.network.Architecture`.
        alone: sees the transaction alone, neither account nor merchant.
        cost: time of its training to that of a GRU, about.
    """

    title: str
    cell: Cell
    layers: int = 1
    alone: bool = False
    cost: float = 1.0


@dataclass(frozen=True)
class Verdicts:
    """What the last state says of accounts, asked after some transactions.

    Attributes:
        row: [m] the transactions after which it was asked.
        score: [m] probability that the account is compromised.
        truth: [m] whether it is.
    """

    row: Rows
    score: Float32
    truth: NDArray[np.bool_]


@dataclass(frozen=True)
class Trained:
    """What came out of a training.

    Attributes:
        scores: [N] of the log; NaN after the fold's test.
        checkpoint: of a GRU.
        verdicts: of a GRU, the fold's test days and before.
    """

    scores: Float32
    seconds: float
    parameters: int
    microseconds: float
    checkpoint: Checkpoint | None = None
    verdicts: Verdicts | None = None


class Material:
    """A dataset and what is computed of it once: raw features, windows.

    Args:
        folder: for raw features, about 180 bytes for each transaction.
    """

    def __init__(self, dataset: Dataset, folder: Path) -> None:
        self.dataset = dataset
        self.sequences = Sequences(dataset.account)
        self._folder = folder
        self._place = np.empty(len(dataset), np.intp)
        self._place[self.sequences.row] = np.arange(len(dataset))
        self._raw: dict[str, Float32] = {}
        self._windows: dict[tuple[tuple[Field, ...], float], Float32] = {}

    def inputs(
        self, spec: FeatureSpec, own: MerchantWeightNetwork, device: torch.device = CPU
    ) -> EncodedInputs:
        """The inputs by a specification, with frauds weighed by an own risk."""
        return EncodedInputs(self._raw_by_position(spec, own), spec, device)

    def restarted(
        self, inputs: EncodedInputs, fold: Fold, seed: int, show: Show
    ) -> tuple[EncodedInputs, Sequences]:
        """See :func:`model.training.feature_table.restarted_inputs`; the ones before are gone."""
        validated = int(fold.validated_rows(self.dataset)[0])
        path = self._folder / "raw-restarted"
        return restarted_inputs(
            *(self.dataset, self.sequences, inputs, validated, path, seed),
            lambda done: show(0.0, f"features of new accounts, {done:.0%} done"),
        )

    def raw_of(self, spec: FeatureSpec, own: MerchantWeightNetwork) -> Callable[[Rows], Float32]:
        """Gives the raw features [m, R] of rows [m] of the log."""
        raw = self._raw_by_position(spec, own)
        return lambda rows: raw[self._place[rows]]

    def prepared(self, fold: Fold, label_delay_days: float, show: Show) -> Prepared:
        """What the fold's networks share; raw features are computed once."""
        path = self._folder / f"raw-{fold.name}-{label_delay_days:g}"
        prepared = prepare(
            self.dataset,
            self.sequences,
            fold.learned_rows(self.dataset),
            label_delay_days,
            path,
            0,
            show,
        )
        self._raw[_raw_key(prepared.spec, prepared.own)] = prepared.raw
        return prepared

    def windows(self, fields: tuple[Field, ...], label_delay_days: float) -> Float32:
        """[N, 15 + fields] see :func:`window_inputs`; then the further fields."""
        key = fields, label_delay_days
        if key not in self._windows:
            everywhere = np.arange(len(self.dataset))
            further = [field_values(self.dataset, field)(everywhere)[:, None] for field in fields]
            windows = window_inputs(self.dataset, label_delay_days)
            self._windows[key] = np.hstack((windows, *further))
        return self._windows[key]

    def _raw_by_position(self, spec: FeatureSpec, own: MerchantWeightNetwork) -> Float32:
        key = _raw_key(spec, own)
        if key not in self._raw:
            path = self._folder / f"raw-{len(self._raw)}"
            self._raw[key] = write_raw_for(self.dataset, self.sequences, spec, own, path)
        return self._raw[key]


def _raw_key(spec: FeatureSpec, own: MerchantWeightNetwork) -> str:
    """Says what raw features depend on."""
    weights = [parameter.numpy().tobytes() for parameter in own.state_dict().values()]
    decides = [spec.fields, spec.label_delay_days, spec.scale, spec.inputs, *weights]
    return hashlib.sha256(msgspec.msgpack.encode(decides)).hexdigest()


def train_network(
    kind: NetworkKind,
    material: Material,
    fold: Fold,
    prepared: Prepared,
    settings: TrainingSettings,
    show: Show = lambda share, note: None,
    state: TrainingState | None = None,
) -> Trained:
    """A network of this kind, trained and calibrated on the fold's days.

    Args:
        prepared: all inputs; a network that sees the transaction alone takes some of them.
        state: where an interrupted training goes on.
    """
    dataset, spec, own = material.dataset, prepared.spec, prepared.own
    if kind.alone:
        seen = (*TRANSACTION_FEATURES, *(field.name for field in spec.fields))
        chosen = tuple(i for i in spec.inputs if i.feature in seen)
        spec = msgspec.structs.replace(spec, inputs=chosen)
    device = device_of(settings)
    inputs = EncodedInputs(prepared.raw, spec, device)
    until_test = material.sequences.before(fold.end_row(dataset))
    settings = dataclasses.replace(settings, layers=kind.layers)
    architecture = dataclasses.replace(settings.architecture(spec), cell=kind.cell)
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = Network(architecture)
    if not kind.alone:
        network.own.load_state_dict(own.state_dict())
    fit(
        network.to(device),
        inputs,
        dataset,
        fold.split,
        settings,
        lambda r: show(0.95 * r.done, r.note),
        sequences=material.sequences,
        restarted=material.restarted(inputs, fold, settings.seed, show),
        validate=_validation(material, fold, inputs),
        state=state,
    )
    network.eval()
    logits = unrolled_logits(network, inputs, until_test)
    validated = fold.validated_rows(dataset)
    scale, shift = platt(logits[validated], dataset.is_fraud[validated])
    fold_calibration(network, scale, shift)
    seconds = time.perf_counter() - began
    scores = torch.sigmoid(torch.from_numpy(scale * logits + shift)).numpy()
    show(0.96, "")
    states = states_of(network, inputs, until_test) if kind.cell == "gru" else None
    network.cpu()
    trained = Trained(scores, seconds, _parameters(network), _timed(network, inputs))
    if states is None:
        return trained
    truth = is_compromised(dataset, material.sequences)[states.row]
    learned = np.flatnonzero(np.isin(states.row, fold.trained_rows(dataset)))
    fit_account_head(network, states.taken(learned), truth[learned])
    header = Header(
        architecture=network.architecture,
        features=spec,
        currency=dataset.currency,
        training={"seed": settings.seed, "train_until": iso_date(fold.train_until)},
        thresholds=choose_thresholds(dataset, scores, fold.split, settings),
        amounts=_amounts(material, prepared, fold.learned_rows(dataset)),
        data_digest=dataset.digest(),
    )
    return dataclasses.replace(
        trained,
        checkpoint=Checkpoint(network, header),
        verdicts=Verdicts(states.row, account_scores(network, states), truth),
    )


def score_given(checkpoint: Checkpoint, material: Material, fold: Fold) -> Trained:
    """The scores of a checkpoint that was trained elsewhere."""
    dataset, network = material.dataset, checkpoint.network
    inputs = material.inputs(checkpoint.header.features, network.own)
    until_test = material.sequences.before(fold.end_row(dataset))
    logits = unrolled_logits(network, inputs, until_test)
    states = states_of(network, inputs, until_test)
    truth = is_compromised(dataset, material.sequences)[states.row]
    return Trained(
        torch.sigmoid(torch.from_numpy(logits)).numpy(),
        0.0,
        _parameters(network),
        _timed(network, inputs),
        checkpoint,
        Verdicts(states.row, account_scores(network, states), truth),
    )


def train_reference(
    material: Material,
    fold: Fold,
    label_delay_days: float,
    seed: int,
    show: Show = lambda share, note: None,
    trees: int = TREES,
) -> Trained:
    """LightGBM on exact windows, and the further fields that networks look at.

    It learns from the days that networks validate on, too.

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
    return Trained(
        scores,
        seconds,
        boosted.parameters,
        _microseconds(lambda: boosted.score(batch), len(batch)),
    )


def _timed(network: Network, inputs: EncodedInputs) -> float:
    """Microseconds for each transaction of a batch of distinct accounts on one core.

    Of the network alone: features, Kafka and Redis are not in it.
    """
    position = np.arange(BATCH_TRANSACTIONS) % len(inputs)
    batch = inputs.at(position).cpu()  # [n, I]
    hidden = network.empty_hidden(len(batch))

    def step() -> object:
        if network.architecture.cell == "gru":
            return network.step(batch, hidden)
        return network.unroll(batch.unsqueeze(1), hidden)

    with torch.inference_mode():
        return _microseconds(step, len(batch))


def _validation(
    material: Material, fold: Fold, inputs: EncodedInputs
) -> Callable[[Network], float]:
    """Average precision on the fold's validation days."""
    dataset = material.dataset
    rows = fold.validated_rows(dataset)
    is_fraud = dataset.is_fraud[rows]
    until = material.sequences.before(int(rows[-1]) + 1)

    def validate(network: Network) -> float:
        return average_precision(unrolled_logits(network, inputs, until)[rows], is_fraud)

    return validate


def _amounts(material: Material, prepared: Prepared, rows: Rows) -> Amounts:
    """How amounts spread in those rows: the reasons of alerts need it."""
    spec = prepared.spec
    raw = material.raw_of(spec, prepared.own)(rows)
    amount, to_usual = (raw[:, spec.names.index(n)] for n in ("amount", "amount_to_usual"))
    return Amounts.of(amount.astype(np.float64), to_usual.astype(np.float64))


def _parameters(network: Network) -> int:
    """Those that a score depends on: the verdict's are not among them."""
    return sum(
        weight.numel()
        for name, weight in network.named_parameters()
        if not name.startswith(("verdict.", "own."))
    )


def _microseconds(compute: Callable[[], object], transactions: int) -> float:
    with _one_thread():
        rounds = []
        for _ in range(TIMED_ROUNDS):
            began = time.perf_counter()
            for _ in range(TIMED_BATCHES):
                compute()
            rounds.append(time.perf_counter() - began)
    return min(rounds) / TIMED_BATCHES / transactions * 1e6


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
