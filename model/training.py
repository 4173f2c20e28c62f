"""Training: transactions from the simulator in, a checkpoint with its thresholds out.

    simulate -> features -> split by days -> fit by truncated back-propagation through time
             -> thresholds on the validation days -> metrics on the held-out days -> save

The days in order: warm-up (seen, not scored), training, validation (thresholds), a gap in
which labels would still be on their way, held out (metrics).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model import evaluation
from model.checkpoint import Checkpoint, Header, Thresholds
from model.features import Encoder, FeatureSpec, Float32, observe_log
from model.gru import Architecture, Network
from model.merchants import Labels, observe_merchant_log
from model.scoring import Sequences, score_unrolled
from model.simulator import DayOfTransactions, Simulator

TRANSACTIONS_MAX = 30_000_000
"""Largest log to train on; it is held in memory (about 250 bytes a transaction)."""

GRADIENT_NORM_MAX = 1.0
RISE_SHARE = 0.02
"""Share of the training in which the learning rate rises, before it falls as a cosine."""

LENGTH_JITTER = 0.1
"""Accounts of about the same length train together; about: within so much of it."""

ALERTS_MIN = 20
"""A precision is measured on no fewer alerts."""


class TrainingError(ValueError):
    """Training cannot begin or go on; the message says why and what to change."""


@dataclass(frozen=True)
class TrainingSettings:
    """All that decides a trained checkpoint.

    Raises:
        TrainingError: a value is out of its bounds; the message names it.
    """

    customers: int = 5000
    terminals: int = 10_000
    days: int = 183
    start_date: str = "2018-04-01"
    seed: int = 1
    """Of data, weights and dropout. Not the simulator's default: that stays data never seen."""

    hidden_size: int = 128
    layers: int = 1
    input_size: int = 64
    head_size: int = 64
    dropout: float = 0.1

    epochs: int = 10
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    chunk_steps: int = 64
    accounts_per_batch: int = 256

    review_false_positive_rate: float = 0.002
    """Of the genuine transactions at most this share is reviewed or declined."""
    decline_precision: float = 0.9
    """Of the declined transactions at least this share is fraud."""

    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        whole = {"days": 14, "epochs": 1, "chunk_steps": 1, "accounts_per_batch": 1, "seed": 0}
        for name, least in whole.items():
            if getattr(self, name) < least:
                raise TrainingError(f"{name} is {getattr(self, name)}; it must be {least} or more")
        for name in ("learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainingError(f"{name} is {getattr(self, name)}; it must be 0 to 1")
        for name in ("review_false_positive_rate", "decline_precision"):
            if not 0 < getattr(self, name) < 1:
                raise TrainingError(
                    f"{name} is {getattr(self, name)}; it must be over 0 and under 1"
                )
        if self.device not in ("auto", "cpu", "cuda"):
            raise TrainingError(f"device is {self.device!r}; it must be auto, cpu or cuda")
        expected = 2 * self.customers * self.days
        if expected > TRANSACTIONS_MAX:
            raise TrainingError(
                f"{self.customers} customers over {self.days} days make about {expected:,} "
                f"transactions; at most {TRANSACTIONS_MAX:,} fit: lower customers or days"
            )
        try:
            self.architecture(inputs=1)
        except ValueError as error:
            raise TrainingError(str(error)) from error

    def architecture(self, inputs: int) -> Architecture:
        return Architecture(
            inputs=inputs,
            input_size=self.input_size,
            hidden_size=self.hidden_size,
            layers=self.layers,
            head_size=self.head_size,
            dropout=self.dropout,
        )


@dataclass(frozen=True)
class Split:
    """First day of each period; a period ends where the next begins.

    >>> Split.of(183)
    Split(training=14, validation=139, gap=146, held_out=153, end=183)
    >>> Split.of(30)
    Split(training=2, validation=23, gap=24, held_out=25, end=30)
    """

    training: int
    validation: int
    gap: int
    held_out: int
    end: int

    @classmethod
    def of(cls, days: int) -> Split:
        """14 days of warm-up, 7 validation, 7 gap, 30 held out; shorter under 183 days."""
        share = min(1.0, days / 183)
        held_out = days - max(1, round(30 * share))
        gap = held_out - max(1, round(7 * share))
        validation = gap - max(1, round(7 * share))
        return cls(round(14 * share), validation, gap, held_out, days)


@dataclass(frozen=True)
class Log:
    """Transactions in order of time: columns as in :class:`model.simulator.DayOfTransactions`."""

    day: NDArray[np.int64]
    timestamp_ms: NDArray[np.int64]
    account: NDArray[np.int64]
    merchant: NDArray[np.int64]
    amount: NDArray[np.float64]
    is_fraud: NDArray[np.bool_]
    scenario: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.day)

    def digest(self) -> str:
        """12 hex digits of the SHA-256 of all columns."""
        digest = hashlib.sha256()
        for field in dataclasses.fields(self):
            column: NDArray[np.generic] = getattr(self, field.name)
            digest.update(field.name.encode())
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Report:
    """How far the training is, for who watches.

    Attributes:
        stage: what is being done.
        done: share of the whole training, 0 to 1, in time.
        note: a figure worth reading, or nothing.
    """

    stage: str
    done: float
    note: str = ""


Reporter = Callable[[Report], None]

_PREPARED = 0.05  # share of the time before the first epoch, about
_FITTED = 0.97


def train(
    settings: TrainingSettings, output: Path, report: Reporter = lambda _: None
) -> Checkpoint:
    """Trains a network on simulated transactions and writes its checkpoint.

    The same settings give the same checkpoint on the same machine with the same number of
    threads.

    Args:
        settings: what to train, and on what.
        output: file to write; its folder is made if it does not exist.
        report: called often, from this thread; see :mod:`model.progress`.

    Raises:
        TrainingError: a setting or the output path is wrong, or the data hold too little fraud.
        model.simulator.SimulatorError: customers, terminals or start date are wrong.
        model.checkpoint.CheckpointError: the file cannot be written.
    """
    if output.is_dir():
        raise TrainingError(f"{output} is a directory; name a file, such as model.safetensors")
    device = _device(settings)
    split = Split.of(settings.days)
    report(Report("simulating transactions", 0.0))
    log = simulate(settings)
    _check_fraud(log, split)
    report(Report("computing features", 0.5 * _PREPARED, f"{len(log):,} transactions"))
    raw = observe_all(log, FeatureSpec())
    in_training = (log.day >= split.training) & (log.day < split.validation)
    spec = FeatureSpec().fitted(raw[in_training])
    inputs = torch.from_numpy(Encoder(spec).encode(raw)).to(device)
    with _seeded(settings.seed, device):
        network = Network(settings.architecture(inputs.shape[1])).to(device)
        fit(network, inputs, log, split, settings, report)
    report(Report("evaluating", _FITTED))
    network.eval()
    scores = score_unrolled(network, inputs, log.account)
    thresholds = choose_thresholds(log, scores, split, settings)
    checkpoint = Checkpoint(
        network.cpu(),
        Header(
            architecture=network.architecture,
            features=spec,
            thresholds=thresholds,
            metrics=measure(log, scores, split, thresholds),
            training=dataclasses.asdict(settings) | {"device": device.type},
            data_digest=log.digest(),
        ),
    )
    checkpoint.save(output)
    report(Report("done", 1.0))
    return checkpoint


def simulate(settings: TrainingSettings) -> Log:
    """The simulator's first days, whole."""
    simulator = Simulator(
        settings.customers, settings.terminals, settings.start_date, settings.seed
    )
    days: list[DayOfTransactions] = list(islice(simulator.days(), settings.days))
    return Log(
        day=np.repeat(np.arange(len(days)), [len(d) for d in days]),
        timestamp_ms=np.concatenate([d.timestamp_ms for d in days]),
        account=np.concatenate([d.account for d in days]),
        merchant=np.concatenate([d.merchant for d in days]),
        amount=np.concatenate([d.amount for d in days]),
        is_fraud=np.concatenate([d.is_fraud for d in days]),
        scenario=np.concatenate([d.scenario for d in days]),
    )


def observe_all(log: Log, spec: FeatureSpec) -> Float32:
    """Raw features [N, R] of a log whose labels all come after the spec's delay."""
    labels = Labels.delayed(log.is_fraud, log.timestamp_ms, spec.label_delay_ms)
    of_account = observe_log(log.account, log.amount, log.timestamp_ms)
    of_merchant = observe_merchant_log(log.merchant, log.timestamp_ms, labels, spec.label_delay_ms)
    return np.hstack((of_account, of_merchant))


def fit(
    network: Network,
    inputs: Tensor,
    log: Log,
    split: Split,
    settings: TrainingSettings,
    report: Reporter = lambda _: None,
) -> None:
    """Fits the network's parameters to the training days, in place.

    Truncated back-propagation through time: a batch of accounts runs through its history in
    chunks; the hidden goes on from chunk to chunk, the gradient does not.

    Args:
        inputs: [N, I] of the whole log, on the network's device.
    """
    seen = int(np.searchsorted(log.day, split.validation))  # training sees the log's first rows
    sequences = Sequences(log.account[:seen])
    in_order = torch.from_numpy(sequences.row).to(inputs.device)
    inputs = inputs[in_order]  # [seen, I], account by account
    labels = torch.from_numpy(log.is_fraud.astype(np.float32)).to(inputs.device)[in_order]
    scored = (log.day >= split.training)[sequences.row]
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    rng = np.random.default_rng(settings.seed)
    network.train()
    for epoch in range(settings.epochs):
        batches = _batches_of_accounts(sequences, settings.accounts_per_batch, rng)
        losses: list[float] = []
        for number, accounts in enumerate(batches):
            done = (epoch + number / len(batches)) / settings.epochs
            _set_learning_rate(optimizer, settings.learning_rate, done)
            hidden: Tensor | None = None
            for position, there in sequences.chunks(accounts, settings.chunk_steps):
                before = None if hidden is None else hidden[: len(position)].detach()
                where = torch.from_numpy(position).to(inputs.device)
                weight = torch.from_numpy(there & scored[position]).to(inputs.device)
                logits, hidden = network.unroll(inputs[where], before)  # [n, T]
                if not weight.any():
                    continue
                loss = F.binary_cross_entropy_with_logits(logits[weight], labels[where][weight])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_NORM_MAX)
                optimizer.step()
                losses.append(loss.item())
            report(
                Report(
                    f"epoch {epoch + 1} of {settings.epochs}",
                    _PREPARED + (_FITTED - _PREPARED) * done,
                    f"loss {np.mean(losses):.5f}" if losses else "",
                )
            )
        if not np.isfinite(losses).all():
            raise TrainingError(
                f"the loss is no longer finite in epoch {epoch + 1}; lower learning_rate "
                f"({settings.learning_rate})"
            )


def choose_thresholds(
    log: Log, scores: Float32, split: Split, settings: TrainingSettings
) -> Thresholds:
    """Thresholds on the validation days.

    Review: the lowest score at which at most ``review_false_positive_rate`` of the genuine
    transactions are reviewed or declined. Decline: the lowest score, no lower than review,
    from which on at least ``decline_precision`` is fraud; 1 where there is none.
    """
    rows = slice(*np.searchsorted(log.day, [split.validation, split.gap]))
    scored, is_fraud = scores[rows], log.is_fraud[rows]
    review = evaluation.threshold_at_false_positive_rate(
        scored, is_fraud, settings.review_false_positive_rate
    )
    decline = evaluation.threshold_at_precision(
        scored, is_fraud, settings.decline_precision, ALERTS_MIN
    )
    review = min(review, 1.0)
    return Thresholds(review=review, decline=max(review, min(decline, 1.0)))


def measure(log: Log, scores: Float32, split: Split, thresholds: Thresholds) -> dict[str, float]:
    """What the scores are worth on the held-out days; names in the order of reading.

    Cards whose fraud happened in the validation days count as known for card precision.
    """
    first_validation, first_gap, first = np.searchsorted(
        log.day, [split.validation, split.gap, split.held_out]
    )
    known = np.unique(
        log.account[first_validation:first_gap][log.is_fraud[first_validation:first_gap]]
    )
    held = slice(int(first), len(log))
    score, is_fraud, day = scores[held], log.is_fraud[held], log.day[held]
    reviewed = score >= thresholds.review
    declined = score >= thresholds.decline
    days = split.end - split.held_out
    metrics = {
        "held_out_days": float(days),
        "transactions": float(len(score)),
        "frauds": float(is_fraud.sum()),
        "average_precision": evaluation.average_precision(score, is_fraud),
        "auc_roc": evaluation.auc_roc(score, is_fraud),
        "card_precision_at_100": evaluation.card_precision_at(
            score, is_fraud, log.account[held], day, 100, known
        ),
        "precision_at_100": evaluation.precision_at(score, is_fraud, day, 100),
        "recall_at_fpr_0.001": evaluation.recall_at_false_positive_rate(score, is_fraud, 0.001),
        "recall_at_fpr_0.01": evaluation.recall_at_false_positive_rate(score, is_fraud, 0.01),
        "review_alerts_per_day": float(reviewed.sum() / days),
        "review_recall": float(reviewed[is_fraud].mean()),
        "review_false_positive_rate": float(reviewed[~is_fraud].mean()),
        "declines_per_day": float(declined.sum() / days),
        "decline_recall": float(declined[is_fraud].mean()),
    }
    if reviewed.any():
        metrics["review_precision"] = float(is_fraud[reviewed].mean())
    if declined.any():
        metrics["decline_precision"] = float(is_fraud[declined].mean())
    recalls = evaluation.recall_by_scenario(score, log.scenario[held], thresholds.review)
    return metrics | {f"review_recall_scenario_{s}": r for s, r in recalls.items()}


def _check_fraud(log: Log, split: Split) -> None:
    """Fraud and genuine transactions must be there in each period that is learned or measured."""
    periods = {
        "training": (split.training, split.validation),
        "validation": (split.validation, split.gap),
        "held-out": (split.held_out, split.end),
    }
    for name, (begin, end) in periods.items():
        is_fraud = log.is_fraud[slice(*np.searchsorted(log.day, [begin, end]))]
        if not is_fraud.any() or is_fraud.all():
            raise TrainingError(
                f"the {name} days {begin} to {end - 1} have {is_fraud.sum()} frauds among "
                f"{len(is_fraud)} transactions; raise days or customers"
            )


def _batches_of_accounts(
    sequences: Sequences, size: int, rng: np.random.Generator
) -> list[NDArray[np.intp]]:
    """All accounts, those of about the same length together, in random order."""
    jitter = rng.uniform(1 - LENGTH_JITTER, 1 + LENGTH_JITTER, len(sequences.length))
    by_length = np.argsort(sequences.length * jitter)
    batches = [by_length[i : i + size] for i in range(0, len(by_length), size)]
    rng.shuffle(batches)
    return batches


def _set_learning_rate(optimizer: torch.optim.Optimizer, highest: float, done: float) -> None:
    rising = min(1.0, (done + 1e-3) / RISE_SHARE)
    rate = highest * rising * 0.5 * (1 + math.cos(math.pi * done))
    for group in optimizer.param_groups:
        group["lr"] = rate


def _device(settings: TrainingSettings) -> torch.device:
    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:
        raise TrainingError("device is cuda, but PyTorch finds no GPU; use auto or cpu")
    return torch.device("cuda" if there and settings.device != "cpu" else "cpu")


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of initial weights and dropout; the caller's own stay as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
