"""An endpoint's progress in a partition: its position, and the alerts that wait for a retry.

Both travel in one commit of the endpoint's consumer group: the position is the offset, and the
retries are its metadata. So a crash, or a new owner, finds them as they were at the same moment.
The metadata also names the log, because offsets mean nothing in a topic that was made again.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.topic_id import NO_ID

WAITING_MAX = 240
"""Most alerts of a partition that wait for a retry or are under way before reading stops."""

METADATA_MAX_BYTES = 4096
"""Kafka's default limit of the metadata of a commit (offset.metadata.max.bytes)."""

_VERSION = b"\x01"
_RETRY = struct.Struct(">IBI")  # distance to the position, failed attempts, due in seconds
_DISTANCE_MAX = 2**32 - 1

CONCURRENCY_MAX = 64
"""Most deliveries under way for an endpoint in a process. All of them may fail past
:data:`WAITING_MAX`, and the metadata must hold them, too."""


@dataclass(frozen=True)
class Retry:
    """An alert that waits for its next attempt.

    Attributes:
        offset: of its record.
        failed: attempts that have failed.
        due: time of the next attempt, epoch seconds.
    """

    offset: int
    failed: int
    due: float


class PartitionProgress:
    """An endpoint's progress in one partition.

    Args:
        position: offset of the first record that is not settled.
        retries: alerts before it that wait for a retry.
        log_id: id of the topic.
    """

    def __init__(self, position: int, retries: Iterable[Retry] = (), log_id: bytes = NO_ID) -> None:
        self.next_offset = position
        self.log_id = log_id
        self._under_way: dict[int, float] = {}  # offset of a first attempt: the record's time
        self._waiting = {retry.offset: retry for retry in retries}
        self._retried: set[int] = set()

    @property
    def position(self) -> int:
        """Offset of the first record that is neither settled nor waiting for a retry."""
        return min(self._under_way, default=self.next_offset)

    @property
    def waiting(self) -> int:
        """Number of alerts that wait for a retry."""
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether reading must stop until retries are done."""
        return len(self._waiting) + len(self._under_way) >= WAITING_MAX

    def oldest_ms(self) -> float | None:
        """Return the earliest time of a record whose first attempt is under way, epoch ms."""
        return min(self._under_way.values(), default=None)

    def begin(self, offset: int, time_ms: float) -> bool:
        """Begin a record; False if it is not new."""
        if offset < self.next_offset:
            return False
        self.next_offset = offset + 1
        self._under_way[offset] = time_ms
        return True

    def settle(self, offset: int) -> None:
        """End a record: delivered, left out, or a dead letter."""
        self._under_way.pop(offset, None)
        self._waiting.pop(offset, None)
        self._retried.discard(offset)

    def wait(self, retry: Retry) -> None:
        """Let an alert wait for its next attempt."""
        self._under_way.pop(retry.offset, None)
        self._retried.discard(retry.offset)
        self._waiting[retry.offset] = retry

    def take_due(self, now: float, most: int) -> list[Retry]:
        """Take the retries that are due, the oldest first; each must be settled or wait again.

        Args:
            now: wall clock, epoch seconds.
            most: most retries.
        """
        due = [r for r in self._waiting.values() if r.due <= now and r.offset not in self._retried]
        taken = sorted(due, key=lambda retry: retry.due)[:most]
        self._retried.update(retry.offset for retry in taken)
        return taken

    def hasten(self, now: float) -> None:
        """Make the earliest retry due: the endpoint works again, and others wait behind it."""
        idle = [r for r in self._waiting.values() if r.offset not in self._retried]
        if idle:
            first = min(idle, key=lambda retry: retry.due)
            if first.due > now:
                self._waiting[first.offset] = Retry(first.offset, first.failed, now)

    def next_due(self) -> float | None:
        """Return the time of the earliest retry that is not taken, epoch seconds."""
        idle = (r.due for r in self._waiting.values() if r.offset not in self._retried)
        return min(idle, default=None)

    def metadata(self) -> str:
        """Encode the log's id and the waiting retries for a commit of :attr:`position`."""
        position = self.position
        # A retry at or past the position is read again with it.
        rows = [r for r in self._waiting.values() if 0 < position - r.offset <= _DISTANCE_MAX]
        content = b"".join(
            _RETRY.pack(position - r.offset, r.failed, min(int(r.due), _DISTANCE_MAX)) for r in rows
        )
        return base64.b64encode(_VERSION + self.log_id + content).decode()


@dataclass(frozen=True)
class CommittedProgress:
    """An endpoint's progress in a partition, as it was committed.

    Attributes:
        position: offset of the first record that is not settled.
        retries: alerts before it that wait for a retry.
        log_id: id of the topic; :data:`pipeline.topic_id.NO_ID` if the commit names none.
    """

    position: int
    retries: tuple[Retry, ...] = ()
    log_id: bytes = NO_ID


def decode_commit(position: int, metadata: str | None) -> CommittedProgress:
    """Decode a commit; it has no retries and no log if another program wrote its metadata.

    >>> progress = PartitionProgress(7, [Retry(3, 2, 1_700_000_000.0)])
    >>> decode_commit(7, progress.metadata()).retries
    (Retry(offset=3, failed=2, due=1700000000.0),)
    """
    try:
        content = base64.b64decode(metadata or "", validate=True)
    except (binascii.Error, ValueError):
        return CommittedProgress(position)
    begin = len(_VERSION) + len(NO_ID)
    log_id, rows = content[len(_VERSION) : begin], content[begin:]
    if content[:1] != _VERSION or len(log_id) != len(NO_ID) or len(rows) % _RETRY.size:
        return CommittedProgress(position)
    retries = tuple(
        Retry(position - distance, failed, float(due))
        for distance, failed, due in _RETRY.iter_unpack(rows)
        if distance <= position
    )
    return CommittedProgress(position, retries, log_id)
