"""Training data from a person's file: read in parts, checked, and written to disk."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.data.dataset import FRAUD, Dataset, DatasetWriter, Rows, text_keys
from model.training.settings import TrainingSettings
from model.transaction import TIMESTAMP_MAX_MS
from pipeline.errors import RecurError
from pipeline.files.column_mapping import OPTIONAL_FIELDS, ColumnMapping
from pipeline.files.reader import TransactionFile, TransactionPart
from pipeline.files.scenarios import ScenarioNumbers

_SIMULATOR_SETTINGS = ("customers", "terminals", "days", "start_date", "world")


class FileData:
    """Labelled transactions of a Parquet or CSV file (:class:`model.training.train.DataSource`).

    Args:
        skip_unusable: skip rows that cannot be transactions instead of raising an error.

    Raises:
        RecurError: the file is missing, or the mapping does not fit it. While reading: a row is
            unusable, there are no rows, or amounts have several currencies.
    """

    def __init__(self, path: Path, mapping: ColumnMapping, skip_unusable: bool = False) -> None:
        self._path = path
        self._mapping = mapping
        self._skip_unusable = skip_unusable
        self._open()  # a wrong file or mapping raises here, before the training

    def _open(self) -> TransactionFile:
        return TransactionFile(
            self._path,
            self._mapping,
            skip_unusable=self._skip_unusable,
            latest_ms=TIMESTAMP_MAX_MS,
            for_training=True,
        )

    def identity(self) -> str:
        """Identify the file by path, size, time of change and the way it is read."""
        status = self._path.stat()
        mapping = msgspec.json.encode(self._mapping, order="deterministic")
        read = hashlib.sha256(mapping).hexdigest()
        return (
            f"{self._path.resolve()} {status.st_size} {status.st_mtime_ns} {read} "
            f"{self._skip_unusable}"
        )

    def settings(self, settings: TrainingSettings) -> dict[str, Any]:
        """Select all settings but those of the simulator."""
        values = dataclasses.asdict(settings)
        return {name: values[name] for name in values if name not in _SIMULATOR_SETTINGS}

    def write(self, folder: Path, show: Callable[[float, str], None]) -> Dataset:
        """Write the file's transactions to an empty folder."""
        file = self._open()
        categorical = [name for name in OPTIONAL_FIELDS if getattr(self._mapping.columns, name)]
        currencies: Counter[str] = Counter()
        scenarios = ScenarioNumbers()
        rows = 0
        with DatasetWriter(
            folder, list(self._mapping.numeric), [*categorical, *self._mapping.categorical]
        ) as writer:
            for part in file.parts():
                currencies.update(part.currencies)
                _require_one_currency(currencies, self._path)
                writer.append(_rows(part, categorical, scenarios))
                rows += len(part)
                show(file.fraction_read, f"{rows:,} rows{_skipped_text(file)}")
            if not rows:
                raise RecurError(f"{self._path} has no usable rows: there is nothing to train on")
            show(1.0, f"{rows:,} rows{_skipped_text(file)}")
            return writer.finish(currencies.most_common(1)[0][0])


def _skipped_text(file: TransactionFile) -> str:
    skipped = file.skipped
    if not skipped.rows:
        return ""
    return f", {skipped.rows:,} skipped, such as {skipped.examples[0]}"


def _require_one_currency(currencies: Counter[str], path: Path) -> None:
    if len(currencies) > 1:
        found = ", ".join(f"{rows:,} in {name}" for name, rows in currencies.most_common(5))
        raise RecurError(
            f"{path} has amounts in several currencies ({found} so far): a network learns one"
            " currency: convert the others, or train on the rows of one"
        )


def _rows(part: TransactionPart, categorical: list[str], scenarios: ScenarioNumbers) -> Rows:
    assert part.labels is not None, "a file for training has labels"
    scenario: NDArray[np.int8] = np.where(part.labels == FRAUD, 1, 0).astype(np.int8)
    if part.scenarios is not None:
        scenario = np.fromiter(map(scenarios.number_of, part.scenarios), np.int8, len(part))
    optional = dict(zip(OPTIONAL_FIELDS, part.optional, strict=True))
    return Rows(
        account=text_keys(part.account_ids),
        merchant=text_keys(part.merchant_ids),
        amount=np.array(part.amounts, np.float64),
        timestamp_ms=part.timestamps_ms,
        label=part.labels,
        scenario=scenario,
        numeric=part.numeric,
        categorical={name: optional[name] for name in categorical} | part.categorical,
        key=text_keys(part.transaction_ids) if part.transaction_ids else None,
    )
