"""Labelled transactions on disk, the input of a training; the disk limits their number.

    with DatasetWriter(folder, numeric=("age",), categorical=("category",)) as writer:
        writer.append(Rows(...))     # some thousand at a time, in any order
        dataset = writer.finish("EUR")

Each column is a file mapped into memory, so the operating system loads only the parts in use.
:meth:`DatasetWriter.finish` takes up to 40 bytes of memory for each transaction, for the order and
the keys to sort. A training takes as much, for the order by account and the scores.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from model.units import DAY_MS

UNKNOWN, LEGITIMATE, FRAUD = -1, 0, 1
"""Labels."""

MISSING = -1
"""Code of a missing categorical value, or of a text over :data:`TEXTS_MAX`."""

TEXTS_MAX = 100_000
"""Most different texts of a categorical field; the rest counts as missing."""

TEXT_MAX_CHARACTERS = 64
"""Longest text, in training and in the worker; a longer one counts as missing."""


_CHUNK_ROWS = 1 << 18
_DESCRIPTION = "dataset.json"
_COLUMNS: dict[str, Any] = {
    "account": np.uint64,
    "merchant": np.uint64,
    "amount": np.float64,
    "timestamp_ms": np.int64,
    "label": np.int8,
    "scenario": np.int8,
    "key": np.uint64,
}
_CODED = ("account", "merchant")  # keys of ids, which become codes of 0, 1, 2 ...

Int8 = NDArray[np.int8]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Keys = NDArray[np.uint64]


class DatasetError(ValueError):
    """The transactions cannot be trained on; the message says why and what to do."""


@dataclass(frozen=True)
class Dataset:
    """N labelled transactions in order of time, without repeats.

    Attributes:
        account, merchant: [N] codes of 0, 1, 2 ...
        amount: [N] in ``currency``.
        timestamp_ms: [N] ascending.
        label: [N] :data:`FRAUD`, :data:`LEGITIMATE` or :data:`UNKNOWN`.
        scenario: [N] kind of fraud; 0 if legitimate or unknown.
        numeric: extra fields by name, [N]; NaN is missing.
        categorical: extra fields by name, [N] places in ``texts``, or :data:`MISSING`.
        texts: texts of each categorical field.
        currency: ISO 4217.
        unsorted: rows of the source that were earlier than the row before; they were sorted.
        repeated: repeated rows of the source; they were dropped.
    """

    account: Int32
    merchant: Int32
    amount: Float64
    timestamp_ms: Int64
    label: Int8
    scenario: Int8
    numeric: dict[str, Float32] = field(default_factory=dict)
    categorical: dict[str, Int32] = field(default_factory=dict)
    texts: dict[str, Sequence[str]] = field(default_factory=dict)
    currency: str = "EUR"
    unsorted: int = 0
    repeated: int = 0

    def __len__(self) -> int:
        return len(self.account)

    @property
    def is_fraud(self) -> NDArray[np.bool_]:
        """[N] whether it is fraud; without a label it counts as legitimate."""
        return np.asarray(self.label == FRAUD)

    @property
    def is_labelled(self) -> NDArray[np.bool_]:
        """[N] whether the label is known."""
        return np.asarray(self.label != UNKNOWN)

    @property
    def day(self) -> Int64:
        """[N] whole UTC days since the day of the first transaction."""
        days: Int64 = self.timestamp_ms // DAY_MS
        return np.asarray(days - days[0])

    def columns(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield every column with its name."""
        for name in ("account", "merchant", "amount", "timestamp_ms", "label", "scenario"):
            yield name, getattr(self, name)
        yield from self.numeric.items()
        yield from self.categorical.items()

    def digest(self) -> str:
        """Return 12 hex digits of the SHA-256 of all columns."""
        digest = hashlib.sha256()
        for name, column in self.columns():
            digest.update(f"{name}{column.dtype.str}".encode())
            for begin in range(0, len(column), _CHUNK_ROWS):
                digest.update(np.ascontiguousarray(column[begin : begin + _CHUNK_ROWS]).tobytes())
        for name, texts in self.texts.items():
            digest.update("\n".join((name, *texts)).encode())
        return digest.hexdigest()[:12]

    @classmethod
    def open(cls, folder: Path) -> Dataset:
        """Open a finished data set of a :class:`DatasetWriter`.

        Raises:
            DatasetError: the folder is unfinished, or parts of it are missing.
        """
        try:
            description = msgspec.json.decode(
                (folder / _DESCRIPTION).read_bytes(), type=_Description
            )
            return _opened(folder, description)
        except (OSError, ValueError, msgspec.DecodeError) as error:
            raise DatasetError(f"{folder} holds no whole dataset: {error}") from error


@dataclass(frozen=True)
class Rows:
    """Transactions as a source reads them: n in every column, as in :class:`Dataset`.

    Attributes:
        account, merchant: [n] keys (:func:`text_keys`) of the ids.
        categorical: [n] texts; None is missing.
        key: [n] keys of the transaction ids, which identify repeats. Without them rows are
            repeats if all their columns are equal.
    """

    account: Keys
    merchant: Keys
    amount: Float64
    timestamp_ms: Int64
    label: Int8
    scenario: Int8
    numeric: dict[str, Float64] = field(default_factory=dict)
    categorical: dict[str, list[str | None]] = field(default_factory=dict)
    key: Keys | None = None


def text_keys(texts: Sequence[str]) -> Keys:
    """Return 64-bit keys of ids; equal texts have equal keys.

    >>> text_keys(["a", "b", "a"]).tolist()[0] == text_keys(["a"]).tolist()[0]
    True
    """
    of = xxhash.xxh3_64_intdigest
    return np.fromiter((of(text.encode()) for text in texts), np.uint64, len(texts))


class _Texts:
    """Codes of the texts of a categorical field, in order of appearance."""

    def __init__(self) -> None:
        self.code: dict[str | None, int] = {None: MISSING}

    def codes(self, texts: list[str | None]) -> Int32:
        code = self.code
        for text in dict.fromkeys(texts):
            if text not in code and len(code) <= TEXTS_MAX:
                code[text] = len(code) - 1 if len(text or "") <= TEXT_MAX_CHARACTERS else MISSING
        return np.fromiter((code.get(text, MISSING) for text in texts), np.int32, len(texts))

    def texts(self) -> list[str]:
        """Return the texts by code."""
        found = {code: text for text, code in self.code.items() if text is not None}
        return [found.get(code, "") for code in range(len(self.code) - 1)]


class _Description(msgspec.Struct, frozen=True):
    rows: int
    currency: str
    numeric: list[str]
    categorical: list[str]
    texts: list[list[str]]
    unsorted: int
    repeated: int


class DatasetWriter:
    """Writer of a :class:`Dataset` into an empty folder; an unfinished one is removed.

    Raises:
        DatasetError: the folder cannot be written, or the disk is full.
    """

    def __init__(
        self, folder: Path, numeric: Sequence[str] = (), categorical: Sequence[str] = ()
    ) -> None:
        self._folder = folder
        self._numeric, self._categorical = list(numeric), list(categorical)
        self._texts = {name: _Texts() for name in categorical}
        self._rows = 0
        self._unsorted = 0
        self._last_ms = -(2**63)
        self._finished = False
        self._kinds = _kinds(len(self._numeric), len(self._categorical))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._files = {name: (folder / name).open("wb") for name in self._kinds}
        except OSError as error:
            raise _cannot_write(folder, error) from error

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()
        if not self._finished:
            shutil.rmtree(self._folder, ignore_errors=True)

    def append(self, rows: Rows) -> None:
        """Write some transactions."""
        columns: dict[str, NDArray[Any]] = {
            name: getattr(rows, name) for name in _COLUMNS if name != "key"
        }
        for number, name in enumerate(self._numeric):
            columns[f"numeric-{number}"] = rows.numeric[name]
        for number, name in enumerate(self._categorical):
            columns[f"categorical-{number}"] = self._texts[name].codes(rows.categorical[name])
        columns["key"] = _mixed(list(columns.values())) if rows.key is None else rows.key
        times = rows.timestamp_ms
        if len(times):
            self._unsorted += int(times[0] < self._last_ms) + int((times[1:] < times[:-1]).sum())
            self._last_ms = int(times[-1])
        try:
            for name, column in columns.items():
                self._files[name].write(column.astype(self._kinds[name]).tobytes())
        except OSError as error:
            raise _cannot_write(self._folder, error) from error
        self._rows += len(times)

    def finish(self, currency: str) -> Dataset:
        """Sort by time, drop repeats and open the data set.

        Rows of the same time keep their order.

        Raises:
            DatasetError: there are no transactions, or the disk is full.
        """
        if not self._rows:
            raise DatasetError("there are no transactions to train on")
        try:
            for file in self._files.values():
                file.close()
            kept = self._order()
            for name in self._kinds:
                self._rewrite(name, kept)
            (self._folder / "key").unlink()
            description = _Description(
                rows=self._rows if kept is None else len(kept),
                currency=currency,
                numeric=self._numeric,
                categorical=self._categorical,
                texts=[self._texts[name].texts() for name in self._categorical],
                unsorted=self._unsorted,
                repeated=0 if kept is None else self._rows - len(kept),
            )
            (self._folder / _DESCRIPTION).write_bytes(msgspec.json.encode(description))
        except OSError as error:
            raise _cannot_write(self._folder, error) from error
        self._finished = True
        return _opened(self._folder, description)

    def _column(self, name: str) -> NDArray[Any]:
        return np.asarray(np.memmap(self._folder / name, self._kinds[name], mode="r"))

    def _order(self) -> Int64 | None:
        """Return the rows in order of time without repeats; None if they already are."""
        first = np.unique(self._column("key"), return_index=True)[1]
        if len(first) == self._rows and not self._unsorted:
            return None
        first.sort()
        return np.asarray(first[np.argsort(self._column("timestamp_ms")[first], kind="stable")])

    def _rewrite(self, name: str, kept: Int64 | None) -> None:
        coded = name in _CODED
        if name == "key" or (kept is None and not coded):
            return
        column = self._column(name)
        if coded:
            column = np.unique(column, return_inverse=True)[1].astype(np.int32)
        rows = np.arange(len(column)) if kept is None else kept
        partial = self._folder / f"{name}.partial"
        with partial.open("wb") as file:
            for begin in range(0, len(rows), _CHUNK_ROWS):
                file.write(column[rows[begin : begin + _CHUNK_ROWS]].tobytes())
        partial.replace(self._folder / name)


def _kinds(numeric: int, categorical: int) -> dict[str, Any]:
    """Return the type of the values in each file, by name, while they are written."""
    return (
        _COLUMNS
        | {f"numeric-{number}": np.float32 for number in range(numeric)}
        | {f"categorical-{number}": np.int32 for number in range(categorical)}
    )


def _opened(folder: Path, description: _Description) -> Dataset:
    kinds = _kinds(len(description.numeric), len(description.categorical)) | dict.fromkeys(
        _CODED, np.int32
    )

    def column(name: str) -> NDArray[Any]:
        return np.asarray(
            np.memmap(folder / name, kinds[name], mode="r", shape=(description.rows,))
        )

    columns = {name: column(name) for name in _COLUMNS if name != "key"}
    return Dataset(
        **columns,
        numeric={name: column(f"numeric-{n}") for n, name in enumerate(description.numeric)},
        categorical={
            name: column(f"categorical-{n}") for n, name in enumerate(description.categorical)
        },
        texts=dict(zip(description.categorical, description.texts, strict=True)),
        currency=description.currency,
        unsorted=description.unsorted,
        repeated=description.repeated,
    )


def _mixed(columns: list[NDArray[Any]]) -> Keys:
    """Return a 64-bit key of each row over all columns (chained finalizers of splitmix64)."""
    key = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        wide = column.astype(np.float64) if column.dtype.kind == "f" else column.astype(np.int64)
        key = (key ^ wide.view(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        key ^= key >> np.uint64(31)
    return key


def _cannot_write(folder: Path, error: OSError) -> DatasetError:
    return DatasetError(f"cannot write in {folder}: {error.strerror or error}; make room there")
