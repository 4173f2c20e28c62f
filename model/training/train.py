"""Training: labelled transactions in, a calibrated checkpoint with its thresholds out.

    source -> dataset on disk, in order of time
           -> raw features on disk -> inputs chosen and fitted on the training period
           -> network fitted, the best epoch by the validation period
           -> calibration, thresholds and operating points on the validation period
           -> verdict head -> metrics on the held-out period -> save

Everything on disk lies in ``OUTPUT.resume/``, with the state of the fitting: a training that was
interrupted goes on there when the same command is given again, and gives the same checkpoint.
The folder is removed at the end.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from model import metrics as evaluation
from model.checkpoint import Amounts, Checkpoint, Header, Thresholds
from model.data.dataset import FRAUD, LEGITIMATE, Dataset, DatasetError, DatasetWriter, Rows
from model.features.account import DEFINITION, FeatureSpec, Float32, observe_log
from model.features.merchant import Labels, observe_merchant_log
from model.network import Network
from model.simulator.handbook import DayOfTransactions, Simulator
from model.simulator.world import WORLDS
from model.training.account_head import fit_verdict, is_compromised, states_of, verdict_scores
from model.training.calibration import fold, platt
from model.training.feature_table import EncodedInputs, restarted_inputs
from model.training.loop import RECIPE, Truth, device_of, fit
from model.training.preparation import Prepared, prepare
from model.training.resume import TrainingState
from model.training.sequences import Sequences, unrolled_logits
from model.training.settings import Report, Reporter, TrainingError, TrainingSettings
from model.training.split import Split

__all__ = [
    "DataSource",
    "Log",
    "Report",
    "Reporter",
    "SimulatedData",
    "Split",
    "TrainingError",
    "TrainingSettings",
    "choose_thresholds",
    "fit",
    "measure",
    "observe_all",
    "simulate",
    "train",
]

ALERTS_MIN = 20
"""A precision is measured on no fewer alerts."""

_READ, _PREPARED, _FITTED, _SCORED = 0.03, 0.08, 0.93, 0.97  # shares of the time, about
_RAW, _RESTARTED = "raw", "raw-restarted"
_STATE, _CLAIM = "state.safetensors", "recur.json"


class DataSource(Protocol):
    """Where labelled transactions come from."""

    def identity(self) -> str:
        """Differs whenever other transactions would be written."""
        ...

    def write(self, folder: Path, show: Callable[[float, str], None]) -> Dataset:
        """Writes them to an empty folder; calls ``show`` with the share done and a note."""
        ...

    def settings(self, settings: TrainingSettings) -> dict[str, Any]:
        """What of the settings decides the checkpoint."""
        ...


class SimulatedData:
    """The simulator's first days, whole."""

    def __init__(self, settings: TrainingSettings) -> None:
        self._settings = settings
        self._simulator = simulator_of(settings)

    def identity(self) -> str:
        s = self._settings
        return f"simulated {s.world} {s.customers} {s.terminals} {s.days} {s.start_date} {s.seed}"

    def write(self, folder: Path, show: Callable[[float, str], None]) -> Dataset:
        with DatasetWriter(folder) as writer:
            for day in islice(self._simulator.days(), self._settings.days):
                writer.append(_rows(day))
                show(day.day / self._settings.days, "")
            return writer.finish("EUR")

    def settings(self, settings: TrainingSettings) -> dict[str, Any]:
        return dataclasses.asdict(settings)


def simulator_of(settings: TrainingSettings) -> Simulator:
    """The simulator that the settings describe."""
    s = settings
    return Simulator(s.customers, s.terminals, s.start_date, s.seed, WORLDS[s.world])


def _rows(day: DayOfTransactions) -> Rows:
    return Rows(
        account=day.account.astype(np.uint64),
        merchant=day.merchant.astype(np.uint64),
        amount=day.amount,
        timestamp_ms=day.timestamp_ms,
        label=np.where(day.is_fraud, FRAUD, LEGITIMATE).astype(np.int8),
        scenario=day.scenario,
        key=day.transaction_id.astype(np.uint64),
    )


@dataclass(frozen=True)
class Log:
    """Transactions in order of time, in memory: columns as in :class:`Dataset`."""

    day: NDArray[np.int64]
    timestamp_ms: NDArray[np.int64]
    account: NDArray[np.int64]
    merchant: NDArray[np.int64]
    amount: NDArray[np.float64]
    is_fraud: NDArray[np.bool_]
    scenario: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.day)

    @property
    def is_labelled(self) -> NDArray[np.bool_]:
        """[N]: all are."""
        return np.ones(len(self), np.bool_)


def simulate(settings: TrainingSettings) -> Log:
    """The simulator's first days, whole, in memory."""
    days: list[DayOfTransactions] = list(islice(simulator_of(settings).days(), settings.days))
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
    of_account = observe_log(log.account, log.amount, log.timestamp_ms, spec.scale)
    of_merchant = observe_merchant_log(log.merchant, log.timestamp_ms, labels, spec.label_delay_ms)
    return np.hstack((of_account, of_merchant))


def train(
    settings: TrainingSettings,
    output: Path,
    report: Reporter = lambda _: None,
    source: DataSource | None = None,
) -> Checkpoint:
    """Trains a network and writes its checkpoint.

    The same settings and data give the same checkpoint on the same kind of machine, whether the
    training was interrupted or not.

    Args:
        settings: what to train.
        output: file to write; its folder is made if it does not exist. Beside it
            ``OUTPUT.resume/`` is written and removed.
        report: called often, from this thread; see :mod:`pipeline.progress`.
        source: the transactions; the simulator's, if there is none.

    Raises:
        TrainingError: a setting or the output path is wrong, or the data cannot be trained on.
        model.simulator.handbook.SimulatorError: customers, terminals or start date are wrong.
        model.checkpoint.CheckpointError: the file cannot be written.
    """
    if output.is_dir():
        raise TrainingError(f"{output} is a directory; name a file, such as model.safetensors")
    device = device_of(settings)
    source = source or SimulatedData(settings)
    decisive = source.settings(settings)
    identity = f"{source.identity()}\n{decisive}\n{device.type}\n{DEFINITION}\n{RECIPE}"
    try:
        with _work_folder(output, identity) as folder:
            try:
                checkpoint = _Training(settings, source, folder, device, report).run(decisive)
                checkpoint.save(output)
            except Exception:
                if not (folder / _STATE).is_file():  # nothing in there is worth going on with
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            shutil.rmtree(folder, ignore_errors=True)
            report(Report("done", 1.0))
            return checkpoint
    except DatasetError as error:
        raise TrainingError(str(error)) from error


class _Training:
    """The steps of one training; each leaves in the folder what the next needs."""

    def __init__(
        self,
        settings: TrainingSettings,
        source: DataSource,
        folder: Path,
        device: torch.device,
        report: Reporter,
    ) -> None:
        self._settings = settings
        self._source = source
        self._folder = folder
        self._device = device
        self._report = report

    def run(self, decisive: dict[str, Any]) -> Checkpoint:
        settings = self._settings
        self._report(Report("reading transactions", 0.0))
        dataset = self._dataset()
        days = int(dataset.day[-1]) + 1
        split = Split.chosen(settings, int(dataset.timestamp_ms[0]), days)
        _check_fraud(dataset, split)
        sequences = Sequences(dataset.account)
        prepared = self._prepared(dataset, sequences, split)
        spec = prepared.spec
        inputs = EncodedInputs(prepared.raw, spec, self._device)
        with _seeded(settings.seed, self._device):
            network = Network(settings.architecture(spec))
        network.own.load_state_dict(prepared.own.state_dict())
        network = network.to(self._device)
        fit(
            network,
            inputs,
            dataset,
            split,
            settings,
            self._between(_PREPARED, _FITTED),
            sequences=sequences,
            restarted=restarted_inputs(
                dataset,
                sequences,
                inputs,
                int(np.searchsorted(dataset.day, split.validation)),
                self._folder / _RESTARTED,
                settings.seed,
                self._show_restarting,
            ),
            validate=_validation(dataset, split, sequences, inputs),
            state=TrainingState(self._folder / _STATE),
        )
        self._report(Report("evaluating", _FITTED))
        network.eval()
        logits = unrolled_logits(network, inputs, sequences)
        validation = _labelled(dataset, split.validation, split.gap)
        scale, shift = platt(logits[validation], dataset.is_fraud[validation])
        fold(network, scale, shift)
        scores = _sigmoid(scale * logits + shift)
        thresholds = choose_thresholds(dataset, scores, split, settings)
        self._report(Report("fitting the verdict on accounts", _SCORED))
        metrics = measure(dataset, scores, split, thresholds)
        metrics |= _verdict(network, inputs, dataset, sequences, split)
        return Checkpoint(
            network.cpu(),
            Header(
                architecture=network.architecture,
                features=spec,
                currency=dataset.currency,
                thresholds=thresholds,
                metrics=metrics,
                training=decisive | {"device": self._device.type, "recipe": RECIPE},
                data_digest=dataset.digest(),
                amounts=_amounts(prepared, sequences),
                **_operating_points(dataset, scores, split),
            ),
        )

    def _dataset(self) -> Dataset:
        folder = self._folder / "data"
        if folder.is_dir():
            return Dataset.open(folder)
        partial = self._folder / "data.partial"
        if partial.is_dir():
            shutil.rmtree(partial)

        notes = [""]

        def show(done: float, note: str) -> None:
            notes[0] = note
            self._report(Report("reading transactions", done * _READ, note))

        written = self._source.write(partial, show)
        partial.rename(folder)
        if written.unsorted:
            notes.append(f"{written.unsorted:,} were not in order of time: sorted")
        if written.repeated:
            notes.append(f"{written.repeated:,} rows were repeats: dropped")
        self._keep_in_sight(_READ, ", ".join(note for note in notes if note))
        return Dataset.open(folder)

    def _prepared(self, dataset: Dataset, sequences: Sequences, split: Split) -> Prepared:
        """Raw features of the whole dataset; inputs and own risk of the training period."""

        def show(share: float, note: str) -> None:
            done = _READ + share * (_PREPARED - _READ) * 0.7
            self._report(Report("computing features", done, note))

        prepared = prepare(
            dataset,
            sequences,
            _labelled(dataset, split.training, split.validation),
            self._settings.label_delay_days,
            self._folder / _RAW,
            self._settings.seed,
            show,
        )
        for said in sorted(set(prepared.left_out.values())):
            names = ", ".join(name for name, why in prepared.left_out.items() if why == said)
            self._keep_in_sight(_READ, f"not used, since they say {said}: {names}")
        return prepared

    def _show_restarting(self, done: float) -> None:
        self._report(Report("computing features of new accounts", _PREPARED, f"{done:.0%} done"))

    def _keep_in_sight(self, done: float, note: str) -> None:
        if note:
            self._report(Report("reading transactions", done, note, lasting=True))

    def _between(self, begin: float, end: float) -> Reporter:
        def scaled(report: Report) -> None:
            done = begin + (end - begin) * report.done
            self._report(Report(report.stage, done, report.note))

        return scaled


def _validation(
    dataset: Dataset, split: Split, sequences: Sequences, inputs: EncodedInputs
) -> Callable[[Network], float]:
    """Average precision on the validation period."""
    until = sequences.before(int(np.searchsorted(dataset.day, split.gap)))
    rows = _labelled(dataset, split.validation, split.gap)
    is_fraud = dataset.is_fraud[rows]

    def validate(network: Network) -> float:
        logits = unrolled_logits(network, inputs, until)[rows]
        return evaluation.average_precision(logits, is_fraud)

    return validate


def _amounts(prepared: Prepared, sequences: Sequences) -> Amounts:
    """How amounts spread over the training period."""
    place = np.empty(len(sequences.row), np.intp)
    place[sequences.row] = np.arange(len(place))
    sample = prepared.raw[place[prepared.sample]]
    column = {name: sample[:, i] for i, name in enumerate(prepared.spec.names)}
    return Amounts.of(column["amount"], column["amount_to_usual"])


def _verdict(
    network: Network,
    inputs: EncodedInputs,
    dataset: Dataset,
    sequences: Sequences,
    split: Split,
) -> dict[str, float]:
    """Fits the head that says whether an account is compromised now, and measures it."""
    states = states_of(network, inputs, sequences)
    compromised = is_compromised(dataset, sequences)[states.row]
    day = dataset.day[states.row]
    fitted = np.flatnonzero((day >= split.training) & (day < split.gap))
    fit_verdict(network, states.taken(fitted), compromised[fitted])
    held = np.flatnonzero(day >= split.held_out)
    truth = compromised[held]
    if not truth.any() or truth.all():
        return {}
    scores = verdict_scores(network, states.taken(held))
    return {
        "verdict_auc": evaluation.auc_roc(scores, truth),
        "verdict_ap": evaluation.average_precision(scores, truth),
    }


def _operating_points(dataset: Dataset, scores: Float32, split: Split) -> dict[str, Any]:
    """What thresholds are worth on the validation period, for the header."""
    rows = _labelled(dataset, split.validation, split.gap)
    is_fraud, amount = dataset.is_fraud[rows], np.asarray(dataset.amount[rows])
    days = split.gap - split.validation
    return {
        "operating_points": evaluation.operating_points(scores[rows], is_fraud, amount, days),
        "validation": {
            "days": float(days),
            "transactions": float(len(rows)),
            "frauds": float(is_fraud.sum()),
            "fraud_amount_per_day": float(amount[is_fraud].sum() / days),
            "legitimate_amount_per_day": float(amount[~is_fraud].sum() / days),
        },
    }


def choose_thresholds(
    log: Truth, scores: Float32, split: Split, settings: TrainingSettings
) -> Thresholds:
    """Thresholds on the validation days.

    Review: the lowest score at which at most ``review_false_positive_rate`` of the legitimate
    transactions are reviewed or declined. Decline: the lowest score, no lower than review,
    from which on at least ``decline_precision`` is fraud; 1 where there is none.
    """
    rows = _labelled(log, split.validation, split.gap)
    scored, is_fraud = scores[rows], log.is_fraud[rows]
    review = evaluation.threshold_at_false_positive_rate(
        scored, is_fraud, settings.review_false_positive_rate
    )
    decline = evaluation.threshold_at_precision(
        scored, is_fraud, settings.decline_precision, ALERTS_MIN
    )
    review = min(review, 1.0)
    return Thresholds(review=review, decline=max(review, min(decline, 1.0)))


def measure(
    log: Dataset | Log, scores: Float32, split: Split, thresholds: Thresholds
) -> dict[str, float]:
    """What the scores are worth on the held-out days; names in the order of reading.

    Cards whose fraud happened in the validation days count as known for card precision.
    Transactions without a label do not count.
    """
    validated = _labelled(log, split.validation, split.gap)
    known = np.unique(log.account[validated][log.is_fraud[validated]]).astype(np.int64)
    held = _labelled(log, split.held_out, split.end)
    score, is_fraud, day = scores[held], log.is_fraud[held], log.day[held]
    reviewed = score >= thresholds.review
    declined = score >= thresholds.decline
    days = split.end - split.held_out
    account = log.account[held].astype(np.int64)
    metrics = {
        "held_out_days": float(days),
        "transactions": float(len(score)),
        "frauds": float(is_fraud.sum()),
        "average_precision": evaluation.average_precision(score, is_fraud),
        "auc_roc": evaluation.auc_roc(score, is_fraud),
        "card_precision_at_100": evaluation.card_precision_at(
            score, is_fraud, account, day, 100, known
        ),
        "precision_at_100": evaluation.precision_at(score, is_fraud, day, 100),
        "recall_at_fpr_0.001": evaluation.recall_at_false_positive_rate(score, is_fraud, 0.001),
        "recall_at_fpr_0.01": evaluation.recall_at_false_positive_rate(score, is_fraud, 0.01),
        "calibration_error": evaluation.expected_calibration_error(score, is_fraud),
        "brier_score": evaluation.brier_score(score, is_fraud),
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


def _labelled(log: Truth, begin: int, end: int) -> NDArray[np.intp]:
    """Rows of days begin up to end whose label is known."""
    first, last = np.searchsorted(log.day, [begin, end])
    return np.asarray(np.flatnonzero(log.is_labelled[first:last]) + first)


def _sigmoid(logits: Float32) -> Float32:
    return torch.sigmoid(torch.from_numpy(logits)).numpy()


def _check_fraud(dataset: Dataset, split: Split) -> None:
    """Refuse a period, learned or measured, without fraud or without legitimate transactions."""
    if not dataset.is_labelled.any():
        raise TrainingError("no transaction has a label: nothing can be learned from them")
    labels = set(np.unique(dataset.label).tolist()) & {FRAUD, LEGITIMATE}
    if len(labels) == 1:
        which = "fraud" if FRAUD in labels else "legitimate"
        raise TrainingError(
            f"all labels say {which}: both classes are needed; look at the label's column"
        )
    periods = {
        "training": (split.training, split.validation),
        "validation": (split.validation, split.gap),
        "held-out": (split.held_out, split.end),
    }
    for name, (begin, end) in periods.items():
        is_fraud = dataset.is_fraud[_labelled(dataset, begin, end)]
        if not is_fraud.any() or is_fraud.all():
            raise TrainingError(
                f"the {name} days {begin} to {end - 1} have {is_fraud.sum()} frauds among "
                f"{len(is_fraud)} labelled transactions; both classes are needed: raise days or "
                "customers, or set train_until and test_from so that each period has some"
            )


class _Claim(msgspec.Struct, frozen=True):
    recur_training: str
    """Digest of all that decides the checkpoint."""


@contextmanager
def _work_folder(output: Path, identity: str) -> Iterator[Path]:
    """``OUTPUT.resume/``, empty or with what a training of the same identity left there.

    Raises:
        TrainingError: it cannot be written, is somebody else's, or in use.
    """
    folder = output.with_name(output.name + ".resume")
    claim = _Claim(hashlib.sha256(identity.encode()).hexdigest())
    try:
        found = _claim_of(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise TrainingError(
                    f"another training is writing {output}: wait for it, or name another file"
                ) from error
            if found != claim:
                for path in folder.iterdir():
                    if path.name != "lock":
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                (folder / _CLAIM).write_bytes(msgspec.json.encode(claim))
            yield folder
    except OSError as error:
        raise TrainingError(
            f"cannot write in {folder}: {error.strerror or error}; name a file elsewhere"
        ) from error


def _claim_of(folder: Path) -> _Claim | None:
    if not folder.exists():
        return None
    try:
        return msgspec.json.decode((folder / _CLAIM).read_bytes(), type=_Claim)
    except (OSError, msgspec.DecodeError) as error:
        if folder.is_dir() and set(p.name for p in folder.iterdir()) <= {"lock"}:
            return None
        raise TrainingError(
            f"{folder} is there and was not made by a training: move it away"
        ) from error


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of initial weights; the caller's own stay as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
