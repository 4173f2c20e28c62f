"""Runs of `recur train-generator` and `recur evaluate-generator`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from model.data.dataset import DatasetError
from model.evaluation.generator_card import generator_card, plot_histories, rows_of
from model.evaluation.generator_comparison import GeneratorResults, compare_generator, within
from model.evaluation.history_views import Histories
from model.evaluation.kept_parts import KEPT_GENERATOR
from model.evaluation.lightgbm_reference import MissingRequirementError, lightgbm
from model.evaluation.plots import require_matplotlib
from model.evaluation.protocol import ProtocolError
from model.features.account import DEFINITION
from model.generator.generator import GENERATOR_FORMAT, Generator
from model.generator.settings import GeneratorError, GeneratorSettings
from model.generator.train import train_generator
from model.simulator.handbook import SimulatorError
from model.training.loop import RECIPE
from model.training.settings import Report, TrainingError, TrainingSettings
from model.training.source import DataSource, SimulatedData
from model.training.work_folder import open_work_folder
from pipeline.cli.options import EXAMPLE_HINT
from pipeline.errors import RecurError, SettingsError
from pipeline.files.column_mapping import load_mapping
from pipeline.files.generated import MAPPING_SUFFIX, check_folder
from pipeline.files.training_data import FileData
from pipeline.progress import TrainingProgress
from pipeline.tables import print_table, widen

DETECTOR_HIDDEN_SIZE = 64
"""Hidden state of the networks that learn from real and from generated histories."""

TABLE_COLUMNS = 120

_READ_SHARE = 0.1


def run_train_generator(
    output: Path,
    data: Path | None,
    columns: str | None,
    skip_unusable: bool,
    *,
    epochs: int,
    hidden_size: int,
    seed: int,
    **simulation: Any,
) -> Iterator[str]:
    """Train a generator and write it; yield lines about it.

    Raises:
        RecurError: the options, the data or the output must be corrected.
    """
    if output.is_dir():
        raise RecurError(f"{output} is a directory; name a file, such as generator.safetensors")
    check_folder(output)
    try:
        settings = GeneratorSettings(epochs=epochs, hidden_size=hidden_size, seed=seed)
        source = _source(data, columns, skip_unusable, seed, simulation)
        with (
            tempfile.TemporaryDirectory(prefix=".work-", dir=output.parent) as work,
            TrainingProgress(command="train-generator") as progress,
        ):

            def show(share: float, note: str) -> None:
                progress.report(Report("reading transactions", _READ_SHARE * share, note))

            def report(found: Report) -> None:
                done = _READ_SHARE + (1 - _READ_SHARE) * found.done
                progress.report(Report(found.stage, done, found.note))

            log = source.write(Path(work) / "data", show)
            generator = train_generator(log, settings, report)
            generator.save(output)
    except (DatasetError, GeneratorError, SimulatorError, TrainingError) as error:
        raise RecurError(str(error)) from error
    training = generator.header.training
    yield (
        f"{output}: generator {generator.digest}, of {training['transactions']:,} transactions by"
        f" {training['accounts']:,} accounts, {output.stat().st_size / 1000:.0f} kB"
    )
    for name, loss in training["losses"].items():
        yield f"  {name:10} {loss:.4f} nats a transaction"


def _source(
    data: Path | None,
    columns: str | None,
    skip_unusable: bool,
    seed: int,
    simulation: dict[str, Any],
) -> DataSource:
    if data is None:
        return SimulatedData(TrainingSettings(seed=seed, **simulation))
    if columns is None:
        raise SettingsError(f"FILE needs --columns; {EXAMPLE_HINT}")
    return FileData(data, load_mapping(columns), skip_unusable)


def run_evaluate_generator(
    *,
    file: Path | None,
    columns: str | None,
    accounts: int,
    seed: int,
    epochs: int,
    detector_epochs: int,
    no_detector: bool,
    peer: Path | None,
    output: Path,
    no_plots: bool,
    **simulation: Any,
) -> GeneratorResults:
    """Compare a generator with real histories; print the table, write results, card and plots.

    An interrupted run goes on where it stopped: ``OUTPUT/comparison.resume/`` has its parts.

    Raises:
        RecurError: the options, the data or the installation must be corrected.
    """
    try:
        lightgbm()
        if not no_plots:
            require_matplotlib()
        check_folder(output / "card.md")
        settings = GeneratorSettings(epochs=epochs, seed=seed)
        detector = None
        if not no_detector:
            detector = TrainingSettings(
                epochs=detector_epochs, hidden_size=DETECTOR_HIDDEN_SIZE, seed=seed, forecast=False
            )
        source = _source(file, columns, False, seed, simulation)
        rival = None
        if peer is not None:
            rival = FileData(peer, load_mapping(peer.with_name(peer.name + MAPPING_SUFFIX)))
        identity = "\n".join(
            [
                *(source.identity(), "" if rival is None else rival.identity()),
                f"{accounts} {settings} {detector} {GENERATOR_FORMAT} {DEFINITION} {RECIPE}",
            ]
        )
        with (
            open_work_folder(output / "comparison", identity) as work,
            TrainingProgress(command="evaluate-generator") as progress,
        ):
            for name in ("data", "peer"):  # read again: parts are kept, not transactions
                shutil.rmtree(work / name, ignore_errors=True)

            def show(share: float, note: str) -> None:
                progress.report(Report("reading transactions", _READ_SHARE * share, note))

            try:
                log = source.write(work / "data", show)
                rivals = None if rival is None else rival.write(work / "peer", show)
                results, views, generator = compare_generator(
                    log,
                    "simulated transactions" if file is None else file.name,
                    accounts,
                    settings,
                    detector,
                    work,
                    rivals,
                    within(progress.report, _READ_SHARE, 1.0),
                )
            except Exception:
                if not (work / KEPT_GENERATOR).exists():  # nothing worth resuming
                    shutil.rmtree(work)
                raise
            _write(output, results, views, generator, not no_plots)
            shutil.rmtree(work)
    except (
        DatasetError,
        GeneratorError,
        MissingRequirementError,
        ProtocolError,
        SimulatorError,
        TrainingError,
    ) as error:
        raise RecurError(str(error)) from error
    console = Console()
    widen(console, TABLE_COLUMNS)
    print_table(console, *rows_of(results), wraps_first=True)
    return results


def _write(
    output: Path,
    results: GeneratorResults,
    views: dict[str, Histories],
    generator: Generator,
    plots: bool,
) -> None:
    names = []
    generator.save(output / "generator.safetensors")
    if plots:
        plot_histories(views, output / "histories.png")
        names.append("histories.png")
    try:
        text = msgspec.json.format(msgspec.json.encode(results), indent=2)
        (output / "results.json").write_bytes(text + b"\n")
        (output / "card.md").write_text(generator_card(results, names), encoding="utf-8")
    except OSError as error:
        raise RecurError(f"cannot write in {output}: {error.strerror or error}") from error
