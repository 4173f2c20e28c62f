"""The command `recur evaluate`: read transactions, compare networks, print and write results."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from model.checkpoint import Checkpoint, CheckpointError
from model.data.dataset import Dataset, DatasetError
from model.evaluation.card import model_card
from model.evaluation.comparison import (
    DESCRIBED,
    GIVEN,
    NETWORKS,
    RECALL_FALSE_POSITIVE_RATE,
    REFERENCE,
    Comparer,
    Comparison,
    ComparisonError,
    ComparisonSettings,
)
from model.evaluation.forecast_report import (
    ForecastResults,
    compare_forecasts,
    following_table,
    forecast_table,
)
from model.evaluation.lightgbm_reference import TREES, MissingRequirementError, lightgbm
from model.evaluation.plots import plot_calibration, plot_precision_recall, require_matplotlib
from model.evaluation.protocol import (
    HANDBOOK_START,
    ProtocolError,
    ProtocolName,
    handbook_folds,
    split_fold,
)
from model.evaluation.reason_check import first_reasons_agree
from model.evaluation.results import Results, results_of, table
from model.evaluation.robustness import Robustness, measure_robustness
from model.probe.sweeps import short_probe
from model.simulator.handbook import SimulatorError
from model.training.forecast_head import fit_forecast_head
from model.training.settings import Report, Reporter, TrainingError, TrainingSettings
from model.training.source import DataSource, SimulatedData
from pipeline.cli.options import EXAMPLE_HINT
from pipeline.errors import RecurError, SettingsError
from pipeline.files.column_mapping import load_mapping
from pipeline.files.training_data import FileData
from pipeline.progress import TrainingProgress
from pipeline.tables import print_table, widen

SIMULATED_SEED = 1
"""Seed of simulated transactions. The networks' seeds vary; the data stay the same."""

FORECAST_SEED = 1
"""Seed of the forecast head's samples and weights."""

TABLE_COLUMNS = 132
"""Least width of the tables, characters."""

# About the shares of the time at which reading, comparing and the faults end.
_READ_SHARE = 0.04
_COMPARED_SHARE = 0.82
_FAULTS_SHARE = 0.89


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of `recur evaluate`; see its help."""

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
    forecast: bool = True
    training: dict[str, Any] = field(default_factory=dict)
    """Fields of :class:`model.training.train.TrainingSettings` that differ from its defaults."""
    trees: int = TREES


def evaluate_options(
    *,
    networks: str | None,
    no_plots: bool,
    no_robustness: bool,
    no_forecast: bool,
    epochs: int | None,
    hidden_size: int | None,
    customers: int | None,
    terminals: int | None,
    days: int | None,
    world: str,
    **options: Any,
) -> EvaluateOptions:
    """Return evaluation options; None stands for an option's default."""
    training = {
        **{"customers": customers, "terminals": terminals, "days": days},
        **{"world": world},
        **{"epochs": epochs, "hidden_size": hidden_size},
    }
    chosen = NETWORKS if networks is None else tuple(n.strip() for n in networks.split(","))
    return EvaluateOptions(
        networks=chosen,
        plots=not no_plots,
        robustness=not no_robustness,
        forecast=not no_forecast,
        training={name: value for name, value in training.items() if value is not None},
        **options,
    )


def run_evaluate(options: EvaluateOptions, console: Console | None = None) -> Results:
    """Compare; print the table; write results.json, model_card.md and the plots.

    Trained networks stay in ``runs`` of the output folder; the same command continues from them.

    Raises:
        RecurError: the options, the data or the installation must be corrected.
    """
    try:
        with TrainingProgress(command="evaluate") as progress:
            results = _evaluate(options, progress.report)
    except (
        CheckpointError,
        ComparisonError,
        DatasetError,
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
    # The default of evaluate differs from that of training: the Handbook's data.
    training = TrainingSettings(
        **{"world": "handbook"} | options.training, label_delay_days=float(options.label_delay_days)
    )
    settings = ComparisonSettings(
        options.networks, options.seeds, options.label_delay_days, training, options.trees
    )
    given = None if options.checkpoint is None else Checkpoint.load(options.checkpoint)
    source = _source(options, training)
    _make_folder(options.output)
    with tempfile.TemporaryDirectory(prefix=".work-", dir=options.output) as work:

        def show(share: float, note: str) -> None:
            report(Report("reading transactions", _READ_SHARE * share, note))

        show(0.0, "")
        log = source.write(Path(work) / "data", show)
        return _compare(options, settings, given, log, Path(work), report)


def _compare(
    options: EvaluateOptions,
    settings: ComparisonSettings,
    given: Checkpoint | None,
    log: Dataset,
    work: Path,
    report: Reporter,
) -> Results:
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
    comparer = Comparer(log, settings, work, options.output / "runs", given)
    comparison = comparer.compare(
        options.protocol, folds, _within(report, _READ_SHARE, _COMPARED_SHARE)
    )
    source = "simulated transactions" if options.file is None else options.file.name
    robustness, agree = None, None
    if options.robustness and options.protocol == "split":
        robustness, agree = _described(comparer, comparison, log, report)
    results = results_of(comparison, log, settings, source, robustness, agree)
    if options.forecast and options.protocol == "split":
        results = msgspec.structs.replace(
            results,
            forecast=_forecasts(comparer, comparison, REFERENCE in options.networks, report),
        )
    _write(options, results, comparison, log)
    return results


def _source(options: EvaluateOptions, training: TrainingSettings) -> DataSource:
    """Return the source of the transactions: the file, or the simulator.

    Raises:
        RecurError: the file or its mapping cannot be used.
    """
    if options.file is None:
        return SimulatedData(dataclasses.replace(training, seed=SIMULATED_SEED))
    if options.columns is None:
        raise SettingsError(f"recur evaluate FILE needs --columns; {EXAMPLE_HINT}")
    return FileData(options.file, load_mapping(options.columns))


def print_results(results: Results, console: Console | None = None) -> None:
    """Print the table of networks and, if it was measured, the cost of faulty states."""
    console = console or Console()
    widen(console, TABLE_COLUMNS)
    headings, rows = table(results)
    console.print(f"protocol {results.protocol}: {'; '.join(results.folds.values())}")
    print_table(console, headings, rows, wraps_first=True)
    for caution in results.cautions:
        console.print(f"caution: {caution}")
    if results.forecast is not None:
        print_table(console, *forecast_table(results.forecast), wraps_first=True)
        print_table(console, *following_table(results.forecast), wraps_first=True)
    found = results.robustness
    if found is not None:
        faults = [
            [cost.title, f"{cost.average_precision:.4f}", f"{cost.lost:+.5f}"]
            for cost in found.faults
        ]
        print_table(console, ["fault of account states", "AP", "AP lost"], faults, wraps_first=True)
        weeks = [
            [week.first_day, f"{week.with_states:.3f}", f"{week.states_lost:.3f}"]
            for week in found.weeks
        ]
        headings = ["all states lost, week from", "AP", "AP, states lost"]
        print_table(console, headings, weeks, wraps_first=True)


def _check_requirements(options: EvaluateOptions) -> None:
    """Report a missing requirement now, and not after an hour of training."""
    if REFERENCE in options.networks:
        lightgbm()
    if options.plots:
        require_matplotlib()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecurError(f"cannot make the folder {folder}: {error.strerror or error}") from error


def _described(
    comparer: Comparer, comparison: Comparison, log: Dataset, report: Reporter
) -> tuple[Robustness | None, dict[int, float]]:
    """Measure robustness and reasons of the checkpoint that the card describes, if any."""
    fold = comparison.folds[0]
    checkpoint = comparison.checkpoints.get(fold.name)
    if checkpoint is None:
        return None, {}
    raw_of = comparer.material.raw_of(checkpoint.header.features, checkpoint.network.own)
    within = _within(report, _COMPARED_SHARE, _FAULTS_SHARE)
    robustness = measure_robustness(
        checkpoint, log, raw_of, fold, lambda share, title: within(Report(title, share))
    )
    report(Report("reasons of alerts", _FAULTS_SHARE))
    run = next(run for run in comparison.runs if run.network in (GIVEN, DESCRIBED))
    scores = comparison.scores[run.network, fold.name, run.seed]
    agree = first_reasons_agree(checkpoint, log, raw_of, fold, scores, RECALL_FALSE_POSITIVE_RATE)
    report(Report("done", 1.0))
    return robustness, agree


def _forecasts(
    comparer: Comparer, comparison: Comparison, boosted: bool, report: Reporter
) -> ForecastResults | None:
    """Compare the forecasts of the checkpoint that the card describes; it gets a head if needed."""
    fold = comparison.folds[0]
    checkpoint = comparison.checkpoints.get(fold.name)
    if checkpoint is None:
        return None
    data = comparer.material.forecast_data(checkpoint, fold)
    within = _within(report, _FAULTS_SHARE, 1.0)
    if checkpoint.forecaster is None:
        head = fit_forecast_head(
            checkpoint.stepper,
            data,
            FORECAST_SEED,
            lambda share: within(Report("forecast head", 0.7 * share)),
        )
        if head is None:
            return None
        checkpoint = checkpoint.with_forecast(head.shape, head.weights)

    def show(share: float, note: str) -> None:
        within(Report("forecasts", 0.7 + 0.3 * share, note))

    return compare_forecasts(checkpoint, data, FORECAST_SEED, show, boosted=boosted)


def _write(
    options: EvaluateOptions, results: Results, comparison: Comparison, log: Dataset
) -> None:
    plots = []
    if options.plots:
        for name, plot in (
            ("pr.png", plot_precision_recall),
            ("calibration.png", plot_calibration),
        ):
            plot(comparison, log, options.output / name)
            plots.append(name)
    checkpoint = comparison.checkpoints.get(comparison.folds[-1].name)
    if options.robustness and checkpoint is not None:
        metrics = checkpoint.header.metrics | short_probe(checkpoint).metrics()
        checkpoint = checkpoint.with_header(metrics=metrics)
    try:
        text = msgspec.json.format(msgspec.json.encode(results), indent=2)
        (options.output / "results.json").write_bytes(text + b"\n")
        (options.output / "model_card.md").write_text(
            model_card(results, checkpoint, plots), encoding="utf-8"
        )
    except OSError as error:
        raise RecurError(f"cannot write in {options.output}: {error.strerror or error}") from error


def _within(report: Reporter, begin: float, end: float) -> Reporter:
    """Return a reporter of a part that takes the whole's progress from begin to end."""
    return lambda r: report(Report(r.stage, begin + (end - begin) * r.done, r.note))
