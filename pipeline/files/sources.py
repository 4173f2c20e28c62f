"""Parquet and CSV files as batches of rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from pipeline.errors import RecurError

PART_ROWS = 8192
"""Rows read at once."""

_CSV_BLOCK_BYTES = 1 << 20
_WRONG_WIDTH = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")


class ParquetSource:
    """A Parquet file; it knows its number of rows."""

    def __init__(self, path: Path) -> None:
        self._file = pa.parquet.ParquetFile(path, memory_map=True, pre_buffer=False)
        self.names: list[str] = self._file.schema_arrow.names
        self.rows_total: int | None = self._file.metadata.num_rows
        self._rows_read = 0

    def batches(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        """Read these columns, a batch at a time."""
        for batch in self._file.iter_batches(PART_ROWS, columns=names):
            self._rows_read += batch.num_rows
            yield batch

    def fraction_read(self) -> float:
        """Share of the file that has been read, 0 to 1."""
        return self._rows_read / max(1, self.rows_total or 0)


class CsvSource:
    """A CSV file, read as text: 007 stays 007, and a wrong value has a row number."""

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
        """Read these columns, a batch at a time."""
        yield from self._reader(names)

    def fraction_read(self) -> float:
        """Share of the file that has been read, 0 to 1."""
        if self._file.closed:  # the reader closes it at the end
            return 1.0
        return min(1.0, int(self._file.tell()) / max(1, self._bytes))


def open_source(path: Path) -> ParquetSource | CsvSource:
    """Open a Parquet or CSV file, recognized by its content or its name.

    Raises:
        RecurError: the file is missing, unreadable or of another kind.
    """
    if not path.is_file():
        raise RecurError(f"there is no file {path}: check its path")
    try:
        with path.open("rb") as file:
            parquet = file.read(4) == b"PAR1"
        if parquet:
            return ParquetSource(path)
        if any(suffix.lower() in (".csv", ".tsv", ".txt") for suffix in path.suffixes[-2:]):
            return CsvSource(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise RecurError(f"{path} cannot be read: {without_content(error)}") from None
    raise RecurError(
        f"{path} is neither Parquet nor CSV (.csv, .csv.gz, .tsv, .txt): convert it to one of them"
    )


def without_content(error: Exception) -> str:
    """Give an Arrow error's message without the content of the file that it quotes."""
    message = " ".join(str(error).split("\n")[0].split())
    if found := _WRONG_WIDTH.search(message):
        row, expected, fields = (int(number) for number in found.groups())
        return f"row {row - 1:,} has {fields} fields where the header line has {expected}"
    if "UTF8" in message:
        return "text that is not UTF-8: convert the file to UTF-8"
    return message[:200]
