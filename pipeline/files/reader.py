"""Reads a person's parquet or CSV file as transactions, some thousand rows at a time.

    for part in TransactionFile(path, load_mapping("handbook")).parts():
        part.transaction_ids, part.timestamps_ms, ...

A row that cannot be a transaction is refused with its number, or left out and counted. Rows
are numbered from 1, a header line not counted.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from model.transaction import AMOUNT_MAX, ID_MAX_CHARACTERS, TIMESTAMP_MAX_MS
from pipeline.errors import RecurError
from pipeline.files.column_mapping import OPTIONAL_FIELDS, ColumnMapping, LabelMapping, TimeForm
from pipeline.timestamps import labelled_time, look_like_seconds
from pipeline.units import DAY_MS

PART_ROWS = 8192
"""Rows read at once."""

REPEAT_WINDOW_IDS = 65_536
"""A transaction id that repeats within this many rows is found."""

EXAMPLES_MAX = 5
"""Left-out rows that are described; the others are counted."""

LABEL_UNKNOWN = -1

_CSV_BLOCK_BYTES = 1 << 20
_WRONG_WIDTH = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")
_SHORT_TEXT_MAX = 64
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_FRAUD_WORDS = {"1", "1.0", "true", "t", "yes", "y", "fraud"}
_LEGITIMATE_WORDS = {"0", "0.0", "false", "f", "no", "n", "legitimate", "legit", "genuine"}

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows in file order; every column has as many values."""

    rows: NDArray[np.int64]
    """Row numbers in the file, from 1."""
    transaction_ids: list[str]
    """Empty where the file has none, which only training takes."""
    account_ids: list[str]
    merchant_ids: list[str]
    amounts: list[float]
    currencies: list[str]
    timestamps_ms: NDArray[np.int64]
    optional: list[list[str | None]]
    """Category, channel and country."""
    labels: NDArray[np.int8] | None
    """1 fraud, 0 legitimate, -1 unknown."""
    scenarios: list[str | None] | None
    numeric: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Further numeric fields by name; NaN: missing."""
    categorical: dict[str, list[str | None]] = field(default_factory=dict)
    """Further categorical fields by name; None: missing."""

    def __len__(self) -> int:
        return len(self.rows)

    def further(self) -> dict[str, Sequence[float | str | None]]:
        """Further fields as JSON has them; None: missing."""
        numbers: dict[str, Sequence[float | str | None]] = {
            name: [None if value != value else value for value in values.tolist()]
            for name, values in self.numeric.items()
        }
        return numbers | self.categorical

    def first(self, rows: int) -> Part:
        """At most so many of the rows."""
        if rows >= len(self):
            return self
        return Part(
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
    """Rows that could not be transactions."""

    rows: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Faults:
    """What is wrong with the rows of one part."""

    bad: Bools
    first: dict[str, int] = field(default_factory=dict)  # what is wrong -> index of first row

    def add(self, wrong: Bools, what: str) -> None:
        if wrong.any():
            self.first.setdefault(what, int(np.argmax(wrong)))
            self.bad |= wrong


class TransactionFile:
    """A parquet or CSV file with its column mapping.

    Args:
        offset_ms: added to every time.
        skip_unusable: leave out rows that cannot be transactions instead of refusing the file.
        allow_unsorted: take rows whose time is before the one above.
        latest_ms: a time past this (epoch milliseconds) is refused; now and a day by default.
        for_training: a label is needed and a transaction id is not; repeats and the order of
            times are the caller's affair.

    Raises:
        RecurError: no such file, another kind of file, a missing column, and while reading:
            an unusable row, by its number.
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
        self.left_out = SkippedRows()
        self.unsorted_rows = 0
        self._path = path
        self._mapping = mapping
        self._columns = mapping.columns_by_field()
        self._further = mapping.numeric | mapping.categorical
        self._offset_ms = offset_ms
        self._skip_unusable = skip_unusable
        self._allow_unsorted = allow_unsorted or for_training
        self._find_repeats = not for_training
        self._for_training = for_training
        self._latest_ms = round(time.time() * 1000) + DAY_MS if latest_ms is None else latest_ms
        self._require_fields("label" if for_training else "transaction_id")
        self._source: _ParquetSource | _CsvSource = _open(path)
        self._require_columns()
        self._rows_read = 0
        self._last_ms: int | None = None
        self._recent_ids: dict[str, None] = {}

    @property
    def rows_total(self) -> int | None:
        """Rows of the file, where its format tells."""
        return self._source.rows_total

    @property
    def fraction_read(self) -> float:
        """How much of the file has been read, 0 to 1."""
        return self._source.fraction_read()

    def parts(self) -> Iterator[Part]:
        """The usable rows, in file order."""
        names = sorted({*self._columns.values(), *self._further.values()})
        try:
            for batch in self._source.batches(names):
                for start in range(0, batch.num_rows, PART_ROWS):
                    part = self._part(batch.slice(start, PART_ROWS))
                    if part is not None:
                        yield part
        except (pa.ArrowInvalid, OSError) as error:
            raise RecurError(
                f"{self._path} cannot be read any further: {_without_content(error)}"
            ) from None

    def _require_fields(self, needed: str) -> None:
        if needed not in self._columns:
            task = "training" if needed == "label" else "replay"
            raise RecurError(
                f"the column mapping names no {needed}, which {task} needs: write {needed} ="
                ' "its column" under [columns]'
            )

    def _require_columns(self) -> None:
        missing = [
            f"{column} ({field})"
            for field, column in (*self._columns.items(), *self._further.items())
            if column not in self._source.names
        ]
        if missing:
            raise RecurError(
                f"{self._path} has no column {', '.join(missing)};"
                f" its columns are {', '.join(self._source.names)}: correct the column mapping"
            )

    def _part(self, batch: pa.RecordBatch) -> Part | None:
        count = batch.num_rows
        faults = _Faults(np.zeros(count, np.bool_))
        column = {field: batch.column(name) for field, name in self._columns.items()}
        prefixes = self._mapping.prefixes
        transaction_ids = []
        if "transaction_id" in column:
            transaction_ids = _ids(
                column["transaction_id"], prefixes.transaction_id, "transaction_id", faults
            )
        account_ids = _ids(column["account_id"], prefixes.account_id, "account_id", faults)
        merchant_ids = _ids(column["merchant_id"], prefixes.merchant_id, "merchant_id", faults)
        amounts = _amounts(column["amount"], faults)
        timestamps_ms = _epoch_ms(column["timestamp"], self._mapping.time, faults) + self._offset_ms
        self._check_times(timestamps_ms, faults)
        currencies = self._currencies(column.get("currency"), count, faults)
        optional = [
            self._optional(name, column.get(name), count, faults) for name in OPTIONAL_FIELDS
        ]
        labels = _labels(column["label"], faults) if "label" in column else None
        scenarios = _texts(column["scenario"]) if "scenario" in column else None
        numeric = {
            name: _finite(_numbers(batch.column(source), name, faults))
            for name, source in self._mapping.numeric.items()
        }
        categorical = {
            name: [value or None for value in _texts(batch.column(source))]
            for name, source in self._mapping.categorical.items()
        }
        if self._find_repeats:
            self._check_repeats(transaction_ids, faults)
        first_row = self._rows_read + 1
        self._rows_read += count
        rows = np.arange(first_row, first_row + count)
        if faults.bad.any():
            self._refuse_or_count(faults, first_row)
        keep = np.flatnonzero(~faults.bad)
        self._check_order(timestamps_ms[keep], rows[keep])
        if not len(keep):
            return None
        pick = _picker(keep, count)
        return Part(
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

    def _check_times(self, timestamps_ms: NDArray[np.int64], faults: _Faults) -> None:
        outside = (timestamps_ms < 0) | (timestamps_ms > TIMESTAMP_MAX_MS)
        faults.add(outside & ~faults.bad, "timestamp is not between 1970 and 9999")
        faults.add(
            (timestamps_ms > self._latest_ms) & ~faults.bad,
            "timestamp lies in the future, where the worker rejects it"
            " (--offset-days -N moves all times)",
        )
        if not self._for_training:
            faults.add(
                look_like_seconds(timestamps_ms) & ~faults.bad,
                "timestamp is in 1970, where the worker takes milliseconds for seconds: correct"
                " [time] unit, or move all times with --offset-days",
            )

    def _currencies(self, column: pa.Array | None, count: int, faults: _Faults) -> list[Any]:
        if column is None:
            return [self._mapping.constants.currency] * count
        values = _texts(column)
        wrong = np.fromiter((value is None or len(value) != 3 for value in values), np.bool_, count)
        faults.add(wrong, "currency is not a three-letter code")
        return values

    def _optional(
        self, name: str, column: pa.Array | None, count: int, faults: _Faults
    ) -> list[Any]:
        if column is None:
            return [getattr(self._mapping.constants, name)] * count
        values = [value or None for value in _texts(column)]
        wrong = np.fromiter(
            (len(value or "") > _SHORT_TEXT_MAX for value in values), np.bool_, count
        )
        faults.add(wrong, f"{name} is longer than {_SHORT_TEXT_MAX} characters")
        return values

    def _check_repeats(self, transaction_ids: Sequence[str], faults: _Faults) -> None:
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
                " row above: sort the file by time, or send it as it is with --allow-unsorted"
            )

    def _refuse_or_count(self, faults: _Faults, first_row: int) -> None:
        found = sorted(faults.first.items(), key=lambda item: item[1])
        complaints = [f"row {first_row + index:,}: {what}" for what, index in found]
        if not self._skip_unusable:
            raise RecurError(
                f"{self._path}, {complaints[0]}: correct it, or leave such rows out with"
                " --skip-unusable"
            )
        self.left_out.rows += int(faults.bad.sum())
        room = EXAMPLES_MAX - len(self.left_out.examples)
        self.left_out.examples += complaints[: max(0, room)]


@dataclass(frozen=True, slots=True)
class LabelPart:
    """Some labels in file order; every column has as many values."""

    transaction_ids: list[str]
    account_ids: list[str]
    merchant_ids: list[str]
    is_fraud: NDArray[np.bool_]
    timestamps_ms: NDArray[np.int64]
    labelled_ms: NDArray[np.int64]
    merchant_weights: list[float | None] | None = None
    """From 0 to 1, None where a row has none; None: the file has no such column."""

    def __len__(self) -> int:
        return len(self.transaction_ids)


class LabelFile:
    """A parquet or CSV file of labels with its column mapping.

    Raises:
        RecurError: no such file, another kind of file, a missing column, and while reading:
            a row that is no label, by its number.
    """

    def __init__(self, path: Path, mapping: LabelMapping) -> None:
        self._path = path
        self._mapping = mapping
        self._columns = mapping.columns
        self._source = _open(path)
        self._rows_read = 0
        missing = [name for name in self._names() if name not in self._source.names]
        if missing:
            raise RecurError(
                f"{path} has no column {', '.join(missing)}; its columns are"
                f" {', '.join(self._source.names)}: name yours in a column mapping (--columns), or"
                " make labels of a file of transactions with --from-transactions"
            )

    def _names(self) -> list[str]:
        named = {name: getattr(self._columns, name) for name in self._columns.__struct_fields__}
        if named["merchant_weight"] == "merchant_weight" and not self._has_weights:
            del named["merchant_weight"]  # no mapping asks for it
        return list(named.values())

    @property
    def _has_weights(self) -> bool:
        return self._columns.merchant_weight in self._source.names

    @property
    def fraction_read(self) -> float:
        """How much of the file has been read, 0 to 1."""
        return self._source.fraction_read()

    def parts(self) -> Iterator[LabelPart]:
        """The labels, in file order."""
        try:
            for batch in self._source.batches(sorted(set(self._names()))):
                for start in range(0, batch.num_rows, PART_ROWS):
                    yield self._part(batch.slice(start, PART_ROWS))
        except (pa.ArrowInvalid, OSError) as error:
            raise RecurError(
                f"{self._path} cannot be read any further: {_without_content(error)}"
            ) from None

    def _part(self, batch: pa.RecordBatch) -> LabelPart:
        faults = _Faults(np.zeros(batch.num_rows, np.bool_))
        prefixes, names, form = self._mapping.prefixes, self._columns, self._mapping.time
        ids = {
            name: _ids(batch.column(getattr(names, name)), getattr(prefixes, name), name, faults)
            for name in ("transaction_id", "account_id", "merchant_id")
        }
        labels = _labels(batch.column(names.label), faults)
        faults.add(labels == LABEL_UNKNOWN, "label is empty")
        timestamps_ms = _epoch_ms(batch.column(names.timestamp), form, faults)
        labelled_ms = _epoch_ms(batch.column(names.labelled_at), form, faults, "labelled_at")
        weights = None
        if self._has_weights:
            weights = _weights(batch.column(names.merchant_weight), faults)
        faults.add((timestamps_ms < 0) & ~faults.bad, "timestamp is before 1970")
        labelled_ms = _labelled_ms(timestamps_ms, labelled_ms, form.zone)
        for name, times_ms in (("timestamp", timestamps_ms), ("labelled_at", labelled_ms)):
            faults.add(
                look_like_seconds(times_ms) & ~faults.bad,
                f"{name} is in 1970, which the worker takes for seconds: correct [time] unit",
            )
        faults.add(
            (labelled_ms < timestamps_ms) & ~faults.bad,
            "labelled_at is before the transaction's timestamp",
        )
        if faults.bad.any():
            what, index = min(faults.first.items(), key=lambda item: item[1])
            row = self._rows_read + 1 + index
            raise RecurError(
                f"{self._path}, row {row:,}: {what}: correct it and send the file again"
            )
        self._rows_read += batch.num_rows
        return LabelPart(
            ids["transaction_id"],
            ids["account_id"],
            ids["merchant_id"],
            labels == 1,
            timestamps_ms,
            labelled_ms,
            weights,
        )


def _picker(keep: NDArray[np.intp], count: int) -> Callable[[list[Any]], list[Any]]:
    if len(keep) == count:
        return lambda values: values
    indices = keep.tolist()
    return lambda values: [values[index] for index in indices]


# Columns


def _texts(column: pa.Array) -> list[str | None]:
    """A column as text, None where it is null."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        column = column.cast(pa.string())
    values: list[str | None] = column.to_pylist()
    return values


def _ids(column: pa.Array, prefix: str, name: str, faults: _Faults) -> list[str]:
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (
        pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    ):
        raise RecurError(
            f"{name}: its column holds {column.type}; ids must be text or whole numbers:"
            " convert the column, or map another one"
        )
    values = _texts(column)
    missing = np.fromiter((not value for value in values), np.bool_, len(values))
    faults.add(missing, f"{name} is empty")
    ids = [prefix + (value or "") for value in values]
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    faults.add(lengths > ID_MAX_CHARACTERS, f"{name} is over {ID_MAX_CHARACTERS} characters")
    return ids


def _amounts(column: pa.Array, faults: _Faults) -> NDArray[np.float64]:
    amounts = _numbers(column, "amount", faults)
    with np.errstate(invalid="ignore"):
        faults.add(~np.isfinite(amounts) & ~faults.bad, "amount is missing or not finite")
        faults.add(amounts < 0, "amount is negative")
        faults.add((amounts > AMOUNT_MAX) & np.isfinite(amounts), f"amount is over {AMOUNT_MAX:g}")
    return amounts


def _numbers(column: pa.Array, name: str, faults: _Faults) -> NDArray[np.float64]:
    """float64, NaN where null; text that is no number is a fault."""
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.string())  # Arrow's own way to a float64 is not the nearest one
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        try:
            cast = column.cast(pa.float64(), safe=False)
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
            raise RecurError(
                f"{name}: its column holds {column.type}, which is no number: map another column"
            ) from None
        return np.asarray(cast.to_numpy(zero_copy_only=False), np.float64)
    numbers = np.full(len(column), np.nan)
    wrong = np.zeros(len(column), np.bool_)
    for index, text in enumerate(column.to_pylist()):
        try:
            numbers[index] = float(text) if text else np.nan
        except ValueError:
            wrong[index] = True
    faults.add(wrong, f"{name} is not a number")
    return numbers


def _finite(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values that a worker would not take count as missing."""
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(numbers) <= AMOUNT_MAX, numbers, np.nan)


def _weights(column: pa.Array, faults: _Faults) -> list[float | None]:
    """Merchant weights; None where there is none."""
    numbers = _numbers(column, "merchant_weight", faults)
    with np.errstate(invalid="ignore"):
        faults.add((numbers < 0) | (numbers > 1), "merchant_weight is not between 0 and 1")
    return [None if value != value else value for value in numbers.tolist()]


def _labels(column: pa.Array, faults: _Faults) -> NDArray[np.int8]:
    """int8: 1 fraud, 0 legitimate, -1 unknown (null or empty)."""
    labels = np.full(len(column), LABEL_UNKNOWN, np.int8)
    wrong = np.zeros(len(column), np.bool_)
    for index, text in enumerate(_texts(column)):
        word = (text or "").strip().lower()
        if word in _FRAUD_WORDS:
            labels[index] = 1
        elif word in _LEGITIMATE_WORDS:
            labels[index] = 0
        elif word:
            wrong[index] = True
    faults.add(wrong, "label is none of 1, 0, true, false, fraud, legitimate or empty")
    return labels


# Times


def _epoch_ms(
    column: pa.Array, form: TimeForm, faults: _Faults, name: str = "timestamp"
) -> NDArray[np.int64]:
    """int64 epoch milliseconds; 0 where it is a fault."""
    kind = column.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    missing = np.asarray(pc.is_null(column).to_numpy(zero_copy_only=False), np.bool_)
    faults.add(missing, f"{name} is missing")
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return _from_arrow_times(column, form.zone)
    if text and form.unit is None:
        return _from_texts(column.to_pylist(), form.format, ZoneInfo(form.zone), faults, name)
    if form.unit is None:
        raise RecurError(
            f"{name}: its column holds {kind}; say in the column mapping what the numbers"
            ' count, as in [time] unit = "ms"'
        )
    if pa.types.is_integer(kind):  # a float64 would round nanoseconds
        whole = np.asarray(column.fill_null(0).to_numpy(zero_copy_only=False)).astype(np.int64)
        if form.unit == "s":
            return np.clip(whole, -1, TIMESTAMP_MAX_MS // 1000 + 1) * 1000
        return whole // (_PER_SECOND[form.unit] // 1000)
    numbers = _numbers(column, name, faults)
    faults.add(~np.isfinite(numbers) & ~faults.bad, f"{name} is missing or not finite")
    milliseconds = np.nan_to_num(numbers, posinf=0, neginf=0) * (1000 / _PER_SECOND[form.unit])
    return np.round(np.clip(milliseconds, -1, TIMESTAMP_MAX_MS + 1)).astype(np.int64)


def _labelled_ms(
    timestamps_ms: NDArray[np.int64], labelled_ms: NDArray[np.int64], zone: str
) -> NDArray[np.int64]:
    """Times of labels; a date without a time, on the day of the payment, is the payment's time."""
    found = labelled_ms.copy()
    for index in np.flatnonzero((labelled_ms >= 0) & (labelled_ms < timestamps_ms)).tolist():
        labelled = int(labelled_ms[index])
        local = datetime.fromtimestamp(labelled / 1000, ZoneInfo(zone))
        if labelled % DAY_MS == 0 or local.time() == datetime.min.time():
            found[index] = labelled_time(int(timestamps_ms[index]), labelled)
    return found


def _from_arrow_times(column: pa.Array, zone: str) -> NDArray[np.int64]:
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("ms"))
    if column.type.tz is None and zone != "UTC":
        column = pc.assume_timezone(column, zone, ambiguous="earliest", nonexistent="latest")
    whole = column.cast(pa.timestamp("ms", tz=column.type.tz), safe=False).cast(pa.int64())
    return np.asarray(whole.fill_null(0).to_numpy(zero_copy_only=False), np.int64)


def _from_texts(
    texts: Sequence[str | None], form: str | None, zone: ZoneInfo, faults: _Faults, name: str
) -> NDArray[np.int64]:
    milliseconds = np.zeros(len(texts), np.int64)
    wrong = np.zeros(len(texts), np.bool_)
    for index, text in enumerate(texts):
        try:
            when = _parsed(text or "", form)
            when = when.replace(tzinfo=zone) if when.tzinfo is None else when
            milliseconds[index] = round(when.timestamp() * 1000)
        except (ValueError, OverflowError):
            wrong[index] = True
    expected = f"of the form {form}" if form else "ISO 8601 (set [time] format or unit)"
    faults.add(wrong & ~faults.bad, f"{name} is not {expected}")
    return milliseconds


def _parsed(text: str, form: str | None) -> datetime:
    if form is None:
        return datetime.fromisoformat(text.strip())
    return datetime.strptime(text.strip(), form)  # noqa: DTZ007 - the caller gives it a zone


# Files


class _ParquetSource:
    def __init__(self, path: Path) -> None:
        self._file = pa.parquet.ParquetFile(path, memory_map=True, pre_buffer=False)
        self.names: list[str] = self._file.schema_arrow.names
        self.rows_total: int | None = self._file.metadata.num_rows
        self._rows_read = 0

    def batches(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        for batch in self._file.iter_batches(PART_ROWS, columns=names):
            self._rows_read += batch.num_rows
            yield batch

    def fraction_read(self) -> float:
        return self._rows_read / max(1, self.rows_total or 0)


class _CsvSource:
    """Every column is read as text, so that 007 stays 007 and a wrong value has a row number."""

    def __init__(self, path: Path) -> None:
        self.rows_total: int | None = None
        self._path = path
        self._bytes = path.stat().st_size
        self._file: Any = None
        self.names: list[str] = self._reader(None).schema.names

    def _reader(self, names: list[str] | None) -> Any:
        self._file = pa.OSFile(str(self._path))
        zipped = self._path.suffix.lower() == ".gz"
        stream = pa.CompressedInputStream(self._file, "gzip") if zipped else self._file
        stem = Path(self._path.stem) if zipped else self._path
        return pa.csv.open_csv(
            stream,
            read_options=pa.csv.ReadOptions(block_size=_CSV_BLOCK_BYTES, use_threads=False),
            parse_options=pa.csv.ParseOptions(
                delimiter="\t" if stem.suffix.lower() == ".tsv" else ","
            ),
            convert_options=pa.csv.ConvertOptions(
                include_columns=names,
                column_types=None if names is None else {name: pa.string() for name in names},
            ),
        )

    def batches(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        yield from self._reader(names)

    def fraction_read(self) -> float:
        if self._file.closed:  # its reader closes it at its end
            return 1.0
        return min(1.0, int(self._file.tell()) / max(1, self._bytes))


def _open(path: Path) -> _ParquetSource | _CsvSource:
    if not path.is_file():
        raise RecurError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            parquet = file.read(4) == b"PAR1"
        if parquet:
            return _ParquetSource(path)
        if any(suffix.lower() in (".csv", ".tsv", ".txt") for suffix in path.suffixes[-2:]):
            return _CsvSource(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise RecurError(f"{path} cannot be read: {_without_content(error)}") from None
    raise RecurError(f"{path} is neither parquet nor CSV (.csv, .csv.gz, .tsv, .txt)")


def _without_content(error: Exception) -> str:
    """A reader's message without the piece of the file that Arrow's CSV reader quotes."""
    said = " ".join(str(error).split("\n")[0].split())
    if found := _WRONG_WIDTH.search(said):
        row, expected, fields = (int(number) for number in found.groups())
        return f"row {row - 1:,} has {fields} fields where the header line has {expected}"
    if "UTF8" in said:
        return "text that is not UTF-8: convert the file to UTF-8"
    return said[:200]
