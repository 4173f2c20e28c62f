"""An account's state as bytes, and many states as columns.

The layout is fixed and little-endian (see :func:`layout`): a header, the memory of the
features, hashes of the account's last transactions, the hidden state as float16, a checksum.
A value of another format, size or checksum is invalid and counts as absent.

In memory the states of a micro-batch are these bytes, seen as columns (:class:`AccountStates`). So
a round is a few vector operations, whatever its size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.checkpoint import Checkpoint
from model.features.account import HISTORY_COLUMNS, WINDOW_DAYS, AccountHistory

STATE_FORMAT = 3
"""Version of the layout; raise it with every change of the layout."""

RECENT_IDS = 8
"""How many transaction ids a state remembers, to drop duplicates."""

_HEAD_BITS = np.uint64(0xFFFF_FFFF)
"""Format, layers and hidden size in a state's first word; its other half is the count."""


class AccountStates:
    """States of n accounts, as a table and as views of its columns.

    Args:
        table: [n] of the type :func:`layout`; the states are written to in place.
        empty: [1] the state of an unknown account.

    Attributes:
        table: the same.
        first_offset, last_offset: int64[n], offsets of the first and last applied transaction.
        last_record_ms: int64[n], CreateTime of the last record, epoch milliseconds.
        history: memory of the features; its ``count`` is 0 for an account without a state.
        recent_ids: uint64[n, RECENT_IDS], hashes of the last transactions
            (:func:`pipeline.scoring.scorer.id_hashes`); 0 is empty.
        hidden: float16[n, layers, hidden_size].
    """

    def __init__(self, table: NDArray[Any], empty: NDArray[Any]) -> None:
        self.table = table
        self._empty = empty
        self.first_offset: NDArray[np.int64] = table["first_offset"]
        self.last_offset: NDArray[np.int64] = table["last_offset"]
        self.last_record_ms: NDArray[np.int64] = table["last_record_ms"]
        self.history = AccountHistory(*[table[name] for name in HISTORY_COLUMNS])
        self.recent_ids: NDArray[np.uint64] = table["recent_ids"]
        self.hidden: NDArray[np.float16] = table["hidden"]

    def __len__(self) -> int:
        return len(self.table)

    def take(self, rows: NDArray[np.intp]) -> AccountStates:
        """Return copies of these rows in this order."""
        # ndarray.take copies 400 bytes in 12 ns; indexing copies field by field, in 150.
        return AccountStates(self.table.take(rows), self._empty)

    def put(self, rows: NDArray[np.intp], other: AccountStates) -> None:
        """Overwrite these rows with the rows of ``other``."""
        words_of(self.table)[rows] = words_of(other.table)

    def reset(self, rows: NDArray[np.intp]) -> None:
        """Reset the states of ``rows`` to those of unknown accounts."""
        self.table[rows] = self._empty


class StateCodec:
    """Conversion of values from Redis into columns and back, for one network shape.

    Args:
        layers, hidden_size: shape of the hidden state.
    """

    def __init__(self, layers: int, hidden_size: int) -> None:
        self.layers = layers
        self.hidden_size = hidden_size
        self.dtype = layout(layers, hidden_size)
        self.size_bytes = self.dtype.itemsize
        # One odd 64-bit constant for each word: a multilinear hash modulo 2^64. It detects every
        # change of a single word. It costs 30 ns a state in NumPy; zlib.crc32 costs 400.
        words = self.size_bytes // 8 - 1
        constants = hashlib.shake_128(b"recur state checksum").digest(8 * words)
        self._constants = np.frombuffer(constants, dtype="<u8") | np.uint64(1)
        self._empty = np.zeros(1, self.dtype)
        self._empty["format"] = STATE_FORMAT
        self._empty["layers"] = layers
        self._empty["hidden_size"] = hidden_size
        self._empty["first_offset"] = self._empty["last_offset"] = -1
        self._head = words_of(self._empty)[0, 0]  # its count is 0
        self._empty_bytes = self._sealed(self._empty.copy()).tobytes()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> StateCodec:
        """Make the codec of a checkpoint's states."""
        architecture = checkpoint.header.architecture
        return cls(architecture.layers, architecture.hidden_size)

    def empty(self, n: int) -> AccountStates:
        """Return the states of n unknown accounts."""
        return AccountStates(np.repeat(self._empty, n), self._empty)

    def decode(
        self, values: Sequence[bytes | None], *, check_numbers: bool = False
    ) -> tuple[AccountStates, NDArray[np.bool_], int]:
        """Decode n values into columns.

        Args:
            check_numbers: also reject numbers that no computation produces. A right checksum
                says that a worker wrote the value, so ask for this only after a failed
                computation: it doubles the time.

        Returns:
            the states, bool[n] of the valid ones, and the number of invalid ones.
        """
        size = self.size_bytes
        empty = self._empty_bytes
        blob = bytearray().join(
            [value if value is not None and len(value) == size else empty for value in values]
        )
        table = np.frombuffer(blob, self.dtype)
        words = words_of(table)
        loaded = words[:, -1] == self._checksums(words)
        loaded &= (words[:, 0] & _HEAD_BITS) == self._head
        # A state that counts no transactions is invalid, whatever else is in it.
        loaded &= table["count"] != 0
        if check_numbers:
            loaded &= _has_valid_numbers(table)
        states = AccountStates(table, self._empty)
        invalid = len(values) - values.count(None) - int(np.count_nonzero(loaded))
        if invalid:
            states.reset(np.flatnonzero(~loaded))
        return states, loaded, invalid

    def encode(self, states: AccountStates, rows: NDArray[np.intp]) -> list[bytes]:
        """Encode ``rows``, each as a value of :attr:`size_bytes`."""
        blob = self._sealed(states.take(rows).table).tobytes()
        size = self.size_bytes
        return [blob[start : start + size] for start in range(0, len(blob), size)]

    def _sealed(self, table: NDArray[Any]) -> NDArray[Any]:
        """Fill in the checksums of a table, in place."""
        words = words_of(table)
        words[:, -1] = self._checksums(words)
        return table

    def _checksums(self, words: NDArray[np.uint64]) -> NDArray[np.uint64]:
        sums: NDArray[np.uint64] = words[:, :-1] @ self._constants
        sums += self._constants[0]
        return sums


def words_of(table: NDArray[Any]) -> NDArray[np.uint64]:
    """Return a view of a table [n] as words [n, words]; the last one is the checksum."""
    return table.view("<u8").reshape(len(table), table.itemsize // 8)


def _has_valid_numbers(table: NDArray[Any]) -> NDArray[np.bool_]:
    """Check that each state's numbers are finite and in their range."""
    valid: NDArray[np.bool_] = np.isfinite(table["hidden"]).all(axis=(1, 2))
    for name in ("decayed_count", "decayed_amount", "usual_amount"):
        column = table[name].reshape(len(table), -1)
        valid &= (np.isfinite(column) & (column >= 0)).all(axis=1)
    return valid & (table["last_event_ms"] >= 0)


def layout(layers: int, hidden_size: int) -> np.dtype[Any]:
    """Return the state's fields, types and order; 400 bytes for one layer of 128."""
    windows = len(WINDOW_DAYS)
    fields: list[tuple[Any, ...]] = [
        ("format", "u1"),
        ("layers", "u1"),
        ("hidden_size", "<u2"),
        ("count", "<u4"),
        ("first_offset", "<i8"),
        ("last_offset", "<i8"),
        ("last_record_ms", "<i8"),
        ("last_event_ms", "<i8"),
        ("decayed_count", "<f4", (windows,)),
        ("decayed_amount", "<f4", (windows,)),
        ("usual_amount", "<f4"),
        ("recent_ids", "<u8", (RECENT_IDS,)),
        ("hidden", "<f2", (layers, hidden_size)),
        ("usual_count", "u1"),
    ]
    padding = -np.dtype(fields).itemsize % 8
    if padding:
        fields.append(("padding", "u1", (padding,)))
    return np.dtype([*fields, ("checksum", "<u8")])
