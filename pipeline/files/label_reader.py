"""Labels from a person's Parquet or CSV file, some thousand rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import RecurError
from pipeline.files.column_mapping import LabelMapping
from pipeline.files.parsing import (
    LABEL_UNKNOWN,
    RowFaults,
    correct_label_times,
    parse_ids,
    parse_labels,
    parse_times,
    parse_weights,
)
from pipeline.files.sources import PART_ROWS, open_source, without_content
from pipeline.timestamps import look_like_seconds


@dataclass(frozen=True, slots=True)
class LabelPart:
    """Some labels in file order; all columns have the same length."""

    transaction_ids: list[str]
    account_ids: list[str]
    merchant_ids: list[str]
    is_fraud: NDArray[np.bool_]
    timestamps_ms: NDArray[np.int64]
    labelled_ms: NDArray[np.int64]
    merchant_weights: list[float | None] | None = None
    """Weights from 0 to 1, None in rows without one. None: the file has no such column."""

    def __len__(self) -> int:
        return len(self.transaction_ids)


class LabelFile:
    """A Parquet or CSV file of labels with its column mapping.

    Raises:
        RecurError: the file or a column is missing, or the file is of another kind. While
            reading: a row is not a label; the message has its number.
    """

    def __init__(self, path: Path, mapping: LabelMapping) -> None:
        self._path = path
        self._mapping = mapping
        self._columns = mapping.columns
        self._source = open_source(path)
        self._rows_read = 0
        missing = [name for name in self._column_names() if name not in self._source.names]
        if missing:
            raise RecurError(
                f"{path} has no column {', '.join(missing)}; its columns are"
                f" {', '.join(self._source.names)}: name yours in a column mapping (--columns), or"
                " make labels from a file of transactions with --from-transactions"
            )

    def _column_names(self) -> list[str]:
        named = {name: getattr(self._columns, name) for name in self._columns.__struct_fields__}
        if named["merchant_weight"] == "merchant_weight" and not self._has_weights:
            del named["merchant_weight"]  # the column is optional
        return list(named.values())

    @property
    def _has_weights(self) -> bool:
        return self._columns.merchant_weight in self._source.names

    @property
    def fraction_read(self) -> float:
        """Share of the file that has been read, 0 to 1."""
        return self._source.fraction_read()

    def parts(self) -> Iterator[LabelPart]:
        """Read the labels in file order."""
        try:
            for batch in self._source.batches(sorted(set(self._column_names()))):
                for start in range(0, batch.num_rows, PART_ROWS):
                    yield self._part(batch.slice(start, PART_ROWS))
        except (pa.ArrowInvalid, OSError) as error:
            raise RecurError(
                f"{self._path} cannot be read to its end: {without_content(error)}"
            ) from None

    def _part(self, batch: pa.RecordBatch) -> LabelPart:
        faults = RowFaults(np.zeros(batch.num_rows, np.bool_))
        prefixes, names, form = self._mapping.prefixes, self._columns, self._mapping.time
        ids = {
            name: parse_ids(
                batch.column(getattr(names, name)), getattr(prefixes, name), name, faults
            )
            for name in ("transaction_id", "account_id", "merchant_id")
        }
        labels = parse_labels(batch.column(names.label), faults)
        faults.add(labels == LABEL_UNKNOWN, "label is empty")
        timestamps_ms = parse_times(batch.column(names.timestamp), form, faults)
        labelled_ms = parse_times(batch.column(names.labelled_at), form, faults, "labelled_at")
        weights = None
        if self._has_weights:
            weights = parse_weights(batch.column(names.merchant_weight), faults)
        faults.add((timestamps_ms < 0) & ~faults.bad, "timestamp is before 1970")
        labelled_ms = correct_label_times(timestamps_ms, labelled_ms, form.zone)
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
