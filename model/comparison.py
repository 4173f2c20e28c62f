"""Networks compared on the same transactions, inputs and folds.

    log -> raw features -> for each fold, network and seed: train, score the test, measure

What was trained is kept in a folder, so that a comparison that was interrupted, or that gets
another network, goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from model import evaluation
from model.checkpoint import Checkpoint, Header
from model.dataset import Dataset
from model.features import DEFINITION, Encoder, FeatureSpec, Float32
from model.gru import Cell, Network
from model.protocol import Fold, ProtocolName, days_of
from model.reference import PARAMETERS, TREES, fit_boosted, lightgbm
from model.run_cache import CACHE_FORMAT, Run, RunCache
from model.scoring import score_unrolled
from model.training import Log, Report, Reporter, Split, TrainingSettings, fit, observe_all
from model.windows import window_inputs

TRANSACTION_FEATURES = ("amount", "hour_of_day", "day_of_week")
"""What a transaction shows by itself."""

BATCH_TRANSACTIONS = 512
"""Transactions that are timed together."""

TIMED_BATCHES = 40
TIMED_ROUNDS = 5
"""Of so many rounds of batches the quickest counts: the others were disturbed."""

RECALL_FALSE_POSITIVE_RATE = 0.001
"""At the threshold with so many false positives recall by scenario is measured."""

CARDS = 100
"""Cards, or transactions, that a day's review has room for."""

REFERENCE = "lightgbm"
GIVEN = "checkpoint"
DESCRIBED = "gru"
"""The network that the model card describes where no checkpoint is given."""


class ComparisonError(ValueError):
    """A comparison cannot be made; the message says why and what to change."""


@dataclass(frozen=True)
class NetworkKind:
    """One of the networks that are compared; each scores every transaction.

    Attributes:
        title: in tables and plots.
        cell, layers: see :class:`model.gru.Architecture`.
        alone: sees the transaction alone, neither account nor merchant.
        cost: time of its training to that of a GRU, about.
    """

    title: str
    cell: Cell
    layers: int = 1
    alone: bool = False
    cost: float = 1.0


KINDS: dict[str, NetworkKind] = {
    "transaction": NetworkKind("feed-forward, transaction alone", "none", alone=True, cost=0.4),
    "feed-forward": NetworkKind("feed-forward, aggregates", "none", cost=0.4),
    "rnn": NetworkKind("vanilla RNN", "rnn", cost=0.7),
    "lstm": NetworkKind("LSTM", "lstm", cost=1.2),
    "gru": NetworkKind("GRU", "gru"),
    "gru-2": NetworkKind("GRU, 2 layers", "gru", layers=2, cost=1.8),
    "gru-3": NetworkKind("GRU, 3 layers", "gru", layers=3, cost=2.6),
}
"""By the name that the command line takes."""

REFERENCE_COST = 0.2

TITLES: dict[str, str] = {
    **{name: kind.title for name, kind in KINDS.items()},
    REFERENCE: "LightGBM, exact windows",
    GIVEN: "checkpoint",
}
NETWORKS: tuple[str, ...] = (*KINDS, REFERENCE)
"""All that can be asked for."""


@dataclass(frozen=True)
class ComparisonSettings:
    """What is compared, and how it is trained.

    Attributes:
        training: only what shapes and trains a network is used, not what is simulated.
        trees: of LightGBM.

    Raises:
        ComparisonError: a value is out of its bounds; the message names it.
    """

    networks: tuple[str, ...] = NETWORKS
    seeds: int = 1
    label_delay_days: float = 7.0
    training: TrainingSettings = field(default_factory=TrainingSettings)
    trees: int = TREES

    def __post_init__(self) -> None:
        for name in self.networks:
            if name not in NETWORKS:
                raise ComparisonError(
                    f"there is no network {name[:40]!r}; choose of {', '.join(NETWORKS)}"
                )
        if not 1 <= self.seeds <= 100:
            raise ComparisonError(f"seeds is {self.seeds}; it must be 1 to 100")


@dataclass
class Comparison:
    """All runs, with the scores that plots are made of.

    Attributes:
        rows: by fold, the rows of the log that were measured.
        scores: by network, fold and seed, the scores of these rows.
        checkpoints: by fold, of the network to describe: the checkpoint that was given, or the
            GRU of the first seed.
    """

    protocol: ProtocolName
    folds: Sequence[Fold]
    rows: dict[str, NDArray[np.intp]]
    runs: list[Run] = field(default_factory=list)
    scores: dict[tuple[str, str, int], Float32] = field(default_factory=dict)
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)

    def networks(self) -> list[str]:
        """Those that ran, in the order of :data:`TITLES`."""
        ran = {run.network for run in self.runs}
        return [name for name in TITLES if name in ran]

    def of(self, network: str) -> list[Run]:
        """A network's runs."""
        return [run for run in self.runs if run.network == network]


def measure(scores: Float32, log: Dataset, rows: NDArray[np.intp]) -> dict[str, float]:
    """What the scores [n] of ``rows`` [n] of the log are worth, by name.

    Raises:
        model.evaluation.EvaluationError: one class only.
    """
    is_fraud, day = log.is_fraud[rows], days_of(log)[rows]
    return {
        "auc_roc": evaluation.auc_roc(scores, is_fraud),
        "average_precision": evaluation.average_precision(scores, is_fraud),
        "card_precision_at_100": evaluation.card_precision_at(
            scores, is_fraud, log.account[rows], day, CARDS
        ),
        "precision_at_100": evaluation.precision_at(scores, is_fraud, day, CARDS),
        "recall_at_fpr_0.001": evaluation.recall_at_false_positive_rate(scores, is_fraud, 0.001),
        "recall_at_fpr_0.01": evaluation.recall_at_false_positive_rate(scores, is_fraud, 0.01),
        "expected_calibration_error": evaluation.expected_calibration_error(scores, is_fraud),
        "brier_score": evaluation.brier_score(scores, is_fraud),
    }


@dataclass(frozen=True)
class _Job:
    """One network to train and measure on one fold."""

    network: str
    fold: Fold
    seed: int
    days: int
    """That it learns from: what its time goes by."""

    @property
    def cost(self) -> float:
        cost = REFERENCE_COST if self.network == REFERENCE else 0.05
        return self.days * (KINDS[self.network].cost if self.network in KINDS else cost)

    @property
    def title(self) -> str:
        return f"{TITLES[self.network]}, {self.fold.name}, seed {self.seed}"


@dataclass(frozen=True)
class _Trained:
    """What came out of a job, before it is measured; scores [rows up to the test's end]."""

    scores: Float32
    seconds: float
    parameters: int
    microseconds: float
    checkpoint: Checkpoint | None = None


_Show = Callable[[float, str], None]


class Comparer:
    """Trains, scores and measures on one log.

    Args:
        cache: folder of what was trained; none keeps nothing.
        given: a checkpoint to compare with the networks that are trained here.

    Raises:
        ComparisonError: the checkpoint looks at fields that the log does not have.
    """

    def __init__(
        self,
        log: Dataset,
        settings: ComparisonSettings,
        cache: Path | None = None,
        given: Checkpoint | None = None,
    ) -> None:
        if given is not None and given.header.features.fields:
            names = ", ".join(f.name for f in given.header.features.fields)
            raise ComparisonError(
                f"the checkpoint looks at the fields {names}, which this comparison does not read"
            )
        self._log = log
        self._settings = settings
        self._given = given
        self._cache = None if cache is None else RunCache(cache)
        self._digest = log.digest()
        self._raw: dict[float, Float32] = {}  # by label delay
        self._windows: Float32 | None = None
        self._encoded: tuple[Fold, FeatureSpec, Float32] | None = None  # of the present fold

    def compare(
        self, protocol: ProtocolName, folds: Sequence[Fold], report: Reporter = lambda _: None
    ) -> Comparison:
        """Every network on every fold with every seed.

        Args:
            report: called often, from this thread; see :mod:`model.progress`.

        Raises:
            model.reference.MissingRequirementError: LightGBM is asked for and not there.
            model.training.TrainingError: a training cannot go on.
        """
        jobs = list(self._jobs(folds))
        if any(job.network == REFERENCE for job in jobs):
            lightgbm()
        comparison = Comparison(protocol, folds, {f.name: f.tested_rows(self._log) for f in folds})
        done, whole = 0.0, sum(job.cost for job in jobs)
        for job in jobs:

            def show(share: float, note: str, job: _Job = job, done: float = done) -> None:
                report(Report(job.title, (done + job.cost * share) / whole, note))

            show(0.0, "")
            run, scores, checkpoint = self._kept_or_run(job, comparison.rows[job.fold.name], show)
            comparison.runs.append(run)
            comparison.scores[job.network, job.fold.name, job.seed] = scores
            described = DESCRIBED if self._given is None else GIVEN
            if checkpoint is not None and job.network == described:
                comparison.checkpoints.setdefault(job.fold.name, checkpoint)
            done += job.cost
        report(Report("compared", 1.0))
        return comparison

    def raw(self, label_delay_days: float) -> Float32:
        """Raw features [N, R] of the log; computed once."""
        if label_delay_days not in self._raw:
            spec = FeatureSpec(label_delay_days=label_delay_days)
            self._raw[label_delay_days] = observe_all(_training_log(self._log), spec)
        return self._raw[label_delay_days]

    def _jobs(self, folds: Sequence[Fold]) -> Iterator[_Job]:
        for fold in folds:
            days = fold.train_until - fold.log_from
            if self._given is not None:
                yield _Job(GIVEN, fold, 0, days)
            for network in self._settings.networks:
                for seed in range(1, self._settings.seeds + 1):
                    yield _Job(network, fold, seed, days)

    def _kept_or_run(
        self, job: _Job, rows: NDArray[np.intp], show: _Show
    ) -> tuple[Run, Float32, Checkpoint | None]:
        key = self._key(job)
        kept = None if self._cache is None else self._cache.get(key)
        if kept is not None:
            return kept
        trained = self._train(job, show)
        scores = trained.scores[rows]
        threshold = evaluation.threshold_at_false_positive_rate(
            scores, self._log.is_fraud[rows], RECALL_FALSE_POSITIVE_RATE
        )
        run = Run(
            network=job.network,
            fold=job.fold.name,
            seed=job.seed,
            seconds=trained.seconds,
            parameters=trained.parameters,
            microseconds=trained.microseconds,
            metrics=measure(scores, self._log, rows),
            recall_by_scenario=evaluation.recall_by_scenario(
                scores, self._log.scenario[rows], threshold
            ),
        )
        if self._cache is not None:
            self._cache.put(key, run, scores, trained.checkpoint)
        return run, scores, trained.checkpoint

    def _key(self, job: _Job) -> str:
        """A file's name: what is in it, and a digest of everything that decides it."""
        decides: list[object] = [CACHE_FORMAT, DEFINITION, self._digest, dataclasses.astuple(job)]
        if job.network == GIVEN:
            assert self._given is not None
            decides.append(self._given.digest)
        elif job.network == REFERENCE:
            decides += [self._settings.trees, PARAMETERS, self._settings.label_delay_days]
        else:
            settings = dataclasses.asdict(self._settings.training)
            decides += [settings, dataclasses.asdict(KINDS[job.network])]
            decides.append(self._settings.label_delay_days)
        digest = hashlib.sha256(msgspec.json.encode(decides, order="deterministic"))
        return f"{job.network}-{job.fold.name}-{job.seed}-{digest.hexdigest()[:12]}"

    def _train(self, job: _Job, show: _Show) -> _Trained:
        if job.network == REFERENCE:
            return self._train_reference(job, show)
        if job.network == GIVEN:
            return self._score_given(job)
        return self._train_network(job, show)

    def _train_network(self, job: _Job, show: _Show) -> _Trained:
        kind = KINDS[job.network]
        spec, inputs = self._inputs(job.fold)
        if kind.alone:
            columns = [c for c, i in enumerate(spec.inputs) if i.feature in TRANSACTION_FEATURES]
            spec = msgspec.structs.replace(spec, inputs=tuple(spec.inputs[c] for c in columns))
            inputs = np.ascontiguousarray(inputs[:, columns])
        settings = dataclasses.replace(self._settings.training, seed=job.seed, layers=kind.layers)
        network, seconds = train_network(kind, inputs, self._log, job.fold, settings, show)
        tensor = torch.from_numpy(inputs)
        account = self._log.account[: len(inputs)].astype(np.int64)
        checkpoint = None
        if kind.cell == "gru":
            checkpoint = Checkpoint(
                network,
                Header(
                    architecture=network.architecture,
                    features=spec,
                    training={"seed": job.seed, "fold": job.fold.describe()},
                    data_digest=self._digest,
                ),
            )
        return _Trained(
            score_unrolled(network, tensor, account),
            seconds,
            sum(weight.numel() for weight in network.parameters()),
            microseconds_each(network, tensor[-BATCH_TRANSACTIONS:]),
            checkpoint,
        )

    def _train_reference(self, job: _Job, show: _Show) -> _Trained:
        if self._windows is None:
            self._windows = window_inputs(self._log, self._settings.label_delay_days)
        rows = job.fold.trained_rows(self._log)
        boosted, seconds = fit_boosted(
            self._windows[rows],
            self._log.is_fraud[rows],
            job.seed,
            show,
            self._settings.trees,
        )
        batch = self._windows[rows[-BATCH_TRANSACTIONS:]]
        return _Trained(
            boosted.score(self._windows),
            seconds,
            boosted.parameters,
            _microseconds(lambda: boosted.score(batch, threads=1), len(batch)),
        )

    def _score_given(self, job: _Job) -> _Trained:
        assert self._given is not None
        end = int(job.fold.tested_rows(self._log)[-1]) + 1
        raw = self.raw(self._given.header.features.label_delay_days)[:end]
        inputs = torch.from_numpy(self._given.encode(raw))
        network = self._given.network
        return _Trained(
            score_unrolled(network, inputs, self._log.account[:end].astype(np.int64)),
            0.0,
            sum(weight.numel() for weight in network.parameters()),
            microseconds_each(network, inputs[-BATCH_TRANSACTIONS:]),
            self._given,
        )

    def _inputs(self, fold: Fold) -> tuple[FeatureSpec, Float32]:
        """How inputs are computed, fitted to the training days, and the inputs [n, I]."""
        if self._encoded is None or self._encoded[0] != fold:
            self._encoded = None  # not two of them in memory
            delay = self._settings.label_delay_days
            raw = self.raw(delay)
            end = int(fold.tested_rows(self._log)[-1]) + 1
            trained = fold.trained_rows(self._log)
            spec = FeatureSpec(label_delay_days=delay).fitted(raw[trained])
            self._encoded = fold, spec, Encoder(spec).encode(raw[:end])
        return self._encoded[1:]


def train_network(
    kind: NetworkKind,
    inputs: Float32,
    log: Dataset,
    fold: Fold,
    settings: TrainingSettings,
    show: _Show = lambda share, note: None,
) -> tuple[Network, float]:
    """A network of this kind trained on the fold's days, ready to score, and the seconds taken.

    Args:
        inputs: [n, I] of the log's first n transactions, those of the training among them.
        show: called with the share that is done and a figure worth reading.
    """
    end = int(fold.trained_rows(log)[-1]) + 1
    split = Split(
        fold.score_from, fold.train_until, fold.test_from, fold.test_from, fold.test_until
    )
    architecture = dataclasses.replace(settings.architecture(inputs.shape[1]), cell=kind.cell)
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = Network(architecture)
        fit(
            network,
            torch.from_numpy(inputs[:end]),
            _training_log(log, end),
            split,
            settings,
            lambda r: show(r.done, r.note),
        )
    return network.eval(), time.perf_counter() - began


def microseconds_each(network: Network, inputs: torch.Tensor) -> float:
    """Microseconds for each of n transactions [n, I], scored as one batch on one core."""
    hidden = network.empty_hidden(len(inputs))

    def step() -> object:
        if network.architecture.cell == "gru":
            return network.step(inputs, hidden)
        return network.unroll(inputs.unsqueeze(1), hidden)

    with torch.inference_mode():
        return _microseconds(step, len(inputs))


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


def _training_log(log: Dataset, end: int | None = None) -> Log:
    return Log(
        day=days_of(log)[:end],
        timestamp_ms=log.timestamp_ms[:end],
        account=log.account[:end].astype(np.int64),
        merchant=log.merchant[:end].astype(np.int64),
        amount=log.amount[:end],
        is_fraud=log.is_fraud[:end],
        scenario=log.scenario[:end],
    )
