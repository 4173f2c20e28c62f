"""The cache of trained and measured networks, by everything that decides them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import msgspec
import numpy as np

from model.checkpoint import Checkpoint, CheckpointError
from model.features.account import Float32
from model.training.resume import TrainingState
from model.whole_file import whole_file

CACHE_FORMAT = 5
"""Version of the files. A file of another version is ignored."""

_UNUSABLE = (
    *(ValueError, KeyError, OSError, zipfile.BadZipFile),
    *(msgspec.DecodeError, CheckpointError),
)


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One network trained once on one fold, with its metrics.

    Attributes:
        network: a name of :data:`model.evaluation.comparison.TITLES`.
        fold: name of the fold.
        seed: seed of the training.
        seconds: time of the training; 0 if nothing was trained.
        parameters: number of trained parameters; for trees their splits and leaves.
        microseconds: time of the network for a transaction in a batch on one core.
        metrics: see :func:`model.evaluation.comparison.measure`.
        recall_by_scenario: recall at few false positives, by number of the scenario.
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
    """Folder of runs with their scores and, for a GRU, its checkpoint.

    Args:
        folder: made at the first write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> tuple[Run, Float32, Checkpoint | None] | None:
        """Return the run under the key; None if it is missing, incomplete or of another version."""
        path = self._folder / f"{key}.npz"
        try:
            # Opened here, because np.load does not close a truncated file.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
                run = msgspec.json.decode(kept["run"].tobytes(), type=Run)
                scores = kept["scores"]
            weights = self._folder / f"{key}.safetensors"
            checkpoint = Checkpoint.load(weights) if weights.exists() else None
        except FileNotFoundError:
            return None
        except _UNUSABLE:  # truncated by a full disk, or of another version: train again
            path.unlink(missing_ok=True)
            return None
        return run, scores, checkpoint

    def state(self, key: str) -> TrainingState:
        """Return the file with the progress of an interrupted training."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return TrainingState(self._folder / f"{key}.state")

    def put(self, key: str, run: Run, scores: Float32, checkpoint: Checkpoint | None) -> None:
        """Keep a run; the scores are written last, completely or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if checkpoint is not None:
            checkpoint.save(self._folder / f"{key}.safetensors")
        text = np.frombuffer(msgspec.json.encode(run), np.uint8)
        with whole_file(self._folder / f"{key}.npz") as partial, partial.open("wb") as file:
            np.savez_compressed(file, run=text, scores=scores)
        (self._folder / f"{key}.state").unlink(missing_ok=True)
