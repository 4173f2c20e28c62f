"""A person's own file as training data: read in parts, checked, and written to disk."""

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
from pipeline.files.reader import Part, TransactionFile

SCENARIOS_MAX = 100
"""Kinds of fraud that are told apart."""

_SIMULATOR_SETTINGS = ("customers", "terminals", "days", "start_date", "world")


class FileData:
    """Labelled transactions of a parquet or CSV file (:class:`model.training.train.DataSource`).

    Args:
        skip_unusable: leave out rows that cannot be transactions instead of refusing the file.

    Raises:
        RecurError: no such file, or the mapping does not fit it; while reading: an unusable
            row, by its number, no rows, or amounts in several currencies.
    """

    def __init__(self, path: Path, mapping: ColumnMapping, skip_unusable: bool = False) -> None:
        self._path = path
        self._mapping = mapping
        self._skip_unusable = skip_unusable
        self._open()  # what is wrong with it is said at once

    def _open(self) -> TransactionFile:
        return TransactionFile(
            self._path,
            self._mapping,
            skip_unusable=self._skip_unusable,
            latest_ms=TIMESTAMP_MAX_MS,
            for_training=True,
        )

    def identity(self) -> str:
        """The file by its place, size and time of change, and how it is read."""
        there = self._path.stat()
        mapping = msgspec.json.encode(self._mapping, order="deterministic")
        read = hashlib.sha256(mapping).hexdigest()
        return (
            f"{self._path.resolve()} {there.st_size} {there.st_mtime_ns} {read} "
            f"{self._skip_unusable}"
        )

    def settings(self, settings: TrainingSettings) -> dict[str, Any]:
        """All but the simulator's."""
        values = dataclasses.asdict(settings)
        return {name: values[name] for name in values if name not in _SIMULATOR_SETTINGS}

    def write(self, folder: Path, show: Callable[[float, str], None]) -> Dataset:
        """Writes the file's transactions to an empty folder."""
        file = self._open()
        categorical = [name for name in OPTIONAL_FIELDS if getattr(self._mapping.columns, name)]
        currencies: Counter[str] = Counter()
        scenario_number = _ScenarioNumbers()
        rows = 0
        with DatasetWriter(
            folder, list(self._mapping.numeric), [*categorical, *self._mapping.categorical]
        ) as writer:
            for part in file.parts():
                currencies.update(part.currencies)
                _require_one(currencies, self._path)
                writer.append(_rows(part, categorical, scenario_number))
                rows += len(part)
                show(file.fraction_read, f"{rows:,} rows{_left_out(file)}")
            if not rows:
                raise RecurError(f"{self._path} has no usable rows: there is nothing to train on")
            show(1.0, f"{rows:,} rows{_left_out(file)}")
            return writer.finish(currencies.most_common(1)[0][0])


def _left_out(file: TransactionFile) -> str:
    left_out = file.left_out
    if not left_out.rows:
        return ""
    return f", {left_out.rows:,} left out, such as {left_out.examples[0]}"


def _require_one(currencies: Counter[str], path: Path) -> None:
    if len(currencies) > 1:
        found = ", ".join(f"{rows:,} in {name}" for name, rows in currencies.most_common(5))
        raise RecurError(
            f"{path} has amounts in several currencies ({found} so far): a network learns from one;"
            " convert them, or train on the rows of one currency"
        )


class _ScenarioNumbers:
    """Kinds of fraud as numbers: a whole number stays what it is, other names are counted."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}

    def of(self, name: str | None) -> int:
        if name is None or name in ("", "0", "0.0"):
            return 0
        if name not in self._number:
            if len(self._number) >= SCENARIOS_MAX:
                raise RecurError(
                    f"the scenario column has more than {SCENARIOS_MAX} values: it names the kind"
                    " of fraud; map another column or none"
                )
            whole = name.isdecimal() and int(name) <= SCENARIOS_MAX
            self._number[name] = int(name) if whole else len(self._number) + 1
        return self._number[name]


def _rows(part: Part, categorical: list[str], scenarios: _ScenarioNumbers) -> Rows:
    assert part.labels is not None, "a file for training has labels"
    scenario: NDArray[np.int8] = np.where(part.labels == FRAUD, 1, 0).astype(np.int8)
    if part.scenarios is not None:
        scenario = np.fromiter(map(scenarios.of, part.scenarios), np.int8, len(part))
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
