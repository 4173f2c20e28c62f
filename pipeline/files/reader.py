"""Transactions from a person's Parquet or CSV file, some thousand rows at a time.

    for part in TransactionFile(path, load_mapping("handbook")).parts():
        part.transaction_ids, part.timestamps_ms, ...

A row that cannot be a transaction ends the reading with its number, or is skipped and counted.
Row numbers start at 1 and do not count a header line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from model.transaction import TIMESTAMP_MAX_MS
from model.units import DAY_MS
from pipeline.errors import RecurError
from pipeline.files.column_mapping import OPTIONAL_FIELDS, ColumnMapping
from pipeline.files.parsing import (
    RowFaults,
    finite_or_nan,
    parse_amounts,
    parse_ids,
    parse_labels,
    parse_numbers,
    parse_times,
    texts_of,
)
from pipeline.files.sources import (
    PART_ROWS,
    CsvSource,
    ParquetSource,
    open_source,
    without_content,
)
from pipeline.timestamps import look_like_seconds

REPEAT_WINDOW_IDS = 65_536
"""Number of rows within which a second use of a transaction id is found."""

EXAMPLES_MAX = 5
"""Skipped rows that are described; the others are only counted."""

_SHORT_TEXT_MAX = 64


@dataclass(frozen=True, slots=True)
class TransactionPart:
    """Some transactions in file order; all columns have the same length."""

    rows: NDArray[np.int64]
    """Row numbers in the file, from 1."""
    transaction_ids: list[str]
    """Empty if the file has no ids, which only training accepts."""
    account_ids: list[str]
    merchant_ids: list[str]
    amounts: list[float]
    currencies: list[str]
    timestamps_ms: NDArray[np.int64]
    optional: list[list[str | None]]
    """Columns category, channel and country."""
    labels: NDArray[np.int8] | None
    """Labels: 1 fraud, 0 legitimate, -1 unknown."""
    scenarios: list[str | None] | None
    numeric: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Extra numeric fields by name; NaN: missing."""
    categorical: dict[str, list[str | None]] = field(default_factory=dict)
    """Extra categorical fields by name; None: missing."""

    def __len__(self) -> int:
        return len(self.rows)

    def extra_fields(self) -> dict[str, Sequence[float | str | None]]:
        """Collect the extra fields by name, as JSON has them; None: missing."""
        numbers: dict[str, Sequence[float | str | None]] = {
            name: [None if value != value else value for value in values.tolist()]
            for name, values in self.numeric.items()
        }
        return numbers | self.categorical

    def first(self, rows: int) -> TransactionPart:
        """Take at most this number of rows from the start."""
        if rows >= len(self):
            return self
        return TransactionPart(
            self.rows[:rows],
            self.transaction_ids[:rows],
            self.account_ids[:rows],
            self.merchant_ids[:rows],
            self.amounts[:rows],
            self.currencies[:rows],
            self.timestamps_ms[:rows],
            [values[:rows] for values in self.optional],
            None if self.labels is None else self.labels[:rows],
            None if self.scenarios is None else self.scenarios[:rows],
            {name: values[:rows] for name, values in self.numeric.items()},
            {name: values[:rows] for name, values in self.categorical.items()},
        )


@dataclass(slots=True)
class SkippedRows:
    """Rows that cannot be transactions: their number, and examples."""

    rows: int = 0
    examples: list[str] = field(default_factory=list)


class TransactionFile:
    """A Parquet or CSV file of transactions with its column mapping.

    Args:
        offset_ms: milliseconds added to every time.
        skip_unusable: skip rows that cannot be transactions instead of raising an error.
        allow_unsorted: accept rows with a time before that of the row above.
        latest_ms: limit for times in epoch milliseconds; by default a day from now.
        for_training: require a label, and no transaction id. Accept repeated ids and any order
            of times: the caller handles both.

    Raises:
        RecurError: the file or a column is missing, or the file is of another kind. While
            reading: a row is unusable; the message has its number.
    """

    def __init__(
        self,
        path: Path,
        mapping: ColumnMapping,
        *,
        offset_ms: int = 0,
        skip_unusable: bool = False,
        allow_unsorted: bool = False,
        latest_ms: int | None = None,
        for_training: bool = False,
    ) -> None:
        self.skipped = SkippedRows()
        self.unsorted_rows = 0
        self._path = path
        self._mapping = mapping
        self._columns = mapping.columns_by_field()
        self._extra = mapping.numeric | mapping.categorical
        self._offset_ms = offset_ms
        self._skip_unusable = skip_unusable
        self._allow_unsorted = allow_unsorted or for_training
        self._find_repeats = not for_training
        self._for_training = for_training
        self._latest_ms = round(time.time() * 1000) + DAY_MS if latest_ms is None else latest_ms
        self._require_fields("label" if for_training else "transaction_id")
        self._source: ParquetSource | CsvSource = open_source(path)
        self._require_columns()
        self._rows_read = 0
        self._last_ms: int | None = None
        self._recent_ids: dict[str, None] = {}

    @property
    def rows_total(self) -> int | None:
        """Number of rows, if the file's format has it."""
        return self._source.rows_total

    @property
    def fraction_read(self) -> float:
        """Share of the file that has been read, 0 to 1."""
        return self._source.fraction_read()

    def parts(self) -> Iterator[TransactionPart]:
        """Read the usable rows in file order."""
        names = sorted({*self._columns.values(), *self._extra.values()})
        try:
            for batch in self._source.batches(names):
                for start in range(0, batch.num_rows, PART_ROWS):
                    part = self._part(batch.slice(start, PART_ROWS))
                    if part is not None:
                        yield part
        except (pa.ArrowInvalid, OSError) as error:
            raise RecurError(
                f"{self._path} cannot be read to its end: {without_content(error)}"
            ) from None

    def _require_fields(self, needed: str) -> None:
        if needed not in self._columns:
            task = "training" if needed == "label" else "replay"
            raise RecurError(
                f"the column mapping has no {needed}, which {task} needs: write {needed} ="
                ' "its column" under [columns]'
            )

    def _require_columns(self) -> None:
        missing = [
            f"{column} ({field})"
            for field, column in (*self._columns.items(), *self._extra.items())
            if column not in self._source.names
        ]
        if missing:
            raise RecurError(
                f"{self._path} has no column {', '.join(missing)};"
                f" its columns are {', '.join(self._source.names)}: correct the column mapping"
            )

    def _part(self, batch: pa.RecordBatch) -> TransactionPart | None:
        count = batch.num_rows
        faults = RowFaults(np.zeros(count, np.bool_))
        column = {field: batch.column(name) for field, name in self._columns.items()}
        prefixes = self._mapping.prefixes
        transaction_ids = []
        if "transaction_id" in column:
            transaction_ids = parse_ids(
                column["transaction_id"], prefixes.transaction_id, "transaction_id", faults
            )
        account_ids = parse_ids(column["account_id"], prefixes.account_id, "account_id", faults)
        merchant_ids = parse_ids(column["merchant_id"], prefixes.merchant_id, "merchant_id", faults)
        amounts = parse_amounts(column["amount"], faults)
        timestamps_ms = (
            parse_times(column["timestamp"], self._mapping.time, faults) + self._offset_ms
        )
        self._check_times(timestamps_ms, faults)
        currencies = self._currencies(column.get("currency"), count, faults)
        optional = [
            self._optional(name, column.get(name), count, faults) for name in OPTIONAL_FIELDS
        ]
        labels = parse_labels(column["label"], faults) if "label" in column else None
        scenarios = texts_of(column["scenario"]) if "scenario" in column else None
        numeric = {
            name: finite_or_nan(parse_numbers(batch.column(source), name, faults))
            for name, source in self._mapping.numeric.items()
        }
        categorical = {
            name: [value or None for value in texts_of(batch.column(source))]
            for name, source in self._mapping.categorical.items()
        }
        if self._find_repeats:
            self._check_repeats(transaction_ids, faults)
        first_row = self._rows_read + 1
        self._rows_read += count
        rows = np.arange(first_row, first_row + count)
        if faults.bad.any():
            self._raise_or_skip(faults, first_row)
        keep = np.flatnonzero(~faults.bad)
        self._check_order(timestamps_ms[keep], rows[keep])
        if not len(keep):
            return None
        pick = _picker(keep, count)
        return TransactionPart(
            rows=rows[keep],
            transaction_ids=pick(transaction_ids) if transaction_ids else [],
            account_ids=pick(account_ids),
            merchant_ids=pick(merchant_ids),
            amounts=amounts[keep].tolist(),
            currencies=pick(currencies),
            timestamps_ms=timestamps_ms[keep],
            optional=[pick(values) for values in optional],
            labels=None if labels is None else labels[keep],
            scenarios=None if scenarios is None else pick(scenarios),
            numeric={name: values[keep] for name, values in numeric.items()},
            categorical={name: pick(values) for name, values in categorical.items()},
        )

    def _check_times(self, timestamps_ms: NDArray[np.int64], faults: RowFaults) -> None:
        outside = (timestamps_ms < 0) | (timestamps_ms > TIMESTAMP_MAX_MS)
        faults.add(outside & ~faults.bad, "timestamp is not between 1970 and 9999")
        faults.add(
            (timestamps_ms > self._latest_ms) & ~faults.bad,
            "timestamp is in the future, and the worker would reject it"
            " (--offset-days -N moves all times)",
        )
        if not self._for_training:
            faults.add(
                look_like_seconds(timestamps_ms) & ~faults.bad,
                "timestamp is in 1970, and the worker would read it as seconds: correct"
                " [time] unit, or move all times with --offset-days",
            )

    def _currencies(self, column: pa.Array | None, count: int, faults: RowFaults) -> list[Any]:
        if column is None:
            return [self._mapping.constants.currency] * count
        values = texts_of(column)
        wrong = np.fromiter((value is None or len(value) != 3 for value in values), np.bool_, count)
        faults.add(wrong, "currency is not a three-letter code")
        return values

    def _optional(
        self, name: str, column: pa.Array | None, count: int, faults: RowFaults
    ) -> list[Any]:
        if column is None:
            return [getattr(self._mapping.constants, name)] * count
        values = [value or None for value in texts_of(column)]
        wrong = np.fromiter(
            (len(value or "") > _SHORT_TEXT_MAX for value in values), np.bool_, count
        )
        faults.add(wrong, f"{name} is longer than {_SHORT_TEXT_MAX} characters")
        return values

    def _check_repeats(self, transaction_ids: Sequence[str], faults: RowFaults) -> None:
        recent = self._recent_ids
        repeats = np.zeros(len(transaction_ids), np.bool_)
        for index, name in enumerate(transaction_ids):
            if name in recent:
                repeats[index] = True
            recent[name] = None
        faults.add(repeats & ~faults.bad, "transaction_id repeats that of a row above")
        for name in list(islice(recent, max(0, len(recent) - REPEAT_WINDOW_IDS))):
            del recent[name]

    def _check_order(self, timestamps_ms: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        if not len(rows):
            return
        before = timestamps_ms[0] if self._last_ms is None else self._last_ms
        back = np.diff(timestamps_ms, prepend=before) < 0
        self._last_ms = int(timestamps_ms[-1])
        if not back.any():
            return
        self.unsorted_rows += int(back.sum())
        if not self._allow_unsorted:
            raise RecurError(
                f"{self._path}, row {rows[int(np.argmax(back))]:,}: its time is before that of the"
                " row above: sort the file by time, or send it unsorted with --allow-unsorted"
            )

    def _raise_or_skip(self, faults: RowFaults, first_row: int) -> None:
        found = sorted(faults.first.items(), key=lambda item: item[1])
        complaints = [f"row {first_row + index:,}: {what}" for what, index in found]
        if not self._skip_unusable:
            raise RecurError(
                f"{self._path}, {complaints[0]}: correct it, or skip such rows with --skip-unusable"
            )
        self.skipped.rows += int(faults.bad.sum())
        room = EXAMPLES_MAX - len(self.skipped.examples)
        self.skipped.examples += complaints[: max(0, room)]


def _picker(keep: NDArray[np.intp], count: int) -> Callable[[list[Any]], list[Any]]:
    if len(keep) == count:
        return lambda values: values
    indices = keep.tolist()
    return lambda values: [values[index] for index in indices]
