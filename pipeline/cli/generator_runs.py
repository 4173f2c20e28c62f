"""Runs of `recur train-generator` and `recur evaluate-generator`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.data.dataset import DatasetError
from model.generator.settings import GeneratorError, GeneratorSettings
from model.generator.train import train_generator
from model.simulator.handbook import SimulatorError
from model.training.settings import Report, TrainingError, TrainingSettings
from model.training.source import DataSource, SimulatedData
from pipeline.cli.options import EXAMPLE_HINT
from pipeline.errors import RecurError, SettingsError
from pipeline.files.column_mapping import load_mapping
from pipeline.files.generated import check_folder
from pipeline.files.training_data import FileData
from pipeline.progress import TrainingProgress

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
