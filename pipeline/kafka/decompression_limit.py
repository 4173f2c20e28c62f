"""A limit on the memory of fetched batches, however well they are compressed.

A fetch is bounded by the bytes that travel. Zeros compress a thousand to one, so a batch of a few
hundred kilobytes may fill a worker's memory. aiokafka decompresses a batch whole. This module
measures the batch first, in a buffer of bounded size. It does not read a batch that is too large:
one record takes its place, whose value (:class:`RefusedBatch`) says where the batch is.

Importing this module limits all consumers of aiokafka in the process.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from time import monotonic
from typing import Any

import msgspec
from aiokafka import codec as aiokafka_codec
from aiokafka.consumer import fetcher
from aiokafka.record.memory_records import MemoryRecords

from pipeline.errors import RejectedError

BATCH_MAX_BYTES = 32 << 20
"""Largest uncompressed batch. Producers send 1 MiB or less, which compresses to a tenth."""

POLL_MAX_BYTES = 32 << 20
"""Bytes that one poll decompresses. It leaves the rest for the next fetch."""

LOG_INTERVAL_SECONDS = 10.0
"""Time between two log lines about refused batches."""

cramjam: Any = aiokafka_codec.cramjam  # what aiokafka decompresses with
GZIP, SNAPPY, LZ4, ZSTD = 1, 2, 3, 4

_FIRST_TRY_BYTES = 1 << 16
_LIKELY_RATIO = 16
_PIECE_BYTES = 1 << 18
_XERIAL = b"\x82SNAPPY\x00"
_XERIAL_HEADER_BYTES = 16
_LENGTH = struct.Struct(">i")
_HEADER_BYTES = 61  # of a batch of version 2
_MAGIC_AT, _CODEC_AT, _COUNT_AT = 16, 22, 57
_LEGACY_CODEC_AT = 17

log = logging.getLogger(__name__)


class RefusedBatch(bytes):
    """The value of a record in place of a refused batch: JSON that says where the batch is.

    The type marks it, so that no producer can send one.
    """

    records: int
    first_offset: int
    last_offset: int

    @classmethod
    def of(cls, first_offset: int, last_offset: int, records: int, compressed: int) -> RefusedBatch:
        """Describe a batch by its offsets, its number of records and its compressed bytes."""
        where = {
            "refused_batch": {
                "first_offset": first_offset,
                "last_offset": last_offset,
                "records": records,
                "compressed_bytes": compressed,
                "limit_bytes": BATCH_MAX_BYTES,
            }
        }
        value = cls(msgspec.json.encode(where))
        value.records = records
        value.first_offset, value.last_offset = first_offset, last_offset
        return value

    def __str__(self) -> str:
        return (
            f"a compressed batch of {self.records} records, offsets {self.first_offset} to"
            f" {self.last_offset}, is over {BATCH_MAX_BYTES >> 20} MiB and is not read: have the"
            " producer send its records again in smaller batches"
        )


def records_in(value: bytes | None) -> int:
    """Count the records that a value stands for."""
    return value.records if isinstance(value, RefusedBatch) else 1


def refuse_batch(value: bytes | None) -> None:
    """Reject a record that stands for a refused batch.

    Raises:
        RejectedError: the value is such a record's.
    """
    if isinstance(value, RefusedBatch):
        raise RejectedError("batch_too_large", str(value))


class PollBudget:
    """The bytes that may be decompressed within the block: :data:`POLL_MAX_BYTES`."""

    def __enter__(self) -> None:
        self.left = POLL_MAX_BYTES
        _budget.set(self)

    def __exit__(self, *error: object) -> None:
        _budget.set(None)  # no reset(): a dropped poll may end in another context


_budget: ContextVar[PollBudget | None] = ContextVar("budget", default=None)


def uncompressed_size(codec: int, payload: memoryview, limit: int) -> int | None:
    """Measure compressed records without holding more than ``limit`` bytes.

    Returns:
        their uncompressed size, or None if it is over ``limit``. Damaged records have size 0:
        aiokafka reports them when it decompresses them.
    """
    if codec == GZIP:
        return _gzip_size(payload, limit)
    if codec == SNAPPY:
        size = _snappy_size(payload)
        return size if size <= limit else None
    if codec == LZ4:
        return _size_by(cramjam.lz4.decompress_into, payload, limit)
    if codec == ZSTD:
        return _size_by(cramjam.zstd.decompress_into, payload, limit)
    return 0


def _size_by(decompress_into: Any, payload: memoryview, limit: int) -> int | None:
    data = payload.tobytes()
    likely = min(limit, _FIRST_TRY_BYTES + _LIKELY_RATIO * len(data))
    for room in dict.fromkeys((likely, limit)):
        try:
            return int(decompress_into(data, bytearray(room)))
        except cramjam.DecompressionError as error:
            if "whole buffer" not in str(error):
                return 0
    return None


def _gzip_size(payload: memoryview, limit: int) -> int | None:
    size = 0
    data: bytes = payload.tobytes()
    while data:
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            try:
                piece = len(member.decompress(data, _PIECE_BYTES))
            except zlib.error:
                return size
            size += piece
            if size > limit:
                return None
            data = member.unconsumed_tail
            if not piece and not data and not member.eof:
                return size  # the data is truncated
        data = member.unused_data
    return size


def _snappy_size(payload: memoryview) -> int:
    """Add up the sizes that the blocks declare. A block that declares too little is damaged."""
    if payload[: len(_XERIAL)] != _XERIAL:
        return _varint(payload)
    size, at = 0, _XERIAL_HEADER_BYTES
    while at + _LENGTH.size <= len(payload):
        (length,) = _LENGTH.unpack_from(payload, at)
        at += _LENGTH.size
        size += _varint(payload[at : at + max(0, length)])
        at += max(0, length)
    return size


def _varint(data: memoryview) -> int:
    number = 0
    for position, byte in enumerate(data[:5]):
        number |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            break
    return number


class BoundedRecords:
    """A bounded replacement of :class:`aiokafka.record.memory_records.MemoryRecords`.

    Args:
        data: the batches of a partition that a fetch returned.
    """

    def __init__(self, data: bytes) -> None:
        self._records = MemoryRecords(data)
        self._data = memoryview(data)
        self._at = 0
        self.tp: Any = None

    def size_in_bytes(self) -> int:
        """See MemoryRecords."""
        return int(self._records.size_in_bytes())

    def has_next(self) -> bool:
        """See MemoryRecords; False once the poll holds as much as it may."""
        budget = _budget.get()
        return self._records.has_next() and (budget is None or budget.left > 0)

    def next_batch(self) -> Any:
        """See MemoryRecords; a batch that is too large becomes a batch of one record."""
        batch: Any = self._records.next_batch()
        data = self._data[self._at :]
        end = 12 + _LENGTH.unpack_from(data, 8)[0]
        self._at += end
        is_legacy = data[_MAGIC_AT] < 2
        codec = data[_LEGACY_CODEC_AT if is_legacy else _CODEC_AT] & 7
        if not codec:
            return batch
        begin = _legacy_value_at(data) if is_legacy else _HEADER_BYTES
        size = uncompressed_size(codec, data[begin:end], BATCH_MAX_BYTES)
        if size is None:
            records = 1 if is_legacy else _LENGTH.unpack_from(data, _COUNT_AT)[0]
            return _RefusedBatchRecords(batch, self.tp, records, end)
        budget = _budget.get()
        if budget is not None:
            budget.left -= size
        return batch


def _legacy_value_at(data: memoryview) -> int:
    """Find the begin of the value in a message of version 0 or 1."""
    at = 18 + 8 * data[_MAGIC_AT]
    key_length: int = _LENGTH.unpack_from(data, at)[0]
    return at + 4 + max(0, key_length) + 4


@dataclass(frozen=True)
class _Substitute:
    """The record that stands for a refused batch."""

    offset: int
    timestamp: int
    value: RefusedBatch
    timestamp_type: int = 0
    key: None = None
    headers: tuple[()] = ()
    checksum: None = None


class _RefusedBatchRecords:
    """A batch with one substitute record; all other attributes are the batch's own."""

    def __init__(self, batch: Any, tp: Any, records: int, compressed: int) -> None:
        self._batch = batch
        self._tp = tp
        self._records = records
        self._compressed = compressed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __iter__(self) -> Iterator[_Substitute]:
        first, last = self._batch.base_offset, self._batch.next_offset - 1
        value = RefusedBatch.of(first, last, self._records, self._compressed)
        _log_refused(self._tp, value)
        yield _Substitute(last, getattr(self._batch, "max_timestamp", None) or 0, value)


_logged = {"at": -LOG_INTERVAL_SECONDS, "batches": 0.0}


def _log_refused(tp: Any, value: RefusedBatch) -> None:
    _logged["batches"] += 1
    if monotonic() - _logged["at"] < LOG_INTERVAL_SECONDS:
        return
    log.error(
        "a batch of records is too large uncompressed and is not read; a dead letter says where it"
        " is",
        extra={
            "topic": None if tp is None else tp.topic,
            "partition": None if tp is None else tp.partition,
            "first_offset": value.first_offset,
            "last_offset": value.last_offset,
            "records": value.records,
            "limit_bytes": BATCH_MAX_BYTES,
            "batches": round(_logged["batches"]),
        },
    )
    _logged.update(at=monotonic(), batches=0.0)


class PartitionRecords(fetcher.PartitionRecords):  # type: ignore[misc]
    """aiokafka's class, which tells its batches their partition."""

    def __init__(self, tp: Any, records: BoundedRecords, *args: Any) -> None:
        records.tp = tp
        super().__init__(tp, records, *args)


fetcher.MemoryRecords = BoundedRecords
fetcher.PartitionRecords = PartitionRecords
