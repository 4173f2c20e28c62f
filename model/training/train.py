"""Training: labelled transactions in, a checkpoint file out.

    source -> data set on disk, in order of time
           -> the training recipe (model.training.recipe) -> checkpoint file

The data set, the raw features and the state of the fitting lie in ``OUTPUT.resume/``. If a training
was interrupted, the same command continues it and gives the same checkpoint. The folder is removed
at the end.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.checkpoint import Checkpoint
from model.data.dataset import FRAUD, LEGITIMATE, Dataset, DatasetError
from model.features.account import DEFINITION
from model.features.spec import FeatureSpec
from model.training.loop import RECIPE, device_of
from model.training.period_metrics import labelled_rows
from model.training.recipe import TrainingData, fit_network, make_checkpoint, prepare_training
from model.training.resume import TrainingState
from model.training.sequences import Sequences
from model.training.settings import Report, Reporter, TrainingError, TrainingSettings
from model.training.source import DataSource, SimulatedData
from model.training.split import Split
from model.training.work_folder import open_work_folder

_READ, _PREPARED, _FITTED, _SCORED = 0.03, 0.06, 0.68, 0.70  # approximate shares of the time
_RAW, _RESTARTED = "raw", "raw-restarted"
_STATE = "state.safetensors"


def train(
    settings: TrainingSettings,
    output: Path,
    report: Reporter = lambda _: None,
    source: DataSource | None = None,
) -> Checkpoint:
    """Train a network and write its checkpoint.

    The same settings and data give the same checkpoint on the same kind of machine, even if the
    training was interrupted.

    Args:
        settings: the settings of the training.
        output: file to write; a missing folder is made. ``OUTPUT.resume/`` is written beside it
            and removed at the end.
        report: called often, from this thread; see :mod:`pipeline.progress`.
        source: the transactions. None: those of the simulator.

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
    structure = settings.architecture(FeatureSpec())  # a state of another one cannot be loaded
    identity = (
        f"{source.identity()}\n{decisive}\n{device.type}\n{DEFINITION}\n{RECIPE}\n{structure}"
    )
    try:
        with open_work_folder(output, identity) as folder:
            try:
                checkpoint = _Training(settings, source, folder, device, report).run(decisive)
                checkpoint.save(output)
            except Exception:
                if not (folder / _STATE).is_file():  # nothing worth resuming
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            shutil.rmtree(folder, ignore_errors=True)
            report(Report("done", 1.0))
            return checkpoint
    except DatasetError as error:
        raise TrainingError(str(error)) from error


class _Training:
    """The steps of one training; each leaves in the folder what the next one needs."""

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
        """Train; ``decisive`` are the settings that the header records."""
        self._report(Report("reading transactions", 0.0))
        data = self._prepared(self._dataset())
        fitted = fit_network(
            data,
            self._settings,
            self._folder / _RESTARTED,
            report=self._between(_PREPARED, _FITTED),
            state=TrainingState(self._folder / _STATE),
        )
        self._report(Report("fitting the account head", _SCORED))
        training = decisive | {"device": self._device.type, "recipe": RECIPE}

        def show(share: float) -> None:
            done = _SCORED + share * (1.0 - _SCORED)
            self._report(Report("fitting the forecast head", done, f"{share:.0%} done"))

        return make_checkpoint(fitted, data, self._settings, training, show)[0]

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
        self._report_lasting(_READ, ", ".join(note for note in notes if note))
        return Dataset.open(folder)

    def _prepared(self, dataset: Dataset) -> TrainingData:
        """Split the data set and prepare its inputs."""

        def show(share: float, note: str) -> None:
            done = _READ + share * (_PREPARED - _READ) * 0.7
            self._report(Report("computing features", done, note))

        days = int(dataset.day[-1]) + 1
        split = Split.chosen(self._settings, int(dataset.timestamp_ms[0]), days)
        _check_fraud(dataset, split)
        sequences = Sequences(dataset.account)
        data = prepare_training(
            dataset, sequences, split, self._settings, self._folder / _RAW, show
        )
        left_out = data.prepared.left_out
        for reason in sorted(set(left_out.values())):
            names = ", ".join(name for name, found in left_out.items() if found == reason)
            self._report_lasting(_READ, f"fields not used because {reason}: {names}")
        return data

    def _report_lasting(self, done: float, note: str) -> None:
        if note:
            self._report(Report("reading transactions", done, note, lasting=True))

    def _between(self, begin: float, end: float) -> Reporter:
        def scaled(report: Report) -> None:
            done = begin + (end - begin) * report.done
            self._report(Report(report.stage, done, report.note))

        return scaled


def _check_fraud(dataset: Dataset, split: Split) -> None:
    """Reject periods that lack fraud or legitimate transactions."""
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
        is_fraud = dataset.is_fraud[labelled_rows(dataset, begin, end)]
        if not is_fraud.any() or is_fraud.all():
            raise TrainingError(
                f"the {name} days {begin} to {end - 1} have {is_fraud.sum()} frauds among "
                f"{len(is_fraud)} labelled transactions; both classes are needed: raise days or "
                "customers, or set train_until and test_from so that each period has some"
            )
