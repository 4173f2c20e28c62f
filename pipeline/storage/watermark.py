"""A partition's watermark as bytes: how far its states have applied the log."""

from __future__ import annotations

import struct

import msgspec

from pipeline.topic_id import NO_ID

WATERMARK_FORMAT = 2
"""Version of the layout; raise it with every change of the layout."""

_LAYOUT = struct.Struct("<B3xIqqQ16s16sqq")
_LAYOUT_1 = struct.Struct("<B3xIqqQ")
"""Format 1 had no topic ids."""


class Watermark(msgspec.Struct, frozen=True):
    """How far a partition's states have applied its log; saved with them, atomically.

    Attributes:
        partitions: partition count of the topic at the time of writing.
        next_offset: the first offset that is not applied yet.
        scores_offset: offset in the scores partition. Every score of a transaction that is not
            applied yet stands at this offset or later. A lower bound is right, too.
        writer: random number of the process that wrote it, so that no two are alike.
        log_id: id of the transactions topic that the states are computed from.
        scores_log_id: id of the scores topic that ``scores_offset`` refers to.
        scores_begin: offset in the scores partition. Earlier scores belong to another log.
        stale_to: committed offsets up to this one may refer to an earlier log, unless they name
            another.
    """

    partitions: int
    next_offset: int
    scores_offset: int
    writer: int
    log_id: bytes = NO_ID
    scores_log_id: bytes = NO_ID
    scores_begin: int = 0
    stale_to: int = 0

    def to_bytes(self) -> bytes:
        """Return 80 bytes, little-endian."""
        return _LAYOUT.pack(
            WATERMARK_FORMAT,
            self.partitions,
            self.next_offset,
            self.scores_offset,
            self.writer,
            self.log_id,
            self.scores_log_id,
            self.scores_begin,
            self.stale_to,
        )

    @classmethod
    def from_bytes(cls, value: bytes) -> Watermark:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            ValueError: the value has another size or format, or numbers that no worker writes.
        """
        layout = {WATERMARK_FORMAT: _LAYOUT, 1: _LAYOUT_1}.get(value[0] if value else 0)
        if layout is None or len(value) != layout.size:
            raise ValueError(f"a watermark of {len(value)} bytes in an unknown format")
        mark = cls(*layout.unpack(value)[1:])
        offsets = mark.next_offset, mark.scores_offset, mark.scores_begin, mark.stale_to
        if mark.partitions < 1 or min(offsets) < 0:
            raise ValueError("a damaged watermark, of no partitions or a negative offset")
        return mark
