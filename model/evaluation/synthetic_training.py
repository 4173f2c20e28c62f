"""Train on synthetic, test on real: the default training on generated and on real histories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from model.data.dataset import MISSING, Dataset, DatasetWriter, Rows
from model.evaluation.candidates import Material, score_given
from model.evaluation.protocol import split_fold
from model.metrics import average_precision
from model.training.settings import Report, TrainingSettings
from model.training.train import train

_CHUNK_ROWS = 65_536


class MemoryData:
    """A data set in memory as a :class:`model.training.source.DataSource`."""

    def __init__(self, log: Dataset) -> None:
        self._log = log

    def identity(self) -> str:
        """Identify the transactions by their digest."""
        return self._log.digest()

    def settings(self, settings: TrainingSettings) -> dict[str, Any]:
        """Return all settings."""
        return asdict(settings)

    def write(self, folder: Path, show: Callable[[float, str], None]) -> Dataset:
        """Write the transactions to an empty folder."""
        log = self._log
        with DatasetWriter(folder, list(log.numeric), list(log.categorical)) as writer:
            for begin in range(0, len(log), _CHUNK_ROWS):
                rows = slice(begin, begin + _CHUNK_ROWS)
                writer.append(
                    Rows(
                        account=log.account[rows].astype(np.uint64),
                        merchant=log.merchant[rows].astype(np.uint64),
                        amount=np.asarray(log.amount[rows]),
                        timestamp_ms=log.timestamp_ms[rows],
                        label=log.label[rows],
                        scenario=log.scenario[rows],
                        numeric={n: np.asarray(v[rows], float) for n, v in log.numeric.items()},
                        categorical={
                            name: [
                                None if code == MISSING else log.texts[name][code]
                                for code in codes[rows].tolist()
                            ]
                            for name, codes in log.categorical.items()
                        },
                        key=np.arange(begin, min(begin + _CHUNK_ROWS, len(log)), dtype=np.uint64),
                    )
                )
                show(min(begin + _CHUNK_ROWS, len(log)) / len(log), "")
            return writer.finish(log.currency)


def average_precision_on(
    trained_on: Dataset,
    tested_on: Dataset,
    settings: TrainingSettings,
    work: Path,
    show: Callable[[float, str], None] = lambda share, note: None,
) -> float:
    """Train by the recipe of `recur train`; return the average precision on other accounts.

    Args:
        trained_on: all its days are for training, validation and measures.
        tested_on: real accounts; the later half of their days is scored.
        settings: the settings of the training.
        work: an empty folder, or as an interrupted call left it; the caller removes it.
        show: called with the share done and a note.

    Raises:
        model.training.settings.TrainingError: the data cannot be trained on.
        model.evaluation.protocol.ProtocolError: the tested days lack one class.
    """

    def report(found: Report) -> None:
        show(0.9 * found.done, found.note)

    checkpoint = train(settings, work / "model.safetensors", report, MemoryData(trained_on))
    fold = split_fold(tested_on)
    result = score_given(checkpoint, Material(tested_on, work), fold)
    rows = fold.tested_rows(tested_on)
    show(1.0, "")
    return float(average_precision(result.scores[rows], tested_on.is_fraud[rows]))
