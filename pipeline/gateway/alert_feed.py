"""Alerts by cursor: the offsets of all partitions of the alerts topic, opaque to clients."""

from __future__ import annotations

import heapq
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from aiokafka import TopicPartition

from pipeline.gateway.problems import INVALID_PARAMETER, FieldError, Problem
from pipeline.kafka.log_reader import LogReader
from pipeline.messages.decoding import NOT_JSON
from pipeline.messages.scores import Alert, decode_alert
from pipeline.settings import Settings

CURSOR_MAX_CHARACTERS = 60_000
"""Longest cursor: 10,000 partitions need about so much, and a longer URL is no HTTP to uvicorn."""

SCANNED_MAX = 5_000
"""Most alerts that one request reads; with a filter, fewer match."""

FEED_BYTES = 256 * 1024
"""Bytes of a partition in one fetch."""

CURSOR_VERSION = 1


class _Cursor(msgspec.Struct, frozen=True, array_like=True):
    version: int
    offsets: list[int]


_encode_cursor = msgspec.msgpack.Encoder().encode
_decode_cursor = msgspec.msgpack.Decoder(_Cursor).decode


class AlertPage(msgspec.Struct, frozen=True):
    """A page of alerts.

    Attributes:
        alerts: in order of their records' time, as the alerts topic has them.
        cursor: where the next page begins.
        more: whether there were further records when the page was read.
    """

    alerts: list[msgspec.Raw]
    cursor: str
    more: bool


@dataclass(frozen=True)
class AlertFilter:
    """The alerts that a caller wants. A value of None does not filter.

    Attributes:
        decision: ``review`` or ``decline``.
        min_score: lowest score.
        merchant_id: the merchant.
    """

    decision: str | None = None
    min_score: float | None = None
    merchant_id: str | None = None

    def takes(self, alert: Alert) -> bool:
        """Tell whether the caller wants an alert."""
        return (
            self.decision in (None, alert.decision)
            and self.merchant_id in (None, alert.merchant_id)
            and (self.min_score is None or alert.score >= self.min_score)
        )


class AlertFeed:
    """Reads of the alerts topic.

    Args:
        settings: names the topic.
        reader: reads it.
    """

    def __init__(self, settings: Settings, reader: LogReader) -> None:
        self._topic = settings.topic("alerts")
        self._reader = reader

    async def page(
        self,
        cursor: str | None,
        from_ms: int | None,
        most: int,
        wanted: AlertFilter,
        sees: Callable[[Alert], bool],
    ) -> AlertPage:
        """Return the alerts after a cursor, or from a time on, or from the topic's begin.

        Args:
            cursor: of an earlier page.
            from_ms: epoch milliseconds of the records' time; only without a cursor.
            most: most alerts.
            wanted: the caller's filter.
            sees: tells whether the caller may see an alert.

        Raises:
            Problem: the cursor is none.
            LogUnavailableError: the broker does not answer.
        """
        partitions = range(self._reader.partitions(self._topic))
        bounds = await self._reader.bounds(self._topic, partitions)
        if cursor is not None:
            offsets = _offsets(cursor, len(partitions))
        elif from_ms is not None:
            times = await self._reader.offsets_at(self._topic, partitions, from_ms)
            offsets = [bounds[p].end if (at := times.get(p)) is None else at for p in partitions]
        else:
            offsets = [0] * len(partitions)
        # Records before the begin are deleted; those past the end are of a topic of that name
        # before this one.
        offsets = [
            max(bounds[p].begin, at) if at <= bounds[p].end else bounds[p].begin
            for p, at in enumerate(offsets)
        ]
        behind = {
            TopicPartition(self._topic, p): at for p, at in enumerate(offsets) if at < bounds[p].end
        }
        found: list[msgspec.Raw] = []
        if behind:
            fetched = await self._reader.fetch(behind, FEED_BYTES)
            for place, part in fetched.items():
                if not part.records:
                    offsets[place.partition] = max(part.next_offset, offsets[place.partition])
            queues = [
                [(r.timestamp, place.partition, r.offset, r.value) for r in part.records]
                for place, part in fetched.items()
            ]
            last = {place.partition: part for place, part in fetched.items()}
            for scanned, (_, partition, offset, value) in enumerate(heapq.merge(*queues)):
                if len(found) == most or scanned == SCANNED_MAX:
                    break
                offsets[partition] = offset + 1
                part = last[partition]
                if part.records[-1].offset == offset:
                    offsets[partition] = part.next_offset  # past transactions' markers, too
                alert = _alert(value)
                if alert is not None and wanted.takes(alert) and sees(alert):
                    found.append(msgspec.Raw(value))
        more = any(offsets[p] < bounds[p].end for p in partitions)
        return AlertPage(found, _encoded(offsets), more)


def _alert(value: bytes | None) -> Alert | None:
    try:
        return decode_alert(value or b"")
    except NOT_JSON:
        return None


def _encoded(offsets: list[int]) -> str:
    packed = _encode_cursor(_Cursor(CURSOR_VERSION, offsets))
    return urlsafe_b64encode(packed).decode().rstrip("=")


def _offsets(cursor: str, partitions: int) -> list[int]:
    """Read a cursor; partitions that were added since then begin at their begin.

    Raises:
        Problem: no gateway made it.
    """
    try:
        if len(cursor) > CURSOR_MAX_CHARACTERS:
            raise ValueError
        found = _decode_cursor(urlsafe_b64decode(cursor.encode("ascii") + b"=="))
        if found.version != CURSOR_VERSION or min(found.offsets, default=0) < 0:
            raise ValueError
    except (ValueError, msgspec.DecodeError):
        error = FieldError("is no cursor of this gateway's", parameter="cursor")
        raise Problem(INVALID_PARAMETER, errors=[error]) from None
    return (found.offsets + [0] * partitions)[:partitions]
