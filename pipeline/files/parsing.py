"""Values of a file's columns: texts, ids, amounts, labels and times, and the rows with faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from model.transaction import AMOUNT_MAX, ID_MAX_CHARACTERS, TIMESTAMP_MAX_MS
from model.units import DAY_MS
from pipeline.errors import RecurError
from pipeline.files.column_mapping import TimeForm
from pipeline.timestamps import labelled_time

LABEL_UNKNOWN = -1

_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_FRAUD_WORDS = {"1", "1.0", "true", "t", "yes", "y", "fraud"}
_LEGITIMATE_WORDS = {"0", "0.0", "false", "f", "no", "n", "legitimate", "legit", "genuine"}

Bools = NDArray[np.bool_]


@dataclass(slots=True)
class RowFaults:
    """Faulty rows of one part, and the faults found in them."""

    bad: Bools
    first: dict[str, int] = field(default_factory=dict)  # fault -> index of its first row

    def add(self, wrong: Bools, what: str) -> None:
        """Note a fault of some rows."""
        if wrong.any():
            self.first.setdefault(what, int(np.argmax(wrong)))
            self.bad |= wrong


def texts_of(column: pa.Array) -> list[str | None]:
    """Read a column as text; None: null."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        column = column.cast(pa.string())
    values: list[str | None] = column.to_pylist()
    return values


def parse_ids(column: pa.Array, prefix: str, name: str, faults: RowFaults) -> list[str]:
    """Read a column of ids and put the prefix before each."""
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
    values = texts_of(column)
    missing = np.fromiter((not value for value in values), np.bool_, len(values))
    faults.add(missing, f"{name} is empty")
    ids = [prefix + (value or "") for value in values]
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    faults.add(lengths > ID_MAX_CHARACTERS, f"{name} is over {ID_MAX_CHARACTERS} characters")
    return ids


def parse_amounts(column: pa.Array, faults: RowFaults) -> NDArray[np.float64]:
    """Read a column of amounts; a missing, negative or too large one is a fault."""
    amounts = parse_numbers(column, "amount", faults)
    with np.errstate(invalid="ignore"):
        faults.add(~np.isfinite(amounts) & ~faults.bad, "amount is missing or not finite")
        faults.add(amounts < 0, "amount is negative")
        faults.add((amounts > AMOUNT_MAX) & np.isfinite(amounts), f"amount is over {AMOUNT_MAX:g}")
    return amounts


def parse_numbers(column: pa.Array, name: str, faults: RowFaults) -> NDArray[np.float64]:
    """Read a column as float64; NaN: null. Text that is not a number is a fault."""
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.string())  # Arrow's cast to float64 does not round to nearest
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        try:
            cast = column.cast(pa.float64(), safe=False)
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
            raise RecurError(
                f"{name}: its column holds {column.type}, which is not a number: map another column"
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


def finite_or_nan(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Replace values that a worker would reject by NaN: they count as missing."""
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(numbers) <= AMOUNT_MAX, numbers, np.nan)


def parse_weights(column: pa.Array, faults: RowFaults) -> list[float | None]:
    """Read a column of merchant weights; None: missing."""
    numbers = parse_numbers(column, "merchant_weight", faults)
    with np.errstate(invalid="ignore"):
        faults.add((numbers < 0) | (numbers > 1), "merchant_weight is not between 0 and 1")
    return [None if value != value else value for value in numbers.tolist()]


def parse_labels(column: pa.Array, faults: RowFaults) -> NDArray[np.int8]:
    """Read a column of labels as int8: 1 fraud, 0 legitimate, -1 unknown (null or empty)."""
    labels = np.full(len(column), LABEL_UNKNOWN, np.int8)
    wrong = np.zeros(len(column), np.bool_)
    for index, text in enumerate(texts_of(column)):
        word = (text or "").strip().lower()
        if word in _FRAUD_WORDS:
            labels[index] = 1
        elif word in _LEGITIMATE_WORDS:
            labels[index] = 0
        elif word:
            wrong[index] = True
    faults.add(wrong, "label must be 1, 0, true, false, fraud, legitimate or empty")
    return labels


def parse_times(
    column: pa.Array, form: TimeForm, faults: RowFaults, name: str = "timestamp"
) -> NDArray[np.int64]:
    """Read a column of times as int64 epoch milliseconds; 0 in faulty rows."""
    kind = column.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    missing = np.asarray(pc.is_null(column).to_numpy(zero_copy_only=False), np.bool_)
    faults.add(missing, f"{name} is missing")
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return _arrow_times_ms(column, form.zone)
    if text and form.unit is None:
        return _parse_text_times(column.to_pylist(), form.format, ZoneInfo(form.zone), faults, name)
    if form.unit is None:
        raise RecurError(
            f"{name}: its column holds {kind}; write the unit of the numbers in the column"
            ' mapping, as in [time] unit = "ms"'
        )
    if pa.types.is_integer(kind):  # a float64 would round nanoseconds
        whole = np.asarray(column.fill_null(0).to_numpy(zero_copy_only=False)).astype(np.int64)
        if form.unit == "s":
            return np.clip(whole, -1, TIMESTAMP_MAX_MS // 1000 + 1) * 1000
        return whole // (_PER_SECOND[form.unit] // 1000)
    numbers = parse_numbers(column, name, faults)
    faults.add(~np.isfinite(numbers) & ~faults.bad, f"{name} is missing or not finite")
    milliseconds = np.nan_to_num(numbers, posinf=0, neginf=0) * (1000 / _PER_SECOND[form.unit])
    return np.round(np.clip(milliseconds, -1, TIMESTAMP_MAX_MS + 1)).astype(np.int64)


def correct_label_times(
    timestamps_ms: NDArray[np.int64], labelled_ms: NDArray[np.int64], zone: str
) -> NDArray[np.int64]:
    """Replace label times that are only the date of the payment by the payment's time."""
    found = labelled_ms.copy()
    for index in np.flatnonzero((labelled_ms >= 0) & (labelled_ms < timestamps_ms)).tolist():
        labelled = int(labelled_ms[index])
        local = datetime.fromtimestamp(labelled / 1000, ZoneInfo(zone))
        if labelled % DAY_MS == 0 or local.time() == datetime.min.time():
            found[index] = labelled_time(int(timestamps_ms[index]), labelled)
    return found


def _arrow_times_ms(column: pa.Array, zone: str) -> NDArray[np.int64]:
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("ms"))
    if column.type.tz is None and zone != "UTC":
        column = pc.assume_timezone(column, zone, ambiguous="earliest", nonexistent="latest")
    whole = column.cast(pa.timestamp("ms", tz=column.type.tz), safe=False).cast(pa.int64())
    return np.asarray(whole.fill_null(0).to_numpy(zero_copy_only=False), np.int64)


def _parse_text_times(
    texts: Sequence[str | None], form: str | None, zone: ZoneInfo, faults: RowFaults, name: str
) -> NDArray[np.int64]:
    milliseconds = np.zeros(len(texts), np.int64)
    wrong = np.zeros(len(texts), np.bool_)
    for index, text in enumerate(texts):
        try:
            when = _parse_time(text or "", form)
            when = when.replace(tzinfo=zone) if when.tzinfo is None else when
            milliseconds[index] = round(when.timestamp() * 1000)
        except (ValueError, OverflowError):
            wrong[index] = True
    expected = f"of the form {form}" if form else "ISO 8601 (set [time] format or unit)"
    faults.add(wrong & ~faults.bad, f"{name} is not {expected}")
    return milliseconds


def _parse_time(text: str, form: str | None) -> datetime:
    if form is None:
        return datetime.fromisoformat(text.strip())
    return datetime.strptime(text.strip(), form)  # noqa: DTZ007 - the caller adds the zone
