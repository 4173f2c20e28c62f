"""What was trained and measured, kept in a folder by what decided it."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import msgspec
import numpy as np

from model.checkpoint import Checkpoint, CheckpointError
from model.features.account import Float32
from model.training.resume import TrainingState

CACHE_FORMAT = 4
"""Version of the files; another one counts as not there."""

_UNUSABLE = (
    *(ValueError, KeyError, OSError, zipfile.BadZipFile),
    *(msgspec.DecodeError, CheckpointError),
)


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One network trained once on one fold, and what its scores are worth.

    Attributes:
        network: a name of :data:`model.evaluation.comparison.TITLES`.
        fold: of the protocol.
        seconds: of training; 0 where nothing was trained.
        parameters: trained numbers; of trees their splits and leaves.
        microseconds: for a transaction in a batch on one core, of the network alone; 0 where
            it was not timed.
        metrics: see :func:`model.evaluation.comparison.measure`.
        recall_by_scenario: at a threshold of few false positives, by the scenario's number.
        account_head: the same measures of the account head; only of a GRU.
    """

    network: str
    fold: str
    seed: int
    seconds: float
    parameters: int
    microseconds: float
    metrics: dict[str, float]
    recall_by_scenario: dict[int, float] = {}
    account_head: dict[str, float] = {}


class RunCache:
    """Runs with their scores and, of a GRU, its checkpoint.

    Args:
        folder: made when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> tuple[Run, Float32, Checkpoint | None] | None:
        """What was kept under the key; none if it is not there whole, or of another version."""
        path = self._folder / f"{key}.npz"
        try:
            # The file is opened here: of one that is cut off np.load forgets to close it.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
                run = msgspec.json.decode(kept["run"].tobytes(), type=Run)
                scores = kept["scores"]
            weights = self._folder / f"{key}.safetensors"
            checkpoint = Checkpoint.load(weights) if weights.exists() else None
        except FileNotFoundError:
            return None
        except _UNUSABLE:  # cut off by a full disk, or of another version: made again
            path.unlink(missing_ok=True)
            return None
        return run, scores, checkpoint

    def state(self, key: str) -> TrainingState:
        """Where a training that is interrupted leaves how far it is."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return TrainingState(self._folder / f"{key}.state")

    def put(self, key: str, run: Run, scores: Float32, checkpoint: Checkpoint | None) -> None:
        """Keeps a run; its scores are written last, and whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if checkpoint is not None:
            checkpoint.save(self._folder / f"{key}.safetensors")
        partial = self._folder / f".{key}.{os.getpid()}.partial"
        try:
            with partial.open("wb") as file:
                text = np.frombuffer(msgspec.json.encode(run), np.uint8)
                np.savez_compressed(file, run=text, scores=scores)
            partial.replace(self._folder / f"{key}.npz")
        finally:
            partial.unlink(missing_ok=True)
        (self._folder / f"{key}.state").unlink(missing_ok=True)
