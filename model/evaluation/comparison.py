"""The comparison of networks on the same transactions, inputs and folds.

    data set -> for each fold, network and seed: train, score the test, measure

Finished trainings stay in a folder. A comparison that was interrupted, or that gets another
network, continues from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from model import metrics as evaluation
from model.checkpoint import Checkpoint
from model.data.dataset import Dataset
from model.evaluation.candidates import (
    CandidateResult,
    Material,
    NetworkKind,
    Show,
    score_given,
    train_network,
    train_reference,
)
from model.evaluation.lightgbm_reference import PARAMETERS, TREES, lightgbm
from model.evaluation.protocol import Fold, ProtocolName, days_of
from model.evaluation.run_cache import CACHE_FORMAT, Run, RunCache
from model.features.account import DEFINITION, Float32
from model.features.spec import INPUTS
from model.training.loop import RECIPE, device_of
from model.training.recipe import TrainingData
from model.training.settings import Report, Reporter, TrainingSettings

RECALL_FALSE_POSITIVE_RATE = 0.001
"""False positive rate of the threshold at which recall by scenario is measured."""

DAILY_REVIEW = 100
"""Number of cards or transactions that can be reviewed in a day."""

REFERENCE = "lightgbm"
GIVEN = "checkpoint"
DESCRIBED = "gru"
"""Network that the model card describes if no checkpoint is given."""


class ComparisonError(ValueError):
    """A comparison is impossible; the message says why and what to change."""


KINDS: dict[str, NetworkKind] = {
    "transaction": NetworkKind("feed-forward, transaction alone", "none", alone=True, cost=0.4),
    "feed-forward": NetworkKind("feed-forward, aggregates", "none", cost=0.4),
    "rnn": NetworkKind("vanilla RNN", "rnn", cost=0.7),
    "lstm": NetworkKind("LSTM", "lstm", cost=1.2),
    "gru": NetworkKind("GRU", "gru"),
    "gru-2": NetworkKind("GRU, 2 layers", "gru", layers=2, cost=1.8),
    "gru-3": NetworkKind("GRU, 3 layers", "gru", layers=3, cost=2.6),
}
"""Kinds of networks by their name on the command line."""

REFERENCE_COST = 0.2
SPEC_SHARE = 0.03
"""Share of a network's time that the preparation of its inputs takes."""

TITLES: dict[str, str] = {
    **{name: kind.title for name, kind in KINDS.items()},
    REFERENCE: "LightGBM, exact windows",
    GIVEN: "checkpoint",
}
NETWORKS: tuple[str, ...] = (*KINDS, REFERENCE)
"""Names of all networks that can be compared."""


@dataclass(frozen=True)
class ComparisonSettings:
    """Settings of a comparison.

    Attributes:
        networks: names of the networks to compare.
        seeds: number of trainings of each network.
        label_delay_days: time until a label is known.
        training: settings of the network and its training; the simulation's are not used.
        trees: number of trees of LightGBM.

    Raises:
        ComparisonError: a value is out of bounds; the message names it.
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
    """Runs of a comparison, with the scores for plots.

    Attributes:
        rows: measured rows of the log, by fold.
        scores: scores of these rows, by network, fold and seed.
        checkpoints: checkpoint to describe, by fold: the given one, or the GRU of the first seed.
    """

    protocol: ProtocolName
    folds: Sequence[Fold]
    rows: dict[str, NDArray[np.intp]]
    runs: list[Run] = field(default_factory=list)
    scores: dict[tuple[str, str, int], Float32] = field(default_factory=dict)
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)

    def networks(self) -> list[str]:
        """Return the names of the networks that ran, in the order of :data:`TITLES`."""
        ran = {run.network for run in self.runs}
        return [name for name in TITLES if name in ran]

    def of(self, network: str) -> list[Run]:
        """Return the runs of a network."""
        return [run for run in self.runs if run.network == network]


def measure(
    scores: Float32,
    log: Dataset,
    rows: NDArray[np.intp],
    truth: NDArray[np.bool_] | None = None,
) -> dict[str, float]:
    """Measure the scores of some rows of the log; the metrics are by name.

    Args:
        scores: [n].
        log: the transactions.
        rows: [n] rows of the log.
        truth: [n] truth of the scores. None: whether the transaction is fraud.

    Raises:
        model.metrics.EvaluationError: one class only.
    """
    is_fraud = log.is_fraud[rows] if truth is None else truth
    day = days_of(log)[rows]
    return {
        "auc_roc": evaluation.auc_roc(scores, is_fraud),
        "average_precision": evaluation.average_precision(scores, is_fraud),
        "card_precision_at_100": evaluation.card_precision_at(
            scores, is_fraud, log.account[rows], day, DAILY_REVIEW
        ),
        "precision_at_100": evaluation.precision_at(scores, is_fraud, day, DAILY_REVIEW),
        "recall_at_fpr_0.001": evaluation.recall_at_false_positive_rate(scores, is_fraud, 0.001),
        "recall_at_fpr_0.01": evaluation.recall_at_false_positive_rate(scores, is_fraud, 0.01),
        "calibration_error": evaluation.expected_calibration_error(scores, is_fraud),
        "brier_score": evaluation.brier_score(scores, is_fraud),
    }


@dataclass(frozen=True)
class _Job:
    """One network to train and measure on one fold."""

    network: str
    fold: Fold
    seed: int
    days: int
    """Days that it learns from; its time is proportional to them."""

    @property
    def cost(self) -> float:
        cost = REFERENCE_COST if self.network == REFERENCE else 0.05
        return self.days * (KINDS[self.network].cost if self.network in KINDS else cost)

    @property
    def title(self) -> str:
        return f"{TITLES[self.network]}, {self.fold.name}, seed {self.seed}"


class Comparer:
    """Comparer of networks on one data set.

    Args:
        log: the transactions.
        settings: what to compare.
        work: folder for raw features; the caller removes it.
        cache: folder for finished trainings. None: they are not kept.
        given: a checkpoint to compare with the networks trained here.

    Raises:
        ComparisonError: the checkpoint uses fields that the data set does not have.
    """

    def __init__(
        self,
        log: Dataset,
        settings: ComparisonSettings,
        work: Path,
        cache: Path | None = None,
        given: Checkpoint | None = None,
    ) -> None:
        if given is not None:
            _check_fields(given, log)
        self.material = Material(log, work)
        self._settings = settings
        self._given = given
        self._cache = None if cache is None else RunCache(cache)
        self._digest = log.digest()
        self._data: tuple[Fold, int, TrainingData] | None = None  # of the present fold and seed

    def compare(
        self, protocol: ProtocolName, folds: Sequence[Fold], report: Reporter = lambda _: None
    ) -> Comparison:
        """Run every network on every fold with every seed.

        Args:
            protocol: name of the protocol.
            folds: its folds.
            report: called often, from this thread; see :mod:`pipeline.progress`.

        Raises:
            model.evaluation.lightgbm_reference.MissingRequirementError: LightGBM is to be
                compared but is not installed.
            model.training.settings.TrainingError: a training cannot continue.
            model.data.dataset.DatasetError: the disk is full.
        """
        jobs = list(self._jobs(folds))
        if any(job.network == REFERENCE for job in jobs):
            lightgbm()
        log = self.material.dataset
        comparison = Comparison(protocol, folds, {f.name: f.tested_rows(log) for f in folds})
        described = DESCRIBED if self._given is None else GIVEN
        done, whole = 0.0, sum(job.cost for job in jobs)
        for job in jobs:

            def show(share: float, note: str, job: _Job = job, done: float = done) -> None:
                report(Report(job.title, (done + job.cost * share) / whole, note))

            show(0.0, "")
            run, scores, checkpoint = self._kept_or_run(job, comparison.rows[job.fold.name], show)
            comparison.runs.append(run)
            comparison.scores[job.network, job.fold.name, job.seed] = scores
            if checkpoint is not None and job.network == described:
                comparison.checkpoints.setdefault(job.fold.name, checkpoint)
            done += job.cost
        report(Report("compared", 1.0))
        return comparison

    def _jobs(self, folds: Sequence[Fold]) -> Iterator[_Job]:
        for fold in folds:
            days = fold.train_until - fold.log_from
            if self._given is not None:
                yield _Job(GIVEN, fold, 0, days)
            for seed in range(1, self._settings.seeds + 1):  # the networks of a seed share inputs
                for network in self._settings.networks:
                    yield _Job(network, fold, seed, days)

    def _kept_or_run(
        self, job: _Job, rows: NDArray[np.intp], show: Show
    ) -> tuple[Run, Float32, Checkpoint | None]:
        key = self._key(job)
        kept = None if self._cache is None else self._cache.get(key)
        if kept is not None:
            run, scores, checkpoint = kept
            return run, scores, self._given if job.network == GIVEN else checkpoint
        result = self._train(job, key, show)
        log, scores = self.material.dataset, result.scores[rows]
        threshold = evaluation.threshold_at_false_positive_rate(
            scores, log.is_fraud[rows], RECALL_FALSE_POSITIVE_RATE
        )
        run = Run(
            network=job.network,
            fold=job.fold.name,
            seed=job.seed,
            seconds=result.seconds,
            parameters=result.parameters,
            microseconds=result.microseconds,
            metrics=measure(scores, log, rows),
            recall_by_scenario=evaluation.recall_by_scenario(scores, log.scenario[rows], threshold),
            account_head=_measure_account_head(result, log, rows),
        )
        if self._cache is not None:
            checkpoint = None if job.network == GIVEN else result.checkpoint
            self._cache.put(key, run, scores, checkpoint)
        return run, scores, result.checkpoint

    def _key(self, job: _Job) -> str:
        """Return a file name: the run, and a digest of everything that decides it."""
        decides: list[object] = [CACHE_FORMAT, RECIPE, DEFINITION, INPUTS, self._digest]
        decides.append(dataclasses.astuple(job))
        settings = self._settings
        if job.network == GIVEN:
            assert self._given is not None
            decides.append(self._given.digest)
        elif job.network == REFERENCE:
            decides += [settings.trees, PARAMETERS, settings.label_delay_days]
        else:
            training = dataclasses.asdict(settings.training)
            kind = dataclasses.asdict(KINDS[job.network])
            device = device_of(settings.training).type
            decides += [training, kind, settings.label_delay_days, device]
        digest = hashlib.sha256(msgspec.json.encode(decides, order="deterministic"))
        return f"{job.network}-{job.fold.name}-{job.seed}-{digest.hexdigest()[:12]}"

    def _train(self, job: _Job, key: str, show: Show) -> CandidateResult:
        settings = self._settings
        if job.network == GIVEN:
            assert self._given is not None
            return score_given(self._given, self.material, job.fold)
        if job.network == REFERENCE:
            return train_reference(
                self.material, job.fold, settings.label_delay_days, job.seed, show, settings.trees
            )
        training = dataclasses.replace(
            settings.training, seed=job.seed, label_delay_days=float(settings.label_delay_days)
        )
        return train_network(
            KINDS[job.network],
            self.material,
            job.fold,
            self._prepared(job.fold, training, lambda share, note: show(SPEC_SHARE * share, note)),
            training,
            lambda share, note: show(SPEC_SHARE + (1 - SPEC_SHARE) * share, note),
            None if self._cache is None else self._cache.state(key),
        )

    def _prepared(self, fold: Fold, training: TrainingSettings, show: Show) -> TrainingData:
        """Return the data that the networks of a fold and seed share."""
        if self._data is None or self._data[:2] != (fold, training.seed):
            self._data = fold, training.seed, self.material.prepared(fold, training, show)
        return self._data[2]


def _measure_account_head(
    result: CandidateResult, log: Dataset, rows: NDArray[np.intp]
) -> dict[str, float]:
    """Measure the account head after the rows; nothing if all accounts are of one class."""
    if result.accounts is None:
        return {}
    measured = np.flatnonzero(np.isin(result.accounts.row, rows))
    truth = result.accounts.truth[measured]
    if not truth.any() or truth.all():
        return {}
    return measure(result.accounts.score[measured], log, result.accounts.row[measured], truth)


def _check_fields(given: Checkpoint, log: Dataset) -> None:
    there = {*log.numeric, *log.categorical}
    if missing := [f.name for f in given.header.features.fields if f.name not in there]:
        raise ComparisonError(
            f"the checkpoint uses the fields {', '.join(missing)}, which the data do not "
            "have: map columns to them"
        )
