"""Generated transactions as tables, and as Parquet or CSV files of any size."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from model.generator.generator import GeneratorHeader
from model.generator.stream import HistoryStream
from model.generator.unroller import GeneratedTransactions
from model.whole_file import check_whole_file, whole_file
from pipeline.errors import RecurError, SettingsError
from pipeline.files.column_mapping import OPTIONAL_FIELDS

SUFFIXES = (".parquet", ".csv")
MAPPING_SUFFIX = ".mapping.toml"

PROFILE_FILE_MAX_BYTES = 1 << 16

Show = Callable[[int, float], None]
"""Called with the number of written transactions, and the share done."""


def given_profile(path: Path | None) -> dict[str, float]:
    """Read a profile file: TOML with numbers of :data:`model.generator.profiles.GIVEN`.

    Raises:
        RecurError: the file cannot be read, or a value is no number.
    """
    if path is None:
        return {}
    try:
        if path.stat().st_size > PROFILE_FILE_MAX_BYTES:
            raise RecurError(f"{path} is over {PROFILE_FILE_MAX_BYTES} bytes: it is no profile")
        return msgspec.toml.decode(path.read_bytes(), type=dict[str, float])
    except msgspec.DecodeError as error:
        raise RecurError(f"{path} is no profile: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecurError(f"{path} cannot be read: {error}") from None


def account_ids(header: GeneratorHeader, accounts: NDArray[np.int64]) -> list[str]:
    """Return the ids of accounts."""
    return [f"{header.id_mark}-A{number:08d}" for number in accounts.tolist()]


def merchant_ids(header: GeneratorHeader, merchants: NDArray[np.int64]) -> list[str]:
    """Return the ids of merchants."""
    return [f"{header.id_mark}-M{number:08d}" for number in merchants.tolist()]


def transaction_ids(header: GeneratorHeader, first: int, count: int) -> list[str]:
    """Return the ids of transactions, numbered over the whole stream."""
    return [f"{header.id_mark}-T{number:010d}" for number in range(first, first + count)]


def field_values(
    header: GeneratorHeader, part: GeneratedTransactions
) -> dict[str, list[str | None] | list[float | None]]:
    """Return the values of the extra fields by name; None is missing."""
    found: dict[str, list[str | None] | list[float | None]] = {}
    for place, field in enumerate(header.fields):
        classes = part.fields[:, place].astype(np.int64)
        if field.is_numeric:
            numbers = field.numbers(classes, part.shares[:, place].astype(np.float64))
            found[field.name] = [None if v != v else v for v in numbers.tolist()]
        else:
            texts = [*field.texts, None]
            found[field.name] = [texts[code] for code in classes.tolist()]
    return found


class GeneratedColumns(NamedTuple):
    """Columns of transactions, in the order of :func:`pipeline.replay.producer.encode_block`."""

    transaction_ids: list[str]
    account_ids: list[str]
    merchant_ids: list[str]
    amounts: list[float]
    currencies: list[str]
    times_ms: list[int]


def columns_of(
    header: GeneratorHeader, part: GeneratedTransactions, first: int
) -> GeneratedColumns:
    """Return the columns of transactions, the first of which has this number."""
    return GeneratedColumns(
        transaction_ids(header, first, len(part)),
        account_ids(header, part.account),
        merchant_ids(header, part.merchant),
        part.amount.tolist(),
        [header.currency] * len(part),
        part.time_ms.tolist(),
    )


def tables(stream: HistoryStream) -> Iterator[pa.Table]:
    """Yield the transactions as tables, in order of time."""
    header, first = stream.generator.header, 0
    for part in stream.parts():
        yield _table(header, part, first)
        first += len(part)


def write_generated(stream: HistoryStream, output: Path, show: Show) -> int:
    """Write the file completely or not at all; return the number of transactions.

    Beside it, ``OUTPUT.mapping.toml`` gets the column mapping of the file.

    Raises:
        SettingsError: the name has another ending.
        RecurError: the file cannot be written.
    """
    _require_suffix(output)
    written = 0
    try:
        with whole_file(output) as partial:
            with contextlib.ExitStack() as stack:
                writer: Any = None
                for table in tables(stream):
                    if writer is None:
                        writer = stack.enter_context(_writer(output, partial, table.schema))
                    writer.write_table(table)
                    written += table.num_rows
                    show(written, stream.done)
            if not written:
                raise RecurError("no transaction was generated: raise --accounts or --days")
            mapping = output.with_name(output.name + MAPPING_SUFFIX)
            mapping.write_text(mapping_text(stream.generator.header), encoding="utf-8")
    except OSError as error:  # pyarrow's errors of files are OSErrors
        raise RecurError(f"cannot write {output}: {error.strerror or error}") from error
    return written


def _require_suffix(output: Path) -> None:
    if output.suffix not in SUFFIXES:
        raise SettingsError(f"{output} must end with {' or '.join(SUFFIXES)}")


def check_output(output: Path) -> None:
    """Check that a file can be written there, before the work begins.

    Raises:
        SettingsError: the name has another ending.
        RecurError: the folder cannot be written.
    """
    _require_suffix(output)
    check_folder(output)


def check_folder(output: Path) -> None:
    """Check that the folder of a file can be written.

    Raises:
        RecurError: it cannot.
    """
    try:
        check_whole_file(output)
    except OSError as error:
        raise RecurError(f"cannot write {output}: {error.strerror or error}") from error


def mapping_text(header: GeneratorHeader) -> str:
    """Return the column mapping of a generated file, in TOML."""
    names = ("transaction_id", "account_id", "merchant_id", "amount", "timestamp", "currency")
    lines = ["# Column mapping of a file of `recur generate`.", "[columns]"]
    lines += [f'{name} = "{name}"' for name in (*names, "label")]
    lines += [f'{f.name} = "{f.name}"' for f in header.fields if f.name in OPTIONAL_FIELDS]
    lines += ["", "[fields]"]
    for kind, wanted in (("numeric", True), ("categorical", False)):
        chosen = [
            _quoted(f.name)
            for f in header.fields
            if f.is_numeric == wanted and f.name not in OPTIONAL_FIELDS
        ]
        lines.append(f"{kind} = [{', '.join(chosen)}]")
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _table(header: GeneratorHeader, part: GeneratedTransactions, first: int) -> pa.Table:
    def coded(ids: Callable[..., list[str]], numbers: NDArray[np.int64]) -> pa.Array:
        codes, place = np.unique(numbers, return_inverse=True)
        return pa.array(ids(header, codes)).take(pa.array(place))

    columns = {
        "transaction_id": pa.array(transaction_ids(header, first, len(part))),
        "account_id": coded(account_ids, part.account),
        "merchant_id": coded(merchant_ids, part.merchant),
        "amount": pa.array(part.amount),
        "currency": pa.array([header.currency]).take(pa.array(np.zeros(len(part), np.int64))),
        "timestamp": pa.array(part.time_ms).cast(pa.timestamp("ms", "UTC")),
        "label": pa.array(part.is_fraud.astype(np.int8)),
    }
    for name, values in field_values(header, part).items():
        is_numeric = next(f.is_numeric for f in header.fields if f.name == name)
        columns[name] = pa.array(values, pa.float64() if is_numeric else pa.string())
    return pa.table(columns)


def _writer(output: Path, partial: Path, schema: pa.Schema) -> Any:
    if output.suffix == ".csv":
        return pa.csv.CSVWriter(partial, schema)
    return pa.parquet.ParquetWriter(partial, schema, compression="zstd")
