"""`recur evaluate`: reads the transactions, compares networks, prints and writes what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from model.card import model_card
from model.checkpoint import Checkpoint, CheckpointError
from model.comparison import (
    NETWORKS,
    REFERENCE,
    Comparer,
    Comparison,
    ComparisonError,
    ComparisonSettings,
)
from model.labelled_log import LabelledLog, simulated_log
from model.plots import plot_calibration, plot_precision_recall, require_matplotlib
from model.progress import TrainingProgress
from model.protocol import HANDBOOK_START, ProtocolError, ProtocolName, handbook_folds, split_fold
from model.reference import MissingRequirementError, lightgbm
from model.results import Results, results_of, table
from model.robustness import Robustness, measure_robustness
from model.simulator import SimulatorError
from model.training import Report, Reporter, TrainingError, TrainingSettings
from pipeline.column_mapping import load_mapping
from pipeline.errors import RecurError, SettingsError
from pipeline.transaction_files import LABEL_UNKNOWN, TransactionFile

TABLE_COLUMNS = 132
"""Width of the table where stdout is not a terminal, characters."""

_READ_SHARE = 0.04  # of the time, about
_COMPARED_SHARE = 0.93


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What `recur evaluate` was asked for; see its help."""

    output: Path
    file: Path | None = None
    columns: str | None = None
    protocol: ProtocolName = "split"
    train_until: str | None = None
    test_from: str | None = None
    test_until: str | None = None
    fold_start: str = HANDBOOK_START
    label_delay_days: int = 7
    networks: tuple[str, ...] = NETWORKS
    seeds: int = 1
    checkpoint: Path | None = None
    plots: bool = True
    robustness: bool = True
    simulated: dict[str, int] = field(default_factory=dict)
    """customers, terminals and days where no file is given."""
    training: dict[str, Any] = field(default_factory=dict)
    """Of :class:`model.training.TrainingSettings`, where other than its defaults."""


def run_evaluate(options: EvaluateOptions, console: Console | None = None) -> Results:
    """Compares, prints the table, writes results.json, model_card.md and the plots.

    What was trained stays in the output folder, in ``runs``; the same command goes on there.

    Raises:
        RecurError: anything that the person who called it can put right.
    """
    try:
        with TrainingProgress(command="evaluate") as progress:
            results = _evaluate(options, progress.report)
    except (
        CheckpointError,
        ComparisonError,
        MissingRequirementError,
        ProtocolError,
        SimulatorError,
        TrainingError,
    ) as error:
        raise RecurError(str(error)) from error
    print_results(results, console)
    return results


def _evaluate(options: EvaluateOptions, report: Reporter) -> Results:
    _check_requirements(options)
    settings = ComparisonSettings(
        options.networks,
        options.seeds,
        options.label_delay_days,
        TrainingSettings(**options.training),
    )
    given = None if options.checkpoint is None else Checkpoint.load(options.checkpoint)
    _make_folder(options.output)
    log = read_log(options, lambda share, note: report(Report("reading", share, note)))
    if options.protocol == "handbook":
        folds = handbook_folds(log, options.fold_start)
    else:
        folds = [
            split_fold(
                log,
                options.train_until,
                options.test_from,
                options.test_until,
                options.label_delay_days,
            )
        ]
    comparer = Comparer(log, settings, options.output / "runs", given)
    comparison = comparer.compare(
        options.protocol, folds, _within(report, _READ_SHARE, _COMPARED_SHARE)
    )
    robustness = None
    if options.robustness and options.protocol == "split":
        robustness = _robustness(comparer, comparison, log, report)
    source = "simulated transactions" if options.file is None else options.file.name
    results = results_of(comparison, log, settings, source, robustness)
    _write(options, results, comparison, log)
    return results


def read_log(
    options: EvaluateOptions, show: Callable[[float, str], None] = lambda share, note: None
) -> LabelledLog:
    """The transactions of the file, or simulated ones.

    Raises:
        RecurError: the file cannot be read, or has no labels.
    """
    if options.file is None:
        show(0.0, "simulating")
        return simulated_log(**options.simulated)
    if options.columns is None:
        raise SettingsError(
            "recur evaluate FILE needs --columns; `recur replay --example-columns` prints a "
            "column mapping to start from"
        )
    file = TransactionFile(options.file, load_mapping(options.columns))
    columns: list[list[Any]] = [[], [], [], [], [], []]
    codes: tuple[dict[str, int], dict[str, int]] = {}, {}
    kinds: dict[str, int] = {}
    for part in file.parts():
        if part.labels is None:
            raise RecurError(
                f"{options.columns} names no label: a comparison needs the truth; write the "
                "column that has it as label under [columns]"
            )
        show(_READ_SHARE * file.fraction_read, f"{int(part.rows[-1]):,} rows")
        columns[0].append(part.timestamps_ms)
        for names, code, into in zip(
            (part.account_ids, part.merchant_ids), codes, columns[1:3], strict=True
        ):
            into.append([code.setdefault(name, len(code)) for name in names])
        columns[3].append(part.amounts)
        columns[4].append(part.labels == 1)
        columns[5].append(_scenarios(part.scenarios, part.labels, kinds))
        if (part.labels == LABEL_UNKNOWN).all():
            show(_READ_SHARE * file.fraction_read, "rows without a label count as genuine")
    if not columns[0]:
        raise RecurError(f"{options.file} has no transactions")
    return LabelledLog(
        np.concatenate(columns[0]),
        np.concatenate([np.array(c, np.int64) for c in columns[1]]),
        np.concatenate([np.array(c, np.int64) for c in columns[2]]),
        np.concatenate([np.array(c, np.float64) for c in columns[3]]),
        np.concatenate(columns[4]),
        np.concatenate(columns[5]),
    )
